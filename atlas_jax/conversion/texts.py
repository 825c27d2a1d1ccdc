"""What a checkpoint says of its texts (prompts, length, lower case), in this project's settings."""

import dataclasses
import json
from typing import Any

from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.interop.tensors import Part
from atlas_jax.tasks.registry import TASKS

QUERY_LENGTH = 64  # tokens of a query that are kept unless a run says otherwise


def settle(part: Part, options: str) -> tuple[str, tuple[str, ...]]:
    """Take over what the checkpoint says of its texts; the tokenizer may be changed by it.

    Args:
      options: the name of the file that will hold the bindings.

    Returns:
      Bindings as gin, '' if none is needed; and what people have to know, in lines.
    """
    texts, told = part.texts, []
    bindings = _prompts(part) | _lengths(part)
    if texts.query_prompt or texts.passage_prompt:
        told.append(
            f"prompts: query {texts.query_prompt!r}, passage {texts.passage_prompt!r}; {options} "
            "binds them"
        )
    if _lengths(part):
        told.append(f"max_seq_length: {texts.longest} tokens of a text; {options} binds it")
    if texts.lowercases:
        already = "" if _lowercase(part) else ", as it did before"
        told.append(f"do_lower_case is true: the tokenizer makes letters small{already}")
    lines = ["# How the retriever's texts are made, as its sentence-transformers folder says.", ""]
    lines += [f"{name} = {value!r}" for name, value in bindings.items()]
    return ("\n".join(lines) + "\n" if bindings else ""), (*told, *texts.remarks)


def _prompts(part: Part) -> dict[str, str]:
    texts = part.texts
    bindings = {}
    if texts.passage_prompt:
        before = _escaped(texts.passage_prompt)
        bindings["StoreConfig.retriever_format"] = f"{before}{StoreConfig.retriever_format}"
    if texts.query_prompt:
        tasks: Any = TASKS.values()
        for task in tasks:
            usual = _default(task, "retriever_format")
            if usual is not None:
                name = f"{task.__name__}.retriever_format"
                bindings[name] = f"{_escaped(texts.query_prompt)}{usual}"
    return bindings


def _lengths(part: Part) -> dict[str, int]:
    longest = part.texts.longest
    if not 0 < longest < part.config.get("max_positions", 0):
        return {}
    bindings = {"StoreConfig.retriever_length": longest}
    if longest < QUERY_LENGTH:
        bindings["DataConfig.retriever_query_length"] = longest
    return bindings


def _lowercase(part: Part) -> bool:
    """Let the tokenizer make letters small; says whether it did not yet."""
    if part.tokenizer is None:
        return True  # told, for whoever gives one
    if Tokenizer(part.tokenizer, f"the {part.kind}'s tokenizer").lowercases:
        return False
    content = json.loads(part.tokenizer)
    steps = [{"type": "Lowercase"}]
    if content.get("normalizer") is not None:
        steps.append(content["normalizer"])
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    part.tokenizer = json.dumps(content, ensure_ascii=False)
    return True


def _escaped(prompt: str) -> str:
    """A text as a format has it."""
    return prompt.replace("{", "{{").replace("}", "}}")


def _default(task: Any, name: str) -> Any:
    found = {field.name: field.default for field in dataclasses.fields(task)}
    return found.get(name)
