"""Runs that train a part: their partial folders, read alone and several at once over one base."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

import atlas_jax
from atlas_jax import from_gin
from atlas_jax.answering.atlas import Atlas
from atlas_jax.core.config import load_gin
from atlas_jax.core.deltas import DeltaConfig, split_delta
from atlas_jax.core.devices import use_devices
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.models.config import ModelConfig
from atlas_jax.models.folder import load_model
from tests.test_face import QUESTIONS, SETTINGS
from tests.training.runs import write_run

pytestmark = pytest.mark.slow  # four short runs

LORA = {"reader": DeltaConfig("lora", 2), "retriever": DeltaConfig("lora", 2)}


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> Path:
    """Two base models, and runs on the first: LoRA with two seeds, patterns, patterns on LoRA."""
    folder = tmp_path_factory.mktemp("deltas")
    load_gin(
        [str(write_run(folder, reader_tokenizer_file, retriever_tokenizer_file))],
        ["TrainConfig.model_dir='unused'", "TrainConfig.total_steps=3", "EvalConfig.file=''"],
    )
    told = from_gin.train_run()
    with use_devices(told.devices) as (mesh, rules):
        for seed, name in enumerate(("base", "other")):
            made = assemble(told.models, mesh, rules, seed)
            parts = made.models, made.params, made.tokenizers
            export_model(folder / name, *parts, "float32", {})

    def train(name: str, base: Path, seed: int = 0, patterns: tuple[str, ...] = ()) -> None:
        models = dataclasses.replace(
            told.models,
            config=ModelConfig(reader=str(base), retriever=str(base)),
            deltas={} if patterns else LORA,
        )
        run = dataclasses.replace(
            told,
            models=models,
            train=dataclasses.replace(told.train, model_dir=str(folder / name), seed=seed),
            step=dataclasses.replace(told.step, train=patterns),
        )
        atlas_jax.train(run)

    train("one", folder / "base")
    train("two", folder / "base", seed=1)
    train("part", folder / "base", patterns=("reader/decoder/*/wo/kernel",))
    train("more", folder / "one" / "final", patterns=("reader/*/lora/*/kernel", "reader/*norm*"))
    return folder


@pytest.fixture(scope="module")
def atlas(work: Path) -> Atlas:
    loaded = atlas_jax.load(work / "base", passages=work / "passages.jsonl", **SETTINGS)
    for name in ("one", "two", "part"):
        loaded.add(name, work / name / "final")
    return loaded


def test_a_run_leaves_what_it_trained_and_no_more(work: Path) -> None:
    base, final = load_model(work / "base"), work / "part" / "final"
    kept = load_file(final / "reader.safetensors")
    assert list(kept) == ["decoder/layers_0/mlp/wo/kernel"]
    assert load_file(final / "retriever.safetensors") == {}
    found = load_model(final)["reader"].params
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), found, base["reader"].params)
    paths = traverse_util.flatten_dict(changed, sep="/")
    assert [path for path, moved in paths.items() if moved] == list(kept)
    small = load_model(work / "one" / "final")
    for part in ("reader", "retriever"):
        names = load_file(work / "one" / "final" / f"{part}.safetensors")
        assert names and all("/lora/" in name for name in names)
    # Query-side training gives the query tower LoRA, and leaves the passage tower as it was.
    tower = small["retriever"].params["passage_encoder"]
    jax.tree.map(np.testing.assert_array_equal, tower, base["retriever"].params["encoder"])


def test_a_run_on_a_partial_folder_stands_on_the_same_base(work: Path) -> None:
    names = load_file(work / "more" / "final" / "reader.safetensors")
    assert {name.partition("lora/")[1] for name in names} == {"", "lora/"}
    (work / "one" / "final").rename(work / "away")  # the folder between is not needed
    own, small = split_delta(load_model(work / "more" / "final")["reader"].params)
    (work / "away").rename(work / "one" / "final")
    base = load_model(work / "base")["reader"].params
    assert np.any(
        own["decoder"]["decoder_norm"]["scale"] != base["decoder"]["decoder_norm"]["scale"]
    )
    np.testing.assert_array_equal(
        own["token_embedder"]["embedding"], base["token_embedder"]["embedding"]
    )
    before = split_delta(load_model(work / "one" / "final")["reader"].params)[1]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), small, before)
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ["one", "two", "part"])
def test_a_named_delta_answers_as_its_folder_does_alone(
    atlas: Atlas, work: Path, name: str
) -> None:
    alone = atlas_jax.load(work / name / "final", passages=work / "passages.jsonl", **SETTINGS)
    assert alone.ask(QUESTIONS) == atlas.ask(QUESTIONS, delta=name)
    assert atlas.ask(QUESTIONS, delta=name) != atlas.ask(QUESTIONS)
    file = work / "train.jsonl"
    assert alone.evaluate(file).scores == atlas.evaluate(file, delta=name).scores
    assert alone.retrieve(QUESTIONS, k=4) == atlas.retrieve(QUESTIONS, k=4, delta=name)


def test_deltas_of_one_form_are_switched_without_compiling(atlas: Atlas) -> None:
    first = atlas.ask(QUESTIONS, delta="one")
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _seconds, **_: compiled.append(event) if "compile" in event else None
    )
    second = atlas.ask(QUESTIONS, delta="two")
    assert atlas.ask(QUESTIONS, delta="one") == first != second
    assert compiled == []


def test_deltas_share_the_arrays_of_their_base(atlas: Atlas) -> None:
    def table(name: str) -> jax.Array:
        params: jax.Array = atlas._variants[name].params["reader"]["token_embedder"]["embedding"]
        return params

    assert table("one") is table("two") is table("part") is table("")


def test_what_stands_on_another_base_is_refused(atlas: Atlas, work: Path) -> None:
    other = atlas_jax.load(work / "other", passages=work / "passages.jsonl", **SETTINGS)
    with pytest.raises(
        atlas_jax.UserError,
        match=r"its reader stands on a reader with the fingerprint \w{12}; the one that is loaded",
    ):
        other.add("one", work / "one" / "final")
    with pytest.raises(atlas_jax.UserError, match=r"fingerprint \w{12}; .*other holds \w{12}"):
        atlas_jax.load(work / "one" / "final", base=work / "other", **SETTINGS)
    with pytest.raises(atlas_jax.UserError, match="its reader is whole and stands on no base"):
        atlas.add("base", work / "base")
    with pytest.raises(atlas_jax.UserError, match="no delta is called 'tow'; did you mean two"):
        atlas.ask(QUESTIONS, delta="tow")
    alone = atlas_jax.load(work / "one" / "final", **SETTINGS)
    with pytest.raises(atlas_jax.UserError, match="the reader that is loaded is no whole model"):
        alone.add("two", work / "two" / "final")


def test_a_saved_delta_is_whole_again(work: Path) -> None:
    partial = atlas_jax.load(work / "one" / "final", base=work / "base", **SETTINGS)
    partial.save(work / "whole")
    (work / "base").rename(work / "moved")
    whole = atlas_jax.load(work / "whole", **SETTINGS)
    (work / "moved").rename(work / "base")
    assert whole.ask(QUESTIONS) == partial.ask(QUESTIONS)


def test_merged_lora_answers_alike_and_is_a_plain_model(work: Path) -> None:
    partial = atlas_jax.load(work / "two" / "final", **SETTINGS)
    partial.save(work / "merged", merge=True)
    merged = load_model(work / "merged")
    assert not any(part.deltas for part in merged.values())
    assert not split_delta(merged["reader"].params)[1]
    answers = zip(
        atlas_jax.load(work / "merged", **SETTINGS).ask(QUESTIONS), partial.ask(QUESTIONS),
        strict=True,
    )  # fmt: skip
    for ours, theirs in answers:
        assert ours.text == theirs.text
        assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-4)
