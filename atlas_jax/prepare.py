"""Entry point `python -m atlas_jax.prepare`: published data sets into the project's files.

    python -m atlas_jax.prepare nq --source downloads/nq --out data/nq

It downloads nothing: without the files it tells where they are published. An interrupted
run goes on where it was. `--gin.RowsConfig.skip_broken=True` leaves broken rows out.
"""

import argparse
import sys
from collections.abc import Sequence

from atlas_jax.core.config import launch
from atlas_jax.datasets.convert import prepare
from atlas_jax.datasets.registry import DATASETS, get_dataset


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the named data set; 0 when done, 2 on bad input."""
    names = "\n".join(f"  {one.name:<15}{one.about}" for one in DATASETS.values())
    parser = argparse.ArgumentParser(
        prog="atlas-jax prepare",
        description=f"{__doc__}\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="one of the names above")
    parser.add_argument("--source", default=".", metavar="DIR", help="where the downloads lie")
    parser.add_argument("--out", default=".", metavar="DIR", help="folder to write into")
    parser.add_argument(
        "--sample", action="store_true", help="the downloads are parts: do not count their rows"
    )
    return launch(_run, parser, argv)


def _run(flags: argparse.Namespace) -> None:
    counts = prepare(get_dataset(flags.dataset), flags.source, flags.out, flags.sample)
    for name, count in counts.items():
        told = "already there" if count < 0 else f"{count:,} rows"
        print(f"{flags.out}/{name}: {told}")


if __name__ == "__main__":
    sys.exit(main())
