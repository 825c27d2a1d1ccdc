"""The command itself: what it prints, what it asks for, and what it leaves behind."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from atlas_jax import cli
from atlas_jax.conversion import convert as conversion
from atlas_jax.conversion.convert import convert
from atlas_jax.core.errors import UserError
from atlas_jax.interop import certificate, meta_atlas
from atlas_jax.interop.huggingface import read_tensors
from atlas_jax.interop.safetensors_files import read_file, write_file
from atlas_jax.interop.tensors import of_array
from atlas_jax.models.folder import load_model
from atlas_jax.reader.config import ReaderConfig
from benchmarks import conversion_memory
from tests.device_bytes import most_bytes
from tests.interop import small


def run(*flags: object) -> int:
    return cli.main(["convert", *map(str, flags)])


def test_from_hugging_face_to_a_model_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--from=hf", "--to=atlas-jax", f"--output={tmp_path / 'ours'}"]
    flags += [f"--input={small.GOLDENS / name}" for name in ("t5_v1_0", "bert")]
    flags += [f"--reader_tokenizer={small.reader_tokenizer(tmp_path)}"]
    flags += [f"--retriever_tokenizer={small.wordpiece_file(tmp_path)}"]
    assert run(*flags, "--allow_unused=bert.pooler.*") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reader: 60 tensors read back, every bit equal"
    assert "  not used: lm_head.weight (equal to shared.weight)" in lines
    assert "retriever: 37 tensors read back, every bit equal" in lines
    pooler = "bert.pooler.dense.weight (allowed by --allow_unused=bert.pooler.*)"
    assert f"  not used: {pooler}" in lines
    # What the rest of the program reads.
    parts = load_model(tmp_path / "ours")
    assert parts["reader"].config["mlp_activations"] == ["relu"]
    assert parts["retriever"].config["tied"] is True
    assert parts["reader"].params["encoder"]["encoder_norm"]["scale"].shape == (12,)


@pytest.mark.parametrize("target", ["atlas-jax", "hf", "t5x"])
def test_no_device_holds_a_parameter_while_it_converts(tmp_path: Path, target: str) -> None:
    """A host reads, renames and writes one tensor after the other, so xxl needs no slice."""
    job = small.job("hf", target, small.GOLDENS / "t5_v1_1", tmp_path / "o")
    tokenizers = {"reader": small.reader_tokenizer(tmp_path)} if target == "atlas-jax" else {}
    job = dataclasses.replace(job, tokenizers=tokenizers, scan_layers=target == "t5x")
    _, most = most_bytes(lambda: convert(job, small.quiet))
    assert most == 0 and (tmp_path / "o").exists()


def test_a_model_folder_needs_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    input = small.GOLDENS / "t5_v1_1"
    code = run("--from=hf", "--to=atlas-jax", f"--input={input}", f"--output={tmp_path / 'o'}")
    assert code == 2
    error = capsys.readouterr().err
    assert "the reader has no tokenizer" in error and "--reader_tokenizer=FILE" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to=hf", "--scan_layers"), "--scan_layers is for --to=t5x"),
        (("--to=hf", "--max_shard_size=big"), "--max_shard_size=big: expected something like"),
        (("--to=hf", "--num_heads=3"), "--num_heads is for --from=meta-atlas; --from=hf tells it"),
        (
            ("--to=hf", "--reader_model_type=t5-base"),
            "--reader_model_type is for --from=meta-atlas",
        ),
        (("--to=hf", "--part=retriever"), "the input holds no retriever, but reader"),
        (("--to=hf", "--reader_tokenizer=nowhere.json"), "nowhere.json: no such file"),
    ],
)
def test_flags_that_do_not_fit(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    input = small.GOLDENS / "t5_v1_1"
    assert run("--from=hf", f"--input={input}", f"--output={tmp_path / 'o'}", *flags) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_of_a_kind_and_two_inputs(tmp_path: Path) -> None:
    job = small.job("hf", "hf", small.GOLDENS / "t5_v1_1", tmp_path / "o")
    twice = dataclasses.replace(job, inputs=job.inputs * 2)
    with pytest.raises(UserError, match="is a reader, too; give one of each kind"):
        convert(twice, small.quiet)
    with pytest.raises(UserError, match="--from=t5x takes one --input, not 2"):
        convert(dataclasses.replace(twice, source="t5x"), small.quiet)
    with pytest.raises(UserError, match="a T5X checkpoint holds a T5"):
        retriever = small.job("hf", "t5x", small.GOLDENS / "minilm", tmp_path / "o")
        convert(dataclasses.replace(retriever, allow_unused=("pooler.*",)), small.quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_field_that_a_format_does_not_tell_can_be_bound(tmp_path: Path) -> None:
    file = small.GOLDENS / "atlas_tied.pth.tar"
    flags = ["--from=meta-atlas", "--to=atlas-jax", f"--input={file}", "--part=retriever"]
    flags += [f"--retriever_tokenizer={small.wordpiece_file(tmp_path)}"]
    bound = ["--gin.RetrieverConfig.num_heads=5", "--gin.RetrieverConfig.max_positions=19"]
    assert run(*flags, *bound, f"--output={tmp_path / 'o'}") == 0
    assert load_model(tmp_path / "o")["retriever"].config["num_heads"] == 5


def test_a_number_of_heads_that_was_taken_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The golden retriever is 15 wide, so that one head is taken; its own number is 3."""
    file = small.GOLDENS / "atlas_tied.pth.tar"
    flags = ["--from=meta-atlas", "--to=atlas-jax", f"--input={file}", "--part=retriever"]
    flags += [f"--retriever_tokenizer={small.wordpiece_file(tmp_path)}"]
    assert run(*flags, f"--output={tmp_path / 'taken'}") == 0
    assert "retriever: num_heads = 1, of 64 channels each" in capsys.readouterr().out
    assert run(*flags, "--num_heads=3", f"--output={tmp_path / 'given'}") == 0
    assert "num_heads" not in capsys.readouterr().out
    assert load_model(tmp_path / "given")["retriever"].config["num_heads"] == 3
    assert run(*flags, "--num_heads=4", f"--output={tmp_path / 'o'}") == 2
    assert "num_heads = 4: must divide" in capsys.readouterr().err
    both = ["--num_heads=3", "--gin.RetrieverConfig.num_heads=3", f"--output={tmp_path / 'o'}"]
    assert run(*flags, *both) == 2
    assert "say the same: give one" in capsys.readouterr().err


