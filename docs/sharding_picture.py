"""Draws docs/sharding.svg and prints the table of docs/sharding.md, from the rules themselves.

    python docs/sharding_picture.py

Needs no accelerator: eight CPU devices stand for eight chips.
"""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import optax
from flax.core import meta
from jax.sharding import NamedSharding
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from atlas_jax.core.partitioning import STANDARD_RULES, MeshConfig, logical_to_spec, make_mesh
from atlas_jax.models.parameters import Models, abstract_params
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.state import Trains, state_shardings

PICTURE = Path(__file__).with_name("sharding.svg")
MESH = MeshConfig(data=2, fsdp=2, model=2)
READER = ReaderConfig(
    vocab_size=512, emb_dim=256, num_heads=8, num_encoder_layers=1, num_decoder_layers=1,
    head_dim=32, mlp_dim=512,
)  # fmt: skip
RETRIEVER = RetrieverConfig(
    vocab_size=256, hidden_dim=128, num_layers=1, num_heads=4, mlp_dim=512, max_positions=64
)
# Arrays of the step that are no parameters, by the logical axes that the code gives them.
STEP_ARRAYS = {
    "batch: tokens [b, q]": ((64, 64), ("batch", None)),
    "encoder states [b*k, l, d]": ((64, 32, 256), ("rows", "length", "embed")),
    "attention heads [b*k, h, l, kv]": ((64, 8, 32, 32), ("rows", "heads", "length", "kv")),
    "MLP activations [b*k, l, mlp]": ((64, 32, 512), ("rows", "length", "mlp")),
    "logits [b, t, v]": ((64, 16, 512), ("batch", "length", "vocab")),
    "index: embeddings [n, e]": ((1024, 128), ("index", None)),
    "index: passage tokens [n, l]": ((1024, 128), ("index", None)),
}
_LAYER = "encoder/layers_0"
PARAMETERS = {
    "embedding [vocab, embed]": "reader/token_embedder/embedding",
    "attention query [embed, joined_kv]": f"reader/{_LAYER}/attention/query/kernel",
    "attention out [joined_kv, embed]": f"reader/{_LAYER}/attention/out/kernel",
    "MLP in [embed, mlp]": f"reader/{_LAYER}/mlp/wi_0/kernel",
    "MLP out [mlp, embed]": f"reader/{_LAYER}/mlp/wo/kernel",
    "layer norm [embed]": f"reader/{_LAYER}/pre_mlp_layer_norm/scale",
    "retriever MLP in [embed, mlp]": f"retriever/{_LAYER}/intermediate/kernel",
}
# Moments of `MLP in`: Adam's two lie like it; Adafactor keeps a row and a column of it.
MOMENTS = {
    "Adam moments of MLP in": ("adamw", f"mu/{_LAYER}/mlp/wi_0/kernel"),
    "Adafactor row of MLP in": ("adafactor", f"v_row/{_LAYER}/mlp/wi_0/kernel"),
    "Adafactor column of MLP in": ("adafactor", f"v_col/{_LAYER}/mlp/wi_0/kernel"),
}


@dataclasses.dataclass(frozen=True)
class Array:
    """One row of the table and one panel of the picture."""

    name: str
    shape: tuple[int, ...]
    sharding: NamedSharding

    def row(self) -> str:
        """As a line of the table."""
        spec = [*self.sharding.spec, *[None] * (len(self.shape) - len(self.sharding.spec))]
        split = [_axes(axes, self.sharding.mesh) for axes in spec]
        parts = len(self.holders())
        return f"| {self.name} | {', '.join(split)} | 1/{parts} |"

    def holders(self) -> dict[tuple[tuple[int, int], ...], list[int]]:
        """Tile (start and end on each axis) -> numbers of the devices that hold it."""
        tiles = defaultdict(list)
        for device, index in self.sharding.devices_indices_map(self.shape).items():
            tile = tuple(
                part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)
            )
            tiles[tile].append(device.id)
        return dict(tiles)


