"""T5X checkpoints saved through Orbax: as T5X does today, and as it did since 2022."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import traverse_util

from atlas_jax.conversion.convert import convert
from atlas_jax.core.errors import UserError
from atlas_jax.interop.huggingface import read_folder
from atlas_jax.interop.t5x import read_checkpoint
from atlas_jax.interop.t5x_files import find_checkpoint, read_leaves
from atlas_jax.interop.tensors import Part
from tests.interop import small

KERNEL = "target/encoder/layers_1/mlp/wo/kernel"
FILLER = "state/param_states/encoder/layers_1/mlp/wo/kernel/m"


def train_state(part: Part) -> dict[str, Any]:
    """The state of T5X's trainer with Adafactor, as `TrainState.state_dict` gives it."""
    flat: dict[str, Any] = {"state/step": jnp.int32(7)}
    for i, (name, tensor) in enumerate(part.tensors.items()):
        array = tensor.read()
        flat[f"target/{name}"] = jnp.asarray(array)
        for field in ("m", "v_row", "v_col"):
            flat[f"state/param_states/{name}/{field}"] = np.zeros(1, np.float32)
        flat[f"state/param_states/{name}/v"] = jnp.abs(array) + np.float32(i)
    return dict(traverse_util.unflatten_dict(flat, sep="/"))


