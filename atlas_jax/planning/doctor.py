"""Check, before anything is compiled, that the hosts of a run fit together.

Each process writes a report into MODEL_DIR, which shows that it can write there. Process 0 reads
all reports, which shows that all processes see the same folder. No device is used before the
reports agree: if hosts differ, a slice often hangs without an error.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from atlas_jax.core import strict_json
from atlas_jax.core.compiler import LIBTPU_ARGS, stack_fault
from atlas_jax.core.config import gin_folder
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.multihost import joined
from atlas_jax.core.paths import as_path, remove_tree
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.training.config import TrainConfig
from atlas_jax.training.run import TrainRun

REPORTS = ".doctor"  # folder in MODEL_DIR while the doctor runs
VERDICT = "verdict.json"
PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "gin-config",
    "tokenizers", "tensorstore", "safetensors", "numpy",
)  # fmt: skip
# Variables that change a compiled program, or how processes find each other.
_VARIABLES = ("XLA_FLAGS", LIBTPU_ARGS, "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
_POLL_SECONDS = 0.1
_GOODBYE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of one process about its host.

    Attributes:
      process: its index.
      host: the machine's name.
      facts: name -> value. All hosts of a working run have the same.
    """

    process: int
    host: str
    facts: Mapping[str, str]

    def name(self) -> str:
        """Name of the host for people."""
        return f"process {self.process} ({self.host})"


