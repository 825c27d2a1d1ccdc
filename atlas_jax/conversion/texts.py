"""What a checkpoint says of its texts (prompts, length, lower case), in this project's settings."""

import json
from typing import Any

from atlas_jax.conversion.expected import of_texts
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.interop.tensors import Part
from atlas_jax.models.expects import Expects
from atlas_jax.tasks.registry import TASKS


def settle(part: Part, options: str) -> tuple[str, tuple[str, ...]]:
    """Take over what the checkpoint says of its texts; the tokenizer may be changed by it.

    Args:
      options: the name of the file that will hold the bindings.

    Returns:
      Bindings as gin, '' if none is needed; and what people have to know, in lines.
    """
    texts, told = part.texts, []
    is_cut = 0 < texts.longest < part.config.get("max_positions", 0)
    bindings = _bindings(of_texts(texts), is_cut)
    if texts.query_prompt or texts.passage_prompt:
        told.append(
            f"prompts: query {texts.query_prompt!r}, passage {texts.passage_prompt!r}; {options} "
            "binds them"
        )
    if is_cut:
        told.append(f"max_seq_length: {texts.longest} tokens of a text; {options} binds it")
    if texts.lowercases:
        already = "" if _lowercase(part) else ", as it did before"
        told.append(f"do_lower_case is true: the tokenizer makes letters small{already}")
    lines = ["# How the retriever's texts are made, as its sentence-transformers folder says.", ""]
    lines += [f"{name} = {value!r}" for name, value in bindings.items()]
    return ("\n".join(lines) + "\n" if bindings else ""), (*told, *texts.remarks)


def _bindings(said: Expects, is_cut: bool) -> dict[str, Any]:
    """What the folder will say, as bindings for runs that begin without the folder."""
    bindings: dict[str, Any] = {}
    if said.retriever_format:
        bindings["StoreConfig.retriever_format"] = said.retriever_format
    for name, asking in said.tasks.items():
        task: Any = TASKS[name]
        bindings |= {f"{task.__name__}.{field}": text for field, text in asking.wording.items()}
    if is_cut:
        bindings["StoreConfig.retriever_length"] = said.retriever_length
        if any(asking.retriever_query_length for asking in said.tasks.values()):
            bindings["DataConfig.retriever_query_length"] = said.retriever_length
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
