"""The two shipped pairs, and how the rows teach each."""

import dataclasses
from collections.abc import Mapping

from atlas_jax.claims.steps import Value
from atlas_jax.demo.recipes import MINI as MINI_RECIPE
from atlas_jax.demo.recipes import NANO as NANO_RECIPE
from atlas_jax.demo.recipes import Recipe

Bindings = dict[str, Value]
PRETEXT_STEPS = 40

# The rates of the recipe table. Batch and length are small enough for a minute on a laptop.
_PRETRAINING: Bindings = {
    "TRAIN_STEPS": PRETEXT_STEPS,
    "WARMUP_STEPS": 4,
    "READER_LEARNING_RATE": 1e-4,
    "RETRIEVER_LEARNING_RATE": 1e-5,
    "EVAL_FILE": "",
}
# A passage in and a passage out would take minutes.
_PRETEXT_LENGTHS: dict[str, Bindings] = {
    "mlm": {"QUERY_LENGTH": 128, "TARGET_LENGTH": 48},
    "lm": {"QUERY_LENGTH": 96, "TARGET_LENGTH": 48},
    "section": {"QUERY_LENGTH": 64, "TARGET_LENGTH": 48},
    "cloze": {"QUERY_LENGTH": 64},
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """How the rows begin with one pair.

    Attributes:
      recipe: its corpus and its lesson, as in the demo.
      lesson: bindings of the lesson.
      task: gin file of runs/ that trains on the questions of a row.
      taught: bindings of this training after a lesson.
      prose: bindings for a corpus of prose, not lists of fields.
      closed_lesson: whether closed-book rows, too, come after the lesson.
      joint: whether both towers are trained in pretraining, so that the index is made again.
      lengths: pretext task -> bindings.
      short: bindings of tasks whose queries are as short as questions, but which no folder tells.
      choice: bindings of multiple choice.
      report: name of table, figure and JSON, without its ending.
      about: text of the report: what the rows begin with, and how they are taught.
    """

    recipe: Recipe
    lesson: Bindings
    task: str
    taught: Bindings
    prose: Bindings
    closed_lesson: bool
    joint: bool
    lengths: Mapping[str, Bindings]
    short: Bindings
    choice: Bindings
    report: str
    about: str

    def pretraining(self, task: str) -> Bindings:
        """Bindings of some more steps with a pretext task."""
        towers: Bindings = {"RETRIEVER_TRAINING": "query_side"}
        if self.joint:
            towers = {"RETRIEVER_TRAINING": "joint", "REFRESH": str(PRETEXT_STEPS // 2)}
        return {**_PRETRAINING, **towers, **self.lengths[task]}


def _wide(own: Bindings) -> Bindings:
    """Lengths of a task for the mini reader, which reads 190 tokens of a passage."""
    query = own["QUERY_LENGTH"]
    assert isinstance(query, int)
    return {**own, "TEXT_LENGTH": query + 194}


NANO = Pair(
    recipe=NANO_RECIPE,
    # A quarter of the demo's lesson, since twenty readers are taught: one for each seed and each
    # beginning.
    lesson={"TRAIN_STEPS": 180},
    task="demo_64shot",
    # As in runs/demo_task.gin after a lesson, but with all kinds of retriever training. The reader
    # takes small steps and answers from one passage (`k` is larger).
    taught={"READER_LEARNING_RATE": 1e-4, "EvalConfig.k": 1},
    # The retriever reads the text itself.
    prose={
        "PASSAGE_LENGTH": 192,
        "RETRIEVER_LENGTH": 128,
        "StoreConfig.retriever_format": "{title} {text}",
    },
    closed_lesson=True,
    joint=True,
    lengths=_PRETEXT_LENGTHS,
    short={},
    choice={"QUERY_LENGTH": 96},
    report="claims_nano",
    about="""\
Each row starts from the [nano pair](../nano.md), which has a few million parameters.

In the rows with 64 questions about the Factbook's countries, these questions first teach the reader
in a lesson (`runs/demo_read.gin` for 180 steps instead of 720). Without it the reader copies, but
does not know which value a question means. The lesson needs labels, so the rows of SQuAD, claims
and choice have no lesson.

The retriever learns from the reader alone, in 60 steps with five passages. The answers are read
from the first passage, except in the rows of `k`.""",
)
MINI = Pair(
    recipe=MINI_RECIPE,
    lesson={},
    task="mini_64shot",
    # A lesson has asked these questions already.
    taught={"TRAIN_STEPS": 40},
    prose={},
    closed_lesson=False,
    joint=False,
    lengths={task: {**_wide(own), "K": 4} for task, own in _PRETEXT_LENGTHS.items()},
    short={"QUERY_LENGTH": 32},
    choice=_wide({"QUERY_LENGTH": 96}),
    report="claims",
    about="""\
Each row starts from the [mini pair](../mini.md), which has 31 million parameters: MiniLM finds the
passages, and a reader built on it reads eight of them together.

In the rows with 64 questions about the Factbook's countries, these questions first teach the reader
in a lesson (`runs/mini_titles.gin`, 100 steps), which asks them of other countries too. The lesson
needs a corpus of facts, so the rows of SQuAD, claims and choice have no lesson.

No passage is told anywhere. The retriever's query tower learns from what the reader makes of the
passages, in 40 steps after a lesson (`runs/mini_titles_found.gin`) and in 80 without one
(`runs/mini_64shot.gin`); the passages' embeddings stay as MiniLM gives them, in pretraining, too.
The closed-book rows have no lesson, since theirs would show passages.""",
)
PAIRS = {pair.recipe.name: pair for pair in (MINI, NANO)}
