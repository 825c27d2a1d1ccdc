"""A certificate of recall: some questions of a run are searched exactly, too.

An approximate search says nothing of what it missed. So a seeded sample of a run's own questions is
searched twice. The share of the exactly best rows that the run's search found is its recall, told
with the range in which it lies with 95 % confidence. It is noted beside a saved index.

Of an index in 8 bits no exact rows are kept. There the run's search, which scores what it finds
exactly, is compared with one that finds four times as many and scores them all exactly.
"""

import datetime
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import NO_ROW, Batch, DeviceIndex, Params
from atlas_jax.corpus.config import RecallConfig
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.corpus.retrieval import make_device_retrieve, rerank
from atlas_jax.index.exact import exact_search
from atlas_jax.index.living import LivingStore
from atlas_jax.index.recall_notes import RecallNote, note_recall
from atlas_jax.models.towers import embed_query
from atlas_jax.retriever.dual_encoder import DualEncoder

T = TypeVar("T")

_Z = 1.96  # of a normal distribution's middle 95 %
_DEEPER = 4  # times as many rows are found to see what rounding costs
_ROWS = 1 << 16  # of embeddings multiplied at a time on the host


def sample(questions: Sequence[T], config: RecallConfig) -> list[T]:
    """The questions that are searched twice, in their order."""
    draw = np.random.default_rng(config.seed)
    size = min(config.sample, len(questions))
    return [questions[i] for i in sorted(draw.choice(len(questions), size, replace=False))]


