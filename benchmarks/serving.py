"""The server under load: throughput against one question at a time, latencies, overload, memory.

    python -m benchmarks.serving [--seconds 15] [--requests 2000] [--json FILE]

A server of the nano pair over the Factbook's passages, and clients in threads on the same machine.
Figures that are compared are taken in one run, and given as ratios.
"""

import argparse
import http.client
import json
import os
import queue
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from atlas_jax.demo import factbook
from atlas_jax.demo.explore import command

Reply = tuple[int, float, dict[str, Any]]  # status, seconds, body
K = 5


@contextmanager
def serving(folder: Path, rows: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own: its port and the process, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = command(folder / "no demo", folder)
    fields = {"ks": f"({K},)", "batch_rows": rows, "explain": False, "max_replaced": 0}
    settings = [f"--gin.ServeConfig.{name}={value}" for name, value in fields.items()]
    settings.append(f"--gin.PORT={port}")
    with subprocess.Popen(
        [sys.executable, "-m", "atlas_jax", "serve", *told, *settings],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:
        try:
            while ask(port, "", path="/readyz")[0] != 200:
                if process.poll() is not None:
                    raise SystemExit("the server did not start; run `atlas-jax serve` to see why")
                time.sleep(0.5)
            yield port, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def ask(port: int, question: str, path: str = "/v1/answers") -> Reply:
    """One request on a connection of its own; status 0 if there is no server."""
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        if question:
            body = json.dumps({"questions": question, "k": K})
            connection.request("POST", path, body, {"content-type": "application/json"})
        else:
            connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, time.monotonic() - start, json.loads(reply.read())
    except OSError:
        return 0, time.monotonic() - start, {}
    finally:
        connection.close()


def closed(port: int, questions: Sequence[str], clients: int) -> tuple[float, list[str]]:
    """Questions a second with so many clients, each of which waits for its answer; the answers."""
    start = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        replies = list(threads.map(lambda one: ask(port, one), questions))
    seconds = time.monotonic() - start
    if {status for status, _, _ in replies} != {200}:
        raise SystemExit("a question of the closed loop was not answered")
    return len(questions) / seconds, [body["answers"][0]["answer"] for _, _, body in replies]


def opened(port: int, questions: Sequence[str], rate: float, seconds: float) -> list[Reply]:
    """Questions that come at random with this rate, whether earlier ones are answered or not."""
    draw, replies = random.Random(0), queue.SimpleQueue[Reply]()
    threads, at, end = [], time.monotonic(), time.monotonic() + seconds
    while at < end:
        time.sleep(max(0.0, at - time.monotonic()))
        question = draw.choice(questions)
        threads.append(threading.Thread(target=lambda q=question: replies.put(ask(port, q))))
        threads[-1].start()
        at += draw.expovariate(rate)
    for thread in threads:
        thread.join()
    return [replies.get() for _ in threads]


def percentiles(replies: Sequence[Reply]) -> tuple[float, float]:
    """p50 and p99 of the seconds of those answered."""
    seconds = sorted(taken for status, taken, _ in replies if status == 200)
    return statistics.median(seconds), seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]


def measure(seconds: float, requests: int, rows: str) -> dict[str, float]:
    """All figures of one server."""
    with tempfile.TemporaryDirectory() as folder:
        factbook.prepare(Path(folder) / "data")
        lines = (Path(folder) / "data" / "test.jsonl").read_text("utf-8").splitlines()
        questions = [json.loads(line)["question"] for line in lines][:400]
        with serving(Path(folder), rows) as (port, process):
            some = questions[:100]
            closed(port, some[:20], 1)
            alone, one_by_one = closed(port, some, 1)
            joined, together = closed(port, some * 2, 16)
            calm = opened(port, questions, 0.6 * joined, seconds)
            before = process.memory_info().rss
            flood = opened(port, questions, 10 * joined, seconds / 3)
            for start in range(0, requests, 200):
                closed(port, (questions * 2)[start % 400 :][:200], 8)
            after = process.memory_info().rss
    (calm_50, calm_99), (flood_50, flood_99) = percentiles(calm), percentiles(flood)
    statuses = [status for status, _, _ in flood]
    return {
        "questions a second, one at a time": alone,
        "16 clients / one at a time": joined / alone,
        "answers that differ": sum(a != b for a, b in zip(one_by_one * 2, together, strict=True)),
        "p50 at 0.6 of capacity / one at a time": calm_50 * alone,
        "p99 at 0.6 of capacity / one at a time": calm_99 * alone,
        "10 x overload: answered": statuses.count(200) / len(statuses),
        "10 x overload: refused with 429": statuses.count(429) / len(statuses),
        "10 x overload: anything else": len(statuses) - statuses.count(200) - statuses.count(429),
        "10 x overload: p50 / one at a time": flood_50 * alone,
        "10 x overload: p99 / one at a time": flood_99 * alone,
        f"memory after {requests} more / before": after / before,
    }


def main() -> None:
    """Print the figures as a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=15, help="of the open loop")
    parser.add_argument("--requests", type=int, default=2000, help="between two looks at memory")
    parser.add_argument("--rows", default="(1,4,16)", help="ServeConfig.batch_rows")
    parser.add_argument("--json", help="file for the figures")
    flags = parser.parse_args()
    figures = measure(flags.seconds, flags.requests, flags.rows)
    table = Table("the nano pair, k = 5", "figure")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}")
    Console().print(table)
    if flags.json:
        Path(flags.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
