"""New adapters, LoRA, prompts and prefixes: where in both models they may stand, and begin."""

from collections.abc import Callable, Mapping

import jax

from atlas_jax.core.deltas import DeltaConfig, rows_of
from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.models.parameters import Models, RetrieverTraining
from atlas_jax.reader.config import ReaderConfig


def where_deltas_stand(
    deltas: Mapping[str, DeltaConfig], training: RetrieverTraining
) -> dict[str, DeltaConfig]:
    """New deltas by path: the retriever's stands in the towers that train, and in no other.

    So query-side training leaves the passage tower, and thereby the index, as it is.

    Args:
      deltas: by part; kind 'none' is left out.
      training: of the retriever.

    Raises:
      UserError: one for a retriever that does not train.
    """
    deltas = {path: config for path, config in deltas.items() if config.kind != "none"}
    if "retriever" in deltas and training == "fixed":
        raise UserError(
            "retriever/DeltaConfig.kind: the retriever does not train (StepConfig."
            "retriever_training = 'fixed', or the command only answers), so adapters or LoRA "
            "beside it would never learn; bind it to 'none'"
        )
    moved = {"retriever": "retriever/query_encoder"} if training == "query_side" else {}
    return {moved.get(path, path): config for path, config in deltas.items()}


def check_soft(deltas: Mapping[str, DeltaConfig], reader: ReaderConfig) -> None:
    """Refuse prompts and prefixes where they have no meaning.

    Raises:
      UserError: a prompt of a retriever, or what a reader with a pair encoder cannot have.
    """
    for path, config in deltas.items():
        if path != "reader" and config.kind == "prompt":
            raise UserError(
                "retriever/DeltaConfig.kind = 'prompt': a retriever has no prompt, whose texts are "
                "stored without one; use 'prefix'"
            )
        if path != "reader" or reader.encoder != "pair":
            continue
        if config.kind == "prompt" or (
            config.kind == "prefix" and set(config.places or ("encoder",)) & {"encoder"}
        ):
            raise UserError(
                f"reader/DeltaConfig.kind = {config.kind!r}: the encoder of this reader is kept as "
                "it is (ReaderConfig.encoder = 'pair'); use 'prefix' with places = ['decoder', "
                "'cross']"
            )


def begun(
    models: Models,
    params: Params,
    small: Params,
    places: Params,
    tokenizer: Callable[[], Tokenizer],
    seed: int,
) -> Params:
    """A reader's new delta; a prompt without a network begins as rows of the token table."""
    delta = dict(models.deltas).get("reader")
    if delta is None or not delta.begins_as_rows:
        return small
    ids_pw, weights_pw = delta.rows(tokenizer().encode_batch, models.reader.config.vocab_size, seed)
    table = places["token_embedder"]["prompt"]["table"]
    begin = jax.jit(rows_of, out_shardings=table)
    first = begin(params["token_embedder"]["embedding"], ids_pw, weights_pw)
    return {**small, "token_embedder": {"prompt": {"table": first}}}
