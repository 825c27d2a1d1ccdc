"""Runs of `pretrain_encoder` from a gin file, on a few texts, for the tests of its objectives."""

from collections.abc import Sequence
from pathlib import Path

from atlas_jax import pretrain_encoder as command
from atlas_jax.training.metrics import read_metrics

SIZES = {"hidden_dim": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 16}


def check_ten_steps_and_a_killed_run(
    texts: Path, name: str, more: Sequence[str], learnt: str, always: str
) -> list[Path]:
    """Ten steps in one run, and in two of which the second goes on: the same encoder, which learns.

    Args:
      texts: folder with passages.jsonl and tokenizer.json.
      name: of the folders that are made.
      more: gin files and bindings of the run.
      learnt, always: metrics: the loss that falls, and one that each step has.

    Returns:
      The folders of both.
    """
    folders, found = [], []
    for part, stops in (("whole", (10,)), ("parts", (6, 10))):
        folders.append(folder := texts / f"{name}_{part}")
        for steps in stops:
            bindings = {
                "MODEL_DIR": folder, "PASSAGES": texts / "passages.jsonl",
                "TOKENIZER": texts / "tokenizer.json", "TRAIN_STEPS": steps, "WARMUP_STEPS": 0,
                "BATCH_SIZE": 8, "LENGTH": 20, "VOCAB_SIZE": 57, "CHECKPOINT_EVERY": 6,
                "LEARNING_RATE": 1e-2, "encoder/OptimizerConfig.schedule": "'constant'",
                "EncoderTrainConfig.log_every": 1,
                **{f"EncoderModelConfig.{field}": size for field, size in SIZES.items()},
            }  # fmt: skip
            flags = [f"--gin.{binding}={value}" for binding, value in bindings.items()]
            assert command.main([*more, *flags]) == 0
        found.append((folder / "final" / "encoder.safetensors").read_bytes())
        rows = [row for row in read_metrics(folder) if always in row]
        assert len(rows) == 10 and rows[-1][learnt] < rows[0][learnt]
    assert found[0] == found[1]
    return folders
