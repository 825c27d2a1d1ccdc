"""Gin becomes values in one place; below the entry points a config is an argument."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import atlas_jax
from atlas_jax import cli, from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.training.config import OptimizerConfig, StepConfig

PACKAGE = Path(atlas_jax.__file__).parent
# Who may ask gin: the entry points, and what runs several of them in one process.
ENTRIES = {f"{module.replace('.', '/')}.py" for module, _ in cli.COMMANDS.values()}
MAY_ASK = ENTRIES | {"demo/commands.py"}
MAY_IMPORT_GIN = {"from_gin.py", "core/config.py", "core/gin_files.py"}
CLASSES = {one.__name__ for one in from_gin.CONFIGURABLES if isinstance(one, type)}


def _files() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8"))


def _asks(tree: ast.AST) -> Iterator[str]:
    """Places where a tree imports what turns gin into values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("atlas_jax.from_gin"))


def _imports_gin(tree: ast.AST) -> bool:
    return any(
        (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "gin" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gin")
        for node in ast.walk(tree)
    )


def test_only_entry_points_turn_gin_into_configs() -> None:
    assert {name for name, tree in _files() if list(_asks(tree))} <= MAY_ASK
    assert {name for name, tree in _files() if _imports_gin(tree)} == MAY_IMPORT_GIN


def test_no_function_makes_a_config_of_its_own() -> None:
    """A default of an argument or a field is the class's own; inside a body it hides a setting."""
    found = []
    for name, tree in _files():
        if name in MAY_ASK | {"from_gin.py"}:
            continue
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in [call for statement in function.body for call in ast.walk(statement)]:
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in CLASSES
                    and not node.args
                    and not node.keywords
                ):
                    found.append(f"{name}:{node.lineno} {node.func.id}()")
    assert found == []


def test_a_config_takes_nothing_from_gin_by_itself() -> None:
    load_gin([], ["StepConfig.k=7", "reader/OptimizerConfig.learning_rate=0.5"])
    assert from_gin.told(StepConfig) == dataclasses.replace(StepConfig(), k=7)
    assert StepConfig().k == 20
    assert from_gin.told(OptimizerConfig, "reader").learning_rate == 0.5
    assert from_gin.told(OptimizerConfig, "retriever") == OptimizerConfig()
    assert from_gin.fields_told(StepConfig) == {"k": 7}


@pytest.mark.parametrize("config", sorted(CLASSES))
def test_every_config_class_is_frozen(config: str) -> None:
    (found,) = (one for one in from_gin.CONFIGURABLES if getattr(one, "__name__", "") == config)
    assert found.__dataclass_params__.frozen
