"""The tutorial's commands do what its text says, run one after the other in a shell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import atlas_jax

ROOT = Path(atlas_jax.__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
SHELL = f'set -eu\natlas-jax() {{ {sys.executable} -m atlas_jax "$@"; }}\n'


def script() -> str:
    """Every indented line of the page."""
    return "".join(re.findall(r"(?m)^    (.*\n)", PAGE))


@pytest.mark.slow
def test_the_tutorial_ends_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "atlas_jax").mkdir()
    (tmp_path / "atlas_jax" / "checkpoints").symlink_to(ROOT / "atlas_jax" / "checkpoints")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        ["bash", "-c", SHELL + script()],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    answers = re.findall(r"^answer: (.*?)  \(", done.stdout, re.MULTILINE)
    first = re.findall(r"^│ +1 │ [ \d.]+ │ .*\[(.*)\]", done.stdout, re.MULTILINE)
    assert answers[1:] == ["Essin", "Lundby"]
    assert f"answer: {answers[0]}" in PAGE
    assert first[1:] == ["coro-1", "coro-1"]
    assert "the answer is `Essin`" in PAGE and "The answer is `Lundby`" in PAGE
