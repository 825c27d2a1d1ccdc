"""`make explore` serves the demo's trained model if it is there, else the shipped pair."""

from pathlib import Path

from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.demo.explore import command, index_command
from atlas_jax.models.config import ModelConfig


def bound(arguments: list[str]) -> list[str]:
    files = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file=")]
    load_gin(files, [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")])
    models, corpus = from_gin.told(ModelConfig), from_gin.told(CorpusConfig)
    return [models.reader, corpus.store, corpus.index, from_gin.serve_config().examples]


def test_the_trained_model_or_the_shipped_one(tmp_path: Path) -> None:
    demo, out = tmp_path / "a demo", tmp_path / "out"
    trained = demo / "jointly_trained" / "final"
    (out / "data").mkdir(parents=True)
    (out / "data" / "test.jsonl").touch()  # as if it were prepared
    reader, store, index, examples = bound(command(demo, out))
    assert (Path(reader).name, index) == ("nano", str(out / "index"))
    indexing = index_command(command(demo, out))
    assert bound(indexing)[:3] == [reader, store, index]
    assert any(one.startswith("--gin.PASSAGES=") for one in indexing)
    (out / "index").mkdir()
    (out / "index" / "index.json").touch()
    assert index_command(command(demo, out)) == []
    assert (store, examples) == (str(out / "store"), str(out / "data" / "test.jsonl"))
    trained.mkdir(parents=True)
    (trained / "config.json").touch()
    examples = str(demo / "data" / "questions_asked.jsonl")
    store = str(demo / "store")
    assert bound(command(demo, out)) == [str(trained), store, str(demo / "index"), examples]
    assert from_gin.told(CorpusConfig).reader_states == ""
    (demo / "reader_states").mkdir()
    bound(command(demo, out))
    assert from_gin.told(CorpusConfig).reader_states == str(demo / "reader_states")
    (demo / "taught_index").mkdir()
    assert bound(command(demo, out)) == [str(trained), store, str(demo / "taught_index"), examples]
