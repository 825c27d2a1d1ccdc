"""Entry point `python -m atlas_jax.doctor`: do the hosts of a run fit together?

    python -m atlas_jax.doctor --gin_file=runs/nq_64shot.gin --gin.MODEL_DIR=... ...

takes the flags of `train`, on every host, and compiles nothing. It meets the other hosts at the
coordinator's port, compares code, packages, configuration, environment and devices, looks for the
run's files, writes to MODEL_DIR, and names the host that is missing or differs. Exit code 0: they
fit; 1: they do not.
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.core import multihost
from atlas_jax.core.config import launch
from atlas_jax.planning.doctor import clear, examine
from atlas_jax.planning.roll_call import roll_call


def main(argv: Sequence[str] | None = None) -> int:
    """Examine the hosts; 0 when they fit together, 1 when not, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for the other hosts, and for their reports (default 60)",
    )
    multihost.add_flags(parser)
    return launch(_run, parser, argv)


def _run(flags: argparse.Namespace) -> int:
    told = from_gin.train_run()  # refuses a slip before anyone is waited for
    clear(told.train)
    others = multihost.expected(flags, flags.timeout)
    absent = roll_call(*others, flags.timeout) if others else []
    for fault in absent:
        print(f"doctor: {fault}", file=sys.stderr)
    if absent:
        return 1
    multihost.start(flags)
    return examine(told, flags.timeout)


if __name__ == "__main__":
    sys.exit(main())
