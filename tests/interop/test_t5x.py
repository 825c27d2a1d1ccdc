"""T5X checkpoints in and out, against a real one where shared/ is at hand."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore

from atlas_jax import from_gin
from atlas_jax.conversion.convert import convert
from atlas_jax.core import partitioning
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig, PartitionRules
from atlas_jax.interop.huggingface import read_folder
from atlas_jax.interop.t5x import read_checkpoint, write_checkpoint
from atlas_jax.interop.t5x_files import chunk_shape, find_checkpoint, read_leaves, write_leaves
from atlas_jax.interop.tensors import of_array
from tests.interop import small

SHARED = Path(os.environ.get("ATLAS_SHARED", Path(__file__).parents[3] / "shared"))
SAMPLE = SHARED / "data" / "t5x"
needs_sample = pytest.mark.skipif(
    not (SAMPLE / "params.npz").exists(),
    reason=f"no T5X sample at {SAMPLE}; set ATLAS_SHARED to the folder that has data/t5x",
)


def sample_tokenizer(folder: Path) -> dict[str, str]:
    return {"reader": str(small.reader_tokenizer(folder))}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@needs_sample
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_the_sample_has_its_numbers(kind: str) -> None:
    part = read_checkpoint(SAMPLE / kind)
    with np.load(SAMPLE / "params.npz") as params, np.load(SAMPLE / "optimizer_state.npz") as state:
        assert set(part.tensors) == set(params.files)
        assert set(part.optimizer) == set(state.files)
        for name, tensor in part.tensors.items():
            expected = params[name]
            if kind == "bf16":
                expected = expected.astype(ml_dtypes.bfloat16)
            assert small.bits(tensor) == small.bits(of_array(expected, name)), name
        for name, tensor in part.optimizer.items():
            assert small.bits(tensor) == small.bits(of_array(state[name], name)), name


@needs_sample
@pytest.mark.parametrize(("kind", "suffix"), [("f32", ""), ("bf16", "_from_bf16_params")])
def test_the_sample_gives_its_outputs(kind: str, suffix: str) -> None:
    part = read_checkpoint(SAMPLE / kind)
    described = json.loads((SAMPLE / "model.json").read_text())["config"]
    for name, value in part.config.items():
        assert described.get(name, 32) == (list(value) if isinstance(value, tuple) else value)
    with np.load(SAMPLE / "io.npz") as file:
        expected = dict(file)
    real = expected["decoder_target_tokens"] > 0
    source, inputs = expected["encoder_input_tokens"], expected["decoder_input_tokens"]
    ours = small.logits(part, source, inputs)
    np.testing.assert_allclose(ours[real], expected[f"logits{suffix}"][real], rtol=0, atol=1e-5)


@needs_sample
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_there_and_back_every_file_is_the_same(kind: str, tmp_path: Path) -> None:
    """t5x -> ours -> t5x, optimiser state included: not a byte of any file differs."""
    tokenizers = sample_tokenizer(tmp_path)
    ours, back = tmp_path / "ours", tmp_path / "back"
    convert(small.job("t5x", "atlas-jax", SAMPLE / kind, ours, tokenizers=tokenizers), small.quiet)
    done = convert(small.job("atlas-jax", "t5x", ours, back), small.quiet)
    assert len(done[0].tensors) == 52 + 209
    assert contents(find_checkpoint(back)) == contents(SAMPLE / kind / "checkpoint_1003")


@needs_sample
def test_through_hugging_face_and_back(tmp_path: Path) -> None:
    convert(small.job("t5x", "hf", SAMPLE / "f32", tmp_path / "hf"), small.quiet)
    convert(small.job("hf", "t5x", tmp_path / "hf", tmp_path / "t5x"), small.quiet)
    again, before = read_checkpoint(tmp_path / "t5x"), read_checkpoint(SAMPLE / "f32")
    assert small.all_bits(again.tensors) == small.all_bits(before.tensors)
    assert (tmp_path / "t5x" / "checkpoint_0").is_dir()
    assert set(again.optimizer) == {"step"}


@needs_sample
def test_without_optimizer_the_step_stays(tmp_path: Path) -> None:
    job = small.job("t5x", "t5x", SAMPLE / "bf16", tmp_path / "o", optimizer=False, dtype="float32")
    convert(job, small.quiet)
    again = read_checkpoint(tmp_path / "o")
    assert find_checkpoint(tmp_path / "o").name == "checkpoint_1003"
    assert set(again.optimizer) == {"step"}
    assert {tensor.dtype.name for tensor in again.tensors.values()} == {"float32"}


# --- layouts ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unscanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5X checkpoint of a golden T5 1.1 with odd sizes."""
    output = tmp_path_factory.mktemp("t5x") / "checkpoint"
    convert(small.job("hf", "t5x", small.GOLDENS / "t5_v1_1", output), small.quiet)
    return output


