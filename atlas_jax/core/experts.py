"""Switch layers: a feed-forward block of several experts, of which each token goes through one.

Method of Switch Transformers (arXiv 2101.03961); names of the parameters and their logical axes as
in T5X (flaxformer: architectures/moe/moe_layers.py, routing.py):

    mlp/router/router_weights/w/kernel      [embed, unmodeled]
    mlp/expert/wi/kernel                    [expert, embed, expert_mlp]; wi_0, wi_1 if gated
    mlp/expert/wo/kernel                    [expert, expert_mlp, embed]

A router gives each token its probabilities p = softmax(x R) in float32. The token goes to the most
probable expert, and what that returns is multiplied by its p. An expert takes `capacity` tokens of
a text, first come, first served. What finds no place passes by the residual alone. Tokens are sent
and returned by products with one-hot arrays, which divide over the mesh axis `expert`.

Tokens of one text compete for places, where T5X groups about 4,096 tokens of several texts: so what
becomes of a text does not depend on the others of its batch, and padding, which stands behind the
text, takes no place from it. A single token, as in cached decoding, always finds one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Bool, Float

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.layers import Dense, Initializer
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import Array

ROUTING = "routing"  # the collection in which routers leave what they decided
_FEWEST = 4  # places of an expert, as in flaxformer (min_expert_capacity)
_router_init = initializers.normal(0.02)  # flaxformer's, instead of the paper's


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertFields:
    """Fields of the config of a model that may have Switch layers.

    Attributes:
      num_experts: of each Switch layer; 0 = there is none.
      expert_every: of so many layers the last has experts: with 2 the second, the fourth...
      train_capacity_factor: places of all experts together, as a multiple of a text's tokens.
      eval_capacity_factor: the same where nothing trains.
      balance_weight: what the loss that spreads tokens evenly counts in training.
    """

    num_experts: bounds.AtLeast0 = 0
    expert_every: bounds.AtLeast1 = 2
    train_capacity_factor: bounds.Positive = 1.25
    eval_capacity_factor: bounds.Positive = 2.0
    balance_weight: bounds.NotNegative = 0.01

    def is_switch(self, layer: int) -> bool:
        """Whether the layer of this number has experts."""
        return self.num_experts > 0 and layer % self.expert_every == self.expert_every - 1

    def check_experts(self, layers: int, refused: str = "") -> None:
        """Refuse experts that the model cannot have, and settings of experts without any.

        Args:
          layers: of the model's shallowest stack.
          refused: why this model has none, if it has none.

        Raises:
          UserError: names class and field.
        """
        name = type(self).__name__
        if not self.num_experts:
            for field in dataclasses.fields(ExpertFields)[1:]:
                if getattr(self, field.name) != field.default:
                    raise UserError(
                        f"{name}.{field.name} = {getattr(self, field.name)!r}: there are no "
                        f"experts; bind {name}.num_experts"
                    )
            return
        if refused:
            raise UserError(f"{name}.num_experts = {self.num_experts}: must be 0; {refused}")
        if self.expert_every > layers:
            raise UserError(
                f"{name}.expert_every = {self.expert_every}: no layer would have experts; use at "
                f"most {layers}, the number of layers"
            )


EXPERT_FIELDS = frozenset(field.name for field in dataclasses.fields(ExpertFields))


@flax.struct.dataclass
class Routing:
    """What a router decided for the tokens of n texts.

    Attributes:
      probs_nle: float32 probabilities of the experts.
      chosen_nle: float32, 1 for the expert that each token goes to.
      kept_nl: whether the token found a place.
    """

    probs_nle: Array
    chosen_nle: Array
    kept_nl: Array


def capacity(length: int, num_experts: int, factor: float) -> int:
    """Places that an expert has for a text of so many tokens."""
    return min(length, max(_FEWEST, round(factor * length / num_experts)))


class _RouterWeights(nn.Module):
    """The router's product, below the two names that T5X has for it."""

    num_experts: int

    @nn.compact
    def __call__(self, x_nld: jax.Array) -> jax.Array:
        axes = ("embed", "unmodeled")
        return Dense(self.num_experts, axes, kernel_init=_router_init, name="w")(x_nld)


