"""Make t5_v1_0.npz and t5_v1_1.npz: small random T5s, their outputs and what they generate.

    python tests/goldens/make_t5_goldens.py      # needs the extra [parity]

Each file holds the weights in this project's tree, tokens of odd shapes, and what Hugging Face
transformers makes of them in float32: encoder states, decoder states, logits, ADist's attention
mass, and the tokens and scores of greedy decoding and of beam search under several settings.
tests/reader/test_hf_parity.py reads it, and compares live where transformers is installed.
"""

from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
VERSIONS = ("v1_0", "v1_1")
SEED = 4  # of which some rows end and some do not
# Nothing divides anything: 3 heads of 7 channels in a width of 20.
SIZES = {
    "vocab_size": 37,
    "emb_dim": 20,
    "num_heads": 3,
    "head_dim": 7,
    "mlp_dim": 28,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
}
SOURCE_LENGTHS = (150, 41, 9, 3, 1)  # the first reaches past the last bucket of positions
TARGET_LENGTH = 40
MAX_LENGTH = 12
BEAM_SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False},
    {"num_beams": 4, "length_penalty": 0.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": False},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": 0.6, "early_stopping": True},
)

Tree = dict[str, np.ndarray]  # path with slashes -> array


def config_fields(version: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Return the fields of the ReaderConfig of a version."""
    gated = version == "v1_1"
    return {
        **sizes,
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "logits_via_embedding": not gated,
        "dropout_rate": 0.0,
    }


def random_tokens(sizes: dict[str, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded sources, and decoder inputs that begin with the padding token."""
    rng = np.random.default_rng(seed)
    shape = (len(SOURCE_LENGTHS), max(SOURCE_LENGTHS))
    source = rng.integers(1, sizes["vocab_size"], shape)
    source[np.arange(shape[1]) >= np.array(SOURCE_LENGTHS)[:, None]] = 0
    decoder_input = rng.integers(1, sizes["vocab_size"], (len(SOURCE_LENGTHS), TARGET_LENGTH))
    decoder_input[:, 0] = 0
    return source.astype(np.int32), decoder_input.astype(np.int32)


def make_model(version: str, sizes: dict[str, int], seed: int) -> Any:
    """Return a `transformers.T5ForConditionalGeneration` that says more than one word.

    A freshly initialised one repeats itself for ever. So the layers get large weights, and a
    tied embedding small ones, made up for in the last norm: it would echo its last token.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    gated = version == "v1_1"
    config = T5Config(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["emb_dim"],
        d_kv=sizes["head_dim"],
        d_ff=sizes["mlp_dim"],
        num_layers=sizes["num_encoder_layers"],
        num_decoder_layers=sizes["num_decoder_layers"],
        num_heads=sizes["num_heads"],
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=0,
        attn_implementation="eager",  # the only one that shows its probabilities
    )
    # Transformers 5 sets this to True whatever one says, and with False unties both stacks, too.
    config.tie_word_embeddings = not gated
    model = T5ForConditionalGeneration(config).eval()
    model.set_input_embeddings(model.shared)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "layer_norm" in name else 0.0
            parameter.copy_(around + 0.25 * torch.randn_like(parameter))
        if not gated:
            model.decoder.final_layer_norm.weight.mul_(2)
    return model


def convert(model: Any) -> Tree:
    """Return the weights in this project's tree: kernels are (in, out)."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    heads = {"query": "q", "key": "k", "value": "v", "out": "o"}
    tree = {"token_embedder/embedding": weights["shared.weight"]}
    if not model.config.tie_word_embeddings:
        tree["decoder/logits_dense/kernel"] = weights["lm_head.weight"].T
    for stack, layers in (
        ("encoder", model.config.num_layers),
        ("decoder", model.config.num_decoder_layers),
    ):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tree[f"{stack}/relpos_bias/rel_embedding"] = weights[first].T
        tree[f"{stack}/{stack}_norm/scale"] = weights[f"{stack}.final_layer_norm.weight"]
        attentions = [("SelfAttention", "attention", "pre_attention_layer_norm")]
        if stack == "decoder":
            attentions = [
                ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
                ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
            ]
        for i in range(layers):
            here, there = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            for j, (theirs, ours, norm) in enumerate(attentions):
                for name, letter in heads.items():
                    kernel = weights[f"{there}.{j}.{theirs}.{letter}.weight"].T
                    tree[f"{here}/{ours}/{name}/kernel"] = kernel
                tree[f"{here}/{norm}/scale"] = weights[f"{there}.{j}.layer_norm.weight"]
            last = f"{there}.{len(attentions)}"
            for name in ("wi", "wi_0", "wi_1", "wo"):
                if f"{last}.DenseReluDense.{name}.weight" in weights:
                    kernel = weights[f"{last}.DenseReluDense.{name}.weight"].T
                    tree[f"{here}/mlp/{name}/kernel"] = kernel
            tree[f"{here}/pre_mlp_layer_norm/scale"] = weights[f"{last}.layer_norm.weight"]
    return tree


def run(model: Any, source: np.ndarray, decoder_input: np.ndarray, weight: np.ndarray) -> Tree:
    """Return encoder states, decoder states, logits, and the attention mass [b, s].

    The mass is the probability of the cross-attention times the norm of the value, averaged over
    heads, summed over layers and over target positions weighted by `weight`.
    """
    import torch

    values: list[torch.Tensor] = []
    hooks = [
        block.layer[1].EncDecAttention.v.register_forward_hook(
            lambda _module, _inputs, value: values.append(value)
        )
        for block in model.decoder.block
    ]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(source).long(),
            attention_mask=torch.tensor(source > 0).long(),
            decoder_input_ids=torch.tensor(decoder_input).long(),
            output_hidden_states=True,
            output_attentions=True,
            use_cache=False,
        )
    for hook in hooks:
        hook.remove()
    mass = np.zeros(source.shape, np.float32)
    for probs, value in zip(out.cross_attentions, values, strict=True):
        norms = value.unflatten(-1, (model.config.num_heads, -1)).norm(dim=-1).numpy()
        mass += np.einsum("bhts,bsh,bt->bs", probs.numpy(), norms, weight) / norms.shape[-1]
    return {
        "encoder_states": out.encoder_last_hidden_state.numpy(),
        "decoder_states": out.decoder_hidden_states[-1].numpy(),
        "logits": out.logits.numpy(),
        "mass": mass,
    }


