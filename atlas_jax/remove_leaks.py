"""Entry point `python -m atlas_jax.remove_leaks`: a corpus without passages that leak answers.

    python -m atlas_jax.remove_leaks \\
      --gin.LeakConfig.passages=passages.jsonl --gin.LeakConfig.files=test.jsonl \\
      --gin.LeakConfig.output=clean.jsonl --gin.LeakConfig.report=leaks.jsonl

A passage leaks that shares eight words in a row (LeakConfig.ngram) with a question, or with an
answer, too (LeakConfig.overlap); the report says which, with which question, and whether an
accepted answer stands in it.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.answering.leaks import LeakConfig, remove_leaks
from atlas_jax.core.config import launch
from atlas_jax.core.jsonl import RowsConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Write what gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax remove_leaks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return launch(_run, parser, argv)


def _run(flags: argparse.Namespace) -> None:
    config = from_gin.told(LeakConfig)
    counts = remove_leaks(config, from_gin.task(config.task), from_gin.told(RowsConfig))
    print(json.dumps(dataclasses.asdict(counts)))


if __name__ == "__main__":
    sys.exit(main())