class Router(nn.Module):
    """Logits of the experts for each token, in float32."""

    num_experts: int

    @nn.compact
    def __call__(self, x_nld: Float[Array, "n l d"]) -> Float[Array, "n l {self.num_experts}"]:
        """States [n, l, d] -> float32 logits [n, l, experts]."""
        weights = _RouterWeights(self.num_experts, name="router_weights")
        return weights(x_nld.astype(jnp.float32))


class ExpertDense(nn.Module):
    """A product of each expert's own, over the last axis."""

    features: int
    kernel_axes: tuple[str, str]
    use_bias: bool
    dtype: Any
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x_enci: jax.Array) -> jax.Array:
        """[experts, n, places, in] -> [experts, n, places, features]."""
        experts = x_enci.shape[0]
        kernel: Any = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, ("expert", *self.kernel_axes)),
            (experts, x_enci.shape[-1], self.features),
            jnp.float32,
        )
        y = jnp.einsum(
            "enci,eio->enco", x_enci, kernel.astype(self.dtype), preferred_element_type=jnp.float32
        ).astype(self.dtype)
        if self.use_bias:
            bias: Any = self.param(
                "bias",
                nn.with_logical_partitioning(initializers.zeros, ("expert", self.kernel_axes[1])),
                (experts, self.features),
                jnp.float32,
            )
            y = y + bias.astype(self.dtype)[:, None, None]
        return y


class Experts(nn.Module):
    """The feed-forward blocks of all experts side by side; attributes as of `SwitchMlp`."""

    mlp_dim: int
    activations: Sequence[Callable[[jax.Array], jax.Array]]
    dtype: Any
    kernel_init: Initializer
    use_bias: bool
    dropout_rate: float

    @nn.compact
    def __call__(self, x_encd: jax.Array, deterministic: bool) -> jax.Array:
        """[experts, n, places, d] -> [experts, n, places, d]."""
        dense = functools.partial(
            ExpertDense, use_bias=self.use_bias, dtype=self.dtype, kernel_init=self.kernel_init
        )
        hidden: Any = 1.0
        for i, activation in enumerate(self.activations):
            name = "wi" if len(self.activations) == 1 else f"wi_{i}"
            wi = dense(self.mlp_dim, ("embed", "expert_mlp"), name=name)
            hidden = hidden * activation(wi(x_encd))
        dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))
        hidden = dropout(hidden, deterministic=deterministic)
        hidden = constrain(hidden, "expert", "expert_group", "length", "expert_mlp")
        return dense(x_encd.shape[-1], ("expert_mlp", "embed"), name="wo")(hidden)


