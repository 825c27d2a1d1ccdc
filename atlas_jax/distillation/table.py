"""The ways to teach the retriever from the reader, by name.

Another one is a file with a function ``distil(signals, config) -> (sum, count)``, and a line here.
"""

from collections.abc import Callable

from atlas_jax.core.types import Array
from atlas_jax.distillation import adist, emdr2, loop, pdist
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.distillation.signals import Signals

Loss = Callable[[Signals, DistillationConfig], tuple[Array, Array]]

LOSSES: dict[str, Loss] = {
    "adist": adist.distil,
    "emdr2": emdr2.distil,
    "pdist": pdist.distil,
    "loop": loop.distil,
}
