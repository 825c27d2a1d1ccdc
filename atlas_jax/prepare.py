"""Entry point `python -m atlas_jax.prepare`: published data sets into the project's files.

    python -m atlas_jax.prepare nq --source downloads/nq --out data/nq

It downloads nothing: without the files it tells where they are published. An interrupted
run goes on where it was. Files named in SOURCE/SHA256SUMS, or in the file of --checksums (as
`sha256sum` writes it), have to have that SHA-256; OUT/prepared.json notes those of what was
read and written. `--gin.RowsConfig.skip_broken=True` leaves broken rows out.

Passages can be cleaned, and freed of duplicates and of what gives evaluation questions away:
`--gin.PassagesConfig.clean=True`, `--gin.PassagesConfig.min_words=20`,
`--gin.PassagesConfig.deduplicate=True`, `--gin.LeakConfig.files=test.jsonl`.

With --runner passages are made by an Apache Beam pipeline (extra [beam]), on one machine or many.
SOURCE is then a folder, or files and patterns with commas between them; what follows after `--` are
Beam's own options:

    python -m atlas_jax.prepare wikipedia --source 'gs://b/psgs/*.tsv' --out gs://b/passages \\
      --runner DataflowRunner -- --project=p --region=us-west4 --temp_location=gs://b/temp
"""

import argparse
import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from atlas_jax import from_gin
from atlas_jax.answering.leaks import LeakConfig, LeakFilter
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.datasets.checksums import read_notes
from atlas_jax.datasets.convert import prepare
from atlas_jax.datasets.passage_rules import PassageRules, PassagesConfig
from atlas_jax.datasets.registry import DATASETS, get_dataset

_OF_REMOVE_LEAKS = ("passages", "output", "report")  # fields that only that command has


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the named data set; 0 when done, 2 on bad input."""
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    names = "\n".join(f"  {one.name:<15}{one.about}" for one in DATASETS.values())
    parser = argparse.ArgumentParser(
        prog="atlas-jax prepare",
        usage="atlas-jax prepare NAME [flags] [-- BEAM'S OPTIONS]",
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
    beam = parser.add_argument_group("Apache Beam")
    beam.add_argument(
        "--runner", default="", metavar="NAME", help="DirectRunner, DataflowRunner, FlinkRunner ..."
    )
    beam.add_argument(
        "--shards", type=int, default=0, metavar="N", help="files to write; as the runner likes"
    )
    return launch(functools.partial(_run, given[end + 1 :]), parser, given[:end])


def _run(beam_options: Sequence[str], flags: argparse.Namespace) -> None:
    if flags.runner:
        _by_beam([f"--runner={flags.runner}", *beam_options], flags)
        return
    if beam_options or flags.shards:
        raise UserError("--shards and options after -- are Beam's; they need --runner")
    dataset = get_dataset(flags.dataset)
    counts = prepare(
        dataset,
        flags.source,
        flags.out,
        flags.sample,
        flags.checksums,
        from_gin.told(RowsConfig),
        _rules(),
    )
    notes = read_notes(Path(flags.out))
    published = {part.output: part.rows for part in dataset.parts}
    for name, count in counts.items():
        told = "already there" if count < 0 else f"{count:,} rows, sha256 {notes[name]['sha256']}"
        if count >= 0 and published[name] is None:
            told += "; not counted: no published number is known"
        print(f"{flags.out}/{name}: {told}")


def _by_beam(options: Sequence[str], flags: argparse.Namespace) -> None:
    if flags.checksums:
        raise UserError("--checksums reads every file on one machine; leave it out with --runner")
    if flags.shards < 0:
        raise UserError(f"--shards = {flags.shards}: expected 0 (as the runner likes) or more")
    try:
        from atlas_jax.datasets.beam_pipeline import prepare_by_beam
    except ImportError as error:
        raise UserError(f"--runner: {error}; it needs the extra [beam]") from error
    count = prepare_by_beam(
        get_dataset(flags.dataset),
        flags.source,
        flags.out,
        options,
        flags.sample,
        from_gin.told(RowsConfig),
        _rules(),
        flags.shards,
    )
    print(f"{flags.out}: {'already there' if count < 0 else f'{count:,} passages'}")


def _rules() -> PassageRules:
    """What is done with passages.

    Raises:
      UserError: a field of LeakConfig is bound that `prepare` does not have.
    """
    config, leaks = from_gin.told(PassagesConfig), from_gin.told(LeakConfig)
    for name in _OF_REMOVE_LEAKS:
        if getattr(leaks, name):
            raise UserError(f"LeakConfig.{name} is for remove_leaks; prepare writes into --out")
    if not leaks.files:
        return PassageRules(config)
    test = LeakFilter.of(leaks, from_gin.task(leaks.task), from_gin.told(RowsConfig))
    asked = hashlib.sha256(repr(test.asked).encode("utf-8", "surrogatepass")).hexdigest()
    return PassageRules(config, test, f"{leaks!r}, questions {asked[:12]}")


if __name__ == "__main__":
    sys.exit(main())
