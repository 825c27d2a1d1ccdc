"""Queries and passages to embeddings: pooling and one or two encoder towers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer

from atlas_jax.core.adapters import WithPrefixes
from atlas_jax.core.errors import UserError
from atlas_jax.core.packing import Packed, passage_masks
from atlas_jax.core.partitioning import constrain, passage_rows
from atlas_jax.core.types import PAD_ID, Array, Params
from atlas_jax.encoders.bert import check_length
from atlas_jax.encoders.registry import make_encoder
from atlas_jax.retriever.config import RetrieverConfig

TIED = frozenset({"encoder"})
UNTIED = frozenset({"query_encoder", "passage_encoder"})


def pool(
    states_bld: Float[Array, "b l e"], tokens_bl: Integer[Array, "b l"], pooling: str
) -> Float[Array, "b e"]:
    """Reduce the states of a text's real tokens to one vector (Contriever's poolings).

    Args:
        states_bld: Encoder states.
        tokens_bl: The tokens they belong to, pad 0.
        pooling: 'average', 'sqrt' or 'cls'.

    Returns:
        float32 [b, e]; for 'average' and 'sqrt' a text without tokens gives zeros.
    """
    states_bld = states_bld.astype(jnp.float32)
    if pooling == "cls":
        return states_bld[:, 0]
    real_bl1 = (tokens_bl != PAD_ID)[:, :, None]
    sum_be = jnp.sum(jnp.where(real_bl1, states_bld, 0.0), axis=1)
    count_b1 = jnp.maximum(jnp.sum(real_bl1, axis=1), 1).astype(jnp.float32)
    return sum_be / (jnp.sqrt(count_b1) if pooling == "sqrt" else count_b1)


def pool_packed(
    states_bgld: Float[Array, "b g l e"], packed: Packed, pooling: str
) -> Float[Array, "b k e"]:
    """`pool` of passages that share rows; one without any token gives zeros, float32 [b, k, e]."""
    b, _, _, e = states_bgld.shape
    states_bse = states_bgld.astype(jnp.float32).reshape(b, -1, e)  # the rows of a query in a row
    if pooling == "cls":
        numbers_1k1 = jnp.arange(packed.passages, dtype=jnp.int32)[None, :, None]
        own_bks = packed.segments_bgl.reshape(b, 1, -1) == numbers_1k1
        first_bk1 = jnp.argmax(own_bks, axis=2)[..., None]
        first_bke = jnp.take_along_axis(states_bse, first_bk1, axis=1)
        return jnp.where(jnp.any(own_bks, axis=2)[..., None], first_bke, 0.0)
    real_bks = passage_masks(packed)
    # As products with 0 and 1, which no device may round.
    sum_bke = jnp.einsum(
        "bks,bse->bke", real_bks.astype(jnp.float32), states_bse, precision="highest"
    )
    count_bk1 = jnp.maximum(jnp.sum(real_bks, axis=2), 1).astype(jnp.float32)[..., None]
    return sum_bke / (jnp.sqrt(count_bk1) if pooling == "sqrt" else count_bk1)


def normalized(x: Float[Array, "*any e"]) -> Float[Array, "*any e"]:
    """Scale each row to length 1; a zero row stays zero, with a finite gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class DualEncoder(WithPrefixes):
    """The retriever. Score of a passage for a query = inner product of their embeddings.

    Parameters are {'encoder': ...} when tied, else {'query_encoder': ..., 'passage_encoder': ...}.
    Untied towers have separate weights (in the released code they share them).
    """

    config: RetrieverConfig

    def setup(self) -> None:
        """Make one tower or two."""
        if self.config.tied:
            self.encoder = make_encoder(self.config.tower)
        else:
            self.query_encoder = make_encoder(self.config.tower)
            self.passage_encoder = make_encoder(self.config.tower)

    def _embed(self, tower: Any, tokens_bl: jax.Array, deterministic: bool) -> jax.Array:
        check_length(self.config, tokens_bl.shape[1], "the retriever")
        states_bld = tower(tokens_bl, deterministic)
        x_be = pool(states_bld, tokens_bl, self.config.pooling)
        if self.config.normalize:
            x_be = normalized(x_be)
        return constrain(x_be, "batch", "embedding")

    def embed_query(
        self, tokens_bl: Integer[Array, "b l"], deterministic: bool = True
    ) -> Float[Array, "b e"]:
        """Query tokens [b, l] (pad 0) -> float32 embeddings [b, e]."""
        tower = self.encoder if self.config.tied else self.query_encoder
        return self._embed(tower, tokens_bl, deterministic)

    def embed_passage(
        self, tokens_nl: Integer[Array, "n l"], deterministic: bool = True
    ) -> Float[Array, "n e"]:
        """Passage tokens [n, l] (pad 0) -> float32 embeddings [n, e]."""
        tower = self.encoder if self.config.tied else self.passage_encoder
        with passage_rows():
            return self._embed(tower, tokens_nl, deterministic)

    def embed_packed(self, packed: Packed, deterministic: bool = True) -> Float[Array, "b k e"]:
        """Passages of a query that share rows -> float32 embeddings [b, k, e].

        They are those of `embed_passage`. With dropout the draws differ.
        """
        tower = self.encoder if self.config.tied else self.passage_encoder
        b, rows, length = packed.tokens_bgl.shape
        check_length(self.config, length, "the retriever")
        with passage_rows():
            tokens_nl, segments_nl = (
                constrain(x.reshape(b * rows, length), "batch", "length")  # rows of all queries
                for x in (packed.tokens_bgl, packed.segments_bgl)
            )
            states_nld = tower(tokens_nl, deterministic, segments_bl=segments_nl)
        states_bgld = states_nld.reshape(b, rows, length, -1)
        x_bke = pool_packed(states_bgld, packed, self.config.pooling)
        if self.config.normalize:
            x_bke = normalized(x_bke)
        return constrain(x_bke, "batch", None, "embedding")

    def __call__(
        self,
        query_tokens_bl: Integer[Array, "b q"],
        passage_tokens_nl: Integer[Array, "n l"],
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b e"], Float[Array, "n e"]]:
        """Embed both sides, [b, e] and [n, e]; the method to initialise with."""
        return (
            self.embed_query(query_tokens_bl, deterministic),
            self.embed_passage(passage_tokens_nl, deterministic),
        )


def is_tied(params: Params) -> bool:
    """Tell whether retriever parameters have one tower.

    Raises:
        UserError: The top level has other keys than a retriever's.
    """
    keys = frozenset(params)
    if keys not in (TIED, UNTIED):
        raise UserError(
            f"not the parameters of a retriever: top level {sorted(keys)}, expected "
            f"{sorted(TIED)} or {sorted(UNTIED)}"
        )
    return keys == TIED


def untie(params: Params) -> Params:
    """Give queries and passages a tower each; both start as copies of the shared one.

    Args:
        params: {'encoder': ...} (untied parameters are returned as they are).

    Returns:
        {'query_encoder': ..., 'passage_encoder': ...} without shared buffers, so that a
        compiled step may donate both.
    """
    if not is_tied(params):
        return params
    return {name: jax.tree.map(lambda x: x.copy(), params["encoder"]) for name in sorted(UNTIED)}
