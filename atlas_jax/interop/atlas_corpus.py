"""Passages and saved index shards of Meta's Atlas.

A passage file is jsonl with `id`, `title`, `text` and sometimes `section`. Atlas appends the
section to the title when it loads the file. A file of infoboxes has the same form. A saved index is
a folder of shards: `passages.N.pt`, a pickled list of such records, and `embeddings.N.pt`, a
float16 tensor with one column per passage.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig, check_fields, read_jsonl
from atlas_jax.core.layouts import PassageFields
from atlas_jax.core.paths import input_file
from atlas_jax.interop.pickles import load_plain
from atlas_jax.interop.tensors import Tensor
from atlas_jax.interop.torch_files import load

_SHARD = re.compile(r"(passages|embeddings)\.(\d+)\.pt$")
_REQUIRED: FieldTypes = {"id": (str, int), "text": str}
_OPTIONAL: FieldTypes = {"title": str, "section": str}


def passage(item: Mapping[str, Any], where: str) -> PassageFields:
    """One record in this project's form; the section becomes part of the title, as in Atlas.

    Raises:
      UserError: `where` has no id or text, or a field of another type.
    """
    check_fields(item, _REQUIRED, _OPTIONAL, where)
    return _record(item)


def _record(item: Mapping[str, Any], prefix: str = "") -> PassageFields:
    title, section = item.get("title") or "", item.get("section") or ""
    # The records of a saved index already have the section in the title.
    if section and not title.endswith(f": {section}"):
        title = f"{title}: {section}"
    return {
        "id": f"{prefix}{item['id']}",
        "title": title,
        "section": section,
        "text": item["text"],
    }


def read_passages(
    files: Sequence[str | Path], prefix_ids: bool = False, rows: RowsConfig = STRICT
) -> Iterator[PassageFields]:
    """Every passage of some jsonl files, plain or .gz, in order.

    Args:
      prefix_ids: put `<name of the file>/` in front of each id, for files with equal ids.
      rows: what happens to a broken line.

    Raises:
      UserError: names file and line of a broken record, unless broken records are skipped.
    """
    for file in files:
        prefix = f"{Path(file).name.split('.')[0]}/" if prefix_ids else ""
        for _, item in read_jsonl(file, _REQUIRED, _OPTIONAL, rows=rows):
            yield _record(item, prefix)


class IndexShards:
    """A saved index, read shard by shard.

    Attributes:
      count: number of shards.
      width: of the embeddings.
    """

    def __init__(self, folder: str | Path) -> None:
        """Examine the folder.

        Raises:
          UserError: there are no shards, one is missing, or a file of embeddings is damaged or
            has another width.
        """
        self._folder = Path(folder)
        found: dict[str, set[int]] = {"passages": set(), "embeddings": set()}
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                match = _SHARD.match(path.name)
                if match:
                    found[match[1]].add(int(match[2]))
        numbers = found["passages"] | found["embeddings"]
        if not numbers:
            raise UserError(f"{folder}: no saved index: it has no passages.0.pt, embeddings.0.pt")
        self.count = max(numbers) + 1
        for kind, there in found.items():
            absent = sorted(set(range(self.count)) - there)
            if absent:
                raise UserError(f"{folder}: {kind}.{absent[0]}.pt is missing")
        self._embeddings = [self._open(shard) for shard in range(self.count)]
        self.width = self._embeddings[0].shape[0]
        for shard, tensor in enumerate(self._embeddings):
            if tensor.shape[0] != self.width:
                raise UserError(
                    f"{self._path('embeddings', shard)}: embeddings of {tensor.shape[0]} numbers, "
                    f"those of shard 0 have {self.width}"
                )

    def passages(self, shard: int) -> list[PassageFields]:
        """The records of one shard.

        Raises:
          UserError: the pickle holds something else than records, or their number is not that of
            the embeddings.
        """
        path = self._path("passages", shard)
        with input_file(path).open("rb") as file:
            items = load_plain(file, str(path))
        if not isinstance(items, list):
            raise UserError(f"{path}: holds a {type(items).__name__}, not a list of passages")
        columns = self._embeddings[shard].shape[1]
        if len(items) != columns:
            raise UserError(f"{path}: {len(items)} passages for {columns} embeddings")
        records = []
        for number, item in enumerate(items):
            if not isinstance(item, dict):
                raise UserError(f"{path}: passage {number} is a {type(item).__name__}")
            records.append(passage(item, f"{path}: passage {number}"))
        return records

    def at(self, row: int) -> tuple[PassageFields, str]:
        """The passage of a row of the whole index, and a description of its place."""
        for shard, tensor in enumerate(self._embeddings):
            columns = tensor.shape[1]
            if row < columns:
                place = f"{self._path('passages', shard)}: passage {row}"
                return self.passages(shard)[row], place
            row -= columns
        raise IndexError(row)

    def embeddings(self, shard: int) -> np.ndarray:
        """Float32 [n, e] of one shard."""
        array = self._embeddings[shard].read()
        if not np.all(np.isfinite(array)):
            column = int(np.argwhere(~np.isfinite(array))[0][1])
            path = self._path("embeddings", shard)
            raise UserError(f"{path}: the embedding of passage {column} is not finite")
        return np.ascontiguousarray(array.T, dtype=np.float32)

    def _open(self, shard: int) -> Tensor:
        path = self._path("embeddings", shard)
        tensor = load(path)
        if not isinstance(tensor, Tensor) or len(tensor.shape) != 2 or tensor.dtype.kind != "f":
            raise UserError(f"{path}: holds no matrix of embeddings")
        return tensor

    def _path(self, kind: str, shard: int) -> Path:
        return self._folder / f"{kind}.{shard}.pt"
