"""The same work in plain PyTorch/transformers; exact search also in faiss and NumPy.

Both models attend by PyTorch's `scaled_dot_product_attention`. Texts of real lengths are padded to
the longest of their batch.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.real_text import Asked, batches, padded, passage_tokens
from benchmarks.workloads import (
    Sizes,
    Ways,
    passages_of_real_lengths,
    reader_inputs,
    search_arrays,
)

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BLOCK = 16_384  # rows that are multiplied at once where all rows are not


def _reader(sizes: Sizes) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=sizes.reader_vocab,
            d_model=sizes.reader_width,
            d_kv=sizes.reader_width // sizes.reader_heads,
            d_ff=sizes.reader_mlp,
            num_layers=sizes.reader_layers,
            num_heads=sizes.reader_heads,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            attn_implementation="sdpa",
        )
    )


def _retriever(sizes: Sizes) -> BertModel:
    torch.manual_seed(1)
    return BertModel(
        BertConfig(
            vocab_size=sizes.retriever_vocab,
            hidden_size=sizes.retriever_width,
            num_hidden_layers=sizes.retriever_layers,
            num_attention_heads=sizes.retriever_heads,
            intermediate_size=sizes.retriever_mlp,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        ),
        add_pooling_layer=False,
    )


def _embed(retriever: BertModel, tokens: torch.Tensor) -> torch.Tensor:
    mask = (tokens > 0).long()
    states = retriever(input_ids=tokens, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    return (states * weights).sum(1) / weights.sum(1)


def _longest(rows: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(padded(rows))


def _masks(tokens: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Masks of the fused source [b, k l] and of each input [b k, l]; None without padding."""
    if bool((tokens > 0).all()):
        return None, None
    mask = (tokens > 0).long()
    return mask.flatten(1, 2), mask.flatten(0, 1)


def _step(
    reader: T5ForConditionalGeneration,
    retriever: BertModel,
    optimizers: list[torch.optim.Optimizer],
    tokens: torch.Tensor,
    targets: torch.Tensor,
    query: torch.Tensor,
    passages: torch.Tensor,
) -> float:
    """PDist step: read all passages, read each alone, distil, update both models.

    Args:
      tokens: reader inputs [b, k, l].
      targets: [b, t].
      query: [b, r].
      passages: [b k, m].
    """
    b, k, length = tokens.shape
    flat, mask, flat_mask = tokens.view(b * k, length), *_masks(tokens)
    states = reader.encoder(input_ids=flat, attention_mask=flat_mask).last_hidden_state
    fused = BaseModelOutput(states.view(b, k * length, -1))
    loss = reader(encoder_outputs=fused, attention_mask=mask, labels=targets).loss
    with torch.no_grad():
        repeated = targets.repeat_interleave(k, 0)
        alone = BaseModelOutput(states)
        logits = reader(encoder_outputs=alone, attention_mask=flat_mask, labels=repeated).logits
        logp = torch.log_softmax(logits, -1).gather(-1, repeated[..., None])[..., 0]
        gold = torch.softmax(logp.mean(-1).view(b, k) / 0.1, -1)
    q = _embed(retriever, query)
    p = _embed(retriever, passages).view(b, k, -1)
    scores = torch.einsum("be,bke->bk", q, p) / q.shape[-1] ** 0.5
    loss = loss + F.kl_div(torch.log_softmax(scores / 0.1, -1), gold, reduction="batchmean")
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def _trained(sizes: Sizes) -> tuple[T5ForConditionalGeneration, BertModel, list[Any]]:
    torch.set_num_threads(THREADS)
    reader, retriever = _reader(sizes), _retriever(sizes)
    return (
        reader,
        retriever,
        [torch.optim.AdamW(m.parameters(), lr=1e-5) for m in (reader, retriever)],
    )


def train_step(sizes: Sizes) -> Callable[[], object]:
    """PDist step of reader and both towers on given passages."""
    models, inputs = _trained(sizes), reader_inputs(sizes)
    tokens, targets, query = (
        torch.from_numpy(array) for array in (inputs.tokens_bkl, inputs.targets_bt, inputs.query_br)
    )
    passages = torch.from_numpy(inputs.passages_bkm).flatten(0, 1)
    return lambda: _step(*models, tokens, targets, query, passages)


def real_step(sizes: Sizes, corpus: str) -> Callable[[], object]:
    """The same on real texts; each round takes the next batch, padded to its longest."""
    models, made = _trained(sizes), []
    for asked in batches(sizes, corpus):
        targets, query = torch.from_numpy(asked.targets_bt), _longest(asked.questions_b)
        passages = _longest([ids for row in asked.passages_bk for ids in row])
        made.append((_inputs(asked), targets, query, passages))
    turns = itertools.cycle(made)
    return lambda: _step(*models, *next(turns))


def _inputs(asked: Asked) -> torch.Tensor:
    """Reader inputs [b, k, l], as long as the longest."""
    b, k = len(asked.inputs_bk), len(asked.inputs_bk[0])
    return _longest([ids for row in asked.inputs_bk for ids in row]).view(b, k, -1)


