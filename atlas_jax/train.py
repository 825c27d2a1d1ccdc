"""Entry point `python -m atlas_jax.train`: train reader and retriever, retrieval in the loop.

    python -m atlas_jax.train \\
      --gin_file=models/nano.gin --gin_file=runs/finetune_qa.gin \\
      --gin.MODEL_DIR=work/run --gin.INITIAL_CHECKPOINT_PATH=atlas_jax/checkpoints/nano \\
      --gin.TRAIN_FILE=train.jsonl --gin.STORE=work/store --gin.TRAIN_STEPS=30

The same command goes on with a run that was interrupted. The trained models are in
MODEL_DIR/final.
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.core.config import launch
from atlas_jax.corpus.config import AS_OF_FLAG, add_as_of_flag
from atlas_jax.training.config import FINAL
from atlas_jax.training.speed import PROFILE_FLAG, add_profile_flag
from atlas_jax.training.trainer import train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training that gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_profile_flag(parser)
    add_as_of_flag(parser)
    return launch(
        _run, parser, argv, on_devices=True, tuple_flags=PROFILE_FLAG, text_flags=AS_OF_FLAG
    )


def _run(flags: argparse.Namespace) -> None:
    told = from_gin.train_run()
    state = train(told)
    skipped = int(state.skipped)
    if skipped:
        print(f"{skipped} of {int(state.step)} steps were skipped: loss or gradient not finite")
    print(f"the trained models are in {told.train.model_dir}/{FINAL}")


if __name__ == "__main__":
    sys.exit(main())
