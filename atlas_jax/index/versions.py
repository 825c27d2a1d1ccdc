"""The versions of a passage store: which segments it has, and which of their rows are dead.

A store is made once and stays as it is: its files are the first segment, version 0. Each batch of
changes makes one version more. Beside the first segment's files a store then has

    segments/NAME/              a passage store: the passages that one batch brought
    versions/000001.json        `Version`: what version 1 consists of
    versions/000001.dead.npy    int64, ascending: rows of its segments that are deleted

Nothing of it is ever changed. A version exists as soon as its json file does, which is written
last, flushed and renamed. A kill before leaves files that no version names; the next change
removes them.
"""

import contextlib
import datetime
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, TypedDict

import numpy as np
from msgspec import Meta

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.locks import locked
from atlas_jax.core.objects import Objects
from atlas_jax.core.paths import is_remote
from atlas_jax.core.whole import whole_file

FIRST = ""  # name of the first segment, which lies in the store's own folder
VERSIONS, SEGMENTS = "versions", "segments"
_FORMAT = 1
_DIGITS = 18  # of a version's number, at most


class Change(TypedDict):
    """How many passages a version added, replaced and deleted."""

    added: bounds.Count
    replaced: bounds.Count
    deleted: bounds.Count


class Version(TypedDict):
    """The content of versions/NNNNNN.json.

    ``time`` is in UTC. ``count`` is of living passages. Versions before ``oldest`` are given up.
    """

    format: int
    version: bounds.Count
    time: str
    segments: list[Annotated[str, Meta(pattern=r"^([0-9]{6}-[0-9a-f]{8})?$")]]
    dead: bounds.Count
    count: Annotated[int, Meta(ge=1, le=bounds.LARGEST)]
    change: Change
    oldest: bounds.Count


def versions_of(directory: str | os.PathLike[str]) -> list[Version]:
    """The versions of a store that can be read, oldest first; [] where nothing was ever changed.

    Version 0 is not among them unless it was compacted away: it has no file of its own.

    Raises:
      UserError: a version's file is damaged.
    """
    return [read_version(directory, number) for number in numbers_of(directory)]


def numbers_of(directory: str | os.PathLike[str]) -> list[int]:
    """The numbers of `versions_of`; only the newest version's file is read.

    Raises:
      UserError: it is damaged.
    """
    names = Objects(directory).names(VERSIONS)
    stems = (PurePosixPath(name).stem for name in names if name.endswith(".json"))
    numbers = sorted(int(stem) for stem in stems if stem.isdecimal())
    oldest = read_version(directory, numbers[-1])["oldest"] if numbers else 0
    return [number for number in numbers if number >= oldest]


def first_version(count: int) -> Version:
    """Version 0: the first segment as it was built."""
    change = Change(added=0, replaced=0, deleted=0)
    return Version(
        format=_FORMAT, version=0, time="", segments=[FIRST], dead=0, count=count, change=change,
        oldest=0,
    )  # fmt: skip


def find_version(directory: str | os.PathLike[str], as_of: str) -> Version | None:
    """The version that was the newest as of a version's number or a time.

    Args:
      as_of: a number, a time in ISO 8601 (UTC unless it says otherwise), or "" for the newest.

    Returns:
      None for version 0, the store as it was built.

    Raises:
      UserError: there is no such version, or it was compacted away.
    """
    numbers = numbers_of(directory)
    newest = read_version(directory, numbers[-1]) if numbers else None
    oldest = newest["oldest"] if newest else 0
    if not as_of:
        return newest
    if as_of.isdecimal() and len(as_of) <= _DIGITS:
        wanted = int(as_of)
        if wanted not in numbers and (wanted or oldest):
            raise UserError(
                f"as_of = {as_of!r}: {directory} has the versions {oldest} to "
                f"{newest['version'] if newest else 0}; `atlas-jax index show` lists them"
            )
        return read_version(directory, wanted) if wanted in numbers else None
    until = parse_time(as_of)
    for number in reversed(numbers):
        found = read_version(directory, number)
        if datetime.datetime.fromisoformat(found["time"]) <= until:
            return found
    if oldest:
        raise UserError(
            f"as_of = {as_of!r}: the oldest version of {directory} that was kept is {oldest}, of "
            f"{read_version(directory, numbers[0])['time']}"
        )
    return None


