"""From configs to the things a run works with: models, parameters, tokenizers.

Every entry point begins here. So all of them understand a model folder, a tokenizer and a mesh in
the same way.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
from flax.core import meta
from jax.sharding import Mesh

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.errors import UserError, no_value_for
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.parts import PARTS
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.models.config import ModelConfig, ModelSpec
from atlas_jax.models.folder import ModelPart, load_model, load_tokenizer, save_model
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
from atlas_jax.reader.t5 import T5, stack_layers, unstack_layers
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
        first parameter that differs is named), or a tokenizer has more ids than the model.
    """
    reader = _load_part(spec, "reader", ReaderConfig)
    retriever = _load_part(spec, "retriever", RetrieverConfig)
    models = Models(T5(reader.config), DualEncoder(retriever.config))
    params = _initial_params(spec.config, models, reader, retriever, seed, mesh, rules)
    if training == "query_side" and retriever.config.tied:
        untied = dataclasses.replace(retriever.config, tied=False)
        models = Models(models.reader, DualEncoder(untied))
        params = {**params, "retriever": untie(params["retriever"])}
    return Assembled(
        mesh=mesh,
        rules=rules,
        models=models,
        tokenizers=Tokenizers(reader.tokenizer, retriever.tokenizer),
        params=params,
    )


def load_retriever(spec: ModelSpec, seed: int = 0) -> tuple[DualEncoder, Params, Tokenizer]:
    """Load the retriever alone, with its parameters on the default device.

    Raises:
      UserError: as `assemble`.
    """
    part = _load_part(spec, "retriever", RetrieverConfig)
    model = DualEncoder(part.config)
    expected = _abstract_retriever(model)
    params = part.params
    if params is None:
        params = _random_retriever(model, seed)
    else:
        check_params(params, expected, part.origin)
    return model, jax.tree.map(jax.numpy.asarray, params), part.tokenizer


def export_model(
    directory: str | Path,
    models: Models,
    params: Params,
    tokenizers: Tokenizers,
    dtype: str,
    about: dict[str, Any],
) -> None:
    """Write reader and retriever as a model folder; layers are always stored unrolled.

    Raises:
      UserError: the folder could not be written.
    """
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
    )


@dataclasses.dataclass(frozen=True)
class _Part(Generic[Config]):
    config: Config
    params: Params | None  # None: they will be random
    tokenizer: Tokenizer
    origin: str


def _load_part(spec: ModelSpec, part: str, config_class: type[Config]) -> _Part[Config]:
    """Load one model from its folder; without a folder, only its config and tokenizer.

    Layers are stacked or not as the config says. A tied retriever is untied if the config says so.
    """
    folder: str = getattr(spec.config, part)
    told: Mapping[str, Any] = getattr(spec, part)
    if not folder:
        tokenizer = _load_tokenizer(spec.config, part)
        fresh = _Part(whole_config(config_class, told), None, tokenizer, f"ModelConfig.{part}")
        _check_vocabulary(part, fresh)
        return fresh
    saved = load_model(folder, (part,))[part]
    made = _overridden(config_class, saved.config, told, folder)
    params = saved.params
    if isinstance(made, ReaderConfig) and made.scan_layers:
        params = stack_layers(params)
    if isinstance(made, RetrieverConfig) and not made.tied:
        params = untie(params)
    loaded = _Part(made, params, saved.tokenizer, f"{folder} ({part})")
    _check_vocabulary(part, loaded)
    return loaded


def whole_config(config_class: type[Config], told: Mapping[str, Any]) -> Config:
    """Make a model's config from these fields, and defaults for the others.

    Raises:
      UserError: a field without a default is missing.
    """
    missing = [
        f"{config_class.__name__}.{field.name}"
        for field in dataclasses.fields(config_class)
        if field.name not in told
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(no_value_for(missing))
    return config_class(**told)


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


def _check_vocabulary(part: str, loaded: _Part[Any]) -> None:
    ids, rows = loaded.tokenizer.vocab_size, loaded.config.vocab_size
    if ids > rows:
        raise UserError(
            f"the {part}'s tokenizer has ids up to {ids - 1}, but "
            f"{type(loaded.config).__name__}.vocab_size is {rows}, so they may be up to {rows - 1}"
        )


def _initial_params(
    config: ModelConfig,
    models: Models,
    reader: _Part[ReaderConfig],
    retriever: _Part[RetrieverConfig],
    seed: int,
    mesh: Mesh,
    rules: tuple[Rule, ...],
) -> Params:
    """Place both models' parameters on the devices; those without a folder are random."""
    parts: dict[str, _Part[Any]] = {"reader": reader, "retriever": retriever}
    boxed = abstract_params(models)
    expected = meta.unbox(boxed)
    shardings = partitioning.param_shardings(boxed, mesh, rules)
    params: dict[str, Params] = {}
    if any(part.params is None for part in parts.values()):
        params = init_params(models, seed, mesh, rules)
        if config.reader_init == "induction" and reader.params is None:
            drawn = multihost.to_host(params["reader"])
            wired = wire_induction(drawn, reader.config, seed)
            params["reader"] = multihost.place(wired, shardings["reader"])
        if config.reader_init == "retriever" and reader.params is None:
            params["reader"] = multihost.place(
                _from_retriever(multihost.to_host(params["reader"]), reader.config, retriever),
                shardings["reader"],
            )
    for name, part in parts.items():
        if part.params is not None:
            check_params(part.params, expected[name], part.origin)
            params[name] = multihost.place(part.params, shardings[name])
    return params


def _from_retriever(
    drawn: Params, config: ReaderConfig, retriever: _Part[RetrieverConfig]
) -> Params:
    if retriever.params is None:
        raise UserError(
            "ModelConfig.reader_init = 'retriever' needs ModelConfig.retriever, a model folder "
            "whose tower the reader's encoder begins as"
        )
    found = retriever.params
    tower = found["encoder"] if is_tied(found) else found["passage_encoder"]
    return start_from_tower(drawn, tower, config, retriever.tokenizer.eos_id)


def _random_retriever(model: DualEncoder, seed: int) -> Params:
    tokens = jax.numpy.ones((1, 4), jax.numpy.int32)
    # Jitted: outside of a compiled program one row cannot be spread over several devices.
    init = jax.jit(lambda key: meta.unbox(model.init(key, tokens, tokens)["params"]))
    return init(jax.random.key(seed))


def _abstract_retriever(model: DualEncoder) -> Params:
    return jax.eval_shape(lambda: _random_retriever(model, 0))
