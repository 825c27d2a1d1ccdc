"""The passage store of a run: opened, or built when it is not there yet."""

from pathlib import Path

from atlas_jax.core.errors import UserError
from atlas_jax.index.passages import PassageStore, StoreConfig
from atlas_jax.training.assembly import Tokenizers
from atlas_jax.training.config import CorpusConfig


def open_store(config: CorpusConfig, tokenizers: Tokenizers) -> PassageStore:
    """Open the store, or build it from the passages.

    With both bound, a store that is there already has to hold just these passages, as
    StoreConfig formats them.

    Raises:
      UserError: nothing says where the store is or what to build it from, or it was made
        for other tokenizers, or of other passages.
    """
    if not config.store:
        raise UserError("CorpusConfig.store is not given: bind it to the passage store's directory")
    if config.passages:
        return PassageStore.build(
            config.passages,
            config.store,
            tokenizers.reader,
            tokenizers.retriever,
            StoreConfig(),
        )
    if not (Path(config.store) / "manifest.json").exists():
        raise UserError(
            f"CorpusConfig.store = {config.store!r} holds no passage store yet: bind "
            "CorpusConfig.passages to a jsonl corpus to build it"
        )
    return PassageStore.open(config.store, tokenizers.reader, tokenizers.retriever)
