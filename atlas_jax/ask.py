"""Entry point `python -m atlas_jax.ask`: type a question; see answer, passages, scores.

    python -m atlas_jax.ask "What is the capital of Peru?" \\
      --gin.ModelConfig.reader=work/run/final --gin.ModelConfig.retriever=work/run/final \\
      --gin.CorpusConfig.store=work/store --gin.CorpusConfig.index=work/index

Without a question it asks for one after the other, until an end of input (Ctrl-D). With
--explain the table says what each passage did for the answer.
"""

import argparse
import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atlas_jax import from_gin
from atlas_jax.answering.asked import check_typed
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.results import Answer
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError
from atlas_jax.corpus.config import AS_OF_FLAG, add_as_of_flag

# The fields of `answering.Evidence`, and the columns they become.
_EVIDENCE = {"attention": "attention", "alone": "alone", "left_out": "left out"}
_FORMATS = {"attention": ".3f", "alone": ".2f", "left_out": "+.2f"}
_LEGEND = (
    "attention: what the reader drew from the passage while writing (ADist's score)\n"
    "alone:     log-probability of the answer read from this passage alone\n"
    "left out:  what the answer's log-probability loses without this passage"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer what is asked; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax ask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", nargs="*", help="the question; none = ask for them")
    parser.add_argument(
        "--explain", action="store_true", help="say what each passage did for the answer"
    )
    add_as_of_flag(parser)
    return launch(_run, parser, argv, text_flags=AS_OF_FLAG)


def _run(flags: argparse.Namespace) -> None:
    question = " ".join(flags.question)
    if flags.question and not question.strip():
        raise UserError("the question is empty; type what you want to know")
    console = Console()
    told = from_gin.answer_run()
    check_typed(told)
    with console.status("loading"):
        atlas = Atlas(told)
    explain = told.evaluation.explain or flags.explain
    if flags.question:
        show(console, _answer(console, atlas, question, explain))
    else:
        _converse(console, atlas, explain)


def _converse(console: Console, atlas: Atlas, explain: bool) -> None:
    while True:
        try:
            question = console.input("[bold]question>[/bold] ")
        except EOFError:
            console.print()
            return
        try:
            show(console, _answer(console, atlas, question, explain))
        except UserError as error:
            console.print(Text(str(error), style="yellow"))


def _answer(console: Console, atlas: Atlas, question: str, explain: bool) -> Answer:
    with console.status("searching and reading"):
        return atlas.ask(question, explain=explain)


def show(console: Console, answer: Answer) -> None:
    """Print the answer, and the passages that were read as a table, the answer marked in them."""
    likelihood = f"  (log-probability {answer.log_probability:.2f})"
    line = Text("answer: ").append(answer.text or "(nothing)", style="bold green")
    console.print(line.append(likelihood, style="dim"))
    if not answer.passages:
        return
    first = answer.passages[0]
    explained = [name for name in _EVIDENCE if getattr(first, name) is not None]
    table = Table(show_lines=True)
    for name in ("rank", "score", *(_EVIDENCE[name] for name in explained)):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("passage", overflow="fold")
    for rank, passage in enumerate(answer.passages, start=1):
        text = Text(passage.text)
        if answer.text:
            text.highlight_words([answer.text], style="bold green", case_sensitive=False)
        heading = " - ".join(part for part in (passage.title, passage.section) if part)
        cell = Text(heading, style="bold").append(f"  [{passage.id}]\n", style="dim")
        table.add_row(
            str(rank),
            f"{passage.score:.3f}" if math.isfinite(passage.score) else "",
            *(f"{getattr(passage, name):{_FORMATS[name]}}" for name in explained),
            cell.append_text(text),
        )
    console.print(table)
    if explained:
        console.print(_LEGEND, style="dim", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
