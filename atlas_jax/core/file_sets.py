"""Read passages from one file, from a folder, or from all files that match a pattern.

A folder is read with its subfolders, sorted by name. Text files (.md, .txt) are cut into passages
of whole paragraphs with about a hundred words, the usual size. A Markdown heading begins a new
passage and becomes its section.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, JsonObject, Part, RowsConfig, raw_lines
from atlas_jax.core.layouts import PASSAGES, Layout, read_layout
from atlas_jax.core.paths import as_path, is_remote

RECORDS = (".jsonl", ".jsonl.gz", ".tsv", ".tsv.gz", ".csv", ".csv.gz")
TEXTS = (".md", ".markdown", ".txt")
WORDS = 100  # approximate length of a passage cut from a text

Place = tuple[str, int]  # file and line
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Check = Callable[[str, int, JsonObject, Layout | None], None]

_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_SHARD = re.compile(r"(?P<stem>.*-)\d{5}-of-(?P<all>\d{5})(?P<suffix>\..*)?")
_FENCE = re.compile(r"\s*(```|~~~)")
_WANTED = (
    "passages are read from jsonl files of {id, title, text}, one object a line, from tables "
    f"({', '.join(RECORDS[2::2])}) and from texts ({', '.join(TEXTS)}); see docs/data_formats.md"
)


def passage_files(path: Paths) -> list[str]:
    """The files that a path stands for: one file, those in a folder, or those of a pattern.

    Args:
      path: or several, one after the other.

    Raises:
      UserError: there is no such file, a folder holds none that can be read, or a file is named as
        a shard (`passages-00000-of-00064.jsonl`) of which others are missing.
    """
    if not isinstance(path, str | os.PathLike):
        return [file for one in path for file in passage_files(one)]
    text = os.fspath(path)
    if is_remote(text) and glob.has_magic(text):
        folder, _, pattern = text.rpartition("/")
        names = [one.name for one in as_path(folder).iterdir()]
        found = sorted(f"{folder}/{name}" for name in fnmatch.filter(names, pattern))
        if not found:
            raise UserError(f"{text}: no file has such a name; {_WANTED}")
        return _whole_sets(found)
    if is_remote(text) or as_path(text).is_file():
        return [text]
    if as_path(text).is_dir():
        found = sorted(
            os.fspath(one)
            for one in Path(text).rglob("*")
            if one.name.lower().endswith(RECORDS + TEXTS)
            and one.is_file()
            and not any(part.startswith(".") for part in one.relative_to(text).parts)
        )
        if not found:
            raise UserError(f"{text}: no file of this folder can be read; {_WANTED}")
        return _whole_sets(found)
    if glob.has_magic(text):
        found = sorted(one for one in glob.glob(text, recursive=True) if os.path.isfile(one))
        if not found:
            raise UserError(f"{text}: no file has such a name; {_WANTED}")
        return _whole_sets(found)
    raise UserError(f"{text}: no such file")


def _whole_sets(files: list[str]) -> list[str]:
    """The files, if all shards of each set are there; a pattern may leave some out."""
    known = set(files)
    shards = filter(None, map(_SHARD.fullmatch, files))
    for stem, count, suffix in {one.group("stem", "all", "suffix"): None for one in shards}:
        for number in range(int(count)):
            name = f"{stem}{number:05d}-of-{count}{suffix or ''}"
            if name not in known and not as_path(name).exists():
                raise UserError(f"{name} is missing: the set of {int(count)} shards is not whole")
    return files


def read_passages(
    path: Paths, check: Check | None = None, rows: RowsConfig = STRICT
) -> Iterator[tuple[Place, JsonObject]]:
    """Yield `((file, line), record)` of every passage in the files of `passage_files`.

    The id of a passage from a text file is the file's path in the folder, `#` and a number.

    Args:
      check: further checks of a record; gets file, line, record and its layout, None for a text.
      rows: what happens to broken rows.

    Raises:
      UserError: names file and line.
    """
    files = passage_files(path)
    yield from read_files(files, base_of(path, files), check, rows)


def base_of(path: Paths, files: list[str]) -> str:
    """The folder in which the files' names begin the ids of passages that are cut from texts."""
    is_folder = isinstance(path, str | os.PathLike) and as_path(path).is_dir()
    return os.fspath(path) if is_folder else _common_folder(files)  # type: ignore[arg-type]