def code_hash(folders: Iterable[Path]) -> str:
    """SHA-256 over names and contents of the Python and gin files in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".gin") and file.is_file():
                digest.update(f"{file.relative_to(folder)}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def report(process: int, inputs: Sequence[str] = (), configuration: str = "") -> Report:
    """This host's report.

    Args:
      process: its index.
      inputs: files and folders that the run reads.
      configuration: of the run, as text.
    """
    package = Path(__file__).resolve().parents[1]
    facts = {
        "code": code_hash([package, gin_folder()]),
        "configuration": hashlib.sha256(configuration.encode()).hexdigest()[:16],
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **{name: os.environ.get(name, "not set") for name in _VARIABLES},
        **{path: "there" if as_path(path).exists() else "missing" for path in inputs},
    }
    return Report(process, socket.gethostname(), facts)


def odd_ones(reports: Sequence[Report], expected_missing: Sequence[str] = ()) -> list[str]:
    """One sentence for each fact in which hosts differ; it names the hosts in the minority.

    Args:
      reports: of all processes.
      expected_missing: inputs that the run makes itself; all hosts may lack them.
    """
    sentences = []
    for name in reports[0].facts:
        holders: dict[str, list[str]] = collections.defaultdict(list)
        for one in reports:
            holders[one.facts.get(name, "not told")].append(one.name())
        if len(holders) == 1:
            (value,) = holders
            if value == "missing" and name not in expected_missing:
                sentences.append(f"{name} is missing on every host")
            continue
        ranked = sorted(holders, key=lambda value: -len(holders[value]))
        usual, others = ranked[0], ranked[1:]
        if len(holders[usual]) > len(holders[others[0]]):
            for value in others:
                sentences.append(
                    f"{name}: {value} on {', '.join(holders[value])}; {usual} on the other "
                    f"{len(holders[usual])}"
                )
        else:  # no majority: name all hosts
            told = "; ".join(f"{value} on {', '.join(holders[value])}" for value in ranked)
            sentences.append(f"{name}: {told}")
    return sentences


def examine(told: TrainRun, timeout: float) -> int:
    """Compare all hosts of the run and print the result; returns 1 if they differ.

    Call it after the processes have been joined (`multihost.start`).

    Args:
      told: the settings of the run.
      timeout: seconds to wait for the other hosts' reports.

    Raises:
      UserError: a setting is at fault, or this host cannot write MODEL_DIR.
    """
    process, count = joined()
    folder = as_path(told.train.model_dir) / REPORTS
    mine = report(process, _inputs(told), told.text)
    _write(folder / f"{process}.json", dataclasses.asdict(mine))
    if process == 0:
        faults, hosts = _faults(folder, count, told.corpus.config, timeout)
        _write(folder / VERDICT, (faults, hosts))
    else:
        verdict = _wait_for(folder / VERDICT, tuple[list[str], list[str]], 2 * timeout)
        (folder / f"{process}.json").unlink(missing_ok=True)  # the verdict has been seen
        faults, hosts = verdict or ([_unseen(0, timeout)], [])
    if not faults:
        faults = device_faults(jax.devices(), hosts)
    if process == 0:
        until = time.monotonic() + min(timeout, _GOODBYE_SECONDS)
        while len(list(folder.glob("*.json"))) > 2 and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        remove_tree(folder)
        _tell(mine, count, told.train.model_dir, faults)
    else:
        for fault in faults:
            print(f"doctor: {fault}", file=sys.stderr)
    return 1 if faults else 0


def clear(config: TrainConfig) -> None:
    """Remove earlier reports; call it before the processes are joined."""
    folder = as_path(config.model_dir) / REPORTS
    try:
        remove_tree(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _inputs(told: TrainRun) -> list[str]:
    """Files and folders that the run reads, by binding."""
    model, corpus = told.models.config, told.corpus.config
    paths = [told.train.file, told.evaluation.file, model.reader, model.retriever]
    if told.train.passages == "index":
        passages = corpus.passages
        files = [passages] if isinstance(passages, str) else list(passages)
        paths += [corpus.index, corpus.store, *files]
    return list(dict.fromkeys(path for path in paths if path))


def _faults(
    folder: Path, count: int, corpus: CorpusConfig, timeout: float
) -> tuple[list[str], list[str]]:
    """The faults that the reports show, and the hosts of the processes that wrote one."""
    until = time.monotonic() + timeout
    reports, silent = [], []
    for process in range(count):
        told = _wait_for(folder / f"{process}.json", Report, max(0.0, until - time.monotonic()))
        if told is None:
            silent.append(_unseen(process, timeout))
        else:
            reports.append(told)
    built = [corpus.store] if corpus.passages else []
    own = [fault] if (fault := stack_fault()) else []
    return silent + odd_ones(reports, built) + own, [one.host for one in reports]


def _unseen(process: int, timeout: float) -> str:
    return (
        f"process {process} wrote nothing into TrainConfig.model_dir that can be seen from here "
        f"within {timeout:g} seconds: it is not the same place on every host"
    )


def device_faults(devices: Iterable[Any], hosts: Sequence[str]) -> list[str]:
    """Faults of the devices as the processes see them; names the hosts that differ.

    Args:
      devices: of all processes.
      hosts: of the processes, in order.
    """
    kinds: dict[int, list[str]] = collections.defaultdict(list)
    for device in devices:
        kinds[device.process_index].append(device.device_kind)
    told = [
        Report(process, host, {"devices": _counted(kinds[process])})
        for process, host in enumerate(hosts)
    ]
    several = sorted(set().union(*kinds.values()))
    faults = odd_ones(told)
    if not faults and len(several) > 1:
        faults.append(f"devices of several kinds on every host: {', '.join(several)}")
    return faults


def _counted(kinds: Iterable[str]) -> str:
    """`4 TPU v4`."""
    counts = sorted(collections.Counter(kinds).items())
    return ", ".join(f"{count} {kind}" for kind, count in counts) or "none"


def _tell(mine: Report, count: int, model_dir: str, faults: Sequence[str]) -> None:
    for fault in faults:
        print(f"doctor: {fault}")
    if faults:
        print(f"doctor: {len(faults)} fault(s) among {count} process(es)")
        return
    devices = jax.devices()
    versions = ", ".join(f"{name} {mine.facts[name]}" for name in ("jax", "libtpu", "flax"))
    print(f"code {mine.facts['code']}, {versions}: the same on {count} process(es)")
    print(f"{LIBTPU_ARGS}: {mine.facts[LIBTPU_ARGS]}")
    print(f"{len(devices)} devices ({devices[0].device_kind}), {len(devices) // count} a process")
    print(f"{model_dir}: every process can write there and sees the same place")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _write(path: Path, value: Any) -> None:
    try:
        with atomic_text(path) as file:
            json.dump(value, file)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder} cannot be written on {socket.gethostname()}: {error}; "
        "TrainConfig.model_dir has to be a place that every host can write to"
    )


def _wait_for(path: Path, kind: Any, seconds: float) -> Any:
    """Wait for a file and read its JSON as a type; None if the file does not appear.

    Raises:
      UserError: it holds something else.
    """
    until = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > until:
            return None
        time.sleep(_POLL_SECONDS)
    return strict_json.read(path, kind)
