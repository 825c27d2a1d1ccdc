"""The server under load: throughput against one question at a time, latencies, overload, memory.

    python -m benchmarks.serving [--seconds 15] [--requests 10000] [--only memory] [--json FILE]

A server of the nano pair over the Factbook's passages, and Locust's users on the same machine
(`locustfile.py`). Figures that are compared are taken in one run, and given as ratios. Memory is
what the server's process holds. It is looked at ten times in the course of the requests. Of these
every fiftieth asks for an answer from one passage, the one after it for one as server-sent events,
the others for a passage.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from atlas_jax.demo import factbook
from atlas_jax.demo.explore import command, index_command

Figures = dict[str, float]
K = 5
CROWD = 500  # users of an open loop: so many that few of them wait for an answer at a time
USERS = Path(__file__).with_name("locustfile.py")


@dataclass(frozen=True)
class Load:
    """What came of a run of Locust.

    Attributes:
      statuses: of each HTTP status ("0" = no reply) how many requests had it, how many a second,
        p50 and p99 in seconds.
      answers: by question.
    """

    statuses: dict[str, dict[str, float]]
    answers: dict[str, str]

    def of(self, status: str, name: str) -> float:
        """A figure of the replies with a status; 0 if there were none."""
        return self.statuses.get(status, {}).get(name, 0.0)

    @property
    def requests(self) -> int:
        """With any status."""
        return sum(int(one["requests"]) for one in self.statuses.values())


def locust(port: int, questions: Sequence[str], users: int, **options: object) -> Load:
    """Let so many users ask; the options are those of `locustfile.py` and of Locust."""
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder) / "questions.json", Path(folder) / "figures.json"
        asked.write_text(json.dumps(list(questions)), "utf-8")
        told = {
            "host": f"http://127.0.0.1:{port}",
            "users": users,
            "spawn-rate": users,
            "stop-timeout": 120,
            "exit-code-on-error": 0,  # a status that should not be is one of the figures
            "loglevel": "ERROR",
            "questions": asked,
            "out": out,
            **options,
        }
        flags = [f"--{name}={value}" for name, value in told.items()]
        run = subprocess.run(
            [sys.executable, "-m", "locust", "-f", str(USERS), "--headless", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if run.returncode:
            raise SystemExit(f"Locust ended with {run.returncode}:\n{run.stderr}")
        return Load(**json.loads(out.read_text("utf-8")))


@contextmanager
def serving(folder: Path, rows: str, ks: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own: its port and the process, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = command(folder / "no demo", folder)
    run = [sys.executable, "-m", "atlas_jax"]
    subprocess.run(
        [*run, "build_index", *index_command(told)], check=True, stderr=subprocess.DEVNULL
    )
    fields = {"ks": ks, "batch_rows": rows, "explain": False, "max_replaced": 0}
    fields["connections"] = 2 * CROWD  # those who are to be refused are refused by the queue
    settings = [f"--gin.ServeConfig.{name}={value}" for name, value in fields.items()]
    settings.append(f"--gin.PORT={port}")
    with subprocess.Popen(
        [*run, "serve", *told, *settings],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:
        try:
            while not is_ready(port):
                if process.poll() is not None:
                    raise SystemExit("the server did not start; run `atlas-jax serve` to see why")
                time.sleep(0.5)
            yield port, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def is_ready(port: int) -> bool:
    """Whether every program is compiled."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=120):
            return True
    except (urllib.error.HTTPError, OSError):
        return False


def closed(port: int, questions: Sequence[str], users: int, count: int) -> Load:
    """So many users, each of whom waits for its answer before it asks again."""
    found = locust(port, questions, users, count=count, k=K)
    if found.of("200", "requests") != count:
        raise SystemExit(f"a question of the closed loop was not answered: {found.statuses}")
    return found


def opened(
    port: int, questions: Sequence[str], rate: float, seconds: float, users: int = CROWD
) -> Load:
    """Questions that come at random with about this rate, whether earlier ones are answered."""
    told = {"rate": rate, "run-time": f"{seconds:.0f}s", "k": K}
    return locust(port, questions, users, **told)


def memory(port: int, process: psutil.Process, questions: Sequence[str], requests: int) -> Figures:
    """What the server's process holds, in MiB, after each tenth of so many requests."""
    figures, looks = {"MiB when it is ready": process.memory_info().rss / 2**20}, 10
    for look in range(1, looks + 1):
        found = locust(port, questions, 4, count=requests // looks, k=1, kind="mixed")
        if found.of("200", "requests") != requests // looks:
            raise SystemExit(f"a request was not answered: {found.statuses}")
        held = process.memory_info().rss / 2**20
        figures[f"MiB after {look * (requests // looks)} requests"] = held
        print(f"{look * (requests // looks)} requests: {held:.0f} MiB", flush=True)
    return figures


def load(port: int, questions: Sequence[str], seconds: float) -> Figures:
    """Throughput, latencies and what happens when far too many ask."""
    some = questions[:100]
    closed(port, some, 1, 20)
    alone, together = closed(port, some, 1, 100), closed(port, some, 16, 200)
    single, capacity = alone.of("200", "a second"), together.of("200", "a second")
    calm = opened(port, questions, 0.6 * capacity, seconds)
    flood = opened(port, questions, 10 * capacity, seconds)
    answered, shed = flood.of("200", "requests"), flood.of("429", "requests")
    return {
        "questions a second, one at a time": single,
        "16 clients / one at a time": capacity / single,
        "answers that differ": sum(alone.answers[one] != together.answers[one] for one in some),
        "0.6 of capacity: asked / capacity": calm.requests / seconds / capacity,
        "0.6 of capacity: not answered": calm.requests - calm.of("200", "requests"),
        "0.6 of capacity: p50 / one at a time": calm.of("200", "p50") * single,
        "0.6 of capacity: p99 / one at a time": calm.of("200", "p99") * single,
        "10 x overload: asked / capacity": flood.requests / seconds / capacity,
        "10 x overload: answered": answered / flood.requests,
        "10 x overload: refused with 429": shed / flood.requests,
        "10 x overload: anything else": flood.requests - answered - shed,
        "10 x overload: p50 / one at a time": flood.of("200", "p50") * single,
        "10 x overload: p99 / one at a time": flood.of("200", "p99") * single,
    }


def measure(seconds: float, requests: int, rows: str, only: str) -> Figures:
    """All figures of one server, or one kind of them."""
    with tempfile.TemporaryDirectory() as folder:
        factbook.prepare(Path(folder) / "data")
        lines = (Path(folder) / "data" / "test.jsonl").read_text("utf-8").splitlines()
        questions = [json.loads(line)["question"] for line in lines][:400]
        ks = {"memory": "(1,)", "load": f"({K},)"}.get(only, f"(1, {K})")
        with serving(Path(folder), rows, ks) as (port, process):
            figures = load(port, questions, seconds) if only != "memory" else {}
            if only != "load":
                figures |= memory(port, process, questions, requests)
    return figures


def main() -> None:
    """Print the figures as a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=15, help="of the open loop")
    parser.add_argument("--requests", type=int, default=10_000, help="while memory is looked at")
    parser.add_argument("--only", choices=["load", "memory"], default="", help="one half of it")
    parser.add_argument("--rows", default="(1,4,16)", help="ServeConfig.batch_rows")
    parser.add_argument("--json", help="file for the figures")
    flags = parser.parse_args()
    figures = measure(flags.seconds, flags.requests, flags.rows, flags.only)
    table = Table("the nano pair", "figure")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}")
    Console().print(table)
    if flags.json:
        Path(flags.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
