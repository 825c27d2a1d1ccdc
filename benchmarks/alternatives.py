"""The same work in plain PyTorch/transformers, and search in faiss."""

from collections.abc import Callable

import faiss
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.workloads import (
    Sizes,
    passages_of_real_lengths,
    reader_inputs,
    search_arrays,
)

THREADS = 2


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


def search(sizes: Sizes, k: int) -> Callable[[], object]:
    """Exact inner-product search with faiss."""
    faiss.omp_set_num_threads(THREADS)
    embeddings, queries = search_arrays(sizes)
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)
    return lambda: index.search(queries, k)
