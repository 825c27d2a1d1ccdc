"""Several processes as one program: how they start, and what each holds, reads and writes.

Every process runs the same command. On a Cloud TPU slice with several hosts JAX finds the other
processes itself. Elsewhere the flags say where process 0 is:

    --multihost=auto|on|off            'auto' starts it where Cloud TPU chips are found
    --coordinator_address=HOST:PORT    of process 0; with it --process_count and --process_index

Process 0 writes metrics, predictions and model folders; of stores and indices each process writes
its share. So all processes must see the same folders, or a bucket. Each process reads only its own
rows of a training batch.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed  # for `expected`, `joined`: JAX has no other way
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.widths import power_of_two

T = TypeVar("T")
MODES = ("auto", "on", "off")
_ADDRESS = re.compile(r".+:\d{1,5}")
# Where a Cloud TPU VM shows its chips: v2 to v4, and later ones.
_CHIPS = ("/dev/accel0", "/dev/vfio/0")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags described at the top of this module."""
    group = parser.add_argument_group("several hosts", "one process on each, the same command")
    group.add_argument("--multihost", choices=MODES, default="auto")
    group.add_argument("--coordinator_address", metavar="HOST:PORT")
    group.add_argument("--process_count", type=int, metavar="N")
    group.add_argument("--process_index", type=int, metavar="I")


def refuse_flags(command: str, arguments: Sequence[str]) -> None:
    """Refuse this module's flags for a command that runs in one process.

    Raises:
      UserError: one of them is given; says which commands take it.
    """
    names = ("--multihost", "--coordinator_address", "--process_count", "--process_index")
    given = next((name for name in names for a in arguments if a.split("=")[0] == name), None)
    if given:
        raise UserError(
            f"{given}: {command} works in one process, with the devices of its own host; train, "
            "train_retriever, pretrain_encoder, train_classifier, self_train, build_index, index, "
            "retrieve, evaluate and doctor run on several"
        )


def start(flags: argparse.Namespace) -> None:
    """Join the other processes, if flags or machine say that there are any.

    Call it before anything asks JAX for its devices. A second call does nothing.

    Raises:
      UserError: flags that contradict each other, or the others cannot be reached.
    """
    if not _joins(flags):
        return
    try:
        jax.distributed.initialize(
            flags.coordinator_address, flags.process_count, flags.process_index
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run cannot be joined ({one_line(error)}); give "
            "--coordinator_address, --process_count and --process_index, or --multihost=off for "
            "this process alone"
        ) from error


def expected(flags: argparse.Namespace, timeout: float) -> tuple[str, int, int] | None:
    """The run that `start` would join: HOST:PORT of process 0, this process's index, their number.

    None if there is no such run, or JAX does not find it.

    Args:
      timeout: seconds to wait until the host name of process 0 is known.

    Raises:
      UserError: flags that contradict each other.
    """
    if not _joins(flags):
        return None
    if flags.coordinator_address is not None:
        return flags.coordinator_address, flags.process_index, flags.process_count
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    try:
        address, count, index, _ = detect(None, None, None, None, None, int(timeout))
    except (ValueError, RuntimeError):  # `start` will tell
        return None
    return None if address is None or count is None or index is None else (address, index, count)


def _joins(flags: argparse.Namespace) -> bool:
    """Whether there are processes to join.

    Raises:
      UserError: flags that contradict each other.
    """
    given = {
        name: getattr(flags, name)
        for name in ("coordinator_address", "process_count", "process_index")
    }
    told = [name for name, value in given.items() if value is not None]
    if told and len(told) < len(given):
        missing = ", ".join(f"--{name}" for name in given if name not in told)
        raise UserError(f"--{told[0]} is given without {missing}; give all three or none")
    if told and not 0 <= flags.process_index < flags.process_count:
        raise UserError(
            f"--process_index={flags.process_index}: expected 0 to {flags.process_count - 1}, "
            f"for --process_count={flags.process_count}"
        )
    if told and not _ADDRESS.fullmatch(flags.coordinator_address):
        raise UserError(
            f"--coordinator_address={flags.coordinator_address}: expected HOST:PORT of process 0"
        )
    if told and flags.multihost == "off":
        raise UserError(f"--multihost=off contradicts --{told[0]}")
    if flags.multihost == "off" or jax.distributed.is_initialized():
        return False
    return bool(told) or flags.multihost == "on" or _on_cloud_tpu()


def _on_cloud_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    return any(Path(chip).exists() for chip in _CHIPS)


def joined() -> tuple[int, int]:
    """This process's index and the number of processes, without asking for a device.

    `jax.process_index` would start the backend, which may wait for ever for a faulty host.
    """
    state = distributed.global_state
    return state.process_id, state.num_processes


def is_first() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait here until all processes have come."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_first(value: int) -> int:
    """Process 0's `value`, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def divided(items: Sequence[T], make: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
    """What `make` gives for all items, on every process; each item is made by one of them.

    All processes must call it with the same items.

    Args:
      items: process p of P makes those at p, p + P, ...
      make: gives a JSON value for each.
    """
    count = jax.process_count()
    if count == 1:
        return make(items)
    made = make(items[jax.process_index() :: count])
    found: list[Any] = [None] * len(items)
    for index, raw in enumerate(_gathered(json.dumps(made).encode("utf-8"))):
        found[index::count] = json.loads(raw)
    return found


def _gathered(raw: bytes) -> list[bytes]:
    """The bytes of each process, on every process."""
    sizes = multihost_utils.process_allgather(np.int32(len(raw)))
    width = power_of_two(int(sizes.max()))
    padded = np.frombuffer(raw.ljust(width, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def of_all(tree: Any) -> list[Any]:
    """Every process's arrays, on every process, which all must call it with the same shapes."""
    if jax.process_count() == 1:
        return [tree]
    stacked = multihost_utils.process_allgather(tree)
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(jax.process_count())]


def local_rows(sharding: Sharding, rows: int) -> list[int]:
    """The rows of a batch that this process must provide, ascending.

    Args:
      sharding: of the batch, over its first axis.
      rows: of the whole batch.
    """
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for part in parts if part for row in range(*part[0].indices(rows))})


def place_rows(tree: Any, sharding: Sharding, rows: int) -> Any:
    """Arrays on the mesh from the `local_rows` that each process has.

    Args:
      tree: of numpy arrays [local rows, ...].
      sharding: over their first axis.
      rows: of the whole batch.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:])), tree
    )


def place(tree: Any, shardings: Any) -> Any:
    """Place arrays on the mesh that every process holds as a whole.

    Like `jax.device_put`. With several processes that function sends all arrays around to compare
    them; this one does not.

    Args:
      tree: of numpy or local arrays; what lies where it shall stays there.
      shardings: one for all, or a tree of the same form.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)

    def spread(leaf: Any, sharding: Sharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda at: whole[at])

    return jax.tree.map(spread, tree, shardings)


def to_host(tree: Any) -> Any:
    """The whole arrays as NumPy arrays on every process; all processes must call it."""

    def fetch(leaf: Any) -> Any:
        apart = isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        )
        return multihost_utils.process_allgather(leaf, tiled=True) if apart else leaf

    return jax.device_get(jax.tree.map(fetch, tree))
