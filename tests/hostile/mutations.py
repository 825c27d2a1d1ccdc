"""What can be wrong with a file, a setting or a path: one function for each kind.

Each takes a generator of random numbers and what is sound, and gives what is not, with a few words
on it. `SURE` says that it has to be refused; otherwise it may also mean nothing.
"""

import io
import json
import os
import random
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SURE, PERHAPS = True, False
Broken = tuple[bytes, str, bool]  # what the file holds, what was done, whether it must be refused

HUGE = (2**31, 2**63, 10**12, 10**30, -(2**63), -1, 10**400)
DEEP = 5000


def deep_json() -> str:
    return "[" * DEEP + "]" * DEEP


def break_bytes(rng: random.Random, raw: bytes) -> Broken:
    """Damage that a disk, a transfer or an editor does."""
    at = rng.randrange(max(len(raw), 1))
    kind = rng.choice(("cut", "empty", "flip", "insert", "zeros", "utf-16", "latin-1"))
    if kind == "cut":
        return raw[:at], f"cut off at {at}", PERHAPS
    if kind == "empty":
        return b"", "empty", SURE
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :], kind, PERHAPS
    if kind == "insert":
        return raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:], kind, PERHAPS
    if kind == "zeros":
        return raw[:at] + b"\0" * len(raw[at : at + 16]) + raw[at + 16 :], kind, PERHAPS
    if kind == "utf-16":
        return raw.decode("utf-8", "replace").encode("utf-16"), kind, SURE
    return raw[:at] + b"\xe9" + raw[at + 1 :], kind, PERHAPS


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        children = list(enumerate(value))[:3]
    for key, child in children:
        found += _places(child, (*path, key))
    return found


def break_json(
    rng: random.Random, raw: bytes, sure: Callable[[tuple[Any, ...], Any], bool]
) -> Broken:
    """Another value, or none, somewhere in a JSON file.

    Args:
      sure: whether a value of another type at this path has to be refused, given the old value.
    """
    kind = rng.choice(("type", "type", "type", "missing", "huge", "huge", "raw", "bytes"))
    if kind == "bytes":
        return break_bytes(rng, raw)
    content = json.loads(raw)
    path = rng.choice(_places(content))
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    if kind == "missing":
        del holder[path[-1]]
        return json.dumps(content).encode(), f"without {path}", PERHAPS
    if kind == "huge":
        holder[path[-1]] = new = rng.choice(HUGE)
        text = _dumps(content)
        return text.encode(), f"{path} = {str(new)[:20]}", sure(path, old)
    if kind == "raw":
        holder[path[-1]] = "@"
        new = rng.choice((deep_json(), "1" * 5000, "NaN", "Infinity", "1e999", '"\\ud800"', "[1,"))
        text = _dumps(content).replace('"@"', new, 1)
        return text.encode(), f"{path} = {new[:12]}", SURE
    others = [v for v in (None, True, 1.5, "16", [], {}, [1]) if type(v) is not type(old)]
    holder[path[-1]] = new = rng.choice(others)
    fits = isinstance(old, float) and type(new) is int
    return json.dumps(content).encode(), f"{path} = {new!r}", sure(path, old) and not fits


def _dumps(content: Any) -> str:
    """JSON with whole numbers of any length."""
    numbers: list[str] = []

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(item) for key, item in value.items()}
        if isinstance(value, list):
            return [kept(item) for item in value]
        if isinstance(value, int) and abs(value) > 2**63:
            numbers.append(str(value))
            return f"@{len(numbers) - 1}@"
        return value

    text = json.dumps(kept(content))
    for number, digits in enumerate(numbers):
        text = text.replace(f'"@{number}@"', digits)
    return text


def break_array(rng: random.Random, raw: bytes) -> Broken:
    """An array of another type, order, shape or content than its manifest says."""
    array = np.load(io.BytesIO(raw))
    kinds = ["type", "order", "shape", "object", "columns", "cut", "empty", "npz", "header"]
    kind = rng.choice([*kinds, *(["nan", "infinity"] if array.dtype.kind == "f" else [])])
    if kind == "cut":
        return raw[: rng.randrange(len(raw))], kind, SURE
    if kind == "empty":
        return b"", kind, SURE
    out = io.BytesIO()
    if kind == "header":
        head = b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000
        return head + raw[128:], kind, SURE
    if kind == "npz":
        np.savez(out, a=array)
        return out.getvalue(), kind, SURE
    if kind == "object":
        np.save(out, np.array([{}] * len(array), object), allow_pickle=True)
        return out.getvalue(), kind, SURE
    if kind == "type":
        array = array.astype(rng.choice([t for t in ("<f8", "<f2", "<i8", "<u1")
                                         if np.dtype(t) != array.dtype]))  # fmt: skip
    elif kind == "order":
        if array.dtype.itemsize == 1:
            return raw[:-1], "cut", SURE
        array = array.astype(array.dtype.newbyteorder(">"))
    elif kind == "shape":
        array = array[: max(len(array) - 1, 0)]
    elif kind == "columns":
        if array.ndim == 1:
            return raw[:-1], "cut", SURE
        array = np.asfortranarray(array)
    else:
        array = array.copy()
        array.flat[rng.randrange(array.size)] = np.nan if kind == "nan" else np.inf
    np.save(out, array)
    return out.getvalue(), kind, SURE


