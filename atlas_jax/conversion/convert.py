"""From any checkpoint to any checkpoint, with a certificate.

Reading gives `Part`s: one model's tensors under this project's names, none of them read
yet. They are checked against the model that their config describes, written one by one
into a temporary folder, read back from it and compared; only then does the folder take
its name. So a conversion that fails at any point leaves nothing behind.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta

from atlas_jax.conversion import texts
from atlas_jax.conversion.expected import of_atlas, of_texts
from atlas_jax.conversion.verification import Verifier
from atlas_jax.core.errors import UserError
from atlas_jax.core.parts import PARTS
from atlas_jax.core.paths import check_output_folder, is_remote, read_text
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.whole import whole_folder
from atlas_jax.encoders.model import EncoderModel, EncoderModelConfig
from atlas_jax.encoders.registry import NamedEncoderConfig, told_options
from atlas_jax.interop import certificate, huggingface, meta_atlas, t5x
from atlas_jax.interop.safetensors_files import read_file, read_metadata, write_file
from atlas_jax.interop.tensors import FLOATS, Part, cast, finite, recorded
from atlas_jax.interop.vocabularies import find_tokenizer
from atlas_jax.models.config import MODEL_CONFIGS, whole_config
from atlas_jax.models.expects import NOTHING, Expects
from atlas_jax.models.folder import check_depth, load_expects, open_model
from atlas_jax.models.folder_config import write_folder_config
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder

SOURCES = ("hf", "t5x", "meta-atlas", "atlas-jax")
TARGETS = ("hf", "t5x", "atlas-jax")
KINDS = (*PARTS, "encoder")
OPTIONS_FILE = "options.gin"
_SPARE_ROWS = 256  # T5 has 28, and padding to a multiple of 128 adds at most 127


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The settings of one conversion.

    Attributes:
      source, target: formats, from `SOURCES` and `TARGETS`.
      inputs: files or folders to read; several folders for hf (a reader and a retriever).
      output: a folder that does not exist yet.
      part: convert only this model; "" = all. A BERT or a relative of it in Hugging Face's form
        is read as a retriever, as an 'encoder' with its heads if that is asked for here.
      dtype: 'keep', or a type that parameters are rounded to.
      tokenizers: part -> file or folder, if the input has none or another one is wanted.
      allow_unused, allow_missing: patterns of names in the source.
      allow_spare_rows: an embedding may have far more rows than the tokenizer has ids.
      optimizer: convert the optimiser state too, if both formats have it.
      scan_layers: write T5X's scanned layout.
      max_shard_bytes: of one file of an hf folder.
      verify: run both frameworks and compare layer by layer.
      fields: part -> fields of its config that override the input's.
      num_heads: of the retriever, if the format does not tell it (Meta's); 0 = 64 channels each.
      reader_model_type: for a checkpoint of Meta's whose option contradicts its arrays.
    """

    source: str
    target: str
    inputs: tuple[str, ...]
    output: str
    part: str = ""
    dtype: str = "keep"
    tokenizers: dict[str, str] = dataclasses.field(default_factory=dict)
    allow_unused: tuple[str, ...] = ()
    allow_missing: tuple[str, ...] = ()
    allow_spare_rows: bool = False
    optimizer: bool = True
    scan_layers: bool = False
    max_shard_bytes: int = 5 << 30
    verify: bool = False
    fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    num_heads: int = 0
    reader_model_type: str = ""


@dataclasses.dataclass
class _Read:
    """What a source holds: parts, the step (where it is known), options as gin, Meta's heads.

    Attributes:
      remarks: what is told of each part's texts.
      expects: what the models expect to read, as far as the source tells.
    """

    parts: dict[str, Part]
    gin: str = ""
    step: int = 0
    heads: meta_atlas.Heads | None = None
    remarks: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    expects: Expects = NOTHING


