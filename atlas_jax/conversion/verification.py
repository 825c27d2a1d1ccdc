"""`convert --verify`: run the converted model here and in the other framework; compare layers."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from atlas_jax.core.errors import UserError
from atlas_jax.encoders.model import EncoderModel, EncoderModelConfig
from atlas_jax.encoders.registry import NamedEncoderConfig, make_encoder
from atlas_jax.interop import encoders, huggingface, t5_names, torch_side
from atlas_jax.interop.tensors import Part, Tensors
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder

TOLERANCE = 1e-3  # relative to a layer's largest number; float32 sums differ much less
_LENGTH, _TARGET = 24, 9


class Verifier:
    """Compares this project's models with Hugging Face's on random tokens."""

    def __init__(self, source: str) -> None:
        """Prepare to compare models that were read from a checkpoint of the format `source`.

        Raises:
          UserError: PyTorch and transformers are not installed.
        """
        if not torch_side.is_installed():
            raise UserError(
                "--verify runs PyTorch's side, too: pip install 'atlas-jax[parity]', or leave "
                "--verify out"
            )
        self._released = source == "meta-atlas"  # its own tensors have Hugging Face's names

    def layers(self, part: Part, folder: Path | None) -> dict[str, float]:
        """Largest difference of every layer over real tokens.

        Args:
          part: the converted model.
          folder: the folder that Hugging Face loads. With None its model gets the source's own
            tensors if they have its names (Meta's Atlas), else the tensors that --to=hf would
            write.

        Raises:
          UserError: names the first layer that differs by more than rounding errors.
        """
        rng = np.random.default_rng(0)
        longest = _LENGTH if part.kind == "reader" else part.config["max_positions"] - 2
        limit = min(_LENGTH, longest)  # a RoBERTa's positions begin with the third
        tokens = rng.integers(1, part.config["vocab_size"], (2, limit)).astype(np.int32)
        tokens[1, limit // 2 :] = 0
        if part.kind == "reader":
            pairs = [_t5(part, self._reader(part, folder), tokens, rng)]
        elif part.kind == "encoder":
            pairs = [_encoder(part, self._model(part, folder), tokens)]
        else:
            towers = sorted({name.split("/")[0] for name in part.tensors})
            pairs = [
                _tower(part, self._tower(part, folder, tower), tower, tokens) for tower in towers
            ]
        result: dict[str, float] = {}
        for prefix, ours, theirs in pairs:
            result.update(_differences(prefix, ours, theirs, tokens))
        return result

    def _reader(self, part: Part, folder: Path | None) -> torch_side.TheirModel:
        if folder is not None:
            return folder
        if self._released:
            return huggingface.t5_json(part), _below(part.source, "reader.")
        names = t5_names.huggingface_names(part.config)
        return huggingface.t5_json(part), encoders.to_huggingface(part.tensors, names)

    def _tower(self, part: Part, folder: Path | None, tower: str) -> torch_side.TheirModel:
        if folder is not None:
            return folder if tower == "encoder" else folder / tower
        plain = {**part.config, "released_layer_norm": False}
        if self._released:
            names = {"encoder": "contriever", "query_encoder": "query_contriever"}
            prefix = f"retriever.{names.get(tower, 'passage_contriever')}."
            return encoders.encoder_json(plain), _below(part.source, prefix)
        below = _below(encoders.exchanged(part).tensors, f"{tower}/")
        state = encoders.to_huggingface(below, encoders.tower_names(part.config))
        return encoders.encoder_json(plain), state

    def _model(self, part: Part, folder: Path | None) -> torch_side.TheirModel:
        if folder is not None:
            return folder
        names = encoders.model_names(part.config)
        state = encoders.to_huggingface(encoders.exchanged(part).tensors, names)
        settings = encoders.encoder_json(part.config, part.config["heads"])
        return {**settings, "num_labels": part.config["num_classes"]}, state


Layers = dict[str, np.ndarray]


def _t5(
    part: Part, theirs: torch_side.TheirModel, tokens: np.ndarray, rng: np.random.Generator
) -> tuple[str, Layers, Layers]:
    decoder_input = rng.integers(1, part.config["vocab_size"], (2, _TARGET)).astype(np.int32)
    decoder_input[:, 0] = 0
    model = T5(ReaderConfig(**{**part.config, "dtype": "float32"}))
    params = _arrays(part, "")

    def run(params: Any) -> Any:
        return model.apply({"params": params}, tokens, decoder_input, capture_intermediates=True)

    logits, captured = jax.jit(run)(params)
    ours = _captured(captured["intermediates"])
    ours["logits"] = np.asarray(logits)
    return "", ours, torch_side.t5_layers(theirs, tokens, decoder_input)


def _tower(
    part: Part, theirs: torch_side.TheirModel, tower: str, tokens: np.ndarray
) -> tuple[str, Layers, Layers]:
    config = RetrieverConfig(**{**part.config, "dtype": "float32"})
    model = DualEncoder(config)
    params = {tower: _arrays(part, f"{tower}/")}
    method = "embed_passage" if tower == "passage_encoder" else "embed_query"
    ours = _states(config, params[tower], tokens)
    ours[torch_side.EMBEDDING] = np.asarray(model.apply({"params": params}, tokens, method=method))
    prefix = "" if tower == "encoder" else f"{tower}/"
    return prefix, ours, torch_side.encoder_layers(theirs, tokens, part.config)


def _encoder(
    part: Part, theirs: torch_side.TheirModel, tokens: np.ndarray
) -> tuple[str, Layers, Layers]:
    config = EncoderModelConfig(**{**part.config, "dtype": "float32"})
    params = _arrays(part, "")
    ours = _states(config, params["encoder"], tokens)
    _, logits = jax.jit(EncoderModel(config).apply)({"params": params}, tokens)
    ours.update({head: np.asarray(value) for head, value in logits.items()})
    return "", ours, torch_side.encoder_layers(theirs, tokens, part.config)


def _states(config: NamedEncoderConfig, params: Any, tokens: np.ndarray) -> Layers:
    """The embeddings, and the states after each layer."""
    run = functools.partial(make_encoder(config.tower).apply, method="all_states")
    first, *every = jax.jit(run)({"params": params}, tokens)
    return {
        "embeddings": np.asarray(first),
        **{f"layers_{i}": np.asarray(states) for i, states in enumerate(every)},
    }


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _arrays(part: Part, prefix: str) -> Any:
    flat = {
        name.removeprefix(prefix): tensor.read().astype(np.float32)
        for name, tensor in part.tensors.items()
        if name.startswith(prefix)
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def _captured(tree: Any) -> Layers:
    """Outputs by module path; of a layer with two outputs, the first."""
    found: Layers = {}
    for path, value in traverse_util.flatten_dict(tree).items():
        if path[-1] == "__call__":
            first = value[0]
            while isinstance(first, tuple):
                first = first[0]
            found["/".join(path[:-1])] = np.asarray(first)
    return found


def _differences(prefix: str, ours: Layers, theirs: Layers, tokens: np.ndarray) -> dict[str, float]:
    result = {}
    for name, expected in theirs.items():
        found = ours[name]
        # States at padding have no meaning.
        if expected.ndim == 3 and expected.shape[:2] == tokens.shape:
            found, expected = found[tokens > 0], expected[tokens > 0]
        worst = float(np.max(np.abs(found - expected)))
        result[f"{prefix}{name}"] = worst
        scale = max(float(np.max(np.abs(expected))), 1.0)
        if not worst <= TOLERANCE * scale:
            raise UserError(
                f"--verify: {prefix}{name} differs by {worst:.2e} (its largest number is "
                f"{scale:.2e}); the conversion does not mean the same model"
            )
    return result
