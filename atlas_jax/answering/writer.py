"""Answers that can be told token by token while they are written.

The loop of the decoder is compiled once and may stop at any token. An answer whose tokens are told
comes from the same programs as one that is told whole, so the two are equal to the bit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atlas_jax.answering.answers import (
    Answers,
    Reading,
    encoded,
    explained,
    joined,
    make_answer,
    sample_keys,
)
from atlas_jax.core import partitioning
from atlas_jax.core.packing import Packed, pack
from atlas_jax.core.types import Array, Batch, Params, Passages
from atlas_jax.reader import fid
from atlas_jax.reader.generate import GenerationConfig, Writing, start_writing, write
from atlas_jax.reader.t5 import T5

# Called with the tokens so far, int32 [b, max_length].
OnTokens = Callable[[np.ndarray], None]


class Writer:
    """Writes the answers of batches that are read in one way; call it with a batch.

    It reads the passages, writes, and explains in three programs. The last two run as often as
    needed. Where passages share rows (`Reading.packed_rows`), a program before these packs them. If
    they do not fit, the three are compiled for padded passages.
    """

    def __init__(
        self, reader: T5, generation: GenerationConfig, reading: Reading, mesh: Mesh
    ) -> None:
        """Compile nothing yet.

        Args:
          reading: it neither chooses nor scores targets; whether it explains is told by `of`.
        """
        self._reader, self._generation, self._mesh = reader, generation, mesh
        self._packs = 0 < reading.packed_rows < reading.k

        def packed(params: Params, batch: Batch, passages: Passages) -> Any:
            tokens_bkl = joined(reader, params, batch, passages, reading)
            found, fits = pack(tokens_bkl, reading.packed_rows)
            return found, jax.lax.with_sharding_constraint(fits, partitioning.replicated(mesh))

        def begin(
            params: Params, batch: Batch, passages: Passages, given: Packed | None = None
        ) -> Any:
            if given is None:
                inputs: Any = joined(reader, params, batch, passages, reading)
            else:
                inputs = given
            enc = encoded(reader, params, inputs, passages, reading)
            enc_bsd, mask_bs, copyable_bs = fid.fuse(reader, enc, inputs)
            writing = start_writing(
                reader,
                params["reader"],
                enc_bsd,
                mask_bs,
                generation,
                batch.prompt_tokens_bp,
                copyable_bs,
            )
            return (enc, inputs), writing.apart()

        def explain(params: Params, source: Any, tokens_bt: Array, prompt_bp: Any) -> Any:
            return explained((reader, params["reader"], *source), tokens_bt, prompt_bp)

        self._pack, self._begin = jax.jit(packed), jax.jit(begin)
        self._explain = jax.jit(explain, out_shardings=partitioning.replicated(mesh))
        self._writes: dict[Any, Any] = {}  # by the shardings of what changes

    def __call__(
        self,
        params: Params,
        batch: Batch,
        passages: Passages,
        first: Any = 0,
        explains: bool = False,
        on_tokens: OnTokens | None = None,
    ) -> Answers:
        """The answers; see `make_answer`.

        Args:
          on_tokens: called after each token, or with `lookup_tokens` after each call that brings
            the shortest unfinished text forward.
        """
        given = None
        if self._packs:
            packed, fits = self._pack(params, batch, passages)
            given = packed if bool(fits) else None
        source, (still, moving) = self._begin(params, batch, passages, given)
        write_on = self._write_on(moving)
        length = moving[1][1].shape[1]
        first = np.uint32(first)
        until = 1 if on_tokens else length
        while True:
            moving, told = write_on(params, still, moving, np.int32(until), first)
            if on_tokens is None:
                break
            tokens_bt, reached = jax.device_get(told[:2])
            on_tokens(tokens_bt)
            if reached == length:
                break
            until = int(reached) + 1
        tokens_bt, _, scores_b, calls_b = told
        evidence = None
        if explains:
            evidence = self._explain(params, source, tokens_bt, batch.prompt_tokens_bp)
        return Answers(tokens_bt=tokens_bt, scores_b=scores_b, evidence=evidence, calls_b=calls_b)

    def _write_on(self, moving: Any) -> Any:
        """The program for arrays placed like these; its results are placed alike."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, moving)
        leaves, tree = jax.tree.flatten(shardings)
        key = tree, tuple(leaves)
        if key not in self._writes:
            whole = partitioning.replicated(self._mesh)
            self._writes[key] = jax.jit(self._written, out_shardings=(shardings, whole))
        return self._writes[key]

    def _written(self, params: Params, still: Any, moving: Any, until: Array, first: Array) -> Any:
        config = self._generation
        writing = Writing.joined(still, moving)
        keys_b = sample_keys(config, len(writing.last_b), first)
        writing = write(self._reader, params["reader"], writing, config, keys_b, jnp.asarray(until))
        told = (writing.tokens(config), writing.reached, writing.scores_b, writing.calls_b)
        return writing.apart()[1], told


ToldAnswer = Callable[..., Answers]  # (params, batch, passages, first=0, on_tokens=None)


def answer_of(writer: Writer, explains: bool) -> ToldAnswer:
    """The answers of a writer, with evidence or without."""

    def answer(
        params: Params,
        batch: Batch,
        passages: Passages,
        first: Any = 0,
        on_tokens: OnTokens | None = None,
    ) -> Answers:
        return writer(params, batch, passages, first, explains, on_tokens)

    return answer


def whole_answer(
    reader: T5, generation: GenerationConfig, reading: Reading, mesh: Mesh
) -> ToldAnswer:
    """Answers that come at once, not token by token: choices and beam search."""
    made = make_answer(reader, generation, reading, mesh)

    def answer(
        params: Params,
        batch: Batch,
        passages: Passages,
        first: Any = 0,
        on_tokens: OnTokens | None = None,
    ) -> Answers:
        del on_tokens
        return made(params, batch, passages, first)

    return answer
