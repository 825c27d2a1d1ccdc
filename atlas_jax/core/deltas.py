"""Adapters, LoRA, prompts and prefixes for a given model: places, first values, merging.

Sources: LiST (src/model_adaptation.py), adapter-bert (modeling.py), peft (tuners/lora),
prompt-tuning (configs), P-tuning and PrefixTuning (see `soft_prompts`).
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from atlas_jax.core import adapters, bounds, soft_prompts
from atlas_jax.core.adapters import ADAPTER, INPUT_ADAPTER, LORA
from atlas_jax.core.errors import UserError
from atlas_jax.core.soft_prompts import PREFIX, PREFIX_MLP, PROMPT, PROMPT_NETWORKS
from atlas_jax.core.trees import joined
from atlas_jax.core.types import Params

KINDS = ("none", "adapter", "houlsby", "lora", "prompt", "prefix")

# Place -> path of the module, and which adapter stands there. The first of the two names is that
# of an encoder's module, the second that of a T5's.
_ADAPTER_PLACES: dict[str, tuple[str, str]] = {
    "embedding": (r"embeddings/layer_norm$", ADAPTER),
    "attention": (r"(/attention/output|attention/out)$", ADAPTER),
    "intermediate": (r"(/output|mlp/wo)$(?<!attention/output)", INPUT_ADAPTER),
    "output": (r"(/output|mlp/wo)$(?<!attention/output)", ADAPTER),
}
_LORA_PLACES = {
    "query": r"attention/query$",
    "key": r"attention/key$",
    "value": r"attention/value$",
    "attention": r"(/attention/output|attention/out)$",
    "intermediate": r"(/intermediate|mlp/wi(_\d)?)$",
    "output": r"(/output|mlp/wo)$(?<!attention/output)",
}
_PREFIX_PLACES = {
    "encoder": r"/attention/query$",
    "decoder": r"/self_attention/query$",
    "cross": r"/encoder_decoder_attention/query$",
}
_PLACES: dict[str, dict[str, Any]] = {
    "lora": _LORA_PLACES, "prefix": _PREFIX_PLACES, "prompt": {}, "none": {},
    "adapter": _ADAPTER_PLACES, "houlsby": _ADAPTER_PLACES,
}  # fmt: skip
_NETWORKS: dict[str, tuple[str, ...]] = {"prompt": tuple(PROMPT_NETWORKS), "prefix": ("mlp",)}
_STARTS = ("rows", "uniform", "uniform_released")
_UNIFORM = 0.5
_COMMONEST = 5000  # ids of a vocabulary that the rest of a prompt begins as
_TABLE = re.compile(r"/(word_embeddings|token_embedder)$")
_DEFAULT_PLACES = {
    "none": (), "adapter": ("attention", "output"), "houlsby": ("attention", "output"),
    "lora": ("query", "value"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Small parameters that are trained in a model's place.

    Attributes:
      kind: 'none'; 'adapter', LiST's y + (y A) B, linear unless `activation` says otherwise;
        'houlsby', y + gelu(y A + a) B + b; 'lora', W x + (alpha / rank) B (A x); 'prompt', vectors
        in front of the embedded tokens or at the `{soft}` marks of a template; or 'prefix', keys
        and values in front of those of each attention.
      rank: r of A and B; LiST's is 128, Houlsby's 64, LoRA's 8.
      alpha: of LoRA.
      places: () = attention and output (adapters) or query and value (LoRA). Adapters stand behind
        the output product of 'attention' (in a T5 also of cross-attention), on the activated state
        inside the feed-forward block ('intermediate'), behind its 'output', and behind the
        'embedding' of an encoder. LoRA is added to the product 'query', 'key', 'value',
        'attention', 'intermediate' or 'output'. A prefix stands in the self-attention of an
        'encoder' or 'decoder' and in a decoder's 'cross'-attention; () = in all that there are.
      activation: of kind 'adapter': '' or 'relu'.
      length: p, the vectors of a prompt or the keys of a prefix.
      network: what they are the output of while they train; '' = they train themselves. Of a
        prompt 'lama' or 'fewshot' (P-tuning's two BiLSTMs) or 'mlp'; of a prefix 'mlp'. What a run
        saves in the end has the output alone, with `network` ''.
      width: of the hidden layer of a prefix's network.
      words: what the first vectors of a prompt without a network begin as: the rows of these
        words' tokens (the mean of several). The others begin as rows drawn from the first 5,000
        of the token table, where the commonest tokens are.
      start: what all vectors of a prompt without a network begin as. 'rows' of the token table,
        see `words`; or random numbers, 'uniform' from -0.5 to 0.5 (Lester et al., section 3.2), or
        'uniform_released' from 0 to 0.5, which is what uniform(0.5) of their code draws.

    Adapters stand before dropout, as LiST's; adapter-bert's stand behind it, which is the same
    without dropout.
    """

    kind: str = "none"
    rank: bounds.Width = 8
    alpha: bounds.Positive = 8.0
    places: Sequence[str] = ()
    activation: str = ""
    length: bounds.Length = 20
    network: str = ""
    width: bounds.Width = 512
    words: Sequence[str] = ()
    start: str = "rows"

    def __post_init__(self) -> None:
        """Refuse what no method has.

        Raises:
          UserError: names the binding and what it may be.
        """
        bounds.check(self)
        for name in ("places", "words"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives a list
        if self.kind not in KINDS:
            raise UserError(f"DeltaConfig.kind = {self.kind!r}: use {', '.join(KINDS)}")
        known = _PLACES[self.kind]
        for place in self.places:
            if place not in known:
                raise UserError(
                    f"DeltaConfig.places: {place!r} is no place of {self.kind!r}; it has "
                    f"{', '.join(known) or 'none'}"
                )
        if self.activation not in ("", "relu"):
            raise UserError(f"DeltaConfig.activation = {self.activation!r}: use '' or 'relu'")
        networks = ("", *_NETWORKS.get(self.kind, ()))
        if self.network not in networks:
            names = ", ".join(map(repr, networks))
            raise UserError(f"DeltaConfig.network = {self.network!r}: {self.kind!r} has {names}")
        if self.start not in _STARTS:
            names = ", ".join(map(repr, _STARTS))
            raise UserError(f"DeltaConfig.start = {self.start!r}: use {names}")
        if self.start != "rows" and (self.kind != PROMPT or self.network or self.words):
            raise UserError(
                f"DeltaConfig.start = {self.start!r}: only a prompt without a network and without "
                "words begins so; use 'rows'"
            )

    @property
    def begins_as_rows(self) -> bool:
        """Whether the vectors begin as rows of the token table, which a drawn delta cannot know."""
        return self.kind == PROMPT and not self.network and self.start == "rows"

    def rows(
        self, encode: Callable[..., Sequence[Sequence[int]]], vocab_size: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the token table that a prompt's vectors begin as, see `rows_of`.

        Args:
          encode: texts and False -> their tokens without special ones.
          vocab_size: rows of the table.
          seed: of those that are no word's.

        Returns:
          Ids int32 [p, w] and weights float32 [p, w].

        Raises:
          UserError: a word without a token.
        """
        rng = np.random.default_rng(seed)
        commonest = np.arange(min(vocab_size, _COMMONEST))
        drawn = rng.permutation(np.resize(commonest, max(len(commonest), self.length)))
        given = [list(ids) for ids in encode(list(self.words), False)] if self.words else []
        for word, ids in zip(self.words, given, strict=True):
            if not ids:
                raise UserError(f"DeltaConfig.words: {word!r} has no token")
        given = (given + [[int(i)] for i in drawn])[: self.length]
        ids_pw = np.zeros((self.length, max(map(len, given))), np.int32)
        weights_pw = np.zeros(ids_pw.shape, np.float32)
        for row, ids in enumerate(given):
            ids_pw[row, : len(ids)], weights_pw[row, : len(ids)] = ids, 1 / len(ids)
        return ids_pw, weights_pw

    def sites(self) -> list[tuple[re.Pattern[str], str, str]]:
        """By place: pattern of the modules' paths, name of the new subtree, name of the place."""
        found: list[tuple[re.Pattern[str], str, str]] = []
        if self.kind in _NETWORKS:
            return found
        for place in self.places or _DEFAULT_PLACES[self.kind]:
            if self.kind == "lora":
                found.append((re.compile(_LORA_PLACES[place]), LORA, place))
                continue
            path, name = _ADAPTER_PLACES[place]
            end = "_gelu_tanh" if self.kind == "houlsby" else ""
            end = f"_{self.activation}" if self.activation else end
            found.append((re.compile(path), name + end, place))
        return found


def rows_of(table_vd: Any, ids_pw: Any, weights_pw: Any) -> jax.Array:
    """Weighted sums of rows of a table, [p, d] float32: the mean row of each word."""
    rows_pwd = jnp.take(jnp.asarray(table_vd), ids_pw, axis=0)
    return jnp.einsum("pwd,pw->pd", rows_pwd, jnp.asarray(weights_pw))


def new_delta(boxed: Params, config: DeltaConfig, key: jax.Array) -> Params:
    """First values of the small parameters for a model's tree, which starts as the model was.

    LiST draws A and B with deviation 0.0002 (its constructor's 0.02 is overwritten), Houlsby from a
    truncated normal of 0.001 with biases 0, LoRA A as PyTorch's linear layers and B = 0. A network
    of a prompt or prefix begins as PyTorch's layers do, the table in front of it with deviation 1;
    without one, keys and values have deviation 0.02. A prefix, even of zeros, changes the model:
    its keys take a share of the attention.

    Args:
      boxed: parameters (or their shapes) with their logical axes.
      config: of the method.
      key: each array is drawn by its path's own fold of it.

    Returns:
      The new leaves alone, boxed, at the paths where the modules look for them; a model that scans
      its layers gets them stacked on the axis of its kernels.

    Raises:
      UserError: the model has no such place.
    """
    flat = traverse_util.flatten_dict(boxed, sep="/")
    delta: dict[str, Any] = {}
    if config.kind in _NETWORKS:
        delta = (
            _prompt(flat, config, key) if config.kind == PROMPT else _prefixes(flat, config, key)
        )
    for pattern, name, place in config.sites():
        before = len(delta)
        for path, leaf in flat.items():
            module, _, last = path.rpartition("/")
            if last in ("kernel", "scale") and pattern.search(f"/{module}"):
                delta.update(_leaves(f"{module}/{name}", leaf, config, key))
        if len(delta) == before:
            raise UserError(f"DeltaConfig.places: this model has no place {place!r}")
    return traverse_util.unflatten_dict(delta, sep="/")


def _leaves(path: str, leaf: Any, config: DeltaConfig, key: jax.Array) -> dict[str, Any]:
    """The new leaves at one module, by path."""
    axes = leaf.names if isinstance(leaf, meta.Partitioned) else (None,) * leaf.ndim
    shape = meta.unbox(leaf).shape
    is_norm = path.rpartition("/")[0].endswith("norm")
    stacked, stacked_axes = shape[: -1 if is_norm else -2], axes[: -1 if is_norm else -2]
    (size_in, size_out), (axis_in, axis_out) = ((shape * 2, axes * 2) if is_norm else
                                                (shape[-2:], axes[-2:]))  # fmt: skip
    if ADAPTER in path.rpartition("/")[2]:
        at_input = path.rpartition("/")[2].startswith(INPUT_ADAPTER)
        size_in = size_out = size_in if at_input else size_out
        axis_in = axis_out = axis_in if at_input else axis_out
    sizes = {"down": (size_in, config.rank), "up": (config.rank, size_out)}
    names = {"down": (axis_in, "unsharded"), "up": ("unsharded", axis_out)}
    found: dict[str, Any] = {}

    def add(name: str, value: jax.Array, axes: tuple[Any, ...]) -> None:
        box = isinstance(leaf, meta.Partitioned)
        found[f"{path}/{name}"] = leaf.replace(value=value, names=axes) if box else value

    for half in ("down", "up"):
        own = jax.random.fold_in(key, zlib.crc32(f"{path}/{half}".encode()))
        value = _first(config, half, own, (*stacked, *sizes[half]))
        add(f"{half}/kernel", value, (*stacked_axes, *names[half]))
        if config.kind == "houlsby":
            bias = jnp.zeros((*stacked, sizes[half][1]))
            add(f"{half}/bias", bias, (*stacked_axes, names[half][1]))
    if config.kind == "lora":
        add("scale", jnp.full(stacked, config.alpha / config.rank, jnp.float32), stacked_axes)
    return found


def _prompt(flat: Params, config: DeltaConfig, key: jax.Array) -> dict[str, Any]:
    """The leaves of a prompt beside a model's token table, by path."""
    found = {}
    for path, leaf in flat.items():
        if path.endswith("/embedding") and _TABLE.search(f"/{path.removesuffix('/embedding')}"):
            width = meta.unbox(leaf).shape[-1]
            spread = 0.02 if config.start == "rows" else -_UNIFORM
            shapes = soft_prompts.prompt_shapes(config.length, width, config.network, spread)
            at = f"{path.removesuffix('/embedding')}/{PROMPT}"
            found.update(_small(at, shapes, leaf, key))
    if config.start == "uniform_released":  # as far from 0, but on one side of it
        found = jax.tree.map(jnp.abs, found)
    return found


def _prefixes(flat: Params, config: DeltaConfig, key: jax.Array) -> dict[str, Any]:
    """The leaves of all prefixes, or of the networks that give them, by path."""
    found: dict[str, Any] = {}
    for place in config.places or _PREFIX_PLACES:
        sites = {
            path.removesuffix("/query/kernel"): leaf
            for path, leaf in flat.items()
            if path.endswith("/kernel")
            and re.search(_PREFIX_PLACES[place], f"/{path.removesuffix('/kernel')}")
        }
        if config.places and not sites:
            raise UserError(f"DeltaConfig.places: this model has no place {place!r}")
        for site, leaf in sites.items():
            width, joined_kv = meta.unbox(leaf).shape[-2:]
            if not config.network:
                found.update(_bare_prefix(f"{site}/{PREFIX}", leaf, config, key))
                continue
            stack, kind = soft_prompts.stack_of(site), site.rpartition("/")[2]
            layers = len(soft_prompts.attentions(list(flat), stack, kind))
            layers *= int(np.prod(meta.unbox(leaf).shape[:-2]))  # of which scanned ones are one
            shapes = soft_prompts.prefix_network_shapes(
                config.length, width, config.width, 2 * layers * joined_kv
            )
            path = f"{stack}/{PREFIX_MLP}/{kind}".removeprefix("/")  # the tree may be one stack
            found.update(_small(path, shapes, leaf, key))
    return found


def _bare_prefix(path: str, leaf: Any, config: DeltaConfig, key: jax.Array) -> dict[str, Any]:
    """Keys and values of one attention, stacked and sharded as its kernels are."""
    shape = meta.unbox(leaf).shape
    found: dict[str, Any] = {}
    for half in ("key", "value"):
        own = jax.random.fold_in(key, zlib.crc32(f"{path}/{half}".encode()))
        value = soft_prompts.drawn(own, (*shape[:-2], config.length, shape[-1]), 0.02)
        if isinstance(leaf, meta.Partitioned):
            names = (*leaf.names[:-2], "unsharded", leaf.names[-1])
            found[f"{path}/{half}"] = leaf.replace(value=value, names=names)
        else:
            found[f"{path}/{half}"] = value
    return found


def _small(path: str, shapes: soft_prompts.Shapes, leaf: Any, key: jax.Array) -> dict[str, Any]:
    """Leaves under a path that every device holds whole."""
    found = {}
    for name, (shape, spread) in shapes.items():
        own = jax.random.fold_in(key, zlib.crc32(f"{path}/{name}".encode()))
        value = soft_prompts.drawn(own, shape, spread)
        box = isinstance(leaf, meta.Partitioned)
        names = ("unsharded",) * len(shape)
        found[f"{path}/{name}"] = leaf.replace(value=value, names=names) if box else value
    return found


def _first(config: DeltaConfig, half: str, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if config.kind == "houlsby":
        return 1e-3 * jax.random.truncated_normal(key, -2.0, 2.0, shape)
    if config.kind == "adapter":
        return 2e-4 * jax.random.normal(key, shape)
    if half == "up":
        return jnp.zeros(shape)
    limit = shape[-2] ** -0.5  # Kaiming-uniform with a = sqrt 5
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def trained(params: Params) -> tuple[str, ...]:
    """Patterns of the paths of all small parameters in a tree, LoRA's constant scale apart."""
    return tuple(
        path
        for path in traverse_util.flatten_dict(params, sep="/")
        if set(path.split("/")) & adapters.NAMES and not path.endswith(f"{LORA}/scale")
    )


def folded(params: Params, config: DeltaConfig) -> tuple[Params, DeltaConfig]:
    """Parameters with what the network of a prompt or prefix gives in its place, and their config.

    Both as they were without such a network.
    """
    if not config.network:
        return params, config
    return soft_prompts.folded(params), dataclasses.replace(config, network="")


def with_delta(params: Params, delta: Params) -> Params:
    """The model's parameters and the small ones in one tree."""
    return joined(params, delta)


def split_delta(params: Params) -> tuple[Params, Params]:
    """A tree's own parameters, and the small ones: the inverse of `with_delta`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    own: dict[str, Any] = {}
    small: dict[str, Any] = {}
    for path, leaf in flat.items():
        (small if set(path.split("/")) & adapters.NAMES else own)[path] = leaf
    base, delta = (traverse_util.unflatten_dict(x, sep="/") for x in (own, small))
    return base, delta


def merge_lora(params: Params, sign: float = 1.0) -> Params:
    """Add LoRA to the kernels that it stands beside, and remove it; outputs stay the same.

    Args:
      params: with LoRA and without adapters.
      sign: -1 takes it out again, see `unmerge_lora`.

    Raises:
      UserError: there is an adapter, which is no sum with a kernel.
    """
    base, delta = split_delta(params)
    flat, small = (traverse_util.flatten_dict(x, sep="/") for x in (base, delta))
    other = [path for path in small if f"/{LORA}/" not in path]
    if other:
        raise UserError(f"{other[0]}: only LoRA can be merged into the model")
    for path in [path for path in small if path.endswith("/down/kernel")]:
        place = path.removesuffix("down/kernel")
        product = jnp.matmul(small[path], small[f"{place}up/kernel"], precision="highest")
        scale = jnp.asarray(small[f"{place}scale"])[..., None, None]
        kernel = f"{place.removesuffix(f'{LORA}/')}kernel"
        flat[kernel] = flat[kernel] + sign * scale * product
    return traverse_util.unflatten_dict(flat, sep="/")


def unmerge_lora(params: Params, delta: Params) -> Params:
    """The model as it was before `merge_lora`, with the LoRA beside it again."""
    return with_delta(merge_lora(with_delta(params, delta), -1.0), delta)