@pytest.mark.parametrize("name", ["t5_v1_0", "t5_v1_1"])
def test_scanned_layers(name: str, tmp_path: Path) -> None:
    job = small.job("hf", "t5x", small.GOLDENS / name, tmp_path / "scanned", scan_layers=True)
    convert(job, small.quiet)
    leaves = read_leaves(find_checkpoint(tmp_path / "scanned"))
    shapes = {n.removeprefix("target/"): leaf.shape for n, leaf in leaves.items()}
    # embed, layers, heads, kv / heads, layers, kv, embed (README of the sample)
    assert shapes["encoder/encoder/attention/query/kernel"] == (12, 2, 3, 5)
    assert shapes["decoder/decoder/encoder_decoder_attention/out/kernel"] == (3, 3, 5, 12)
    assert shapes["decoder/decoder/relpos_bias/rel_embedding"] == (3, 3, 32)
    assert shapes["encoder/encoder/pre_mlp_layer_norm/scale"] == (12, 2)
    assert shapes["decoder/decoder_norm/scale"] == (12,)
    assert ("decoder/logits_dense/kernel" in shapes) is (name == "t5_v1_1")
    convert(small.job("t5x", "hf", tmp_path / "scanned", tmp_path / "hf"), small.quiet)
    again, before = read_folder(tmp_path / "hf"), read_folder(small.GOLDENS / name)
    assert small.all_bits(again.tensors) == small.all_bits(before.tensors)


def test_position_tables_that_differ_by_layer_are_refused(tmp_path: Path) -> None:
    job = small.job("hf", "t5x", small.GOLDENS / "t5_v1_1", tmp_path / "s", scan_layers=True)
    convert(job, small.quiet)
    folder = find_checkpoint(tmp_path / "s")
    place = folder / "target.encoder.encoder.relpos_bias.rel_embedding"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{place}/"}}
    store = tensorstore.open(spec).result()
    store[0, 1, 0].write(7.0).result()
    with pytest.raises(UserError, match="relpos_bias/rel_embedding: each layer has a table"):
        read_checkpoint(tmp_path / "s")


def test_optax_state_and_empty_leaves_survive(unscanned: Path, tmp_path: Path) -> None:
    part = read_checkpoint(unscanned)
    name = "encoder/layers_0/mlp/wo/kernel"
    moment = part.tensors[name].read() * 2
    part.optimizer = {
        "step": of_array(np.asarray(5, np.int32), "step"),
        "param_states/0/count": of_array(np.asarray(5, np.int32), "count"),
        f"param_states/0/mu/{name}": of_array(moment, "mu"),
    }
    part.empty = {"param_states/1": "map", f"param_states/0/nu/{name}": "nil"}
    write_checkpoint(part, tmp_path, scan=False, step=0)
    tokenizers = sample_tokenizer(tmp_path)
    ours, back = tmp_path / "ours", tmp_path / "back"
    convert(small.job("t5x", "atlas-jax", tmp_path, ours, tokenizers=tokenizers), small.quiet)
    convert(small.job("atlas-jax", "t5x", ours, back), small.quiet)
    again = read_checkpoint(back)
    assert small.all_bits(again.optimizer) == small.all_bits(part.optimizer)
    assert again.empty == part.empty
    folder = find_checkpoint(back)
    assert contents(folder) == contents(find_checkpoint(tmp_path))
    assert (folder / f"state.param_states.0.mu.{name.replace('/', '.')}").is_dir()


