"""How many bytes of arrays each simulated device holds, and the most while something runs."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax._src.core import trace_state_clean  # JAX has no other way

PACKAGE = str(Path(__file__).parents[1] / "atlas_jax")


def device_bytes(arrays: Any) -> Counter[jax.Device]:
    """Bytes on each device of a tree of arrays; a buffer that several share counts once."""
    found: Counter[jax.Device] = Counter()
    for (device, _), size in _buffers(jax.tree.leaves(arrays)).items():
        found[device] += size
    return found


def _buffers(arrays: Iterable[jax.Array]) -> dict[tuple[jax.Device, int], int]:
    """Device and address of each buffer -> its bytes."""
    buffers: dict[tuple[jax.Device, int], int] = {}
    for array in arrays:
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended) or array.is_deleted():
            continue  # the data of a key is an array of its own
        for shard in array.addressable_shards:
            buffers[shard.device, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return buffers


def most_bytes(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function gives, and the most bytes of new arrays that one device held meanwhile.

    Looks whenever a function of the package returns, while its arrays are still there; while one
    is traced there are none yet.
    """
    there, most = jax.live_arrays(), 0  # kept, so that no new array gets the place of an old one
    known = set(map(id, there))
    old = _buffers(there)

    def look(frame: Any, event: str, _: Any) -> None:
        nonlocal most
        ours = event == "return" and frame.f_code.co_filename.startswith(PACKAGE)
        if ours and trace_state_clean():
            new = _buffers([array for array in jax.live_arrays() if id(array) not in known])
            grown: Counter[jax.Device] = Counter()
            for key in new.keys() - old.keys():
                grown[key[0]] += new[key]
            most = max(most, *grown.values(), 0)

    sys.setprofile(look)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return result, most
