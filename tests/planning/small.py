"""A tiny run to be planned, for eight simulated devices."""

from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.planning.run import Run
from atlas_jax.training.chips import CHIPS, Slice

TINY = [
    "ReaderConfig.vocab_size=64", "ReaderConfig.emb_dim=16", "ReaderConfig.num_heads=2",
    "ReaderConfig.head_dim=8", "ReaderConfig.mlp_dim=32", "ReaderConfig.num_encoder_layers=2",
    "ReaderConfig.num_decoder_layers=2", "ReaderConfig.scan_layers=True",
    "ReaderConfig.remat_policy='full'", "RetrieverConfig.vocab_size=48",
    "RetrieverConfig.hidden_dim=16", "RetrieverConfig.num_layers=2",
    "RetrieverConfig.num_heads=2", "RetrieverConfig.mlp_dim=32",
    "RetrieverConfig.max_positions=32", "RetrieverConfig.scan_layers=True",
]  # fmt: skip
RECIPE = [
    "MODEL_DIR=x", "INITIAL_CHECKPOINT_PATH=x", "TRAIN_FILE=x", "STORE=x", "TRAIN_STEPS=100",
    "BATCH_SIZE=8", "K=4", "TEXT_LENGTH=24", "PASSAGE_LENGTH=16", "QUERY_LENGTH=8",
    "TARGET_LENGTH=4", "CorpusConfig.embed_batch_size=8", "EvalConfig.batch_size=8",
]  # fmt: skip
SLICE = Slice("v5e-8", CHIPS["v5e"], 8)


def tiny_run(*more: str, passages: int = 5000) -> Run:
    load_gin(["runs/finetune_qa.gin"], [*TINY, *RECIPE, *more])
    return from_gin.plan_run(passages)
