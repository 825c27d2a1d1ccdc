"""The doctor in several local processes, which stand for hosts: it names the one that differs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import flax
import pytest

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
STACK = "--fibers_default_thread_stack_size=1048576"  # what every command tells libtpu

# The first argument is the version of flax that this host seems to have.
CHILD = """
import importlib.metadata, sys
from atlas_jax import doctor
version = importlib.metadata.version
if sys.argv[1]:
    importlib.metadata.version = lambda name: sys.argv[1] if name == "flax" else version(name)
sys.exit(doctor.main(sys.argv[2:]))
"""


def examined(
    arguments: list[str],
    count: int,
    absent: tuple[int, ...] = (),
    flax_of: dict[int, str] | None = None,
    environment_of: dict[int, dict[str, str]] | None = None,
) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of the processes that are not absent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(count):
        if index not in absent:
            command = [
                *(sys.executable, "-c", CHILD, (flax_of or {}).get(index, ""), *arguments),
                f"--coordinator_address=127.0.0.1:{port}",
                f"--process_count={count}",
                f"--process_index={index}",
            ]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
            environment.pop("LIBTPU_INIT_ARGS", None)
            environment |= (environment_of or {}).get(index, {})
            running.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=ROOT,
                    env=environment,
                )
            )
    outputs = [process.communicate(timeout=600)[0] for process in running]
    return [process.returncode for process in running], outputs


@pytest.mark.slow
def test_hosts_that_are_alike_fit_together(arguments: list[str], tmp_path: Path) -> None:
    codes, outputs = examined([*arguments, "--timeout=300"], 2)
    assert codes == [0, 0], outputs
    assert "the same on 2 process(es)" in outputs[0]
    assert f"LIBTPU_INIT_ARGS: {STACK}\n" in outputs[0]
    assert "4 devices (cpu), 2 a process" in outputs[0]
    assert "doctor" not in outputs[1]
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_the_host_with_another_package_or_variable_is_named_on_all(arguments: list[str]) -> None:
    codes, outputs = examined(
        [*arguments, "--timeout=300"],
        3,
        flax_of={1: "0.0.1"},
        environment_of={2: {"LIBTPU_INIT_ARGS": "--odd=1"}},
    )
    assert codes == [1, 1, 1], outputs
    for output in outputs:
        assert (
            f"doctor: flax: 0.0.1 on process 1 ({HOST}); {flax.__version__} on the other 2\n"
            f"doctor: LIBTPU_INIT_ARGS: {STACK} --odd=1 on process 2 ({HOST}); {STACK} on the "
            "other 2\n"
        ) in output
    assert "doctor: 2 fault(s) among 3 process(es)" in outputs[0]


@pytest.mark.slow
def test_the_host_with_fewer_devices_is_named_on_all(arguments: list[str]) -> None:
    odd = {2: {"JAX_NUM_CPU_DEVICES": "1"}}
    codes, outputs = examined([*arguments, "--timeout=300"], 3, environment_of=odd)
    assert codes == [1, 1, 1], outputs
    for output in outputs:
        assert f"doctor: devices: 1 cpu on process 2 ({HOST}); 2 cpu on the other 2\n" in output


@pytest.mark.slow
def test_who_does_not_come_is_named_and_nobody_waits_for_ever(arguments: list[str]) -> None:
    codes, outputs = examined([*arguments, "--timeout=20"], 3, absent=(2,))
    assert codes == [1, 1], outputs
    for output in outputs:
        assert f"doctor: process 2 of 3 did not reach process 0 ({HOST}) within 20" in output
