"""Encoders and heads against Hugging Face's on random weights: states, logits, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from atlas_jax.encoders.heads import HEADS
from atlas_jax.encoders.registry import encoder_config, make_encoder
from atlas_jax.interop.encoder_names import Names, encoder_names, head_names

pytestmark = pytest.mark.parity
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_dim": 24, "num_layers": 4, "num_heads": 3, "mlp_dim": 40,
    "max_positions": 17, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip
THEIRS: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 17, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0, "layer_norm_eps": 1e-12,
}  # fmt: skip
TOKENS = np.array([[2, 9, 33, 4, 5, 60, 7], [2, 8, 17, 3, 0, 0, 0]], np.int32)
TYPES = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]], np.int32)
# Case -> encoder, its options, and the class and the settings of Hugging Face's model.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "bert": ("bert", {}, "BertForPreTraining", {}),
    "bert tanh": ("bert", {"activation": "gelu_tanh"}, "BertForPreTraining",
                  {"hidden_act": "gelu_new"}),
    "albert": ("albert", {"factor_dim": 10}, "AlbertForPreTraining", {"embedding_size": 10}),
    "albert 2 x 2": ("albert", {"factor_dim": 24, "num_groups": 2, "inner_groups": 2},
                     "AlbertForPreTraining",
                     {"embedding_size": 24, "num_hidden_groups": 2, "inner_group_num": 2}),
    "roberta": ("roberta", {}, "RobertaForMaskedLM", {"type_vocab_size": 2}),
    "roberta classes": ("roberta", {}, "RobertaForSequenceClassification",
                        {"type_vocab_size": 2}),
    "electra generator": ("electra", {"factor_dim": 10}, "ElectraForMaskedLM",
                          {"embedding_size": 10}),
    "electra": ("electra", {"factor_dim": 24}, "ElectraForPreTraining", {"embedding_size": 24}),
}  # fmt: skip
HEADS_OF = {
    "BertForPreTraining": ("mlm", "sentence"), "AlbertForPreTraining": ("mlm", "sentence"),
    "RobertaForMaskedLM": ("mlm",), "RobertaForSequenceClassification": ("sentence",),
    "ElectraForMaskedLM": ("mlm",), "ElectraForPreTraining": ("discriminator",),
}  # fmt: skip


def their_model(kind: str, settings: dict[str, Any]) -> Any:
    """A model with random weights, norms and biases included."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    family = kind.partition("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**THEIRS, **settings)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.lower().rpartition(".")[0].endswith("norm") else 0.0
            parameter.normal_(centre if name.endswith("weight") else 0.0, 0.3)
    return model


def exchanged(ids: np.ndarray) -> np.ndarray:
    """RoBERTa's ids for ours: padding and `<s>` change places."""
    return np.where(ids < 2, 1 - ids, ids)


def ours(arrays: dict[str, Any], names: Names, prefix: str = "") -> Any:
    flat = {
        here: np.asarray(arrays[f"{prefix}{there}"]).T
        if turn
        else np.asarray(arrays[f"{prefix}{there}"])
        for here, (there, turn) in names.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("case", CASES)
def test_states_heads_and_gradients(case: str) -> None:
    encoder, options, kind, settings = CASES[case]
    model = their_model(kind, settings)
    config: Any = encoder_config(encoder, SIZES, options, "Test")
    names, heads = encoder_names(encoder, vars(config)), head_names(encoder)
    state = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    params: dict[str, Any] = {"encoder": ours(state, names, f"{encoder}.")}
    for head in HEADS_OF[kind]:
        params[head] = ours(state, heads[head])
    if encoder == "roberta":
        rows = exchanged(np.arange(SIZES["vocab_size"]))
        table = params["encoder"]["embeddings"]["word_embeddings"]
        table["embedding"] = table["embedding"][rows]
        if "mlm" in params:
            params["mlm"]["bias"] = params["mlm"]["bias"][rows]
    module = make_encoder(config)

    def run(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables = {"params": params["encoder"]}
        states_bld = module.apply(variables, TOKENS, types_bl=TYPES)
        logits = {}
        for head in HEADS_OF[kind]:
            table_ve = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
            args = (states_bld, table_ve) if head == "mlm" else (states_bld,)
            logits[head] = HEADS[head](config).apply({"params": params[head]}, *args)
        return states_bld, logits

    states_bld, logits = jax.jit(run)(params)
    their_states, their_logits = _theirs(model, encoder, HEADS_OF[kind])
    real = TOKENS > 0
    np.testing.assert_allclose(states_bld[real], their_states[real], rtol=1e-5, atol=1e-5)
    for head, expected in their_logits.items():
        found, wanted = np.asarray(logits[head]), expected.detach().numpy()
        if encoder == "roberta" and head == "mlm":
            wanted = wanted[..., exchanged(np.arange(SIZES["vocab_size"]))]
        if found.shape[:2] == TOKENS.shape:
            found, wanted = found[real], wanted[real]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=head)

    def loss(params: Any) -> jax.Array:
        return sum(jnp.mean(jnp.sin(x[real] if x.shape[:2] == real.shape else x))
                   for x in run(params)[1].values())  # fmt: skip

    gradients = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    _backward(their_logits, real)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    checked = 0
    for here, (there, turn) in names.items():
        wanted = theirs[f"{encoder}.{there}"].numpy()
        wanted = wanted.T if turn else wanted
        if encoder == "roberta" and there.startswith("embeddings.word"):
            wanted = wanted[exchanged(np.arange(SIZES["vocab_size"]))]
        found = np.asarray(gradients[f"encoder/{here}"])
        scale = max(np.abs(wanted).max(), 1e-3)
        if here.endswith("key/bias"):
            # It moves all scores of a query alike, so its gradient is zero. What both sides have is
            # the rounding of a sum over terms as large as those of the query's bias.
            query = theirs[f"{encoder}.{there}".replace("key", "query")].numpy()
            scale = max(np.abs(query).max(), scale)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * scale, err_msg=here)
        checked += 1
    assert checked == len(names)


def _theirs(model: Any, encoder: str, heads: tuple[str, ...]) -> tuple[np.ndarray, dict[str, Any]]:
    torch = pytest.importorskip("torch")
    ids = torch.tensor(exchanged(TOKENS) if encoder == "roberta" else TOKENS).long()
    inputs = {
        "input_ids": ids, "attention_mask": torch.tensor(TOKENS > 0).long(),
        "token_type_ids": torch.tensor(TYPES).long(),
    }  # fmt: skip
    output = model(**inputs, output_hidden_states=True)
    logits = {}
    for head in heads:
        if len(heads) == 1:
            logits[head] = output.logits
        elif head == "mlm":
            logits[head] = output.prediction_logits
        else:
            logits[head] = getattr(output, "sop_logits", None)
            if logits[head] is None:
                logits[head] = output.seq_relationship_logits
    return output.hidden_states[-1].detach().numpy(), logits


def _backward(logits: dict[str, Any], real: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    total = 0
    for x in logits.values():
        total = total + torch.sin(x[torch.tensor(real)] if x.shape[:2] == real.shape else x).mean()
    total.backward()
