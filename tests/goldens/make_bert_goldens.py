"""Make bert.npz: a small random BERT and its hidden states, from Hugging Face transformers.

    python tests/goldens/make_bert_goldens.py      # needs the extra [parity]

The file holds the weights in this project's tree, three batches of tokens of odd shapes and,
for the standard layer norm and for that of the released Atlas retrievers, the last hidden
states and the three poolings. tests/encoders/test_bert.py reads it.
"""

from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("bert.npz")
CONFIG = {
    "vocab_size": 61,
    "hidden_dim": 36,
    "num_layers": 2,
    "num_heads": 3,
    "mlp_dim": 52,
    "max_positions": 17,
}
SHAPES = ((3, 7), (1, 1), (5, 17))
SEED = 2022

Tree = dict[str, np.ndarray]  # path with slashes -> array


def random_tokens() -> list[np.ndarray]:
    """Right-padded batches; the first row of each is full, the others are ragged."""
    rng = np.random.default_rng(SEED)
    batches = []
    for rows, length in SHAPES:
        tokens = rng.integers(1, CONFIG["vocab_size"], (rows, length))
        for row in range(1, rows):
            tokens[row, rng.integers(1, length) :] = 0
        batches.append(tokens.astype(np.int32))
    return batches


def make_model(released_layer_norm: bool) -> Any:
    """Return a `transformers.BertModel` with random weights, biases and norms included."""
    import torch
    from transformers import BertConfig, BertModel

    class ReleasedLayerNorm(torch.nn.LayerNorm):
        """(x - mean) / sqrt(mean(x^2) + eps), from the formula."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            mean = input.mean(-1, keepdim=True)
            square = input.pow(2).mean(-1, keepdim=True)
            return (input - mean) / torch.sqrt(square + self.eps) * self.weight + self.bias

    torch.manual_seed(SEED)
    model = BertModel(
        BertConfig(
            vocab_size=CONFIG["vocab_size"],
            hidden_size=CONFIG["hidden_dim"],
            num_hidden_layers=CONFIG["num_layers"],
            num_attention_heads=CONFIG["num_heads"],
            intermediate_size=CONFIG["mlp_dim"],
            max_position_embeddings=CONFIG["max_positions"],
            hidden_act="gelu",
            layer_norm_eps=1e-12,
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "LayerNorm.weight" in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    if released_layer_norm:
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.__class__ = ReleasedLayerNorm
    return model


def hidden_states(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Last hidden states, [b, l, d]; those of padding set to zero."""
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    return states.numpy() * (tokens != 0)[:, :, None]


def to_tree(state_dict: Any) -> Tree:
    """Rename a Hugging Face state dict to this project's tree; kernels are [in, out]."""
    tree = {}
    for name, value in state_dict.items():
        if name.endswith("position_ids"):
            continue
        array = value.numpy()
        path = name.replace("encoder.layer.", "layers_")
        for theirs, ours in (
            ("attention.self.", "attention."),
            ("attention.output.dense", "attention.output"),
            ("attention.output.LayerNorm", "attention_layer_norm"),
            ("intermediate.dense", "intermediate"),
            ("output.dense", "output"),
            ("output.LayerNorm", "output_layer_norm"),
            ("embeddings.LayerNorm", "embeddings.layer_norm"),
        ):
            path = path.replace(theirs, ours)
        *parents, kind = path.split(".")
        if kind == "weight":
            if "norm" in parents[-1]:
                kind = "scale"
            elif "embeddings" in parents[-1]:
                kind = "embedding"
            else:
                kind, array = "kernel", array.T
        tree["/".join([*parents, kind])] = array
    return tree


def poolings(states: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Contriever's three, over real tokens."""
    count = (tokens != 0).sum(axis=1, keepdims=True)
    total = states.sum(axis=1)
    return {"average": total / count, "sqrt": total / np.sqrt(count), "cls": states[:, 0]}


def main() -> None:
    """Write the file."""
    arrays: dict[str, np.ndarray] = {}
    batches = random_tokens()
    arrays.update({f"tokens/{i}": tokens for i, tokens in enumerate(batches)})
    for variant in ("standard", "released"):
        model = make_model(variant == "released")
        for path, array in to_tree(model.state_dict()).items():
            arrays[f"params/{path}"] = array
        for i, tokens in enumerate(batches):
            states = hidden_states(model, tokens)
            arrays[f"{variant}/states/{i}"] = states
            for name, pooled in poolings(states, tokens).items():
                arrays[f"{variant}/{name}/{i}"] = pooled.astype(np.float32)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
