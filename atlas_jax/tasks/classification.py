"""The field's classification tasks, each declared by its fields, labels, template and words.

An encoder reads the template with its mask token, the reader with `<extra_id_0>`. Templates and
words are those of LM-BFF and LiST (LM-BFF: run_experiment.sh; LiST: src/run.py).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from atlas_jax.core.errors import UserError, require
from atlas_jax.core.formats import fill
from atlas_jax.tasks.labelled import LabelledTask
from atlas_jax.tasks.templates import READER_MASK, Prompt, Template, Verbaliser


@dataclasses.dataclass(frozen=True)
class ClassificationTask(LabelledTask):
    """Base of the tasks with a template. A subclass sets what `LabelledTask` says, and a template.

    Attributes:
      query_format: the template, see `tasks/templates.py`.
      retriever_format: '' = the fields with blanks between, without the template's words.
      answer_by: 'likelihood' compares the labels' words by the first token in which they differ.
      label_words: label -> a word or a list of words; None = the task's own. The reader writes
        the first of several, an encoder takes the mean of their logits.
    """

    answer_by: Literal["generation", "likelihood"] = "likelihood"
    label_words: Mapping[str, Any] | None = None

    choice_score: ClassVar[Literal["likelihood", "first_token"]] = "first_token"

    def __post_init__(self) -> None:
        """Refuse a wrong template, wrong words, and what `LabelledTask` refuses.

        Raises:
          UserError: names the binding.
        """
        super().__post_init__()
        require(
            len(set(self.spoken.values())) == len(self.spoken),
            f"{type(self).__name__}.label_words", self.label_words, "a word of its own for each",
        )  # fmt: skip

    @property
    def template(self) -> Template:
        """`query_format`, parsed."""
        return Template.parse(self.query_format, self.asks, f"{type(self).__name__}.query_format")

    @property
    def verbaliser(self) -> Verbaliser:
        """The words of each label."""
        given = self.words if self.label_words is None else self.label_words
        return Verbaliser.of(given, list(self.words), f"{type(self).__name__}.label_words")

    @property
    def labels(self) -> tuple[Any, ...]:
        """The labels in their order, which is that of a classifier's logits."""
        return tuple(self.words)

    @property
    def spoken(self) -> Mapping[Any, str]:
        """As in `LabelledTask`: of several words the first."""
        return self.verbaliser.first

    def check_query(self) -> None:
        """Refuse a wrong template."""
        assert self.template

    def query(self, asked: Mapping[str, str]) -> Prompt:
        """The template, with the reader's mask.

        Raises:
          UserError: it has marks of a trained prompt, which stands in front of a reader's input.
        """
        if self.template.soft:
            raise UserError(
                f"{self.template.binding} = {self.query_format!r}: {{soft}} is for encoders; the "
                "vectors of a reader's prompt (reader/DeltaConfig) stand in front of its input"
            )
        return self.template.filled(asked, READER_MASK)

    def retriever_query(self, asked: Mapping[str, str]) -> str:
        """As in `LabelledTask`."""
        parts: Sequence[str] = [f"{{{name}}}" for name in self.asks]
        return fill(self.retriever_format or " ".join(parts), **asked)


_REVIEW = "{text} It was {mask} ."
_SENTIMENT: Mapping[str | bool, str] = {"negative": "terrible", "positive": "great"}


@dataclasses.dataclass(frozen=True)
class SST2Task(ClassificationTask):
    """The sentiment of a sentence from a review (GLUE). Lines `{text, label, id?}`."""

    query_format: str = _REVIEW
    name: ClassVar[str] = "sst2"
    asks: ClassVar[tuple[str, ...]] = ("text",)
    label: ClassVar[str] = "label"
    words: ClassVar[Mapping[str | bool, str]] = _SENTIMENT


@dataclasses.dataclass(frozen=True)
class MRTask(SST2Task):
    """The sentiment of a sentence from a film review. Lines `{text, label, id?}`."""

    name: ClassVar[str] = "mr"


