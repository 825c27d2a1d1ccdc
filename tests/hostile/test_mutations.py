"""A thousand broken inputs: each is refused in one line or means nothing, and leaves nothing."""

import collections
import contextlib
import io
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import gin
import pytest

from tests.hostile import sound
from tests.hostile.commands import KINDS, Bench, Case

COUNT = int(os.environ.get("ATLAS_MUTATIONS", "1000"))
SEED = int(os.environ.get("ATLAS_MUTATIONS_SEED", "0"))
SECONDS = 120  # of one input, on a busy machine

FAULTS = ("traceback", "wrongly accepted", "hang", "left behind", "unclear refusal")


class Hangs(BaseException):
    """Raised in the midst of a command that does not end."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def outcome(case: Case, work: Path) -> tuple[str, str]:
    """'' or one of `FAULTS`, and what was seen."""
    before = files(work)
    gin.clear_config()
    out, err = io.StringIO(), io.StringIO()
    try:
        with limited(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = case.main(case.argv)
    except Hangs:
        return "hang", "".join(traceback.format_exc().splitlines()[-4:-2])
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{error!r:.200} at {last.filename}:{last.lineno}"
    told = [line for line in err.getvalue().splitlines() if ": error: " in line]
    if code == 0:
        return ("wrongly accepted" if case.sure else ""), "exit code 0"
    left = {name for name in files(work) - before if not name.startswith("out/store/")}
    if left:
        return "left behind", ", ".join(sorted(left))
    if code != 2 or len(told) != 1 or "Traceback" in err.getvalue():
        return "unclear refusal", f"exit code {code}: {err.getvalue()[-300:]}"
    return "", told[0]


@pytest.mark.slow
def test_broken_inputs_are_refused_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "sound"
    whole.mkdir()
    sound.build(whole)
    rng = random.Random(SEED)
    made = rng.choices(list(KINDS), KINDS.values(), k=COUNT)
    counts: collections.Counter[str] = collections.Counter()
    faults, started = [], time.perf_counter()
    for number, kind in enumerate(made):
        work = tmp_path / str(number)
        work.mkdir()
        monkeypatch.chdir(work)
        case = kind(Bench(random.Random(SEED * 1_000_003 + number), whole, work))
        fault, told = outcome(case, work)
        counts[fault or ("refused" if ": error: " in told else "accepted")] += 1
        if fault:
            faults.append(f"{number} {kind.__name__} ({case.told}): {fault}: {told}")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(work)
    seconds = time.perf_counter() - started
    with capsys.disabled():
        shown = ", ".join(f"{counts[name]} {name}" for name in ("refused", "accepted", *FAULTS))
        print(f"\n{COUNT} broken inputs in {seconds:.0f} s: {shown}")
    assert not faults, "\n".join(faults)
