"""Labelled examples behind a prompt: which are drawn, how they are written, what is averaged."""

import dataclasses
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.models.encoder_folder import load_encoder
from atlas_jax.training.as_gin import as_gin
from atlas_jax.training.classifier_config import DemonstrationConfig
from atlas_jax.training.classifier_scores import Classifier
from atlas_jax.training.classifier_trainer import train_classifier
from atlas_jax.training.config import CheckpointConfig
from atlas_jax.training.demonstrations import candidates, demonstrated
from atlas_jax.training.prompted import prompt_texts
from tests.training.classified import TASK
from tests.training.test_classifier_trainer import told, work

__all__ = ["work"]  # a fixture

RANDOM = DemonstrationConfig("random", draws=3)
LENGTH = 48


def records(work: Path) -> Any:
    return TASK.load(str(work / "train.jsonl"))


def made(work: Path, config: DemonstrationConfig = RANDOM, **more: Any) -> Any:
    tokenizer = load_encoder(work / "encoder").tokenizer
    support = records(work)
    given = more.pop("records", support)
    return demonstrated(TASK, given, support, tokenizer, LENGTH, config, 7, **more), tokenizer


def pieces(tokens_l: np.ndarray, tokenizer: Tokenizer) -> list[list[int]]:
    """A row's parts, each without its end token."""
    ends = np.flatnonzero(tokens_l == tokenizer.eos_id)
    return [list(part) for part in np.split(tokens_l, ends + 1)[:-1]]


def test_a_row_is_the_prompt_and_an_example_of_each_label(work: Path) -> None:
    shown, tokenizer = made(work)
    alone = prompt_texts(TASK, records(work), tokenizer, LENGTH)
    index = np.stack([np.arange(16), np.full(16, 5)], axis=1)
    rows = shown.rows(index)
    written = {}
    for label, word in enumerate(("small", "large")):
        ids = np.where(
            alone.tokens_bl == tokenizer.mask_id, tokenizer.encode(word, False)[0], alone.tokens_bl
        )
        for number in np.flatnonzero(alone.labels_b == label):
            written[tuple(ids[number, 1:][ids[number, 1:] != 0])] = (label, int(number))
    for row in range(16):
        text, *examples = pieces(rows.tokens_bl[row], tokenizer)
        own = alone.tokens_bl[row]
        assert text == list(own[own != 0])
        assert rows.tokens_bl[row, rows.mask_at_b[row]] == tokenizer.mask_id
        found = [written[tuple(example)] for example in examples]
        assert [label for label, _ in found] == [0, 1]
        assert row not in [number for _, number in found]  # never itself
    again = shown.rows(index)
    np.testing.assert_array_equal(again.tokens_bl, rows.tokens_bl)
    other = shown.rows(index + np.array([[0, 1]]))
    assert (other.tokens_bl != rows.tokens_bl).any(axis=1).sum() >= 12
    np.testing.assert_array_equal(shown.at(5).rows(np.arange(16)).tokens_bl, rows.tokens_bl)


def test_long_lines_are_cut_at_their_ends_and_masks_are_not(work: Path) -> None:
    tight = DemonstrationConfig("random", length=5)
    shown, tokenizer = made(work, tight)
    assert max(map(len, shown.shown)) == 5
    words = {tokenizer.encode(word, False)[0] for word in ("small", "large")}
    assert all(words & set(example.tolist()) for example in shown.shown)
    with pytest.raises(UserError, match=r"train.jsonl:1: what has to stay whole .* more than 4"):
        made(work, DemonstrationConfig("random", length=3))
    with pytest.raises(UserError, match="length = 48 has no room for a text beside 2 examples of"):
        made(work, DemonstrationConfig("random", length=20))


def test_similar_examples_are_the_nearer_half_of_a_label() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 0])
    like = np.tile(np.arange(8.0), (2, 1))
    config = DemonstrationConfig("similar")
    kept = candidates(labels, "ab", [None, None], config, like)
    assert [one.tolist() for one in kept[0]] == [[7, 6], [5]]
    kept = candidates(labels, "ab", [7, 5], config, like)  # without itself
    assert [one.tolist() for one in kept[0]] == [[6, 4], [5]]
    assert [one.tolist() for one in kept[1]] == [[7, 6], [3]]
    with pytest.raises(UserError, match="the label 'b' has 1 labelled lines; .* needs 2 or more"):
        candidates(np.array([0, 0, 1]), "ab", [0, 1, 2], config)
    with pytest.raises(UserError, match="the label 'c' has 0 labelled lines; .* needs 1 or more"):
        candidates(labels, "abc", [None], config)


def test_logits_are_the_mean_over_the_draws(work: Path) -> None:
    fresh = TASK.load(str(work / "dev.jsonl"))
    shown, _ = made(work, records=fresh)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def logits(_: Any, texts: Any, __: Any) -> Any:
        places = jax.numpy.arange(1.0, 1.0 + texts.tokens_bl.shape[1])  # padding counts nothing
        return jax.numpy.einsum("bl,l->b", texts.tokens_bl.astype("float32"), places)

    classifier = Classifier(fresh, shown, 10, rows, mesh, draws=3)
    each = [logits({}, shown.at(d).rows(np.arange(24)), None) for d in range(3)]
    np.testing.assert_allclose(classifier.logits(logits)({}), np.mean(each, axis=0), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "similar"])
def test_a_killed_run_with_demonstrations_goes_on_bit_for_bit(work: Path, kind: str) -> None:
    saved = CheckpointConfig(every=5, keep=3)
    task = dataclasses.replace(TASK, query_format="{text} {mask}")

    def run(name: str, steps: int) -> Any:
        made = told(work, f"shown_{kind}_{name}", checkpoints=saved, total_steps=steps, task=task,
                    length=16)  # fmt: skip
        return dataclasses.replace(made, demonstrations=DemonstrationConfig(kind, draws=2))  # type: ignore[arg-type]

    scores = train_classifier(run("whole", 10))
    assert 0 <= scores["accuracy"] <= 1
    train_classifier(run("halves", 5))
    assert train_classifier(run("halves", 10)) == scores
    one, other = (load_encoder(work / f"shown_{kind}_{n}" / "final") for n in ("whole", "halves"))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_what_has_no_template_has_no_demonstrations(work: Path) -> None:
    for fields in ({"method": "head"}, {"delta": DeltaConfig("prompt", length=2)}):
        run = dataclasses.replace(told(work, "bad", **fields), demonstrations=RANDOM)
        with pytest.raises(UserError, match="examples stand behind the task's template"):
            train_classifier(run)
    with pytest.raises(UserError, match="DemonstrationConfig.kind = 'nearest': expected"):
        DemonstrationConfig("nearest")  # type: ignore[arg-type]


def test_gin_binds_them_and_a_python_run_writes_them(tmp_path: Path) -> None:
    bindings = [f"{name}='x'" for name in ("MODEL_DIR", "ENCODER", "TRAIN_FILE")]
    load_gin(["runs/classify.gin"], [*bindings, "DEMONSTRATIONS='similar'"])
    run = from_gin.classifier_run()
    assert run.demonstrations.kind == "similar"
    gin.clear_config()
    file = tmp_path / "again.gin"
    file.write_text(as_gin(dataclasses.replace(run, text="")))
    load_gin([str(file)], [])
    assert from_gin.classifier_run().demonstrations == run.demonstrations
