"""The TPU scripts: a dry run prints the commands, each as it can be pasted into a shell."""

import dataclasses
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from atlas_jax.training.chips import CHIPS, parse_slice

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "common.sh")
NEEDED = {
    "create.sh": ["--type", "v4-8"],
    "resume.sh": ["--type", "v4-8", "--", "train", "--gin.X=a b"],
    "run.sh": ["--", "train", "--gin.X=a b"],
}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = ("PATH", "HOME", "LIBTPU_INIT_ARGS")
    environment = {word: os.environ[word] for word in kept if word in os.environ}
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


@pytest.mark.parametrize(
    ("name", "accelerator", "runtime"),
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_every_family_has_clouds_name_and_its_runtime(
    name: str, accelerator: str, runtime: str
) -> None:
    create, _ = dry_run("create.sh", "--type", name)
    assert f"--accelerator-type={accelerator}" in create
    assert f"--runtime-version={runtime}" in create
    assert create in dry_run("resume.sh", "--type", name, "--", "train")


def test_every_kind_of_chip_that_a_plan_knows_can_be_asked_for() -> None:
    for name, chip in CHIPS.items():
        create, _ = dry_run("create.sh", "--type", f"{name}-{8 * chip.cores_per_chip}")
        (accelerator,) = (word for word in create if word.startswith("--accelerator-type="))
        assert parse_slice(accelerator.removeprefix("--accelerator-type=")).chip is chip


def test_several_slices_are_one_request_and_each_command_goes_to_all_of_them() -> None:
    two = ["--slices", "2"]
    create, _ = dry_run("create.sh", "--type", "v5e-16", *two)
    assert {"--node-count=2", "--node-prefix=atlas"} <= set(create)
    assert not any(word.startswith("--node-id") for word in create)
    for name, verb in (("setup.sh", "scp"), ("run.sh", "ssh"), ("stop.sh", "ssh")):
        commands = [c for c in dry_run(name, *two, *NEEDED.get(name, [])) if verb in c]
        places = [word.partition(":")[0] for c in commands for word in c if "atlas-" in word[:6]]
        assert places == ["atlas-0", "atlas-1"], name
        assert all("--worker=all" in command for command in commands)
    _, look = dry_run("status.sh", *two)
    assert "atlas-0" in look
    (log,) = dry_run("logs.sh", *two, "--slice", "1")
    assert "atlas-1" in log
    assert create in dry_run("resume.sh", "--type", "v5e-16", *two, "--", "train")


@pytest.mark.parametrize("slices", [["--slices", "0"], ["--slices", "many"]])
def test_a_number_of_slices_that_is_none_is_refused(slices: list[str]) -> None:
    done = run("stop.sh", "--dry-run", "--name", "atlas", "--zone", "b", *slices)
    assert (done.returncode, "--slices" in done.stderr) == (2, True)
    done = run("logs.sh", "--dry-run", "--name", "atlas", "--zone", "b", "--slice", "1")
    assert (done.returncode, "--slice 1" in done.stderr) == (2, True)


# Stands for gcloud: each slice waits for the other, so they only end if both run at once.
MEET = """#!/usr/bin/env bash
for word in "$@"; do case "$word" in atlas-*) node="$word" ;; esac; done
touch "$MEETING/$node"
for _ in $(seq 100); do
    [ "$(ls "$MEETING" | wc -l)" = 2 ] && exit "${CODE_OF_1:-0}"
    sleep 0.1
done
exit 9
"""


@pytest.mark.parametrize("code", ["0", "3"])
def test_the_slices_start_together_and_a_failure_is_told(tmp_path: Path, code: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "meeting").mkdir()
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.write_text(MEET)
    gcloud.chmod(0o755)
    environment = {
        "PATH": f"{gcloud.parent}:{os.environ['PATH']}",
        "MEETING": str(tmp_path / "meeting"),
        "CODE_OF_1": code,
    }
    command = [str(SCRIPTS / "stop.sh"), "--name", "atlas", "--zone", "b", "--slices", "2"]
    done = subprocess.run(command, env=environment, timeout=60)
    assert str(done.returncode) == code


def test_run_keeps_the_commands_words_apart_on_the_hosts():
    (command,) = dry_run("run.sh", "--", "train", "--gin.X=a b", "--gin.Y='q'")
    assert "--worker=all" in command
    remote = next(word for word in command if word.startswith("--command="))
    line = next(text for text in remote.splitlines() if text.startswith("venv/bin/atlas-jax "))
    words = shlex.split(line)
    assert words == ["venv/bin/atlas-jax", "train", "--gin.X=a b", "--gin.Y='q'", "&"]


# Stands for atlas-jax on a host: tells its words and what libtpu would be told, then ends as the
# first word says.
COMMAND = """#!/usr/bin/env bash
trap 'sleep 0.2; exit 75' TERM
printf '%s\\n' "$@" "$LIBTPU_INIT_ARGS"
[ "$1" = wait ] || exit "$1"
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("word", "code", "told"), [("0", "0", ""), ("2", "2", "--x=1 --y=2"), ("wait", "75", "")]
)
def test_on_the_host_the_exit_code_is_noted_also_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, code: str, told: str
) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", told)
    binary = tmp_path / "atlas-jax" / "venv" / "bin" / "atlas-jax"
    binary.parent.mkdir(parents=True)
    binary.write_text(COMMAND)
    binary.chmod(0o755)

    def on_host(name: str, *arguments: str) -> str:
        (command,) = dry_run(name, *arguments)
        remote = next(w for w in command if w.startswith("--command=")).removeprefix("--command=")
        environment = {**os.environ, "HOME": str(tmp_path)}
        del environment["LIBTPU_INIT_ARGS"]  # the host has none
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
    assert log.splitlines() == [word, "a b", "it's $HOME", told]


# Stands for gcloud. Each look at the slice finds the next line of `states`, of which the last one
# stays; each look at the run the next of `codes`; a request, a copy onto the hosts or a start fails
# for each line of `requests`, `copies` or `launches` that is `no`.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$HOME/calls"
next() {
    head -n 1 "$HOME/$1"
    sed -i 1d "$HOME/$1"
}
case "$*" in
*describe*)
    state="$(head -n 1 "$HOME/states")"
    [ "$(wc -l < "$HOME/states")" -le 1 ] || sed -i 1d "$HOME/states"
    echo "Updates are available for some components." >&2
    case "$state" in
    NOT_FOUND) echo "ERROR: (gcloud) NOT_FOUND: Resource 'atlas' was not found" >&2; exit 1 ;;
    OFFLINE) echo "ERROR: gcloud crashed (TransportError): no network" >&2; exit 1 ;;
    esac
    echo "$state"
    ;;
*"cat run.code"*)
    code="$(next codes)"
    [ "$code" != unreachable ] || exit 255
    echo "$code"
    ;;
*"queued-resources create"*) [ "$(next requests)" != no ] || exit 1 ;;
*" scp "*) [ "$(next copies)" != no ] || exit 255 ;;
*"nohup bash run.sh"*) [ "$(next launches)" != no ] || exit 1 ;;
esac
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """What resume.sh finds, and what it is to do.

    Attributes:
      codes, states, requests, copies, launches: lines for `GCLOUD`.
      starts: of the run.
      asked: requests for a slice.
      deleted: slices deleted.
      set_up: how often code was copied to the hosts.
      ends: exit code.
      flags: of resume.sh.
    """

    codes: list[str]
    states: list[str] = dataclasses.field(default_factory=lambda: ["ACTIVE"])
    requests: list[str] = dataclasses.field(default_factory=list)
    copies: list[str] = dataclasses.field(default_factory=list)
    launches: list[str] = dataclasses.field(default_factory=list)
    starts: int = 1
    asked: int = 0
    deleted: int = 0
    set_up: int = 0
    ends: int = 0
    flags: tuple[str, ...] = ()


DONE = ["0"]
RESUMED = {
    "it is done": Case(["running", "0"]),
    "it is preempted and its slice stays": Case(["75", "running", "75", "0"], starts=3),
    "the slice is taken away": Case(
        ["running", "0"], ["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "NOT_FOUND", "ACTIVE"],
        starts=2, asked=1, deleted=1, set_up=1,
    ),
    "it crashes, but never three times in a row": Case(["1", "1", "75", "1", "1", "0"], starts=6),
    "it crashes three times in a row": Case(["1", "75", "1", "1", "134"], starts=5, ends=2),
    "it crashes at once, and only one start is wanted": Case(
        ["1"], ends=2, flags=("--failures", "1")
    ),
    "each crash is followed by the slice's end": Case(
        ["1", "1", "1", "0"], ["ACTIVE", *["ACTIVE", "SUSPENDED", "NOT_FOUND", "ACTIVE"] * 3],
        starts=4, asked=3, deleted=3, set_up=3,
    ),
    "it refuses its flags": Case(["2"], ends=2),
    "there is no slice yet": Case(DONE, ["NOT_FOUND", "CREATING", "ACTIVE"], asked=1, set_up=1),
    "the request is still waiting": Case(
        DONE, ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING", "ACTIVE"], set_up=1
    ),
    "another slice is still going away": Case(
        DONE, ["SUSPENDING", "DELETING", "NOT_FOUND", "ACTIVE"], asked=1, set_up=1
    ),
    "a request ends as failed, and the next one is met": Case(
        DONE, ["SUSPENDED", "NOT_FOUND", "FAILED", "NOT_FOUND", "WAITING_FOR_RESOURCES", "ACTIVE"],
        asked=2, deleted=2, set_up=1,
    ),
    "three requests in a row end as failed": Case(
        [], ["FAILED", *["NOT_FOUND", "FAILED"] * 3], asked=3, deleted=3, starts=0, ends=2
    ),
    "three requests in a row vanish": Case([], ["NOT_FOUND"], asked=3, starts=0, ends=2),
    "a request is refused once": Case(
        DONE, ["NOT_FOUND", "NOT_FOUND", "ACTIVE"], ["no"], asked=2, set_up=1
    ),
    "three requests in a row are refused": Case(
        [], ["NOT_FOUND"], ["no"] * 3, asked=3, starts=0, ends=2
    ),
    "looks at the slice fail before the run": Case(DONE, ["OFFLINE"] * 4 + ["ACTIVE"]),
    "looks at the slice fail during the run": Case(
        ["running", "running", "0"], ["ACTIVE", "ACTIVE", *["OFFLINE"] * 12, "ACTIVE"]
    ),
    "looks at the slice fail after it was taken away": Case(
        DONE, ["ACTIVE", "SUSPENDED", *["OFFLINE"] * 7, "SUSPENDED", "NOT_FOUND", "ACTIVE"],
        starts=2, asked=1, deleted=1, set_up=1,
    ),
    "no look at the slice ever succeeds": Case([], ["OFFLINE"], starts=0, ends=2),
    "looks at the run fail": Case(["running", *["unreachable"] * 4, "running", "0"]),
    "the host cannot be reached for long": Case([*["unreachable"] * 5, "0"], starts=2),
    "the host can never be reached": Case(["unreachable"] * 15, starts=3, ends=2),
    "a host goes silent, then its slice": Case(
        ["unreachable", "0"], ["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "NOT_FOUND", "ACTIVE"],
        starts=2, asked=1, deleted=1, set_up=1, flags=("--failures", "1"),
    ),
    "hosts let nobody in at first": Case(
        DONE, ["NOT_FOUND", "ACTIVE"], copies=["no", "no"], asked=1, set_up=3
    ),
    "hosts never let anybody in": Case(
        [], ["NOT_FOUND", "ACTIVE"], copies=["no"] * 3, asked=1, set_up=3, starts=0, ends=2
    ),
    "a slice that is there was never set up": Case(
        ["none", "0"], launches=["no"], starts=2, set_up=1
    ),
    "a slice is taken away while it is set up": Case(
        DONE,
        ["NOT_FOUND", *["ACTIVE", "SUSPENDED", "NOT_FOUND"] * 4, "ACTIVE"],
        copies=["no"] * 4, asked=5, deleted=4, set_up=5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RESUMED)
def test_resume_keeps_a_run_going_until_it_is_done(tmp_path: Path, what: str) -> None:
    case = RESUMED[what]
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    for name in ("codes", "states", "requests", "copies", "launches"):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in getattr(case, name)))
    done = subprocess.run(
        [str(SCRIPTS / "resume.sh"), "--name", "atlas", "--zone", "z", "--type", "v4-8"]
        + ["--every", "0", *case.flags, "--", "train"],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        timeout=120,
    )
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == case.ends, done.stderr
    assert calls.count("nohup bash run.sh") == case.starts
    assert calls.count("queued-resources create") == case.asked
    assert calls.count("queued-resources delete") == case.deleted
    assert calls.count("tpu-vm scp") == case.set_up
    assert (tmp_path / "codes").read_text() == ""


def test_create_waits_for_the_slice_and_tells_how_it_stands(tmp_path: Path) -> None:
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("gcloud", "sleep"):
        (tmp_path / name).chmod(0o755)

    def create(*states: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "requests").write_text("")
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        return subprocess.run(
            [str(SCRIPTS / "create.sh"), "--name", "atlas", "--zone", "z", "--type", "v4-8"],
            capture_output=True,
            text=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)},
            timeout=60,
        )

    done = create("CREATING", "OFFLINE", "WAITING_FOR_RESOURCES", "ACTIVE")
    told = [line.split()[-1] for line in done.stdout.splitlines()]
    assert (done.returncode, told) == (0, ["CREATING", "WAITING_FOR_RESOURCES", "ACTIVE"])
    failed = create("PROVISIONING", "FAILED")
    assert failed.returncode == 2
    assert "the request ended as FAILED; delete.sh removes it" in failed.stderr


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


def test_a_share_is_mounted_on_every_host_also_when_a_slice_is_made_again():
    *_, mount = dry_run("setup.sh", "--share", "10.0.0.2:/mine")
    assert "--worker=all" in mount
    assert "mount -t nfs 10.0.0.2:/mine /mnt/mine" in " ".join(mount)
    both = ["--share", "10.0.0.2:/mine", "--bucket", "b"]
    again = dry_run("resume.sh", "--type", "v4-8", *both, "--", "train")
    assert mount in again
    assert "/mnt/b" in " ".join(again[again.index(mount) + 1])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("stop.sh", [], "which slice? --name NAME or TPU_NAME"),
        ("stop.sh", ["--name", "x"], "which zone? --zone ZONE or TPU_ZONE"),
        ("stop.sh", ["--nme", "x"], "unknown flag --nme; see --help"),
        ("stop.sh", ["--name"], "--name needs a value"),
        ("logs.sh", ["--worker", "--dry-run"], "--worker needs a value"),
        ("create.sh", ["--name", "x", "--zone", "y"], "which accelerator? --type v4-8"),
        *(
            (
                name,
                ["--name", "x", "--zone", "y", "--type", wrong, "--", "train"],
                f"unknown accelerator {wrong}; expected v4, v5e, v5p or v6e with a size, as v4-8 "
                "or v5e-8",
            )
            for name, wrong in (("create.sh", "v3-8"), ("create.sh", "v4"), ("resume.sh", "v7-8"))
        ),
        ("run.sh", ["--name", "x", "--zone", "y"], "what shall run? write it after --"),
        *(
            (
                "resume.sh",
                ["--name", "x", "--zone", "y", "--type", "v4-8", *wrong, "--", "train"],
                expected,
            )
            for wrong, expected in (
                (["--every", "1m"], "--every 1m: expected a number of seconds, as 60"),
                (
                    ["--share", "10.0.0.2"],
                    "--share 10.0.0.2: expected SERVER:/NAME, as 10.0.0.2:/atlas",
                ),
                (["--failures", "0"], "--failures 0: expected 1 or more, as 3"),
            )
        ),
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
