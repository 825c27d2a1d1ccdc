"""A tiny Atlas for the tests of the step: models, a random index and a batch."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.core.types import Batch, DeviceIndex
from atlas_jax.index.placement import rows_sharding
from atlas_jax.models.parameters import Models
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder

READER_VOCAB, RETRIEVER_VOCAB, ROWS = 64, 48, 40


def tiny_models(dropout: float = 0.0, tied: bool = False, **reader: object) -> Models:
    """One layer each (compiling takes the time); sizes that divide over 4 x 2 devices."""
    fields = dict(
        vocab_size=READER_VOCAB, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
        num_encoder_layers=1, num_decoder_layers=1, dropout_rate=dropout,
    )  # fmt: skip
    return Models(
        T5(ReaderConfig(**{**fields, **reader})),  # type: ignore[arg-type]
        DualEncoder(
            RetrieverConfig(
                vocab_size=RETRIEVER_VOCAB,
                hidden_dim=16,
                num_layers=2,
                num_heads=2,
                mlp_dim=32,
                max_positions=16,
                dropout_rate=dropout,
                tied=tied,
            )  # fmt: skip
        ),
    )


def random_index(mesh: Mesh, seed: int = 0, rows: int = ROWS) -> DeviceIndex:
    """Random embeddings and tokens, rows spread over the mesh, the last three padding."""
    rng = np.random.default_rng(seed)
    every = rows_sharding(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    embeddings = rng.standard_normal((rows, 16), np.float32)
    reader = rng.integers(3, READER_VOCAB, (rows, 9))
    reader[::3, 6:] = 0
    retriever = rng.integers(3, RETRIEVER_VOCAB, (rows, 7))
    retriever[1::3, 4:] = 0
    return DeviceIndex(
        embeddings_ne=jax.device_put(embeddings, every),
        reader_tokens_nl=jax.device_put(reader.astype(np.uint16), every),
        retriever_tokens_nm=jax.device_put(retriever.astype(np.uint16), every),
        count=jax.device_put(jnp.int32(rows - 3), whole),
        version=jax.device_put(jnp.int32(0), whole),
    )


def random_batch(seed: int = 1, rows: int = 8) -> Batch:
    """Ragged queries and targets; the last row only fills the batch."""
    rng = np.random.default_rng(seed)

    def ragged(high: int, width: int, shortest: int) -> np.ndarray:
        lengths = rng.integers(shortest, width + 1, (rows, 1))
        tokens = rng.integers(3, high, (rows, width))
        return np.where(np.arange(width) < lengths, tokens, 0).astype(np.int32)

    targets = ragged(READER_VOCAB, 5, 2)
    ends = (targets > 0).sum(1) - 1
    targets[np.arange(rows), ends] = 1
    excluded = rng.integers(0, ROWS - 3, (rows, 2)).astype(np.int32)
    excluded[:, 1] = -1
    return Batch(
        query_tokens_bq=ragged(READER_VOCAB, 6, 3),
        retriever_tokens_br=ragged(RETRIEVER_VOCAB, 6, 3),
        target_tokens_bt=targets,
        excluded_rows_bx=excluded,
        weight_b=np.array([1] * (rows - 1) + [0], np.float32),
    )
