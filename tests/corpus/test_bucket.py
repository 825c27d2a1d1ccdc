"""Store, index and a run's own versions of the index in a bucket; memory takes its place."""

from pathlib import Path

import jax
import numpy as np
import pytest

from atlas_jax import from_gin, retrieve
from atlas_jax.answering.inference import build_index
from atlas_jax.core import objects
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.objects import Objects, place_of
from atlas_jax.corpus.opening import make_corpus, open_store
from atlas_jax.index.changes import Batch, change
from atlas_jax.models.assembly import load_retriever, load_tokenizers
from tests.index.index_files import index_bytes
from tests.training.runs import write_run


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(objects, "_url", lambda root: root.replace("gs://", "memory://"))
    return f"gs://{tmp_path.name}"


@pytest.fixture
def gin_file(tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path) -> str:
    return str(write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_corpus_is_indexed_and_searched_there(
    bucket: str, gin_file: str, tmp_path: Path, dtype: str
) -> None:
    found = []
    for place in (bucket, str(tmp_path / "disk")):
        own = [
            f"CorpusConfig.store='{place}/store'",
            f"CorpusConfig.index='{place}/index'",
            f"CorpusConfig.dtype='{dtype}'",
        ]
        load_gin([gin_file], own)
        assert build_index(from_gin.index_run()) == (16, True)
        assert build_index(from_gin.index_run()) == (16, False)
        output = tmp_path / f"{len(found)}.jsonl"
        flags = [*own, f"RetrieveConfig.file='{tmp_path}/test.jsonl'", "RetrieveConfig.k=5"]
        flags.append(f"RetrieveConfig.output='{output}'")
        assert retrieve.main([f"--gin_file={gin_file}", *(f"--gin.{one}" for one in flags)]) == 0
        found.append(output.read_bytes())
    assert found[0] == found[1]
    there = Objects(f"{bucket}/index")
    kept = {"/".join(n.split("/")[1:]): there.read(n) for n in there.names() if "/" in n}
    assert kept == index_bytes(tmp_path / "disk" / "index")
    with pytest.raises(UserError, match="is in a bucket; change it on a disk"):
        change(f"{bucket}/store", Batch(delete=["p0"]), {})


def test_a_run_keeps_the_versions_of_its_index_there(bucket: str, gin_file: str) -> None:
    load_gin([gin_file], [f"CorpusConfig.store='{bucket}/store'"])
    told = from_gin.index_run()
    with use_devices(told.devices) as (mesh, rules):
        retriever, params, tokenizer = load_retriever(told.models)
        store = open_store(told.corpus, load_tokenizers(told.models.config))
        versions = place_of(f"{bucket}/run") / "index"
        corpus = make_corpus(
            told.corpus, store, retriever, tokenizer, mesh, rules, False, versions=versions
        )
        corpus.load_first(params)
        first, by = np.asarray(corpus.index.embeddings_ne), corpus.encoder_hash
        corpus.refresh(jax.tree.map(lambda x: x * 1.5, params))
        assert corpus.version == 1
        assert not np.array_equal(first, corpus.index.embeddings_ne)
        corpus.load_version(0, by)
        np.testing.assert_array_equal(first, corpus.index.embeddings_ne)
        names = Objects(f"{bucket}/run/index")
        assert {name.partition("/")[0] for name in names.names()} == {"000000", "000001"}
        corpus.keep_versions([])
        assert {name.partition("/")[0] for name in names.names()} == {"000000"}
