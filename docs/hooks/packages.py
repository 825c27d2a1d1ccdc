"""A page for each package of atlas_jax, and one that lists them."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "atlas_jax"
INTRODUCTION = """# Packages

Every package and what its modules hold. Imports point one way, which [Architecture](
../../architecture.md) shows. What a program should import is the [Python face](../atlas_jax.md).

"""


def names() -> list[str]:
    """The packages, in alphabetical order."""
    return sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def overview() -> str:
    """Every package with the first line of each module's docstring."""
    parts = [INTRODUCTION]
    for name in names():
        parts.append(f"## [{name}]({name}.md)\n\n| module | |\n|---|---|\n")
        parts += [
            f"| `{module.stem}` | {_first_line(module)} |\n"
            for module in sorted((ROOT / name).glob("*.py"))
            if not module.stem.startswith("__")
        ]
        parts.append("\n")
    return "".join(parts)


def page(name: str) -> str:
    """The page of one package; mkdocstrings fills it."""
    modules = sorted(path.stem for path in (ROOT / name).glob("*.py"))
    shown = [module for module in modules if not module.startswith("__")]
    return f"# {name}\n\n" + "".join(f"::: atlas_jax.{name}.{one}\n\n" for one in shown)


def _first_line(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "&#124;").replace("<", "&lt;")