def test_inline_arrays_and_version_2(unscanned: Path, tmp_path: Path) -> None:
    """A writer may inline everything; version 2 keeps bfloat16 as uint16."""
    part = read_checkpoint(unscanned)
    leaves = {f"target/{n}": t for n, t in part.tensors.items()}
    leaves["state/step"] = part.optimizer["step"]
    (tmp_path / "checkpoint_4").mkdir()
    write_leaves(tmp_path / "checkpoint_4", leaves, set(leaves))
    assert [f.name for f in (tmp_path / "checkpoint_4").iterdir()] == ["checkpoint"]
    assert small.all_bits(read_checkpoint(tmp_path).tensors) == small.all_bits(part.tensors)

    old = tmp_path / "old" / "checkpoint_1"
    old.mkdir(parents=True)
    rounded = part.tensors["decoder/decoder_norm/scale"].read().astype(ml_dtypes.bfloat16)
    write_leaves(old, {"target/x": of_array(rounded.view(np.uint16), "x")}, set())
    raw = msgpack.unpackb((old / "checkpoint").read_bytes())
    (old / "checkpoint").write_bytes(msgpack.packb({**raw, "version": 2}))
    found = read_leaves(old)["target/x"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.read(), rounded)


def test_arrays_above_64_mib_are_cut() -> None:
    """As the README of the sample describes it: the largest axis goes down to a divisor."""
    assert chunk_shape((32128, 512), 4) == [32128, 512]  # 62.75 MiB
    assert chunk_shape((32128, 4096), 4) == [4016, 4096]  # the next is 32128 / 8
    assert chunk_shape((), 4) == []
    assert chunk_shape((1 << 25, 1), 4) == [1 << 24, 1]


def test_the_newest_complete_checkpoint_is_taken(unscanned: Path, tmp_path: Path) -> None:
    for name in ("checkpoint_9", "checkpoint_10", "checkpoint_11.tmp-12", "checkpoint_12"):
        (tmp_path / name).mkdir()
        if name != "checkpoint_12":
            shutil.copy(find_checkpoint(unscanned) / "checkpoint", tmp_path / name)
    assert find_checkpoint(tmp_path).name == "checkpoint_10"
    with pytest.raises(UserError, match="no T5X checkpoint"):
        find_checkpoint(tmp_path / "checkpoint_12")


def test_a_position_table_that_t5x_cannot_express_is_refused(tmp_path: Path) -> None:
    load_gin([], ["ReaderConfig.relpos_max_distance=64"])
    with pytest.raises(UserError, match="ReaderConfig.relpos_max_distance = 64: T5X's network has"):
        convert(small.job("hf", "t5x", small.GOLDENS / "t5_v1_1", tmp_path / "o"), small.quiet)
    assert list(tmp_path.iterdir()) == []


# --- damage ----------------------------------------------------------------------------


def damaged(unscanned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_checkpoint(unscanned), tmp_path / "checkpoint_0"))


def refusal(folder: Path, tmp_path: Path) -> str:
    output = tmp_path / "out" / "model"
    output.parent.mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        convert(small.job("t5x", "hf", folder, output), small.quiet)
    assert list(output.parent.iterdir()) == []
    return str(caught.value)


NAME = "target/encoder/layers_1/mlp/wo/kernel"


