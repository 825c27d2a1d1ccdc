"""What XLA is told beyond its defaults."""

import functools

import jax

# Joins products with all that follows them to one unit of YNNPACK, XLA's CPU kernels. In an
# encoder's forward pass that keeps large constants in memory and takes a third longer.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def encoder_options() -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for an encoder's forward pass; None where none help.

    The option is an experimental one, so it is tried on nothing first: an XLA that does not know
    it compiles without.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS)(0)
    except (ValueError, jax.errors.JaxRuntimeError):
        return None
    return _CPU_OPTIONS
