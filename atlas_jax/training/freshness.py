"""Keeps the index of a run fresh: full refreshes, rolling slices, and the staleness meter.

All of it happens between two steps. Only the number of finished steps decides when, so a resumed
run repeats it.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Array, Batch, Params
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.index.int8 import as_floats, stored_as
from atlas_jax.index.rolling import embed_tokens
from atlas_jax.index.staleness import measure
from atlas_jax.models.towers import embed, passage_tower
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.run import TrainRun


def check_freshness(told: TrainRun) -> None:
    """Refuse to refresh or measure an index that never goes stale, or that cannot be refreshed.

    Raises:
      UserError: names the bindings.
    """
    policy, meter, config, step = told.refresh, told.staleness, told.train, told.step
    at_fault = {
        "RefreshPolicy.rolling_rows": policy.rolling_rows > 0,
        "RefreshPolicy.schedule": policy.refreshes,
        "StalenessConfig.every": meter.every > 0,
    }
    binding = next((name for name, bound in at_fault.items() if bound), "")
    if binding and (config.passages != "index" or step.retriever_training != "joint"):
        default = "'-1'" if binding.endswith("schedule") else "0"
        raise UserError(
            f"{binding} keeps the index fresh, but nothing makes it stale: "
            f"TrainConfig.passages = {config.passages!r}, StepConfig.retriever_training = "
            f"{step.retriever_training!r}; bind {binding} = {default}"
        )
    if policy.rolling_rows and told.corpus.config.searcher != "exact":
        raise UserError(
            "RefreshPolicy.rolling_rows refreshes an index in place on the devices; that of "
            "CorpusConfig.searcher = 'scann' can only be built anew as a whole: bind "
            "RefreshPolicy.schedule or StalenessConfig.refresh_below, or CorpusConfig.searcher = "
            "'exact'"
        )


class Freshness:
    """Refreshes and measures an index between steps, as RefreshPolicy and StalenessConfig say."""

    def __init__(self, told: TrainRun, corpus: Corpus, retriever: DualEncoder, mesh: Mesh) -> None:
        """Draw the probe, without embedding anything.

        Raises:
          UserError: a slice or the meter's k is larger than the corpus.
        """
        self._corpus, self._policy, self._meter = corpus, told.refresh, told.staleness
        self._frozen = told.optimizers["retriever"].frozen_steps
        # The step at which all rows were last embedded at once, and slices since then.
        self._whole_at, self._slices = 0, 0
        self._has_rolled = False  # in this process
        count = corpus.store.count
        if self._policy.rolling_rows > count:
            raise UserError(
                f"RefreshPolicy.rolling_rows = {self._policy.rolling_rows} is more than the "
                f"{count} passages of the corpus; RefreshPolicy.schedule refreshes all of them"
            )
        if self._meter.every:
            self._rows_p = self._meter.probe_rows(count)
            self._tokens_pm = corpus.store.retriever_tokens_nm[self._rows_p].astype("int32")
        batch_size, k = told.corpus.config.embed_batch_size, min(self._meter.k, count)

        tower = passage_tower(retriever)

        def probe(
            params: Params, batch: Batch, tokens_pm: Array, stale_pe: Array, dtype: str
        ) -> Any:
            fresh_pe = embed_tokens(tower, params, tokens_pm, batch_size)
            fresh_pe = as_floats(stored_as(fresh_pe, dtype))
            query_be = embed(retriever, params, "embed_query", batch.retriever_tokens_br)
            return measure(query_be, batch.weight_b, stale_pe, fresh_pe, k)

        self._probe = jax.jit(
            probe, static_argnames="dtype", out_shardings=partitioning.replicated(mesh)
        )

    def pauses(self, done: int) -> bool:
        """Whether training waits for `before_step`; for a slice, only while it compiles."""
        compiles = self._policy.rolls(done, self._frozen) and not self._has_rolled
        return self._policy.due(done, self._frozen) or self._meter.due(done) or compiles

    def before_step(self, done: int, params: Params, batch: Batch) -> dict[str, float]:
        """Refresh and measure what is due after `done` steps.

        Args:
          done: number of finished steps.
          params: of the retriever.
          batch: of the next step; its queries are the meter's.

        Returns:
          The measurements, empty if nothing was measured: ``stale_recall@k`` and ``drift`` (see
          `staleness.measure`); ``oldest_row``, the steps since the oldest embedding was made;
          ``refreshed``, 1 if the index was then embedded anew.
        """
        if self._policy.due(done, self._frozen):
            self._refresh(done, params)
        elif self._policy.rolls(done, self._frozen):
            self._corpus.roll(params, self._policy.rolling_rows)
            self._slices += 1
            self._has_rolled = True
        if not self._meter.due(done):
            return {}
        stale_pe = self._corpus.embeddings_of(self._rows_p)
        measured = self._probe(params, batch, self._tokens_pm, stale_pe, dtype=self._corpus.dtype)
        found = jax.device_get(measured)
        recall, oldest = float(found["stale_recall"]), done - self._oldest(done)
        refreshed = recall < self._meter.refresh_below
        if refreshed:
            self._refresh(done, params)
        return {
            f"stale_recall@{self._meter.k}": recall,
            "drift": float(found["drift"]),
            "oldest_row": oldest,
            "refreshed": float(refreshed),
        }

    def notes(self) -> dict[str, int]:
        """Notes for a checkpoint, as JSON values."""
        return {"whole_at": self._whole_at, "slices": self._slices}

    def set_notes(self, notes: Mapping[str, int]) -> None:
        """Continue from a checkpoint's `notes`."""
        self._whole_at, self._slices = notes["whole_at"], notes["slices"]

    def _refresh(self, done: int, params: Params) -> None:
        self._corpus.refresh(params)
        self._whole_at, self._slices = done, 0

    def _oldest(self, done: int) -> int:
        """The step after which the oldest embedding was made."""
        policy, count = self._policy, self._corpus.store.count
        if not policy.rolling_rows or self._slices * policy.rolling_rows < count:
            return self._whole_at
        last = done - done % policy.rolling_every
        return last - policy.round_steps(count) + policy.rolling_every