def read_files(
    files: Sequence[str],
    base: str,
    check: Check | None = None,
    rows: RowsConfig = STRICT,
    part: Part | None = None,
) -> Iterator[tuple[Place, JsonObject]]:
    """`read_passages` of some of the files.

    Args:
      base: of `base_of`.
      part: read only these lines of a single file, see `read_layout`.
    """
    for file in files:
        if file.lower().endswith(TEXTS) and not _begins_with_an_object(file):
            name = os.path.relpath(file, base) if not is_remote(file) else file
            for line, record in _passages_of_text(file, name.replace(os.sep, "/")):
                if check is not None:
                    check(file, line, record, None)
                yield (file, line), record
            continue

        def check_record(line: int, record: JsonObject, layout: Layout, file: str = file) -> None:
            if check is not None:
                check(file, line, record, layout)

        for line, record in read_layout(file, PASSAGES, check_record, rows, part):
            yield (file, line), record


def _common_folder(files: list[str]) -> str:
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])


def _begins_with_an_object(file: str) -> bool:
    """Whether a file with a text's suffix holds jsonl."""
    for _, raw in raw_lines(as_path(file)):
        text = raw.removeprefix(b"\xef\xbb\xbf").strip()
        if text:
            return text.startswith(b"{") and text.endswith(b"}")
    return False


def _passages_of_text(file: str, name: str) -> Iterator[tuple[int, JsonObject]]:
    """Passages of a text: a heading begins a new one, paragraphs fill it."""
    title = re.sub(r"\.(md|markdown|txt)$", "", name.rpartition("/")[2], flags=re.IGNORECASE)
    section, first, number = "", 0, 0
    words: list[str] = []

    def made() -> tuple[int, JsonObject]:
        record = {"id": f"{name}#{number}", "title": title, "section": section}
        return first, {**record, "text": " ".join(words)}

    for line, paragraph, heading in _paragraphs(file):
        too_many = len(words) + len(paragraph) > WORDS
        if words and (heading is not None or too_many):
            yield made()
            words, number = [], number + 1
        if heading is not None:
            level, text = heading
            if level == 1 and number == 0:
                title, section = text or title, ""
            else:
                section = text
            continue
        if not words:
            first = line
        for start in range(0, len(paragraph), WORDS):
            part = paragraph[start : start + WORDS]
            if start:
                yield made()
                words, number = [], number + 1
            words = [*words, *part]
    if words:
        yield made()


def _paragraphs(file: str) -> Iterator[tuple[int, list[str], tuple[int, str] | None]]:
    """Line, words and, for a Markdown heading, its level and text."""
    is_markdown = not file.lower().endswith(".txt")
    words: list[str] = []
    first, fenced = 1, False
    for line, raw in raw_lines(as_path(file)):
        try:
            text = raw.removeprefix(b"\xef\xbb\xbf" if line == 1 else b"").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}:{line}: not UTF-8 at byte {error.start + 1} of the line "
                f"(0x{raw[error.start]:02x}); convert the file to UTF-8"
            ) from None
        fenced ^= is_markdown and bool(_FENCE.match(text))
        heading = _HEADING.match(text) if is_markdown and not fenced else None
        if (heading or not text.strip()) and words:
            yield first, words, None
            words = []
        if heading:
            yield line, [], (len(heading[1]), heading[2])
        elif text.strip():
            first = line if not words else first
            words += text.split()
    if words:
        yield first, words, None