def test_damaged_arrays_are_named(unscanned: Path, tmp_path: Path) -> None:
    folder = damaged(unscanned, tmp_path)
    place = folder / NAME.replace("/", ".")
    chunk = (place / "0.0").read_bytes()
    (place / "0.0").unlink()
    assert f"{NAME}: the chunk {place.name}/0.0 is missing" in refusal(folder, tmp_path)
    (place / "0.0").write_bytes(chunk[:-20])
    assert f"{NAME}: cannot be read" in refusal(folder, tmp_path)
    (place / "0.0").write_bytes(chunk)
    meta = (place / ".zarray").read_text()
    (place / ".zarray").write_text(meta.replace("[22,12]", "[22,13]"))
    assert f"{NAME}: the index says shape [22, 12], .zarray [22, 13]" in refusal(folder, tmp_path)
    (place / ".zarray").unlink()
    assert f"{NAME}: {place.name}/.zarray is absent or damaged" in refusal(folder, tmp_path)
    for wrong in ('"chunks":[0,12]', '"chunks":[22]', '"chunks":[22,-1]'):
        (place / ".zarray").write_text(meta.replace('"chunks":[22,12]', wrong))
        assert f"{NAME}: {place.name}/.zarray is absent or damaged" in refusal(folder, tmp_path)
    for wrong in ('"dtype":"nonsense"', '"dtype":"<f9"'):
        (place / ".zarray").write_text(meta.replace('"dtype":"<f4"', wrong))
        assert f"{NAME}: {place.name}/.zarray is absent or damaged" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("encoder/layers_1/mlp/wo/kernel", (22, 13), [22, 12]),
        ("decoder/logits_dense/kernel", (12, 140), [12, 141]),  # of another vocabulary
        ("decoder/relpos_bias/rel_embedding", (3, 16), [3, 32]),
        ("decoder/layers_2/pre_mlp_layer_norm/scale", (12, 1), [12]),
    ],
)
def test_a_tensor_of_another_shape_is_named(
    name: str, shape: tuple[int, ...], expected: list[int], unscanned: Path, tmp_path: Path
) -> None:
    part = read_checkpoint(unscanned)
    assert list(part.tensors[name].shape) == expected
    part.tensors[name] = of_array(np.zeros(shape, np.float32), name, (name,))
    write_checkpoint(part, tmp_path, scan=False, step=0)
    message = f"{name} it has shape {list(shape)}, but the config says {expected}"
    assert message in refusal(find_checkpoint(tmp_path), tmp_path)


@pytest.mark.parametrize("scan", [False, True])
def test_missing_tensors_may_be_allowed_by_name(
    scan: bool, unscanned: Path, tmp_path: Path
) -> None:
    leaves = read_leaves(find_checkpoint(unscanned))
    gone = ("encoder/encoder_norm/scale", "encoder/layers_1/mlp/wo/kernel")
    if scan:
        job = small.job("hf", "t5x", small.GOLDENS / "t5_v1_1", tmp_path / "s", scan_layers=True)
        convert(job, small.quiet)
        leaves = read_leaves(find_checkpoint(tmp_path / "s"))
        gone = ("encoder/encoder_norm/scale",)
    folder = tmp_path / "checkpoint_0"
    folder.mkdir()
    write_leaves(folder, {n: t for n, t in leaves.items() if n[7:] not in gone}, set())
    assert f"missing: {', '.join(gone)} ({len(gone)} tensors)" in refusal(folder, tmp_path)
    for allowed in (("*/scale",), gone):
        job = small.job("t5x", "hf", folder, tmp_path / "filled", allow_missing=allowed)
        if not scan and allowed != gone:
            with pytest.raises(UserError, match=rf"missing: {gone[1]} \(1 tensors\)"):
                convert(job, small.quiet)
            continue
        (done,) = convert(job, small.quiet)
        assert tuple(done.missing) == gone
        tensors = read_folder(tmp_path / "filled").tensors
        assert (tensors[gone[0]].read() == 1).all()
        assert all((tensors[name].read() == 0).all() for name in gone[1:])
        shutil.rmtree(tmp_path / "filled")


def test_a_tokenizer_of_another_vocabulary_is_refused(unscanned: Path, tmp_path: Path) -> None:
    large = {"reader": str(small.reader_tokenizer(tmp_path, sentinels=130))}
    job = small.job("t5x", "atlas-jax", unscanned, tmp_path / "out", tokenizers=large)
    with pytest.raises(UserError, match="tokenizer has 150 ids, but its embedding only 141 rows"):
        convert(job, small.quiet)
    assert not (tmp_path / "out").exists()


def edit(folder: Path, change: Any) -> None:
    path = folder / "checkpoint"
    tree = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    change(tree)
    path.write_bytes(msgpack.packb(tree))


