"""Everything that gin may bind in a run, registered by importing this module.

So each entry point takes the config.gin of any run, also where it has no use for a part of it.
"""

from atlas_jax.answering import leaks
from atlas_jax.core import compiler, jsonl, partitioning
from atlas_jax.distillation import config as distillation_config
from atlas_jax.index import passages, refresh, scann_search, staleness
from atlas_jax.reader import config as reader_config
from atlas_jax.reader import generate
from atlas_jax.retriever import config as retriever_config
from atlas_jax.retriever import contrastive
from atlas_jax.tasks import registry
from atlas_jax.training import config, data, optimizers, speed, step

__all__ = [
    "compiler",
    "config",
    "contrastive",
    "data",
    "distillation_config",
    "generate",
    "jsonl",
    "leaks",
    "optimizers",
    "partitioning",
    "passages",
    "reader_config",
    "refresh",
    "registry",
    "retriever_config",
    "scann_search",
    "speed",
    "staleness",
    "step",
]
