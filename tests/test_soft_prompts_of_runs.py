"""Readers with prompts and prefixes: a run by each gin file, its partial folder, answers by it."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

import atlas_jax
from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.core.deltas import DeltaConfig, split_delta
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.models.folder import load_model
from atlas_jax.models.new_deltas import check_soft
from tests.reader.small import CONFIG, PAIR
from tests.test_face import QUESTIONS, SETTINGS
from tests.training.runs import write_run

EXPECTED = {  # gin file -> sizes of what a reader of width 16 with 2 x 8 heads keeps
    "prompt": {"token_embedder/prompt/table": 100},
    "p_tuning": {"token_embedder/prompt/table": 9},
    "prefix": {
        f"{stack}/layers_0/{attention}/prefix/{half}": 10
        for stack, attention in (
            ("encoder", "attention"), ("decoder", "self_attention"),
            ("decoder", "encoder_decoder_attention"),
        )
        for half in ("key", "value")
    },
}  # fmt: skip


NO_FILES = ["ModelConfig.reader_tokenizer=''", "ModelConfig.retriever_tokenizer=''"]


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("soft")
    run = write_run(folder, reader_tokenizer_file, retriever_tokenizer_file)
    load_gin([str(run)], ["TrainConfig.model_dir='unused'", "TrainConfig.total_steps=3"])
    told = from_gin.train_run()
    with use_devices(told.devices) as (mesh, rules):
        made = assemble(told.models, mesh, rules, 0)
        export_model(folder / "base", made.models, made.params, made.tokenizers, "float32", {})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_gin_file_trains_and_its_folder_answers(base: Path, name: str) -> None:
    folder = base / "base"
    bindings = [
        f"TrainConfig.model_dir='{base / name}'", "TrainConfig.total_steps=10",
        f"ModelConfig.reader='{folder}'", f"ModelConfig.retriever='{folder}'",
        "EvalConfig.file=''",
    ]  # fmt: skip
    if name != "prefix":  # its retriever has one, too
        bindings.append("StepConfig.retriever_training='fixed'")
    load_gin([str(base / "run.gin"), f"deltas/{name}.gin"], bindings + NO_FILES)
    atlas_jax.train(from_gin.train_run())
    own = load_file(base / name / "final" / "reader.safetensors")
    assert {path: len(leaf) for path, leaf in own.items()} == EXPECTED[name]
    whole, after = load_model(folder), load_model(base / name / "final")
    kept, _ = split_delta(after["reader"].params)
    jax.tree.map(np.testing.assert_array_equal, kept, whole["reader"].params)
    if name == "prompt":  # begins as rows of the token table, and has moved since
        rows = set(map(bytes, np.asarray(whole["reader"].params["token_embedder"]["embedding"])))
        assert not rows & set(map(bytes, own["token_embedder/prompt/table"]))
    atlas = atlas_jax.load(folder, passages=base / "passages.jsonl", **SETTINGS)
    atlas.add("soft", base / name / "final")
    alone = atlas_jax.load(base / name / "final", passages=base / "passages.jsonl", **SETTINGS)
    answers = alone.ask(QUESTIONS)
    assert answers == atlas.ask(QUESTIONS, delta="soft")
    assert [a.log_probability for a in answers] != [a.log_probability for a in atlas.ask(QUESTIONS)]
    with pytest.raises(UserError, match="only LoRA can be merged into the model"):
        alone.save(base / f"{name}_merged", merge=True)


def test_a_prompt_begins_as_rows_of_the_table(base: Path) -> None:
    folder, words = base / "base", "['what is', 'capital']"
    bindings = [
        "TrainConfig.model_dir='unused'", "TrainConfig.total_steps=3",
        f"ModelConfig.reader='{folder}'", f"ModelConfig.retriever='{folder}'",
        "reader/DeltaConfig.length=5", f"reader/DeltaConfig.words={words}", "MeshConfig.model=2",
    ]  # fmt: skip
    load_gin([str(base / "run.gin"), "deltas/prompt.gin"], bindings + NO_FILES)
    told = from_gin.train_run()
    with use_devices(told.devices) as (mesh, rules):
        made = assemble(told.models, mesh, rules, 0, "joint")
        embedder = jax.device_get(made.params["reader"]["token_embedder"])
    table, found = embedder["embedding"], embedder["prompt"]["table"]
    for row, word in enumerate(("what is", "capital")):
        ids = made.tokenizers.reader.encode(word, False)
        np.testing.assert_allclose(found[row], table[ids].mean(axis=0), rtol=1e-5, atol=1e-6)
    common = set(map(bytes, table[:5000]))
    assert all(bytes(row) in common for row in found[2:])
    flat = traverse_util.flatten_dict(made.params["retriever"], sep="/")
    assert not any("prompt" in path for path in flat)


def test_what_has_no_place_is_refused() -> None:
    plain, prompt, prefix = CONFIG, DeltaConfig("prompt"), DeltaConfig("prefix")
    check_soft({"reader": prompt, "retriever": prefix}, plain)
    with pytest.raises(UserError, match="a retriever has no prompt"):
        check_soft({"retriever": prompt}, plain)
    for delta in (prompt, prefix, DeltaConfig("prefix", places=("encoder", "cross"))):
        with pytest.raises(UserError, match="use 'prefix' with places = .'decoder', 'cross'."):
            check_soft({"reader": delta}, PAIR)
    check_soft({"reader": DeltaConfig("prefix", places=("decoder", "cross"))}, PAIR)
