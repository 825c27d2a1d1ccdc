"""A saved index of Meta's Atlas as this project's corpus, store and index."""

import array
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, RowsConfig, write_jsonl
from atlas_jax.core.layouts import PassageFields
from atlas_jax.core.objects import Objects
from atlas_jax.core.paths import check_output_file, check_output_folder
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.core.unique import hash_id, repeated
from atlas_jax.corpus.config import CorpusConfig, CorpusSpec
from atlas_jax.corpus.opening import open_store
from atlas_jax.corpus.rounding import new_dtype, tell_chosen
from atlas_jax.index.new_index import new_index
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_build import MANIFEST
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.interop.atlas_corpus import IndexShards, read_passages
from atlas_jax.models.assembly import load_retriever, load_tokenizers
from atlas_jax.models.config import ModelSpec
from atlas_jax.models.fingerprint import encoder_hash
from atlas_jax.models.towers import passage_tower
from atlas_jax.retriever.dual_encoder import DualEncoder

_COSINE = 0.98  # float16 and another cut of long texts change it much less


@dataclasses.dataclass(frozen=True)
class Imported:
    """The result of an import; `cosine` is the median over the passages embedded anew."""

    passages: int
    cosine: float | None = None


def import_corpus(
    files: tuple[str, ...], config: CorpusConfig, prefix_ids: bool, rows: RowsConfig = STRICT
) -> Imported:
    """Write passage files of Atlas (text, infoboxes) as one corpus file, `CorpusConfig.passages`.

    Raises:
      UserError: a record is broken (file and line are named), or the corpus already exists.
    """
    corpus = _new_corpus(config)
    return Imported(write_jsonl(corpus, read_passages(files, prefix_ids, rows)))


def import_index(
    folder: str,
    models: ModelSpec,
    spec: CorpusSpec,
    check: int,
    say: Callable[[str], None] = print,
) -> Imported:
    """Make corpus, store and index from the shards of a saved index.

    The embeddings are copied as they are. To make sure that this model made them, `check` passages
    are embedded anew and compared.

    Raises:
      UserError: a shard is absent, damaged, hostile or of another length; or a setting is missing;
        or another encoder made the embeddings.
    """
    config = spec.config
    for name in ("store", "index"):
        if not getattr(config, name):
            raise UserError(f"CorpusConfig.{name} is not given: bind it to the directory to write")
        check_output_folder(getattr(config, name), f"CorpusConfig.{name}")
    shards = IndexShards(folder)
    retriever, params, tokenizer = load_retriever(models)
    if shards.width != retriever.config.embedding_dim:
        raise UserError(
            f"{folder}: embeddings of {shards.width} numbers; the retriever's have "
            f"{retriever.config.embedding_dim}"
        )

    corpus = _new_corpus(config)
    cosine = _compare(retriever, params, tokenizer, spec.formats, shards, check) if check else None
    if cosine is not None and not cosine >= _COSINE:
        raise UserError(
            f"{folder} was made by another encoder than ModelConfig.retriever: of {check} "
            f"passages embedded anew the median cosine is {cosine:.3f}. Load the model that it "
            "belongs to, or pass --check=0"
        )
    if cosine is not None:
        say(f"{check} passages embedded anew: median cosine {cosine:.4f}")

    made_by = encoder_hash(retriever.config, params, tokenizer)
    before = Objects(config.store).has(MANIFEST)
    try:
        _write_corpus(corpus, shards)
        store = open_store(spec, load_tokenizers(models.config))
        _take_over(shards, config, store, made_by)
    except BaseException:  # the next attempt would refuse to overwrite the corpus
        corpus.unlink(missing_ok=True)
        if not before:
            Objects(config.store).remove()
        raise
    return Imported(store.count, cosine)


def _write_corpus(corpus: Path, shards: IndexShards) -> None:
    """Write the passages of all shards.

    Raises:
      UserError: two passages have the same id; names their shards.
    """
    hashes = array.array("Q")

    def records() -> Iterator[PassageFields]:
        for shard in range(shards.count):
            for record in shards.passages(shard):
                hashes.append(hash_id(record["id"]))
                yield record
        _check_unique(np.asarray(hashes, np.uint64), shards)

    write_jsonl(corpus, records())


def _check_unique(hashes_n: np.ndarray, shards: IndexShards) -> None:
    for row, first in repeated(hashes_n, lambda row: shards.at(row)[0]["id"]):
        passage, place = shards.at(row)
        raise UserError(
            f"{place} has the id {passage['id']!r}, and so has {shards.at(first)[1]}; every "
            "passage needs an id of its own"
        )


def _take_over(shards: IndexShards, config: CorpusConfig, store: PassageStore, by: str) -> None:
    tell_chosen(config, store.count, shards.width)
    dtype = new_dtype(config, store.count, shards.width)
    with new_index(config.index, store, by, shards.width, dtype) as out_ne:
        start = 0
        for shard in range(shards.count):
            part = shards.embeddings(shard)
            out_ne[start : start + len(part)] = part
            start += len(part)


def _new_corpus(config: CorpusConfig) -> Path:
    if not config.passages:
        raise UserError("CorpusConfig.passages is not given: bind it to the jsonl file to write")
    if not isinstance(config.passages, str):
        raise UserError("CorpusConfig.passages: bind it to the one jsonl file to write")
    path = check_output_file(config.passages, "CorpusConfig.passages")
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another CorpusConfig.passages")
    return path


def _compare(
    retriever: DualEncoder,
    params: Params,
    tokenizer: Tokenizer,
    formats: StoreConfig,
    shards: IndexShards,
    check: int,
) -> float:
    """Median cosine of stored and fresh embeddings, of evenly spread rows of the first shard."""
    records = shards.passages(0)
    rows = np.unique(np.linspace(0, len(records) - 1, check).astype(np.int64))
    texts = [formats.text("retriever", records[row]) for row in rows]
    tokens = tokenizer.pad_to(tokenizer.encode_batch(texts, True), formats.retriever_length)
    embed = jax.jit(passage_tower(retriever))
    fresh, stored = np.asarray(embed(params, tokens)), shards.embeddings(0)[rows]
    lengths = np.linalg.norm(fresh, axis=1) * np.linalg.norm(stored, axis=1)
    return float(np.median(np.sum(fresh * stored, axis=1) / np.maximum(lengths, 1e-12)))
