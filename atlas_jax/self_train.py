"""Entry point `python -m atlas_jax.self_train`: LiST, from few labelled and many other texts.

    python -m atlas_jax.self_train \\
      --gin_file=runs/list_30shot.gin --gin_file=tasks/sst2.gin \\
      --gin.ENCODER=work/encoder --gin.MODEL_DIR=work/list \\
      --gin.TRAIN_FILE=sst2/train_30shot.jsonl --gin.UNLABELLED_FILE=sst2/unlabelled.jsonl \\
      --gin.EVAL_FILE=sst2/dev.jsonl

A run that was killed goes on where it was, inside a round, too.
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.core.config import launch
from atlas_jax.training.self_training import self_train
from atlas_jax.training.speed import PROFILE_FLAG, add_profile_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Run the self-training that gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax self_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_profile_flag(parser)
    return launch(_run, parser, argv, on_devices=True, tuple_flags=PROFILE_FLAG)


def _run(flags: argparse.Namespace) -> None:
    told = from_gin.self_training_run()
    self_train(told)
    print(f"the last student is in {told.train.model_dir}/final")


if __name__ == "__main__":
    sys.exit(main())
