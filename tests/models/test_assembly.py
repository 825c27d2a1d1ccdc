"""Models from folders and from gin, and what is refused."""

import dataclasses
from pathlib import Path

import gin
import jax
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.models import assembly
from atlas_jax.models.config import ModelConfig, ModelSpec
from atlas_jax.models.fingerprint import encoder_hash
from atlas_jax.models.parameters import RetrieverTraining
from atlas_jax.retriever.config import RetrieverConfig
from tests.device_bytes import device_bytes, most_bytes

SIZES = """
ReaderConfig.vocab_size = 400
ReaderConfig.emb_dim = 16
ReaderConfig.num_heads = 2
ReaderConfig.num_encoder_layers = 1
ReaderConfig.num_decoder_layers = 1
ReaderConfig.head_dim = 8
ReaderConfig.mlp_dim = 32
ReaderConfig.dropout_rate = 0.1
RetrieverConfig.vocab_size = 400
RetrieverConfig.hidden_dim = 16
RetrieverConfig.num_layers = 1
RetrieverConfig.num_heads = 2
RetrieverConfig.mlp_dim = 32
RetrieverConfig.max_positions = 64
MeshConfig.data = 1
MeshConfig.fsdp = 4
MeshConfig.model = 2
"""


@pytest.fixture
def fresh(reader_tokenizer_file: Path, retriever_tokenizer_file: Path) -> ModelConfig:
    gin.parse_config(SIZES)
    return ModelConfig(
        reader_tokenizer=str(reader_tokenizer_file),
        retriever_tokenizer=str(retriever_tokenizer_file),
    )


def told(config: ModelConfig) -> ModelSpec:
    return dataclasses.replace(from_gin.models(), config=config)


def _export(folder: Path, made: assembly.Assembled) -> ModelConfig:
    assembly.export_model(folder, made.models, made.params, made.tokenizers, "float32", {})
    return ModelConfig(reader=str(folder), retriever=str(folder))


def test_a_folder_needs_no_gin_and_bindings_override_it(tmp_path: Path, fresh: ModelConfig) -> None:
    with use_devices(from_gin.devices()) as (mesh, rules):
        made = assembly.assemble(told(fresh), mesh, rules, seed=3)
        config = _export(tmp_path / "model", made)
        gin.clear_config()
        gin.parse_config("ReaderConfig.dropout_rate = 0.0")
        found = assembly.assemble(told(config), mesh, rules)
        gin.parse_config("ReaderConfig.scan_layers = True")
        scanned = assembly.assemble(told(config), mesh, rules)
        back = _export(tmp_path / "again", scanned)
        assert assembly.assemble(told(back), mesh, rules).models.reader.config.scan_layers is True
    jax.tree.map(np.testing.assert_array_equal, made.params, found.params)
    assert made.models.reader.config.dropout_rate == 0.1
    assert found.models.reader.config.dropout_rate == 0.0
    assert scanned.params["reader"]["encoder"]["layers"]
    weights = [(tmp_path / name / "reader.safetensors").read_bytes() for name in ("model", "again")]
    assert weights[0] == weights[1]
    kernel = found.params["reader"]["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8


@pytest.mark.parametrize(
    ("made_by", "scanned", "training"),
    [
        ("random", True, "query_side"),
        ("induction", False, "joint"),
        ("folder", True, "joint"),
        ("folder", False, "query_side"),
    ],
)
def test_each_device_holds_its_part_of_the_parameters_and_no_more(
    tmp_path: Path, fresh: ModelConfig, made_by: str, scanned: bool, training: RetrieverTraining
) -> None:
    gin.parse_config("ReaderConfig.num_encoder_layers = 3")
    if made_by == "induction":
        gin.parse_config(["ReaderConfig.num_heads = 4", "ReaderConfig.logits_via_embedding = True"])
        fresh = dataclasses.replace(fresh, reader_init="induction")
    with use_devices(from_gin.devices()) as (mesh, rules):
        config = fresh
        if made_by == "folder":
            config = _export(tmp_path / "model", assembly.assemble(told(fresh), mesh, rules))
        gin.parse_config(f"ReaderConfig.scan_layers = {scanned}")

        def load() -> assembly.Assembled:
            return assembly.assemble(told(config), mesh, rules, training=training)

        made, most = most_bytes(load)
        own = device_bytes(made.params)
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(made.params))
        assert len(own) == 8
        assert max(own.values()) < whole / 3  # norms and position tables lie everywhere
        assert most <= max(own.values()) + 16  # the key
        _, most = most_bytes(lambda: _export(tmp_path / "again", made))
        assert most == 0