def convert(job: Conversion, say: Callable[[str], None] = print) -> list[certificate.Certificate]:
    """Convert, certify, and print a report.

    Raises:
      UserError: names the file, tensor, key or flag at fault; then there is no output.
    """
    if is_remote(job.output):
        raise UserError(f"--output={job.output}: expected a folder on a disk; copy it afterwards")
    output = check_output_folder(job.output, "--output")
    if output.exists():
        raise UserError(f"{output} exists already; remove it or choose another --output")
    read = _read(job)
    if job.part:
        if job.part not in read.parts:
            raise UserError(f"the input holds no {job.part}, but {', '.join(read.parts)}")
        read.parts = {job.part: read.parts[job.part]}
        read.expects = read.expects.half(job.part)
    heads = read.heads if "retriever" in read.parts else None
    if heads is not None and job.verify:
        heads.check()
    why = {kind: _prepare(part, job) for kind, part in read.parts.items()}
    verifier = Verifier(job.source) if job.verify else None
    written: dict[str, dict[str, str]] = {kind: {} for kind in read.parts}
    with whole_folder(output, replace=True) as folder:
        _write(job, folder, read, written)
        certificates = []
        for kind, again in _read_back(job, folder, read).items():
            part = read.parts[kind]
            tensors = {**again.tensors}
            tensors.update({f"optimizer/{n}": t for n, t in again.optimizer.items()})
            done = certificate.compare(part, written[kind], tensors, why[kind])
            done.remarks = list(read.remarks.get(kind, ()))
            _check_config(again, part)
            if verifier is not None:
                done.layers = verifier.layers(part, _hf_side(job, folder, read, kind))
            certificates.append(done)
        text = certificate.to_json(certificates, {"from": job.source, "to": job.target})
        (folder / certificate.FILE).write_text(text, "utf-8")
    if heads is not None and heads.remark():
        say(heads.remark())
    for done in certificates:
        for line in done.lines():
            say(line)
    return certificates


# --- reading ---------------------------------------------------------------------------


def _read(job: Conversion) -> _Read:
    if job.source != "hf" and len(job.inputs) != 1:
        raise UserError(f"--from={job.source} takes one --input, not {len(job.inputs)}")
    if job.source == "atlas-jax" and job.allow_missing:
        raise UserError("--allow_missing: a model folder is whole; leave the flag out")
    for name in ("num_heads", "reader_model_type"):
        if getattr(job, name) and job.source != "meta-atlas":
            raise UserError(f"--{name} is for --from=meta-atlas; --from={job.source} tells it")
    if job.source == "hf":
        read = _Read({})
        for folder in job.inputs:
            heads = job.part == "encoder"
            part = huggingface.read_folder(folder, job.allow_missing, heads=heads)
            if part.kind in read.parts:
                raise UserError(f"{folder} is a {part.kind}, too; give one of each kind")
            read.parts[part.kind] = part
            if part.kind == "retriever":
                read.expects = of_texts(part.texts)
    elif job.source == "t5x":
        part = t5x.read_checkpoint(job.inputs[0], job.optimizer, job.allow_missing)
        read = _Read({"reader": part}, step=_step(part))
    elif job.source == "meta-atlas":
        fields = dict(job.fields.get("retriever", {}))
        if job.num_heads and "num_heads" in fields:
            raise UserError("--num_heads and RetrieverConfig.num_heads say the same: give one")
        fields |= {"num_heads": job.num_heads} if job.num_heads else {}
        found = meta_atlas.read_checkpoint(
            job.inputs[0], fields, job.allow_missing, job.optimizer, job.reader_model_type
        )
        expects = of_atlas(found.options)
        read = _Read(found.parts, found.gin, found.step, found.heads, expects=expects)
    else:
        parts = read_model_folder(job.inputs[0], job.optimizer)
        expects = load_expects(job.inputs[0])
        read = _Read(parts, step=max(map(_step, parts.values())), expects=expects)
    for kind, path in job.tokenizers.items():
        if kind in read.parts:
            read.parts[kind].tokenizer = find_tokenizer(Path(path), kind)
            read.parts[kind].tokenizer_file = path
    for kind, part in read.parts.items():
        gin, read.remarks[kind] = texts.settle(part, OPTIONS_FILE)
        read.gin += gin
    return read


