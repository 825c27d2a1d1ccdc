"""The settings of evaluation and retrieval."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import one_of, require
from atlas_jax.corpus.config import FROM_DTYPE, PASSAGE_SOURCES


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation.

    file: data file; "" = no evaluation during training (evaluate requires it).
    task, passages: as in TrainConfig.
    k: passages that the reader reads; 0 = as many as in training, StepConfig.k.
    batch_size: questions per compiled call; any number, which is filled up to divide over the mesh.
    generate: False = retrieve only (no answers are written, only retrieval is scored).
    recall_at: the k of recall@k. The largest one decides how many passages are searched. Values
        above the number of passages are left out.
    predictions: jsonl file for answers with their passages and scores; "" = none from
        evaluate (a training run always writes its own into model_dir).
    max_rows: evaluate only this many rows from the top of the file (0 = all).
    loss: also report `loss`, how well the targets are predicted. 'tokens': the mean over all
        target tokens of the file. 'batches': the mean of the batches' means, as Atlas reports it.
        'none': no loss, which saves a decoder pass.
    explain: also write into the predictions what each passage contributed to the answer. Costs two
        more decoder passes for each passage.
    """

    file: str = ""
    task: str = "qa"
    passages: str = "index"
    k: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    batch_size: bounds.BatchSize = 16
    generate: bool = True
    recall_at: tuple[bounds.Passages, ...] = (1, 5, 20)
    predictions: str = ""
    max_rows: bounds.AtLeast0 = 0
    loss: Literal["tokens", "batches", "none"] = "tokens"
    explain: bool = False

    def __post_init__(self) -> None:
        bounds.check(self)
        require(
            not self.explain or (self.generate and self.passages != "none"),
            "EvalConfig.explain",
            self.explain,
            "False where nothing is read (EvalConfig.generate, EvalConfig.passages)",
        )
        require(
            self.passages in PASSAGE_SOURCES,
            "EvalConfig.passages",
            self.passages,
            one_of(PASSAGE_SOURCES),
        )


@dataclass(frozen=True)
class RetrieveConfig:
    """What `retrieve` writes.

    file, task: the questions, and the task that makes the retriever's queries from them.
    output: jsonl file, one row per question with its passages and scores.
    k: passages per question.
    rerank: 0, or more than k: search that many and keep the k best by fresh embeddings. Useful
        for an int8 index. -1 = 2 k where CorpusConfig.dtype = 'auto' searches one, else 0.
    negatives: write up to that many `negatives` for each row, best first, to train a retriever
        with. They are found passages that are not gold and contain no accepted answer.
    batch_size: questions per compiled call; as in EvalConfig.
    """

    file: str
    output: str
    task: str = "qa"
    k: bounds.Passages = 20
    rerank: Annotated[int, Meta(ge=FROM_DTYPE, le=1 << 20)] = FROM_DTYPE
    negatives: bounds.AtLeast0 = 0
    batch_size: bounds.BatchSize = 64

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the binding."""
        bounds.check(self)
        require(bool(self.file), "RetrieveConfig.file", self.file, "a data file")
        require(bool(self.output), "RetrieveConfig.output", self.output, "a jsonl file")
        require(
            self.rerank in (0, FROM_DTYPE) or self.rerank > self.k,
            "RetrieveConfig.rerank",
            self.rerank,
            f"0, or more than RetrieveConfig.k = {self.k}",
        )
        require(self.negatives <= self.k, "RetrieveConfig.negatives", self.negatives, "from 0 to k")
