"""The log of a run: every step once, also after a kill and a resume."""

import math
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from atlas_jax.training.metrics import RunLog, read_metrics


def scalars(run: Path) -> dict[tuple[int, str], float]:
    """What TensorBoard shows: the value of each step and name that no later purge removes."""
    shown: dict[tuple[int, str], float] = {}
    for file in sorted((run / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # records: length, its checksum, an event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event.session_log.START:
                shown = {key: value for key, value in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                shown[event.step, value.tag] = value.simple_value
    return shown


def logged(run: Path) -> dict[tuple[int, str], float]:
    """The numbers of metrics.jsonl, as TensorBoard keeps them: in float32."""
    return {
        (int(row["step"]), name): pytest.approx(value, rel=1e-6)
        for row in read_metrics(run)
        for name, value in row.items()
        if "/" in name and value is not None
    }


def test_numbers_reach_the_terminal_the_file_and_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, first_step=0, total_steps=4) as log:
        log.write(2, "train", {"reader_loss": 0.123456, "skipped": 0.0})
        log.write(4, "train", {"reader_loss": math.nan, "skipped": 1.0})
    assert "train 2/4  reader_loss 0.1235  skipped 0" in capsys.readouterr().out
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["train/reader_loss"] == 0.123456
    assert rows[1]["train/reader_loss"] is None
    shown = scalars(tmp_path)
    assert math.isnan(shown.pop((4, "train/reader_loss")))
    assert shown == logged(tmp_path)


def test_a_resumed_run_repeats_no_row(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 6) as log:
        for step in (2, 4, 6):
            log.write(step, "train", {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tr')  # a kill in the middle of a line
    with RunLog(tmp_path, 4, 6) as log:
        log.write(6, "train", {"loss": 60})
    assert [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path)] == [
        (2, 2),
        (4, 4),
        (6, 60),
    ]
    assert scalars(tmp_path) == logged(tmp_path)
