"""What a sentence-transformers folder says beside its transformer, both ways.

Such a folder lists its modules in `modules.json`: the transformer (in old folders it lies in
`0_Transformer`), a pooling (configured in a folder of its own) and possibly a normalisation.
`config_sentence_transformers.json` has prompts, which stand before every text, and the
similarity; `sentence_bert_config.json`, beside the transformer, the length in tokens and whether
texts are lower-cased. Without `modules.json`, `pooling` in `config.json` counts (Contriever), else
Contriever's average.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import check_name
from atlas_jax.interop.tensors import TextSettings

_MODULES = "modules.json"
_MODES = {
    "pooling_mode_mean_tokens": "average",
    "pooling_mode_mean_sqrt_len_tokens": "sqrt",
    "pooling_mode_cls_token": "cls",
}
# Newer folders name the mode in one word.
_WORDS = {"mean": "average", "mean_sqrt_len_tokens": "sqrt", "cls": "cls"}
_POOLINGS = ("average", "sqrt", "cls")
_TRANSFORMERS = ("Transformer", "BERT")  # the second in the first folders of all
# The names of prompts that the library looks for, in its order.
_PASSAGE_PROMPTS = ("document", "passage", "corpus")


@dataclasses.dataclass(frozen=True)
class _Module:
    """One entry of `modules.json`."""

    type: str = ""
    path: str = ""

    @property
    def kind(self) -> str:
        """The last part of the type."""
        return self.type.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class _Whole:
    """What of `config_sentence_transformers.json` counts."""

    prompts: dict[str, str | None] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None


@dataclasses.dataclass(frozen=True)
class _Texts:
    """What of `sentence_bert_config.json` counts."""

    max_seq_length: bounds.Length | None = None
    do_lower_case: bool = False


@dataclasses.dataclass(frozen=True)
class Said:
    """What a folder says.

    Attributes:
      transformer: the folder with `config.json`, tensors and tokenizer.
      fields: `pooling` and `normalize` of a RetrieverConfig; empty without `modules.json`.
      texts: what is done to a text before it is encoded, and what has to be told of it.
    """

    transformer: Path
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    texts: TextSettings = TextSettings()


def read(folder: Path) -> Said:
    """What the files of a folder say, `config.json` of the transformer aside.

    Raises:
      UserError: a module or a pooling that no retriever here has; it is named. Or the folder is
        only the transformer of a whole one.
    """
    path = folder / _MODULES
    if not path.is_file():
        _check_whole(folder)
        return Said(folder)
    fields: dict[str, Any] = {"pooling": "average", "normalize": False}
    transformer, keeps_prompt = folder, True
    modules: list[_Module] = strict_json.read(path, list[_Module])
    for module in modules:
        check_name(module.path)
        place = folder / module.path
        if folder.resolve() not in (place.resolve(), *place.resolve().parents):
            raise UserError(f"{path}: the module {module} lies outside of the folder")
        if module.kind == "Pooling":
            fields["pooling"], keeps_prompt = _pooling(place / "config.json")
        elif module.kind == "Normalize":
            fields["normalize"] = True
        elif module.kind in _TRANSFORMERS:
            transformer = place
        else:
            raise UserError(
                f"{path}: a module {module.type}; a retriever has Transformer, Pooling and "
                "Normalize, and nothing else"
            )
    texts = _texts(transformer)
    whole = folder / "config_sentence_transformers.json"
    if whole.is_file():
        texts = _with_prompts(whole, texts, keeps_prompt, fields)
    return Said(transformer, fields, texts)


def pooling_of(said: Said, config: Mapping[str, Any]) -> dict[str, Any]:
    """`pooling` and `normalize` of a RetrieverConfig.

    Args:
      config: of the transformer's `config.json`, which counts where no module is listed.

    Raises:
      UserError: a pooling that no retriever here has.
    """
    if said.fields:
        return dict(said.fields)
    pooling = config.get("pooling", "average")
    if not isinstance(pooling, str) or pooling not in _POOLINGS:
        raise UserError(
            f"{said.transformer / 'config.json'}: pooling is {pooling!r}; a retriever has "
            f"{', '.join(_POOLINGS)}"
        )
    return {"pooling": pooling, "normalize": False}


def _check_whole(folder: Path) -> None:
    """Refuse the transformer of a whole folder: pooling and normalisation would be lost."""
    above = folder.resolve().parent
    if not (above / _MODULES).is_file():
        return
    modules: list[_Module] = strict_json.read(above / _MODULES, list[_Module])
    if folder.resolve().name in {module.path.rstrip("/") for module in modules}:
        raise UserError(
            f"{folder} is one module of the sentence-transformers folder {above}, whose "
            f"{_MODULES} names pooling and normalisation: convert {folder.parent} instead"
        )


def _texts(transformer: Path) -> TextSettings:
    """Length and lower-casing; the file is called after the kind of the transformer."""
    for path in sorted(transformer.glob("sentence_*_config.json")):
        said: _Texts = strict_json.read(path, _Texts)
        return TextSettings(longest=said.max_seq_length or 0, lowercases=said.do_lower_case)
    return TextSettings()


def _with_prompts(
    path: Path, texts: TextSettings, keeps_prompt: bool, fields: dict[str, Any]
) -> TextSettings:
    """Add the prompts; a cosine sets `normalize` among the fields."""
    said: _Whole = strict_json.read(path, _Whole)
    prompts = {name: prompt for name, prompt in said.prompts.items() if prompt}
    default = said.default_prompt_name
    if default is not None and default not in said.prompts:
        raise UserError(f"{path}: default_prompt_name is {default!r}, but no prompt is called so")
    usual = prompts.get(default or "", "")
    passage = next((name for name in _PASSAGE_PROMPTS if name in said.prompts), default)
    texts = dataclasses.replace(
        texts,
        query_prompt=prompts.get("query", usual),
        passage_prompt=prompts.get(passage or "", ""),
    )
    if (texts.query_prompt or texts.passage_prompt) and not keeps_prompt:
        raise UserError(
            f"{path}: prompts that the pooling leaves out (include_prompt is false); a retriever "
            "here pools all tokens"
        )
    remarks = []
    others = sorted(set(prompts) - {"query", passage, default})
    if others:
        remarks.append(f"prompts that nothing here uses: {', '.join(others)}")
    similarity = said.similarity_fn_name
    if similarity == "cosine" and not fields["normalize"]:
        fields["normalize"] = True
        remarks.append("similarity_fn_name is cosine: RetrieverConfig.normalize is True")
    elif similarity not in (None, "cosine", "dot"):
        remarks.append(
            f"similarity_fn_name is {similarity}, not taken over: passages are ranked by the inner "
            "product"
        )
    return dataclasses.replace(texts, remarks=tuple(remarks))


def _pooling(path: Path) -> tuple[str, bool]:
    """The pooling, and whether the tokens of a prompt take part in it."""
    config: dict[str, Any] = strict_json.read(path, dict[str, Any])
    return _mode(path, config), config.get("include_prompt") is not False


def _mode(path: Path, config: Mapping[str, Any]) -> str:
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
