"""Floating point operations of a traced function, counted product by product.

A product [.., m, c] x [.., c, n] counts 2 m n c for each of its batch entries. Nothing else is
counted: norms, softmax and updates are below one per cent in these models. The body of a scan
counts as often as it runs. Of several branches the last one counts, which is that for True: a
step's conditions are that its gradient is finite and that its passages fit into their rows. A
rematerialised product counts each time it is computed. The body of a Pallas kernel counts for each
step of its grid, also for steps that find nothing to read.
"""

import math
from typing import Any

from jax.extend import core as jex_core


def matmul_flops(jaxpr: Any, loop_trips: int = 1, scan_once: bool = False) -> float:
    """FLOPs of the products in a (closed) jaxpr, over the whole machine.

    Args:
      jaxpr: `traced.jaxpr` of a jitted function, or `jax.make_jaxpr(f)(...)`.
      loop_trips: how often the body of each `while_loop` runs; a jaxpr does not say it.
      scan_once: count loop bodies once, as the compiler's own cost analysis does.
    """
    if isinstance(jaxpr, jex_core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_equation_flops(eqn, loop_trips, scan_once) for eqn in jaxpr.eqns)


def _equation_flops(eqn: Any, loop_trips: int, scan_once: bool) -> float:
    if eqn.primitive.name == "dot_general":
        return _dot_flops(eqn)
    inner = [
        [matmul_flops(j, loop_trips, scan_once) for j in _jaxprs(value)]
        for value in eqn.params.values()
    ]
    if eqn.primitive.name == "cond":
        return sum(found[-1] for found in inner if found)
    times = 1.0
    if not scan_once and eqn.primitive.name == "scan":
        times = eqn.params["length"]
    elif not scan_once and eqn.primitive.name == "while":
        times = loop_trips
    elif eqn.primitive.name == "shard_map":
        times = eqn.params["mesh"].size  # the body is the work of one device
    elif eqn.primitive.name == "pallas_call":
        times = 1.0 if scan_once else math.prod(eqn.params["grid_mapping"].grid)
    return times * sum(map(sum, inner))


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _jaxprs(value: Any) -> list[Any]:
    """The jaxprs inside a parameter of an equation."""
    if isinstance(value, jex_core.ClosedJaxpr | jex_core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [found for item in value for found in _jaxprs(item)]
    return []
