"""Entry point `python -m atlas_jax.build_index`: turn a corpus into a store and an index.

    python -m atlas_jax.build_index \\
      --gin.ModelConfig.reader=atlas_jax/checkpoints/nano \\
      --gin.ModelConfig.retriever=atlas_jax/checkpoints/nano \\
      --gin.CorpusConfig.passages=passages.jsonl \\
      --gin.CorpusConfig.store=work/store --gin.CorpusConfig.index=work/index

Store and index each appear whole or not at all. What is there already and fits is kept.
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.answering.inference import build_index
from atlas_jax.core import multihost
from atlas_jax.core.config import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Build what gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax build_index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return launch(_run, parser, argv, on_devices=True)


def _run(flags: argparse.Namespace) -> None:
    told = from_gin.index_run()
    count, built = build_index(told)
    if multihost.is_first():
        print(f"{told.corpus.config.index}: {'' if built else 'already there, '}{count} passages")


if __name__ == "__main__":
    sys.exit(main())