def _step(part: Part) -> int:
    step = part.optimizer.get("step") or part.source.get("state/step")
    return int(step.read()) if step is not None else 0


def read_model_folder(directory: str | Path, optimizer: bool = True) -> dict[str, Part]:
    """The parts of one of this project's model folders; arrays are not read yet.

    Raises:
      UserError: as `checkpoint.open_model`.
    """
    parts = {}
    for kind, files in open_model(directory).items():
        tensors = read_file(files.weights)
        check_depth(
            files.config, tensors, f"{files.weights.with_name('config.json')}: models.{kind}"
        )
        part = Part(kind, dict(files.config), tensors, source=tensors)
        part.tokenizer, part.tokenizer_file = read_text(files.tokenizer), str(files.tokenizer)
        if files.optimizer is not None and optimizer:
            part.optimizer = read_file(files.optimizer)
            part.empty = t5x.empty_from_text(read_metadata(files.optimizer))
        parts[kind] = part
    return parts


def _prepare(part: Part, job: Conversion) -> dict[str, str]:
    """Complete config and types, and check the part against the model it describes."""
    settle_config(part, job.fields.get(part.kind, {}))
    shapes = expected_shapes(part)
    huggingface.fill_missing(part, shapes)
    certificate.check_shapes(part, shapes)
    why = certificate.account_for(part, job.allow_unused)
    for name in part.tensors:
        tensor = part.tensors[name] = finite(part.tensors[name])
        if tensor.dtype not in FLOATS.values():
            raise UserError(
                f"{tensor.where} is of type {tensor.dtype}; expected {', '.join(FLOATS)}"
            )
        if job.dtype != "keep":
            part.tensors[name] = cast(tensor, FLOATS[job.dtype])
    _check_vocabulary(part, job.allow_spare_rows)
    return why


def _check_vocabulary(part: Part, allow_spare_rows: bool) -> None:
    """Refuse a tokenizer whose size shows that it belongs to another model."""
    if part.tokenizer is None:
        return
    named = part.tokenizer_file or f"the {part.kind}'s tokenizer"
    ids = Tokenizer(part.tokenizer, named).vocab_size
    rows = part.config["vocab_size"]
    if ids > rows:
        raise UserError(
            f"the {part.kind}'s tokenizer has {ids} ids, but its embedding only {rows} rows; one "
            "of the two is another model's"
        )
    if rows - ids >= _SPARE_ROWS and not allow_spare_rows:
        raise UserError(
            f"the {part.kind}'s tokenizer has {ids} ids, but its embedding {rows} rows: "
            f"{_SPARE_ROWS} or more to spare, as if one of the two were another model's. Give "
            f"--{part.kind}_tokenizer=FILE, or --allow_spare_rows if they belong together"
        )


def settle_config(part: Part, told: Mapping[str, Any] | None = None) -> None:
    """Complete the config with defaults and with the given fields.

    Raises:
      UserError: a value is impossible; names the field.
    """
    config_class = MODEL_CONFIGS[part.kind]
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = set(part.config) - known
    if unknown:
        raise UserError(f"the {part.kind}'s config has unknown fields {', '.join(sorted(unknown))}")
    config = whole_config(config_class, {**part.config, **(told or {})})
    part.config = dataclasses.asdict(config)
    if isinstance(config, NamedEncoderConfig):
        part.config["encoder_options"] = told_options(config)
    if part.kind == "reader":
        part.config["scan_layers"] = False  # decides how it is run, not how it is stored


def expected_shapes(part: Part) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the model that a part's config describes."""
    tokens = np.ones((1, 2), np.int32)
    model = make_model(part)
    inputs = (tokens,) if part.kind == "encoder" else (tokens, tokens)
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    flat = traverse_util.flatten_dict(meta.unbox(boxed), sep="/")
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}


