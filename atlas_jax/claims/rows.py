"""The rows in groups, and the paper's claims, each of which compares two rows.

To add a row, write it here; `Bench` makes its steps.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from atlas_jax.claims.bench import (
    CLOSED_BOOK,
    FACTBOOK,
    SQUAD,
    Bench,
    MakeStep,
)
from atlas_jax.claims.pairs import PRETEXT_STEPS, Bindings
from atlas_jax.claims.steps import Step
from atlas_jax.claims.verdict import Expects
from atlas_jax.core.errors import UserError, nearest

ATLAS = "Atlas (arXiv 2208.03299)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      name: unique in its group.
      step: (bench, seed) -> the step whose scores are the row's.
      needs: folder of --data that it reads; '' = none.
      reads: name of the score in the step, if it is not the group's.
    """

    name: str
    step: MakeStep
    needs: str = ""
    reads: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the two rows that show it by the group's first metric."""

    text: str
    row: str
    against: str
    expects: Expects = "more"


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that are compared with each other.

    Attributes:
      name: for --only.
      title, source: the question, and its place in the paper.
      metrics: columns of the table; the first one is judged.
      note: differences from the paper.
    """

    name: str
    title: str
    source: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    note: str = ""

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)


QA = ("exact_match", "f1", "recall@5")
PRETEXTS = ("mlm", "lm", "section", "cloze")
DEPTHS = (1, 2, 5, 10, 20)
EDITIONS = ("2015", "2026")


def _questions(bench: Bench, seed: int) -> Step:
    return bench.questions(seed)


def _loss(name: str, gold_temperature: float) -> Row:
    temperatures: Bindings = {
        "DistillationConfig.gold_temperature": gold_temperature,
        "DistillationConfig.score_temperature": 0.0625,  # as in runs/demo_64shot.gin
    }
    return Row(name, lambda b, seed: b.questions(seed, temperatures, f"distillation/{name}.gin"))


def _depth(k: int) -> Row:
    return Row(f"k = {k}", lambda b, seed: b.evaluate(b.questions(seed), {"EvalConfig.k": k}))


def _pretext(task: str) -> Row:
    return Row(task, lambda b, seed: b.pretrained(seed, task))


def _edition_rows() -> tuple[Row, ...]:
    """Train edition x index edition x answer edition, and closed book."""
    rows = []
    for trained in EDITIONS:
        other = EDITIONS[1 - EDITIONS.index(trained)]
        for index in (*EDITIONS, None):

            def step(
                b: Bench, seed: int, trained: str = trained, other: str = other,
                index: str | None = index,
            ) -> Step:  # fmt: skip
                if index is None:
                    return b.edition(seed, trained, other, CLOSED_BOOK)
                made = b.edition(seed, trained, other)
                return made if index == trained else b.swapped(made, other, trained)

            place = f"index {index}" if index else "closed book"
            for answers in EDITIONS:
                own = answers == (index or trained)
                reads = {"exact_match": "changed_followed" if own else "changed_stayed"}
                name = f"trained {trained} · {place} · answers {answers}"
                rows.append(Row(name, step, FACTBOOK, reads))
    return tuple(rows)


def _edition_claims() -> tuple[Claim, ...]:
    claims = []
    for trained in EDITIONS:
        for answers in EDITIONS:
            other = EDITIONS[1 - EDITIONS.index(answers)]
            claims.append(
                Claim(
                    "The index decides: whichever edition a model was trained with, it gives an "
                    "edition's answers more often over that edition's index than over the other",
                    f"trained {trained} · index {answers} · answers {answers}",
                    f"trained {trained} · index {other} · answers {answers}",
                )
            )
    return tuple(claims)


GROUPS: tuple[Group, ...] = (
    Group(
        "retrieval",
        "Retrieval against closed book, 64 examples",
        f"{ATLAS}, sections 4.3 and 4.5.2",
        QA,
        (
            Row("Factbook · closed book", lambda b, seed: b.questions(seed, CLOSED_BOOK)),
            Row("Factbook · retrieval", _questions),
            Row("SQuAD · closed book", lambda b, seed: b.squad(seed, CLOSED_BOOK), SQUAD),
            Row("SQuAD · retrieval", lambda b, seed: b.squad(seed), SQUAD),
        ),
        (
            Claim("With few examples, a reader with passages answers far more questions than one "
                  "without",
                  "Factbook · retrieval", "Factbook · closed book"),
            Claim("On another corpus, too, a reader with passages answers far more questions",
                  "SQuAD · retrieval", "SQuAD · closed book"),
        ),
    ),
    Group(
        "pretext",
        f"{PRETEXT_STEPS} more steps of joint pretraining, by pretext task, then 64 examples",
        f"{ATLAS}, section 4.3, tables 1 and 2",
        QA,
        (Row("none", _questions), *map(_pretext, PRETEXTS)),
        (
            *(Claim("Few examples are enough because reader and retriever were pretrained jointly",
                    task, "none") for task in PRETEXTS),
            *(Claim("Of the three pretext tasks of the paper, masked language modelling is best",
                    "mlm", task) for task in ("lm", "section")),
        ),
        "The pair has been pretrained before, on pieces of text; the row `none` adds no steps. The "
        "other rows have batches of eight and targets of at most 48 tokens. Of the nano pair both "
        "towers are trained, and the index is refreshed once on the way and once at the end. The "
        "lesson comes after these steps.",
    ),
    Group(
        "losses",
        "Four losses for the retriever, and a fixed one",
        f"{ATLAS}, section 4.3, table 1",
        QA,
        (
            Row("fixed", lambda b, seed: b.questions(seed, {"RETRIEVER_TRAINING": "fixed"})),
            Row("pdist", _questions),
            _loss("adist", 0.01),
            _loss("emdr2", 1.0),
            _loss("loop", 0.2),
        ),
        (
            *(Claim("A retriever trained from the reader beats a fixed one", loss, "fixed")
              for loss in ("pdist", "adist", "emdr2", "loop")),
            *(Claim("The four losses come close to each other", loss, "pdist", "alike")
              for loss in ("adist", "emdr2", "loop")),
        ),
    ),
    Group(
        "k",
        "Passages read, after training with five (nano) or eight (mini)",
        "Fusion-in-Decoder (arXiv 2007.01282), section 4, on which Atlas builds",
        QA,
        tuple(map(_depth, DEPTHS)),
        (
            Claim("More passages give better answers", "k = 5", "k = 1"),
            Claim("More passages give better answers", "k = 20", "k = 1"),
            Claim("More passages than in training give still better answers", "k = 20", "k = 5"),
        ),
        "All rows share one training. The paper trains with the number of passages that it "
        "reads. The nano pair's lesson shows the reader one stretch of one passage at a time.",
    ),
    Group(
        "editions",
        "The index swapped between the editions of 2015 and 2026; facts that changed",
        f"{ATLAS}, section 5.2",
        ("exact_match",),
        _edition_rows(),
        _edition_claims(),
        "The questions are about facts whose answers differ between the two editions. A row has "
        "the share of questions that get the answer of the edition it names last. The lesson has "
        "the same edition as the training.",
    ),
    Group(
        "leaks",
        "Passages removed that share words with a test question",
        f"{ATLAS}, section 5.1",
        QA,
        (
            Row("Factbook · all passages", _questions),
            Row(
                "Factbook · none with 4 words of a question",
                lambda b, seed: b.without_leaks(
                    b.questions(seed), b.data.factbook("passages.jsonl"), 4
                ),
            ),
            Row("SQuAD · all passages", lambda b, seed: b.squad(seed), SQUAD),
            Row(
                "SQuAD · none with 8 words of a question",
                lambda b, seed: b.without_leaks(
                    b.squad(seed), b.data.of(f"{SQUAD}/passages.jsonl"), 8
                ),
                SQUAD,
            ),
        ),
        (
            Claim("Retrieval does not depend on leaked questions: removing them costs little",
                  "Factbook · none with 4 words of a question", "Factbook · all passages", "alike"),
            Claim("On another corpus, too, removing leaked questions costs little",
                  "SQuAD · none with 8 words of a question", "SQuAD · all passages", "alike"),
        ),
        "The paper does this to MMLU. A passage is removed if it has so many words in a row in "
        "common with one of the questions that are asked. No question about the Factbook has "
        "eight.",
    ),
    Group(
        "claims",
        "Claims: true, false or not said (in the manner of FEVER)",
        f"{ATLAS}, section 4.5.3",
        ("accuracy", "accuracy_supports", "accuracy_refutes", "recall@5"),
        (
            Row("64 claims · closed book", lambda b, seed: b.claims(seed, 64, CLOSED_BOOK),
                FACTBOOK),
            Row("15 claims · retrieval", lambda b, seed: b.claims(seed, 15), FACTBOOK),
            Row("64 claims · retrieval", lambda b, seed: b.claims(seed, 64), FACTBOOK),
        ),
        (
            Claim("More examples give better verdicts: 64 are better than 15",
                  "64 claims · retrieval", "15 claims · retrieval"),
            Claim("Verdicts depend on the passages found",
                  "64 claims · retrieval", "64 claims · closed book"),
        ),
        "The claims are about the Factbook. The wording of a claim gives away that something is "
        "not said. So only the true and the false claims show whether the model reads.",
    ),
    Group(
        "choice",
        "Multiple choice, and taking out the liking for a letter",
        f"{ATLAS}, section 4.5.1",
        ("accuracy", "recall@5"),
        (
            Row("closed book · all orders", lambda b, seed: b.choice(seed, CLOSED_BOOK),
                FACTBOOK, {"accuracy": "debiased_accuracy"}),
            Row("retrieval · one order", lambda b, seed: b.choice(seed), FACTBOOK),
            Row("retrieval · all orders", lambda b, seed: b.choice(seed), FACTBOOK,
                {"accuracy": "debiased_accuracy"}),
        ),
        (
            Claim("Averaging over orders of the options makes few-shot answers better",
                  "retrieval · all orders", "retrieval · one order"),
            Claim("Retrieval helps to choose",
                  "retrieval · all orders", "closed book · all orders"),
        ),
        "The paper does this to MMLU. The orders are the four rotations of the options, in "
        "training and evaluation.",
    ),
    Group(
        "robust",
        "Asked in other words, and over the corpus cut another way",
        "not in the paper",
        QA,
        (
            Row("as asked", _questions),
            Row("other words", lambda b, seed: b.reworded(b.questions(seed))),
            Row("another cut", lambda b, seed: b.cut_again(b.questions(seed))),
        ),
        (
            Claim("Words that no question file has are answered as well",
                  "other words", "as asked", "alike"),
            Claim("Passages of sixty words, whatever they cut in two, serve as well",
                  "another cut", "as asked", "alike"),
        ),
        "All rows share one training. Over the other cut only the questions are asked whose answer "
        "still stands in one passage.",
    ),
)  # fmt: skip


def selected(groups: Sequence[Group], only: str) -> list[tuple[Group, Row]]:
    """The rows of `only`: names of groups, or of rows as group/row, joined by commas; '' = all.

    Raises:
      UserError: a name that no group or row has.
    """
    rows = [(group, row) for group in groups for row in group.rows]
    if not only:
        return rows
    found: list[tuple[Group, Row]] = []
    for name in (part.strip() for part in only.split(",")):
        fits = [(g, r) for g, r in rows if name in (g.name, f"{g.name}/{r.name}")]
        if not fits:
            known = [*(g.name for g in groups), *(f"{g.name}/{r.name}" for g, r in rows)]
            raise UserError(f"--only {name}: no group or row is called so{nearest(name, known)}")
        found += [pair for pair in fits if pair not in found]
    return found
