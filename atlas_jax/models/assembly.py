"""From configs to the things a run works with: models, parameters, tokenizers.

Every entry point begins here. So all of them understand a model folder, a tokenizer and a mesh in
the same way.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import traverse_util
from flax.core import meta
from jax.sharding import Mesh

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.deltas import DeltaConfig, folded, split_delta, with_delta
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.parts import PARTS
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.models.config import MODEL_CONFIGS, ModelConfig, ModelSpec, whole_config
from atlas_jax.models.expects import NOTHING, Expects, combined
from atlas_jax.models.folder import (
    ModelPart,
    base_of,
    load_config,
    load_deltas,
    load_expects,
    load_model,
    load_tokenizer,
    save_model,
)
from atlas_jax.models.matching import check_params
from atlas_jax.models.new_deltas import begun, check_soft, where_deltas_stand
from atlas_jax.models.parameters import (
    Models,
    RetrieverTraining,
    abstract_params,
    init_deltas,
    init_params,
)
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.from_tower import reader_tokenizer, start_from_tower
from atlas_jax.reader.induction import wire_induction
from atlas_jax.reader.scanned import stack_layers, unstack_layers
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder, is_tied, untie

Config = TypeVar("Config", ReaderConfig, RetrieverConfig)


@dataclasses.dataclass(frozen=True)
class Tokenizers:
    """The two tokenizers of a run."""

    reader: Tokenizer
    retriever: Tokenizer


@dataclasses.dataclass(frozen=True)
class Assembled:
    """Mesh, rules, models, tokenizers and the parameters to begin with (on the devices)."""

    mesh: Mesh
    rules: tuple[Rule, ...]
    models: Models
    tokenizers: Tokenizers
    params: Params


def load_tokenizers(config: ModelConfig) -> Tokenizers:
    """Load both tokenizers, from model folders or from their own files.

    Raises:
      UserError: no source is given for one of them, or its file is at fault.
    """
    return Tokenizers(**{part: _load_tokenizer(config, part) for part in PARTS})


def assemble(
    spec: ModelSpec,
    mesh: Mesh,
    rules: tuple[Rule, ...],
    seed: int = 0,
    training: RetrieverTraining = "fixed",
) -> Assembled:
    """Make both models with their parameters, from folders or at random.

    For query-side training a tied retriever becomes two towers. Both start as copies of it; only
    the query tower is trained.

    Args:
      spec: where the models come from.
      mesh, rules: where parameters lie.
      seed: of random parameters.
      training: how the retriever will be trained.

    Raises:
      UserError: a folder or file is at fault, a field does not fit the folder's parameters (the
        first parameter that differs is named), a tokenizer has more ids than the model, or there
        are new adapters or LoRA beside a retriever that does not train.
    """
    models, tokenizers = open_models(spec, training)
    params = initial_params(spec, models, mesh, rules, seed)
    return Assembled(mesh, rules, models, tokenizers, params)


def open_models(
    spec: ModelSpec, training: RetrieverTraining = "fixed"
) -> tuple[Models, Tokenizers]:
    """Both models and their tokenizers, as folders and fields describe them, without parameters.

    Raises:
      UserError: as `assemble`.
    """
    configs = {part: _config_of(spec, part) for part in PARTS}
    tokenizers = load_tokenizers(spec.config)
    for part, made in configs.items():
        _check_vocabulary(part, made, getattr(tokenizers, part))
    retriever = configs["retriever"]
    if training == "query_side":
        retriever = dataclasses.replace(retriever, tied=False)
    deltas = _deltas_of(spec, training)
    check_soft(deltas, configs["reader"])
    models = Models(T5(configs["reader"]), DualEncoder(retriever), tuple(deltas.items()))
    return models, tokenizers


def initial_params(
    spec: ModelSpec, models: Models, mesh: Mesh, rules: tuple[Rule, ...], seed: int = 0
) -> Params:
    """The parameters to begin with, where they belong; what no folder gives is random.

    Args:
      models: of `open_models`.

    Raises:
      UserError: as `assemble`.
    """
    whole, models = models, dataclasses.replace(models, deltas=())
    boxed = abstract_params(models)
    expected = meta.unbox(boxed)
    shardings = partitioning.param_shardings(boxed, mesh, rules)
    params: dict[str, Params] = {}
    small: dict[str, Params] = {}
    drawn = [part for part in PARTS if not getattr(spec.config, part)]
    if drawn:
        untied_now = not models.retriever.config.tied and _config_of(spec, "retriever").tied
        params = init_params(models, seed, mesh, rules, drawn, one_tower=untied_now)
    if "reader" in drawn and spec.config.reader_init == "induction":
        on_host = multihost.to_host(params.pop("reader"))  # which leaves the devices
        wired = wire_induction(on_host, models.reader.config, seed)
        params["reader"] = multihost.place(wired, shardings["reader"])
    if "reader" in drawn and spec.config.reader_init == "retriever":
        on_host = multihost.to_host(params.pop("reader"))
        begun = _from_retriever(on_host, spec, models.reader.config)
        params["reader"] = multihost.place(begun, shardings["reader"])
    for part in PARTS:
        if part not in drawn:
            made = getattr(models, part).config
            read, small[part] = _read_params(spec.config, part, made, expected[part])
            params[part] = multihost.place(read, shardings[part])
    return _with_deltas(whole, params, small, spec.config, seed, mesh, rules)


def load_retriever(spec: ModelSpec, seed: int = 0) -> tuple[DualEncoder, Params, Tokenizer]:
    """Load the retriever alone, with its parameters on the default device.

    Raises:
      UserError: as `assemble`.
    """
    model, tokenizer = open_retriever(spec)
    return model, initial_retriever(spec.config, model, seed), tokenizer


def open_retriever(spec: ModelSpec) -> tuple[DualEncoder, Tokenizer]:
    """The retriever and its tokenizer, without parameters.

    Raises:
      UserError: as `assemble`.
    """
    if _deltas_of(spec, "joint").get("retriever"):
        raise UserError(
            "the retriever has adapters or LoRA (retriever/DeltaConfig, or its model folder), and "
            "train_retriever trains a whole one: begin from their base"
        )
    made = _config_of(spec, "retriever")
    tokenizer = _load_tokenizer(spec.config, "retriever")
    _check_vocabulary("retriever", made, tokenizer)
    return DualEncoder(made), tokenizer


def initial_retriever(
    config: ModelConfig, model: DualEncoder, seed: int = 0, shardings: Any = None
) -> Params:
    """The retriever's parameters to begin with.

    Args:
      shardings: tree of where they belong; None = on the default device.

    Raises:
      UserError: as `assemble`.
    """
    if not config.retriever:
        return _random_retriever(model, seed, shardings)
    expected = meta.unbox(boxed_retriever(model))
    read, _ = _read_params(config, "retriever", model.config, expected)
    if shardings is None:
        return jax.tree.map(jax.numpy.asarray, read)
    placed: Params = multihost.place(read, shardings)
    return placed


def boxed_retriever(model: DualEncoder) -> Params:
    """Shapes of the retriever's parameters with their logical axes; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 4), jax.numpy.int32)
    boxed: Params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    return boxed


