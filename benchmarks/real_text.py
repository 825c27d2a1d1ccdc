"""Questions and passages of real text for the workloads of real lengths.

The Factbook comes from its pip package, SQuAD from a folder that is named. Texts are cut into
MiniLM's word pieces, or where that is not installed into the nano pair's. A question is read with
its own passage and others of the same title, as a search finds them; where these are too few, with
passages that stand behind them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import atlas_jax
from atlas_jax.core.jsonl import plain_or_gz, read_jsonl
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.demo import factbook_splits
from atlas_jax.demo.factbook import build, read_package
from atlas_jax.mini import minilm_folder
from benchmarks.workloads import Sizes, bert_gflop, read_gflop

CORPORA = ("factbook", "squad")
BATCHES = 4  # different ones, which the rounds take in turns
READ = ("step", "generate")  # workloads that read passages; the third is "embed"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A batch of questions with passages, as lists of token ids.

    Attributes:
      inputs_bk: question, passage and end token of each reader input.
      passages_bk: the passages for the retriever.
      questions_b: the questions for the retriever.
      targets_bt: target tokens, random and all of one length.
    """

    inputs_bk: list[list[list[int]]]
    passages_bk: list[list[list[int]]]
    questions_b: list[list[int]]
    targets_bt: np.ndarray


def batches(sizes: Sizes, corpus: str, seed: int = 0) -> list[Asked]:
    """Different batches of a corpus, the same for both sides."""
    passages, questions = _texts(corpus, sizes)
    rng = np.random.default_rng(seed)
    at = {passage["id"]: row for row, passage in enumerate(passages)}
    by_title: dict[str, list[int]] = {}
    for row, passage in enumerate(passages):
        by_title.setdefault(passage["title"], []).append(row)
    drawn = rng.choice(len(questions), BATCHES * sizes.real_batch, replace=False)
    read = []
    for number in drawn:
        gold = at[questions[number]["gold"][0]]
        own = [row for row in by_title[passages[gold]["title"]] if row != gold]
        behind = range(gold + 1, gold + 1 + sizes.real_passages)
        rows = [gold, *own, *(row % len(passages) for row in behind)]
        read.append(list(dict.fromkeys(rows))[: sizes.real_passages])
    every = sorted({row for rows in read for row in rows})
    tokenizer = _tokenizer()
    texts = [f"{passages[r]['title']} {passages[r]['text']}" for r in every]
    tokens = dict(zip(every, tokenizer.encode_batch(texts, add_special=False), strict=True))
    asked = [questions[number]["question"] for number in drawn]
    question_tokens = tokenizer.encode_batch(asked, add_special=False)
    made = []
    for first in range(0, len(drawn), sizes.real_batch):
        some = range(first, first + sizes.real_batch)
        made.append(
            Asked(
                [[_input(sizes, question_tokens[i], tokens[r]) for r in read[i]] for i in some],
                [[_cut(sizes, tokens[r]) for r in read[i]] for i in some],
                [_cut(sizes, question_tokens[i]) for i in some],
                rng.integers(
                    3, sizes.reader_vocab, (sizes.real_batch, sizes.target), dtype=np.int64
                ),
            )
        )
    return made


def passage_tokens(sizes: Sizes, corpus: str) -> list[list[int]]:
    """Passages for the retriever, spread evenly over the corpus."""
    passages, _ = _texts(corpus, sizes)
    every = max(1, len(passages) // sizes.embed_passages)
    some = passages[::every][: sizes.embed_passages]
    texts = [f"{passage['title']} {passage['text']}" for passage in some]
    return [_cut(sizes, ids) for ids in _tokenizer().encode_batch(texts, add_special=False)]


def padded(rows: Sequence[Sequence[int]], length: int = 0) -> np.ndarray:
    """Token ids [n, length], padded with 0 on the right; length 0 = that of the longest."""
    length = length or max(map(len, rows))
    out = np.zeros((len(rows), length), np.int64)
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = ids
    return out


def gflop(workload: str, sizes: Sizes) -> float:
    """The work of one round, the mean over the batches; see `workloads.gflop`."""
    what, _, corpus = workload.partition("_")
    if what == "embed":
        return bert_gflop(sizes, np.array([len(ids) for ids in passage_tokens(sizes, corpus)]))
    found = []
    for asked in batches(sizes, corpus):
        inputs, passages = (
            np.array([[len(ids) for ids in row] for row in rows])
            for rows in (asked.inputs_bk, asked.passages_bk)
        )
        questions = np.array([len(ids) for ids in asked.questions_b])
        found.append(read_gflop(what, sizes, inputs, passages, questions))
    return float(np.mean(found))


def lengths(sizes: Sizes, corpus: str) -> np.ndarray:
    """Tokens of all reader inputs."""
    return np.array(
        [len(ids) for asked in batches(sizes, corpus) for row in asked.inputs_bk for ids in row]
    )


def _input(sizes: Sizes, question: list[int], passage: list[int]) -> list[int]:
    return [*question, *passage][: sizes.limit - 1] + [1]


def _cut(sizes: Sizes, text: list[int]) -> list[int]:
    return [101, *text[: sizes.limit - 2], 102]  # [CLS] and [SEP] of a BERT


@functools.cache
def _texts(corpus: str, sizes: Sizes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Passages and questions, each question with the ids of its gold passages."""
    if corpus == "squad":
        folder = Path(sizes.squad)
        return _lines(folder / "passages.jsonl"), _lines(folder / "test.jsonl")
    splits = factbook_splits.load_splits()
    book = build(read_package(splits.titles), splits)
    return [passage.row() for passage in book.passages], list(book.test)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_jsonl(plain_or_gz(path) or path)]


def _tokenizer() -> Tokenizer:
    minilm = minilm_folder()
    if minilm is not None:
        return Tokenizer.from_file(minilm / "tokenizer.json")
    nano = Path(atlas_jax.__file__).parent / "checkpoints" / "nano"
    return Tokenizer.from_file(nano / "retriever_tokenizer.json")
