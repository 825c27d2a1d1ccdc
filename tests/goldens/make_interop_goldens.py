"""Make interop/: small random models in the files that other projects write, and their outputs.

    python tests/goldens/make_interop_goldens.py      # needs the extra [parity]

    t5_v1_0/   pytorch_model.bin in the zip form, with every second name of the embedding
    t5_v1_1/   safetensors in shards, as transformers saves them
    t5_bf16/   a T5 1.1 in bfloat16, one safetensors file
    bert/      pytorch_model.bin in the form before PyTorch 1.6, with gamma, beta and a pooler
    minilm/    a sentence-transformers folder: mean pooling, normalised
    atlas_tied.pth.tar, atlas_untied.pth.tar    checkpoints in the layout of Meta's Atlas
    outputs.npz   tokens; logits and embeddings that PyTorch computes in float32

No size divides another. tests/interop/ reads them.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "interop"
T5 = {"vocab_size": 141, "d_model": 12, "d_kv": 5, "d_ff": 22, "num_layers": 2,
      "num_decoder_layers": 3, "num_heads": 3}  # fmt: skip
BERT = {"vocab_size": 97, "hidden_size": 15, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 22, "max_position_embeddings": 19}  # fmt: skip
READERS = ("t5_v1_0", "t5_v1_1", "t5_bf16")
SEED = 11

Tree = dict[str, Any]


def random_(model: Any, seed: int) -> Any:
    """Give every parameter numbers of no special size, norms included."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and not name.endswith("bias") else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + 0.25 * noise)
    return model.eval()


def make_t5(gated: bool, seed: int, sizes: dict[str, int] = T5) -> Any:
    """A `transformers.T5ForConditionalGeneration` of version 1.0 or 1.1."""
    from transformers import T5Config, T5ForConditionalGeneration

    projection = "gated-gelu" if gated else "relu"
    config = T5Config(
        **sizes, feed_forward_proj=projection, tie_word_embeddings=not gated,
        decoder_start_token_id=0,
    )  # fmt: skip
    config.tie_word_embeddings = not gated  # transformers 5 sets it to True
    model = T5ForConditionalGeneration(config)
    if gated:  # with False it unties both stacks from the shared embedding, too
        model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    return random_(model, seed)


def make_bert(seed: int, sizes: dict[str, int] = BERT) -> Any:
    """A `transformers.BertModel` with a pooler."""
    from transformers import BertConfig, BertModel

    return random_(BertModel(BertConfig(**sizes, hidden_act="gelu")), seed)


def tokens(vocab_size: int, rows: int, length: int, seed: int) -> np.ndarray:
    """Right-padded rows, the first one full."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, vocab_size, (rows, length))
    for row in range(1, rows):
        ids[row, rng.integers(2, length) :] = 0
    return ids.astype(np.int32)


def logits(model: Any, source: np.ndarray, decoder_input: np.ndarray) -> np.ndarray:
    """Logits of a T5, [n, t, v]."""
    import torch

    ids = torch.tensor(source).long()
    with torch.no_grad():
        return (
            model.float()(
                input_ids=ids,
                attention_mask=(ids != 0).long(),
                decoder_input_ids=torch.tensor(decoder_input).long(),
            )
            .logits.numpy()
            .copy()
        )


def embeddings(model: Any, ids: np.ndarray, normalize: bool, released: bool) -> np.ndarray:
    """Mean-pooled embeddings of a BERT, [n, e]; `released`: with Atlas's layer norm."""
    import torch

    if released:
        import copy

        model = copy.deepcopy(model)

        class Uncentred(torch.nn.LayerNorm):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                moment = input.pow(2).mean(-1, keepdim=True)
                centred = input - input.mean(-1, keepdim=True)
                return centred / torch.sqrt(moment + self.eps) * self.weight + self.bias

        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.__class__ = Uncentred
    x = torch.tensor(ids).long()
    mask = (x != 0).float()[:, :, None]
    with torch.no_grad():
        states = model(input_ids=x, attention_mask=mask[:, :, 0].long()).last_hidden_state
        pooled = (states * mask).sum(1) / mask.sum(1)
    return (torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled).numpy()


def t5_json(gated: bool) -> Tree:
    """config.json as Google's T5 folders have it."""
    return {
        "model_type": "t5", **T5, "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": not gated, "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1,
        "relative_attention_num_buckets": 32,
    }  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_t5_1_0(model: Any, folder: Path) -> None:
    """The zip form, with the names that the first releases had."""
    import torch

    write_json(folder / "config.json", t5_json(False))
    state = dict(model.state_dict())
    table = torch.zeros(32, T5["num_heads"])
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = table
    torch.save(state, folder / "pytorch_model.bin")


def write_bert(model: Any, folder: Path) -> None:
    """The older form, with the names of bert-base-uncased."""
    import torch

    write_json(folder / "config.json", {"model_type": "bert", **BERT, "hidden_act": "gelu"})
    state = {}
    for name, value in model.state_dict().items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        state[f"bert.{old.replace('LayerNorm.bias', 'LayerNorm.beta')}"] = value
    positions = torch.arange(BERT["max_position_embeddings"])[None]
    state["bert.embeddings.position_ids"] = positions
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_sentence_transformer(model: Any, folder: Path) -> None:
    """As sentence-transformers saves it, without what nobody reads."""
    model.save_pretrained(folder)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    modes = {"cls_token": False, "mean_tokens": True, "max_tokens": False}
    pooling = {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 15, **pooling})


