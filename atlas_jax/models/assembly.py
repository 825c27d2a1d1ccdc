"""From configs to the things a run works with: models, parameters, tokenizers.

Every entry point begins here. So all of them understand a model folder, a tokenizer and a mesh in
the same way.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax.core import meta
from jax.sharding import Mesh

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.parts import PARTS
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.models.config import ModelConfig, ModelSpec, whole_config
from atlas_jax.models.expects import NOTHING, Expects, combined
from atlas_jax.models.folder import (
    ModelPart,
    load_config,
    load_expects,
    load_model,
    load_tokenizer,
    save_model,
)
from atlas_jax.models.matching import check_params
from atlas_jax.models.parameters import (
    Models,
    RetrieverTraining,
    abstract_params,
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
_CONFIGS: dict[str, Any] = {"reader": ReaderConfig, "retriever": RetrieverConfig}


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
        first parameter that differs is named), or a tokenizer has more ids than the model.
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
    return Models(T5(configs["reader"]), DualEncoder(retriever)), tokenizers


def initial_params(
    spec: ModelSpec, models: Models, mesh: Mesh, rules: tuple[Rule, ...], seed: int = 0
) -> Params:
    """The parameters to begin with, where they belong; what no folder gives is random.

    Args:
      models: of `open_models`.

    Raises:
      UserError: as `assemble`.
    """
    boxed = abstract_params(models)
    expected = meta.unbox(boxed)
    shardings = partitioning.param_shardings(boxed, mesh, rules)
    params: dict[str, Params] = {}
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
            read = _read_params(spec.config, part, made, expected[part])
            params[part] = multihost.place(read, shardings[part])
    return params


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
    made = _config_of(spec, "retriever")
    tokenizer = _load_tokenizer(spec.config, "retriever")
    _check_vocabulary("retriever", made, tokenizer)
    return DualEncoder(made), tokenizer


def initial_retriever(config: ModelConfig, model: DualEncoder, seed: int = 0) -> Params:
    """The retriever's parameters to begin with, on the default device.

    Raises:
      UserError: as `assemble`.
    """
    if not config.retriever:
        return _random_retriever(model, seed)
    read = _read_params(config, "retriever", model.config, abstract_retriever(model))
    return jax.tree.map(jax.numpy.asarray, read)


def abstract_retriever(model: DualEncoder) -> Params:
    """Shapes of the retriever's parameters; nothing is allocated."""
    return jax.eval_shape(lambda: _random_retriever(model, 0))


def export_model(
    directory: str | Path,
    models: Models,
    params: Params,
    tokenizers: Tokenizers,
    dtype: str,
    about: dict[str, Any],
    expects: Expects = NOTHING,
) -> None:
    """Write reader and retriever as a model folder; layers are always stored unrolled.

    Raises:
      UserError: the folder could not be written.
    """
    # On the host: a slice of a stacked array would be one more array on the devices.
    params = multihost.to_host(params)
    reader = params["reader"]
    if models.reader.config.scan_layers:
        reader = unstack_layers(reader)
    reader_fields = dataclasses.asdict(models.reader.config) | {"scan_layers": False}
    save_model(
        directory,
        {
            "reader": ModelPart(reader_fields, reader, tokenizers.reader),
            "retriever": ModelPart(
                dataclasses.asdict(models.retriever.config),
                params["retriever"],
                tokenizers.retriever,
            ),
        },
        dtype=dtype,
        about=about,
        expects=expects,
    )


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
        return whole_config(_CONFIGS[part], told)
    return _overridden(_CONFIGS[part], load_config(folder, part), told, folder)


def _read_params(config: ModelConfig, part: str, made: Any, expected: Any) -> Params:
    """One model's parameters from its folder, on the host.

    Layers come as the config wants them, and a tied retriever is untied if it says so.
    """
    folder: str = getattr(config, part)
    params = load_model(folder, (part,))[part].params
    if isinstance(made, ReaderConfig) and made.scan_layers:
        params = stack_layers(params)
    if isinstance(made, RetrieverConfig) and not made.tied:
        params = untie(params)
    check_params(params, expected, f"{folder} ({part})")
    return params


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
        return load_tokenizer(folder, part)
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
    found = load_model(spec.config.retriever, ("retriever",))["retriever"]
    towers = found.params
    tower = towers["encoder"] if is_tied(towers) else towers["passage_encoder"]
    return start_from_tower(drawn, tower, config, found.tokenizer.eos_id)


def _random_retriever(model: DualEncoder, seed: int) -> Params:
    tokens = jax.numpy.ones((1, 4), jax.numpy.int32)
    # Jitted: outside of a compiled program one row cannot be spread over several devices.
    init = jax.jit(lambda key: meta.unbox(model.init(key, tokens, tokens)["params"]))
    return init(jax.random.key(seed))