@dataclasses.dataclass(frozen=True)
class Trained:
    """What was trained of a model that began as a model folder's.

    Attributes:
      params: tree of what was trained; only its paths count.
      folder: of the model that it began as.
      base: where that folder's own base lies now, if it is partial; "" = where it lay.
    """

    params: Params
    folder: str
    base: str = ""


def export_model(
    directory: str | Path,
    models: Models,
    params: Params,
    tokenizers: Tokenizers,
    dtype: str,
    about: dict[str, Any],
    expects: Expects = NOTHING,
    partial: Mapping[str, Trained] | None = None,
) -> None:
    """Write reader and retriever as a model folder; layers are always stored unrolled.

    Args:
      directory: of the folder.
      models, params, tokenizers: what is written.
      dtype: of the parameters there.
      about: JSON values for people.
      expects: what the models expect to read.
      partial: by part, the model that it stands on; of such a part what was trained is written
        alone.

    Raises:
      UserError: the folder could not be written.
    """
    # On the host: a slice of a stacked array would be one more array on the devices.
    params = multihost.to_host(params)
    reader = params["reader"]
    if models.reader.config.scan_layers:
        reader = unstack_layers(reader)
    reader_fields = dataclasses.asdict(models.reader.config) | {"scan_layers": False}
    retriever_fields = dataclasses.asdict(models.retriever.config)
    parts = {
        "reader": ModelPart(reader_fields, reader, tokenizers.reader),
        "retriever": ModelPart(retriever_fields, params["retriever"], tokenizers.retriever),
    }
    for name, part in parts.items():
        deltas, own, base = {}, part.params, None
        for path, config in models.deltas:
            if path.partition("/")[0] == name:
                own, config = folded(own, config)
                deltas[path] = dataclasses.asdict(config)
        if partial and name in partial:
            base, kept = base_of(partial[name].folder, name, partial[name].base)
            own = _kept(own, partial[name].params, kept)
        parts[name] = dataclasses.replace(part, params=own, deltas=deltas, base=base)
    save_model(directory, parts, dtype=dtype, about=about, expects=expects)


