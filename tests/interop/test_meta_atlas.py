"""Checkpoints in the layout of Meta's Atlas: both retriever layouts, optimisers, options."""

import dataclasses
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.conversion.convert import convert
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.refresh import RefreshPolicy
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.interop import meta_atlas, torch_files
from atlas_jax.interop.meta_atlas import read_checkpoint
from atlas_jax.interop.meta_options import to_gin
from atlas_jax.interop.t5x import read_checkpoint as read_t5x
from atlas_jax.interop.tensors import Tensor
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.qa import QATask
from atlas_jax.training.config import OptimizerConfig, StepConfig
from tests.interop import small

NAMES = ("atlas_tied", "atlas_untied")
HEADS = "RetrieverConfig.num_heads=3"  # a Contriever's are 64 wide, these are 5


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return small.outputs()


def ours(tmp_path: Path, name: str) -> Path:
    load_gin([], [HEADS])
    return small.to_ours(tmp_path, "meta-atlas", small.GOLDENS / f"{name}.pth.tar")


@pytest.mark.parametrize("name", NAMES)
def test_reader_and_retriever_give_the_outputs_of_pytorch(
    name: str, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    parts = small.parts_of(ours(tmp_path, name))
    logits = small.logits(parts["reader"], golden["source"], golden["decoder_input"])
    np.testing.assert_allclose(logits, golden[f"{name}/logits"], rtol=0, atol=1e-4)
    retriever = parts["retriever"]
    assert retriever.config["released_layer_norm"] is True
    assert retriever.config["tied"] is (name == "atlas_tied")
    towers = {"embed_query": "query_contriever", "embed_passage": "passage_contriever"}
    for method, tower in towers.items():
        tower = "contriever" if name == "atlas_tied" else tower
        found = small.embeddings(retriever, golden["ids"], method)
        np.testing.assert_allclose(found, golden[f"{name}/{tower}"], rtol=0, atol=1e-4)


def test_the_two_towers_differ(golden: dict[str, np.ndarray]) -> None:
    queries, passages = (golden[f"atlas_untied/{t}_contriever"] for t in ("query", "passage"))
    assert np.abs(queries - passages).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_of_parameters_and_moments(name: str, tmp_path: Path) -> None:
    file = torch_files.load(small.GOLDENS / f"{name}.pth.tar")
    parts = small.parts_of(ours(tmp_path, name))
    reader = parts["reader"]

    def same(tensor: Tensor, theirs: Tensor) -> None:
        np.testing.assert_array_equal(tensor.read(), theirs.read().T)

    query = "encoder/layers_1/attention/query/kernel"
    theirs = "reader.module.encoder.block.1.layer.0.SelfAttention.q.weight"
    same(reader.tensors[query], file["model"][theirs])
    # The place of a parameter in the module, second names of the embedding left out.
    copies = ("embed_tokens.weight", *(("lm_head.weight",) if name == "atlas_untied" else ()))
    order = [n for n in file["model"] if n.startswith("reader.") and not n.endswith(copies)]
    moments = file["optimizer"]["state"][order.index(theirs)]
    same(reader.optimizer[f"param_states/0/mu/{query}"], moments["exp_avg"])
    same(reader.optimizer[f"param_states/0/nu/{query}"], moments["exp_avg_sq"])
    assert int(reader.optimizer["param_states/0/count"].read()) == 2
    assert len(reader.optimizer) == 2 * len(reader.tensors) + 2
    assert len(parts["retriever"].optimizer) == 2 * len(parts["retriever"].tensors) + 2


def test_moments_reach_t5x(tmp_path: Path) -> None:
    convert(
        small.job("meta-atlas", "t5x", small.GOLDENS / "atlas_tied.pth.tar", tmp_path / "t5x",
                  part="reader"), small.quiet
    )  # fmt: skip
    again = read_t5x(tmp_path / "t5x")
    before = read_checkpoint(small.GOLDENS / "atlas_tied.pth.tar", {"num_heads": 3}).parts["reader"]
    assert small.all_bits(again.optimizer) == small.all_bits(before.optimizer)
    assert (tmp_path / "t5x" / "checkpoint_2").is_dir()


def test_options_become_bindings_that_the_launcher_takes(tmp_path: Path) -> None:
    folder = ours(tmp_path, "atlas_tied")
    load_gin([str(folder / "options.gin")])
    assert from_gin.told(StepConfig) == StepConfig(
        7, 96, retriever_training="joint", accumulate=2, clip="together"
    )
    assert from_gin.told(DataConfig).target_length == 12
    assert from_gin.told(DistillationConfig) == DistillationConfig("pdist", 0.1, 0.05, "released")
    # It accumulates two forward passes: a step of ours is two of its.
    assert from_gin.told(RefreshPolicy).schedule == "0-5:3,5-50:10"
    assert from_gin.told(GenerationConfig) == GenerationConfig(
        max_length=19, method="beam", num_beams=3, length_penalty=0.5, beam_rules="v4.18"
    )
    assert from_gin.told(StoreConfig).reader_format == "title: {title} context: {text}"
    assert from_gin.told(QATask).query_format == "question: {question} answer: <extra_id_0>"
    optimizer = from_gin.told(OptimizerConfig, "retriever")
    assert optimizer.learning_rate == 1e-5
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.total_steps) == ("linear", 4, 30)
    assert (optimizer.b2, optimizer.epsilon, optimizer.weight_decay) == (0.999, 1e-6, 0.01)
    assert (optimizer.warmup_from, optimizer.fall_to) == (0.1, 0.1)  # what no option says
    assert from_gin.told(QATask).retriever_format == ""
    assert gin.query_parameter("ReaderConfig.dtype") == "bfloat16"
    assert gin.query_parameter("RetrieverConfig.dropout_rate") == 0.2


