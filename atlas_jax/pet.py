"""Entry point `python -m atlas_jax.pet`: PET, a classifier taught by prompted models.

    python -m atlas_jax.pet \\
      --gin_file=runs/pet.gin --gin_file=tasks/sst2.gin \\
      --gin.ENCODER=work/encoder --gin.MODEL_DIR=work/pet \\
      --gin.TRAIN_FILE=sst2/train_30shot.jsonl --gin.UNLABELLED_FILE=sst2/unlabelled.jsonl \\
      --gin.EVAL_FILE=sst2/dev.jsonl

For each pattern and seed a model learns the labelled lines; together they label the others, and a
classifier learns these.
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.core.config import launch
from atlas_jax.training.pet import pet
from atlas_jax.training.speed import PROFILE_FLAG, add_profile_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Run the PET that gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax pet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_profile_flag(parser)
    return launch(_run, parser, argv, on_devices=True, tuple_flags=PROFILE_FLAG)


def _run(flags: argparse.Namespace) -> None:
    told = from_gin.pet_run()
    pet(told)
    print(f"the classifier is in {told.train.model_dir}/final")


if __name__ == "__main__":
    sys.exit(main())
