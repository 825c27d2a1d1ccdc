"""`pretrain_encoder`: resumed runs, what trains, ELECTRA, collapse, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from atlas_jax import pretrain_encoder as command
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.devices import Devices, use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.encoders.masking import MaskingConfig
from atlas_jax.interop.vocabularies import find_tokenizer
from atlas_jax.models.encoder_folder import load_encoder, with_heads
from atlas_jax.training import encoder_trainer
from atlas_jax.training.config import CheckpointConfig, OptimizerConfig
from atlas_jax.training.encoder_trainer import FINAL_GENERATOR, pretrain_encoder
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.pretrain_config import EncoderTrainConfig, PretrainRun
from atlas_jax.training.pretrain_watch import CollapseWatch, lowest_loss
from benchmarks.fewshot import plain as plain_encoder
from tests.device_bytes import device_bytes, most_bytes
from tests.interop.small import wordpiece_file

SIZES: dict[str, Any] = {
    "encoder": "albert", "encoder_options": {"factor_dim": 4}, "vocab_size": 57, "hidden_dim": 8,
    "num_layers": 2, "num_heads": 2, "mlp_dim": 16, "max_positions": 24,
}  # fmt: skip
WORDS = MaskingConfig("whole_word")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with passages and a tokenizer."""
    place = tmp_path_factory.mktemp("pretraining")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(12)]
        text = ". ".join(" ".join(words[i : i + 4]).capitalize() for i in (0, 4, 8))
        rows.append({"id": str(number), "title": f"t{number // 2}", "text": text})
    (place / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "tokenizer.json").write_text(find_tokenizer(wordpiece_file(place), "encoder") or "")
    return place


@pytest.fixture(scope="module")
def folder(texts: Path) -> Path:
    """The same, with a short run on them."""
    pretrain_encoder(run(texts, "whole", WORDS, objectives=("mlm", "sop"), total_steps=5))
    return texts


def run(
    folder: Path, name: str, masking: MaskingConfig | None = None, **fields: Any
) -> PretrainRun:
    own = {
        "model_dir": str(folder / name), "file": str(folder / "passages.jsonl"), "length": 20,
        "batch_size": 8, "log_every": 1, "total_steps": 2, **fields,
    }  # fmt: skip
    if not own.get("encoder"):
        own["tokenizer"] = str(folder / "tokenizer.json")
    return PretrainRun(
        train=EncoderTrainConfig(**own),
        encoder={} if own.get("encoder") else SIZES,
        masking=masking or MaskingConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-2, total_steps=10),
        checkpoints=CheckpointConfig(every=2),
    )


@pytest.mark.slow
def test_an_interrupted_run_repeats_the_whole_one(folder: Path) -> None:
    for steps in (3, 5):
        pretrain_encoder(run(folder, "parts", WORDS, objectives=("mlm", "sop"), total_steps=steps))
    weights = [
        (folder / name / "final" / "encoder.safetensors").read_bytes()
        for name in ("whole", "parts")
    ]
    assert weights[0] == weights[1]
    losses = [[row["train/mlm_loss"] for row in read_metrics(folder / name)]
              for name in ("whole", "parts")]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5
    row = read_metrics(folder / "whole")[-1]
    assert row["train/loss"] == pytest.approx(row["train/mlm_loss"] + row["train/sop_loss"])


@pytest.mark.parametrize("objectives", [("mlm", "sop"), ("electra",)])
def test_a_run_begins_in_its_shards(texts: Path, objectives: tuple[str, ...]) -> None:
    told = run(texts, "unused", objectives=objectives, generator_share=0.5)
    sizes = SIZES | {"vocab_size": 64, "hidden_dim": 16, "encoder": "bert", "encoder_options": {}}
    mesh = Devices(MeshConfig(data=1, fsdp=4, model=2))
    told = dataclasses.replace(told, encoder=sizes, devices=mesh)
    with use_devices(told.devices) as (made_on, rules):
        told, encoder = encoder_trainer._opened(told)
        loss = encoder_trainer._loss(told, encoder)
        _, begin, _ = encoder_trainer._make(told, encoder, loss, made_on, rules)
        state, most = most_bytes(begin)
    held, whole = device_bytes(state), sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert len(held) == 8 and max(held.values()) < whole / 3  # some norms lie everywhere
    both = held + device_bytes(state.params)  # moments are made beside them
    assert most <= max(both.values()) + 64  # and keys
    drawn = with_heads(encoder, encoder.config.heads, told.train.seed).params
    for name, params in drawn.items():
        jax.tree.map(np.testing.assert_array_equal, state.params[name], params)
    assert ("generator" in state.params) == ("electra" in objectives)


