"""What lies around a command: home folders, closed pipes, odd terminals, full disks, devices."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import gin
import jax
import pytest

from atlas_jax import cli
from atlas_jax.core import backend
from atlas_jax.core.config import launch, load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.terminal import expand_arguments, expand_home, guarded


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "atlas_jax", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
    )


def test_a_tilde_is_the_home_folder_in_flags(home):
    assert expand_arguments(
        ["--out=~/a", "--out", "~/b", "~", "--gin_search_paths=~/c,d,~/e", "--x=a~", "a/~/b"]
    ) == [
        f"--out={home}/a", "--out", f"{home}/b", home, f"--gin_search_paths={home}/c,d,{home}/e",
        "--x=a~", "a/~/b",
    ]  # fmt: skip


def test_a_tilde_is_the_home_folder_in_bindings(home, tmp_path):
    file = tmp_path / "a.gin"
    file.write_text(
        "import atlas_jax.from_gin\n"
        "FILES = ('~/b.jsonl', 'c.jsonl')\n"
        "LeakConfig.files = %FILES\n"
        "LeakConfig.report = '~/report'\n"
        "LeakConfig.passages = %PASSAGES\n"
    )
    load_gin([str(file)], ["PASSAGES=~/p.jsonl", "LeakConfig.output='~/o.jsonl'"])
    assert gin.query_parameter("%FILES") == (f"{home}/b.jsonl", "c.jsonl")
    assert gin.query_parameter("LeakConfig.report") == f"{home}/report"
    assert gin.query_parameter("LeakConfig.output") == f"{home}/o.jsonl"
    assert gin.query_parameter("%PASSAGES") == f"{home}/p.jsonl"


def test_a_tilde_of_nobody_is_refused():
    with pytest.raises(UserError, match=r"--out: '~nobody-here/x': there is no home folder"):
        expand_arguments(["--out=~nobody-here/x"])
    with pytest.raises(UserError, match=r"--gin\.X"):
        expand_home("~nobody-here/x", "--gin.X")
    assert expand_home("~5 km", "") == "~5 km"  # no path
    assert expand_home(7, "") == 7


def test_every_command_expands_its_paths(home, capsys):
    parser = argparse.ArgumentParser("try")
    parser.add_argument("--out")
    seen = []
    assert launch(lambda flags: seen.append(flags.out), parser, ["--out=~/x"]) == 0
    assert seen == [f"{home}/x"]
    assert launch(lambda flags: None, argparse.ArgumentParser("try"), ["~nobody-here/x"]) == 2
    assert "there is no home folder ~nobody-here" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    command = f"{sys.executable} -m atlas_jax --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
    assert done.stderr == b""
    assert done.stdout in (b"0\n", b"141\n")

    script = (
        "import sys; from atlas_jax.core.terminal import guarded\n"
        "def run():\n    print('x' * 10)\n    raise BrokenPipeError(32, 'Broken pipe')\n"
        "sys.exit(guarded('p', run))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "atlas_jax", "--version"],
            stdout=full, stderr=subprocess.PIPE, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.decode().count("\n") == 1
    assert "No space left on device" in done.stderr.decode()


def test_a_terminal_that_is_not_utf8_gets_escapes():
    done = run("nö谁", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2
    assert b"no command is called n\\xf6\\u8c01" in done.stderr


def test_errors_of_the_operating_system_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    def fail(flags):
        (tmp_path / "file" / "run").mkdir()

    assert launch(fail, argparse.ArgumentParser("try"), []) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("try: error: [Errno 20] Not a directory")

    def bug(flags):
        raise OSError("a library's own, without a number")

    with pytest.raises(OSError, match="without a number"):
        launch(bug, argparse.ArgumentParser("try"), [])


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize\nbackend")])
def test_a_backend_that_is_not_there_is_one_line(error, monkeypatch, capsys):
    real, asked = jax.devices, []

    def devices_once_broken():
        asked.append(True)
        if len(asked) == 1:
            raise error
        return real()

    monkeypatch.setattr(backend.jax, "devices", devices_once_broken)
    monkeypatch.setattr(backend.jax.config, "update", lambda name, value: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")

    def fail(flags):
        raise error

    assert launch(fail, argparse.ArgumentParser("try"), []) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("try: error: JAX_PLATFORMS=cuda cannot be had: ")
    assert f"without JAX_PLATFORMS there is {len(real())} x cpu" in line


def test_an_error_that_is_no_backends_keeps_its_traceback():
    def bug(flags):
        raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        launch(bug, argparse.ArgumentParser("try"), [])


def test_a_gin_file_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "b.gin").write_bytes(b"\xef\xbb\xbfX = 3\n")
    load_gin([str(tmp_path / "b.gin")])
    assert gin.query_parameter("%X") == 3


def test_guarded_gives_back_the_code():
    assert guarded("p", lambda: 7) == 7
    assert cli.main(["--version"]) == 0
