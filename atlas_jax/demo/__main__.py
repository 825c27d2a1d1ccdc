"""`python -m atlas_jax.demo`: see `run`."""

import sys

from atlas_jax.demo.run import main

if __name__ == "__main__":
    sys.exit(main())
