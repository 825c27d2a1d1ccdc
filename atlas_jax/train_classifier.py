"""Entry point `python -m atlas_jax.train_classifier`: an encoder learns to classify texts.

    python -m atlas_jax.train_classifier \\
      --gin_file=runs/classify.gin --gin_file=tasks/rte.gin \\
      --gin.ENCODER=work/encoder --gin.MODEL_DIR=work/rte \\
      --gin.TRAIN_FILE=rte/train.jsonl --gin.EVAL_FILE=rte/dev.jsonl

By the template and label words of a task, by a classifier on the encoder, by a linear probe or by
the commonest label (`ClassifierTrainConfig.method`).
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.core import multihost
from atlas_jax.core.config import launch
from atlas_jax.models.folder import read_about
from atlas_jax.training.classifier_trainer import train_classifier
from atlas_jax.training.config import FINAL
from atlas_jax.training.speed import PROFILE_FLAG, add_profile_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training that gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax train_classifier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_profile_flag(parser)
    return launch(_run, parser, argv, on_devices=True, tuple_flags=PROFILE_FLAG)


def _run(flags: argparse.Namespace) -> None:
    told = from_gin.classifier_run()
    train_classifier(told)
    if told.train.steps and multihost.is_first():
        folder = f"{told.train.model_dir}/{FINAL}"
        about = read_about(folder)
        counts = f"{about['trained']:,} of {about['parameters']:,} parameters were trained"
        print(f"the encoder is in {folder}; {counts}")


if __name__ == "__main__":
    sys.exit(main())