def _kept(params: Params, trained: Params, earlier: Sequence[str]) -> Params:
    """Of unrolled parameters what was trained (scanned or not), now or earlier, and all deltas."""
    moved = {*traverse_util.flatten_dict(trained, sep="/"), *earlier}
    own, small = split_delta(params)
    kept = {
        path: leaf
        for path, leaf in traverse_util.flatten_dict(own, sep="/").items()
        if path in moved or re.sub(r"/layers_\d+/", "/layers/", path, count=1) in moved
    }
    return with_delta(traverse_util.unflatten_dict(kept, sep="/"), small)


def expectations(config: ModelConfig) -> Expects:
    """What the models of the folders expect to read, as far as these say.

    Raises:
      UserError: a folder that is none.
    """
    reader, retriever = (
        load_expects(folder) if folder else NOTHING for folder in (config.reader, config.retriever)
    )
    return combined(reader, retriever)


def readable(spec: ModelSpec) -> int:
    """How many tokens the retriever can read.

    Raises:
      UserError: a folder that is none, or has no retriever.
    """
    most: int = _config_of(spec, "retriever").max_length
    return most


def _config_of(spec: ModelSpec, part: str) -> Any:
    """The config of one model: its folder's, but for the fields that were told."""
    folder: str = getattr(spec.config, part)
    told: Mapping[str, Any] = getattr(spec, part)
    if not folder:
        return whole_config(MODEL_CONFIGS[part], told)
    return _overridden(MODEL_CONFIGS[part], load_config(folder, part), told, folder)


def _read_params(config: ModelConfig, part: str, made: Any, expected: Any) -> tuple[Params, Params]:
    """One model's parameters from its folder, on the host; its adapters and LoRA apart.

    Layers come as the config wants them, and a tied retriever is untied if it says so.
    """
    folder: str = getattr(config, part)
    params = _load(config, part).params
    if isinstance(made, ReaderConfig) and made.scan_layers:
        params = stack_layers(params)
    if isinstance(made, RetrieverConfig) and not made.tied:
        params = untie(params)
    own, small = split_delta(params)
    check_params(own, expected, f"{folder} ({part})")
    return own, small


def _load(config: ModelConfig, part: str) -> ModelPart:
    base: str = getattr(config, f"{part}_base")
    return load_model(getattr(config, part), (part,), {part: base} if base else {})[part]


def _deltas_of(spec: ModelSpec, training: RetrieverTraining) -> dict[str, DeltaConfig]:
    """By path, the adapters and LoRA that the folders have, or else those that were told.

    Raises:
      UserError: both, and they differ; or as `where_deltas_stand`.
    """
    found: dict[str, DeltaConfig] = {}
    told = {part: one for part, one in spec.deltas.items() if one.kind != "none"}
    for part in PARTS:
        folder: str = getattr(spec.config, part)
        saved = load_deltas(folder, part) if folder else {}
        for path, fields in saved.items():
            found[path] = DeltaConfig(**fields)
            if told.get(part, found[path]) != found[path]:
                raise UserError(
                    f"{part}/DeltaConfig is {told[part]}, but the {part} of {folder} has "
                    f"{found[path]}; leave the bindings out to go on with it"
                )
        if saved:
            told.pop(part, None)
    return {**found, **where_deltas_stand(told, training)}