def generate(
    model: Any, source: np.ndarray, eos_id: int, beams: dict[str, Any] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [b, MAX_LENGTH], padded with 0 after the end token, and scores [b]."""
    import torch

    out = model.generate(
        input_ids=torch.tensor(source).long(),
        attention_mask=torch.tensor(source > 0).long(),
        max_new_tokens=MAX_LENGTH,
        do_sample=False,
        eos_token_id=eos_id,
        pad_token_id=0,
        use_cache=False,  # with stacks of different depths the cache of transformers 5 fails
        return_dict_in_generate=True,
        output_scores=True,
        **(beams or {}),
    )
    found = out.sequences[:, 1:].numpy()  # without the start token
    tokens = np.zeros((len(found), MAX_LENGTH), np.int32)
    tokens[:, : found.shape[1]] = found
    ended = np.cumsum(tokens == eos_id, axis=1) - (tokens == eos_id) > 0
    tokens[ended] = 0  # beam search of transformers pads with the end token, as 0 is falsy
    if beams:
        return tokens, out.sequences_scores.numpy()
    logprobs = torch.stack(out.scores, dim=1).log_softmax(-1).numpy()
    steps = logprobs.shape[1]
    picked = np.take_along_axis(logprobs, tokens[:, :steps, None].astype(np.int64), axis=2)[..., 0]
    return tokens, np.where(ended[:, :steps], 0.0, picked).sum(1).astype(np.float32)


def choose_eos(model: Any, source: np.ndarray) -> int:
    """Return the token that most rows say at some time but not at once: rows end apart."""
    tokens, _ = generate(model, source, eos_id=model.config.vocab_size + 1, beams=None)
    candidates = [t for t in np.unique(tokens[:, 1:]) if t > 0]
    return int(max(candidates, key=lambda t: np.sum((tokens == t).any(1) & (tokens[:, 0] != t))))


def make_golden(version: str, seed: int) -> Tree:
    """Return everything that goes into the file of a version."""
    model = make_model(version, SIZES, seed)
    source, decoder_input = random_tokens(SIZES, seed)
    eos_id = choose_eos(model, source)
    golden = {f"params/{name}": value for name, value in convert(model).items()}
    weight = (np.arange(TARGET_LENGTH) < np.arange(3, 3 + len(source))[:, None]).astype(np.float32)
    golden |= {"source": source, "decoder_input": decoder_input, "weight": weight}
    golden |= {"eos_id": np.array(eos_id)} | run(model, source, decoder_input, weight)
    for number, beams in enumerate((None, *BEAM_SETTINGS)):
        name = "greedy" if beams is None else f"beam_{number - 1}"
        golden[f"{name}/tokens"], golden[f"{name}/scores"] = generate(model, source, eos_id, beams)
    return golden


def main() -> None:
    """Write both files beside this script."""
    for version in VERSIONS:
        golden = make_golden(version, SEED)
        np.savez_compressed(FOLDER / f"t5_{version}.npz", **golden)


if __name__ == "__main__":
    main()
