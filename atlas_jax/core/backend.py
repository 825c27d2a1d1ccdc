"""Says in a line why JAX has none of the devices that it was told to take."""

import os

import jax

from atlas_jax.core.errors import one_line


def missing_backend() -> str | None:
    """What is wrong where JAX cannot start its backend, and what there is instead; None: nothing.

    For an error that has happened already: JAX says a bare AssertionError for a CUDA that is not
    installed, and wraps others in a page of its own frames.
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
    """What JAX finds if it may choose."""
    try:
        jax.config.update("jax_platforms", None)
        found = jax.devices()
    except (RuntimeError, AssertionError):
        return "JAX_PLATFORMS=cpu works everywhere"
    return f"without JAX_PLATFORMS there is {len(found)} x {found[0].platform}"
