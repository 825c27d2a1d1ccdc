"""What docs/serving.md gives for operators is what systemd and the command take."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from atlas_jax import cli
from atlas_jax.demo.paths import nano_checkpoint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")


def block(first: str) -> str:
    """The indented block of the page that begins with this line, without what follows it."""
    lines = PAGE[PAGE.index(f"    {first}") :].splitlines()
    end = next(n for n, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line.removeprefix("    ") for line in lines[:end]).strip() + "\n"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("needs systemd-analyze")
    unit, command = block("[Unit]"), Path(sys.executable)
    assert "ExecStart=/srv/atlas/.venv/bin/atlas-jax serve" in unit
    (tmp_path / "atlas-jax.service").write_text(
        unit.replace("/srv/atlas/.venv/bin/atlas-jax", str(command)), "utf-8"
    )
    run = subprocess.run(
        [verify, "verify", "--man=no", tmp_path / "atlas-jax.service"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "atlas-jax.service" not in run.stderr, run.stderr


def test_the_command_takes_what_the_container_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = block("FROM python:").split("\n\n")[0].replace("\\\n", " ")
    told = dict(line.split(" ", 1) for line in file.splitlines() if line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    low, high = re.findall(r"3\.(\d+)", project["requires-python"])
    assert int(low) <= int(re.findall(r"3\.(\d+)", told["FROM"])[0]) < int(high)
    assert set(re.findall(r"\[(\w+)\]", told["RUN"])) <= set(project["optional-dependencies"])
    assert told["USER"] in told["RUN"]
    name, *arguments = [*json.loads(told["ENTRYPOINT"]), *json.loads(told["CMD"])]
    assert name in project["scripts"]
    monkeypatch.chdir(tmp_path)  # the gin files are found from anywhere
    (tmp_path / "model").symlink_to(nano_checkpoint())
    monkeypatch.delenv("ATLAS_JAX_API_KEY", raising=False)
    assert cli.main(arguments) == 2
    assert "set an API key" in capsys.readouterr().err