def test_query_side_training_unties_and_keeps_the_index_valid(fresh: ModelConfig) -> None:
    with use_devices(from_gin.devices()) as (mesh, rules):
        tied = assembly.assemble(told(fresh), mesh, rules)
        made = assembly.assemble(told(fresh), mesh, rules, training="query_side")
    towers = made.params["retriever"]
    jax.tree.map(np.testing.assert_array_equal, towers["query_encoder"], towers["passage_encoder"])
    hashes = [
        encoder_hash(one.models.retriever.config, one.params["retriever"], one.tokenizers.retriever)
        for one in (tied, made)
    ]
    assert hashes[0] == hashes[1]
    moved = {**towers, "query_encoder": jax.tree.map(lambda x: x + 1, towers["query_encoder"])}
    config, tokenizer = made.models.retriever.config, made.tokenizers.retriever
    assert encoder_hash(config, moved, tokenizer) == hashes[0]
    moved = {**towers, "passage_encoder": moved["query_encoder"]}
    assert encoder_hash(config, moved, tokenizer) != hashes[0]


def test_the_fingerprint_of_a_bert_is_the_one_that_saved_indices_have(
    retriever_tokenizer_file: Path,
) -> None:
    """Pinned from before encoders had names of their own, so that those indices still open."""
    tokenizer = Tokenizer(retriever_tokenizer_file.read_text())
    tokenizer.content_hash = "t"
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    params = {"encoder": {"layers_0": {"output": {"kernel": kernel}}}}
    fields = {"hidden_dim": 16, "num_heads": 4, "pooling": "cls", "normalize": True}
    config = RetrieverConfig(**fields, layer_norm_eps=1e-6, released_layer_norm=True)
    found = encoder_hash(config, params, tokenizer)
    assert found == "cdc2c63043889c68a1d37cfbc98f66dc495a96f561f1f66b6eed44bacc9d9b2a"
    tanh = dataclasses.replace(config, encoder_options={"activation": "gelu_tanh"})
    assert encoder_hash(tanh, params, tokenizer) != found
    faster = dataclasses.replace(config, dtype="bfloat16", scan_layers=True, dropout_rate=0.0)
    assert encoder_hash(faster, params, tokenizer) == found


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, fresh: ModelConfig) -> None:
    with use_devices(from_gin.devices()) as (mesh, rules):
        config = _export(tmp_path / "model", assembly.assemble(told(fresh), mesh, rules))
        gin.parse_config("ReaderConfig.mlp_dim = 64")
        with pytest.raises(
            UserError,
            match=r"\(reader\) is a checkpoint of another model: parameter .*mlp/w\S+ is float32",
        ):
            assembly.assemble(told(config), mesh, rules)
        gin.parse_config("RetrieverConfig.vocab_size = 10")
        with pytest.raises(UserError, match="retriever's tokenizer has ids up to .*may be up to 9"):
            assembly.load_retriever(told(fresh))
        with pytest.raises(UserError, match="bind ModelConfig.reader to a model folder"):
            assembly.load_tokenizers(ModelConfig())


def test_the_retriever_alone_is_the_same_retriever(tmp_path: Path, fresh: ModelConfig) -> None:
    with use_devices(from_gin.devices()) as (mesh, rules):
        made = assembly.assemble(told(fresh), mesh, rules)
        config = _export(tmp_path / "model", made)
    _, params, tokenizer = assembly.load_retriever(told(config))
    jax.tree.map(np.testing.assert_array_equal, params, made.params["retriever"])
    assert tokenizer.content_hash == made.tokenizers.retriever.content_hash
