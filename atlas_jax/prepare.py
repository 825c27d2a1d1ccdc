"""Entry point `python -m atlas_jax.prepare`: published data sets into the project's files.

    python -m atlas_jax.prepare nq --source downloads/nq --out data/nq

It downloads nothing: without the files it tells where they are published. An interrupted
run goes on where it was. Files named in SOURCE/SHA256SUMS, or in the file of --checksums (as
`sha256sum` writes it), have to have that SHA-256; OUT/prepared.json notes those of what was
read and written. `--gin.RowsConfig.skip_broken=True` leaves broken rows out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from atlas_jax import from_gin
from atlas_jax.core.config import launch
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.datasets.checksums import read_notes
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
    parser.add_argument(
        "--checksums", default="", metavar="FILE", help="SHA-256 of published files to verify"
    )
    return launch(_run, parser, argv)


def _run(flags: argparse.Namespace) -> None:
    dataset = get_dataset(flags.dataset)
    counts = prepare(
        dataset,
        flags.source,
        flags.out,
        flags.sample,
        flags.checksums,
        from_gin.told(RowsConfig),
    )
    notes = read_notes(Path(flags.out))
    published = {part.output: part.rows for part in dataset.parts}
    for name, count in counts.items():
        told = "already there" if count < 0 else f"{count:,} rows, sha256 {notes[name]['sha256']}"
        if count >= 0 and published[name] is None:
            told += "; not counted: no published number is known"
        print(f"{flags.out}/{name}: {told}")


if __name__ == "__main__":
    sys.exit(main())