def interval(recall: float, questions: int) -> tuple[float, float]:
    """Wilson's range of a share that was found over so many questions.

    A question's share counts as one trial, which makes the range rather too wide than too narrow.
    """
    z2 = _Z**2 / questions
    middle = (recall + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(recall * (1 - recall) / questions + z2 / (4 * questions))
    return max(0.0, middle - half), min(1.0, middle + half)


def check_bound(certificate: dict[str, float], config: RecallConfig, name: str) -> None:
    """Warn or stop where the recall is below the bound that was set.

    Raises:
      UserError: it is, and the run is to stop.
    """
    found = certificate[name]
    if found >= config.least:
        return
    words = (
        f"{name} = {found:.3f} of the approximate search is below RecallConfig.least = "
        f"{config.least}: raise CorpusConfig.recall_target, or ScannConfig.leaves_searched and "
        "ScannConfig.rescored, or StepConfig.rerank of an index in int8"
    )
    if config.below == "stop":
        raise UserError(words)
    print(f"warning: {words}", file=sys.stderr)


class RecallCheck:
    """Searches batches of questions twice."""

    def __init__(
        self,
        corpus: Corpus,
        retriever: DualEncoder,
        k: int,
        mesh: Mesh,
        place: Callable[[Batch], Batch],
        kept: int = 0,
    ) -> None:
        """Compile nothing yet.

        Args:
          k: rows that the run searches for each question.
          place: puts a batch on the devices.
          kept: how many of these are kept by exact scores; 0 = none are scored anew.
        """
        self._corpus, self._k, self._place, self._kept = corpus, k, place, kept
        whole = partitioning.replicated(mesh)
        target = corpus.recall_target

        def both(params: Params, index: DeviceIndex, batch: Batch) -> Any:
            query_be = embed_query(retriever, params, batch)
            if kept:
                deep = min(_DEEPER * k, index.embeddings_ne.shape[0])
                searches = (
                    make_device_retrieve(depth, mesh, share)(index, query_be, batch)
                    for depth, share in ((k, target), (deep, 1.0))
                )
                own = params["retriever"]
                return tuple(
                    rerank(retriever, own, query_be, found, kept).rows_bk for found in searches
                )
            told = (index, query_be, k, batch.excluded_rows_bx, mesh)
            return exact_search(*told, target).rows_bk, exact_search(*told).rows_bk

        self._both = jax.jit(both, out_shardings=whole)
        self._embed = jax.jit(
            lambda params, batch: embed_query(retriever, params, batch), out_shardings=whole
        )

    def certificate(
        self, params: Params, batches: Iterable[Batch], config: RecallConfig
    ) -> dict[str, float]:
        """`search_recall@k`, and the ends of its range, each between 0 and 1.

        Args:
          params: {"retriever": ...}, perhaps with more.
          batches: on the host; rows of weight 0 do not count.

        Raises:
          UserError: the recall is below the bound, and the run is to stop.
        """
        shares = [one for batch in batches for one in self._shares(params, batch)]
        name, recall = f"search_recall@{self._kept or self._k}", float(np.mean(shares))
        low, high = interval(recall, len(shares))
        found = {name: recall, f"{name}_low": low, f"{name}_high": high}
        if self._corpus.saved_index and multihost.is_first():
            self._note(recall, low, high, len(shares))
        check_bound(found, config, name)
        return found

    def _note(self, recall: float, low: float, high: float, questions: int) -> None:
        corpus, store = self._corpus, self._corpus.store
        rounded = {"dtype": corpus.dtype, "rescored": self._k} if self._kept else {}
        note = RecallNote(
            search=corpus.search_settings | rounded,
            encoder_hash=corpus.encoder_hash,
            k=self._kept or self._k,
            recall=recall,
            low=low,
            high=high,
            questions=questions,
            passages_version=store.version["version"] if isinstance(store, LivingStore) else 0,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        try:
            note_recall(corpus.saved_index, note)
        except OSError as error:  # an index that may only be read is as good
            print(f"the recall was not noted beside the index: {error}", file=sys.stderr)

    def _shares(self, params: Params, batch: Batch) -> list[float]:
        """Of each question the share of its exactly best rows that were found."""
        placed = self._place(batch)
        if self._corpus.index is not None:
            rows = jax.device_get(self._both(params, self._corpus.index, placed))
        else:
            rows = self._on_host(np.asarray(self._embed(params, placed)), batch)
        real = np.flatnonzero(np.asarray(batch.weight_b) > 0)
        pairs = ((rows[0][i], rows[1][i][rows[1][i] != NO_ROW]) for i in real)
        return [float(np.isin(best, found).mean()) if len(best) else 1.0 for found, best in pairs]

    def _on_host(self, query_be: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        corpus, excluded_bx = self._corpus, np.asarray(batch.excluded_rows_bx)
        assert corpus.searcher is not None and corpus.host_ne is not None
        found = corpus.searcher.search(query_be, self._k, excluded_bx)
        best, scores = _best(query_be, corpus.host_ne, self._k, excluded_bx)
        return np.asarray(found.rows_bk), np.where(np.isneginf(scores), NO_ROW, best)


def _best(
    query_be: np.ndarray, embeddings_ne: Any, k: int, excluded_bx: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows of each query and their scores, a part of the embeddings at a time."""
    b = len(query_be)
    rows_bk, scores_bk = np.zeros((b, 0), np.int64), np.zeros((b, 0), np.float32)
    for start in range(0, len(embeddings_ne), _ROWS):
        part = np.asarray(embeddings_ne[start : start + _ROWS], np.float32)
        scores_bn = np.asarray(query_be, np.float32) @ part.T
        for row, excluded in enumerate(excluded_bx - start):
            scores_bn[row, excluded[(excluded >= 0) & (excluded < len(part))]] = -np.inf
        rows_bn = np.broadcast_to(np.arange(start, start + len(part)), scores_bn.shape)
        scores_bk = np.concatenate([scores_bk, scores_bn], axis=1)
        rows_bk = np.concatenate([rows_bk, rows_bn], axis=1)
        order = np.argsort(-scores_bk, axis=1, kind="stable")[:, :k]
        rows_bk = np.take_along_axis(rows_bk, order, axis=1)
        scores_bk = np.take_along_axis(scores_bk, order, axis=1)
    return rows_bk, scores_bk
