"""Hugging Face folders in and out: the same logits, the same bits, and nothing left unsaid."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.conversion.convert import convert
from atlas_jax.core.errors import UserError
from atlas_jax.interop import t5_names
from atlas_jax.interop.huggingface import read_folder, read_tensors
from atlas_jax.interop.safetensors_files import read_file, write_file, write_sharded
from atlas_jax.interop.tensors import of_array
from tests.goldens import make_interop_goldens as goldens
from tests.interop import small

POOLER = ("*pooler.*",)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return small.outputs()


def config(name: str) -> tuple[str, ...]:
    return POOLER if name in ("bert", "minilm") else ()


@pytest.mark.parametrize("name", goldens.READERS)
def test_reader_gives_the_logits_of_transformers(
    name: str, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    part = small.parts_of(small.to_ours(tmp_path, "hf", small.GOLDENS / name))["reader"]
    ours = small.logits(part, golden["source"], golden["decoder_input"])
    expected = golden[f"{name}/logits"]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=small.LOGITS_TOLERANCE)
    assert np.abs(expected).max() > 0.5  # or the tolerance would say nothing


@pytest.mark.parametrize("name", ["bert", "minilm"])
def test_encoder_gives_the_embeddings_of_transformers(
    name: str, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = small.to_ours(tmp_path, "hf", small.GOLDENS / name, allow_unused=POOLER)
    part = small.parts_of(folder)["retriever"]
    assert part.config["normalize"] is (name == "minilm")
    assert part.config["pooling"] == "average"
    ours = small.embeddings(part, golden["ids"])
    np.testing.assert_allclose(ours, golden[f"{name}/embeddings"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*goldens.READERS, "bert", "minilm"])
@pytest.mark.parametrize("shard", [1 << 30, 9_000])
def test_there_and_back_is_bit_exact(name: str, shard: int, tmp_path: Path) -> None:
    source = small.GOLDENS / name
    ours = small.to_ours(tmp_path, "hf", source, allow_unused=config(name))
    back = tmp_path / "back"
    convert(small.job("atlas-jax", "hf", ours, back, max_shard_bytes=shard), small.quiet)
    assert len(list(back.glob("*.safetensors"))) == (
        1 if shard > 1 << 20 else pytest.approx(4, abs=3)
    )
    before, after = read_folder(source), read_folder(back)
    assert small.all_bits(after.tensors) == small.all_bits(before.tensors)
    assert {k: after.config[k] for k in before.config} == before.config
    # By Hugging Face's own names: nothing but second names of one matrix is gone.
    theirs, again = read_tensors(source), read_tensors(back)
    if name == "bert":  # its names are those of another age
        return
    gone = set(theirs) - set(again)
    allowed = {f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    allowed |= {"pooler.dense.weight", "pooler.dense.bias", t5_names.NEVER_READ}
    allowed |= {"lm_head.weight"} if name == "t5_v1_0" else set()
    assert gone <= allowed
    for key in again:
        assert small.bits(theirs[key]) == small.bits(again[key]), key


def test_both_models_in_one_folder(tmp_path: Path) -> None:
    inputs = (str(small.GOLDENS / "t5_v1_1"), str(small.GOLDENS / "minilm"))
    tokenizers = {
        "reader": str(small.reader_tokenizer(tmp_path)),
        "retriever": str(small.wordpiece_file(tmp_path)),
    }
    job = small.job("hf", "atlas-jax", "", tmp_path / "ours", tokenizers=tokenizers)
    convert(dataclasses.replace(job, inputs=inputs, allow_unused=POOLER), small.quiet)
    certificate = json.loads((tmp_path / "ours" / "certificate.json").read_text())
    assert [part["kind"] for part in certificate["parts"]] == ["reader", "retriever"]
    record = certificate["parts"][0]["tensors"]["encoder/layers_1/attention/query/kernel"]
    assert record["from"] == ["encoder.block.1.layer.0.SelfAttention.q.weight"]
    assert record["shape"] == [12, 15] and record["dtype"] == "float32"
    assert set(certificate["parts"][1]["unused"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    convert(small.job("atlas-jax", "hf", tmp_path / "ours", tmp_path / "hf"), small.quiet)
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "reader", "retriever", "certificate.json"
    }  # fmt: skip
    modules = json.loads((tmp_path / "hf/retriever/modules.json").read_text())
    assert [module["type"].split(".")[-1] for module in modules] == [
        "Transformer", "Pooling", "Normalize"
    ]  # fmt: skip


def test_rounding_to_bfloat16_rounds_and_says_so(tmp_path: Path) -> None:
    source = small.GOLDENS / "t5_v1_1"
    ours = small.to_ours(tmp_path, "hf", source, dtype="bfloat16")
    part, before = small.parts_of(ours)["reader"], read_folder(source)
    for name, tensor in part.tensors.items():
        assert tensor.dtype.name == "bfloat16"
        expected = before.tensors[name].read().astype(tensor.dtype)
        np.testing.assert_array_equal(tensor.read(), expected)


def test_mt5_is_read_as_the_t5_it_is(tmp_path: Path) -> None:
    folder = broken(tmp_path, "t5_v1_1")
    before = read_folder(folder)
    small.edit_json(folder / "config.json", model_type="mt5")
    assert small.all_bits(read_folder(folder).tensors) == small.all_bits(before.tensors)


# --- what is refused, and how ------------------------------------------------------------


def broken(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(small.GOLDENS / name, tmp_path / "broken"))


def refusal(tmp_path: Path, folder: Path, **changes: Any) -> str:
    """The error of a conversion, after which nothing is there that was not before."""
    output = tmp_path / "out" / "model"
    output.parent.mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        convert(small.job("hf", "hf", folder, output, **changes), small.quiet)
    assert list(output.parent.iterdir()) == []
    return str(caught.value)


def test_unused_tensors_are_an_error_unless_allowed(tmp_path: Path) -> None:
    message = refusal(tmp_path, small.GOLDENS / "minilm")
    assert "no place for 2 tensors of the source: pooler.dense.bias, pooler.dense.weight" in message
    assert "--allow_unused='pooler.dense.bias'" in message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = broken(tmp_path, "t5_v1_1")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is not in the folder" in refusal(tmp_path, folder)


def test_a_shard_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = broken(tmp_path, "t5_v1_1")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    assert "../model-00002-of-00003.safetensors is not in the folder" in refusal(tmp_path, folder)


def test_an_index_that_its_shards_do_not_keep_is_refused(tmp_path: Path) -> None:
    folder = broken(tmp_path, "t5_v1_1")
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    name, file = "shared.weight", good["weight_map"]["shared.weight"]
    other = next(f for f in good["weight_map"].values() if f != file)
    for home, message in (
        (other, f"{other}: {name} is missing, which {path.name} promises"),
        (3, "weight_map[...]: expected a text, got a whole number"),
        (None, "weight_map[...]: expected a text, got null"),
    ):
        path.write_text(json.dumps({"weight_map": {**good["weight_map"], name: home}}))
        assert message in refusal(tmp_path, folder)
    path.write_text(json.dumps(good))
    twice = {**read_file(folder / other), name: of_array(np.zeros(2, np.float32), name)}
    write_file(tmp_path / "twice", twice, {"format": "pt"})
    (tmp_path / "twice").replace(folder / other)
    assert f"{name} is in " in refusal(tmp_path, folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = broken(tmp_path, "t5_v1_1")
    edit = json.loads((folder / "config.json").read_text()) | {"num_layers": 3}
    (folder / "config.json").write_text(json.dumps(edit))
    message = refusal(tmp_path, folder)
    assert "missing: encoder.block.2.layer.0.SelfAttention.q.weight" in message


def test_fewer_layers_than_there_are_leave_tensors_over(tmp_path: Path) -> None:
    folder = broken(tmp_path, "t5_v1_1")
    small.edit_json(folder / "config.json", num_layers=1)
    assert "encoder.block.1.layer.0.SelfAttention." in refusal(tmp_path, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 142}, "lm_head.weight: as the reader's decoder/logits_dense/kernel it has "
         "shape [12, 141], but the config says [12, 142]"),
        ({"num_heads": 5}, "kernel it has shape [12, 15], but the config says [12, 25]"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
        ({"model_type": "bart"}, "model_type is 'bart'"),
        ({"d_model": None}, "the field d_model is missing"),
        ({"scale_decoder_outputs": True}, "lm_head.weight differs from shared.weight"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = broken(tmp_path, "t5_v1_1")
    small.edit_json(folder / "config.json", **changes)
    assert message in refusal(tmp_path, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; an encoder has 'gelu'"),
        ({"num_attention_heads": 4}, "num_heads = 4: must divide"),
        ({"max_position_embeddings": 20}, "it has shape [19, 15], but the config says [20, 15]"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ],
)
def test_an_encoder_of_another_kind_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = broken(tmp_path, "minilm")
    small.edit_json(folder / "config.json", **changes)
    assert message in refusal(tmp_path, folder, allow_unused=POOLER)


def test_other_poolings_and_modules_are_refused(tmp_path: Path) -> None:
    folder = broken(tmp_path, "minilm")
    path = folder / "1_Pooling" / "config.json"
    small.edit_json(path, pooling_mode_max_tokens=True)
    assert "pooling by pooling_mode_mean_tokens, pooling_mode_max_tokens" in refusal(
        tmp_path, folder
    )
    small.edit_json(path, pooling_mode_max_tokens=False, pooling_mode="weightedmean")
    assert "pooling_mode is 'weightedmean'" in refusal(tmp_path, folder)
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(modules.replace("Normalize", "Dense"))
    small.edit_json(path, pooling_mode="mean")
    assert "a module sentence_transformers.models.Dense" in refusal(tmp_path, folder)


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_refused(keep: float, tmp_path: Path) -> None:
    folder = broken(tmp_path, "t5_bf16")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep if keep > 1 else keep * len(raw))])
    message = refusal(tmp_path, folder)
    begin = 8 + int.from_bytes(raw[:8], "little")
    if keep > 1:  # the header itself
        assert f"{path}: not a whole safetensors file" in message
        return
    kept = int(keep * len(raw)) - begin
    header = json.loads(raw[8:begin])
    header.pop("__metadata__")
    (cut,) = [n for n, e in header.items() if e["data_offsets"][0] <= kept < e["data_offsets"][1]]
    start, end = header[cut]["data_offsets"]
    assert f"{path}: {cut} has {kept - start} of {end - start} bytes: not a whole" in message


@pytest.mark.parametrize(
    "header", [b"[]", b"{}", b'{"a": 1}', b'{"a": {"data_offsets": ["x", 9]}}', b'{"a"', b"\xff"]
)
def test_a_damaged_safetensors_header_is_refused(header: bytes, tmp_path: Path) -> None:
    folder = broken(tmp_path, "t5_bf16")
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    expected = "missing: " if header == b"{}" else f"{path}: not a whole safetensors file"
    assert expected in refusal(tmp_path, folder)


def test_copies_of_the_embedding_have_to_be_copies(tmp_path: Path) -> None:
    arrays = {n: t.read().copy() for n, t in read_tensors(small.GOLDENS / "t5_v1_0").items()}
    folder = broken(tmp_path, "t5_v1_0")
    (folder / "pytorch_model.bin").unlink()
    for name in ("lm_head.weight", "encoder.embed_tokens.weight"):
        changed = {**arrays, name: arrays[name].copy()}
        changed[name][3, 4] += 1
        write(folder, changed)
        assert f"{name} differs from shared.weight" in refusal(tmp_path, folder)
    write(folder, arrays)
    convert(small.job("hf", "hf", folder, tmp_path / "fine"), small.quiet)


def write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    write_sharded(folder, {n: of_array(a, n, (n,)) for n, a in arrays.items()}, 1 << 30)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    path = small.reader_tokenizer(tmp_path, sentinels=130)
    message = refusal(tmp_path, small.GOLDENS / "t5_v1_1", tokenizers={"reader": str(path)})
    assert "the reader's tokenizer has 150 ids, but its embedding only 141 rows" in message


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")
    with pytest.raises(UserError, match="exists already; remove it or choose another --output"):
        convert(small.job("hf", "hf", small.GOLDENS / "t5_v1_1", output), small.quiet)
    assert [path.name for path in output.iterdir()] == ["mine"]


def test_an_output_in_a_bucket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = dataclasses.replace(
        small.job("hf", "hf", small.GOLDENS / "t5_v1_1", tmp_path), output="gs://b/out"
    )
    with pytest.raises(UserError, match="--output=gs://b/out: expected a folder on a disk"):
        convert(job, small.quiet)
    assert list(tmp_path.iterdir()) == []


def test_missing_tensors_may_be_allowed_by_name(tmp_path: Path) -> None:
    folder = broken(tmp_path, "minilm")
    name = "encoder.layer.1.output.LayerNorm.weight"
    arrays = {n: t.read().copy() for n, t in read_tensors(folder).items() if "pooler" not in n}
    del arrays[name]
    write(folder, arrays)
    assert f"missing: {name} (1 of 37 tensors)" in refusal(tmp_path, folder)
    done = convert(
        small.job("hf", "hf", folder, tmp_path / "filled", allow_missing=("*LayerNorm.weight",)),
        small.quiet,
    )
    assert done[0].missing == [name]
    filled = read_folder(tmp_path / "filled").tensors["encoder/layers_1/output_layer_norm/scale"]
    np.testing.assert_array_equal(filled.read(), np.ones(15, np.float32))
