"""Entry point `python -m atlas_jax.import_index`: passages and saved indices of Meta's Atlas.

Passage files, text and infoboxes, become one corpus, which build_index then indexes:

    python -m atlas_jax.import_index --corpus=text-list-100-sec.jsonl --corpus=infobox.jsonl \\
      --gin.CorpusConfig.passages=work/passages.jsonl

A saved index (embeddings.N.pt, passages.N.pt) becomes corpus, store and index, without
embedding anything but a few passages, to see that model and index belong together:

    python -m atlas_jax.import_index --shards=saved_index \\
      --gin.ModelConfig.reader=work/atlas --gin.ModelConfig.retriever=work/atlas \\
      --gin.CorpusConfig.passages=work/passages.jsonl \\
      --gin.CorpusConfig.store=work/store --gin.CorpusConfig.index=work/index
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.conversion.indices import import_corpus, import_index
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Import what the flags name; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax import_index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--corpus", action="append", default=[], help="a passage file of Atlas; repeatable")
    add("--prefix_ids", action="store_true", help="put the file's name in front of each id")
    add("--shards", default="", help="folder of a saved index")
    add("--check", type=int, default=64, help="passages embedded anew; 0 = none")
    return launch(_run, parser, argv)


def _run(flags: argparse.Namespace) -> None:
    if bool(flags.corpus) == bool(flags.shards):
        raise UserError("give either --corpus (passage files) or --shards (a saved index)")
    if flags.corpus:
        spec = from_gin.corpus()
        config = spec.config
        done = import_corpus(tuple(flags.corpus), config, flags.prefix_ids, spec.rows)
        print(f"{config.passages}: {done.passages} passages")
    else:
        told = from_gin.index_run()
        done = import_index(flags.shards, told.models, told.corpus, flags.check)
        print(f"{told.corpus.config.index}: {done.passages} passages")


if __name__ == "__main__":
    sys.exit(main())
