"""Make xlnet.npz: a small random XLNet, its states, its loss and its gradients, from Hugging Face.

    python tests/goldens/make_xlnet_goldens.py      # needs the extra [parity]

The file holds the weights in this project's tree, a batch with padding and two segments, the
states of all layers, and for an order of the tokens the logits of the targets, the mean loss and
the gradient of every weight. tests/encoders/test_xlnet.py reads it.
"""

from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("xlnet.npz")
CONFIG = {"vocab_size": 41, "hidden_dim": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}
SEED, ROWS, LENGTH, TARGETS = 1906, 3, 11, 4

Tree = dict[str, np.ndarray]  # path with slashes -> array


def batch() -> dict[str, np.ndarray]:
    """Tokens, types, targets and masks; True in a mask where a token may be read."""
    rng = np.random.default_rng(SEED)
    tokens = rng.integers(1, CONFIG["vocab_size"], (ROWS, LENGTH)).astype(np.int32)
    tokens[1, 8:] = 0
    types = (np.arange(LENGTH)[None] >= [[4], [3], [11]]).astype(np.int32)
    positions = np.sort(rng.permuted(np.tile(np.arange(8), (ROWS, 1)), axis=1)[:, :TARGETS], axis=1)
    order = np.full((ROWS, LENGTH), -1.0)
    np.put_along_axis(order, positions, rng.random((ROWS, TARGETS)), axis=1)
    query = (order[:, None] < 0) | (order[:, None] < order[:, :, None])
    query &= (tokens != 0)[:, None]
    return {
        "tokens": tokens,
        "types": types,
        "positions": positions.astype(np.int32),
        "query": query,
        "content": query | np.eye(LENGTH, dtype=bool),
    }


def to_tree(state: dict[str, Any]) -> Tree:
    """Hugging Face's weights, or their gradients, under this project's names."""
    arrays = {name: np.asarray(value.detach().numpy()) for name, value in state.items()}
    width = CONFIG["hidden_dim"]
    tree = {
        "encoder/embeddings/word_embeddings/embedding": arrays["transformer.word_embedding.weight"],
        "encoder/embeddings/target": arrays["transformer.mask_emb"].reshape(width),
        "plm/bias": arrays["lm_loss.bias"],
    }
    for i in range(CONFIG["num_layers"]):
        here, there = f"encoder/layers_{i}", f"transformer.layer.{i}"
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "relative": "r"}.items():
            kernel = arrays[f"{there}.rel_attn.{theirs}"].reshape(width, width)
            tree[f"{here}/attention/{ours}/kernel"] = kernel
        output = arrays[f"{there}.rel_attn.o"].reshape(width, width)
        tree[f"{here}/attention/output/kernel"] = output.T
        biases = {"content_bias": "r_w_bias", "position_bias": "r_r_bias",
                  "segment_bias": "r_s_bias", "segment_embedding": "seg_embed"}  # fmt: skip
        for ours, theirs in biases.items():
            tree[f"{here}/attention/{ours}"] = arrays[f"{there}.rel_attn.{theirs}"]
        for ours, theirs in {"intermediate": "layer_1", "output": "layer_2"}.items():
            tree[f"{here}/{ours}/kernel"] = arrays[f"{there}.ff.{theirs}.weight"].T
            tree[f"{here}/{ours}/bias"] = arrays[f"{there}.ff.{theirs}.bias"]
        for ours, theirs in {"attention": "rel_attn", "output": "ff"}.items():
            for leaf, name in {"scale": "weight", "bias": "bias"}.items():
                value = arrays[f"{there}.{theirs}.layer_norm.{name}"]
                tree[f"{here}/{ours}_layer_norm/{leaf}"] = value
    return tree


def make_model() -> Any:
    """Return a `transformers.XLNetLMHeadModel` with random weights, norms and biases included."""
    import torch
    from transformers import XLNetConfig, XLNetLMHeadModel

    torch.manual_seed(SEED)
    config = XLNetConfig(
        vocab_size=CONFIG["vocab_size"], d_model=CONFIG["hidden_dim"], dropout=0.0,
        n_layer=CONFIG["num_layers"], n_head=CONFIG["num_heads"], d_inner=CONFIG["mlp_dim"],
    )  # fmt: skip
    model = XLNetLMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.endswith("layer_norm.weight")
            parameter.normal_(1.0 if is_scale else 0.0, 0.3)
    return model


def outputs(model: Any) -> Tree:
    """States, logits of the targets, loss and gradients."""
    import torch

    given = {name: torch.tensor(value) for name, value in batch().items()}
    tokens, positions = given["tokens"].long(), given["positions"].long()
    shared = {
        "input_ids": tokens, "token_type_ids": given["types"].long(), "use_mems": False,
        "attention_mask": (tokens != 0).float(),
    }  # fmt: skip
    states = model.transformer(**shared, output_hidden_states=True).hidden_states
    found = model(
        **shared,
        perm_mask=(~given["query"]).float(),
        target_mapping=torch.nn.functional.one_hot(positions, LENGTH).float(),
        labels=torch.gather(tokens, 1, positions),
    )
    found.loss.backward()
    gradients = to_tree({name: p.grad for name, p in model.named_parameters()})
    return {
        **{f"states/{i}": state.detach().numpy() for i, state in enumerate(states)},
        "logits": found.logits.detach().numpy(),
        "loss": found.loss.detach().numpy(),
        **{f"gradient/{name}": value for name, value in gradients.items()},
    }


def main() -> None:
    """Write the file."""
    model = make_model()
    params = {f"param/{name}": value for name, value in to_tree(model.state_dict()).items()}
    np.savez_compressed(FILE, **params, **outputs(model))  # type: ignore[arg-type]
    print(f"wrote {FILE} ({FILE.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
