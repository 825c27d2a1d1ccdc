"""claims.md: the rows' scores, the paper's claims, and whether this run shows them."""

from collections import Counter
from collections.abc import Iterator, Sequence

from atlas_jax.claims.pairs import Pair
from atlas_jax.claims.results import Results
from atlas_jax.claims.rows import Claim, Group, Row
from atlas_jax.claims.verdict import (
    NOT_RUN,
    NOT_SHOWN,
    ONE_SEED,
    OPPOSITE,
    RULE,
    SHOWN,
    Summary,
    Verdict,
    judge,
)
from atlas_jax.demo.report import HEADINGS

HEAD = """\
# The paper's claims, shown with the {pair} pair

`make claims` writes this page from [{report}.json]({report}.json).

{about}

Every row learns from the same few examples. The paper's models have up to 11 billion parameters. A
rule says which of the paper's claims so small a model shows, and which it does not.

    make claims                               # what pip brings: the Factbook of 2026
    make claims ARGS="--data path/to/data"    # and all other rows
    make claims ARGS="--only losses --seeds 1 --questions 200 --minutes 30"

`--pair mini` and `--pair nano` choose the pair; without it, it is mini where MiniLM is installed.
Rows that are done are not run again. `work/claims/runs/` has a folder for each run, named by the
content of its configuration, checkpoint and data. {report}.json says which folders belong to a row.
The `config.gin` in a folder runs it again:

    atlas-jax train --gin_file=work/claims/runs/KEY/config.gin \\
      --gin.TrainConfig.model_dir=work/again

`--data DIR` names a folder with these files. They are plain, or have names ending in `.gz`. Their
lines are as in [Data formats](../data_formats.md).

| rows | files below DIR |
|---|---|
| editions | `factbook/passages_{{2015,2026}}.jsonl`, `factbook/temporal_{{train,test}}.jsonl` |
| claims | `factbook/passages_2026.jsonl`, `factbook/claims_{{train,test}}.jsonl` |
| choice | `factbook/passages_2026.jsonl`, `factbook/choice_{{train,test}}.jsonl` |
| SQuAD | `squad_open/{{passages,train,test}}.jsonl` |

The questions of `temporal` and `choice` say their `relation` and `entity`, so that a draw covers
all relations. The questions of SQuAD's `train` say the `bm25_rank` of their passage (1 = first).
With it 64 questions are drawn that make sense without their passage.

Each seed draws other training examples, in another order. All seeds are asked the same questions.
Scores are in percent: mean ± standard deviation over the seeds.
"""


def page(groups: Sequence[Group], results: Results, pair: Pair) -> str:
    """The whole page; the figure lies beside it."""
    head = HEAD.format(pair=pair.recipe.name, report=pair.report, about=pair.about)
    lines = [head, "**Rule.** " + RULE, "", *_setup(results), "", *_summary(groups, results)]
    lines += ["", f"![Scores of every row, a panel a group]({pair.report}.png)"]
    for group in groups:
        lines += ["", f"## {group.title}", "", f"{group.source}. `--only {group.name}`", ""]
        lines += [group.note, ""] if group.note else []
        lines += [*_scores(group, results), "", *_claims(group, results)]
    return "\n".join(lines) + "\n"


def judged(group: Group, claim: Claim, results: Results) -> Verdict:
    """The verdict on one claim."""
    row, against = (
        results.summary(group, group.row(name), group.metrics[0])
        for name in (claim.row, claim.against)
    )
    return judge(row, against, claim.expects, 100.0 / results.questions)


def _setup(results: Results) -> list[str]:
    found = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    seeds = sorted({seed for row in results.measured.values() for seed in row})
    return [
        f"**This run.** At most {results.questions} questions a row; seeds "
        f"{', '.join(map(str, seeds)) or 'none'}; checkpoint `{results.checkpoint}`; {found}."
    ]


def _summary(groups: Sequence[Group], results: Results) -> list[str]:
    """How many claims are shown, and which are not."""
    verdicts = [(g, c, judged(g, c, results).verdict) for g in groups for c in g.claims]
    counts = Counter(verdict for *_, verdict in verdicts)
    told = [f"{counts[v]} {v}" for v in (SHOWN, NOT_SHOWN, OPPOSITE, ONE_SEED, NOT_RUN)]
    lines = [f"**Verdicts.** Of {len(verdicts)} comparisons: {', '.join(told)}."]
    failing = [one for one in verdicts if one[2] in (NOT_SHOWN, OPPOSITE)]
    if failing:
        lines += ["", "In these comparisons the paper's effect does not appear at this scale:", ""]
        lines += [f"* {g.name}: {c.text} (`{c.row}` against `{c.against}`: {v})"
                  for g, c, v in failing]  # fmt: skip
    return lines


def _scores(group: Group, results: Results) -> Iterator[str]:
    names = [HEADINGS.get(metric, metric.replace("_", " ")) for metric in group.metrics]
    yield "| row | seeds | " + " | ".join(names) + " |"
    yield "|---" * (2 + len(names)) + "|"
    for row in group.rows:
        found = [results.summary(group, row, metric) for metric in group.metrics]
        if found[0] is None:
            cells = [f"| {row.name} | {_missing(row)}", *[""] * len(names)]
        else:
            cells = [f"| {row.name} | {found[0].seeds}", *map(_cell, found)]
        yield " | ".join(cells) + " |"


def _missing(row: Row) -> str:
    return f"{NOT_RUN} (needs `{row.needs}` in `--data`)" if row.needs else NOT_RUN


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    spread = "" if summary.spread is None else f" ± {summary.spread:.1f}"
    return f"{summary.mean:.1f}{spread}"


def _claims(group: Group, results: Results) -> Iterator[str]:
    yield "| the paper's claim | row | expected to be | difference | counts above | verdict |"
    yield "|---|---|---|---|---|---|"
    for claim in group.claims:
        found = judged(group, claim, results)
        relation = "more than" if claim.expects == "more" else "like"
        difference = "" if found.difference is None else f"{found.difference:+.1f}"
        threshold = "" if found.threshold is None else f"{found.threshold:.1f}"
        yield (
            f"| {claim.text} | {claim.row} | {relation} {claim.against} | {difference} "
            f"| {threshold} | **{found.verdict}** |"
        )
