"""Live against PyTorch (extra [parity]): conversions of models of odd shapes, layer by layer."""

import dataclasses
from pathlib import Path

import pytest

from atlas_jax.conversion.convert import convert
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from tests.goldens import make_interop_goldens as goldens
from tests.interop import small

pytestmark = [pytest.mark.parity, pytest.mark.slow]

T5 = {"vocab_size": 113, "d_model": 18, "d_kv": 7, "d_ff": 13, "num_layers": 3,
      "num_decoder_layers": 1, "num_heads": 5}  # fmt: skip
BERT = {"vocab_size": 71, "hidden_size": 22, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 17, "max_position_embeddings": 31}  # fmt: skip


@pytest.fixture(autouse=True)
def needs_torch() -> None:
    pytest.importorskip("torch", reason="needs the extra [parity]")
    pytest.importorskip("transformers", reason="needs the extra [parity]")


def verified(source: str, target: str, input: Path, output: Path, **changes: object) -> float:
    """The largest difference of any layer."""
    job = small.job(source, target, input, output, verify=True, **changes)
    (done,) = convert(job, small.quiet)
    assert len(done.layers) >= 3
    return max(done.layers.values())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", ["safetensors", "bin", "old_bin"])
def test_readers(gated: bool, form: str, tmp_path: Path) -> None:
    import torch

    model = goldens.make_t5(gated, 5, T5)
    model.save_pretrained(tmp_path / "hf")
    if form != "safetensors":
        (tmp_path / "hf" / "model.safetensors").unlink()
        zipped = form == "bin"
        path = tmp_path / "hf" / "pytorch_model.bin"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert verified("hf", "t5x", tmp_path / "hf", tmp_path / "t5x") < 1e-4
    # And what leaves for Hugging Face is loaded there, and gives the same.
    assert verified("t5x", "hf", tmp_path / "t5x", tmp_path / "back") < 1e-4


def test_encoders(tmp_path: Path) -> None:
    goldens.make_bert(6, BERT).save_pretrained(tmp_path / "hf")
    changes = {"allow_unused": ("pooler.*",)}
    assert verified("hf", "hf", tmp_path / "hf", tmp_path / "back", **changes) < 1e-4


@pytest.mark.parametrize("bound", [{}, {"pooling": "cls"}, {"pooling": "sqrt", "normalize": True}])
def test_the_last_line_is_the_embedding(bound: dict[str, object], tmp_path: Path) -> None:
    """Every pooling, with and without normalisation, written as modules and read from them."""
    goldens.make_bert(6, BERT).save_pretrained(tmp_path / "hf")
    load_gin([], [f"RetrieverConfig.{name}={value}" for name, value in bound.items()])
    for source, output in (("hf", "back"), ("back", "again")):
        job = small.job("hf", "hf", tmp_path / source, tmp_path / output, verify=True,
                        allow_unused=("pooler.*",))  # fmt: skip
        (done,) = convert(job, small.quiet)
        assert list(done.layers)[-1] == "embedding"
        assert done.layers["embedding"] < 1e-5
        assert "embedding: " in done.lines()[-1]
        load_gin([])


@pytest.mark.parametrize("wrong", [{"pooling": "cls"}, {"normalize": False}])
def test_a_wrong_pooling_is_noticed(
    wrong: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers are right then, and every embedding is wrong."""
    import atlas_jax.conversion.convert as conversion

    honest = conversion.huggingface.read_folder

    def careless(*arguments: object, **more: object) -> object:
        part = honest(*arguments, **more)  # type: ignore[arg-type]
        part.config.update(wrong)
        return part

    monkeypatch.setattr(conversion.huggingface, "read_folder", careless)
    tokenizers = {"retriever": str(small.wordpiece_file(tmp_path))}
    job = small.job("hf", "atlas-jax", small.GOLDENS / "minilm", tmp_path / "out", verify=True,
                    allow_unused=("pooler.*",), tokenizers=tokenizers)  # fmt: skip
    with pytest.raises(UserError, match="--verify: embedding differs by"):
        convert(job, small.quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["atlas_tied", "atlas_untied"])
@pytest.mark.parametrize("part", ["reader", "retriever"])
def test_meta_atlas(name: str, part: str, tmp_path: Path) -> None:
    load_gin([], ["RetrieverConfig.num_heads=3"])
    tokenizers = {
        "reader": str(small.reader_tokenizer(tmp_path)),
        "retriever": str(small.wordpiece_file(tmp_path)),
    }
    file = small.GOLDENS / f"{name}.pth.tar"
    changes = {"part": part, "tokenizers": tokenizers}
    assert verified("meta-atlas", "atlas-jax", file, tmp_path / "ours", **changes) < 1e-4


def test_a_wrong_mapping_is_noticed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits may be equal and the model another: two matrices that changed places."""
    import atlas_jax.conversion.convert as conversion

    honest = conversion.huggingface.read_folder

    def swapped(*arguments: object, **more: object) -> object:
        part = honest(*arguments, **more)  # type: ignore[arg-type]
        a, b = (f"decoder/layers_1/self_attention/{n}/kernel" for n in ("query", "key"))
        tensors = {**part.tensors, a: part.tensors[b], b: part.tensors[a]}
        return dataclasses.replace(part, tensors=tensors)

    monkeypatch.setattr(conversion.huggingface, "read_folder", swapped)
    job = small.job("hf", "t5x", small.GOLDENS / "t5_v1_1", tmp_path / "out", verify=True)
    with pytest.raises(UserError, match="--verify: decoder/layers_1 differs by"):
        convert(job, small.quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["t5_v1_0", "t5_v1_1"])
def test_t5x_alone(name: str, tmp_path: Path) -> None:
    """Hugging Face's model is filled with what --to=hf would write."""
    convert(small.job("hf", "t5x", small.GOLDENS / name, tmp_path / "t5x"), small.quiet)
    tokenizers = {"reader": str(small.reader_tokenizer(tmp_path))}
    ours = tmp_path / "ours"
    assert verified("t5x", "atlas-jax", tmp_path / "t5x", ours, tokenizers=tokenizers) < 1e-4
    assert verified("atlas-jax", "t5x", ours, tmp_path / "back") < 1e-4


def test_an_untied_retriever_among_our_own(tmp_path: Path) -> None:
    load_gin([], ["RetrieverConfig.num_heads=3"])
    ours = small.to_ours(
        tmp_path, "meta-atlas", small.GOLDENS / "atlas_untied.pth.tar", part="retriever"
    )
    assert verified("atlas-jax", "atlas-jax", ours, tmp_path / "again") < 1e-4
