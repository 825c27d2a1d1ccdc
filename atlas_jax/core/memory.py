"""Check that arrays and programs fit into this machine's memory, before they take it.

On a CPU, if XLA gets no memory it ends the process, the system kills the process without a word,
or the process waits for ever for its arrays. A TPU or GPU raises an error, so nothing is checked
there.
"""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from atlas_jax.core.errors import UserError

_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # memory limit of a container
_SYSTEM = Path("/proc/meminfo")


def check_fits(shapes: Any, what: str) -> None:
    """Refuse arrays that are larger than the memory that this process may use.

    Args:
      shapes: tree of arrays or ShapeDtypeStructs.
      what: name of the arrays, for the message.

    Raises:
      UserError: says how much they need, how much there is, and which array is the largest.
    """
    if jax.default_backend() != "cpu":
        return
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): _bytes(leaf) for path, leaf in flat
    }
    needed, there = sum(sizes.values()), available()
    if needed <= there:
        return
    largest = max(sizes, key=lambda name: sizes[name])
    raise UserError(
        f"{what} need {needed / 1e9:,.1f} GB, but this machine gives {there / 1e9:,.1f} GB of "
        f"memory; the largest array is {largest} of {sizes[largest] / 1e9:,.1f} GB. Bind a smaller "
        "model (ReaderConfig, RetrieverConfig)"
    )


def check_program_fits(program: jax.stages.Compiled, what: str, smaller: str) -> None:
    """Refuse a compiled program whose results and temporaries find no memory now.

    Args:
      program: compiled for the devices of this process. Each needs its own memory. The arguments
        are there already.
      what: name of the program, for the message.
      smaller: the bindings that make it smaller.

    Raises:
      UserError: says how much it needs, how much is free, and what to bind.
    """
    found = program.memory_analysis() if jax.default_backend() == "cpu" else None
    if found is None:
        return
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    needed = (results + found.temp_size_in_bytes) * jax.local_device_count()
    there = free()
    if needed > there:
        raise UserError(
            f"{what} needs {needed / 1e9:,.1f} GB, but {there / 1e9:,.1f} GB of this machine's "
            f"memory are free; bind a smaller {smaller}"
        )


def free() -> int:
    """Bytes that this process may still take: what the system can give, within `available`."""
    try:
        fields = dict(line.split(":") for line in _SYSTEM.read_text().splitlines())
        kilobytes = sum(int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):  # not Linux
        return available()
    return min(kilobytes * 1024, available())


def available() -> int:
    """Most bytes that this process may use, by the machine, its container and its limits."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limits.append(int(_GROUP_LIMIT.read_text()))
    try:
        import resource
    except ImportError:  # not on Windows
        return min(limits)
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits)


def _bytes(leaf: Any) -> int:
    # A PRNG key has a type of its own, and next to no size.
    itemsize = leaf.dtype.itemsize if isinstance(leaf.dtype, np.dtype) else 8
    return math.prod(leaf.shape) * int(itemsize)
