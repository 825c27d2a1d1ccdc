"""Entry point `python -m atlas_jax.convert`: any checkpoint in, any checkpoint out.

    python -m atlas_jax.convert --from=hf --to=atlas-jax \\
      --input=t5-base-lm-adapt --input=contriever --output=work/base

    python -m atlas_jax.convert --from=atlas-jax --to=hf --part=reader \\
      --input=work/run/final --output=work/reader_hf

    python -m atlas_jax.convert --from=hf --to=atlas-jax --part=encoder \\
      --input=albert-base-v2 --output=work/albert      # with its MLM and sentence heads

Formats: hf (a folder of Hugging Face: T5, BERT, Contriever, sentence-transformers, ALBERT,
RoBERTa, ELECTRA), t5x (a folder checkpoint_<step>), meta-atlas (model.pth.tar), atlas-jax (a
model folder). What was written is read back and compared, and certificate.json in the output
says what became of every tensor. Fields that a format does not tell can be bound:
--gin.RetrieverConfig.pooling=cls
"""

import argparse
import re
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.conversion.convert import KINDS, SOURCES, TARGETS, Conversion, convert
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError
from atlas_jax.encoders.model import EncoderModelConfig
from atlas_jax.interop.meta_atlas import READER_MODEL_TYPES
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.retriever.config import RetrieverConfig

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert what the flags say; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, choices=SOURCES)
    add("--to", dest="target", required=True, choices=TARGETS)
    add("--input", action="append", required=True, help="file or folder; hf takes several")
    add("--output", required=True, help="a folder that does not exist yet")
    add("--part", default="", choices=("", *KINDS),
        help="this model alone; encoder: a BERT or a relative of it, with its heads")  # fmt: skip
    add("--dtype", default="keep", choices=("keep", "float32", "bfloat16"))
    add("--reader_tokenizer", default="", help="tokenizer.json, spiece.model or a folder")
    add("--retriever_tokenizer", default="", help="tokenizer.json, vocab.txt or a folder")
    add("--encoder_tokenizer", default="", help="as --retriever_tokenizer, for --part=encoder")
    add("--allow_unused", action="append", default=[], metavar="NAME", help="a pattern: pooler.*")
    add("--allow_missing", action="append", default=[], metavar="NAME", help="a pattern")
    add("--allow_spare_rows", action="store_true", help="embedding rows that no token has")
    add("--no_optimizer", action="store_true", help="leave optimiser state behind")
    add("--scan_layers", action="store_true", help="T5X's scanned layout (--to=t5x)")
    add("--max_shard_size", default="5GB", help="of one file (--to=hf)")
    add("--num_heads", type=int, default=0, help="of the retriever (--from=meta-atlas)")
    add("--reader_model_type", default="", choices=("", *READER_MODEL_TYPES), metavar="TYPE",
        help="such as google/t5-xl-lm-adapt, where a checkpoint's own option is wrong")  # fmt: skip
    add("--verify", action="store_true", help="run both frameworks, compare every layer")
    return launch(_run, parser, argv)


def _run(flags: argparse.Namespace) -> None:
    tokenizers = {part: getattr(flags, f"{part}_tokenizer") for part in KINDS}
    if flags.scan_layers and flags.target != "t5x":
        raise UserError(f"--scan_layers is for --to=t5x; --to={flags.target} stores layers apart")
    convert(
        Conversion(
            source=flags.source,
            target=flags.target,
            inputs=tuple(flags.input),
            output=flags.output,
            part=flags.part,
            dtype=flags.dtype,
            tokenizers={part: path for part, path in tokenizers.items() if path},
            allow_unused=tuple(flags.allow_unused),
            allow_missing=tuple(flags.allow_missing),
            allow_spare_rows=flags.allow_spare_rows,
            optimizer=not flags.no_optimizer,
            scan_layers=flags.scan_layers,
            max_shard_bytes=_bytes(flags.max_shard_size),
            verify=flags.verify,
            fields={
                "reader": from_gin.fields_told(ReaderConfig),
                "retriever": from_gin.fields_told(RetrieverConfig),
                "encoder": from_gin.fields_told(EncoderModelConfig),
            },
            num_heads=flags.num_heads,
            reader_model_type=flags.reader_model_type,
        )
    )


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]B)?", size.upper())
    if not found or int(found[1]) == 0:
        raise UserError(f"--max_shard_size={size}: expected something like 500MB or 5GB")
    return int(found[1]) * _UNITS[found[2] or ""]


if __name__ == "__main__":
    sys.exit(main())