def test_options_without_a_counterpart_stay_as_comments(tmp_path: Path) -> None:
    text = (ours(tmp_path, "atlas_tied") / "options.gin").read_text()
    assert "#   freeze_retriever_steps = -1  (see frozen_steps" in text
    assert "#   passages = ['text.jsonl']  (see CorpusConfig.passages)" in text
    options: dict[str, Any] = torch_files.load(small.GOLDENS / "atlas_tied.pth.tar")["opt"]
    mentioned = text.split("# Options without")[1]
    for option in ("alpha", "name", "index_mode", "per_gpu_batch_size", "reader_model_type"):
        assert f"#   {option} = {options[option]!r}" in mentioned


def test_reranking_and_frozen_steps() -> None:
    options: dict[str, Any] = {
        "train_retriever": True, "query_side_retriever_training": False, "n_context": 20,
        "retrieve_with_rerank": True, "n_to_rerank_with_retrieve_with_rerank": 100,
        "freeze_retriever_steps": 50,
    }  # fmt: skip
    text = to_gin(options)
    assert "StepConfig.rerank = 100" in text
    assert "retriever/OptimizerConfig.frozen_steps = 50" in text
    query_side = to_gin({**options, "query_side_retriever_training": True})
    assert "StepConfig.rerank =" not in query_side
    assert "#   retrieve_with_rerank = True" in query_side


def test_query_side_and_fixed_options() -> None:
    options = {"train_retriever": True, "query_side_retriever_training": True, "n_context": 3}
    assert "StepConfig.retriever_training = 'query_side'" in to_gin(options)
    assert "StepConfig.retriever_training = 'fixed'" in to_gin({"train_retriever": False})
    # A newline in a value cannot smuggle a binding in.
    text = to_gin({"note": "x\nModelConfig.reader = '/etc'", "task": "q\nimport os"})
    bound = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert bound == ["include 'released.gin'"]


SHARED = "reader.module.shared.weight"


