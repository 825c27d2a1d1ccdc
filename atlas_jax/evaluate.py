"""Entry point `python -m atlas_jax.evaluate`: answer a file of questions and score it.

    python -m atlas_jax.evaluate --gin_file=runs/evaluate.gin \\
      --gin.INITIAL_CHECKPOINT_PATH=work/run/final --gin.EVAL_FILE=test.jsonl \\
      --gin.STORE=work/store --gin.INDEX=work/index --gin.PREDICTIONS=predictions.jsonl

EvalConfig.passages = 'none' is closed book, 'file' reads the passages given in the file,
and EvalConfig.generate = False scores retrieval alone.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.answering.inference import evaluate
from atlas_jax.core import multihost
from atlas_jax.core.config import launch
from atlas_jax.corpus.config import AS_OF_FLAG, add_as_of_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation that gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_as_of_flag(parser)
    return launch(_run, parser, argv, on_devices=True, text_flags=AS_OF_FLAG)


def _run(flags: argparse.Namespace) -> None:
    told = from_gin.answer_run()
    done = evaluate(told)
    if multihost.is_first():
        print(json.dumps({"file": told.evaluation.file, "rows": len(done.found), **done.scores}))


if __name__ == "__main__":
    sys.exit(main())