def arrays() -> list[Array]:
    """All that is drawn, sharded by the standard rules."""
    mesh = make_mesh(MESH)
    models = Models(T5(READER), DualEncoder(RETRIEVER))
    optimizers = {
        "adamw": optax.scale_by_adam(),
        "adafactor": optax.scale_by_factored_rms(min_dim_size_to_factor=8),
    }
    shapes, states, found = _by_path(meta.unbox(abstract_params(models))), {}, []
    for kind, optimizer in optimizers.items():
        both = {"reader": optimizer, "retriever": optimizer}
        specs = state_shardings(models, both, Trains("joint"), mesh, STANDARD_RULES)
        moments = jax.eval_shape(optimizer.init, meta.unbox(abstract_params(models))["reader"])
        states[kind] = (_by_path(moments), _by_path(specs.opt_state["reader"]))
    params = _by_path(specs.params)
    for name, path in PARAMETERS.items():
        found.append(Array(name, shapes[path].shape, params[path]))
    for name, (kind, path) in MOMENTS.items():
        found.append(Array(name, states[kind][0][path].shape, states[kind][1][path]))
    for name, (shape, axes) in STEP_ARRAYS.items():
        sharding = NamedSharding(mesh, logical_to_spec(axes, STANDARD_RULES))
        found.append(Array(name, shape, sharding))
    return found


def table(found: list[Array]) -> str:
    """The Markdown table of the documentation."""
    head = ["| array | split over, axis by axis | held by a device |", "|---|---|---|"]
    return "\n".join([*head, *(array.row() for array in found)])


def draw(found: list[Array], path: Path) -> None:
    """One panel an array: its tiles, and the devices that hold each."""
    columns = 4
    rows = -(-(len(found) + 1) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.1 * columns, 2.7 * rows))
    flat = list(panels.flat)
    _legend(flat[0])
    for panel, array in zip(flat[1:], found, strict=False):
        _panel(panel, array)
    for panel in flat[len(found) + 1 :]:
        panel.axis("off")
    figure.tight_layout(h_pad=1.6)
    plt.rcParams["svg.hashsalt"] = "atlas-jax"
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=80)


def _legend(panel: Axes) -> None:
    """The devices as the mesh arranges them."""
    panel.set_title("8 devices: data=2 x fsdp=2 x model=2", fontsize=11, fontweight="bold")
    for device in range(8):
        data, fsdp, model = device // 4, device // 2 % 2, device % 2
        x, y = data * 2.4 + model, 1 - fsdp
        panel.add_patch(Rectangle((x, y), 1, 1, facecolor=_color([device]), edgecolor="black"))
        panel.text(x + 0.5, y + 0.5, str(device), ha="center", va="center", fontsize=11)
    for data in range(2):
        panel.text(data * 2.4 + 1, 2.15, f"data {data}", ha="center", fontsize=10)
        for model in range(2):
            panel.text(data * 2.4 + model + 0.5, -0.3, f"model {model}", ha="center", fontsize=8)
    for fsdp in range(2):
        panel.text(-0.1, 1.5 - fsdp, f"fsdp {fsdp}", ha="right", va="center", fontsize=9)
    panel.set_xlim(-1.1, 4.6)
    panel.set_ylim(-0.5, 2.6)
    panel.axis("off")


def _panel(panel: Axes, array: Array) -> None:
    """First axis downwards, last axis to the right; axes between are not split."""
    panel.set_title(array.name, fontsize=11, fontweight="bold")
    down = array.shape[0]
    at = 1 if len(array.shape) == 4 else -1  # [b*k, h, l, kv]: heads are what is split
    right = array.shape[at] if len(array.shape) > 1 else None
    for tile, devices in array.holders().items():
        y0, y1 = tile[0][0] / down, tile[0][1] / down
        x0, x1 = (0.0, 1.0) if right is None else (tile[at][0] / right, tile[at][1] / right)
        if right is None:  # a vector lies on its side
            x0, x1, y0, y1 = y0, y1, 0.35, 0.65
        panel.add_patch(
            Rectangle((x0, 1 - y1), x1 - x0, y1 - y0, facecolor=_color(devices), edgecolor="black")
        )
        label = "all" if len(devices) == 8 else " ".join(map(str, sorted(devices)))
        panel.text((x0 + x1) / 2, 1 - (y0 + y1) / 2, label, ha="center", va="center", fontsize=10)
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.02, 1.02)
    panel.axis("off")


def _color(devices: list[int]) -> Any:
    """Of the first device that holds a tile, paler the more of them do."""
    red, green, blue, _ = plt.get_cmap("tab10")(min(devices))
    pale = {1: 0.45, 2: 0.6, 4: 0.75, 8: 0.88}[len(devices)]
    return tuple(part + (1 - part) * pale for part in (red, green, blue))


def _axes(axes: Any, mesh: Any) -> str:
    """The mesh axes that split an axis; those of size 1 split nothing."""
    if axes is None:
        return "whole"
    names = (axes,) if isinstance(axes, str) else axes
    return " x ".join(name for name in names if mesh.shape[name] > 1)


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    everything = arrays()
    draw(everything, PICTURE)
    print(table(everything))
