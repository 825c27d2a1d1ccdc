"""The page of every file of `gin/`: what its header says, and the file itself."""

import re
from pathlib import Path

from atlas_jax.core.config import gin_folder

INTRODUCTION = """# Gin files

The files of `gin/`, each with what its header says. Put them together on the command line:
[Configuration](../configuration.md).

"""
FOLDERS = {
    "models": "sizes of reader and retriever",
    "encoders": "other encoders of the retriever",
    "experts": "readers with Switch layers",
    "deltas": "adapters and LoRA",
    "corpora": "how a corpus is cut and formatted",
    "tasks": "what a line of a data file means",
    "distillation": "how the retriever learns from the reader",
    "mesh": "how the devices are arranged",
    "runs": "whole runs",
}


def page() -> str:
    """The page in Markdown."""
    folder = gin_folder()
    unknown = {path.name for path in folder.iterdir() if path.is_dir()} - set(FOLDERS)
    if unknown:
        raise ValueError(f"docs/hooks/gin_files.py: say what lies in gin/{sorted(unknown)}")
    lines = [INTRODUCTION]
    for name, words in FOLDERS.items():
        lines += [f"## `{name}/`: {words}", ""]
        lines += _sections(folder / name, f"{name}/")
    lines += ["## Beside the folders: what goes behind any run file", ""]
    return "\n".join(lines + _sections(folder, ""))


def _sections(folder: Path, prefix: str) -> list[str]:
    """A section for each file of a folder."""
    paths = sorted(folder.glob("*.gin"))
    return [line for path in paths for line in _section(path, f"{prefix}{path.name}")]


def _section(path: Path, name: str) -> list[str]:
    """A heading, the header's text, its fields as a table, and the rest as code."""
    text = path.read_text(encoding="utf-8")
    header = re.match(r"(?:#.*\n)+", text)
    if header is None:
        raise ValueError(f"{path} has no header")
    about, fields = _header(header[0])
    rows = [f"| {key} | {_cell(value)} |" for key, value in fields.items()]
    code = text[header.end() :].strip()
    return [
        f"### {name}",
        "",
        _cell(about),
        "",
        *(["| header | |", "|---|---|", *rows, ""] if rows else []),
        '??? note "The file"',
        "    ```python",
        *(f"    {line}".rstrip() for line in code.splitlines()),
        "    ```",
        "",
    ]


def _header(comment: str) -> tuple[str, dict[str, str]]:
    """What the file is for, and its fields: Requires, Optional, Data, Mesh ..."""
    fields: dict[str, str] = {}
    about: list[str] = []
    key = ""
    for line in comment.splitlines():
        text = line.removeprefix("#").strip()
        found = re.match(r"([A-Z][a-z]+):\s+(.*)", text)
        if found:
            key, text = found.groups()
        if key:
            fields[key] = f"{fields.get(key, '')} {text}".strip()
        else:
            about.append(text)
    words = re.sub(r"^\w+[:,] ", "", " ".join(about).strip())
    return words[:1].upper() + words[1:], fields


def _cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("<", "&lt;").replace("*", r"\*")
