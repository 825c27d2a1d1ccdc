"""How fast a run is, measured against what its devices could do, and traces of single steps."""

import argparse
import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Batch, Params
from atlas_jax.training.chips import peak_flops
from atlas_jax.training.config import StepConfig

TRACES = "profile"  # in model_dir
STEPS_AHEAD = 4  # begun before the oldest of them has ended; the devices never run dry
PROFILE_FLAG = {"profile_steps": "ProfileConfig.steps"}  # for `core.config.launch`


def add_profile_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--profile_steps`, short for ``ProfileConfig.steps``."""
    parser.add_argument(
        "--profile_steps",
        metavar="FIRST,LAST",
        help="trace these steps, both included, into MODEL_DIR/profile (ProfileConfig.steps)",
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """What is measured of a training run.

    Attributes:
      steps: (first, last) step that is traced, both included, for TensorBoard and XProf; the
        trace is in model_dir/profile. () = none. Step 1 compiles, so begin later.
      peak_flops: FLOP/s of one device, for the model FLOPs utilisation; 0 = what is known of
        its kind, and no utilisation in the metrics where nothing is.
    """

    steps: tuple[bounds.AtLeast1, ...] = ()
    peak_flops: bounds.NotNegative = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no range of steps.

        Raises:
          UserError: names the binding.
        """
        bounds.check(self)
        if self.steps and not (len(self.steps) == 2 and self.steps[0] <= self.steps[1]):
            raise UserError(
                f"ProfileConfig.steps = {self.steps!r}: expected () or (first, last), 1 or more"
            )


class Tracer:
    """Traces the steps of ProfileConfig; use as a context manager around all steps."""

    def __init__(self, config: ProfileConfig, directory: str) -> None:
        """Write to `directory`, each process its own part."""
        self._steps, self._directory, self._running = config.steps, directory, False

    def before(self, step: int) -> None:
        """Begin the trace if this is the step, or the first one of a run that went on behind it."""
        if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """End the trace if this was the step, once the devices have its results."""
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
    """Seconds per step, without what a run does between its steps.

    Time begins when the results of the first step are there: that one compiles. Later steps are
    taken before those in front of them have ended, so each end of a stretch of time waits for all
    that are under way.

    No more than ``STEPS_AHEAD`` are under way at any time: several processes with several devices
    each wait for ever once one of them is some 32 programs ahead of the others.
    """

    def __init__(self) -> None:
        """Begin with the first step."""
        self._start: float | None = None
        self._steps = 0
        self._under_way: collections.deque[Any] = collections.deque()

    def stepped(self, results: Any) -> None:
        """Count a step; waits for its `results` if it is the first, else for an earlier one's."""
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
        """Wait for `results` of the steps so far, then leave out the time until the block ends."""
        jax.block_until_ready(results)
        before = time.monotonic()
        yield
        if self._start is not None:
            self._start += time.monotonic() - before

    def lap(self) -> float | None:
        """Seconds per step since the last call, whose results are there; None without a step."""
        if self._start is None or not self._steps:
            return None
        now = time.monotonic()
        seconds = (now - self._start) / self._steps
        self._start, self._steps = now, 0
        return seconds


class Speed:
    """A step's time as rates, memory and utilisation."""

    def __init__(
        self, flops: float, counts: Mapping[str, int], config: ProfileConfig = ProfileConfig()
    ) -> None:
        """Keep what a step does, over all devices.

        Args:
          flops: model FLOPs.
          counts: of tokens and other things that it takes in, by their names.
          config: the peak of a device, where it is not known.
        """
        self._flops, self._counts = flops, counts
        peak = config.peak_flops or peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * jax.device_count()

    def of(self, seconds: float | None) -> dict[str, float]:
        """Metrics of a step that took so long.

        Args:
          seconds: None where no step was timed; then there is nothing but the memory.

        Returns:
          `seconds_per_step`; `tokens_per_second` and the like, a rate of each count; `hbm_gb` and
          `hbm_peak_gb`, 10^9 bytes of the fullest of this process's devices, where their backend
          tells; `mfu`, from 0 to 1, where the device's peak is known.
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


def step_flops(params: Params, batch: Batch, config: StepConfig, k: int, passage: int) -> float:
    """Model FLOPs of a training step, over all devices.

    A matrix of n parameters costs 2 n FLOPs a token forward and 4 n backward. The encoder and
    the decoder's cross-attention keys and values see every token of every reader input, the rest
    of the decoder the targets, the towers their own inputs. Not counted: attention's products of
    states with states, the search, the passes that only score passages for the retriever, and
    whatever is computed a second time. So the utilisation that it gives is a lower bound.

    Args:
      params: of both models, arrays or their shapes.
      batch: arrays or their shapes.
      config: length of a reader input, and what of the retriever is trained.
      k: reader inputs of a query, 1 for closed book.
      passage: tokens of a passage that the passage tower reads; 0 = none is retrieved.
    """
    reader, towers = params["reader"], params["retriever"]
    rows = batch.query_tokens_bq.shape[0]
    cross = [f"encoder_decoder_attention/{part}" for part in ("key", "value")]
    over_source = _kernels(reader["encoder"]) + _kernels(reader["decoder"], *cross)
    over_target = _kernels(reader["decoder"]) - _kernels(reader["decoder"], *cross)
    if "logits_dense" not in reader["decoder"]:  # the embedding table serves
        over_target += reader["token_embedder"]["embedding"].size
    total = 6.0 * over_source * rows * k * config.reader_length
    total += 6.0 * over_target * batch.target_tokens_bt.size
    if passage:
        training, one = config.retriever_training, towers.get("encoder")
        query = _kernels(one or towers["query_encoder"]) * batch.retriever_tokens_br.size
        total += (2.0 if training == "fixed" else 6.0) * query
        if training == "joint":
            total += 6.0 * _kernels(one or towers["passage_encoder"]) * rows * k * passage
    return total


def step_speed(
    params: Params,
    batch: Batch,
    config: StepConfig,
    k: int,
    passage: int,
    profile: ProfileConfig = ProfileConfig(),
) -> Speed:
    """Of a training step; arguments as in `step_flops` and `Speed`.

    Counted are the tokens of reader inputs and targets, padding included, and the passages read.
    """
    rows = batch.query_tokens_bq.shape[0]
    counts = {"tokens": rows * k * config.reader_length + batch.target_tokens_bt.size}
    if passage:
        counts["passages"] = rows * k
    return Speed(step_flops(params, batch, config, k, passage), counts, profile)


def contrastive_flops(params: Params, query_tokens: int, key_tokens: int, slow: bool) -> float:
    """Model FLOPs of a step of the retriever's pretraining, over all devices.

    Counted as in `step_flops`: the products of embeddings with each other and with the queue are
    left out.

    Args:
      params: the retriever's, arrays or their shapes.
      query_tokens: of all rows, padding included.
      key_tokens: those of the passages or second crops, hard negatives included.
      slow: whether keys come from the momentum encoder, forward alone.
    """
    one = params.get("encoder")
    queries = 6.0 * _kernels(one or params["query_encoder"]) * query_tokens
    keys = _kernels(one or params["passage_encoder"]) * key_tokens
    return queries + (2.0 if slow else 6.0) * keys


def _kernels(tree: Any, *parts: str) -> int:
    """Parameters in matrices of a tree, all or those whose path has one of these parts."""
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if (name := jax.tree_util.keystr(path, simple=True, separator="/")).endswith("kernel")
        and (not parts or any(part in name for part in parts))
    )
