"""The flags of several hosts, and the rows that a process provides."""

import argparse

import jax
import numpy as np
import pytest
from jax._src.clusters import ClusterEnv
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.core import multihost
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig, make_mesh


def flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    multihost.add_flags(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator_address=a:1"], "without --process_count, --process_index"),
        (["--process_count=2", "--process_index=0"], "without --coordinator_address"),
        (
            ["--coordinator_address=a:1", "--process_count=1", "--process_index=0"]
            + ["--multihost=off"],
            "--multihost=off contradicts --coordinator_address",
        ),
        (["--multihost=on"], "the processes of this run cannot be joined"),
        (
            ["--coordinator_address=a:1", "--process_count=2", "--process_index=2"],
            "--process_index=2: expected 0 to 1, for --process_count=2",
        ),
        (
            ["--coordinator_address=a", "--process_count=2", "--process_index=1"],
            "--coordinator_address=a: expected HOST:PORT",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        multihost.start(flags(*arguments))


def test_one_process_alone_needs_no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(multihost, "_CHIPS", ("/dev/null",))  # libtpu may not be asked for
    multihost.start(flags())
    assert not jax.distributed.is_initialized()


def test_chips_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: called.append(a))
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(multihost, "_CHIPS", ("/nowhere", "/dev/null"))
    multihost.start(flags())
    assert called == [(None, None, None)]
    multihost.start(flags("--multihost=off"))
    assert len(called) == 1


class Slice:
    """What JAX finds on a Cloud TPU slice."""

    name, opt_in_only_method = "slice", False
    is_env_present = staticmethod(lambda: True)
    get_process_count, get_process_id = staticmethod(lambda: 4), staticmethod(lambda: 1)
    get_local_process_id = staticmethod(lambda: None)

    @staticmethod
    def get_coordinator_address(timeout_secs: int, override_coordinator_port: str | None) -> str:
        return f"found-in-{timeout_secs}:8482"


def test_what_will_be_joined_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told = flags("--coordinator_address=a:1", "--process_count=3", "--process_index=2")
    assert multihost.expected(told, 1) == ("a:1", 2, 3)
    assert multihost.expected(flags("--multihost=off"), 1) is None
    assert multihost.expected(flags("--multihost=on"), 1) is None  # no cluster is found here
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [Slice])
    assert multihost.expected(flags("--multihost=on"), 7) == ("found-in-7:8482", 1, 4)
    with pytest.raises(UserError, match="--coordinator_address is given without"):
        multihost.expected(flags("--coordinator_address=a:1"), 1)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_one_process_provides_all_rows_and_they_lie_in_order(sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(*sizes))
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    assert multihost.local_rows(sharding, 8) == list(range(8))
    whole = {"x": np.arange(24).reshape(8, 3)}
    for placed in (
        multihost.place_rows(whole, sharding, 8),
        multihost.place(whole, sharding),
    ):
        assert placed["x"].sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(multihost.to_host(placed)["x"], whole["x"])
