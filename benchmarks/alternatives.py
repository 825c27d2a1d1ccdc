"""The same work in plain PyTorch/transformers; exact search also in faiss and NumPy."""

from collections.abc import Callable

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.workloads import (
    Sizes,
    Ways,
    passages_of_real_lengths,
    reader_inputs,
    search_arrays,
)

THREADS = 2
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
        ),
        add_pooling_layer=False,
    )


def _embed(retriever: BertModel, tokens: torch.Tensor) -> torch.Tensor:
    mask = (tokens > 0).long()
    states = retriever(input_ids=tokens, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    return (states * weights).sum(1) / weights.sum(1)


def train_step(sizes: Sizes) -> Callable[[], object]:
    """PDist step: read all passages, read each alone, distil, update both models."""
    torch.set_num_threads(THREADS)
    reader, retriever = _reader(sizes), _retriever(sizes)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5) for m in (reader, retriever)]
    inputs = reader_inputs(sizes)
    tokens = torch.from_numpy(inputs.tokens_bkl)
    targets = torch.from_numpy(inputs.targets_bt)
    query, passages = torch.from_numpy(inputs.query_br), torch.from_numpy(inputs.passages_bkm)
    b, k, length = tokens.shape

    def step() -> float:
        states = reader.encoder(input_ids=tokens.view(b * k, length)).last_hidden_state
        fused = states.view(b, k * length, -1)
        loss = reader(encoder_outputs=BaseModelOutput(fused), labels=targets).loss
        with torch.no_grad():
            repeated = targets.repeat_interleave(k, 0)
            logits = reader(encoder_outputs=BaseModelOutput(states), labels=repeated).logits
            logp = torch.log_softmax(logits, -1).gather(-1, repeated[..., None])[..., 0]
            gold = torch.softmax(logp.mean(-1).view(b, k) / 0.1, -1)
        q = _embed(retriever, query)
        p = _embed(retriever, passages.view(b * k, -1)).view(b, k, -1)
        scores = torch.einsum("be,bke->bk", q, p) / q.shape[-1] ** 0.5
        loss = loss + F.kl_div(torch.log_softmax(scores / 0.1, -1), gold, reduction="batchmean")
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    return step


def generate(sizes: Sizes) -> Callable[[], object]:
    """Encode k passages a query, fuse them, decode 16 tokens greedily with a cache."""
    torch.set_num_threads(THREADS)
    reader = _reader(sizes).eval()
    tokens = torch.from_numpy(reader_inputs(sizes).tokens_bkl)
    b, k, length = tokens.shape

    @torch.inference_mode()
    def run() -> torch.Tensor:
        states = reader.encoder(input_ids=tokens.view(b * k, length)).last_hidden_state
        fused = BaseModelOutput(states.view(b, k * length, -1))
        mask = torch.ones(b, k * length, dtype=torch.long)
        return reader.generate(
            encoder_outputs=fused,
            attention_mask=mask,
            min_new_tokens=sizes.target,
            max_new_tokens=sizes.target,
            do_sample=False,
            num_beams=1,
        )

    return run


def embed(sizes: Sizes) -> Callable[[], object]:
    """Embed passages sorted by length, each batch padded to its longest."""
    torch.set_num_threads(THREADS)
    retriever = _retriever(sizes).eval()
    tokens = torch.from_numpy(passages_of_real_lengths(sizes))
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
