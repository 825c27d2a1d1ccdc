"""The TPU scripts: a dry run prints the commands, each as it can be pasted into a shell."""

import os
import shlex
import shutil
import subprocess
import time
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
        "create.sh", "delete.sh", "logs.sh", "resume.sh", "run.sh", "setup.sh", "status.sh",
        "stop.sh",
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
    line = next(text for text in remote.splitlines() if text.startswith("venv/bin/atlas-jax "))
    words = shlex.split(line)
    assert words == ["venv/bin/atlas-jax", "train", "--gin.X=a b", "--gin.Y='q'", "&"]


# Stands for atlas-jax on a host: tells its words, then ends as the first of them says.
COMMAND = """#!/usr/bin/env bash
trap 'sleep 0.2; exit 75' TERM
printf '%s\\n' "$@"
[ "$1" = wait ] || exit "$1"
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize(("word", "code"), [("0", "0"), ("2", "2"), ("wait", "75")])
def test_on_the_host_the_exit_code_is_noted_also_after_a_stop(
    tmp_path: Path, word: str, code: str
) -> None:
    binary = tmp_path / "atlas-jax" / "venv" / "bin" / "atlas-jax"
    binary.parent.mkdir(parents=True)
    binary.write_text(COMMAND)
    binary.chmod(0o755)

    def on_host(name: str, *arguments: str) -> str:
        (command,) = dry_run(name, *arguments)
        remote = next(w for w in command if w.startswith("--command=")).removeprefix("--command=")
        environment = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(
            ["bash", "-c", remote], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def noted() -> str:
        (_, command) = dry_run("status.sh")
        remote = next(w for w in command if w.startswith("--command=")).removeprefix("--command=")
        environment = {**os.environ, "HOME": str(tmp_path)}
        return subprocess.run(
            ["bash", "-c", remote], capture_output=True, text=True, env=environment, timeout=60
        ).stdout.strip()

    on_host("run.sh", "--", word, "a b", "it's $HOME")
    if word == "wait":
        for _ in range(200):
            if (tmp_path / "atlas-jax" / "run.log").read_text():
                break
            time.sleep(0.05)
        assert noted() == "running"
        on_host("stop.sh")
    for _ in range(200):
        if noted() == code:
            break
        time.sleep(0.05)
    assert noted() == code
    log = (tmp_path / "atlas-jax" / "run.log").read_text()
    assert log.splitlines() == [word, "a b", "it's $HOME"]


# Stands for gcloud: the slice is there, and each look at the run finds the next of CODES.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$HOME/calls"
case "$*" in
*describe*)
    head -n 1 "$HOME/states"
    [ "$(wc -l < "$HOME/states")" -le 1 ] || sed -i 1d "$HOME/states"
    ;;
*"cat run.code"*) head -n 1 "$HOME/codes"; sed -i 1d "$HOME/codes" ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "codes", "starts", "made", "ends"),
    [
        (["ACTIVE"], ["running", "0"], 1, 0, 0),
        (["ACTIVE"], ["75", "running", "75", "0"], 3, 0, 0),
        (["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"], ["running", "0"], 2, 1, 0),
        (["ACTIVE"], ["1", "75", "1", "1", "134"], 5, 0, 2),
        (["ACTIVE"], ["2"], 1, 0, 2),
    ],
)
def test_resume_keeps_a_run_going_until_it_is_done(
    tmp_path: Path, states: list[str], codes: list[str], starts: int, made: int, ends: int
) -> None:
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    done = subprocess.run(
        [str(SCRIPTS / "resume.sh"), "--name", "atlas", "--zone", "z", "--type", "v4-8"]
        + ["--every", "0", "--", "train"],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        timeout=120,
    )
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == ends, done.stderr
    assert calls.count("nohup bash run.sh") == starts
    assert calls.count("queued-resources create") == made
    assert calls.count("queued-resources delete") == made


def test_setup_copies_the_commit_and_installs_the_tpu_extra_with_the_pinned_versions():
    archive, copy, install = dry_run("setup.sh")
    assert archive[:2] == ["git", "archive"]
    assert "--worker=all" in copy
    remote = " ".join(install)
    assert "code[tpu]" in remote
    assert "--constraint code/requirements.txt" in remote


def test_a_bucket_is_mounted_on_every_host_also_when_a_slice_is_made_again():
    *_, mount = dry_run("setup.sh", "--bucket", "mine")
    assert "--worker=all" in mount
    assert "gcsfuse --implicit-dirs mine /mnt/mine" in " ".join(mount)
    again = dry_run("resume.sh", "--type", "v4-8", "--bucket", "mine", "--", "train")
    assert mount in again


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
