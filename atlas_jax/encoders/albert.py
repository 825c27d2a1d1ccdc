"""ALBERT (arXiv 1909.11942): a BERT with narrow embedding tables and shared layers.

google-research/albert, Hugging Face and the paper differ in three places. Here

* a projection always follows the embedding tables, as in Hugging Face; the original code has none
  where both widths are equal;
* layer l belongs to group l * G // L, in whole numbers; the original's float division is wrong for
  a few depths, none of them released;
* the sharing kinds 'attention' and 'ffn' are the paper's; no released code has them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.fused import Seen
from atlas_jax.core.types import Array
from atlas_jax.encoders.bert import (
    BertConfig,
    BertEncoder,
    BertLayer,
    Layer,
    apply_layer,
    rematerialised,
)

SHARING = ("none", "attention", "ffn", "all")
_SHARED_PART = {"attention": "attention", "ffn": "feed_forward"}


@dataclasses.dataclass(frozen=True)
class AlbertConfig(BertConfig):
    """An ALBERT. The defaults are ALBERT's, but for the sizes, which are those of BERT base.

    Attributes:
        factor_dim: Width E of the embedding tables.
        sharing: What layers share. 'all': whole layers, within each group. 'attention': query,
            key, value, output and their norm, over all layers. 'ffn': the two products of the
            feed-forward block and their norm, over all layers. 'none': nothing.
        num_groups: G, for 'all': layer l uses the parameters of group l * G // L.
        inner_groups: I, for 'all': a group has I blocks, one after the other. The model is then
            L * I blocks deep.
    """

    # Without num_layers: all layers may share the same arrays, so they cannot be counted.
    TOLD_BY_PARAMETERS: ClassVar[frozenset[str]] = frozenset(
        {"vocab_size", "mlp_dim", "max_positions", "type_vocab_size", "factor_dim"}
    )

    NO_EXPERTS: ClassVar[str] = "an ALBERT's layers share what experts would have for themselves"

    activation: str = "gelu_tanh"
    initializer: str = "truncated_normal"
    dropout_rate: bounds.BelowOne = 0.0
    factor_dim: bounds.Width = 128
    sharing: str = "all"
    num_groups: bounds.Layers = 1
    inner_groups: bounds.Layers = 1

    def __post_init__(self) -> None:
        """Raise `UserError`, naming class and field, when a field is out of range."""
        super().__post_init__()
        self._check_one_of("sharing", SHARING)
        if self.num_groups > self.num_layers:
            raise UserError(
                f"AlbertConfig.num_groups = {self.num_groups}: at most num_layers = "
                f"{self.num_layers}"
            )
        if self.sharing != "all" and (self.num_groups, self.inner_groups) != (1, 1):
            raise UserError(
                f"AlbertConfig.num_groups = {self.num_groups} and inner_groups = "
                f"{self.inner_groups} are for sharing = 'all'; sharing is {self.sharing!r}"
            )

    @property
    def table_dim(self) -> int:
        """Width of the embedding tables."""
        return self.factor_dim

    @property
    def projects(self) -> bool:
        """Always, whatever the widths."""
        return True

    def group_of(self, layer: int) -> int:
        """The group whose parameters this layer uses."""
        return layer * self.num_groups // self.num_layers

    def uses(self, path: str) -> int:
        """Once for each layer that shares it."""
        top = path.partition("/")[0]
        if top == "shared":
            return self.num_layers
        if not top.startswith("groups_"):
            return 1
        group = int(top.removeprefix("groups_"))
        return sum(self.group_of(layer) == group for layer in range(self.num_layers))


class AlbertGroup(nn.Module):
    """The blocks of a group, one after the other."""

    config: AlbertConfig

    def setup(self) -> None:
        """Make the blocks."""
        layer = rematerialised(BertLayer, self.config)
        self.layers = [layer(self.config) for _ in range(self.config.inner_groups)]

    def __call__(
        self,
        x_bld: Float[Array, "b l d"],
        bias_b1ml: Float[Array, "b 1 #l l"] | Seen,
        deterministic: bool,
    ) -> Float[Array, "b l d"]:
        """States [b, l, d] -> [b, l, d]."""
        for layer in self.layers:
            x_bld = layer(x_bld, bias_b1ml, deterministic)
        return x_bld


class AlbertEncoder(BertEncoder):
    """Tokens to states. Parameters: `groups_{g}/layers_{j}`, or `layers_{l}` (and `shared`)."""

    config: AlbertConfig

    def make_layers(self) -> None:
        """Make the groups, or the layers and what they share."""
        cfg = self.config
        if cfg.sharing == "all":
            self.groups = [AlbertGroup(cfg) for _ in range(cfg.num_groups)]
            return
        shared, own = self._parts()
        layer = rematerialised(BertLayer, cfg)
        if shared:
            self.shared = layer(cfg, shared)
        self.layers = [layer(cfg, own) for _ in range(cfg.num_layers)]

    def steps(self) -> list[Layer]:
        """As in `BertEncoder`; a shared part appears several times."""
        cfg = self.config
        if cfg.sharing == "all":
            return [self.groups[cfg.group_of(i)] for i in range(cfg.num_layers)]
        if cfg.sharing == "none":
            return list(self.layers)
        return [self._joined(self.shared, layer) for layer in self.layers]

    def scanned(self) -> tuple[Any, Callable[..., jax.Array]]:
        """As in `BertEncoder`; what layers share is not stacked."""
        cfg = self.config
        if cfg.sharing == "none":
            return super().scanned()
        return self._scanned_groups() if cfg.sharing == "all" else self._scanned_halves()

    def _parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The parts that all layers share, and those that each has for itself."""
        shared = (_SHARED_PART[self.config.sharing],) if self.config.sharing != "none" else ()
        return shared, tuple(part for part in BertLayer.parts if part not in shared)

    def _joined(self, shared: Layer, own: Layer) -> Layer:
        """Join two halves to a whole layer, attention first."""
        first, second = (shared, own) if self.config.sharing == "attention" else (own, shared)
        return lambda x_bld, bias, deterministic: second(
            first(x_bld, bias, deterministic), bias, deterministic
        )

    def _scanned_groups(self) -> tuple[Any, Callable[..., jax.Array]]:
        cfg, group = self.config, AlbertGroup(self.config, parent=None)
        groups = [self.layer_params(f"groups_{g}") for g in range(cfg.num_groups)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *groups) if len(groups) > 1 else None

        def step(g: jax.Array, key: jax.Array | None, *rest: Any) -> jax.Array:
            params = groups[0] if stacked is None else jax.tree.map(lambda x: x[g], stacked)
            return apply_layer(group, params, key, *rest)

        return jnp.array([cfg.group_of(i) for i in range(cfg.num_layers)]), step

    def _scanned_halves(self) -> tuple[Any, Callable[..., jax.Array]]:
        cfg = self.config
        layer = rematerialised(BertLayer, cfg)
        parts = [layer(cfg, part, parent=None) for part in self._parts()]
        shared_params = self.layer_params("shared")
        layers = [self.layer_params(f"layers_{i}") for i in range(cfg.num_layers)]

        def step(params: Any, key: jax.Array | None, *rest: Any) -> jax.Array:
            def half(module: nn.Module, params: Any, number: int) -> Layer:
                own = None if key is None else jax.random.fold_in(key, number)
                return lambda *args: apply_layer(module, params, own, *args)

            shared = half(parts[0], shared_params, 0)
            return self._joined(shared, half(parts[1], params, 1))(*rest)

        return jax.tree.map(lambda *x: jnp.stack(x), *layers), step
