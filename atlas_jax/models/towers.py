"""The two towers of the retriever as functions of parameters and tokens."""

from collections.abc import Callable

from jaxtyping import Float, Integer

from atlas_jax.core.packing import Inputs, Packed
from atlas_jax.core.types import Array, Batch, Params
from atlas_jax.retriever.dual_encoder import DualEncoder


def embed_query(retriever: DualEncoder, params: Params, batch: Batch) -> Float[Array, "b e"]:
    """Query embeddings [b, e] without dropout, by ``params["retriever"]``; searchers take them."""
    return embed(retriever, params["retriever"], "embed_query", batch.retriever_tokens_br)


def passage_tower(retriever: DualEncoder) -> Callable[[Params, Array], Array]:
    """The function (parameters of the retriever, tokens_nm) -> embeddings_ne, without dropout."""
    return lambda params, tokens_nm: embed(retriever, params, "embed_passage", tokens_nm)


def embed(
    retriever: DualEncoder,
    params: Params,
    tower: str,
    tokens: Integer[Array, "n l"] | Packed,
    dropout_key: Array | None = None,
) -> Float[Array, "*n e"]:
    """Embed tokens, [n, l] -> [n, e], with the named tower; dropout only with a key.

    Packed passages give [b, k, e].
    """
    return retriever.apply(
        {"params": params},
        tokens,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method=tower,
    )


def embed_passages(
    retriever: DualEncoder, params: Params, given: Inputs, dropout_key: Array | None = None
) -> Float[Array, "b k e"]:
    """Embed k passages a query, each in a row of its own or packed, with the passage tower."""
    if isinstance(given, Packed):
        return embed(retriever, params, "embed_packed", given, dropout_key)
    b, k, m = given.shape
    flat = given.reshape(b * k, m)  # every passage on its own
    return embed(retriever, params, "embed_passage", flat, dropout_key).reshape(b, k, -1)
