"""The console script: every subcommand exists, and a slip is answered with the nearest name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import atlas_jax
from atlas_jax import cli

ROOT = Path(atlas_jax.__file__).parents[1]


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    assert max(map(len, text.splitlines())) <= 100


def test_no_command_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: atlas-jax COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_an_entry_point_that_answers_help(name, capsys):
    try:
        code = cli.main([name, "--help"])
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    assert code == 0
    assert f"atlas-jax {name}" in capsys.readouterr().out


def test_a_dash_serves_as_underscore(capsys):
    assert cli.main(["build-index", "--help"]) == 0


def test_a_misspelt_command_is_told_the_nearest(capsys):
    assert cli.main(["evalute"]) == 2
    assert capsys.readouterr().err == (
        "atlas-jax: error: no command is called evalute; did you mean evaluate?\n"
    )


def test_an_entry_point_reports_a_users_error_in_one_line(capsys):
    assert cli.main(["train", "--gin.TrainConfig.total_step=3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "did you mean total_steps?" in error


def test_the_version_is_told_and_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"atlas-jax {atlas_jax.__version__}\n"
    assert f'version = "{atlas_jax.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_python_m_is_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "atlas_jax", "--version"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout == f"atlas-jax {atlas_jax.__version__}\n"


def all_modules() -> list[str]:
    files = sorted((ROOT / "atlas_jax").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


NEEDS_AN_EXTRA = ("atlas_jax.datasets.beam_pipeline",)  # [beam]

# tensorboardX takes torch tensors and so tries to import torch; without it, it does as well.
WITHOUT_THEM = """
import importlib, sys
for absent in ("torch", "tensorflow", "transformers"):
    sys.modules[absent] = None  # any import of it now raises ImportError
for name in {names!r}:
    importlib.import_module(name)
"""


def test_garbage_is_collected_again_once_a_command_is_imported():
    code = """
import gc, sys
from atlas_jax import cli
sys.argv = ["atlas-jax", "doctor", "--help"]
try:
    cli.console_script()
except SystemExit as stop:
    assert stop.code == 0, stop.code
assert gc.isenabled() and gc.get_freeze_count() > 10_000, gc.get_freeze_count()
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_module_works_without_torch_tensorflow_and_transformers():
    names = [name for name in all_modules() if name not in NEEDS_AN_EXTRA]
    code = WITHOUT_THEM.format(names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command, unneeded",
    [
        # Only training or serving needs them.
        ("ask", {"torch", "optax", "orbax", "starlette", "uvicorn", "matplotlib"}),
        # tensorboardX would import it.
        ("train", {"torch", "starlette", "uvicorn", "matplotlib"}),
    ],
)
def test_a_command_waits_for_no_package_that_it_does_not_need(command, unneeded):
    code = f"import sys, atlas_jax.{command}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert unneeded.isdisjoint(done.stdout.split())


# What `convert --verify` compares with, and nothing else ever calls.
ALLOWED = ROOT / "atlas_jax" / "interop" / "torch_side.py"


def test_no_function_imports_them_either():
    imports = re.compile(r"^\s*(?:import|from)\s+(?:torch|tensorflow|transformers)\b", re.MULTILINE)
    files = set((ROOT / "atlas_jax").rglob("*.py")) - {ALLOWED}
    assert [str(path) for path in files if imports.search(path.read_text(encoding="utf-8"))] == []
