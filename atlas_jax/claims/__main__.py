"""`python -m atlas_jax.claims`: see `run`."""

import sys

from atlas_jax.claims.run import main

if __name__ == "__main__":
    sys.exit(main())
