"""Options of the released Atlas as bindings: all of them, and runs that take what is written."""

from pathlib import Path
from typing import Any

import gin
import pytest

from atlas_jax import from_gin
from atlas_jax.answering.config import EvalConfig
from atlas_jax.core.config import load_gin
from atlas_jax.index.refresh import RefreshPolicy
from atlas_jax.interop.meta_options import to_gin
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.multiple_choice import MultipleChoiceTask
from atlas_jax.training.config import CheckpointConfig, OptimizerConfig, StepConfig, TrainConfig
from atlas_jax.training.freshness import check_freshness
from tests.interop.atlas_options import DEFAULTS, MMLU_FULL
from tests.nano import NANO

MACROS = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "TRAIN_FILE", "STORE")


def load(tmp_path: Path, options: dict[str, Any], *files: str) -> None:
    """Bind a run file's and then the options' bindings, which bind the number of steps."""
    path = tmp_path / "options.gin"
    path.write_text(to_gin(options))
    paths = {macro: f"some/{macro.lower()}" for macro in MACROS}
    paths["INITIAL_CHECKPOINT_PATH"] = str(NANO)  # it is asked how its models read
    required = [f"{macro}={path}" for macro, path in paths.items()] if files else []
    load_gin([*files, str(path)], required)


@pytest.mark.parametrize("options", [DEFAULTS, MMLU_FULL], ids=["defaults", "mmlu_full"])
@pytest.mark.parametrize("option", DEFAULTS)
def test_every_option_is_bound_or_remarked(option: str, options: dict[str, Any]) -> None:
    comments = [c for c in to_gin(options).splitlines() if c.startswith(f"#   {option} = ")]
    assert all(comment.endswith(")") and "  (" in comment for comment in comments)
    if not comments:  # bound, then: another value gives other bindings
        options = {**options, "train_retriever": option != "train_retriever"}
        before = to_gin(options)
        others: tuple[Any, ...] = (not options[option], "all", 9, 0.25, "3", "loop", "fp32", "qa")
        others += ("linear", "{query} {text}", "bf16")
        assert any(to_gin({**options, option: other}) != before for other in others)


BINDINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        ({"task": task}, {"TrainConfig.task": task, "EvalConfig.task": task})
        for task in ("base", "mlm", "lm", "multiple_choice", "kilt", "section", "fever", "qa")
    ),
    ({"generation_min_length": 5}, {"GenerationConfig.min_length": 4}),
    ({"generation_max_length": 20}, {"GenerationConfig.max_length": 19}),
    ({"task": "base", "decoder_prompt_format": "so {query}:", "target_maxlength": 9},
     {"BaseTask.prompt_format": "so {query}:", "DataConfig.prompt_length": 9}),
    ({"task": "qa", "decoder_prompt_format": "to {query}", "qa_prompt_format": "q {question}"},
     {"QATask.prompt_format": "to q {question}"}),
    ({"task": "fever", "decoder_prompt_format": "{query}!"},
     {"FeverTask.prompt_format": "question: {claim} answer: <extra_id_0>!"}),
    ({"task": "qa", "decoder_format": "It is {target}."},
     {"QATask.target_format": "It is <extra_id_0> {answer}."}),
    ({"task": "section", "decoder_format": "{target}|"}, {"SectionTask.target_format": "{text}|"}),
    ({"multiple_choice_train_permutations": "all", "multiple_choice_eval_permutations": "cyclic"},
     {"MultipleChoiceTask.train_orders": "all", "MultipleChoiceTask.eval_orders": "cyclic"}),
    ({"min_lm_context_ratio": 0.25, "max_lm_context_ratio": 0.75},
     {"LMTask.min_prefix": 0.25, "LMTask.max_prefix": 0.75}),
    ({"min_words_per_lm_instance": 1},
     {"MLMTask.min_words": 2, "LMTask.min_words": 2, "SectionTask.min_words": 1}),
    ({"mlm_mean_noise_span_length": 5}, {"MLMTask.mean_span_words": 5.0}),
    ({"use_file_passages": True, "train_retriever": True},
     {"TrainConfig.passages": "file", "EvalConfig.passages": "file",
      "StepConfig.retriever_training": "fixed"}),
    ({"closed_book": True, "use_file_passages": True}, {"TrainConfig.passages": "none"}),
    ({"seed": 3, "save_freq": 50, "eval_freq": 20, "log_freq": 4, "total_steps": 100},
     {"TrainConfig.seed": 3, "CheckpointConfig.every": 50, "TrainConfig.eval_every": 20,
      "TrainConfig.log_every": 4, "TrainConfig.total_steps": 100}),
    ({"use_gradient_checkpoint_reader": True}, {"ReaderConfig.remat_policy": "full"}),
    ({"use_gradient_checkpoint_retriever": True}, {"RetrieverConfig.remat_policy": "full"}),
    ({"retrieve_only": True}, {"EvalConfig.generate": False}),
    ({"scheduler": "linear"}, {"reader/OptimizerConfig.warmup_from": 0.1}),
    ({"scheduler": "fixed"}, {"reader/OptimizerConfig.warmup_from": 0.0}),
    # The released behaviour that no option says.
    ({}, {"QATask.retriever_format": "", "DistillationConfig.kl_reduction": "released",
          "RetrieverConfig.released_layer_norm": True}),
    # A released step is a forward pass, of which ours has as many as it accumulates.
    ({"accumulation_steps": 4, "total_steps": 100, "log_freq": 2, "save_freq": 30,
      "freeze_retriever_steps": 8, "train_retriever": True, "refresh_index": "0-40:8,40-100:20"},
     {"StepConfig.accumulate": 4, "TrainConfig.total_steps": 25, "TrainConfig.log_every": 1,
      "CheckpointConfig.every": 8, "retriever/OptimizerConfig.frozen_steps": 2,
      "RefreshPolicy.schedule": "0-10:2,10-25:5"}),
    # Its schedules are total_steps long and move once an update; scheduler_steps it never reads.
    ({"accumulation_steps": 4, "total_steps": 100, "scheduler_steps": 60, "scheduler": "linear"},
     {"TrainConfig.total_steps": 25, "reader/OptimizerConfig.total_steps": 100,
      "retriever/OptimizerConfig.total_steps": 100}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), BINDINGS)
