"""Pooling and normalisation in a sentence-transformers folder, both ways.

Such a folder lists its modules in `modules.json`: the transformer, a pooling (configured in
a folder of its own) and possibly a normalisation. Without that file, `pooling` in
`config.json` counts (Contriever), else Contriever's average.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import check_name

_MODES = {
    "pooling_mode_mean_tokens": "average",
    "pooling_mode_mean_sqrt_len_tokens": "sqrt",
    "pooling_mode_cls_token": "cls",
}
# Newer folders name the mode in one word.
_WORDS = {"mean": "average", "mean_sqrt_len_tokens": "sqrt", "cls": "cls"}
_POOLINGS = ("average", "sqrt", "cls")


@dataclasses.dataclass(frozen=True)
class _Module:
    """One entry of `modules.json`."""

    type: str = ""
    path: str = ""


def read(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """`pooling` and `normalize` of a RetrieverConfig.

    Args:
      config: of `config.json`.

    Raises:
      UserError: a module or a pooling that no retriever here has; it is named.
    """
    path = folder / "modules.json"
    if not path.is_file():
        pooling = config.get("pooling", "average")
        if not isinstance(pooling, str) or pooling not in _POOLINGS:
            raise UserError(
                f"{folder / 'config.json'}: pooling is {pooling!r}; a retriever has "
                f"{', '.join(_POOLINGS)}"
            )
        return {"pooling": pooling, "normalize": False}
    fields: dict[str, Any] = {"pooling": "average", "normalize": False}
    modules: list[_Module] = strict_json.read(path, list[_Module])
    for module in modules:
        kind = module.type.rpartition(".")[2]
        check_name(module.path)
        place = folder / module.path
        if folder.resolve() not in (place.resolve(), *place.resolve().parents):
            raise UserError(f"{path}: the module {module} lies outside of the folder")
        if kind == "Pooling":
            fields["pooling"] = _pooling(place / "config.json")
        elif kind == "Normalize":
            fields["normalize"] = True
        elif kind != "Transformer":
            raise UserError(
                f"{path}: a module {module.type}; a retriever has Transformer, Pooling and "
                "Normalize, and nothing else"
            )
    return fields


def _pooling(path: Path) -> str:
    config: dict[str, Any] = strict_json.read(path, dict[str, Any])
    word = config.get("pooling_mode")
    if word is not None:
        if not isinstance(word, str) or word not in _WORDS:
            raise UserError(f"{path}: pooling_mode is {word!r}; known are {', '.join(_WORDS)}")
        return _WORDS[word]
    chosen = [n for n, on in config.items() if n.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise UserError(
            f"{path}: pooling by {', '.join(chosen) or 'nothing'}; a retriever has one of "
            f"{', '.join(_MODES)}"
        )
    return _MODES[chosen[0]]


def write(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the modules of a retriever beside its `config.json`."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if config.get("normalize"):
        modules.append(("2_Normalize", "Normalize"))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    pooling = {"word_embedding_dimension": config["hidden_dim"]}
    for mode, ours in _MODES.items():
        pooling[mode] = ours == config.get("pooling", "average")
    pooling["pooling_mode_max_tokens"] = False
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    files = {
        "modules.json": listed,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {
            "max_seq_length": config["max_positions"],
            "do_lower_case": False,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
