"""Meta's released Atlas models: `model.pth.tar` with reader, retriever, options, optimisers.

The state dict has both models: `reader.` (with Hugging Face's T5 names) and `retriever.`. The
latter has one `contriever` or, after query-side training, `query_contriever` and
`passage_contriever`. A `module.` in a name shows that the model was wrapped for several GPUs. The
retriever's layer norm divides by the uncentred second moment (see
`RetrieverConfig.released_layer_norm`).
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.interop import bert_names, encoders, meta_options, t5_names
from atlas_jax.interop.huggingface import t5_part
from atlas_jax.interop.tensors import Part, Tensor, Tensors, of_array, transposed
from atlas_jax.interop.torch_files import load

FILE = "model.pth.tar"
_TOWERS = {
    "contriever": "encoder",
    "query_contriever": "query_encoder",
    "passage_contriever": "passage_encoder",
}
_KEYS = ("model", "opt", "step")
# Keys of the optimiser states, by part.
_OPTIMIZERS = {"reader": "optimizer", "retriever": "retr_optimizer"}
_MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}


# Published models with which the released code begins its retriever; their widths are known.
_CONTRIEVERS = ("contriever", "contriever-msmarco", "mcontriever", "mcontriever-msmarco")
_CONTRIEVER_WIDTH, _HEAD_WIDTH = 768, 64
READER_MODEL_TYPES = (
    *("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b"),
    *(f"google/t5-v1_1-{size}" for size in ("base", "large", "xl", "xxl")),
    *(f"google/t5-{size}-lm-adapt" for size in ("base", "large", "xl", "xxl")),
)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The retriever's number of heads, which cannot be seen from the arrays.

    Attributes:
      number: the number of heads.
      is_given: whether the user gave it; if not, heads are assumed to be 64 wide.
      of_option: the number for `opt.retriever_model_path`, if that is a published model.
    """

    number: int
    is_given: bool
    of_option: int | None

    def remark(self) -> str:
        """The remark of a conversion about an assumed number; "" if it was given."""
        if self.is_given:
            return ""
        return (
            f"retriever: num_heads = {self.number}, of {_HEAD_WIDTH} channels each as in "
            "Contriever; the checkpoint does not tell (--num_heads=N if it is another)"
        )

    def check(self) -> None:
        """Refuse a number without confirmation.

        Raises:
          UserError: the number was not given and no published model has it, or it contradicts
            the model that the options name.
        """
        if self.of_option is not None and self.number != self.of_option:
            raise UserError(
                f"--verify: opt.retriever_model_path names a model of {self.of_option} heads, but "
                f"num_heads = {self.number}"
            )
        if not self.is_given and self.of_option is None:
            raise UserError(
                f"--verify: nothing tells the retriever's number of heads, of which {self.number} "
                f"were taken, and both frameworks would run with them; give --num_heads=N"
            )


