"""Progress is a bar where somebody watches, and a line now and then in a file or pipe."""

import io
import select
import subprocess
import sys

import pytest

from atlas_jax.core import progress
from atlas_jax.core.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved by the test."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_pipe_gets_a_line_each_half_minute_and_one_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress("embed", total=4000) as bar:
        for _ in range(4):
            clock[0] += 16
            bar.update(1000)
        assert capsys.readouterr().err.splitlines() == [
            "embed: 2,000 of 4,000, 32 s",
            "embed: 4,000 of 4,000, 64 s",
        ]
    assert capsys.readouterr().err == ""


def test_rows_are_counted_and_an_earlier_part_is_told(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(show_progress("read", iter("abc"))) == ["a", "b", "c"]
    assert list(show_progress("copy", ["c"], 3, initial=2)) == ["c"]
    assert capsys.readouterr().err == ("read: 3, 0 s\ncopy: 2 of 3, 0 s\ncopy: 3 of 3, 0 s\n")


def test_an_error_and_what_is_not_shown_add_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="stop"), show_progress("embed", total=2):
        raise ValueError("stop")
    with show_progress("embed", total=2, shown=False) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(show_progress("read", range(3))) == [0, 1, 2]
    assert "\rread: 100%|" in terminal.getvalue()


# A command that prints and then works on: it waits for its stdin.
WORKS_ON = """
import argparse, sys
from atlas_jax.core.config import launch
def main(flags):
    print("train 10/30")
    sys.stdin.read()
sys.exit(launch(main, argparse.ArgumentParser(), []))
"""


def test_a_pipe_gets_a_line_of_stdout_while_the_work_goes_on() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKS_ON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 60)
    process.communicate("")
    assert ready
    assert process.returncode == 0
