"""`make` runs on the Pythons that the packages are built for, and says so on another."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import atlas_jax

ROOT = Path(atlas_jax.__file__).parents[1]
# A Python that says it is of another version.
OTHER = """#!/bin/sh
exec {python} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
"""


def make(folder: Path, version: tuple[int, ...], target: str) -> subprocess.CompletedProcess[str]:
    (folder / "bin").mkdir()
    for name in ("other", "bin/python"):
        (folder / name).write_text(OTHER.format(python=sys.executable, version=version))
        (folder / name).chmod(0o755)
    if not target.startswith("."):
        (folder / target).unlink()
    return subprocess.run(
        ["make", f"VENV={folder}", f"PYTHON={folder}/other", f"{folder}/{target}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("target", ["bin/python", ".atlas-jax-run"])  # to be made, or active
@pytest.mark.parametrize("version", [(3, 10, 9), (3, 14, 0)])
def test_another_python_is_refused(tmp_path: Path, version: tuple[int, ...], target: str) -> None:
    done = make(tmp_path, version, target)
    assert done.returncode != 0
    told = rf"error: \S+ is Python 3\.{version[1]}; needed is 3\.11, 3\.12 or 3\.13\n(set|make) "
    assert re.match(told, done.stderr), done.stderr
    assert "pip" not in done.stdout


def test_readme_and_package_name_the_same_pythons() -> None:
    package = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11,<3.14"' in package
    named = re.findall(r"Python :: (3\.\d+)", package)
    assert named == ["3.11", "3.12", "3.13"]
    assert "\nPython 3.11, 3.12 or 3.13.\n" in (ROOT / "README.md").read_text()


def test_the_workflow_runs_ci_on_the_same_pythons() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["ci"]
    runs = job["strategy"]["matrix"]["include"]
    assert [run["python"] for run in runs] == ["3.11", "3.12", "3.13"]
    assert runs[0] == {"python": "3.11", "parity": 1, "plan": 1, "tests": ""}  # nothing left out
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == [".ci/run ${{ matrix.tests }}"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
