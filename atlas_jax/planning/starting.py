"""The memory of a training before its first step: where its state is made, and where it is read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from atlas_jax.core import partitioning
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.planning.compiled import compile_program
from atlas_jax.planning.estimate import Memory, resident_memory
from atlas_jax.planning.programs import Program
from atlas_jax.planning.run import AnyRun, Run
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.state import abstract_state, state_maker, what_trains

START = "start"  # of the programs that a plan may be asked for


@dataclasses.dataclass(frozen=True)
class Starting:
    """One way to a training's state.

    Attributes:
      program: `start` makes the state of the parameters that the run begins with; `restart` reads
        it from a checkpoint, each chip its own part, and nothing beside it.
      memory: of a chip at the end of it, when most is there.
      fits: whether a chip has room for it.
    """

    program: str
    memory: Memory
    fits: bool


def plan_starting(
    run: AnyRun, config: MeshConfig, hbm_bytes: int, devices: Sequence[Any]
) -> list[Starting]:
    """Compile the program that makes a training's state; the index is put beside it later.

    Args:
      run: only trainings of reader and retriever have such programs.
      config: the mesh.
      hbm_bytes: that a program may use of a chip.
      devices: of the mesh.
    """
    if not isinstance(run, Run) or run.entry != "train":
        return []
    mesh = partitioning.make_mesh(config, devices)
    optimizers = {part: make_optimizer(one) for part, one in run.optimizers.items()}
    shaping = (run.models, optimizers, what_trains(run.step, run.models))
    state = abstract_state(*shaping, mesh, run.rules)
    given = {"parameters": state.params}
    make = state_maker(*shaping, 0, mesh, run.rules)
    made, _ = compile_program(Program("start", make, (state.params,), given), run, mesh, devices)
    rest = dataclasses.replace(state, params=(), opt_state=())  # step, key and skipped
    read = resident_memory(given | {"optimiser": state.opt_state, "step and key": rest})
    return [
        Starting(name, memory, memory.peak <= hbm_bytes)
        for name, memory in (("start", made), ("restart", read))
    ]
