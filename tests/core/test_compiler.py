"""Compiler options: known ones are used, unknown ones are left out."""

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


def test_unknown_options_are_left_out(monkeypatch):
    monkeypatch.setattr(compiler, "_CPU_OPTIONS", {"xla_cpu_no_such_option": ""})
    assert compiler.encoder_options() is None


def test_another_backend_gets_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiler.encoder_options() is None
