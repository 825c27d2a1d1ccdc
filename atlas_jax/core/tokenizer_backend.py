"""The `tokenizers` library's tokenizer behind `core/tokenizer.py`, with special tokens renamed.

The library takes the name of a special token for the token itself wherever a text has it, and a
unigram model finds it among its pieces even where it is told not to. So here each of these names
begins with `DELIBERATE`, a character that no text has: what is typed is text. Ids stay as they are.
"""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import tokenizers

from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.formats import DELIBERATE, SENTINEL

PAD_NAMES = ("<pad>", "[PAD]")
END_NAMES = ("</s>", "[SEP]")
START_NAMES = ("[CLS]", "<s>")
UNKNOWN_NAMES = ("<unk>", "[UNK]")
MASK_NAMES = ("[MASK]", "<mask>")
_ALWAYS_SPECIAL = {*PAD_NAMES, *END_NAMES, *START_NAMES, *UNKNOWN_NAMES, *MASK_NAMES}
_TOLD = {*PAD_NAMES, *END_NAMES}  # and sentinels: read as text they would spoil answers
_PROBES = ("\ua66e", "\u2603", "\U00013000")  # hardly a vocabulary has any of them


def make_backend(
    file_content: Mapping[str, Any],
) -> tuple[tokenizers.Tokenizer, frozenset[str], list[str]]:
    """The tokenizer of a parsed `tokenizer.json`.

    Returns:
      The tokenizer; the names of its special tokens, each of which is `DELIBERATE` + name to it;
      and what had to be mended, in words.

    Raises:
      Exception: the library cannot read it.
    """
    content = dict(file_content)
    mended = _complete_specials(content)
    names = frozenset(token["content"] for token in content["added_tokens"] if token["special"])
    _rename(content, names)
    mended += _complete_ends(content, names)
    backend = tokenizers.Tokenizer.from_buffer(msgspec.json.encode(content))
    backend.no_truncation()
    backend.no_padding()
    return backend, names, mended


def tokenizer_text(content: Mapping[str, Any]) -> str:
    """A tokenizer.json's content as text, equal for equal content."""
    return json.dumps(content, ensure_ascii=False, sort_keys=True)


def _complete_specials(content: dict[str, Any]) -> list[str]:
    """Make special tokens of those that the file has as plain pieces; says which were."""
    vocabulary = _vocabulary(content)
    added = [dict(token) for token in content.get("added_tokens") or ()]
    found = []
    for token in added:
        if not token["special"] and _is_special(token["content"]):
            token["special"] = True
            found.append(token["content"])
        if token["special"]:
            token["normalized"] = False
    known = {token["content"] for token in added}
    for name, number in vocabulary.items():
        if name not in known and _is_special(name):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": number, "content": name, "special": True, **flags})
            found.append(name)
    content["added_tokens"] = sorted(added, key=lambda token: token["id"])
    told = sorted(name for name in found if name in _TOLD or SENTINEL.fullmatch(name))
    if not told:
        return []
    more = f" and {len(told) - 1} others" if len(told) > 1 else ""
    return [f"{told[0]}{more} are plain text in the file; they are taken as special tokens"]


def _is_special(name: str) -> bool:
    if not name.startswith(("<", "[")):
        return False
    return name in _ALWAYS_SPECIAL or bool(SENTINEL.fullmatch(name))


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    """Ids by piece; a unigram model has a list, others have an object."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _rename(content: dict[str, Any], names: frozenset[str]) -> None:
    """Put `DELIBERATE` before every special name, wherever the file has it."""

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return f"{DELIBERATE}{value}" if value in names else value
        if isinstance(value, dict):
            return {renamed(key): renamed(item) for key, item in value.items()}
        return [renamed(item) for item in value] if isinstance(value, list) else value

    model = dict(content["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[renamed(piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {renamed(piece): number for piece, number in model["vocab"].items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed(model["unk_token"])
    content["model"] = model
    content["post_processor"] = renamed(content.get("post_processor"))
    for token in content["added_tokens"]:
        token["content"] = renamed(token["content"])


def _complete_ends(content: dict[str, Any], names: frozenset[str]) -> list[str]:
    """Where the file puts nothing around a text, put the end token there, and a start token."""
    if content["post_processor"] is not None:
        return []
    start = next((name for name in START_NAMES if name in names), None)
    end = next((name for name in END_NAMES if name in names), None)
    if end is None:
        return []
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    around = [f"{DELIBERATE}{name}" for name in (start, end) if name]
    pieces: list[Any] = [{"SpecialToken": {"id": name, "type_id": 0}} for name in around]
    pieces.insert(len(pieces) - 1, {"Sequence": {"id": "A", "type_id": 0}})
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}, pieces[-1]],
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in around
        },
    }
    shown = " and ".join(name for name in (start, end) if name)
    return [f"the file puts no token around a text; {shown} is added"]


def check_unknown(backend: tokenizers.Tokenizer, source: str) -> None:
    """Refuse a tokenizer that fails at a character it lacks, or leaves it out in silence.

    Raises:
      UserError: it does; names the tokens that are missing.
    """
    for text in _PROBES:
        try:
            ids = backend.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exception, or panics
            raise UserError(
                f"{source}: no unknown token ({' or '.join(UNKNOWN_NAMES)}), so a text with a "
                f"character that the vocabulary lacks cannot be encoded ({one_line(error)})"
            ) from None
        if not ids:
            raise UserError(
                f"{source}: it leaves out the character {text!r} in silence, as it does any that "
                f"its vocabulary lacks; it needs an unknown token ({' or '.join(UNKNOWN_NAMES)}) "
                "or pieces for bytes"
            )
