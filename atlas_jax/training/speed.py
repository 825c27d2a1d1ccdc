"""Measures a run's speed against the peak of its devices, and traces single steps."""

import argparse
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from atlas_jax.core import trees
from atlas_jax.core.types import Batch, Params
from atlas_jax.training.chips import peak_flops
from atlas_jax.training.config import ProfileConfig
from atlas_jax.training.state import QUERY_TOWER, Trains, split_trainable

TRACES = "profile"  # in model_dir
STEPS_AHEAD = 4  # steps that may be under way at once, so that the devices always have work
PROFILE_FLAG = {"profile_steps": "ProfileConfig.steps"}  # for `core.config.launch`
_UNTOLD = ProfileConfig()


def add_profile_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--profile_steps`, short for ``ProfileConfig.steps``."""
    parser.add_argument(
        "--profile_steps",
        metavar="FIRST,LAST",
        help="trace these steps, both included, into MODEL_DIR/profile (ProfileConfig.steps)",
    )


Uses = Callable[[str], int]  # path of a parameter -> how often a text goes through it


def once(path: str) -> int:
    """How often a parameter is used where no layers share any: once."""
    return 1


class Tracer:
    """Traces the steps of ProfileConfig; use as a context manager around all steps."""

    def __init__(self, config: ProfileConfig, directory: str) -> None:
        """Write to `directory`; each process writes its own part."""
        self._steps, self._directory, self._running = config.steps, directory, False

    def before(self, step: int) -> None:
        """Begin the trace at its first step, or when a run resumes after it."""
        if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """End the trace after its last step, when the devices have the results."""
        if self._running and step == self._steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            self._stop()


class StepClock:
    """Seconds per step, without the time between steps for evaluations and the like.

    The clock starts when the first step has finished, since that step compiles. A step begins
    before the previous ones have finished. So at the end of each measured period the clock waits
    for all steps that are under way.

    At most ``STEPS_AHEAD`` steps are under way at once. Several processes with several devices each
    would wait for ever if one of them were about 32 programs ahead of the others.
    """

    def __init__(self) -> None:
        """Make a clock that starts with the first step."""
        self._start: float | None = None
        self._steps = 0
        self._under_way: collections.deque[Any] = collections.deque()

    def stepped(self, results: Any) -> None:
        """Count a step. Waits for its `results` if it is the first, else for an earlier step."""
        if self._start is None:
            jax.block_until_ready(results)
            self._start = time.monotonic()
            return
        self._steps += 1
        self._under_way.append(results)
        if len(self._under_way) > STEPS_AHEAD:
            jax.block_until_ready(self._under_way.popleft())

    @contextlib.contextmanager
    def paused(self, results: Any) -> Iterator[None]:
        """Wait for `results` of the steps so far, then stop the clock until the block ends."""
        jax.block_until_ready(results)
        before = time.monotonic()
        yield
        if self._start is not None:
            self._start += time.monotonic() - before

    def lap(self) -> float | None:
        """Seconds per finished step since the last call; None if there was no step."""
        if self._start is None or not self._steps:
            return None
        now = time.monotonic()
        seconds = (now - self._start) / self._steps
        self._start, self._steps = now, 0
        return seconds


class Speed:
    """A step's time as rates, memory and utilisation."""

    def __init__(
        self, flops: float, counts: Mapping[str, int], config: ProfileConfig = _UNTOLD
    ) -> None:
        """Keep the work of one step, over all devices.

        Args:
          flops: model FLOPs.
          counts: of tokens and other inputs, by name.
          config: gives the peak of a device if it is unknown.
        """
        self._flops, self._counts = flops, counts
        peak = config.peak_flops or peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * jax.device_count()

    def of(self, seconds: float | None) -> dict[str, float]:
        """Metrics of a step that took this long.

        Args:
          seconds: None if no step was timed; then there is only the memory.

        Returns:
          `seconds_per_step`; a rate for each count, such as `tokens_per_second`; `hbm_gb` and
          `hbm_peak_gb`, in 10^9 bytes on the fullest of this process's devices, if the backend
          tells them; `mfu`, from 0 to 1, if the device's peak is known.
        """
        found = {}
        if seconds is not None:
            rates = {f"{name}_per_second": n / seconds for name, n in self._counts.items()}
            found = {"seconds_per_step": seconds, **rates}
            if self._peak:
                found["mfu"] = self._flops / seconds / self._peak
        memory = [device.memory_stats() or {} for device in jax.local_devices()]
        for name, key in (("hbm_gb", "bytes_in_use"), ("hbm_peak_gb", "peak_bytes_in_use")):
            used = [one[key] for one in memory if key in one]
            if used:
                found[name] = max(used) / 1e9
        return found


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the FLOPs of a training step follow from, beside its models and its batch.

    Attributes:
      trains: what of the parameters changes.
      reader_length: of a reader input, in tokens.
      k: reader inputs of a query, 1 for closed book.
      passage: tokens of a passage that the passage tower reads; 0 = none is retrieved.
      packed_rows: rows of `reader_length` tokens that these inputs share; 0 = each has its own.
      packed_passages: rows of `passage` tokens that a query's passages share in the passage tower.
    """

    trains: Trains
    reader_length: int
    k: int
    passage: int
    packed_rows: int = 0
    packed_passages: int = 0

    @property
    def read(self) -> int:
        """Tokens that the reader reads for a query, with padding."""
        return (self.packed_rows or self.k) * self.reader_length


def step_flops(params: Params, batch: Batch, sizes: Sizes, uses: Uses = once) -> float:
    """Model FLOPs of a training step, over all devices.

    A matrix of n parameters costs 2 n FLOPs a token forward, 2 n back to its inputs where its
    model trains, and 2 n for itself where it trains itself. The encoder and the decoder's
    cross-attention keys and values see every token of every reader input, the rest of the decoder
    the targets, the towers their own inputs. Not counted: attention's products of states with
    states, the search, the passes that only score passages for the retriever, and whatever is
    computed a second time. So the utilisation that it gives is a lower bound.

    Args:
      params: of both models, arrays or their shapes.
      batch: arrays or their shapes.
      sizes: of its inputs, and what trains.
      uses: how often a tower puts a text through a parameter of this path, see
        `EncoderConfig.uses`.
    """
    trains = sizes.trains
    moving, _ = split_trainable(params, trains)
    _, passed = trees.split(params, trains.never)  # what a gradient goes through
    rows = batch.query_tokens_bq.shape[0]

    def cost(count: Callable[[Params], int], part: str) -> float:
        back = count(passed.get(part, {})) if moving[part] else 0
        return 2.0 * (count(params[part]) + back + count(moving[part]))

    tied = "logits_dense" not in params["reader"]["decoder"]  # the embedding table serves
    targets = batch.target_tokens_bt.size
    total = cost(_over_source, "reader") * rows * sizes.read
    total += cost(lambda reader: _over_target(reader, tied), "reader") * targets
    if sizes.passage:
        one = "encoder" in params["retriever"]
        query, key = ("encoder",) * 2 if one else (QUERY_TOWER, "passage_encoder")
        queries = batch.retriever_tokens_br.size
        total += cost(lambda t: _kernels(t.get(query, {}), uses=uses), "retriever") * queries
        if trains.retriever == "joint":
            passages = rows * (sizes.packed_passages or sizes.k) * sizes.passage
            total += cost(lambda t: _kernels(t.get(key, {}), uses=uses), "retriever") * passages
    return total


_CROSS = ("encoder_decoder_attention/key", "encoder_decoder_attention/value")


def _over_source(reader: Params) -> int:
    """Of a reader or a part of it: what every token of its inputs goes through."""
    return _kernels(reader.get("encoder", {})) + _kernels(reader.get("decoder", {}), *_CROSS)


def _over_target(reader: Params, tied: bool) -> int:
    """What the targets go through; with a tied table, that at the end."""
    decoder = reader.get("decoder", {})
    table = jax.tree.leaves(reader.get("token_embedder", {})) if tied else []
    return _kernels(decoder) - _kernels(decoder, *_CROSS) + sum(leaf.size for leaf in table)


def step_speed(
    params: Params,
    batch: Batch,
    sizes: Sizes,
    uses: Uses = once,
    profile: ProfileConfig = _UNTOLD,
) -> Speed:
    """The `Speed` of a training step; arguments as in `step_flops` and `Speed`.

    It counts the tokens of reader inputs and targets, with padding, and the passages read.
    """
    rows = batch.query_tokens_bq.shape[0]
    tokens = rows * sizes.read + batch.target_tokens_bt.size
    counts = {"tokens": tokens}
    if sizes.passage:
        counts["passages"] = rows * sizes.k
    return Speed(step_flops(params, batch, sizes, uses), counts, profile)


def contrastive_flops(
    params: Params, query_tokens: int, key_tokens: int, slow: bool, uses: Uses = once
) -> float:
    """Model FLOPs of a step of the retriever's pretraining, over all devices.

    As in `step_flops`, the products of embeddings with each other and with the queue are not
    counted.

    Args:
      params: the retriever's, arrays or their shapes.
      query_tokens: of all rows, padding included.
      key_tokens: those of the passages or second crops, hard negatives included.
      slow: whether keys come from the momentum encoder, forward alone.
      uses: as in `step_flops`.
    """
    one = params.get("encoder")
    queries = 6.0 * _kernels(one or params["query_encoder"], uses=uses) * query_tokens
    keys = _kernels(one or params["passage_encoder"], uses=uses) * key_tokens
    return queries + (2.0 if slow else 6.0) * keys


def encoder_flops(params: Params, moving: Params, tokens: int, uses: Uses = once) -> float:
    """Model FLOPs of a training step of an encoder with heads, over all devices.

    As in `step_flops`. Heads that see a state of each row alone are counted as if they saw none.

    Args:
      params: {"encoder": ..., heads}, arrays or their shapes.
      moving: what of them trains.
      tokens: of all rows, padding included.
      uses: as in `step_flops`, of paths below the encoder.
    """
    whole = _kernels(params["encoder"], uses=uses)
    own = _kernels(moving.get("encoder", {}), uses=uses)
    return 2.0 * (2 * whole + own) * tokens


def _kernels(tree: Any, *parts: str, uses: Uses = once) -> int:
    """Parameters in matrices of a tree, all or those whose path has one of these parts.

    Each counts as often as it is used; of experts each token uses one.
    """
    return sum(
        leaf.size // (leaf.shape[0] if "/expert/" in name else 1) * uses(name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if (name := jax.tree_util.keystr(path, simple=True, separator="/")).endswith("kernel")
        and (not parts or any(part in name for part in parts))
    )
