"""A hash of many lines that does not depend on how they were divided among processes.

The hash of lines 1 to n is h(1) b**(n-1) + h(2) b**(n-2) + ... + h(n), modulo a prime p of 255
bits, where h is SHA-256. So the hash of two lots of lines follows from those of each lot.
"""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

_PRIME = (1 << 255) - 19
_BASE = int.from_bytes(hashlib.sha256(b"lines of passages").digest()) % _PRIME


class LineHash(NamedTuple):
    """The hash of some lines, and their number."""

    rows: int = 0
    value: int = 0

    def of(self, lines: Iterable[bytes]) -> "LineHash":
        """The hash with these lines appended."""
        rows, value = self
        for line in lines:
            value = (value * _BASE + int.from_bytes(hashlib.sha256(line).digest())) % _PRIME
            rows += 1
        return LineHash(rows, value)

    def then(self, other: "LineHash") -> "LineHash":
        """The hash with the lines of another hash appended."""
        value = (self.value * pow(_BASE, other.rows, _PRIME) + other.value) % _PRIME
        return LineHash(self.rows + other.rows, value)

    @property
    def hex(self) -> str:
        """The hash as 64 digits."""
        return f"{self.value:064x}"