@pytest.mark.slow
def test_a_head_alone_leaves_the_encoder_as_it_was(folder: Path) -> None:
    start = str(folder / "whole" / "final")
    told = run(folder, "head", encoder=start, train=["mlm/*"], eval_rows=8,
               eval_file=str(folder / "passages.jsonl"))  # fmt: skip
    pretrain_encoder(told)
    before, after = load_encoder(start), load_encoder(folder / "head" / "final", ("mlm",))
    for name in ("encoder", "sentence"):
        jax.tree.map(np.testing.assert_array_equal, before.params[name], after.params[name])
    moved = after.params["mlm"]["transform"]["kernel"] - before.params["mlm"]["transform"]["kernel"]
    assert np.abs(moved).max() > 0
    last = read_metrics(folder / "head")[-1]
    assert math.isfinite(last["eval/mlm_loss"])
    assert 0 <= last["eval/mlm_accuracy"] <= 1
    with pytest.raises(UserError, match=r"EncoderTrainConfig.train: 'mlp/\*' is the path of no"):
        pretrain_encoder(run(folder, "wrong", encoder=start, train=["mlp/*"]))


@pytest.mark.slow
def test_electra_trains_two_and_its_generator_shares_the_tables(texts: Path) -> None:
    masking = MaskingConfig(mask_rate=0.85, random_rate=0.0)
    told = run(texts, "electra", masking, objectives=("electra",), generator_share=0.5)
    pretrain_encoder(told)
    large = load_encoder(texts / "electra" / "final", ("discriminator",))
    small = load_encoder(texts / "electra" / FINAL_GENERATOR, ("mlm",))
    assert (large.config.hidden_dim, small.config.hidden_dim) == (8, 4)
    jax.tree.map(
        np.testing.assert_array_equal,
        large.params["encoder"]["embeddings"],
        small.params["encoder"]["embeddings"],
    )
    row = read_metrics(texts / "electra")[-1]
    total = row["train/mlm_loss"] + 50 * row["train/replaced_loss"]
    assert row["train/loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [("mlm", "nsp"), ("electra",)])
def test_one_device_computes_what_eight_do(
    texts: Path, objectives: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    eight, found = jax.devices(), []
    for devices in (eight, eight[:1]):
        monkeypatch.setattr(jax, "devices", lambda *_, chosen=devices: chosen)
        name = f"{objectives[0]}_on_{len(devices)}"
        told = run(texts, name, MaskingConfig("ngram"), objectives=objectives, generator_share=0.5)
        state = pretrain_encoder(dataclasses.replace(told, encoder={**SIZES, "dropout_rate": 0.1}))
        assert len(state.params["encoder"]["embeddings"]["layer_norm"]["bias"].devices()) == len(
            devices
        )
        found.append(read_metrics(texts / name)[-1])
    for name, value in found[0].items():
        if name.startswith("train/") and "second" not in name:
            assert found[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_the_command_goes_on_from_a_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bindings = {
        "MODEL_DIR": folder / "command", "PASSAGES": folder / "passages.jsonl",
        "ENCODER": folder / "whole" / "final", "TRAIN_STEPS": 1, "WARMUP_STEPS": 0,
        "BATCH_SIZE": 8, "LENGTH": 20,
    }  # fmt: skip
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    assert command.main(["--gin_file=runs/pretrain_encoder.gin", *flags]) == 0
    assert f"the encoder is in {folder / 'command'}/final" in capsys.readouterr().out
    text = (folder / "command" / "config.gin").read_text()
    assert "EncoderTrainConfig" in text


def values(loss: float, skipped: int = 0) -> dict[str, float]:
    return {"mlm_loss": loss, "skipped": skipped}


def test_a_run_whose_loss_jumps_and_stays_there_is_stopped() -> None:
    watch = CollapseWatch(2.0, 3, 10)
    for step, loss in enumerate([9.0, 4.0, 6.5, 4.1, 6.3, 6.2]):  # once high, then twice
        watch(10 * step, values(loss))
    with pytest.raises(UserError, match=r"MLM loss is 6.10 at step 60.*lowest, 4.00.*collapsed"):
        watch(60, values(6.1))
    CollapseWatch(0.0, 1, 10)(1, values(100.0))
    resumed = CollapseWatch(2.0, 1, 10, lowest_loss([{"train/mlm_loss": 3.0}, {"eval/loss": 0.0}]))
    with pytest.raises(UserError, match=r"lowest, 3.00"):
        resumed(10, values(5.5))


def test_a_run_that_skips_every_step_is_stopped() -> None:
    watch = CollapseWatch(2.0, 2, 10)
    for step, skipped in ((10, 0), (20, 10), (30, 15), (40, 25)):
        watch(step, values(math.nan, skipped))
    with pytest.raises(UserError, match="the last 20 steps to step 50 were skipped"):
        watch(50, values(math.nan, 35))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": ("mlm", "cloze")}, "objectives = 'cloze': expected"),
        ({"objectives": ("sop",)}, "'mlm', 'unilm', 'xlnet' or 'electra' among them"),
        ({"objectives": ("mlm", "nsp", "sop")}, "expected 'nsp' or 'sop'"),
        ({"objectives": ("mlm", "electra")}, "one of 'mlm', 'unilm', 'xlnet' and 'electra'; each"),
        ({"objectives": "mlm"}, "EncoderTrainConfig.objectives = 'mlm': expected a list"),
        ({"length": 30}, "length = 30, but the encoder reads 24 tokens"),
        ({"encoder": "x", "tokenizer": "y"}, "a tokenizer.json without EncoderTrainConfig.encoder"),
        ({"batch_size": 3}, "does not divide over the"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    texts: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        told = run(texts, "refused", **fields)
        pretrain_encoder(told)


def test_pairs_need_token_types(texts: Path) -> None:
    told = run(texts, "refused", objectives=("mlm", "nsp"))
    with pytest.raises(UserError, match="'nsp' tells two texts apart by token types"):
        pretrain_encoder(dataclasses.replace(told, encoder={**SIZES, "type_vocab_size": 1}))


@pytest.mark.slow
def test_lora_and_head_learn_on_a_base_and_go_on_from_what_is_kept(folder: Path) -> None:
    start = folder / "whole" / "final"
    lora = DeltaConfig("lora", rank=2)

    def told(name: str, encoder: Path, **fields: Any) -> PretrainRun:
        made = run(folder, name, WORDS, encoder=str(encoder), **fields)
        return dataclasses.replace(made, delta=lora, encoder={})

    for steps in (2, 4):  # the second goes on with the first
        pretrain_encoder(told("lora", start, total_steps=steps))
    pretrain_encoder(told("lora_whole", start, total_steps=4))
    final = folder / "lora" / "final"
    own, whole = (
        folder / name / "final" / "encoder.safetensors" for name in ("lora", "lora_whole")
    )
    assert own.read_bytes() == whole.read_bytes()
    before, after = load_encoder(start), load_encoder(final, ("mlm",))
    flat = {
        path: leaf
        for path, leaf in traverse_util.flatten_dict(after.params, sep="/").items()
        if not np.array_equal(leaf, traverse_util.flatten_dict(before.params, sep="/").get(path))
    }
    assert flat.keys() == load_file(own).keys()  # what has moved is all that is kept
    assert all("/lora/" in path or path.startswith("mlm/") for path in flat)
    assert {path.rpartition("/")[0] for path in flat if "lora" in path}
    plain = load_encoder(plain_encoder(str(final), "", folder / "plain"), ("mlm",))
    assert not plain.deltas and plain.base is None
    tokens = np.array([[2, 7, 8, 9, 3, 0]])
    states = [one.model.apply({"params": one.params}, tokens, method="states")
              for one in (before, after, plain)]  # fmt: skip
    np.testing.assert_allclose(states[1], states[2], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(states[0]) - np.asarray(states[1])).max() > 1e-5
    assert plain_encoder(str(start), "", folder / "none") == str(start)  # it has no LoRA
    again = told("again", final, total_steps=1)  # the folder says which adapters it has
    pretrain_encoder(dataclasses.replace(again, delta=DeltaConfig()))
    assert load_file(folder / "again" / "final" / "encoder.safetensors").keys() == flat.keys()
    with pytest.raises(UserError, match="encoder/DeltaConfig is"):
        pretrain_encoder(dataclasses.replace(again, delta=DeltaConfig("lora", rank=3)))
    for delta, fields, message in (
        (DeltaConfig("prefix"), {}, "encoder/DeltaConfig.kind = 'prefix': expected adapters or"),
        (lora, {"objectives": ("electra",)}, "'none' with the objective 'electra'"),
        (lora, {"encoder": "", "tokenizer": "t.json"}, "EncoderTrainConfig.encoder = ''"),
    ):
        train = dataclasses.replace(again.train, **fields)
        with pytest.raises(UserError, match=message):
            dataclasses.replace(again, train=train, delta=delta)
