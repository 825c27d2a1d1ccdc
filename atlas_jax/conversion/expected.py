"""What models of other projects expect to read, as far as their files tell.

What they do not tell is left open, and the defaults of this project serve: those of T5 and
Contriever as Atlas uses them.
"""

from collections.abc import Mapping
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.interop.meta_derived import derived
from atlas_jax.interop.tensors import TextSettings
from atlas_jax.models.expects import Asking, Expects
from atlas_jax.tasks.registry import TASKS

QUERY_LENGTH = 64  # tokens of a query that are kept unless a run says otherwise


def of_texts(texts: TextSettings) -> Expects:
    """What a retriever expects that puts prompts before its texts or reads only short ones."""
    length = texts.longest or None
    wording = {}
    for name, task in TASKS.items() if texts.query_prompt else ():
        asked = getattr(task, "retriever_format", "")
        if asked:
            wording[name] = {"retriever_format": _literal(texts.query_prompt) + asked}
    short = length if length and length < QUERY_LENGTH else None
    names = TASKS if short else wording
    before = _literal(texts.passage_prompt)
    return Expects(
        retriever_format=f"{before}{StoreConfig.retriever_format}" if before else None,
        retriever_length=length,
        tasks={name: Asking(wording.get(name, {}), retriever_query_length=short) for name in names},
    )


def of_atlas(options: Mapping[str, Any]) -> Expects:
    """What a run of Meta's Atlas expects: formats of passages and length of texts."""
    fields: dict[str, Any] = {}
    said: dict[str, Any] = {"retriever_format": options.get("retriever_format")}
    if "encoder_format" in options:
        read = derived("encoder_format", options)
        said["reader_format"] = read.get("StoreConfig.reader_format")
    for name, value in said.items():
        if isinstance(value, str) and _is_format(name, value):
            fields[name] = value
    length = options.get("text_maxlength")
    if isinstance(length, int) and not isinstance(length, bool) and length > 0:
        lengths = ("reader_length", "retriever_length", "text_length")
        fields |= dict.fromkeys(lengths, length)
    return Expects(**fields)


def _is_format(name: str, value: str) -> bool:
    """Whether passages of this project can be put into it."""
    try:
        StoreConfig(**{name: value})  # type: ignore[arg-type]
    except UserError:
        return False
    return True


def _literal(prompt: str) -> str:
    """A prompt as the beginning of a format."""
    return prompt.replace("{", "{{").replace("}", "}}")
