"""Entry point `python -m atlas_jax.retrieve`: write the passages found for a file of questions.

    python -m atlas_jax.retrieve \\
      --gin.ModelConfig.reader=atlas_jax/checkpoints/nano \\
      --gin.ModelConfig.retriever=atlas_jax/checkpoints/nano \\
      --gin.CorpusConfig.store=work/store --gin.CorpusConfig.index=work/index \\
      --gin.RetrieveConfig.file=questions.jsonl --gin.RetrieveConfig.output=found.jsonl
"""

import argparse
import json
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.answering.inference import retrieve
from atlas_jax.core import multihost
from atlas_jax.core.config import launch
from atlas_jax.corpus.config import AS_OF_FLAG, add_as_of_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Run the retrieval that gin describes; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax retrieve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_as_of_flag(parser)
    return launch(_run, parser, argv, on_devices=True, text_flags=AS_OF_FLAG)


def _run(flags: argparse.Namespace) -> None:
    told = from_gin.retrieve_run()
    scores = retrieve(told)
    if multihost.is_first():
        print(json.dumps({"output": told.retrieve.output, **scores}))


if __name__ == "__main__":
    sys.exit(main())