@dataclasses.dataclass(frozen=True)
class CRTask(SST2Task):
    """The sentiment of a customer's review. Lines `{text, label, id?}`."""

    name: ClassVar[str] = "cr"


@dataclasses.dataclass(frozen=True)
class MPQATask(SST2Task):
    """The polarity of a phrase. Lines `{text, label, id?}`."""

    name: ClassVar[str] = "mpqa"


@dataclasses.dataclass(frozen=True)
class SubjTask(SST2Task):
    """Whether a sentence gives an opinion. Lines `{text, label, id?}`."""

    query_format: str = "{text} This is {mask} ."
    name: ClassVar[str] = "subj"
    words: ClassVar[Mapping[str | bool, str]] = {
        "subjective": "subjective", "objective": "objective",
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TRECTask(SST2Task):
    """What a question asks for. Lines `{text, label, id?}`."""

    query_format: str = "{mask} : {text}"
    name: ClassVar[str] = "trec"
    words: ClassVar[Mapping[str | bool, str]] = {
        "DESC": "Description", "ENTY": "Entity", "ABBR": "Expression", "HUM": "Human",
        "LOC": "Location", "NUM": "Number",
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CoLATask(SST2Task):
    """Whether a sentence is English grammar (GLUE). Lines `{text, label, id?}`."""

    query_format: str = "{text} This is {mask} ."
    name: ClassVar[str] = "cola"
    words: ClassVar[Mapping[str | bool, str]] = {
        "unacceptable": "incorrect", "acceptable": "correct",
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MNLITask(ClassificationTask):
    """Whether one text follows from another (GLUE). Lines `{premise, hypothesis, label, id?}`."""

    query_format: str = "{premise!drop} ? {mask} , {hypothesis!lower}"
    name: ClassVar[str] = "mnli"
    asks: ClassVar[tuple[str, ...]] = ("premise", "hypothesis")
    label: ClassVar[str] = "label"
    words: ClassVar[Mapping[str | bool, str]] = {
        "contradiction": "No", "neutral": "Maybe", "entailment": "Yes",
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SNLITask(MNLITask):
    """Whether one caption follows from another. Lines `{premise, hypothesis, label, id?}`."""

    name: ClassVar[str] = "snli"


@dataclasses.dataclass(frozen=True)
class RTETask(MNLITask):
    """Whether one text follows from another (GLUE). Lines `{premise, hypothesis, label, id?}`."""

    name: ClassVar[str] = "rte"
    words: ClassVar[Mapping[str | bool, str]] = {"not_entailment": "No", "entailment": "Yes"}


@dataclasses.dataclass(frozen=True)
class QNLITask(RTETask):
    """Whether a sentence answers a question (GLUE). Lines `{question, sentence, label, id?}`."""

    query_format: str = "{question!drop} ? {mask} , {sentence!lower}"
    name: ClassVar[str] = "qnli"
    asks: ClassVar[tuple[str, ...]] = ("question", "sentence")


@dataclasses.dataclass(frozen=True)
class QQPTask(ClassificationTask):
    """Whether two questions ask the same (GLUE). Lines `{a, b, label, id?}`."""

    query_format: str = "{a} {mask} , {b!lower}"
    name: ClassVar[str] = "qqp"
    asks: ClassVar[tuple[str, ...]] = ("a", "b")
    label: ClassVar[str] = "label"
    words: ClassVar[Mapping[str | bool, str]] = {"not_duplicate": "No", "duplicate": "Yes"}


@dataclasses.dataclass(frozen=True)
class MRPCTask(QQPTask):
    """Whether two sentences say the same (GLUE). Lines `{a, b, label, id?}`."""

    name: ClassVar[str] = "mrpc"
    words: ClassVar[Mapping[str | bool, str]] = {"not_equivalent": "No", "equivalent": "Yes"}


CLASSIFICATION: tuple[type[ClassificationTask], ...] = (
    SST2Task, MRTask, CRTask, MPQATask, SubjTask, TRECTask, CoLATask, MNLITask, SNLITask, RTETask,
    QNLITask, QQPTask, MRPCTask,
)  # fmt: skip
