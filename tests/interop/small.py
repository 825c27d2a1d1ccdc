"""What the tests of conversions share: the golden files, small tokenizers, one way to convert."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post

from atlas_jax import from_gin
from atlas_jax.conversion.convert import Conversion, convert, make_model, read_model_folder
from atlas_jax.interop.tensors import Part, Tensor
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig

GOLDENS = Path(__file__).parents[1] / "goldens" / "interop"
LOGITS_TOLERANCE = 1e-4


def outputs() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "outputs.npz") as file:
        return dict(file)


def reader_tokenizer(folder: Path, sentinels: int = 100, pieces: str = "etaoinshrdlu ?:,.") -> Path:
    """A unigram tokenizer of letters with T5's specials: 3 + letters + sentinels ids."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(letter, -3.0) for letter in pieces if letter != " "]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = post.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in reversed(range(sentinels)))]
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    path = folder / "reader.json"
    tokenizer.save(str(path))
    return path


def wordpiece_file(folder: Path) -> Path:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    path = folder / "vocab.txt"
    path.write_text("\n".join([*pieces, *(f"##{c}" for c in pieces[5:])]) + "\n")
    return path


def job(source: str, target: str, input: Path | str, output: Path, **changes: Any) -> Conversion:
    fields = {
        "reader": from_gin.fields_told(ReaderConfig),
        "retriever": from_gin.fields_told(RetrieverConfig),
    }
    return Conversion(source, target, (str(input),), str(output), fields=fields, **changes)


def to_ours(folder: Path, source: str, input: Path, **changes: Any) -> Path:
    """Convert into a model folder with the small tokenizers."""
    tokenizers = {
        "reader": str(reader_tokenizer(folder)), "retriever": str(wordpiece_file(folder))
    }  # fmt: skip
    output = folder / "ours"
    convert(job(source, "atlas-jax", input, output, tokenizers=tokenizers, **changes), quiet)
    return output


def quiet(line: str) -> None:
    del line


def params(part: Part) -> Any:
    flat = {name: tensor.read().astype(np.float32) for name, tensor in part.tensors.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def logits(part: Part, source: np.ndarray, decoder_input: np.ndarray) -> np.ndarray:
    model = make_model(part)
    assert isinstance(model, T5)
    run = jax.jit(lambda p: model.apply({"params": p}, source, decoder_input))
    return np.asarray(run(params(part)))


def embeddings(part: Part, ids: np.ndarray, method: str = "embed_query") -> np.ndarray:
    model = make_model(part)
    run = jax.jit(lambda p: model.apply({"params": p}, ids, method=method))
    return np.asarray(run(params(part)))


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Type, shape and every bit of a tensor."""
    return tensor.dtype.name, tensor.shape, tensor.read().tobytes()


def all_bits(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def parts_of(folder: Path) -> dict[str, Part]:
    return read_model_folder(folder)


def edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
