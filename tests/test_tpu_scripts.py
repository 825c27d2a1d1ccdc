"""The TPU scripts: a dry run prints the commands, each as it can be pasted into a shell."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "common.sh")
NEEDED = {
    "create.sh": ["--type", "v4-8"],
    "resume.sh": ["--type", "v4-8", "--", "train", "--gin.X=a b"],
    "run.sh": ["--", "train", "--gin.X=a b"],
}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    command = [str(SCRIPTS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def dry_run(name: str, *arguments: str) -> list[list[str]]:
    done = run(name, "--dry-run", "--name", "atlas", "--zone", "us-central2-b", *arguments)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout, comments=True)
    starts = [i for i, word in enumerate(words) if word in ("gcloud", "git")]
    return [words[a:b] for a, b in zip(starts, [*starts[1:], len(words)], strict=True)]


def test_the_scripts_are_those_of_a_slices_life():
    assert NAMES == [
        "create.sh", "delete.sh", "logs.sh", "resume.sh", "run.sh", "setup.sh", "stop.sh",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_prints_the_commands_with_name_and_zone(name):
    commands = dry_run(name, *NEEDED.get(name, []))
    cloud = [command for command in commands if command[0] == "gcloud"]
    assert cloud
    for command in cloud:
        assert command[1:3] == ["compute", "tpus"]
        assert "--zone=us-central2-b" in command
        assert any(word == "atlas" or word.startswith("atlas:") for word in command)


@pytest.mark.parametrize("name", NAMES)
def test_help_is_the_comment_at_the_top(name):
    done = run(name, "--help")
    assert done.returncode == 0
    assert f"tpu_scripts/{name} --name atlas" in done.stdout
    assert "--dry-run" in done.stdout


def test_create_asks_for_the_type_and_its_runtime():
    create, _ = dry_run("create.sh", "--type", "v5litepod-16", "--spot", "--project", "mine")
    assert "--accelerator-type=v5litepod-16" in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert "--spot" in create
    assert "--project=mine" in create


def test_run_keeps_the_commands_words_apart_on_the_hosts():
    (command,) = dry_run("run.sh", "--", "train", "--gin.X=a b", "--gin.Y='q'")
    assert "--worker=all" in command
    remote = next(word for word in command if word.startswith("--command="))
    line = next(text for text in remote.splitlines() if text.startswith("nohup "))
    words = shlex.split(line)
    assert words[1:5] == ["venv/bin/atlas-jax", "train", "--gin.X=a b", "--gin.Y='q'"]


def test_setup_copies_the_commit_and_installs_the_tpu_extra_with_the_pinned_versions():
    archive, copy, install = dry_run("setup.sh")
    assert archive[:2] == ["git", "archive"]
    assert "--worker=all" in copy
    remote = " ".join(install)
    assert "code[tpu]" in remote
    assert "--constraint code/requirements.txt" in remote


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("stop.sh", [], "which slice? --name NAME or TPU_NAME"),
        ("stop.sh", ["--name", "x"], "which zone? --zone ZONE or TPU_ZONE"),
        ("stop.sh", ["--nme", "x"], "unknown flag --nme; see --help"),
        ("stop.sh", ["--name"], "--name needs a value"),
        ("logs.sh", ["--worker", "--dry-run"], "--worker needs a value"),
        ("create.sh", ["--name", "x", "--zone", "y"], "which accelerator? --type v4-8"),
        ("run.sh", ["--name", "x", "--zone", "y"], "what shall run? write it after --"),
    ],
)
def test_a_wrong_call_says_what_is_missing(name, arguments, message):
    done = run(name, *arguments)
    assert (done.returncode, done.stderr) == (2, f"{name}: error: {message}\n")


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra [dev])")
    files = [str(SCRIPTS.parent / ".ci" / "run"), *map(str, SCRIPTS.glob("*.sh"))]
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True, cwd=SCRIPTS.parent)
    assert done.stdout == ""
