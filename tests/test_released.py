"""The recipes of the paper follow the rules of the released code, over their whole length.

Expected values are written down from those rules; no model runs.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig
from atlas_jax.core.config import gin_folder, load_gin
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.refresh import RefreshPolicy
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.tasks.base import Example
from atlas_jax.training.config import OptimizerConfig, StepConfig, TrainConfig
from atlas_jax.training.optimizers import make_schedule

told = from_gin.told
DOCS = Path(__file__).parents[1] / "docs"
MACROS = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "TRAIN_FILE", "STORE")


def load(recipe: str, *more: str) -> None:
    (header,) = re.findall(r"^# Requires: (.*)$", read(f"runs/{recipe}.gin")[0], re.MULTILINE)
    macros = [f"{macro}=some/{macro.lower()}" for macro in header.split(", ")]
    load_gin([f"runs/{recipe}.gin", *more], macros)


def read(name: str) -> list[str]:
    """A gin file's text and that of all it includes."""
    text = (gin_folder() / name).read_text("utf-8")
    included = [part for file in re.findall(r"include '(.+)'", text) for part in read(file)]
    return [text, *included]


def warm_up(step: int, steps: int) -> float:
    """Linear and cosine warm-up go from a tenth of the peak to the peak."""
    return 0.1 + 0.9 * step / steps


def linear(step: int, warm: int, total: int) -> float:
    """Straight from the peak to a tenth of it."""
    return warm_up(step, warm) if step < warm else 1 - 0.9 * (step - warm) / (total - warm)


def cosine(step: int, warm: int, total: int) -> float:
    """A quarter wave from the peak to a tenth of it: 0.736 of the peak at half time."""
    if step < warm:
        return warm_up(step, warm)
    return 0.1 + 0.9 * math.cos(math.pi / 2 * (step - warm) / (total - warm))


# Recipe: schedule, its steps, warm-up, peaks of reader and retriever, steps of the refreshes.
# A refresh schedule counts from the beginning of each range.
FULL = (cosine, 10_000, 100, 4e-5, 4e-5, [500, 1000, 3000, 5000, 7000, 9000])
SHOTS = (linear, 30, 5, 4e-5, 4e-5, [])
PRETRAIN = (linear, 10_000, 1000, 1e-4, 1e-5, list(range(1000, 10_000, 1000)))
RECIPES: dict[str, tuple[Any, int, int, float, float, list[int]]] = {
    **{f"{data}_full": FULL for data in ("nq", "triviaqa", "fever", "kilt")},
    **{f"{data}_64shot": SHOTS for data in ("nq", "triviaqa", "fever", "kilt")},
    "fever_15shot": SHOTS,
    "mmlu_5shot": (linear, 16, 4, 5e-5, 1e-5, []),
    "mmlu_multi": (linear, 250, 25, 5e-5, 1e-5, []),
    "mmlu_full": (linear, 2000, 50, 5e-5, 1e-5, []),
    "templama": (linear, 100, 20, 4e-5, 4e-5, []),
    **{f"{task}_pretrain": PRETRAIN for task in ("mlm", "lm", "section")},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_rates_refreshes_and_clip_are_the_released_ones_at_every_step(
    recipe: str,
) -> None:
    schedule, total, warm, reader_peak, retriever_peak, refreshes = RECIPES[recipe]
    load(recipe)
    assert told(TrainConfig).total_steps == total
    shares = [schedule(step, warm, total) for step in range(total)]
    for part, peak in (("reader", reader_peak), ("retriever", retriever_peak)):
        optimizer = told(OptimizerConfig, part)
        rates = np.asarray(make_schedule(optimizer)(jnp.arange(total)))
        np.testing.assert_allclose(rates, peak * np.array(shares), rtol=2e-4)
        assert (optimizer.clip_norm, optimizer.weight_decay, optimizer.decayed) == (1, 0.01, "all")
        assert (optimizer.b1, optimizer.b2, optimizer.epsilon) == (0.9, 0.999, 1e-6)
    policy = told(RefreshPolicy)
    assert [step for step in range(total) if policy.due(step)] == refreshes
    assert told(StepConfig).clip == "together"
    assert told(DistillationConfig).kl_reduction == "released"


def test_half_time_of_the_cosine_is_the_released_one() -> None:
    assert cosine(50, 0, 100) == pytest.approx(0.736, abs=5e-4)


PASSAGE = {
    "id": "p1", "title": "Arvo", "section": "Water",
    "text": "The river Lind rises in the hills of Arvo and ends in a lake without a name.",
}  # fmt: skip
CHOICES = {"question": "  How many? ", "options": {"A": "two", "B": "one"}, "answer": "B"}
# Recipe: a line of its file, the query of reader and retriever, the target.
TEXTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "nq_64shot": ({"question": "Who?", "answers": ["Ada"]},
                  "question: Who? answer: <extra_id_0>", "<extra_id_0> Ada"),
    "triviaqa_full": ({"question": "Who?", "answers": ["Ada"]},
                      "question: Who? answer: <extra_id_0>", "<extra_id_0> Ada"),
    "fever_15shot": ({"claim": "It is.", "label": "REFUTES"},
                     "question: It is. answer: <extra_id_0>", "<extra_id_0> false"),
    "kilt_full": ({"input": "It is.", "output": [{"answer": "SUPPORTS"}]},
                  "question: It is. answer: <extra_id_0>", "<extra_id_0> true"),
    "kilt_64shot": ({"input": "Who?", "output": [{"answer": " Ada"}]},
                    "question: Who? answer: <extra_id_0>", "<extra_id_0> Ada"),
    "mmlu_multi": (CHOICES, "question: How many? options: (A) two (B) one answer: <extra_id_0>",
                   "<extra_id_0> B"),
    "mmlu_zeroshot": (CHOICES, "question: How many? options: (A) two (B) one answer: <extra_id_0>",
                      "<extra_id_0> B"),
    "templama": ({"question": "Ada leads <extra_id_0>.", "changed": True,
                  "answers_some/edition": ["Arvo"], "answers_some/other_edition": ["Bera"]},
                 "Ada leads <extra_id_0>.", "<extra_id_0> Arvo"),
    "section_pretrain": (PASSAGE, "Arvo, Water", PASSAGE["text"]),
    "lm_pretrain": (PASSAGE, "The river Lind rises in the hills of",
                    "Arvo and ends in a lake without a name."),
}  # fmt: skip


