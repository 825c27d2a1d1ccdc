"""Entry point `python -m atlas_jax.train_tokenizer`: make the two tokenizers from text.

    python -m atlas_jax.train_tokenizer \\
      --gin.train_tokenizers.passages_path=passages.jsonl.gz \\
      --gin.train_tokenizers.out_dir=tokenizers \\
      --gin.train_tokenizers.vocab_size=8192
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.core.config import launch
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.datasets.tokenizer_training import READER_FILE, RETRIEVER_FILE, train_tokenizers


def main(argv: Sequence[str] | None = None) -> int:
    """Train the tokenizers that gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax train_tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return launch(_run, parser, argv)


def _run(flags: argparse.Namespace) -> None:
    made = from_gin.called(train_tokenizers, rows=from_gin.told(RowsConfig))
    for name, tokenizer in zip((READER_FILE, RETRIEVER_FILE), made, strict=True):
        print(f"{name}: {tokenizer.vocab_size} ids, hash {tokenizer.content_hash[:12]}")


if __name__ == "__main__":
    sys.exit(main())