def test_an_options_binding(
    options: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    load(tmp_path, {**DEFAULTS, **options})
    assert {name: gin.query_parameter(name) for name in expected} == expected
    if "task" in options:
        from_gin.task(options["task"])  # its formats have the fields that it knows


@pytest.mark.parametrize(
    ("mode", "refreshes"), [("joint", True), ("query_side", False), ("fixed", False)]
)
def test_the_index_is_refreshed_only_where_it_gets_stale(
    mode: str, refreshes: bool, tmp_path: Path
) -> None:
    options = {
        **DEFAULTS, "refresh_index": "0-10:5", "train_retriever": mode != "fixed",
        "query_side_retriever_training": mode == "query_side",
    }  # fmt: skip
    load(tmp_path, options, "models/xl.gin", "runs/nq_full.gin")  # whose own mode is joint
    assert from_gin.told(StepConfig).retriever_training == mode
    assert from_gin.told(RefreshPolicy).refreshes is refreshes
    check_freshness(from_gin.train_run())
    assert "#   refresh_index = '0-10:5'  (bound for joint" in to_gin(options)


def test_the_options_of_a_full_mmlu_run_go_with_its_run_file(tmp_path: Path) -> None:
    load(tmp_path, MMLU_FULL, "models/xl.gin", "runs/mmlu_full.gin")
    config = from_gin.told(TrainConfig)
    assert (config.task, config.passages, config.total_steps) == ("multiple_choice", "index", 2000)
    assert (config.log_every, config.eval_every) == (4, 150)
    assert from_gin.told(CheckpointConfig).every == 10000000000  # after the last step alone
    assert from_gin.told(EvalConfig).task == "multiple_choice"
    assert from_gin.told(StepConfig) == StepConfig(
        30, 512, retriever_training="query_side", clip="together"
    )
    task = from_gin.told(MultipleChoiceTask)
    assert (task.train_orders, task.eval_orders) == ("all", "cyclic")
    assert from_gin.told(GenerationConfig).max_length == 127
    for part, rate in (("reader", 5e-5), ("retriever", 1e-5)):
        optimizer = from_gin.told(OptimizerConfig, part)
        assert (optimizer.learning_rate, optimizer.schedule) == (rate, "linear")
        assert (optimizer.warmup_steps, optimizer.total_steps) == (50, 2000)
    assert gin.query_parameter("ReaderConfig.remat_policy") == "full"
    check_freshness(from_gin.train_run())


def test_a_hostile_option_binds_nothing(tmp_path: Path) -> None:
    smuggled = "x\nModelConfig.reader = '/etc'"
    text = to_gin({smuggled: 1, 7: 2, "seed": [smuggled], "total_steps": "many", "clip": smuggled})
    bound = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert bound == ["include 'released.gin'"]
    assert "#   total_steps = 'many'" in text
