"""README's Python program runs as it stands there, on README's own passage."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (passage,) = re.findall(r'^    (\{"id": .*\})$', page, re.MULTILINE)
    (tmp_path / "passages.jsonl").write_text(f"{passage}\n", encoding="utf-8")
    (tmp_path / "atlas_jax").symlink_to(ROOT / "atlas_jax")  # for the path of the shipped model
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(program, "README.md", "exec"), {})
    assert re.search(r" -\d+\.\d+ Aspirin -?\d+\.\d+$", said.getvalue().strip())