def parse_time(text: str) -> datetime.datetime:
    """A time in ISO 8601, in UTC unless it says otherwise.

    Raises:
      UserError: it is none.
    """
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"as_of = {text!r}: expected a version's number, such as 3, or a time, such as "
            "2026-01-31T12:00"
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def dead_rows(directory: Path, version: Version) -> np.ndarray:
    """Rows of a version's segments, one after the other, that are deleted: int64, ascending.

    Raises:
      UserError: the file is missing or damaged.
    """
    if not version["dead"]:
        return np.zeros(0, np.int64)
    path = _dead_file(directory, version["version"])
    try:
        raw = Objects(directory).read(f"{VERSIONS}/{path.name}")
        dead = np.load(io.BytesIO(raw), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if dead.shape != (version["dead"],) or dead.dtype != np.int64 or (np.diff(dead) <= 0).any():
        raise UserError(f"{path}: expected {version['dead']} ascending int64 rows")
    return dead


@contextlib.contextmanager
def changing(directory: Path) -> Iterator[None]:
    """Keep other writers of a store away; what a killed one left behind is removed first.

    If the block fails, what it has made and no version names is removed.

    Raises:
      UserError: another process changes the store.
    """
    if is_remote(directory):
        raise UserError(
            f"{directory} is in a bucket; change it on a disk, then copy it there: "
            "`gcloud storage rsync --recursive STORE gs://...`, versions/ last"
        )
    (directory / VERSIONS).mkdir(exist_ok=True)
    with locked(directory / VERSIONS / ".lock", str(directory)):
        collect(directory)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError, UserError):  # the next change removes it
                collect(directory)
            raise


def commit(directory: Path, version: Version, dead: np.ndarray) -> None:
    """Make a version, whole and flushed to the disk, whose segments are there already."""
    number = version["version"]
    if len(dead):
        with whole_file(_dead_file(directory, number)) as file:
            np.save(file, dead)
    with whole_file(directory / VERSIONS / f"{number:06d}.json") as file:
        file.write((json.dumps(version, indent=2) + "\n").encode("utf-8"))
    _flush([directory / VERSIONS, directory])  # `whole_file` has flushed the files


def collect(directory: Path) -> None:
    """Remove what no version names: given up, or left behind by a kill.

    Only the newest version is read, unless there is something that it does not name.
    """
    kept = numbers_of(directory)
    numbers = {f"{number:06d}" for number in kept}
    for path in (directory / VERSIONS).iterdir():
        if path.name != ".lock" and path.name.split(".")[0] not in numbers:
            path.unlink(missing_ok=True)
    folder = directory / SEGMENTS
    for path in unnamed(directory, folder.iterdir() if folder.is_dir() else ()):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if first_is_given_up(directory):
        for path in (*directory.glob("*.npy"), directory / "passages.jsonl"):  # of format 1
            path.unlink(missing_ok=True)
        for name in ("shards", "ids"):
            shutil.rmtree(directory / name, ignore_errors=True)


def unnamed(directory: str | os.PathLike[str], paths: Iterable[Path]) -> list[Path]:
    """Those of these paths whose name is no segment of a version."""
    numbers = numbers_of(directory)
    rest = list(paths)
    for number in reversed(numbers):
        if not rest:
            break
        named = read_version(directory, number)["segments"]
        rest = [path for path in rest if path.name not in named]
    return rest


def first_is_given_up(directory: str | os.PathLike[str]) -> bool:
    """Whether the store's first segment is part of no version any more."""
    numbers = numbers_of(directory)
    if not numbers or not read_version(directory, numbers[-1])["oldest"]:
        return False
    # Once a version is without it, so are all later ones.
    return FIRST not in read_version(directory, numbers[0])["segments"]


def flush_folder(folder: Path) -> None:
    """Flush a folder's files and names to the disk, so that they survive a power cut, too."""
    _flush([*(one for one in folder.iterdir() if one.is_file()), folder, folder.parent])


def flush_folders(place: Path, above: Path) -> None:
    """Flush the names in a new folder, and in those between it and one above, to the disk."""
    below = [path for path in place.rglob("*") if path.is_dir()]
    _flush([*below, place, *(one for one in place.parents if one.is_relative_to(above))])


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _dead_file(directory: Path, number: int) -> Path:
    return directory / VERSIONS / f"{number:06d}.dead.npy"


def read_version(directory: str | os.PathLike[str], number: int) -> Version:
    """One version's file.

    Raises:
      UserError: it is missing or damaged.
    """
    objects, name = Objects(directory), f"{VERSIONS}/{number:06d}.json"
    path = objects.at(name)
    found: Version = strict_json.parse_as(objects.read(name), Version, path)
    if found["format"] != _FORMAT:
        raise UserError(f"{path}: version format {found['format']}, this program reads {_FORMAT}")
    return found
