"""Training and evaluation: data, state, step, trainer, checkpoints."""
