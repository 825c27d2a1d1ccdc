"""Compiler options: known ones are used, unknown ones left out; programs outlive a process."""

import subprocess
import sys

import jax
import pytest

from atlas_jax.core import compiler


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
