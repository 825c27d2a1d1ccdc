"""What XLA is told beyond its defaults, and where its programs are kept."""

import dataclasses
import functools

import gin
import jax

_CPU_OPTIONS: dict[str, str | bool] = {
    # By default joins products with all that precedes a sum or maximum to one unit of YNNPACK,
    # XLA's CPU kernels. In an encoder's forward pass that keeps large constants in memory and
    # takes a sixth to a third longer.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # Lets the maximum of a softmax use vectors; a NaN may get lost in it, but not in the softmax.
    "xla_cpu_enable_fast_min_max": True,
}


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
def encoder_options() -> dict[str, str | bool] | None:
    """`compiler_options` of `jax.jit` for an encoder's forward pass; None where none help.

    The options may go with another XLA, so they are tried on nothing first: one that does not
    know them compiles without.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS)(0)
    except (ValueError, jax.errors.JaxRuntimeError):
        return None
    return _CPU_OPTIONS
