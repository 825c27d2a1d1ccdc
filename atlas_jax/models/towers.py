"""The two towers of the retriever as functions of parameters and tokens."""

from collections.abc import Callable

from jaxtyping import Float, Integer

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
    tokens: Integer[Array, "n l"],
    dropout_key: Array | None = None,
) -> Float[Array, "n e"]:
    """Embed tokens, [n, l] -> [n, e], with the named tower; dropout only with a key."""
    return retriever.apply(
        {"params": params},
        tokens,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method=tower,
    )
