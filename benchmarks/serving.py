"""The server under load: throughput against one question at a time, latencies, overload, memory.

    python -m benchmarks.serving [--seconds 15] [--requests 10000] [--only memory] [--json FILE]

A server of the nano pair over the Factbook's passages, and clients in threads on the same machine.
Figures that are compared are taken in one run, and given as ratios. Memory is what the server's
process holds. It is looked at ten times in the course of the requests. Of these every fiftieth
asks for an answer from one passage, the one after it for one as server-sent events, the others for
a passage.
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
from atlas_jax.demo.explore import command, index_command

Reply = tuple[int, float, dict[str, Any]]  # status, seconds, body
Figures = dict[str, float]
K = 5


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
    settings = [f"--gin.ServeConfig.{name}={value}" for name, value in fields.items()]
    settings.append(f"--gin.PORT={port}")
    with subprocess.Popen(
        [*run, "serve", *told, *settings],
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


def ask(
    port: int, question: str, path: str = "/v1/answers", stream: bool = False, k: int = K
) -> Reply:
    """One request on a connection of its own; status 0 if there is no server."""
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        if question:
            told = {"questions": question, "k": k} | ({"stream": True} if stream else {})
            body = json.dumps(told)
            connection.request("POST", path, body, {"content-type": "application/json"})
        else:
            connection.request("GET", path)
        reply = connection.getresponse()
        raw = reply.read()
        return reply.status, time.monotonic() - start, {} if stream else json.loads(raw)
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


def memory(port: int, process: psutil.Process, questions: Sequence[str], requests: int) -> Figures:
    """What the server's process holds, in MiB, after each tenth of so many requests."""
    figures, looks = {"MiB when it is ready": process.memory_info().rss / 2**20}, 10

    def one(number: int) -> int:
        question = questions[number % len(questions)]
        if number % 50 > 1:
            return ask(port, question, "/v1/retrieve", k=1)[0]
        return ask(port, question, stream=number % 50 == 1, k=1)[0]

    with ThreadPoolExecutor(4) as threads:
        for look in range(looks):
            part = range(look * requests // looks, (look + 1) * requests // looks)
            if set(threads.map(one, part)) != {200}:
                raise SystemExit("a request was not answered")
            held = process.memory_info().rss / 2**20
            figures[f"MiB after {part.stop} requests"] = held
            print(f"{part.stop} requests: {held:.0f} MiB", flush=True)
    return figures


def load(port: int, questions: Sequence[str], seconds: float) -> Figures:
    """Throughput, latencies and what happens when far too many ask."""
    some = questions[:100]
    closed(port, some[:20], 1)
    alone, one_by_one = closed(port, some, 1)
    joined, together = closed(port, some * 2, 16)
    calm = opened(port, questions, 0.6 * joined, seconds)
    flood = opened(port, questions, 10 * joined, seconds / 3)
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
