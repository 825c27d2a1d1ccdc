"""Files made to hang or to exhaust whoever reads them: refused at once, and nothing is left."""

import io
import json
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.conversion.convert import convert
from atlas_jax.core.errors import UserError
from atlas_jax.interop.atlas_corpus import IndexShards
from atlas_jax.interop.pickles import load_plain
from tests.interop import small
from tests.interop.test_torch_files import archive, tensor_program


def in_itself() -> Any:
    values: list[Any] = []
    values.append(values)
    return values


def in_itself_by_a_tuple() -> Any:
    values: list[Any] = []
    values.append((1, {"a": values}))
    return values


def shared(levels: int, make: Callable[[list[Any]], Any] = list) -> Any:
    """Two of the level below, which is one object: 2 ** levels values in a few bytes."""
    value: Any = make([])
    for _ in range(levels):
        value = make([value, value])
    return value


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def recalled(program: bytes, times: int) -> bytes:
    """A dict whose `w` is a call with a long list, made anew again and again."""
    call = b"ccollections\nOrderedDict\nq\x00(" + program + b"tq\x01R"
    return b"\x80\x02}X\x01\x00\x00\x00w(" + call + b"h\x00h\x01R" * times + b"ls."


PAIRS = b"]q\x02(" + b"K\x01K\x02\x86" * 10_000 + b"e"
TUPLES = pickle.dumps(shared(60, tuple), 2)[2:-1]
HOSTILE = [
    (pickle.dumps({"w": in_itself()}, 2), "w.0: holds itself"),
    (pickle.dumps({"w": in_itself_by_a_tuple()}, 2), "w.0.1.a: holds itself"),
    (pickle.dumps({"w": shared(60)}, 2), "stands for more than 10000000 values"),
    (pickle.dumps({"w": shared(60, tuple)}, 2), "stands for more than 10000000 values"),
    (pickle.dumps({"w": nested(150)}, 2), "lies in more than 100 lists or dicts"),
    (pickle.dumps({"w": 1 << 5000}, 2), "a number of 5001 bits"),
    # A dict with nested tuples as key, and a set of them: neither is hashed.
    (b"\x80\x02}" + TUPLES + b"K\x01s.", "a tuple where a text"),
    (b"\x80\x04\x8f(" + TUPLES + b"\x90.", "a tuple where a text"),
    (recalled(PAIRS, 200), "its calls are given more values than any checkpoint has"),
    (tensor_program(shape=(1 << 20, 1 << 20), strides=(0, 0)), "lies outside of its storage"),
    (tensor_program(shape=(0, 1 << 62), strides=(1, 1)), "make no tensor"),
]


@pytest.mark.parametrize(("program", "message"), HOSTILE)
@pytest.mark.parametrize("source", ["hf", "meta-atlas"])
def test_a_hostile_checkpoint_is_refused(
    source: str, program: bytes, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    name = "pytorch_model.bin" if source == "hf" else "model.pth.tar"
    path = archive(folder / name, program, **{"0": b"\0" * 24})
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        convert(small.job(source, "atlas-jax", folder, tmp_path / "out"), small.quiet)
    assert time.perf_counter() - started < 60
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("opt", [shared(40), in_itself()])
def test_hostile_options_are_refused(opt: Any, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", pickle.dumps({"model": {}, "opt": {"x": opt}, "step": 1}, 2))
    with pytest.raises(UserError, match=r"opt\.x.*: (stands for more|holds itself)"):
        convert(small.job("meta-atlas", "atlas-jax", path, tmp_path / "out"), small.quiet)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_what_is_shared_honestly_is_read(tmp_path: Path) -> None:
    from atlas_jax.interop.torch_files import load

    one = {"a": [1, 2], "b": nested(90)}
    tree = load(archive(tmp_path / "a.bin", pickle.dumps({"x": one, "y": [one, (one,)]}, 2)))
    assert tree["x"] == one and tree["y"][1] == (one,)
    assert tree["x"] is tree["y"][0]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02]r\xff\xff\xff\xff.", "value 1 of the pickle is to be remembered as number"),
        (b"\x80\x02]q\x00X\x01\x00\x00\x00ar\xff\xff\xff\x0fa.", "as number 268435455"),
        (b"(lp99999999999\n.", "as number 99999999999"),
        (b"\x80\x02]X\xff\xff\xff\xffa.", "not a whole pickle: cut off"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xff.", "not a whole pickle: cut off"),
        (pickle.dumps([{("a",): 1}], 2), "holds the instruction TUPLE1"),
        (pickle.dumps([1 << 5000], 2), "holds the instruction LONG4"),
        (pickle.dumps([{1, 2}], 4), "holds the instruction EMPTY_SET"),
        (b"\x82\x01.", "holds the instruction EXT1"),
        (b"]\xfe.", "unknown"),
        (pickle.dumps(["text"], 4)[:-1], "not a whole pickle"),
    ],
)
def test_a_hostile_shard_of_passages_is_refused(
    program: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "passages.0.pt").write_bytes(program)
    alone = b"\x80\x02" + tensor_program()[9:-2] + b"."  # without the dict around it
    archive(tmp_path / "embeddings.0.pt", alone, **{"0": b"\0" * 24})
    with pytest.raises(UserError, match=r"passages\.0\.pt: ") as caught:
        IndexShards(tmp_path).passages(0)
    assert message in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_read(protocol: int) -> None:
    word = "x" * 300
    values: list[Any] = [
        {"id": str(i), "title": "T\n'", "text": word, "more": [None, True, 1.5, -1, 70000, b"b", i]}
        for i in range(400)
    ]  # more than 256 places in the memo
    if protocol < 3:  # they write bytes as calls
        for value in values:
            value["more"].remove(b"b")
    assert load_plain(io.BytesIO(pickle.dumps(values, protocol)), "x") == values


def test_an_old_writers_memo_begins_at_one() -> None:
    program = b"\x80\x02]q\x01X\x01\x00\x00\x00aq\x02a."
    assert load_plain(io.BytesIO(program), "x") == ["a"]
    last = struct.pack("<I", 2)
    assert load_plain(io.BytesIO(program.replace(b"q\x02", b"r" + last)), "x") == ["a"]
