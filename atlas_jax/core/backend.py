"""Tells in one line why JAX does not find the devices that it was told to use."""

import os

import jax

from atlas_jax.core.errors import one_line


def missing_backend() -> str | None:
    """Why JAX cannot start its backend, and which backends it finds; None if it can.

    Used after an error: for a CUDA that is not installed JAX raises a bare AssertionError, and
    other errors come with a page of its own frames.
    """
    try:
        jax.devices()
        return None
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error) if str(error) else "JAX has no plugin for it here"
    asked = os.environ.get("JAX_PLATFORMS", "")
    wanted = f"JAX_PLATFORMS={asked}" if asked else "JAX's own choice of a backend"
    return f"{wanted} cannot be had: {reason}; {_instead()}"


def _instead() -> str:
    """The backends that JAX finds if it is free to choose."""
    try:
        jax.config.update("jax_platforms", None)
        found = jax.devices()
    except (RuntimeError, AssertionError):
        return "JAX_PLATFORMS=cpu works everywhere"
    return f"without JAX_PLATFORMS there is {len(found)} x {found[0].platform}"
