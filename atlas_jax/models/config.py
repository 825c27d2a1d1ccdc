"""Where the two models come from."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.errors import UserError, no_value_for, one_of, require
from atlas_jax.encoders.model import EncoderModelConfig
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.retriever.config import RetrieverConfig

MODEL_CONFIGS: dict[str, Any] = {
    "reader": ReaderConfig,
    "retriever": RetrieverConfig,
    "encoder": EncoderModelConfig,
}
READER_INITS = ("random", "induction", "retriever")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelConfig:
    """Where the two models and their tokenizers come from.

    reader, retriever: model folders (a run writes one at its end; the two may be the same
        folder). Architecture, parameters and tokenizer come from the folder; explicit
        bindings of ReaderConfig or RetrieverConfig (dropout, dtype, scan, remat) override
        its fields. "" = random parameters, architecture from gin alone.
    reader_base, retriever_base: model folder that a partial model (docs/deltas.md) stands on; ""
        = where that lay when the partial one was written.
    reader_tokenizer, retriever_tokenizer: `tokenizer.json` files, needed for (and only
        for) a model that starts from random parameters.
    reader_init: the first parameters of a reader without a folder. 'random'. 'induction': with the
        copying circuit wired in (see reader/induction.py). 'retriever': encoder, token embedding
        and tokenizer are made from the retriever's (see reader/from_tower.py).
    export_dtype: 'float32' or 'bfloat16', the type of the parameters in a run's final model folder.
    optimizer_state: begin with the optimiser state that `convert` put into the folders. A model
        whose folder has none begins with a fresh one.
    """

    reader: str = ""
    retriever: str = ""
    reader_base: str = ""
    retriever_base: str = ""
    reader_tokenizer: str = ""
    retriever_tokenizer: str = ""
    reader_init: str = "random"
    export_dtype: str = "float32"
    optimizer_state: bool = False

    def __post_init__(self) -> None:
        require(
            self.reader_init in READER_INITS,
            "ModelConfig.reader_init",
            self.reader_init,
            one_of(READER_INITS),
        )
        require(
            self.export_dtype in DTYPES,
            "ModelConfig.export_dtype",
            self.export_dtype,
            one_of(DTYPES),
        )
        for model in ("reader", "retriever"):
            folder, tokenizer = getattr(self, model), getattr(self, f"{model}_tokenizer")
            require(
                not (folder and tokenizer),
                f"ModelConfig.{model}_tokenizer",
                tokenizer,
                f"nothing, since ModelConfig.{model} = {folder!r} brings its own tokenizer",
            )
            base = getattr(self, f"{model}_base")
            require(
                bool(folder) or not base,
                f"ModelConfig.{model}_base",
                base,
                f"a partial model folder in ModelConfig.{model}, which stands on it",
            )


Made = TypeVar("Made")


@dataclass(frozen=True)
class ModelSpec:
    """Where the two models come from, and the config fields that the run sets.

    Attributes:
      config: folders, tokenizers, how random parameters begin.
      reader: fields of ReaderConfig. They override those of a model folder. Without a folder
        they make up the reader's config.
      retriever: the same for RetrieverConfig.
      deltas: adapters or LoRA that a part gets beside its own parameters, by part.
    """

    config: ModelConfig = ModelConfig()
    reader: Mapping[str, Any] = field(default_factory=dict)
    retriever: Mapping[str, Any] = field(default_factory=dict)
    deltas: Mapping[str, DeltaConfig] = field(default_factory=dict)

    @classmethod
    def of_folder(
        cls, model: str | os.PathLike[str], retriever: str | os.PathLike[str] = ""
    ) -> "ModelSpec":
        """Both models of a folder, or its reader and the retriever of another one."""
        folder = os.fspath(model)
        return cls(ModelConfig(reader=folder, retriever=os.fspath(retriever) or folder))


def whole_config(config_class: type[Made], told: Mapping[str, Any]) -> Made:
    """A config of these fields and the defaults of the others.

    Raises:
      UserError: a field without default is not among them.
    """
    missing = [
        f"{config_class.__name__}.{one.name}"
        for one in fields(config_class)  # type: ignore[arg-type]
        if one.name not in told and one.default is MISSING and one.default_factory is MISSING
    ]
    if missing:
        raise UserError(no_value_for(missing))
    return config_class(**told)
