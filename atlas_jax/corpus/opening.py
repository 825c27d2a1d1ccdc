"""Open the corpus of a run: its store, and the index that is searched first."""

from pathlib import Path

from jax.sharding import Mesh

from atlas_jax.core.errors import UserError
from atlas_jax.core.objects import Objects
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.corpus.config import CorpusSpec
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.corpus.reader_states import PassageReader, reader_states
from atlas_jax.index.embed import longest_of
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_build import MANIFEST, Cut
from atlas_jax.index.versions import numbers_of
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.dual_encoder import DualEncoder


def open_store(spec: CorpusSpec, tokenizers: Tokenizers) -> LivingStore:
    """Open the store as of the version that is told, or build it from the passages.

    If both are bound and the store exists, it must hold exactly these passages, formatted as
    StoreConfig says. A store that was changed since is not compared with them any more.

    Raises:
      UserError: neither store nor passages are bound, the store was made for other
        tokenizers or from other passages, or it has no such version.
    """
    config = spec.config
    if not config.store:
        raise UserError("CorpusConfig.store is not given: bind it to the passage store's directory")
    if config.passages and not numbers_of(config.store):
        PassageStore.build(
            config.passages,
            config.store,
            tokenizers.reader,
            tokenizers.retriever,
            spec.formats,
            spec.rows,
            cut=Cut(workers=config.workers),
        )
    elif not Objects(config.store).has(MANIFEST):
        raise UserError(
            f"CorpusConfig.store = {config.store!r} holds no passage store yet: bind "
            "CorpusConfig.passages to a jsonl corpus to build it"
        )
    towers = tokenizers.reader, tokenizers.retriever
    return LivingStore.as_of(config.store, str(config.as_of), *towers)


def check_store(store: PassageStore, retriever: DualEncoder, reader: T5 | None = None) -> None:
    """Refuse a store whose passages the models cannot read.

    Args:
      reader: None where nothing is read.

    Raises:
      UserError: token ids that a model has not, or passages longer than the retriever can read.
    """
    store.check_vocab(retriever=retriever.config.vocab_size)
    if reader is not None:
        store.check_vocab(reader=reader.config.vocab_size)
    most = retriever.config.max_length
    tokens_nm = store.retriever_tokens_nm
    if tokens_nm.shape[1] > most and longest_of(tokens_nm) > most:
        raise UserError(
            f"{store.directory} holds passages of more than {most} retriever tokens, which is all "
            "that the retriever can read; build a store with StoreConfig.retriever_length = "
            f"{most} or less"
        )


def make_corpus(
    spec: CorpusSpec,
    store: PassageStore,
    retriever: DualEncoder,
    tokenizer: Tokenizer,
    mesh: Mesh,
    rules: tuple[Rule, ...],
    retriever_tokens: bool | None,
    reader: T5 | None = None,
    versions: Path | None = None,
) -> Corpus:
    """The corpus of an open store; its index and the reader's states are loaded later.

    Args:
      tokenizer: of the retriever.
      retriever_tokens, versions: see `Corpus`.
      reader: None where nothing is read.

    Raises:
      UserError: the store is of other models, or a setting is at fault.
    """
    check_store(store, retriever, reader)
    embedder = Embedder(retriever, tokenizer, spec.config, mesh, rules)
    return Corpus(store, embedder, spec, mesh, retriever_tokens, versions)


def load_corpus(
    spec: CorpusSpec,
    retriever: DualEncoder,
    params: Params,
    tokenizers: Tokenizers,
    mesh: Mesh,
    rules: tuple[Rule, ...],
    retriever_tokens: bool | None,
    reader: PassageReader | None = None,
) -> Corpus:
    """The corpus of a run that does not train, with its index.

    Args:
      params: of the retriever.
      retriever_tokens: see `Corpus`.
      reader: None where nothing is read.

    Raises:
      UserError: store or index are of other models, or a setting is at fault.
    """
    store, tokenizer = open_store(spec, tokenizers), tokenizers.retriever
    model = reader.model if reader else None
    corpus = make_corpus(spec, store, retriever, tokenizer, mesh, rules, retriever_tokens, model)
    if reader is not None:
        corpus.states = reader_states(spec.config, reader)
    corpus.load_first(params)
    return corpus
