"""The files of a passage store of format 1, which earlier versions wrote; they are only read.

passages.jsonl        one {id, title, section, text} a line; the line is the index row
offsets.npy           uint64 [n + 1], byte at which each line begins
id_hashes.npy         uint64 [n], sorted hashes of the ids; id_rows.npy: their rows
reader_tokens.npy     uint16 or int32 [n, l], padded with 0; retriever_tokens.npy as well
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.parts import PARTS
from atlas_jax.core.paths import expect_bytes, input_file
from atlas_jax.index.files import open_npy

TEXT = "passages.jsonl"


class FlatFiles:
    """The text, tokens and ids of a store of format 1, through memory maps."""

    def __init__(self, directory: Path, count: int, lengths: Mapping[str, int]) -> None:
        """Map all files, and look once at those that lead to others.

        Args:
          lengths: tokens that are kept of a passage, by tower.

        Raises:
          UserError: one is missing, or not as the manifest describes it.
        """
        self._directory, self._count = directory, count
        # The vocabulary decides the type, and the manifest does not tell its size.
        self._tokens = {
            tower: self._array(f"{tower}_tokens", (count, lengths[tower]), np.uint16, np.int32)
            for tower in PARTS
        }
        self._offsets = self._array("offsets", (count + 1,), np.uint64)
        self._id_hashes = self._array("id_hashes", (count,), np.uint64)
        self._id_rows = self._array("id_rows", (count,), np.int64)
        self._text = self._mapped_text()
        self._check_order()

    def tokens(self, tower: str) -> np.ndarray:
        """The tokens of all rows [n, length], padded with 0."""
        return self._tokens[tower]

    def lines(self, rows: Sequence[int]) -> list[bytes]:
        """The lines of some rows, whose bytes are asked for together before the first is read."""
        at = self._offsets
        if len(rows) > 1:
            # Without its file, what is mapped is read all the same.
            with contextlib.suppress(OSError), (self._directory / TEXT).open("rb") as file:
                expect_bytes(file.fileno(), ((int(at[row]), int(at[row + 1])) for row in rows))
        return [self._text[at[row] : at[row + 1]].tobytes() for row in rows]

    def text_of(self, row: int) -> str:
        """Where the text of a row lies, for messages."""
        return str(self._directory / TEXT)

    def tokens_of(self, tower: str, row: int) -> str:
        """Where the tokens of a row lie, for messages."""
        return str(self._directory / f"{tower}_tokens.npy")

    def rows_of(self, hashed: int) -> list[int]:
        """The rows whose ids have this hash."""
        low = int(np.searchsorted(self._id_hashes, np.uint64(hashed), side="left"))
        high = int(np.searchsorted(self._id_hashes, np.uint64(hashed), side="right"))
        return [int(row) for row in self._id_rows[low:high]]

    def _array(self, name: str, shape: tuple[int, ...], *dtypes: type) -> np.ndarray:
        path = self._directory / f"{name}.npy"
        try:
            return open_npy(path, shape, *dtypes)
        except UserError as error:
            raise self._damaged(path, str(error).removeprefix(f"{path}: ")) from error

    def _mapped_text(self) -> np.ndarray:
        path = self._directory / TEXT
        try:
            size = input_file(path).stat().st_size
        except UserError as error:
            raise self._damaged(path, str(error).removeprefix(f"{path}: ")) from error
        if size != self._offsets[-1] or not self._offsets[-1]:
            raise self._damaged(path, f"it has not the {self._offsets[-1]} bytes of offsets.npy")
        return np.memmap(path, np.uint8, mode="r")

    def _check_order(self) -> None:
        """One look at the arrays that lead to others."""
        if self._offsets[0] != 0 or not (self._offsets[1:] > self._offsets[:-1]).all():
            raise self._damaged(self._directory / "offsets.npy", "it does not ascend from 0")
        if not (self._id_hashes[1:] >= self._id_hashes[:-1]).all():
            raise self._damaged(self._directory / "id_hashes.npy", "it does not ascend")
        if self._id_rows.min() < 0 or self._id_rows.max() >= self._count:
            raise self._damaged(
                self._directory / "id_rows.npy", f"it has other rows than 0 to {self._count - 1}"
            )

    def _damaged(self, path: Path, problem: str) -> UserError:
        return UserError(
            f"{path} is missing or not as {self._directory / 'manifest.json'} describes it "
            f"({problem}); remove the store and build it anew"
        )