def changed(tmp_path: Path, change: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The refusal of a checkpoint that `change` has made wrong, by a reader given its tree."""
    file = small.GOLDENS / "atlas_tied.pth.tar"
    tree = torch_files.load(file)
    change(tree)
    monkeypatch.setattr(meta_atlas, "load", lambda path: tree)
    load_gin([], [HEADS])
    with pytest.raises(UserError) as caught:
        convert(small.job("meta-atlas", "t5x", file, tmp_path / "o", part="reader"), small.quiet)
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("opt"), "no checkpoint of Atlas: it has no opt"),
        (lambda t: t["model"].pop("reader.module.encoder.final_layer_norm.weight"),
         "missing: encoder.final_layer_norm.weight"),
        (lambda t: t["model"].pop("retriever.contriever.encoder.layer.1.output.dense.bias"),
         "missing: encoder.layer.1.output.dense.bias"),
        (lambda t: t["model"].update(head=t["model"][SHARED]),
         "head: neither reader nor retriever"),
        (lambda t: t["model"].update({"retriever.other.x": t["model"][SHARED]}),
         "retriever.other.x: known are contriever"),
        (lambda t: t["opt"].update(reader_model_type="t5-base"), "the reader's MLP is gated"),
        (lambda t: t["optimizer"]["state"][3].update(exp_avg=t["model"][SHARED]),
         "exp_avg of reader.encoder.block.0.layer.0.SelfAttention.v.weight has not its"),
        (lambda t: t["optimizer"]["param_groups"][0]["params"].append(99),
         "67 parameters where the model has 66"),
        (lambda t: t["optimizer"]["state"][1].update(step=7), "were updated [2, 7] times"),
        (lambda t: t["model"].update({"reader.x": "text"}), "reader.x is a str, not a tensor"),
        (lambda t: t.update(step=[2]), "step: is [2], not a number of steps"),
        (lambda t: t["opt"].update(dropout=[]), "opt.dropout is [], not a number"),
        (lambda t: t.update(optimizer=7), "optimizer: is a int, not a dict with 'state'"),
        (lambda t: t["optimizer"].pop("state"), "optimizer: has no 'state'"),
        (lambda t: t["optimizer"].pop("param_groups"), "optimizer: has no 'param_groups'"),
        (lambda t: t["optimizer"].update(param_groups={}), "param_groups: is a dict, not a list"),
        (lambda t: t["optimizer"]["param_groups"][0].pop("params"),
         "optimizer.param_groups.0: has no 'params'"),
        (lambda t: t["optimizer"]["param_groups"][0]["params"].append([]),
         "'params' has something else than numbers"),
        (lambda t: t["optimizer"]["state"][3].pop("step"),
         "state.3 (reader.encoder.block.0.layer.0.SelfAttention.v.weight): has no 'step'"),
        (lambda t: t["optimizer"]["state"][3].update(step="x"), ".weight).step: is 'x', not a"),
        (lambda t: t["optimizer"]["state"][3].pop("exp_avg_sq"), "has no 'exp_avg_sq'"),
        (lambda t: t["optimizer"]["state"].update({3: []}), "is a list, not a dict with 'step'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in changed(tmp_path, change, monkeypatch)


def test_a_contradictory_reader_type_can_be_overridden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small.GOLDENS / "atlas_tied.pth.tar"
    right = read_checkpoint(file).parts["reader"].config
    tree = torch_files.load(file)
    tree["opt"]["reader_model_type"] = "t5-base"
    monkeypatch.setattr(meta_atlas, "load", lambda path: tree)
    with pytest.raises(UserError, match="--reader_model_type=google/t5-xl-lm-adapt, say"):
        read_checkpoint(file)
    found = read_checkpoint(file, reader_model_type="google/t5-base-lm-adapt")
    assert found.parts["reader"].config == right
    with pytest.raises(UserError, match="--reader_model_type is 't5-small', but the reader's MLP"):
        read_checkpoint(file, reader_model_type="t5-small")


def test_missing_tensors_may_be_allowed_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a folder of Hugging Face, with its names, in the reader as in the retriever."""
    tree = torch_files.load(small.GOLDENS / "atlas_tied.pth.tar")
    scale, bias = "encoder.final_layer_norm.weight", "encoder.layer.1.output.dense.bias"
    del tree["model"][f"reader.module.{scale}"], tree["model"][f"retriever.contriever.{bias}"]
    monkeypatch.setattr(meta_atlas, "load", lambda path: tree)
    load_gin([], [HEADS])
    file = small.GOLDENS / "atlas_tied.pth.tar"
    changes: dict[str, Any] = {"optimizer": False, "tokenizers": {
        "reader": str(small.reader_tokenizer(tmp_path)),
        "retriever": str(small.wordpiece_file(tmp_path)),
    }}  # fmt: skip
    for allowed, message in (((), scale), ((scale,), bias)):
        job = small.job("meta-atlas", "atlas-jax", file, tmp_path / "o", allow_missing=allowed)
        with pytest.raises(UserError, match=f"missing: {message}"):
            convert(dataclasses.replace(job, **changes), small.quiet)
        assert not (tmp_path / "o").exists()
    job = small.job("meta-atlas", "atlas-jax", file, tmp_path / "o", allow_missing=(scale, bias))
    done = convert(dataclasses.replace(job, **changes), small.quiet)
    assert [part.missing for part in done] == [[scale], [bias]]
    filled = small.parts_of(tmp_path / "o")["reader"].tensors["encoder/encoder_norm/scale"]
    assert (filled.read() == 1).all()


def test_the_retriever_of_atlas_is_not_written_as_a_bert(tmp_path: Path) -> None:
    """It would load, and give other embeddings in silence."""
    load_gin([], [HEADS])
    file = small.GOLDENS / "atlas_tied.pth.tar"
    with pytest.raises(UserError, match=r"RetrieverConfig.released_layer_norm.*--part=reader"):
        convert(small.job("meta-atlas", "hf", file, tmp_path / "hf"), small.quiet)
    assert not (tmp_path / "hf").exists()
    convert(small.job("meta-atlas", "hf", file, tmp_path / "hf", part="reader"), small.quiet)
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_dropout_of_the_options(tmp_path: Path) -> None:
    parts = small.parts_of(ours(tmp_path, "atlas_tied"))
    assert ReaderConfig(**parts["reader"].config).dropout_rate == 0.2
