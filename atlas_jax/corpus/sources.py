"""Where the passages of a batch come from: the index, the data file, or nowhere.

For each batch the host calls `Source.of_batch`. The compiled step passes its result to
`Source.retrieve`, which gives the passages. So trainer and evaluator have the same code for device
search, host search, given passages and closed book.
"""

import copy
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Array, Batch, DeviceIndex, Params, Passages
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.corpus.retrieval import make_device_retrieve, no_passages, retrieved_already
from atlas_jax.models.towers import embed_query
from atlas_jax.retriever.dual_encoder import DualEncoder


class Source(Protocol):
    """Passages for a batch."""

    def of_batch(self, params: Params, batch: Batch) -> Any:
        """Make the input of `retrieve` for this batch: an index, passages, or None.

        Args:
          params: of both models, or of the retriever alone: {"retriever": ...}.
          batch: numpy or device arrays.
        """
        ...

    def retrieve(self, source: Any, query_be: Float[Array, "b e"], batch: Batch) -> Passages:
        """Give the passages; called inside the compiled step with the result of `of_batch`."""
        ...


class DeviceSource:
    """Search and gather inside the compiled step, in the corpus's present index."""

    def __init__(self, corpus: Corpus, k: int, mesh: Mesh) -> None:
        """Search for k passages."""
        self._corpus = corpus
        self._retrieve = make_device_retrieve(k, mesh, corpus.recall_target)

    def over(self, corpus: Corpus) -> "DeviceSource":
        """The same search in another corpus, whose index has the same shape."""
        other = copy.copy(self)
        other._corpus = corpus
        return other

    def of_batch(self, params: Params, batch: Batch) -> DeviceIndex:
        """The index, whatever the batch."""
        del params, batch
        assert self._corpus.index is not None
        return self._corpus.index

    def retrieve(self, source: Any, query_be: Float[Array, "b e"], batch: Batch) -> Passages:
        """See `Source.retrieve`."""
        return self._retrieve(source, query_be, batch)


class HostSource:
    """Embed the queries on the devices, search and gather on the host."""

    def __init__(self, corpus: Corpus, k: int, retriever: DualEncoder, mesh: Mesh) -> None:
        """Search for k passages."""
        self._corpus, self._k, self._mesh = corpus, k, mesh
        self._embed = jax.jit(
            lambda params, batch: embed_query(retriever, params, batch),
            out_shardings=partitioning.replicated(mesh),
        )

    def over(self, corpus: Corpus) -> "HostSource":
        """The same search in another corpus."""
        other = copy.copy(self)
        other._corpus = corpus
        return other

    def of_batch(self, params: Params, batch: Batch) -> Passages:
        """The passages of this batch; each process finds them all, from what all have searched."""
        assert self._corpus.searcher is not None
        query_be = np.asarray(self._embed(params, batch))
        excluded_bx = multihost.to_host(batch.excluded_rows_bx)
        found = self._corpus.searcher.search(query_be, self._k, excluded_bx)
        passages = self._corpus.store.gather_passages(found)
        if jax.process_count() == 1:
            return passages
        return multihost.place(passages, partitioning.replicated(self._mesh))

    def retrieve(self, source: Any, query_be: Float[Array, "b e"], batch: Batch) -> Passages:
        """See `Source.retrieve`."""
        return retrieved_already(source, query_be, batch)


class GivenSource:
    """The passages that the data file has for each query."""

    def of_batch(self, params: Params, batch: Batch) -> None:
        """Nothing: the batch brings them along."""
        del params, batch

    def retrieve(self, source: Any, query_be: Float[Array, "b e"], batch: Batch) -> Passages:
        """See `Source.retrieve`."""
        del source, query_be
        assert batch.given is not None
        return batch.given


class NoSource:
    """Closed book: the reader sees the query alone."""

    def of_batch(self, params: Params, batch: Batch) -> None:
        """Nothing."""
        del params, batch

    def retrieve(self, source: Any, query_be: Float[Array, "b e"], batch: Batch) -> Passages:
        """See `Source.retrieve`."""
        del source, query_be
        return no_passages(batch)


def make_source(
    passages: str,
    corpus: Corpus | None,
    k: int,
    binding: str,
    retriever: DualEncoder,
    mesh: Mesh,
) -> Source:
    """The source for one of config.PASSAGE_SOURCES.

    Args:
      passages: 'index', 'file' or 'none'.
      corpus: what is searched; its index may be loaded later.
      k: passages to search for.
      binding: what set k, for the error.

    Raises:
      UserError: k is more than the corpus has.
    """
    if passages == "none":
        return NoSource()
    if passages == "file":
        return GivenSource()
    assert corpus is not None
    if k > corpus.store.count:
        raise UserError(
            f"{binding} asks for {k} passages, but the corpus has {corpus.store.count}; "
            "ask for fewer or index more"
        )
    if not corpus.on_host:
        return DeviceSource(corpus, k, mesh)
    return HostSource(corpus, k, retriever, mesh)
