"""What XLA is told beyond its defaults, and where its programs are kept."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Annotated

import jax
from msgspec import Meta

from atlas_jax.core import bounds

_CPU_OPTIONS: dict[str, str | bool] = {
    # By default joins products with all that precedes a sum or maximum to one unit of YNNPACK,
    # XLA's CPU kernels. In an encoder's forward pass that keeps large constants in memory and
    # takes a sixth to a third longer.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # Lets the maximum of a softmax use vectors; a NaN may get lost in it, but not in the softmax.
    "xla_cpu_enable_fast_min_max": True,
}


_CORES = "PJRT_NPROC"  # read by XLA when its CPU backend starts
LIBTPU_ARGS = "LIBTPU_INIT_ARGS"  # read by libtpu when it is loaded
# The compiler of the libtpu that `jax[tpu]` brings overflows the stack of its threads, 64 KiB, on
# the joint train step. docs/plan.md, "The compiler of the plan and that of the run".
STACK_FLAG, STACK_BYTES = "--fibers_default_thread_stack_size", 1 << 20


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    """Compiled programs that outlive a process, and the cores that each of them takes.

    Attributes:
      cache: directory (also gs://) where they are kept, so that a run that is started again
        begins at once; "" = what JAX_COMPILATION_CACHE_DIR says, by default none.
      cache_from_seconds: only programs that took so long to compile.
      cores: of a CPU, for each program; 0 = all. An index is built of as many batches at a time
        as there are cores for, which takes less time than to split every operation over all of
        them. Training has one program at a time and needs them all.

    Raises:
      UserError: a number is out of its bounds.
    """

    cache: str = ""
    cache_from_seconds: bounds.NotNegative = 1.0
    cores: Annotated[int, Meta(ge=0, le=1 << 16)] = 0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        bounds.check(self)

    def apply(self) -> None:
        """Tell JAX; before its backend starts and anything is compiled."""
        enlarge_stacks()
        if self.cores:
            os.environ[_CORES] = str(self.cores)
            # Otherwise programs run on threads of the backend, of which there are as many.
            jax.config.update("jax_cpu_enable_async_dispatch", False)
        if self.cache:
            # JAX's names of programs do not tell for how many cores they were compiled.
            part = f"/cores_{self.cores}" if self.cores else ""
            jax.config.update("jax_compilation_cache_dir", self.cache + part)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", self.cache_from_seconds)


def enlarge_stacks() -> None:
    """Give the threads of libtpu's compiler a larger stack, unless LIBTPU_INIT_ARGS names one.

    Call it before JAX starts a TPU backend. Other backends do not read the variable.
    """
    told = os.environ.get(LIBTPU_ARGS, "").split()
    if _stack_of(told) is None:
        os.environ[LIBTPU_ARGS] = " ".join([f"{STACK_FLAG}={STACK_BYTES}", *told])


def stack_fault() -> str:
    """Why libtpu's compiler is likely to end while it compiles a step, or ""."""
    found = _stack_of(os.environ.get(LIBTPU_ARGS, "").split())
    if found is not None and found.isdigit() and int(found) >= STACK_BYTES:
        return ""
    told = "does not set" if found is None else f"says {found} of"
    return (
        f"{LIBTPU_ARGS} {told} {STACK_FLAG}: libtpu's compiler needs {STACK_BYTES} or more for the "
        "joint train step; unset it, or name that"
    )


def _stack_of(arguments: Sequence[str]) -> str | None:
    """The size that the flag sets, the last one if it is given twice."""
    sizes = [one.partition("=")[2] for one in arguments if one.partition("=")[0] == STACK_FLAG]
    return sizes[-1] if sizes else None


def programs_at_a_time() -> int:
    """How many programs of one device are to run side by side, after `CompilerConfig.cores`."""
    told = os.environ.get(_CORES, "")
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or not told.isdigit():
        return 1
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (present or 1) // max(1, int(told)))


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
