"""Files of torch.save without PyTorch: what they hold, and what hostile ones ask for in vain."""

import io
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.interop import torch_files
from atlas_jax.interop.pickles import interpret, load_plain
from atlas_jax.interop.tensors import Tensor
from tests.interop import small

ATLAS = small.GOLDENS / "atlas_tied.pth.tar"


class Evil:
    """Pickles as a call of a function of our choice."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, program: bytes, **entries: bytes) -> Path:
    """A zip file as torch.save makes it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for name, content in entries.items():
            file.writestr(f"archive/data/{name}", content)
    return path


def tensor_program(
    count: int = 6, start: int = 0, shape: tuple[int, ...] = (2, 3), strides: Any = (3, 1)
) -> bytes:
    """{'w': tensor}, written by hand, instruction by instruction."""
    out = io.BytesIO()
    pickler = pickle._Pickler(out, 2)  # type: ignore[attr-defined]
    out.write(b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(")
    out.write(
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    pickler.save(count)
    out.write(b"tQ")  # a persistent id
    for value in (start, shape, strides, False, None):
        pickler.save(value)
    out.write(b"tRs.")  # tuple, call, set item, stop
    return out.getvalue()


def test_a_tensor_written_by_hand(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype=np.float32)
    path = archive(tmp_path / "a.bin", tensor_program(), **{"0": numbers.tobytes()})
    tensor = torch_files.load(path)["w"]
    np.testing.assert_array_equal(tensor.read(), numbers.reshape(2, 3))
    turned = archive(
        tmp_path / "b.bin", tensor_program(shape=(3, 2), strides=(1, 3)), **{"0": numbers.tobytes()}
    )
    np.testing.assert_array_equal(torch_files.load(turned)["w"].read(), numbers.reshape(2, 3).T)


COMMANDS = [
    (Evil(os.system, "touch {marker}"), "posix.system"),
    (Evil(eval, "open('{marker}', 'w')"), "builtins.eval"),
    (Evil(exec, "open('{marker}', 'w')"), "builtins.exec"),
    (Evil(getattr, {}, "update"), "builtins.getattr"),
    (Evil(shutil.rmtree, "{marker}"), "shutil.rmtree"),
    (Evil(__import__, "os"), "builtins.__import__"),
]


def load_file(path: Path) -> object:
    with path.open("rb") as file:
        return load_plain(file, str(path))


@pytest.mark.parametrize(("evil", "name"), COMMANDS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_is_refused_and_not_executed(
    evil: Evil, name: str, protocol: int, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    function, arguments = evil.call
    armed = Evil(
        function, *(a.format(marker=marker) if isinstance(a, str) else a for a in arguments)
    )
    name = name.replace("builtins", "__builtin__") if protocol < 3 else name
    program = pickle.dumps({"w": armed}, protocol)
    for path, loader in (
        (archive(tmp_path / "a.bin", program), torch_files.load),
        (tmp_path / "plain.pkl", load_file),
    ):
        path.write_bytes(program) if path.name == "plain.pkl" else None
        with pytest.raises(UserError, match="refused: the pickle asks for") as caught:
            loader(path)
        assert f"asks for {name}," in str(caught.value)
        assert str(path) in str(caught.value)
    assert not marker.exists()


def test_a_hostile_pickle_in_the_older_form_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "old.bin"
    with path.open("wb") as file:
        pickle.dump(0x1950A86A20F9469CFC6C, file, 2)
        pickle.dump(1001, file, 2)
        pickle.dump({"little_endian": True}, file, 2)
        pickle.dump(Evil(os.system, f"touch {marker}"), file, 2)
    with pytest.raises(UserError, match=r"asks for posix\.system"):
        torch_files.load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02c__builtin__\neval\n.", "asks for __builtin__.eval"),
        (b"(S'x'\ni__builtin__\neval\n.", "holds the instruction INST"),
        (b"\x82\x01.", "holds the instruction EXT1"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0aobject.mro\x93.", "asks for builtins.object.mro,"),
        (b"\x80\x02}X\x01\x00\x00\x00a)R.", "calls what is no function"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00ab", "pickle exhausted"),
        (b"\x80\x02(X\x01\x00\x00\x00at", "pickle exhausted"),
        (b"\x80\x02s.", "not a whole pickle"),
        (b"nonsense", "not a whole pickle"),
        (b"", "not a whole pickle"),
    ],
)  # fmt: skip
def test_crafted_programs(program: bytes, message: str) -> None:
    makers = {"collections.OrderedDict": lambda: {}}
    with pytest.raises(UserError, match="x.bin: ") as caught:
        interpret(io.BytesIO(program), "x.bin", makers)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("program", "data", "message"),
    [
        (tensor_program(), None, "storage 0 is missing from the archive"),
        (tensor_program(), b"\0" * 20, "storage 0 has 20 bytes where 24 belong"),
        (tensor_program(start=1), b"\0" * 24, "w: lies outside of its storage of 6 numbers"),
        (tensor_program(strides=(3, -1)), b"\0" * 24, "make no tensor"),
        (tensor_program(strides=(3, 9)), b"\0" * 24, "w: lies outside"),
        (tensor_program(strides=(3,)), b"\0" * 24, "make no tensor"),
        (tensor_program(count=1 << 60), b"\0" * 24, "bytes where"),
    ],
)
def test_tensors_outside_of_their_storage(
    program: bytes, data: bytes | None, message: str, tmp_path: Path
) -> None:
    path = archive(tmp_path / "a.bin", program, **({} if data is None else {"0": data}))
    with pytest.raises(UserError) as caught:
        torch_files.load(path)
    assert message in str(caught.value)


def test_a_damaged_storage_is_noticed_by_its_checksum(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype=np.float32).tobytes()
    path = archive(tmp_path / "a.bin", tensor_program(), **{"0": numbers})
    raw = path.read_bytes()
    at = raw.index(numbers) + 5
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(UserError, match=f"{path}: w: damaged: its checksum"):
        torch_files.load(path)["w"].read()


def test_the_checksum_counts_for_parts_of_a_storage_too(tmp_path: Path) -> None:
    """A view of four of six numbers, and the damage outside of it; read whole, and no longer."""
    program = tensor_program(shape=(2, 2), strides=(2, 1))
    numbers = np.arange(6, dtype=np.float32)
    path = archive(tmp_path / "a.bin", program, **{"0": numbers.tobytes()})
    tensor = torch_files.load(path)["w"]
    np.testing.assert_array_equal(tensor.read(), numbers[:4].reshape(2, 2))
    raw = path.read_bytes()
    at = raw.index(numbers.tobytes()) + 21
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    np.testing.assert_array_equal(tensor.read(), numbers[:4].reshape(2, 2))  # checked already
    with pytest.raises(UserError, match=f"{path}: w: damaged: its checksum"):
        torch_files.load(path)["w"].read()


def test_one_storage_as_two_types(tmp_path: Path) -> None:
    """Each tensor keeps its own, as torch.Tensor.view(dtype) makes them."""
    first = tensor_program()
    second = first[3:].replace(b"w", b"v", 1).replace(b"FloatStorage", b"IntStorage")
    program = first[:-1] + second
    numbers = np.arange(6, dtype=np.float32)
    tree = torch_files.load(archive(tmp_path / "a.bin", program, **{"0": numbers.tobytes()}))
    np.testing.assert_array_equal(tree["w"].read().ravel(), numbers)
    np.testing.assert_array_equal(tree["v"].read().ravel(), numbers.view(np.int32))


@pytest.mark.parametrize("name", ["t5_v1_0", "bert"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_truncated_file_is_refused(name: str, share: float, tmp_path: Path) -> None:
    """And the tensor is named that is not whole: the last of those that begin in the file."""
    whole = small.GOLDENS / name / "pytorch_model.bin"
    raw = whole.read_bytes()
    size = int(share * len(raw))
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(raw[:size])
    with pytest.raises(UserError, match=f"{path}: ") as caught:
        torch_files.load_state_dict(path)
    users: dict[int, set[str]] = {}  # place of a tensor's storage -> who has it
    for label, tensor in torch_files.load_state_dict(whole).items():
        users.setdefault(raw.index(tensor.read().tobytes()), set()).add(label)
    begun = [place for place in users if place < size]
    if share > 0.99:
        return  # nothing but the directory, or less, is gone
    if not begun:
        assert "not a whole pickle" in str(caught.value)
        return
    message = str(caught.value).removeprefix(f"{path}: ")
    at_fault = message.split(": ")[0]
    last, later = max(begun), [place for place in users if place >= size]
    assert at_fault in users[last] | (users[min(later)] if later else set()), message
    assert "storage" in message


def test_the_tensor_of_a_cut_storage_is_named(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype=np.float32).tobytes()
    path = archive(tmp_path / "a.bin", tensor_program(), **{"0": numbers})
    raw = path.read_bytes()
    at = raw.index(numbers)
    for keep, message in (
        (at + 10, "w: storage 0 has 10 of 24 bytes: cut off or damaged"),
        (at, "w: storage 0 has 0 of 24 bytes: cut off"),
        (at - 20, "w: storage 0 is not in it: cut off"),
        (at + 24, "a.bin: cut off or damaged"),
        (60, "a.bin: not a whole pickle"),
        (20, "a.bin: cut off or damaged"),
    ):
        path.write_bytes(raw[:keep])
        with pytest.raises(UserError) as caught:
            torch_files.load(path)
        assert message in str(caught.value)
    archive(path, tensor_program(), **{"0": numbers[:-4]})
    with pytest.raises(UserError, match="w: storage 0 has 20 bytes where 24 belong"):
        torch_files.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(UserError, match="neither a zip file nor one of torch.save"):
        torch_files.load(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", b"")
    with pytest.raises(UserError, match="it has no data.pkl"):
        torch_files.load(path)
    archive(path, pickle.dumps({"a": 1}, 2))
    with pytest.raises(UserError, match="'a' is a int, not a tensor"):
        torch_files.load_state_dict(path)
    path.write_bytes(struct.pack("<Q", 3))
    with pytest.raises(UserError, match="a.bin: not a whole pickle"):
        torch_files.load(path)


def test_a_whole_checkpoint() -> None:
    content = torch_files.load(ATLAS)
    assert content["step"] == 2
    assert content["opt"]["reader_model_type"] == "google/t5-base-lm-adapt"
    assert content["opt"]["scheduler_steps"] is None
    assert isinstance(content["model"]["reader.module.shared.weight"], Tensor)
    assert content["model"]["reader.module.shared.weight"].shape == (141, 12)
    assert content["optimizer"]["state"][0]["exp_avg"].shape == (141, 12)


@pytest.mark.parity
@pytest.mark.parametrize("old_form", [False, True])
def test_live_against_torch(old_form: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra [parity]")
    base = torch.randn(5, 7)
    tree = {
        "plain": base,
        "transposed": base.T,
        "slice": base[1:4, 2:],
        "shared": base,
        "bf16": base.bfloat16(),
        "half": base.half(),
        "double": base.double(),
        "ints": torch.arange(6).reshape(2, 3),
        "bytes": torch.arange(6).to(torch.uint8),
        "bools": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
    }
    path = tmp_path / "t.bin"
    torch.save(tree, path, _use_new_zipfile_serialization=not old_form)
    ours = torch_files.load_state_dict(path)
    assert list(ours) == list(tree)
    for name, expected in tree.items():
        plain = expected.detach()
        if name == "bf16":
            np.testing.assert_array_equal(
                ours[name].read().astype(np.float32), plain.float().numpy()
            )
        else:
            np.testing.assert_array_equal(ours[name].read(), plain.numpy())
            assert ours[name].dtype == plain.numpy().dtype