def _generate(
    reader: T5ForConditionalGeneration, sizes: Sizes, tokens: torch.Tensor
) -> torch.Tensor:
    """Encode k passages a query, fuse them, decode 16 tokens greedily with a cache."""
    b, k, length = tokens.shape
    flat, mask, flat_mask = tokens.view(b * k, length), *_masks(tokens)
    states = reader.encoder(input_ids=flat, attention_mask=flat_mask).last_hidden_state
    return reader.generate(
        encoder_outputs=BaseModelOutput(states.view(b, k * length, -1)),
        attention_mask=mask,
        min_new_tokens=sizes.target,
        max_new_tokens=sizes.target,
        do_sample=False,
        num_beams=1,
    )


def generate(sizes: Sizes) -> Callable[[], object]:
    """Answers to queries with k passages each."""
    torch.set_num_threads(THREADS)
    reader = _reader(sizes).eval()
    tokens = torch.from_numpy(reader_inputs(sizes).tokens_bkl)
    return torch.inference_mode()(lambda: _generate(reader, sizes, tokens))


def real_generate(sizes: Sizes, corpus: str) -> Callable[[], object]:
    """The same on real texts; each round takes the next batch, padded to its longest."""
    torch.set_num_threads(THREADS)
    reader = _reader(sizes).eval()
    turns = itertools.cycle([_inputs(asked) for asked in batches(sizes, corpus)])
    return torch.inference_mode()(lambda: _generate(reader, sizes, next(turns)))


def embed(sizes: Sizes) -> Callable[[], object]:
    """Embed passages sorted by length, each batch padded to its longest."""
    return _embedding(sizes, torch.from_numpy(passages_of_real_lengths(sizes)))


def real_embed(sizes: Sizes, corpus: str) -> Callable[[], object]:
    """The same with passages of real text."""
    return _embedding(sizes, _longest(passage_tokens(sizes, corpus)))


def _embedding(sizes: Sizes, tokens: torch.Tensor) -> Callable[[], object]:
    torch.set_num_threads(THREADS)
    retriever = _retriever(sizes).eval()
    order = torch.argsort((tokens > 0).sum(1))

    @torch.inference_mode()
    def run() -> list[torch.Tensor]:
        out = []
        for rows in order.split(sizes.embed_batch):
            chunk = tokens[rows]
            out.append(_embed(retriever, chunk[:, : int((chunk > 0).sum(1).max())]))
        return out

    return run


def search(sizes: Sizes, k: int) -> Ways:
    """Exact inner-product search: the usual ways of three libraries, each with its settings.

    faiss compares whole blocks of rows by a matrix product; its threads and the rows in a block
    are tried. PyTorch and NumPy multiply and select, all rows at once or in blocks of them.
    """
    embeddings, queries = search_arrays(sizes)
    return {
        **_faiss_ways(embeddings, queries, k),
        **_torch_ways(torch.from_numpy(embeddings), torch.from_numpy(queries), k),
        **_numpy_ways(embeddings, queries, k),
    }


def _faiss_ways(embeddings: np.ndarray, queries: np.ndarray, k: int) -> Ways:
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)

    def way(threads: int, block: int) -> Callable[[], object]:
        def run() -> object:
            faiss.omp_set_num_threads(threads)
            faiss.cvar.distance_compute_blas_database_bs = block
            return index.search(queries, k)

        return run

    usual = faiss.cvar.distance_compute_blas_database_bs
    return {
        f"faiss, {threads} threads, blocks of {block}": way(threads, block)
        for threads in (1, THREADS)
        for block in (usual, BLOCK)
    }


def _torch_ways(embeddings: torch.Tensor, queries: torch.Tensor, k: int) -> Ways:
    def search(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.topk(queries @ rows.T, min(k, len(rows)))

    def in_blocks() -> tuple[torch.Tensor, torch.Tensor]:
        scores, rows = zip(*(search(block) for block in embeddings.split(BLOCK)), strict=True)
        starts = torch.arange(0, len(embeddings), BLOCK)
        found = torch.cat([at + start for at, start in zip(rows, starts, strict=True)], 1)
        best, at = torch.topk(torch.cat(scores, 1), k)
        return best, found.gather(1, at)

    def way(threads: int, run: Callable[[], object]) -> Callable[[], object]:
        def threaded() -> object:
            torch.set_num_threads(threads)
            return run()

        return threaded

    return {
        f"PyTorch, {threads} threads, {name}": way(threads, run)
        for threads in (1, THREADS)
        for name, run in (("all rows", lambda: search(embeddings)), ("blocks", in_blocks))
    }


def _numpy_ways(embeddings: np.ndarray, queries: np.ndarray, k: int) -> Ways:
    def best(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.argpartition(scores, -k, axis=1)[:, -k:]
        chosen = np.take_along_axis(scores, at, 1)
        order = np.argsort(-chosen, axis=1)
        return np.take_along_axis(chosen, order, 1), np.take_along_axis(at, order, 1)

    def in_blocks() -> tuple[np.ndarray, np.ndarray]:
        scores, rows = [], []
        for start in range(0, len(embeddings), BLOCK):
            block = queries @ embeddings[start : start + BLOCK].T
            found, at = best(block) if block.shape[1] > k else (block, np.arange(block.shape[1]))
            scores.append(found)
            rows.append(np.broadcast_to(at + start, found.shape))
        chosen, at = best(np.concatenate(scores, 1))
        return chosen, np.take_along_axis(np.concatenate(rows, 1), at, 1)

    return {"NumPy, all rows": lambda: best(queries @ embeddings.T), "NumPy, blocks": in_blocks}
