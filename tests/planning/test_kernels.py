"""What fused attention says of its kernels, against their own bodies and the TPU's compiler."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.core.fused import Seen, attend
from atlas_jax.planning.flops import matmul_flops
from atlas_jax.planning.hlo import Program

HEADS, CHANNELS = 4, 64


def self_attention(n: int, length: int) -> Any:
    """Gradients by all that has one, of shared rows, and their abstract arguments."""

    def gradients(x: Any, segments: Any, distances: Any) -> Any:
        def loss(x: Any, distances: Any) -> Any:
            read, _ = attend(x, x, x, Seen(segments, segments), distances, HEADS)
            return jnp.sum(read.astype(jnp.float32))

        return jax.grad(loss, (0, 1))(x, distances)

    x = jax.ShapeDtypeStruct((n, length, HEADS * CHANNELS), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((n, length), jnp.int32)
    return gradients, (x, segments, jax.ShapeDtypeStruct((HEADS, 2 * length - 1), jnp.float32))


def cross_attention(n: int, r: int, t: int, s: int) -> Any:
    """The mass of one variant; of several, the gradients."""

    def run(x: Any, source: Any, mask: Any, weight: Any) -> Any:
        seen = Seen.of_source(mask, t)
        if r == 1:
            return attend(x, source, source, seen, None, HEADS, None, weight)

        def loss(x: Any, source: Any) -> Any:
            return jnp.sum(attend(x, source, source, seen, None, HEADS)[0].astype(jnp.float32))

        return jax.grad(loss, (0, 1))(x, source)

    x = jax.ShapeDtypeStruct((n, r * t, HEADS * CHANNELS), jnp.bfloat16)
    source = jax.ShapeDtypeStruct((n, s, HEADS * CHANNELS), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((n, r, s), bool)
    return run, (x, source, mask, jax.ShapeDtypeStruct((n, r * t), jnp.float32))


CASES = {
    "self": self_attention(8, 512),
    "long": self_attention(2, 1024),
    "mass": cross_attention(2, 1, 16, 4096),
    "variants": cross_attention(2, 3, 9, 1000),
}


def products(case: str) -> float:
    function, args = CASES[case]
    return matmul_flops(jax.make_jaxpr(function)(*args))


def test_two_products_forward_and_five_backward() -> None:
    assert products("self") == 7 * 2 * 8 * HEADS * 512 * 512 * CHANNELS


def test_a_kernel_in_a_compiled_program_counts_what_it_says() -> None:
    """As the TPU's compiler writes it; what lies in on-chip memory S(1) does not count."""
    text = """HloModule f

ENTRY %main (x: bf16[8,512,128]) -> bf16[8,512,128] {
  %x = bf16[8,512,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %y = (bf16[8,512,128]{2,1,0:T(8,128)(2,1)}, f32[8,2,512]{2,1,0:T(2,128)S(1)}) custom-call(%x, %x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"90000","remote_bytes_transferred":"0"}}}
}
"""  # noqa: E501
    program = Program(text)
    assert program.product_flops == 1000
    assert program.hbm_bytes == 90000 - 8 * 2 * 512 * 4


# In a process of its own: libtpu ends one whose XLA_FLAGS it does not know, as those of the tests.
COMPILE = """
import json, re, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from atlas_jax.core import partitioning
from atlas_jax.planning.hlo import Program
from atlas_jax.planning.planner import tpu_devices
from atlas_jax.planning.traffic import kernel_cost
from atlas_jax.core import fused_layout
from atlas_jax.training.chips import parse_slice
from tests.planning.test_kernels import CASES, products

stated = []
vmem = fused_layout.vmem
import atlas_jax.core.fused_kernels as kernels
kernels.vmem = lambda *args: stated.append(vmem(*args)) or stated[-1]
devices = np.array(tpu_devices(parse_slice("v5e-4"))[:1]).reshape(1, 1, 1, 1, 1)
mesh = Mesh(devices, partitioning.MESH_AXES)
whole, found = NamedSharding(mesh, PartitionSpec()), {}
for name, (function, args) in CASES.items():
    with partitioning.activate(mesh):
        args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in args]
        stated.clear()
        compiled = jax.jit(function).lower(*args).compile()
        counted = products(name)
    text = compiled.as_text()
    kernels_bytes = [
        (kernel_cost(one)[1], one.size + sum(value.size for value in body.operands(one)))
        for body in Program(text).computations.values() for one in body if kernel_cost(one)
    ]
    used = [
        re.search(r'"used_scoped_memory_configs":.{1,60}?"size":"(\\d+)"', line)[1]
        for line in text.splitlines() if '"tpu_custom_call"' in line
    ]
    found[name] = {
        "counted": counted, "read": Program(text).product_flops,
        "compiler": compiled.cost_analysis()["flops"], "bytes": kernels_bytes,
        "used": [int(u) for u in used], "stated": stated[:len(used)],
    }
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [plan]")
def test_the_tpu_compiler_takes_the_kernels_and_agrees() -> None:
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["read"] == found["counted"], name
        # The compiler adds sums, masks and what lies beside the kernels.
        assert found["counted"] <= found["compiler"] < 1.1 * found["counted"], name
        # Where there are four tiles of queries, each reads the keys and values anew.
        times = (1.5, 4) if name == "long" else (0.98, 1.02)
        for stated, arrays in found["bytes"]:
            assert times[0] < stated / arrays < times[1], name
        assert len(found["used"]) == len(found["stated"]) >= 2, name
        for used, stated in zip(sorted(found["used"]), sorted(found["stated"]), strict=True):
            assert used <= stated < 2 * used, name