def example_of(recipe: str, row: dict[str, Any], folder: Path) -> Example:
    load(recipe)
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    task = from_gin.task(told(EvalConfig).task)
    return task.example(task.load(path)[0])


@pytest.mark.parametrize("recipe", TEXTS)
def test_a_recipes_texts_are_the_released_ones(recipe: str, tmp_path: Path) -> None:
    row, query, target = TEXTS[recipe]
    example = example_of(recipe, row, tmp_path)
    assert (example.query_text, example.retriever_text, example.target_text) == (
        query, query, target
    )  # fmt: skip


def test_masked_spans_keep_their_sentinels_in_the_retrievers_query(tmp_path: Path) -> None:
    example = example_of("mlm_pretrain", PASSAGE, tmp_path)
    assert example.retriever_text == example.query_text
    assert "<extra_id_0>" in example.query_text


def test_the_preset_gives_any_run_the_released_behaviour() -> None:
    macros = [f"{macro}=some/path" for macro in MACROS]
    load_gin(["runs/finetune_qa.gin", "released.gin"], [*macros, "TRAIN_STEPS=30"])
    assert told(RetrieverConfig).released_layer_norm
    assert told(StepConfig).clip == "together"
    assert told(DistillationConfig) == DistillationConfig(
        kl_reduction="released", adist_normalizer="released"
    )
    assert told(DataConfig).prompt_and_target == "together"
    assert told(GenerationConfig).beam_rules == "v4.18"
    assert told(EvalConfig).loss == "batches"
    assert from_gin.task("fever").compare == "literal"  # type: ignore[attr-defined]


def test_without_the_preset_ours_is_what_is_right() -> None:
    macros = [f"{macro}=some/path" for macro in MACROS]
    load_gin(["runs/finetune_qa.gin"], [*macros, "TRAIN_STEPS=30"])
    assert not told(RetrieverConfig).released_layer_norm
    assert told(StepConfig).clip == "apart"
    assert told(DistillationConfig).kl_reduction == "batch"
    assert told(DataConfig).prompt_and_target == "apart"
    assert told(GenerationConfig).beam_rules == "v5"
    assert told(EvalConfig).loss == "tokens"
    assert from_gin.task("qa").retriever_format == "{question}"  # type: ignore[attr-defined]
    assert float(make_schedule(told(OptimizerConfig, "reader"))(30)) == 0


def test_a_loss_given_after_the_recipe_keeps_the_released_mean() -> None:
    for loss in ("adist", "emdr2", "loop", "pdist"):
        load("nq_64shot", f"distillation/{loss}.gin")
        assert (told(DistillationConfig).loss, told(DistillationConfig).kl_reduction) == (
            loss,
            "released",
        )


def test_the_page_has_every_binding_of_the_preset() -> None:
    page = (DOCS / "released.md").read_text("utf-8")
    bound = re.findall(r"^([\w/]+)\.(\w+) =", "".join(read("released.gin")), re.MULTILINE)
    assert len(bound) > 20
    for name, field in bound:
        told = field if field == "retriever_format" else f"{name.split('/')[-1]}.{field}"
        assert f"`{told}`" in page, f"docs/released.md does not tell {told}"
