"""Compiler options: known ones are used, unknown ones left out; programs outlive a process."""

import argparse
import os
import subprocess
import sys

import jax
import pytest

from atlas_jax.core import compiler
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError


@pytest.fixture(autouse=True)
def fresh():
    compiler.encoder_options.cache_clear()
    yield
    compiler.encoder_options.cache_clear()


def test_this_jax_knows_the_options():
    options = compiler.encoder_options()
    assert options, "the pinned jax knows them; drop the file when it no longer does"
    assert jax.jit(lambda x: x @ x, compiler_options=options)(jax.numpy.eye(3)).sum() == 3


def test_with_them_a_nan_is_not_lost():
    softmax = jax.jit(jax.nn.softmax, compiler_options=compiler.encoder_options())
    for position in (0, 5, 63):
        logits = jax.numpy.zeros((4, 64)).at[1, position].set(jax.numpy.nan)
        assert jax.numpy.isnan(softmax(logits)).all(axis=1).tolist() == [False, True, False, False]


def test_unknown_options_are_left_out(monkeypatch):
    monkeypatch.setattr(compiler, "_CPU_OPTIONS", {"xla_cpu_no_such_option": ""})
    assert compiler.encoder_options() is None


def test_another_backend_gets_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiler.encoder_options() is None


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("", compiler.STACK_FLAG + "=1048576"),
        ("--x=1 --y", compiler.STACK_FLAG + "=1048576 --x=1 --y"),
        (compiler.STACK_FLAG + "=2097152 --x=1", compiler.STACK_FLAG + "=2097152 --x=1"),
    ],
)
def test_every_command_gives_libtpus_compiler_a_larger_stack(monkeypatch, told, expected):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", told)
    seen = []
    main = lambda flags: seen.append(os.environ["LIBTPU_INIT_ARGS"])  # noqa: E731
    for _ in range(2):
        assert launch(main, argparse.ArgumentParser(), []) == 0
    compiler.CompilerConfig().apply()  # a run that begins in Python
    assert seen == [expected] * 2
    assert os.environ["LIBTPU_INIT_ARGS"] == expected
    assert compiler.stack_fault() == ""


@pytest.mark.parametrize(
    ("told", "fault"),
    [("", "does not set"), ("--fibers_default_thread_stack_size=65536", "says 65536 of")],
)
def test_a_stack_that_is_too_small_is_a_fault(monkeypatch, told, fault):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", told)
    assert f"LIBTPU_INIT_ARGS {fault} --fibers_default" in compiler.stack_fault()


# In a process of its own: JAX opens one cache a process, and the tests share theirs.
COMPILE = """
import sys, jax
from atlas_jax.core.compiler import CompilerConfig
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name.rpartition("/")[2]))
CompilerConfig(cache=sys.argv[1], cache_from_seconds=float(sys.argv[2])).apply()
print(jax.jit(lambda x: x @ x + 1)(jax.numpy.eye(3)).sum(), seen.count("cache_hits"))
"""


def compiled(cache, seconds):
    """What a fresh process finds in the cache; the numbers have to be right either way."""
    command = [sys.executable, "-c", COMPILE, str(cache), str(seconds)]
    total, hits = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert total == "12.0"
    return int(hits)


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_has_compiled(tmp_path):
    cache = tmp_path / "programs"
    assert compiled(cache, 3600) == 0
    assert not list(cache.glob("*-cache"))  # nothing took that long to compile
    assert compiled(cache, 0) == 0
    kept = {path.name for path in cache.glob("*-cache")}
    assert kept
    assert compiled(cache, 0) == len(kept)
    assert {path.name for path in cache.glob("*-cache")} == kept


def test_without_a_folder_nothing_is_told(monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda name, value: pytest.fail(name))
    compiler.CompilerConfig().apply()


# In a process of its own: it is told before JAX's backend starts. Each operation over several
# cores is marked in the compiled program.
CORES = """
import os, sys
os.sched_getaffinity = lambda pid: set(range(8))
import jax
from atlas_jax.core.compiler import CompilerConfig, programs_at_a_time
CompilerConfig(cores=int(sys.argv[1])).apply()
large = jax.ShapeDtypeStruct((4096, 4096), "float32")
text = jax.jit(lambda x: jax.numpy.exp(x) + 1).lower(large).compile().as_text()
print(programs_at_a_time(), "outer_dimension_partitions" in text)
"""


@pytest.mark.parametrize(
    "cores, told", [(0, "1 True"), (1, "8 False"), (2, "4 True"), (9, "1 True")]
)
def test_a_program_takes_so_many_cores(cores, told):
    if cores != 1 and os.cpu_count() == 1:
        pytest.skip("one core is all there is")
    command = [sys.executable, "-c", CORES, str(cores)]
    others = ("NPROC", "CACHE_DIR")  # a program of the cache may be one for other cores
    clean = {name: value for name, value in os.environ.items() if not name.endswith(others)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=clean)
    assert done.stdout.split() == told.split()


def test_several_devices_or_a_tpu_have_one_program_at_a_time(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "1")
    assert jax.device_count() > 1 and compiler.programs_at_a_time() == 1
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiler.programs_at_a_time() == 1


def test_fewer_than_no_cores_are_refused():
    with pytest.raises(UserError, match="CompilerConfig.cores = -1: expected a whole number"):
        compiler.CompilerConfig(cores=-1)
