"""Entry point `python -m atlas_jax.pretrain_encoder`: pretrain an encoder on text.

    python -m atlas_jax.pretrain_encoder --gin_file=runs/albert_small.gin \\
      --gin.TOKENIZER=tokenizers/retriever.json --gin.PASSAGES=passages.jsonl \\
      --gin.MODEL_DIR=work/albert

    python -m atlas_jax.pretrain_encoder --gin_file=runs/pretrain_encoder.gin \\
      --gin.ENCODER=work/minilm --gin.PASSAGES=passages.jsonl --gin.MODEL_DIR=work/head \\
      --gin.TRAIN="['mlm/*']"                     # a fresh MLM head alone

Masked tokens (single ones, whole words, n-grams, spans), NSP, SOP and ELECTRA. What remains is a
model folder with the encoder and its heads, see docs/encoders.md.
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.core.config import launch
from atlas_jax.training.encoder_trainer import pretrain_encoder
from atlas_jax.training.speed import PROFILE_FLAG, add_profile_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pretraining that gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax pretrain_encoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_profile_flag(parser)
    return launch(_run, parser, argv, on_devices=True, tuple_flags=PROFILE_FLAG)


def _run(flags: argparse.Namespace) -> None:
    told = from_gin.pretrain_run()
    pretrain_encoder(told)
    print(f"the encoder is in {told.train.model_dir}/final")


if __name__ == "__main__":
    sys.exit(main())