class SwitchMlp(nn.Module):
    """A feed-forward block of experts, in place of a plain one.

    Attributes:
      config: `ExpertFields` of the model.
      mlp_dim: width inside of an expert.
      activations: one, or two whose results are multiplied (the gated form).
      dtype: of all but the router, which is float32.
      kernel_init: of the experts' kernels, [experts, in, out].
      use_bias: whether their products have a bias.
      dropout_rate: of the hidden layer.
    """

    config: ExpertFields
    mlp_dim: int
    activations: Sequence[Callable[[jax.Array], jax.Array]]
    dtype: Any
    kernel_init: Initializer
    use_bias: bool = False
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x_nld: Float[Array, "n l d"], deterministic: bool) -> Float[Array, "n l d"]:
        """States [n, l, d] -> what is added to them; zeros for a token without a place.

        Where the collection `ROUTING` is mutable, it gets a `Routing`.

        Args:
          x_nld: of n texts.
          deterministic: no dropout, and the capacity of evaluation.
        """
        cfg = self.config
        factor = cfg.eval_capacity_factor if deterministic else cfg.train_capacity_factor
        places = capacity(x_nld.shape[1], cfg.num_experts, factor)
        probs_nle = jax.nn.softmax(Router(cfg.num_experts, name="router")(x_nld), axis=-1)
        chosen_nle = jax.nn.one_hot(jnp.argmax(probs_nle, axis=-1), cfg.num_experts)
        sent_nlec = places_of(chosen_nle, places)
        if not self.is_initializing():
            kept_nl = jnp.any(sent_nlec, axis=(2, 3))
            self.sow(ROUTING, "decided", Routing(probs_nle, chosen_nle, kept_nl))
        sent_nlec = sent_nlec.astype(self.dtype)
        x_encd = jnp.einsum("nlec,nld->encd", sent_nlec, x_nld.astype(self.dtype))
        x_encd = constrain(x_encd, "expert", "expert_group", "length", "embed")
        experts = Experts(
            self.mlp_dim, self.activations, self.dtype, self.kernel_init, self.use_bias,
            self.dropout_rate, name="expert",
        )  # fmt: skip
        y_encd = constrain(
            experts(x_encd, deterministic), "expert", "expert_group", "length", "embed"
        )
        gate_nl = jnp.sum(probs_nle * chosen_nle, axis=-1)
        returned_nlec = sent_nlec * gate_nl[..., None, None].astype(self.dtype)
        y_nld = jnp.einsum("encd,nlec->nld", y_encd, returned_nlec)
        return constrain(y_nld, "batch", "length", "embed")


def places_of(chosen_nle: Float[Array, "n l e"], places: int) -> Bool[Array, "n l e c"]:
    """The place of each token at its expert, in the order of the text; none if all are taken."""
    before_nle = jnp.cumsum(chosen_nle, axis=1) - chosen_nle
    number_1c = jnp.arange(places, dtype=chosen_nle.dtype)[None, None, None]
    return (chosen_nle[..., None] > 0) & (before_nle[..., None] == number_1c)


# What a router decided, and True for the tokens [n, l] that are no padding.
Routed = list[tuple[Routing, Array]]


def routed_apply(
    apply: Callable[..., Any], routed: Routed | None, real_nl: Array, *args: Any, **kwargs: Any
) -> Any:
    """`apply(*args, **kwargs)` of a model; what its routers decide is added to `routed`.

    Args:
      apply: of a flax module.
      routed: None = nobody asks for it.
      real_nl: True for the tokens that are no padding.
    """
    if routed is None:
        return apply(*args, **kwargs)
    result, variables = apply(*args, **kwargs, mutable=[ROUTING])
    found = jax.tree.leaves(
        variables.get(ROUTING, {}), is_leaf=lambda leaf: isinstance(leaf, Routing)
    )
    routed += [(one, real_nl) for one in found]
    return result


def balance(routed: Routed) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss that spreads tokens evenly, and the share of tokens that found no place.

    For each layer it is E sum_e f_e P_e over the real tokens of the batch, with f_e the share that
    goes to expert e and P_e its mean probability: 1 if both are even, and E at most (arXiv
    2101.03961, equations 4 to 6). Layers are averaged, as in T5X (contrib/moe/models.py), where
    the paper adds them up. The gradient goes through P alone.
    """
    losses, dropped = [], []
    for one, real_nl in routed:
        real_nl1 = real_nl[..., None].astype(jnp.float32)
        count = jnp.maximum(jnp.sum(real_nl1), 1.0)
        share_e = jnp.sum(one.chosen_nle * real_nl1, axis=(0, 1)) / count
        mean_e = jnp.sum(one.probs_nle * real_nl1, axis=(0, 1)) / count
        losses.append(len(share_e) * jnp.sum(share_e * mean_e))
        dropped.append(jnp.sum(~one.kept_nl & real_nl, dtype=jnp.float32) / count)
    return jnp.mean(jnp.stack(losses)), jnp.mean(jnp.stack(dropped))