def make_model(part: Part) -> T5 | DualEncoder | EncoderModel:
    """Make the module of a part."""
    if part.kind == "encoder":
        return EncoderModel(EncoderModelConfig(**part.config))
    if part.kind == "reader":
        return T5(ReaderConfig(**part.config))
    return DualEncoder(RetrieverConfig(**part.config))


# --- writing ---------------------------------------------------------------------------


def _write(job: Conversion, folder: Path, read: _Read, written: dict[str, dict[str, str]]) -> None:
    """Write every part; `written` gets the fingerprints of all that is written."""
    for kind, part in read.parts.items():
        state: dict[str, str] = {}
        watched = dataclasses.replace(
            part,
            tensors=recorded(part.tensors, written[kind]),
            optimizer=recorded(part.optimizer, state) if job.optimizer else {},
            empty=part.empty if job.optimizer else {},
        )
        if job.target == "hf":
            place = folder if len(read.parts) == 1 else folder / kind
            place.mkdir(exist_ok=True)
            huggingface.write_folder(watched, place, job.max_shard_bytes)
        elif job.target == "t5x":
            t5x.write_checkpoint(watched, folder, job.scan_layers, read.step)
        else:
            _write_part(folder, watched)
        written[kind].update({f"optimizer/{name}": value for name, value in state.items()})
    if read.gin:
        (folder / OPTIONS_FILE).write_text(read.gin, "utf-8")
    if job.target == "atlas-jax":
        about = {"converted from": job.source, "step": read.step}
        configs = {kind: part.config for kind, part in read.parts.items()}
        write_folder_config(folder, configs, about, read.expects)


def _write_part(folder: Path, part: Part) -> None:
    if part.tokenizer is None:
        raise UserError(
            f"the {part.kind} has no tokenizer, and a model folder needs one: give "
            f"--{part.kind}_tokenizer=FILE (tokenizer.json, spiece.model or vocab.txt)"
        )
    write_file(folder / f"{part.kind}.safetensors", part.tensors)
    Tokenizer(part.tokenizer).save(folder / f"{part.kind}_tokenizer.json")
    if part.optimizer:
        path = folder / f"{part.kind}_optimizer.safetensors"
        write_file(path, part.optimizer, t5x.empty_to_text(part.empty))


def _read_back(job: Conversion, folder: Path, read: _Read) -> dict[str, Part]:
    """Read the new files as their format is read."""
    if job.target == "hf":
        return {
            kind: huggingface.read_folder(
                folder if len(read.parts) == 1 else folder / kind, heads=kind == "encoder"
            )
            for kind in read.parts
        }
    if job.target == "t5x":
        again = t5x.read_checkpoint(folder)
        if "step" not in read.parts["reader"].optimizer or not job.optimizer:
            again.optimizer.pop("step", None)  # added by the writer
        return {"reader": again}
    return read_model_folder(folder)


def _check_config(again: Part, part: Part) -> None:
    """Refuse new files that describe another model than was converted."""
    for name, value in again.config.items():
        before = part.config.get(name)
        if isinstance(value, list | tuple):  # JSON has lists but no tuples
            same = list(value) == list(before or ())
        else:
            same = value == before
        if not same:
            raise UserError(
                f"certificate: the new files say {name} = {value!r} where the {part.kind} has "
                f"{before!r}; that format cannot express it"
            )


def _hf_side(job: Conversion, folder: Path, read: _Read, kind: str) -> Path | None:
    """The folder that Hugging Face can load: the target's, else the source's."""
    if job.target == "hf":
        return folder if len(read.parts) == 1 else folder / kind
    if job.source == "hf":
        wanted = "reader" if kind == "reader" else "retriever"
        return next(Path(f) for f in job.inputs if huggingface.kind_of(Path(f)) == wanted)
    return None
