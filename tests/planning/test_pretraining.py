"""Plans of `pretrain_encoder`: its own step, its state and batch, and what is refused."""

import jax
import pytest

from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig, make_mesh
from atlas_jax.encoders.objectives import with_objectives
from atlas_jax.models.encoder_folder import draw_encoder
from atlas_jax.plan import UNREAD
from atlas_jax.planning.advice import Case, advise
from atlas_jax.planning.estimate import Memory
from atlas_jax.planning.meshes import candidates
from atlas_jax.planning.planner import make_plan
from atlas_jax.planning.programs import held, make_program
from atlas_jax.planning.report import as_json
from atlas_jax.planning.run import Pretraining
from tests.planning.small import SLICE

SIZES = [
    "VOCAB_SIZE=64", "FACTOR_DIM=8", "HIDDEN_DIM=16", "NUM_LAYERS=2", "NUM_HEADS=2", "MLP_DIM=32",
    "BATCH_SIZE=16", "LENGTH=24", "MAX_PREDICTIONS=4", "DTYPE='float32'",
]  # fmt: skip


def planned(*more: str, run: str = "albert_released") -> Pretraining:
    load_gin([f"runs/{run}.gin"], [*SIZES, *more], unread=UNREAD)
    found = from_gin.plan_run(None)
    assert isinstance(found, Pretraining)
    return found


def test_a_plan_holds_the_state_and_counts_the_step() -> None:
    run = planned()
    assert run.programs == ("pretrain",) and run.heads == {"EncoderModelConfig": 2}
    one = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    numbers = sum(x.size for x in jax.tree.leaves(draw_encoder(run.encoder)))
    terms = held(run, one)
    assert sum(x.size for x in jax.tree.leaves(terms["parameters"])) == numbers
    moments = [x.size for x in jax.tree.leaves(terms["optimiser"]) if x.ndim]
    assert sum(moments) == 2 * numbers  # LAMB's two
    found = make_plan(run, SLICE, jax.devices(), [MeshConfig(8, 1, 1), MeshConfig(2, 4, 1)])
    for plan in found.tried:
        assert plan.fits and plan.work is not None and plan.largest_index is None
        rows, d, f, e, v = 16 * 24, 16, 32, 8, 64
        layer = 2 * rows * (4 * d * d + 2 * d * f) + 2 * 2 * rows * 24 * d
        heads = 2 * rows * e * d + 2 * 16 * 4 * (d * e + e * v) + 2 * 16 * (d * d + 2 * d)
        assert plan.work.model_flops * 8 == pytest.approx(3 * (2 * layer + heads), rel=0.02)
        assert plan.work.flops > plan.work.model_flops  # what rematerialisation repeats
    copied, spread = (plan.memory.terms["parameters"] for plan in found.tried)
    assert spread < copied
    told = as_json(found)
    assert told["batch_size"] == 16 and told["objectives"] == ["mlm", "sop"]
    assert told["programs"][0]["program"] == "pretrain"


def test_the_planned_step_is_the_runs_own() -> None:
    run = planned("EncoderModelConfig.scan_layers=False")
    mesh = make_mesh(MeshConfig(4, 2, 1))
    program = make_program("pretrain", run, mesh)
    state, batch = program.args
    assert batch.tokens_bl.shape == (16, 24)
    assert state.params["sentence"]["classifier"]["kernel"].shape == (16, 2)
    with_heads = with_objectives(run.encoder, ("mlm", "sbo"))
    assert with_heads.heads == ("mlm", "sentence", "boundary")
    electra = planned("EncoderTrainConfig.objectives=('electra',)", "MaskingConfig.mask_rate=0.85",
                      "MaskingConfig.random_rate=0.0")  # fmt: skip
    terms = held(electra, mesh)["parameters"]
    assert set(terms) == {"encoder", "discriminator", "generator"}


def test_advice_names_the_runs_own_bindings() -> None:
    run = planned("REMAT='none'")
    case = Case("pretrain", run, MeshConfig(8, 1, 1), jax.devices())
    too_big = Memory({"parameters": 1, "optimiser": 2, "temporaries": 9}, 12)
    told = "\n".join(advise(case, too_big, 10))
    assert "EncoderModelConfig.remat_policy = 'full'" in told
    assert "EncoderTrainConfig.batch_size = 8: 1 instead of 2 rows" in told
    assert "EncoderTrainConfig.length = 24" in told
    state = Memory({"parameters": 4, "optimiser": 8, "temporaries": 0}, 12)
    assert "encoder/OptimizerConfig.kind = 'adafactor'" in "\n".join(advise(case, state, 10))


def test_what_cannot_be_planned_is_refused() -> None:
    load_gin(["runs/albert_released.gin"], SIZES, unread=UNREAD)
    with pytest.raises(UserError, match="--passages = 9: expected nothing: pretrain_encoder has"):
        from_gin.plan_run(9)
    load_gin(["runs/pretrain_encoder.gin"], [], unread=UNREAD | {"ENCODER": "x"})
    with pytest.raises(UserError, match="bind the sizes of EncoderModelConfig"):
        from_gin.plan_run(None)
    load_gin(["runs/build_index.gin"], [], unread=UNREAD)
    with pytest.raises(UserError, match="--passages = None: expected the number of the index's"):
        from_gin.plan_run(None)
    run = planned("BATCH_SIZE=12")
    with pytest.raises(UserError, match=r"EncoderTrainConfig.batch_size = 12"):
        make_program("pretrain", run, make_mesh(MeshConfig(8, 1, 1)))


def test_a_plan_with_experts_counts_their_places_and_spreads_them() -> None:
    sizes = ["VOCAB_SIZE=64", "BATCH_SIZE=16", "LENGTH=32", "NUM_EXPERTS=4"]
    small = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32}
    sizes += [f"EncoderModelConfig.{name}={size}" for name, size in small.items()]
    load_gin(["runs/switch_encoder.gin"], sizes, unread=UNREAD)
    run = from_gin.plan_run(None)
    meshes = candidates(run, jax.devices(), SLICE.chip.hbm_bytes)
    assert {mesh.expert for mesh in meshes} == {1, 2, 4}
    found = make_plan(run, SLICE, jax.devices(), [MeshConfig(8), MeshConfig(2, expert=4)])
    copied, spread = found.tried
    assert copied.work is not None and spread.work is not None
    # A token's own products, those of the places of all experts (1.25 times the tokens, which are
    # 10 places of each expert for a text), and those that send tokens there and back.
    rows, d, f, e, v, c = 16 * 32, 16, 32, 4, 64, 10
    layer = 2 * rows * (4 * d * d) + 2 * 2 * rows * 32 * d
    plain = layer + 2 * rows * 2 * d * f
    switch = layer + 2 * rows * d * e + 2 * (16 * e * c) * 2 * d * f + 2 * 2 * rows * e * c * d
    head = 2 * 16 * 5 * (d * d + d * v)
    assert copied.work.model_flops * 8 == pytest.approx(3 * (plain + switch + head), rel=0.05)
    experts = 4 * (2 * d * f + d + f) * 4  # bytes
    saved = copied.memory.terms["parameters"] - spread.memory.terms["parameters"]
    assert saved == experts * 3 // 4
    told = as_json(found)
    assert told["experts"] == [
        {"text": "rows", "tokens": 32, "experts": 4, "layers": 1, "places": 10}
    ]
    assert [one["mesh"] for one in told["tried"]] == [
        "data=8 fsdp=1 model=1", "data=2 fsdp=1 expert=4 model=1",
    ]  # fmt: skip
