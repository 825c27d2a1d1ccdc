"""Arrays that no memory holds are refused before they are made."""

import resource

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.core import memory
from atlas_jax.core.errors import UserError


def test_what_is_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    shapes = {"a": jax.ShapeDtypeStruct((10,), jnp.float32), "key": jax.random.key(0)}
    memory.check_fits({**shapes, "b": jax.ShapeDtypeStruct((238,), jnp.float32)}, "they")
    with pytest.raises(UserError, match=r"they need 0.0 GB, .*the largest array is c/x of 0.0 GB"):
        memory.check_fits({**shapes, "c": {"x": jnp.zeros((120, 2))}}, "they")


def test_a_limit_of_the_process_counts(monkeypatch):
    whole = memory.available()
    assert 1 << 28 < whole < 1 << 50
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 20, 1 << 20))
    assert memory.available() == 1 << 20


def test_what_is_free_is_less_than_all(monkeypatch, tmp_path):
    assert 0 < memory.free() <= memory.available()
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  9000 kB\nMemAvailable:   300 kB\nSwapFree:   20 kB\n")
    monkeypatch.setattr(memory, "_SYSTEM", told)
    assert memory.free() == 320 * 1024
    monkeypatch.setattr(memory, "_SYSTEM", tmp_path / "none")
    assert memory.free() == memory.available()
