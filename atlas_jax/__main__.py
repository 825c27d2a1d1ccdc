"""`python -m atlas_jax` is `atlas-jax`."""

from atlas_jax.cli import console_script

if __name__ == "__main__":
    console_script()