def _with_deltas(
    models: Models,
    params: Params,
    small: Mapping[str, Params],
    config: ModelConfig,
    seed: int,
    mesh: Mesh,
    rules: tuple[Rule, ...],
) -> Params:
    """Adapters and LoRA beside the models' parameters, as the folders have them or new."""
    if not models.deltas:
        return params
    boxed = abstract_params(models)
    shapes, specs = meta.unbox(boxed), partitioning.param_shardings(boxed, mesh, rules)
    fresh = init_deltas(models, seed, mesh, rules)
    result = {}
    for part in PARTS:
        expected, places = split_delta(shapes[part])[1], split_delta(specs[part])[1]
        placed, saved = fresh[part], small.get(part)
        if saved:
            check_params(saved, expected, f"{getattr(config, part)} ({part})")
            placed = multihost.place(saved, places)
        elif part == "reader":
            tokenizer = functools.partial(_load_tokenizer, config, part)
            placed = begun(models, params[part], placed, places, tokenizer, seed)
        result[part] = with_delta(params[part], placed)
    return result


def _overridden(
    config_class: type[Config], saved: dict[str, Any], told: Mapping[str, Any], folder: str
) -> Config:
    """The folder's config, with the fields that the run sets replaced."""
    unknown = set(saved) - {field.name for field in dataclasses.fields(config_class)}
    if unknown:
        raise UserError(
            f"model folder {folder}: {config_class.__name__} has no field "
            f"{', '.join(sorted(unknown))}; it was written by another version"
        )
    return config_class(**{**saved, **told})


def _load_tokenizer(config: ModelConfig, part: str) -> Tokenizer:
    folder: str = getattr(config, part)
    if folder:
        return load_tokenizer(folder, part, getattr(config, f"{part}_base"))
    path: str = getattr(config, f"{part}_tokenizer")
    if part == "reader" and not path and config.reader_init == "retriever":
        return reader_tokenizer(_load_tokenizer(config, "retriever"))
    if not path:
        raise UserError(
            f"the {part} is given nowhere: bind ModelConfig.{part} to a model folder, or "
            f"ModelConfig.{part}_tokenizer to a tokenizer.json to begin at random"
        )
    return Tokenizer.from_file(path)


def _check_vocabulary(part: str, made: Any, tokenizer: Tokenizer) -> None:
    ids, rows = tokenizer.vocab_size, made.vocab_size
    if ids > rows:
        raise UserError(
            f"the {part}'s tokenizer has ids up to {ids - 1}, but "
            f"{type(made).__name__}.vocab_size is {rows}, so they may be up to {rows - 1}"
        )


def _from_retriever(drawn: Params, spec: ModelSpec, config: ReaderConfig) -> Params:
    """The reader's drawn parameters, its encoder the passage tower of the retriever's folder."""
    if not spec.config.retriever:
        raise UserError(
            "ModelConfig.reader_init = 'retriever' needs ModelConfig.retriever, a model folder "
            "whose tower the reader's encoder begins as"
        )
    found = _load(spec.config, "retriever")
    towers = split_delta(found.params)[0]
    tower = towers["encoder"] if is_tied(towers) else towers["passage_encoder"]
    return start_from_tower(drawn, tower, config, found.tokenizer.eos_id)


def _random_retriever(model: DualEncoder, seed: int, shardings: Any) -> Params:
    tokens = jax.numpy.ones((1, 4), jax.numpy.int32)

    def init(key: jax.Array) -> Params:
        drawn: Params = meta.unbox(model.init(key, tokens, tokens)["params"])
        return drawn

    # Jitted: outside of a compiled program one row cannot be spread over several devices.
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
