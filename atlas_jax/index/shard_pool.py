"""Processes of this machine that read, tokenise and write shards side by side."""

import collections
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from atlas_jax.core.errors import Interrupted
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.core.layouts import PassageFields
from atlas_jax.core.objects import Objects
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.corpus_parts import Unit
from atlas_jax.index.shard_writer import Recipe, ShardNote, write_shard
from atlas_jax.index.store_files import StoreConfig


class Job(NamedTuple):
    """A shard to make.

    Attributes:
      passages: its passages, or the unit that has them.
      last: see `ShardNote`.
    """

    name: str
    passages: Unit | Sequence[PassageFields]
    last: bool


class ShardPool:
    """Makes shards in this process, or in several others."""

    def __init__(self, workers: int, root: str, recipe: Recipe, rows: RowsConfig) -> None:
        """Begin nothing yet; one worker is this process."""
        self._given = (root, recipe, rows)
        self._workers = workers

    def run(self, jobs: Iterator[Job], done: Callable[[ShardNote], None]) -> None:
        """Make all shards. Jobs are taken from the iterator only shortly before they are run.

        Raises:
          UserError: a passage is at fault.
          Interrupted: one of the processes was killed.
          OSError: a shard cannot be written.
        """
        if self._workers == 1:
            for job in jobs:
                done(_made(job, *self._given))
            return
        root, recipe, rows = self._given
        texts = {tower: one.text for tower, one in recipe.tokenizers.items()}
        context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads' locks
        with (
            ProcessPoolExecutor(
                self._workers, context, _begin, (root, recipe.config, texts, rows)
            ) as pool,
            _program_left_out(),
        ):
            waiting: collections.deque[Future[ShardNote]] = collections.deque()
            try:
                for job in jobs:
                    waiting.append(pool.submit(_make, job))
                    if len(waiting) > 2 * self._workers:
                        done(waiting.popleft().result())
                while waiting:
                    done(waiting.popleft().result())
            except BrokenProcessPool as error:
                raise Interrupted(
                    f"{root}: one of the {self._workers} processes that make shards was killed, "
                    "perhaps because the memory was full; bind CorpusConfig.workers to fewer, and "
                    "start the command again, which keeps what is done"
                ) from error
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def workers_for(wanted: int, shards: int) -> int:
    """How many processes make so many shards; 0 wanted = one for each core of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(wanted or cores or 1, shards))


_GIVEN: list[tuple[str, Recipe, RowsConfig]] = []


def _begin(root: str, config: StoreConfig, texts: dict[str, str], rows: RowsConfig) -> None:
    """In a new process: make the tokenizers once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core
    tokenizers = {tower: Tokenizer(text) for tower, text in texts.items()}
    _GIVEN.append((root, Recipe(config, tokenizers), rows))


def _make(job: Job) -> ShardNote:
    return _made(job, *_GIVEN[0])


def _made(job: Job, root: str, recipe: Recipe, rows: RowsConfig) -> ShardNote:
    given = job.passages
    records = [one for _, one in given.records(rows)] if isinstance(given, Unit) else given
    return write_shard(Objects(root), job.name, records, recipe, job.last)


@contextlib.contextmanager
def _program_left_out() -> Iterator[None]:
    """New processes do not run the user's own script, which may not expect that."""
    main = sys.modules["__main__"].__dict__
    kept = {name: main.get(name) for name in ("__spec__", "__file__")}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update({name: value for name, value in kept.items() if value is not None})