def options(**changes: Any) -> argparse.Namespace:
    """The options of a run of Atlas, those that say something and a few that do not."""
    values: Tree = {
        "name": "golden", "reader_model_type": "google/t5-base-lm-adapt", "dropout": 0.2,
        "precision": "bf16", "lr": 5e-5, "lr_retriever": 1e-5, "scheduler": "linear",
        "warmup_steps": 4, "total_steps": 30, "scheduler_steps": None, "weight_decay": 0.01,
        "clip": 1.0, "beta2": 0.999, "epsilon": 1e-6, "alpha": 1.0, "n_context": 7,
        "text_maxlength": 96, "target_maxlength": 12, "gold_score_mode": "ppmean",
        "temperature_gold": 0.1, "temperature_score": 0.05, "train_retriever": True,
        "query_side_retriever_training": False, "refresh_index": "0-10:5,10-100:20",
        "encoder_format": "{query} title: {title} context: {text}",
        "retriever_format": "{title} {text}", "generation_num_beams": 3,
        "generation_max_length": 20, "generation_length_penalty": 0.5, "task": "qa",
        "qa_prompt_format": "question: {question} answer: <extra_id_0>",
        "mlm_noise_density": 0.2, "accumulation_steps": 2, "per_gpu_batch_size": 4,
        "freeze_retriever_steps": -1, "index_mode": "flat", "passages": ["text.jsonl"],
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def train(parameters: Any, seed: int) -> Tree:
    """Two steps of AdamW on invented gradients; its state as a run of Atlas saves it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    return state


def write_atlas(path: Path, reader: Any, towers: dict[str, Any], opt: Any) -> None:
    """A model.pth.tar; the reader as if it had been wrapped for several GPUs."""
    import torch

    retriever = torch.nn.ModuleDict(towers)
    states = {
        "optimizer": train(reader.parameters(), 1),
        "retr_optimizer": train(retriever.parameters(), 2),
    }
    model = {f"reader.module.{n}": v for n, v in reader.state_dict().items()}
    model.update({f"retriever.{n}": v for n, v in retriever.state_dict().items()})
    scheduler = {"base_lrs": [opt.lr], "last_epoch": 2, "lr_lambdas": [{}]}
    content = {"step": 2, "model": model, **states, "scheduler": scheduler,
               "retr_scheduler": scheduler, "opt": opt}  # fmt: skip
    torch.save(content, path)


def without_pooler(model: Any) -> Any:
    """As Contriever is loaded: BertModel(add_pooling_layer=False)."""
    model.pooler = None
    return model


def main() -> None:
    """Write the folder."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    source, decoder_input = tokens(T5["vocab_size"], 4, 33, 1), tokens(T5["vocab_size"], 4, 9, 2)
    decoder_input[:, 0] = 0
    ids = tokens(BERT["vocab_size"], 5, 19, 3)
    out: Tree = {"source": source, "decoder_input": decoder_input, "ids": ids}

    first = make_t5(False, SEED)
    write_t5_1_0(first, FOLDER / "t5_v1_0")
    out["t5_v1_0/logits"] = logits(first, source, decoder_input)
    second = make_t5(True, SEED + 1)
    second.save_pretrained(FOLDER / "t5_v1_1", max_shard_size="20KB")
    out["t5_v1_1/logits"] = logits(second, source, decoder_input)
    third = make_t5(True, SEED + 2).bfloat16()
    third.save_pretrained(FOLDER / "t5_bf16")
    out["t5_bf16/logits"] = logits(third, source, decoder_input)

    bert = make_bert(SEED + 3)
    write_bert(bert, FOLDER / "bert")
    out["bert/embeddings"] = embeddings(bert, ids, False, False)
    small = make_bert(SEED + 4)
    write_sentence_transformer(small, FOLDER / "minilm")
    out["minilm/embeddings"] = embeddings(small, ids, True, False)

    for name, gated, tower_names, opt in (
        ("atlas_tied", True, ("contriever",), options()),
        ("atlas_untied", False, ("query_contriever", "passage_contriever"),
         options(reader_model_type="t5-base", query_side_retriever_training=True,
                 gold_score_mode="evalnormsum", scheduler="fixed", target_maxlength=None)),
    ):  # fmt: skip
        reader = make_t5(gated, SEED + 5)
        towers = {t: without_pooler(make_bert(SEED + 6 + i)) for i, t in enumerate(tower_names)}
        write_atlas(FOLDER / f"{name}.pth.tar", reader, towers, opt)
        out[f"{name}/logits"] = logits(reader, source, decoder_input)
        for tower, model in towers.items():
            out[f"{name}/{tower}"] = embeddings(model, ids, False, True)
    np.savez_compressed(FOLDER / "outputs.npz", **out)
    total = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER}: {total} bytes")


if __name__ == "__main__":
    main()