def test_damaged_indices_are_refused(unscanned: Path, tmp_path: Path) -> None:
    folder = damaged(unscanned, tmp_path)
    good = (folder / "checkpoint").read_bytes()
    for share in (0.0, 0.3, 0.99):
        (folder / "checkpoint").write_bytes(good[: int(share * len(good))])
        assert "not a whole T5X index" in refusal(folder, tmp_path)

    def layer(tree: Any) -> Any:
        return tree["optimizer"]["target"]["encoder"]["layers_1"]["mlp"]

    for path in ("../../elsewhere/", "/etc/", "/", ""):
        (folder / "checkpoint").write_bytes(good)
        edit(folder, lambda t, p=path: layer(t)["wo"]["kernel"]["kvstore"].update(path=p))
        message = refusal(folder, tmp_path)
        assert f"{NAME}: " in message
        assert (
            "outside of the folder" in message or "names no folder" in message or "etc" in message
        )
    for change, expected in (
        (lambda t: layer(t).pop("wo"), "missing: encoder/layers_1/mlp/wo/kernel (1 tensors)"),
        (lambda t: t.update(version=4), "version 4; this reads 2 and 3"),
        (lambda t: t.pop("optimizer"), "it has neither 'optimizer' nor 'target'"),
        (lambda t: t["optimizer"].pop("target"), "has no parameters"),
        (lambda t: t["optimizer"].update(more={"a": 1.5}), "--allow_unused='more/a'"),
        (lambda t: layer(t).update(bias="text"), "mlp/bias: the index refers to 'text'"),
    ):  # fmt: skip
        (folder / "checkpoint").write_bytes(good)
        edit(folder, change)
        assert expected in refusal(folder, tmp_path)


def test_a_hostile_extension_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint_1"
    folder.mkdir()
    for dtype, code in (("O", 1), ("float32", 7), ("nonsense", 1)):
        data = msgpack.packb(((1,), dtype, b"\0" * 8))
        tree = {"version": 3, "optimizer": {"target": {"x": msgpack.ExtType(code, data)}}}
        (folder / "checkpoint").write_bytes(msgpack.packb(tree))
        with pytest.raises(UserError, match="not a whole T5X index"):
            read_leaves(folder)


# --- logical axes ----------------------------------------------------------------------

# What T5X's standard_logical_axis_rules gives for 1-D and 2-D activations and parameters.
_ALWAYS = (("batch", "data"), ("vocab", "model"))
_HEADS = (("mlp", "model"), ("heads", "model"), ("kv", None), ("joined_kv", "model"))
_REPLICATED = tuple(
    (name, None)
    for name in ("relpos_buckets", "abspos_buckets", "length", "layers", "stack", "mlp_activations")
)
T5X_RULES = {
    (1, 1): (*_ALWAYS, ("embed", None), *_HEADS, *_REPLICATED),
    (2, 1): (*_ALWAYS, *_HEADS, ("embed", "model"), *_REPLICATED),
    (1, 2): (*_ALWAYS, *_HEADS, ("embed", "data"), *_REPLICATED),
    (2, 2): (*_ALWAYS, *_HEADS, ("embed", "model"), ("embed", "data"), *_REPLICATED),
}
# Rules first to last, a mesh axis once: what becomes of vocab x embed and of embed x mlp.
PLACED = {
    (1, 1): (("model", None), (None, "model")),
    (2, 1): (("model", None), (None, "model")),
    (1, 2): (("model", "data"), ("data", "model")),
    (2, 2): (("model", "data"), ("data", "model")),
}


@pytest.mark.parametrize("dims", T5X_RULES)
def test_the_axis_rules_of_t5x_are_taken_as_they_are(dims: tuple[int, int]) -> None:
    load_gin([], [f"PartitionRules.rules={T5X_RULES[dims]!r}"])
    rules = tuple(from_gin.told(PartitionRules).rules)
    assert rules == T5X_RULES[dims]
    for axes, expected in zip((("vocab", "embed"), ("embed", "mlp")), PLACED[dims], strict=True):
        assert partitioning.logical_to_spec(axes, rules) == jax.sharding.PartitionSpec(*expected)
    spec = partitioning.logical_to_spec(("embed", "layers", "heads", "kv"), rules)
    kept = PLACED[dims][1][0]
    assert spec == jax.sharding.PartitionSpec(kept, None, "model", None)
    mesh = partitioning.make_mesh(MeshConfig(data=2, model=4))
    with partitioning.activate(mesh, rules):
        x = jax.jit(lambda x: partitioning.constrain(x, "batch", "mlp"))(np.ones((4, 8)))
    assert x.sharding.spec == jax.sharding.PartitionSpec("data", "model")