def save(folder: Path, tree: Any, **options: Any) -> Path:
    """One checkpoint by Orbax's manager, set up as T5X sets it up."""
    manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(step_prefix="checkpoint"),
        item_handlers={"state": ocp.PyTreeCheckpointHandler(**options)},
    )
    manager.save(7, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
    manager.wait_until_finished()
    manager.close()
    return folder / "checkpoint_7"


@pytest.fixture(scope="module")
def golden() -> Part:
    return read_folder(small.GOLDENS / "t5_v1_1")


@pytest.fixture(scope="module")
def database(golden: Part, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("ocdbt"), train_state(golden), use_ocdbt=True)


@pytest.fixture(scope="module")
def folders(golden: Part, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("zarr"), train_state(golden), use_ocdbt=False)


def assert_is_the_golden(part: Part, golden: Part) -> None:
    for name, tensor in golden.tensors.items():
        assert small.bits(part.tensors[name]) == small.bits(tensor), name
    expected = traverse_util.flatten_dict(train_state(golden)["state"], sep="/")
    assert set(part.optimizer) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(part.optimizer[name].read(), np.asarray(array), name)


@pytest.mark.parametrize("layout", ["database", "folders"])
def test_every_bit_arrives(layout: str, golden: Part, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    assert (folder / "state" / "manifest.ocdbt").exists() is (layout == "database")
    for path in (folder, folder.parent, folder / "state"):  # any of them is understood
        part = read_checkpoint(path)
        assert find_checkpoint(path) in (folder, folder / "state")
    assert_is_the_golden(part, golden)


def test_bfloat16_optax_state_and_empty_leaves(golden: Part, tmp_path: Path) -> None:
    params = {n: jnp.asarray(t.read(), jnp.bfloat16) for n, t in golden.tensors.items()}
    target = traverse_util.unflatten_dict(params, sep="/")
    name = "encoder/layers_0/mlp/wo/kernel"
    moments = traverse_util.unflatten_dict({name: jnp.ones((22, 12))}, sep="/")
    state = {
        "step": np.int32(9),
        "param_states": {"0": {"count": jnp.int32(9), "mu": moments, "nu": None}, "1": {}},
    }
    part = read_checkpoint(save(tmp_path, {"target": target, "state": state}, use_ocdbt=True))
    for key, array in params.items():
        assert part.tensors[key].dtype.name == "bfloat16"
        np.testing.assert_array_equal(part.tensors[key].read(), np.asarray(array))
    assert set(part.optimizer) == {"step", "param_states/0/count", f"param_states/0/mu/{name}"}
    assert part.empty == {"param_states/0/nu": "nil", "param_states/1": "map"}


def test_arrays_of_several_devices(golden: Part, tmp_path: Path) -> None:
    """One chunk per shard, by the process that has it."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tree = train_state(golden)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    kernel = jnp.asarray(tree["target"]["encoder"]["layers_1"]["mlp"]["wo"]["kernel"])
    tree["target"]["encoder"]["layers_1"]["mlp"]["wo"]["kernel"] = jax.device_put(kernel, sharding)
    assert_is_the_golden(read_checkpoint(save(tmp_path, tree, use_ocdbt=True)), golden)


def test_to_the_native_format_and_to_hugging_face(
    database: Path, golden: Part, tmp_path: Path
) -> None:
    convert(small.job("t5x", "t5x", database, tmp_path / "native"), small.quiet)
    assert (find_checkpoint(tmp_path / "native") / "checkpoint").is_file()
    assert_is_the_golden(read_checkpoint(tmp_path / "native"), golden)
    convert(small.job("t5x", "hf", database, tmp_path / "hf", optimizer=False), small.quiet)
    found = read_folder(tmp_path / "hf")
    assert small.all_bits(found.tensors) == small.all_bits(golden.tensors)


def test_scanned_layers(golden: Part, tmp_path: Path) -> None:
    job = small.job("hf", "t5x", small.GOLDENS / "t5_v1_1", tmp_path / "scan", scan_layers=True)
    convert(job, small.quiet)
    leaves = read_leaves(find_checkpoint(tmp_path / "scan"))
    flat = {name: jnp.asarray(leaf.read()) for name, leaf in leaves.items()}
    folder = save(tmp_path, traverse_util.unflatten_dict(flat, sep="/"), use_ocdbt=True)
    part = read_checkpoint(folder)
    assert small.all_bits(part.tensors) == small.all_bits(golden.tensors)


# --- 2024 ------------------------------------------------------------------------------


def edit_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / "state" / "_METADATA"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def entry(meta: Any, name: str) -> Any:
    return meta["tree_metadata"][str(tuple(name.split("/")))]["value_metadata"]


def as_of_2024(meta: Any) -> None:
    for key in ("use_ocdbt", "store_array_data_equal_to_fill_value", "custom_metadata"):
        meta.pop(key)


def aggregate(folder: Path, name: str, array: np.ndarray) -> None:
    """Keep a leaf in the msgpack file, and a placeholder for another one."""
    shutil.rmtree(folder / "state" / name.replace("/", "."))
    packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
    tree: dict[str, Any] = {KERNEL: f"PLACEHOLDER://{KERNEL.replace('/', '.')}"}
    tree[name] = msgpack.ExtType(1, packed)
    nested = traverse_util.unflatten_dict(tree, sep="/")
    (folder / "state" / "checkpoint").write_bytes(msgpack.packb(nested, strict_types=True))


def test_as_orbax_wrote_it_in_2024(folders: Path, golden: Part, tmp_path: Path) -> None:
    """Leaves without axes in a msgpack file, and chunks of zeros left out."""
    folder = Path(shutil.copytree(folders, tmp_path / folders.name))
    edit_metadata(folder, as_of_2024)
    edit_metadata(folder, lambda meta: entry(meta, "state/step").update(skip_deserialize=True))
    aggregate(folder, "state/step", np.asarray(7, np.int32))
    (folder / "state" / FILLER.replace("/", ".") / "0").unlink()
    assert_is_the_golden(read_checkpoint(folder), golden)
    (folder / "state" / KERNEL.replace("/", ".") / "0.0").unlink()
    with pytest.raises(UserError, match=f"{KERNEL}: the chunk .* is missing"):
        read_checkpoint(folder)


# --- 2022 and 2023 ---------------------------------------------------------------------

# What T5X at these times wrote with use_orbax=True: where the index lies, what it is wrapped
# in, what stands before the name of an array, and what the name begins with.
WITHOUT_METADATA = {
    "November 2022": ("checkpoint", True, "AGGREGATED://", "optimizer."),
    "the first of November 2022": ("checkpoint", True, "", "optimizer."),
    "December 2022": ("checkpoint", True, "PLACEHOLDER://", "optimizer."),
    "May to November 2023": ("state/checkpoint", False, "PLACEHOLDER://", ""),
}


def without_metadata(folder: Path, golden: Part, index: str, inside: bool, mark: str,
                     prefix: str) -> Path:  # fmt: skip
    """Write a checkpoint with an index instead of `_METADATA`; returns the index."""
    path = folder / "checkpoint_7" / index
    path.parent.mkdir(parents=True)
    tree: dict[str, Any] = {}
    for name, leaf in traverse_util.flatten_dict(train_state(golden), sep="/").items():
        array = np.asarray(leaf)
        if isinstance(leaf, np.ndarray) or not array.shape:  # what has no logical axes
            packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
            tree[name] = msgpack.ExtType(1 if array.shape else 3, packed)
            continue
        place = prefix + name.replace("/", ".")
        tree[name] = mark + place
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{path.parent / place}/"},
            "metadata": {"shape": array.shape, "chunks": array.shape, "dtype": array.dtype.str,
                         "compressor": {"id": "gzip"}},
            "create": True,
        }  # fmt: skip
        tensorstore.open(spec).result().write(array).result()
    nested = traverse_util.unflatten_dict(tree, sep="/")
    nested["state"]["flax_mutables"] = {}
    wrapped = {"version": 3, "optimizer": nested} if inside else nested
    path.write_bytes(msgpack.packb(wrapped, strict_types=True))
    return path


@pytest.mark.parametrize("when", WITHOUT_METADATA)
def test_as_orbax_wrote_it_without_metadata(when: str, golden: Part, tmp_path: Path) -> None:
    index = without_metadata(tmp_path, golden, *WITHOUT_METADATA[when])
    for path in (tmp_path, tmp_path / "checkpoint_7", index.parent):
        part = read_checkpoint(path)
        assert_is_the_golden(part, golden)
        assert part.empty == {"flax_mutables": "map"}


def test_an_index_of_orbax_is_not_believed_blindly(golden: Part, tmp_path: Path) -> None:
    index = without_metadata(tmp_path, golden, *WITHOUT_METADATA["May to November 2023"])
    tree = msgpack.unpackb(index.read_bytes(), raw=False)
    kernels = tree["target"]["encoder"]["layers_1"]["mlp"]["wo"]
    for text in ("PLACEHOLDER://target.encoder.layers_0.mlp.wo.kernel", "../../x", "no name"):
        kernels["kernel"] = text
        index.write_bytes(msgpack.packb(tree, strict_types=True))
        assert f"{KERNEL}: the index refers to {text!r}, which is not its name" in refusal(
            tmp_path, tmp_path
        )
    kernels["kernel"] = f"PLACEHOLDER://{KERNEL.replace('/', '.')}"
    index.write_bytes(msgpack.packb(tree, strict_types=True))
    (index.parent / KERNEL.replace("/", ".") / "0.0").unlink()
    assert f"{KERNEL}: the chunk" in refusal(tmp_path, tmp_path)
    del tree["target"]
    index.write_bytes(msgpack.packb(tree, strict_types=True))
    assert "no T5X index: it has neither 'optimizer' nor 'target'" in refusal(tmp_path, tmp_path)


# --- damage ----------------------------------------------------------------------------


def refusal(folder: Path, tmp_path: Path) -> str:
    output = tmp_path / "out" / "model"
    output.parent.mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        convert(small.job("t5x", "hf", folder, output, optimizer=False), small.quiet)
    assert list(output.parent.iterdir()) == []
    return str(caught.value)


def test_a_damaged_database_is_refused(database: Path, golden: Part, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(database, tmp_path / database.name))
    manifest = folder / "state" / "manifest.ocdbt"
    good = manifest.read_bytes()
    for bad in (good[:-9], b"", bytes([good[0] ^ 1]) + good[1:]):
        manifest.write_bytes(bad)
        assert "the OCDBT database is damaged" in refusal(folder, tmp_path)
    manifest.write_bytes(good)
    # A database keeps pieces that nothing refers to any more: each piece, cut off or gone,
    # is either noticed or not needed.
    noticed = 0
    for piece in sorted((folder / "state").glob("**/d/*")):
        saved = piece.read_bytes()
        piece.write_bytes(saved[: len(saved) // 2])
        for _ in range(2):
            try:
                assert_is_the_golden(read_checkpoint(folder), golden)
            except UserError as error:
                assert "cannot be read" in str(error) or "database is damaged" in str(error)
                noticed += 1
            piece.unlink(missing_ok=True)
        piece.write_bytes(saved)
    assert noticed >= 2


def test_damaged_folders_are_named(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders, tmp_path / folders.name))
    place = folder / "state" / KERNEL.replace("/", ".")
    chunk = (place / "0.0").read_bytes()
    (place / "0.0").write_bytes(chunk[:-5])
    assert f"{KERNEL}: cannot be read" in refusal(folder, tmp_path)
    (place / "0.0").unlink()
    assert f"{KERNEL}: the chunk {place.name}/0.0 is missing" in refusal(folder, tmp_path)
    shutil.rmtree(place)
    assert f"{KERNEL}: {place.name}/.zarray is absent" in refusal(folder, tmp_path)


def test_damaged_metadata_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders, tmp_path / folders.name))
    path = folder / "state" / "_METADATA"
    good = path.read_text()

    def keys(meta: Any) -> Any:
        return meta["tree_metadata"][str(tuple(KERNEL.split("/")))]["key_metadata"]

    for text in ("", good[: len(good) // 2], "[]", '{"tree_metadata": 3}'):
        path.write_text(text)
        assert "_METADATA: not a whole Orbax checkpoint" in refusal(folder, tmp_path)
    changes: list[tuple[Callable[[Any], Any], str]] = [
        (lambda m: entry(m, KERNEL).update(value_type="string"), f"{KERNEL} is a string, not an"),
        (lambda m: entry(m, KERNEL).update(skip_deserialize=True), "checkpoint: not a whole T5X"),
        (lambda m: m.update(use_zarr3=True), "zarr of version 3; T5X writes version 2"),
        (lambda m: keys(m)[3].update(key="../../x"), "not a whole Orbax checkpoint"),
        (lambda m: keys(m)[3].update(key="other"), "target.encoder.layers_1.other.wo.kernel"),
        (lambda m: m["tree_metadata"].pop(str(tuple(KERNEL.split("/")))), "missing: encoder/lay"),
    ]
    for change, expected in changes:
        path.write_text(good)
        edit_metadata(folder, change)
        assert expected in refusal(folder, tmp_path)


def test_a_leaf_that_the_msgpack_file_lacks_is_named(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders, tmp_path / folders.name))
    for name in (KERNEL, "state/step"):
        edit_metadata(folder, lambda m, n=name: entry(m, n).update(skip_deserialize=True))
    aggregate(folder, "state/step", np.asarray(7, np.int32))
    assert f"{KERNEL}: is not in checkpoint, where _METADATA says" in refusal(folder, tmp_path)