def break_line(rng: random.Random, raw: bytes, required: tuple[str, ...]) -> Broken:
    """One line of a jsonl file."""
    lines = raw.splitlines()
    at = rng.randrange(len(lines))
    record = json.loads(lines[at])
    kind = rng.choice(("missing", "null", "type", "deep", "digits", "NaN", "half", "cut", "bytes",
                       "list", "twice", "blank"))  # fmt: skip
    field, sure = rng.choice(required), SURE
    if kind == "missing":
        del record[field]
    elif kind in ("null", "type", "blank"):
        record[field] = {"null": None, "type": rng.choice(([1], {"a": 1}, True)), "blank": ""}[kind]
    if kind in ("deep", "digits", "NaN"):
        record["more"] = "@"
        new = {"deep": deep_json(), "digits": "9" * 5000, "NaN": "NaN"}[kind]
        lines[at] = json.dumps(record).replace('"@"', new).encode()
    elif kind == "half":
        lines[at] = json.dumps({**record, field: "a@"}).replace("@", "\\ud83d").encode()
    elif kind == "cut":
        lines[at] = lines[at][: rng.randrange(1, len(lines[at]))]
    elif kind == "bytes":
        lines[at] = lines[at].replace(b": ", b": \xff", 1)
    elif kind == "list":
        lines[at] = b"[]"
    elif kind == "twice":
        lines.append(lines[at])
    else:
        lines[at] = json.dumps(record).encode()
    return b"\n".join(lines) + b"\n", f"line {at + 1}: {field} {kind}", sure


def break_gin(rng: random.Random) -> tuple[str, str, bool]:
    """A gin file that no run can use."""
    return rng.choice(
        (
            (f"K = {deep_json()}\n", "deep", SURE),
            (f"K = {'1' * 5000}\n", "digits", SURE),
            ("K = 1e999\n", "infinity", SURE),
            (
                f"K = {rng.choice((2**31, 2**63, 10**30, -1, 0, '1.5', 'True', 'None'))}\n",
                "K",
                SURE,
            ),
            ("DataConfig.query_length = 'a\\x00b'\n", "null byte", SURE),
            ("include 'nowhere.gin'\n", "include", SURE),
            ("include 'x.gin'\n", "itself", SURE),
            (f"include '{'x' * 300}.gin'\n", "long include", SURE),
            ("import nowhere.at_all\n", "import", SURE),
            ("DataConfig.nothing = 1\n", "parameter", SURE),
            ("QATask.query_format = '{question!r}'\n", "conversion", SURE),
            ("QATask.query_format = '{question:100000000}'\n", "width", SURE),
            ("QATask.query_format = '{question.x}'\n", "attribute", SURE),
            ("QATask.query_format = '{question'\n", "open", SURE),
            ("K = [1,\n", "open list", SURE),
            ("K = (\n" * 3000, "open brackets", SURE),
            ("K = 1\0\n", "null", SURE),
            ("\ufeffK = 2\n", "byte order mark", PERHAPS),
            ("K = %L\nL = %K\n", "circle", SURE),
        )
    )


def break_output(rng: random.Random, folder: Path) -> tuple[str, str, bool]:
    """A path that nothing can be written to."""
    (folder / "file").write_text("")
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("")
    kind = rng.choice(("below", "long", "null", "half", "pipe", "socket", "device", "loop", "deep"))
    if kind == "below":
        return str(folder / "file" / "new"), kind, SURE
    if kind == "long":
        return str(folder / ("x" * 300)), kind, SURE
    if kind == "deep":
        return str(folder / "/".join(["y" * 200] * 25)), kind, SURE
    if kind in ("null", "half"):
        return str(folder / "a") + ("\0" if kind == "null" else "\udcff"), kind, SURE
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.getcwd()
            os.chdir(folder)  # the address of a socket has a hundred characters
            made.bind(kind)
            os.chdir(here)
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            os.mkfifo(path)
    else:
        path.symlink_to(path)
    return str(path), kind, SURE
