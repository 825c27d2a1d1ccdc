"""The encoders by name: their config classes and their modules."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from atlas_jax.core.errors import UserError
from atlas_jax.encoders.albert import AlbertConfig, AlbertEncoder
from atlas_jax.encoders.bert import BertConfig, BertEncoder
from atlas_jax.encoders.config import EncoderConfig
from atlas_jax.encoders.relatives import ElectraConfig, RobertaConfig
from atlas_jax.encoders.xlnet import XlnetConfig, XlnetEncoder


@dataclasses.dataclass(frozen=True)
class EncoderKind:
    """One kind of encoder.

    Attributes:
        config: its config class.
        module: the module over such a config, with the interface of `BertEncoder`.
    """

    config: type[EncoderConfig]
    module: Callable[..., nn.Module]


ENCODERS: dict[str, EncoderKind] = {
    "bert": EncoderKind(BertConfig, BertEncoder),
    "albert": EncoderKind(AlbertConfig, AlbertEncoder),
    "roberta": EncoderKind(RobertaConfig, BertEncoder),
    "electra": EncoderKind(ElectraConfig, BertEncoder),
    "xlnet": EncoderKind(XlnetConfig, XlnetEncoder),
}


def encoder_config(
    name: str, fields: Mapping[str, Any], options: Mapping[str, Any], owner: str
) -> EncoderConfig:
    """The config of the encoder that another config describes.

    Args:
        name: of the encoder, in `ENCODERS`.
        fields: fields of the other config by name. One that this encoder does not have must be at
            the default of `BertConfig`.
        options: further fields of the encoder's config.
        owner: class name of the other config, for messages.

    Raises:
        UserError: an unknown encoder or option, a field that the encoder does not have, or a
            value out of range.
    """
    if name not in ENCODERS:
        raise UserError(f"{owner}.encoder = {name!r}: must be one of {', '.join(ENCODERS)}")
    kind = ENCODERS[name]
    known = {field.name for field in dataclasses.fields(kind.config)}
    defaults = {field.name: field.default for field in dataclasses.fields(BertConfig)}
    for field, value in fields.items():
        if field not in known and value != defaults[field]:
            raise UserError(f"{owner}.{field} = {value!r}: the encoder {name!r} has no such field")
    free = sorted(known - set(fields))
    for option in options:
        if option not in free:
            raise UserError(
                f"{owner}.encoder_options: {option!r} is no option of the encoder {name!r}; "
                + (f"it has {', '.join(free)}" if free else "it has none")
            )
    return kind.config(**{k: v for k, v in fields.items() if k in known}, **options)


@dataclasses.dataclass(frozen=True)
class NamedEncoderConfig(EncoderConfig):
    """A config that names its encoder: what all encoders share, and the options of one kind.

    Attributes:
        encoder: Kind of the encoder, a name of `ENCODERS`.
        encoder_options: Further fields of that encoder's config, by name.
        released_layer_norm: Of a 'bert' and its relatives, see `BertConfig`.
    """

    encoder: str = "bert"
    encoder_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    released_layer_norm: bool = False

    def __post_init__(self) -> None:
        """Raise `UserError`, naming the gin binding, when a field is out of range."""
        super().__post_init__()
        _ = self.tower

    @property
    def tower(self) -> EncoderConfig:
        """The encoder's own config.

        Raises:
            UserError: names the binding that does not fit the encoder.
        """
        names = [field.name for field in dataclasses.fields(EncoderConfig)]
        fields = {name: getattr(self, name) for name in (*names, "released_layer_norm")}
        return encoder_config(self.encoder, fields, self.encoder_options, type(self).__name__)

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.tower.max_length


def told_options(config: NamedEncoderConfig) -> dict[str, Any]:
    """The options of a config that differ from their encoder's defaults."""
    tower = config.tower
    return {
        name: value
        for name, value in config.encoder_options.items()
        if value != getattr(type(tower), name)
    }


def make_encoder(config: EncoderConfig) -> Any:
    """The module over a config.

    Raises:
        TypeError: the config's class is not in the registry.
    """
    for kind in ENCODERS.values():
        if type(config) is kind.config:
            return kind.module(config)
    raise TypeError(f"{type(config).__name__} is the config of no registered encoder")
