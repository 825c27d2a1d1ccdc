"""What XLA is told beyond its defaults, and where its programs are kept."""

import dataclasses
import functools

import gin
import jax

# Joins products with all that follows them to one unit of YNNPACK, XLA's CPU kernels. In an
# encoder's forward pass that keeps large constants in memory and takes a third longer.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    """Compiled programs that outlive a process.

    Attributes:
      cache: directory (also gs://) where they are kept, so that a run that is started again
        begins at once; "" = what JAX_COMPILATION_CACHE_DIR says, by default none.
      cache_from_seconds: only programs that took so long to compile.
    """

    cache: str = ""
    cache_from_seconds: float = 1.0

    def apply(self) -> None:
        """Tell JAX; before anything is compiled."""
        if self.cache:
            jax.config.update("jax_compilation_cache_dir", self.cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", self.cache_from_seconds)


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
