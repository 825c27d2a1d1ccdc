"""XLA options that differ from the defaults, and the cache of compiled programs."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Annotated

import jax
from msgspec import Meta

from atlas_jax.core import bounds

_CPU_OPTIONS: dict[str, str | bool] = {
    # By default YNNPACK, XLA's CPU kernels, joins a product with all that precedes a sum or
    # maximum. In an encoder's forward pass this keeps large constants in memory and takes a sixth
    # to a third longer.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # The maximum of a softmax may use vectors. It may then miss a NaN, but the softmax does not.
    "xla_cpu_enable_fast_min_max": True,
}


_CORES = "PJRT_NPROC"  # read by XLA when its CPU backend starts
LIBTPU_ARGS = "LIBTPU_INIT_ARGS"  # read by libtpu when it is loaded
# Compiling the joint train step overflows the 64 KiB stacks of the threads of libtpu's compiler, in
# the version that `jax[tpu]` installs. See docs/plan.md, "The compiler of the plan and that of the
# run".
STACK_FLAG, STACK_BYTES = "--fibers_default_thread_stack_size", 1 << 20


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    """The cache of compiled programs, and the CPU cores for each program.

    Attributes:
      cache: directory (also gs://) for compiled programs, so that a run that is started again
        begins at once. "" = the directory in JAX_COMPILATION_CACHE_DIR, by default none.
      cache_from_seconds: only programs that took this long to compile are kept.
      cores: CPU cores for each program; 0 = all. When an index is built, several batches then run
        side by side. That is faster than splitting every operation over all cores. Training
        runs one program at a time and needs all cores.

    Raises:
      UserError: a number is out of its bounds.
    """

    cache: str = ""
    cache_from_seconds: bounds.NotNegative = 1.0
    cores: Annotated[int, Meta(ge=0, le=1 << 16)] = 0

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        bounds.check(self)

    def apply(self) -> None:
        """Pass the settings to JAX; call it before JAX starts its backend."""
        enlarge_stacks()
        if self.cores:
            os.environ[_CORES] = str(self.cores)
            # Otherwise programs run on the backend's own threads, one for each of these cores.
            jax.config.update("jax_cpu_enable_async_dispatch", False)
        if self.cache:
            # JAX's names of programs do not tell for how many cores they were compiled.
            part = f"/cores_{self.cores}" if self.cores else ""
            jax.config.update("jax_compilation_cache_dir", self.cache + part)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", self.cache_from_seconds)


def enlarge_stacks() -> None:
    """Give the threads of libtpu's compiler a larger stack, unless LIBTPU_INIT_ARGS sets one.

    Call it before JAX starts a TPU backend. Other backends do not read the variable.
    """
    told = os.environ.get(LIBTPU_ARGS, "").split()
    if _stack_of(told) is None:
        os.environ[LIBTPU_ARGS] = " ".join([f"{STACK_FLAG}={STACK_BYTES}", *told])


def stack_fault() -> str:
    """Why libtpu's compiler is likely to crash while it compiles a step, or ""."""
    found = _stack_of(os.environ.get(LIBTPU_ARGS, "").split())
    if found is not None and found.isdigit() and int(found) >= STACK_BYTES:
        return ""
    told = "does not set" if found is None else f"says {found} of"
    return (
        f"{LIBTPU_ARGS} {told} {STACK_FLAG}: libtpu's compiler needs {STACK_BYTES} or more for the "
        "joint train step; unset it, or name that"
    )


def _stack_of(arguments: Sequence[str]) -> str | None:
    """The size that the flag sets; if it is given twice, the last one."""
    sizes = [one.partition("=")[2] for one in arguments if one.partition("=")[0] == STACK_FLAG]
    return sizes[-1] if sizes else None


def programs_at_a_time() -> int:
    """How many programs run side by side on one device, by `CompilerConfig.cores`."""
    told = os.environ.get(_CORES, "")
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or not told.isdigit():
        return 1
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (present or 1) // max(1, int(told)))


@functools.cache
def encoder_options() -> dict[str, str | bool] | None:
    """`compiler_options` of `jax.jit` for an encoder's forward pass; None if none help.

    Another version of XLA may not know the options. So they are tried on an empty program first,
    and left out if it does not compile.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS)(0)
    except (ValueError, jax.errors.JaxRuntimeError):
        return None
    return _CPU_OPTIONS
