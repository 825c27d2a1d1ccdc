"""Entry point `python -m atlas_jax.train_retriever`: train the retriever by contrast.

    python -m atlas_jax.train_retriever \\
      --gin_file=models/nano.gin \\
      --gin.ModelConfig.reader_tokenizer=tokenizers/reader.json \\
      --gin.ModelConfig.retriever_tokenizer=tokenizers/retriever.json \\
      --gin.CorpusConfig.passages=passages.jsonl --gin.CorpusConfig.store=work/store \\
      --gin.RetrieverTrainConfig.model_dir=work/retriever \\
      --gin.RetrieverTrainConfig.total_steps=1000

From text alone; `runs/retriever_finetune.gin` trains it on questions with gold passages, and
hard negatives if there are any.
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.core.config import launch
from atlas_jax.training.retriever_trainer import train_retriever
from atlas_jax.training.speed import PROFILE_FLAG, add_profile_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pretraining that gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax train_retriever",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_profile_flag(parser)
    return launch(_run, parser, argv, on_devices=True, tuple_flags=PROFILE_FLAG)


def _run(flags: argparse.Namespace) -> None:
    told = from_gin.retriever_run()
    train_retriever(told)
    print(f"the retriever is in {told.train.model_dir}/final")


if __name__ == "__main__":
    sys.exit(main())