def test_verify_notices_a_number_of_heads_that_nothing_confirms(tmp_path: Path) -> None:
    file = small.GOLDENS / "atlas_tied.pth.tar"
    job = small.job("meta-atlas", "atlas-jax", file, tmp_path / "o", verify=True)
    with pytest.raises(UserError, match="--verify: nothing tells the retriever's number of heads"):
        convert(job, small.quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("heads", "path", "width", "message"),
    [
        (12, "facebook/contriever", 768, ""),
        (6, "facebook/contriever", 768, "names a model of 12 heads, but num_heads = 6"),
        (12, "somewhere/own", 768, "nothing tells the retriever's number of heads"),
        (6, "facebook/contriever", 384, "nothing tells the retriever's number of heads"),
    ],
)
def test_a_published_contriever_confirms_its_heads(
    heads: int, path: str, width: int, message: str
) -> None:
    config = {"num_heads": heads, "hidden_dim": width}
    found = meta_atlas._heads(config, {"retriever_model_path": path}, is_given=False)
    if not message:
        return found.check()
    with pytest.raises(UserError, match=message):
        found.check()


def padded_hf(folder: Path, model: str, rows: int) -> Path:
    """A golden model with another number of embedding rows."""
    shutil.copytree(small.GOLDENS / model, folder)
    small.edit_json(folder / "config.json", vocab_size=rows)
    tensors = read_tensors(small.GOLDENS / model)
    for path in folder.glob("*.bin"):
        path.unlink()
    for name, tensor in tensors.items():
        if name.endswith(("word_embeddings.weight", "shared.weight", "lm_head.weight",
                          "embed_tokens.weight")):  # fmt: skip
            tensors[name] = of_array(np.zeros((rows, tensor.shape[1]), np.float32), name, (name,))
    write_file(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def vocabulary(folder: Path, kind: str, ids: int) -> dict[str, str]:
    """A tokenizer of so many ids."""
    if kind == "reader":
        return {kind: str(small.reader_tokenizer(folder, sentinels=ids - 20))}
    path = small.wordpiece_file(folder)
    known = path.read_text().splitlines()
    path.write_text("\n".join([*known, *(f"word{i}" for i in range(ids - len(known)))]) + "\n")
    return {kind: str(path)}


@pytest.mark.parametrize(
    ("model", "kind", "rows", "ids", "passes"),
    [
        ("minilm", "retriever", 30_522, 30_522, True),
        ("minilm", "retriever", 30_522, 28_996, False),  # cased, for an uncased BERT
        ("minilm", "retriever", 29_056, 28_996, True),  # padded to a multiple of 128
        ("t5_v1_1", "reader", 32_128, 32_100, True),
        ("t5_v1_1", "reader", 250_112, 32_100, False),  # T5's, for mT5
        ("t5_v1_1", "reader", 32_355, 32_100, True),
        ("t5_v1_1", "reader", 32_356, 32_100, False),
    ],
)
def test_a_tokenizer_with_too_few_ids_is_refused(
    model: str, kind: str, rows: int, ids: int, passes: bool, tmp_path: Path
) -> None:
    folder = padded_hf(tmp_path / "hf", model, rows)
    job = small.job("hf", "atlas-jax", folder, tmp_path / "o", allow_unused=("*pooler.*",),
                    tokenizers=vocabulary(tmp_path, kind, ids))  # fmt: skip
    if not passes:
        message = f"the {kind}'s tokenizer has {ids} ids, but its embedding {rows} rows: 256 or"
        with pytest.raises(UserError, match=message):
            convert(job, small.quiet)
        assert not (tmp_path / "o").exists()
        job = dataclasses.replace(job, allow_spare_rows=True)
    convert(job, small.quiet)
    assert (tmp_path / "o" / f"{kind}.safetensors").exists()


def test_a_model_folder_may_lack_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = small.to_ours(tmp_path, "hf", small.GOLDENS / "t5_v1_1")
    flags = ["--from=atlas-jax", "--to=hf", f"--input={ours}", f"--output={tmp_path / 'o'}"]
    assert run(*flags, "--allow_missing=*") == 2
    assert "--allow_missing: a model folder is whole" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_certificate_notices_a_writer_that_errs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(path: Path, tensors: dict, metadata: dict | None = None) -> None:
        name = "decoder/layers_0/mlp/wo/kernel"
        array = tensors[name].read().copy()
        array[2, 1] = np.nextafter(array[2, 1], np.inf)  # the last bit of one number
        write_file(path, {**tensors, name: of_array(array, name)}, metadata)

    monkeypatch.setattr(conversion, "write_file", careless)
    tokenizers = {"reader": str(small.reader_tokenizer(tmp_path))}
    job = small.job("hf", "atlas-jax", small.GOLDENS / "t5_v1_1", tmp_path / "o",
                    tokenizers=tokenizers)  # fmt: skip
    with pytest.raises(UserError, match="is not what was written as decoder/layers_0/mlp/wo/ker"):
        convert(job, small.quiet)
    assert not (tmp_path / "o").exists()


def test_the_certificate_names_every_tensor(tmp_path: Path) -> None:
    convert(small.job("hf", "t5x", small.GOLDENS / "t5_bf16", tmp_path / "o"), small.quiet)
    content = json.loads((tmp_path / "o" / certificate.FILE).read_text())
    assert (content["from"], content["to"]) == ("hf", "t5x")
    (part,) = content["parts"]
    record = part["tensors"]["token_embedder/embedding"]
    assert record["from"] == ["shared.weight"]
    assert record["dtype"] == "bfloat16" and record["shape"] == [141, 12]
    assert len(record["blake2b"]) == 32
    assert part["missing"] == []


def test_damage_to_a_model_folder_is_noticed(tmp_path: Path) -> None:
    ours = small.to_ours(tmp_path, "hf", small.GOLDENS / "t5_v1_1")
    path = ours / "reader.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="reader.safetensors is not the file that was saved"):
        convert(small.job("atlas-jax", "hf", ours, tmp_path / "o"), small.quiet)
    assert not (tmp_path / "o").exists()


def test_what_the_streaming_writer_writes_is_what_the_library_writes(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7, np.int64),
              "c": np.zeros((0, 2), np.float16)}  # fmt: skip
    tensors = {name: of_array(array, name, (name,)) for name, array in arrays.items()}
    write_file(tmp_path / "x.safetensors", tensors, {"note": "ü"})
    ours = {n: t.read() for n, t in read_file(tmp_path / "x.safetensors").items()}
    for found in (load_file(tmp_path / "x.safetensors"), ours):
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype and found[name].shape == array.shape


@pytest.mark.slow
def test_memory_stays_below_two_tensors_and_a_shard(tmp_path: Path) -> None:
    """A T5 of 0.3 GB in bfloat16, each direction in a process of its own."""
    config = ReaderConfig(
        vocab_size=32128, emb_dim=768, num_heads=12, head_dim=64, mlp_dim=1920,
        num_encoder_layers=5, num_decoder_layers=5,
    )  # fmt: skip
    made = conversion_memory.make_model(tmp_path / "model", config, shard_bytes=80 << 20)
    assert made.total > 5 * made.largest and made.total > 3 * made.shard
    route = conversion_memory.ROUTE[:5]  # every reader, every writer, and the largest of all
    legs = {found.leg: found.grew for found in conversion_memory.measure(made, route)}
    assert len(legs) == 4
    for leg, grew in legs.items():
        assert grew < 2 * made.largest + made.shard, (leg, grew, made)
