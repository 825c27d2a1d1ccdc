"""How many bytes of arrays each simulated device holds, and the most while something runs."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax._src.core import trace_state_clean  # JAX has no other way

PACKAGE = str(Path(__file__).parents[1] / "atlas_jax")


def device_bytes(arrays: Any) -> Counter[jax.Device]:
    """Bytes on each device of a tree of arrays; a buffer that several share counts once."""
    buffers: dict[tuple[jax.Device, int], int] = {}
    for leaf in jax.tree.leaves(arrays):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) or leaf.is_deleted():
            continue  # the data of a key is an array of its own
        for shard in leaf.addressable_shards:
            buffers[shard.device, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    found: Counter[jax.Device] = Counter()
    for (device, _), size in buffers.items():
        found[device] += size
    return found


def most_bytes(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function gives, and the most bytes that one device held more than before it.

    Looks whenever a function of the package returns, while its arrays are still there; while one
    is traced there are none yet.
    """
    before, most = device_bytes(jax.live_arrays()), 0

    def look(frame: Any, event: str, _: Any) -> None:
        nonlocal most
        ours = event == "return" and frame.f_code.co_filename.startswith(PACKAGE)
        if ours and trace_state_clean():
            now = device_bytes(jax.live_arrays())
            most = max(most, *((now[device] - before[device]) for device in jax.devices()))

    sys.setprofile(look)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return result, most
