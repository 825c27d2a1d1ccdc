"""The doctor names the odd host out."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from atlas_jax import doctor as entry
from atlas_jax.core.errors import UserError
from atlas_jax.planning import doctor
from atlas_jax.planning.doctor import Report, code_hash, device_faults, odd_ones


def hosts(number: int, **odd: str) -> list[Report]:
    """Reports of so many hosts, of which the last has other facts."""
    facts = {"code": "abc", "jax": "0.10.2", "train.jsonl": "there"}
    all_of_them = [Report(i, f"host-{i}", facts) for i in range(number)]
    all_of_them[-1] = dataclasses.replace(all_of_them[-1], facts={**facts, **odd})
    return all_of_them


def test_equal_hosts_have_no_odd_one() -> None:
    assert odd_ones(hosts(4)) == []


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({"jax": "0.9.0"}, "jax: 0.9.0 on process 3 (host-3); 0.10.2 on the other 3"),
        ({"code": "def"}, "code: def on process 3 (host-3); abc on the other 3"),
        (
            {"train.jsonl": "missing"},
            "train.jsonl: missing on process 3 (host-3); there on the other 3",
        ),
    ],
)
def test_the_odd_one_is_named(odd: dict[str, str], told: str) -> None:
    assert odd_ones(hosts(4, **odd)) == [told]


def test_of_two_that_differ_both_are_named() -> None:
    (told,) = odd_ones(hosts(2, jax="0.9.0"))
    assert told == "jax: 0.10.2 on process 0 (host-0); 0.9.0 on process 1 (host-1)"


def test_what_is_missing_everywhere_is_told_unless_the_run_makes_it() -> None:
    reports = [Report(i, "h", {"store": "missing"}) for i in range(2)]
    assert odd_ones(reports) == ["store is missing on every host"]
    assert odd_ones(reports, ["store"]) == []


def devices(*counts: int, kinds: tuple[str, ...] = ()) -> list[Any]:
    """So many of each process; of a kind each, or all "TPU v4"."""
    return [
        SimpleNamespace(process_index=process, device_kind=kinds[process] if kinds else "TPU v4")
        for process, count in enumerate(counts)
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (devices(4, 4, 4, 4), []),
        (devices(4, 3, 4, 4), ["devices: 3 TPU v4 on process 1 (w-1); 4 TPU v4 on the other 3"]),
        (devices(4, 4, 4), ["devices: none on process 3 (w-3); 4 TPU v4 on the other 3"]),
        (
            devices(4, 4, 4, 4, kinds=("TPU v4", "TPU v4", "TPU v4", "cpu")),
            ["devices: 4 cpu on process 3 (w-3); 4 TPU v4 on the other 3"],
        ),
        (
            [*devices(1, 1, 1, 1), *devices(1, 1, 1, 1, kinds=("cpu",) * 4)],
            ["devices of several kinds on every host: TPU v4, cpu"],
        ),
    ],
)
def test_the_host_with_other_devices_is_named(found: list[Any], told: list[str]) -> None:
    assert device_faults(found, [f"w-{process}" for process in range(4)]) == told


def test_the_code_hash_sees_every_change(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = code_hash([tmp_path])
    (tmp_path / "note.txt").write_text("no code")
    assert code_hash([tmp_path]) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_hash([tmp_path]) != first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    (tmp_path / "b.py").write_text("x = 1\n")
    assert code_hash([tmp_path]) != first


def test_one_host_fits_with_itself(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(arguments) == 0
    out = capsys.readouterr().out
    assert "the same on 1 process(es)" in out and "8 devices (cpu), 8 a process" in out
    assert list((tmp_path / "run").iterdir()) == []  # it leaves nothing


def test_a_missing_file_is_told_before_anything_runs(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([*arguments, "--gin.TrainConfig.file=nowhere.jsonl"]) == 1
    assert "doctor: nowhere.jsonl is missing on every host" in capsys.readouterr().out


def test_a_stack_too_small_for_libtpus_compiler_is_told(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--fibers_default_thread_stack_size=65536")
    assert entry.main(arguments) == 1
    assert "doctor: LIBTPU_INIT_ARGS says 65536 of --fibers_default" in capsys.readouterr().out


def test_a_host_with_fewer_devices_ends_the_examination(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(doctor, "device_faults", lambda *told: seen.append(told) or ["devices: 3"])
    assert entry.main(arguments) == 1
    assert seen == [(jax.devices(), [doctor.socket.gethostname()])]
    assert "doctor: devices: 3\ndoctor: 1 fault(s)" in capsys.readouterr().out


def test_a_model_dir_that_cannot_be_written_is_told(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert entry.main([*arguments, f"--gin.TrainConfig.model_dir={tmp_path / 'file' / 'x'}"]) == 2
    assert "x/.doctor/0.json: lies below" in capsys.readouterr().err


def test_hosts_that_differ_and_one_that_is_silent(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "joined", lambda: (0, 3))
    folder = tmp_path / "run" / doctor.REPORTS
    monkeypatch.setattr(entry, "clear", lambda config: folder.mkdir(parents=True))
    real = doctor.report

    def with_a_neighbour(process: int, inputs: list[str], text: str) -> Report:
        mine = real(process, inputs, text)
        other = Report(1, "tpu-w1", {**mine.facts, "jax": "0.9.0"})
        (folder / "1.json").write_text(json.dumps(dataclasses.asdict(other)))
        return mine

    monkeypatch.setattr(doctor, "report", with_a_neighbour)
    assert entry.main([*arguments, "--timeout=0.3"]) == 1
    out = capsys.readouterr().out
    assert "0.9.0 on process 1 (tpu-w1)" in out
    assert "process 2 wrote nothing into TrainConfig.model_dir" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "0.json: expected an object, got a list"),
        ('{"process": 0, "host": "a", "facts": {"jax": 1}}', "facts.*: expected a text"),
        ('{"process": 0, "ho', "0.json: cut off"),
    ],
)
def test_a_report_that_is_damaged_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text(text)
    with pytest.raises(UserError, match=message):
        doctor._wait_for(tmp_path / "0.json", Report, 0)
    assert doctor._wait_for(tmp_path / "1.json", Report, 0) is None