@dataclasses.dataclass(frozen=True)
class AtlasCheckpoint:
    """The content of a file: its models, its options (also as gin), and its step.

    Without a retriever `heads` is None.
    """

    parts: dict[str, Part]
    gin: str
    step: int
    heads: Heads | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_checkpoint(
    path: str | Path,
    retriever_fields: Mapping[str, Any] | None = None,
    allow_missing: tuple[str, ...] = (),
    optimizer: bool = True,
    reader_model_type: str = "",
) -> AtlasCheckpoint:
    """Read a `model.pth.tar`, or the one in a folder; no array is read yet.

    Args:
      retriever_fields: fields of a RetrieverConfig that are not in the file, if they differ
        from Contriever's (heads of 64 channels, an epsilon of 1e-12, average pooling).
      allow_missing: patterns of Hugging Face's names, without `reader.` and the like, that may
        be missing. Then a norm's scale is 1 and everything else 0.
      optimizer: also read the moments of both AdamWs, if they were saved.
      reader_model_type: one of `READER_MODEL_TYPES`, if the option of this name is wrong.

    Raises:
      UserError: the file is not such a checkpoint, or is damaged or hostile; or a tensor is
        missing or does not fit the others (it is named).
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    content = load(file)
    absent = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if absent:
        raise UserError(f"{file}: no checkpoint of Atlas: it has no {', '.join(absent)}")
    options = content["opt"]
    if not isinstance(options, dict) or not isinstance(content["model"], dict):
        raise UserError(f"{file}: no checkpoint of Atlas: 'opt' or 'model' is of another kind")
    step = _number(content["step"], f"{file}: step")
    model = {_unwrapped(str(name)): tensor for name, tensor in content["model"].items()}
    for name, tensor in model.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor")
    model = {name: dataclasses.replace(t, sources=(name,)) for name, t in model.items()}
    parts: dict[str, Part] = {}
    reader = _below(model, "reader.")
    if reader:
        config = _reader_config(reader, options, file, reader_model_type)
        parts["reader"] = t5_part(reader, config, str(file), allow_missing)
    retriever, heads = _below(model, "retriever."), None
    if retriever:
        fields = dict(retriever_fields or {})
        parts["retriever"] = _retriever(retriever, options, fields, str(file), allow_missing)
        heads = _heads(parts["retriever"].config, options, "num_heads" in fields)
    rest = [n for n in model if not n.startswith(("reader.", "retriever."))]
    if rest or not parts:
        raise UserError(f"{file}: {rest[0] if rest else 'model'}: neither reader nor retriever")
    for name, part in parts.items():
        saved = content.get(_OPTIMIZERS[name])
        if saved is not None and optimizer:
            part.optimizer = _adam(part, saved, f"{file}: {_OPTIMIZERS[name]}")
    return AtlasCheckpoint(parts, meta_options.to_gin(options), step, heads, options)


def _unwrapped(name: str) -> str:
    for part in _OPTIMIZERS:
        name = name.replace(f"{part}.module.", f"{part}.")
    return name


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _heads(config: Mapping[str, Any], options: Mapping[str, Any], is_given: bool) -> Heads:
    owner, _, name = str(options.get("retriever_model_path", "")).rpartition("/")
    is_known = owner == "facebook" and name in _CONTRIEVERS
    is_known &= config["hidden_dim"] == _CONTRIEVER_WIDTH
    known = _CONTRIEVER_WIDTH // _HEAD_WIDTH if is_known else None
    return Heads(int(config["num_heads"]), is_given, known)


def _reader_config(
    tensors: Tensors, options: Mapping[str, Any], file: Path, override: str
) -> dict[str, Any]:
    """Sizes from the arrays; the version from the options, or from what overrides them."""
    config = t5_names.config_from_state_dict(tensors, str(file))
    kind = override or str(options.get("reader_model_type", ""))
    is_first = not kind.startswith("google/")  # t5-base is 1.0; google/t5-... are 1.1, LM-adapted
    gated = config["mlp_activations"] != ("relu",)
    if kind and is_first == gated:
        raise UserError(
            f"{file}: {'--' if override else 'opt.'}reader_model_type is {kind!r}, but the "
            f"reader's MLP is {'gated' if gated else 'not gated'}; one of the two is not this "
            "checkpoint's. If it is the option, give the right one: --reader_model_type="
            f"{'google/t5-xl-lm-adapt' if gated else 't5-base'}, say"
        )
    return {
        **config,
        "logits_via_embedding": not gated,
        "dropout_rate": _dropout(options, str(file)),
    }


def _dropout(options: Mapping[str, Any], where: str) -> float:
    rate = options.get("dropout", 0.1)
    if not isinstance(rate, int | float):
        raise UserError(f"{where}: opt.dropout is {ascii(rate)[:40]}, not a number")
    return float(rate)


def _retriever(
    tensors: Tensors,
    options: Mapping[str, Any],
    fields: dict[str, Any],
    where: str,
    allow_missing: tuple[str, ...],
) -> Part:
    towers: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        tower, _, rest = name.partition(".")
        if tower not in _TOWERS:
            raise UserError(f"{where}: retriever.{name}: known are {', '.join(_TOWERS)}")
        towers.setdefault(_TOWERS[tower], {})[rest] = tensor
    if set(towers) not in ({"encoder"}, {"query_encoder", "passage_encoder"}):
        raise UserError(f"{where}: the retriever has {', '.join(towers)}: not one tower, not two")
    shapes = next(iter(towers.values()))
    config = {
        **bert_names.config_from_state_dict(shapes, where),
        "pooling": "average",
        "normalize": False,
        "layer_norm_eps": 1e-12,
        "released_layer_norm": True,
        "dropout_rate": _dropout(options, where),
        **fields,
    }
    return encoders.towers_part(towers, config, where, allow_missing)


# --- optimiser state -------------------------------------------------------------------


def _adam(part: Part, saved: Mapping[str, Any], where: str) -> Tensors:
    """AdamW's moments under T5X's names for an optax state: param_states/0/{mu,nu,count}.

    PyTorch numbers parameters in the order of the module. This is the order of the state dict,
    without buffers and second names.

    Raises:
      UserError: a key is missing, a moment has another shape than its parameter, or there is
        state for more parameters than the model has.
    """
    by_source = {tensor.sources[0]: name for name, tensor in part.tensors.items()}
    order = [name for name in part.source if name in by_source]
    states, groups = _of(saved, "state", dict, where), _of(saved, "param_groups", list, where)
    numbers = [
        number
        for i, group in enumerate(groups)
        for number in _of(group, "params", list, f"{where}.param_groups.{i}")
    ]
    if not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{where}.param_groups: 'params' has something else than numbers")
    if len(numbers) < len(order):
        # The released untied retriever shares one module, so its parameters are counted once.
        order = [name for name in order if "passage_contriever" not in name]
    if len(numbers) != len(order):
        raise UserError(f"{where}: {len(numbers)} parameters where the model has {len(order)}")
    state: Tensors = {}
    steps = set()
    for number, source in zip(numbers, order, strict=True):
        name = by_source[source]
        entry = states.get(number)
        if entry is None:  # a parameter that never had a gradient
            continue
        place = f"{where}.state.{number} ({source})"
        steps.add(_number(_of(entry, "step", object, place), f"{place}.step"))
        for theirs, ours in _MOMENTS.items():
            moment = _of(entry, theirs, Tensor, place)
            if moment.shape != part.source[source].shape:
                raise UserError(f"{where}: {theirs} of {source} has not its parameter's shape")
            turned = _is_transposed(part, name)
            state[f"param_states/0/{ours}/{name}"] = transposed(moment) if turned else moment
    if len(steps) != 1:
        raise UserError(f"{where}: its parameters were updated {sorted(steps)} times; expected one")
    count = np.asarray(steps.pop(), np.int32)
    state["param_states/0/count"] = of_array(count, f"{where}.step")
    state["step"] = of_array(count, f"{where}.step")
    return state


def _is_transposed(part: Part, name: str) -> bool:
    """Whether our array is the transpose of the source's."""
    if part.kind == "reader":
        return t5_names.huggingface_names(part.config)[name][1]
    names = encoders.tower_names(part.config)
    return names[name.split("/", 1)[1]][1]


def _of(saved: Any, key: str, kind: type, where: str) -> Any:
    """One value of a saved dict.

    Raises:
      UserError: the value is missing or of another type.
    """
    if not isinstance(saved, Mapping):
        raise UserError(f"{where}: is a {type(saved).__name__}, not a dict with {key!r}")
    if key not in saved:
        raise UserError(f"{where}: has no {key!r}")
    if not isinstance(saved[key], kind):
        raise UserError(f"{where}.{key}: is a {type(saved[key]).__name__}, not a {kind.__name__}")
    return saved[key]


def _number(step: Any, where: str) -> int:
    if isinstance(step, Tensor) and math.prod(step.shape) == 1:
        step = step.read().item()
    if not isinstance(step, int | float) or not 0 <= step < 1 << 31:
        raise UserError(f"{where}: is {ascii(step)[:40]}, not a number of steps")
    return int(step)
