"""The page about Cloud TPU: its commands are taken as they stand, and its run fits its slice."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gin
import pytest

import atlas_jax.build_index
import atlas_jax.train  # noqa: F401 (for gin)
from atlas_jax.core.config import load_gin
from atlas_jax.plan import UNREAD
from atlas_jax.training.chips import GIB, parse_slice
from benchmarks.plan_table import PASSAGES, ROW_LIST, ROWS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tpu.md").read_text()
# Bindings that no program depends on.
OUTSIDE = (*UNREAD, "EVAL_FILE", "CHECKPOINT_EVERY", "CompilerConfig.cache")
# What the page calls and this machine has not, and what would call it on the other side.
STUBS = """
set -eu
cd {root}
tell() {{ echo "$*" >> {calls}; }}
gcloud() {{ tell gcloud "$@"; }}
sleep() {{ :; }}
atlas-jax() {{ tell atlas-jax "$@"; }}
export DRY_RUN=1
"""


def blocks() -> list[str]:
    """The commands of the numbered sections, in order; what a program answers is left out."""
    steps = re.search(r"\n## 1\..*?\n## (?!\d)", PAGE, re.DOTALL)
    assert steps is not None
    found = re.findall(r"(?:^    .*\n)+", steps[0], re.MULTILINE)
    return [block for block in found if not block.lstrip().startswith("doctor:")]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What the page's commands call, run one after the other in a shell; scripts print theirs."""
    told = tmp_path_factory.mktemp("page") / "calls"
    script = STUBS.format(root=shlex.quote(str(ROOT)), calls=shlex.quote(str(told)))
    done = subprocess.run(
        ["bash", "-c", script + "".join(blocks())],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in (told.read_text() + done.stdout).splitlines()]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    gin.clear_config()


def words_of(calls: list[list[str]], command: str) -> list[str]:
    """What follows `atlas-jax COMMAND`, here or on the hosts; each time the same."""
    found = {
        tuple(call[call.index(command) + 1 :])
        for call in calls
        if command in call[1:2] and call[0].endswith("atlas-jax")
    }
    assert len(found) == 1, found
    return [word for word in found.pop() if word != "&"]


def gin_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Files and bindings."""
    files = [word.removeprefix("--gin_file=") for word in words if word.startswith("--gin_file=")]
    return files, [word.removeprefix("--gin.") for word in words if word.startswith("--gin.")]


def slice_types(calls: list[list[str]], name: str) -> set[str]:
    return {
        word.removeprefix("--accelerator-type=")
        for call in calls
        for word in call
        if call[4:6] == ["create", name] and word.startswith("--accelerator-type=")
    }


def flag(words: list[str], name: str) -> str:
    return next(word for word in words if word.startswith(f"--{name}=")).split("=", 1)[1]


def test_plan_doctor_and_training_are_given_the_same_run(calls: list[list[str]]) -> None:
    run = gin_words(words_of(calls, "train"))
    assert gin_words(words_of(calls, "doctor")) == run
    assert gin_words(words_of(calls, "plan")) == run


def test_the_run_is_a_row_of_the_plan_table_that_fits(calls: list[list[str]]) -> None:
    plan = words_of(calls, "plan")
    where = parse_slice(flag(plan, "topology"))
    (kind,) = slice_types(calls, "atlas")  # create.sh and resume.sh ask for the same
    assert parse_slice(kind) == where
    files, bindings = gin_words(words_of(calls, "train"))
    outside = [one for one in bindings if one.split("=")[0] in OUTSIDE]
    load_gin(files, bindings)
    mine = gin.config_str()
    rows, fits = json.loads(ROWS.read_text()), {}
    for row in ROW_LIST:
        planned = row.name in rows and rows[row.name]["plan"]["programs"][0]["fits"]
        if planned and (row.where, row.mesh) == (where.name, flag(plan, "mesh")):
            load_gin([*row.files, files[-1]], [*row.bindings, *outside])
            fits[gin.config_str()] = rows[row.name]["plan"]
    assert mine in fits, f"not one of the {len(fits)} rows on this mesh that fit"
    found = fits[mine]
    assert found["passages"] == PASSAGES == int(flag(plan, "passages"))
    peak = found["programs"][0]["peak_bytes_per_chip"] / GIB
    allowed = found["hbm_bytes_per_chip"] / GIB
    assert f"takes {peak:.2f} of {allowed:.2f} GiB" in " ".join(PAGE.split())


def test_the_mesh_of_the_run_is_the_one_that_is_planned(calls: list[list[str]]) -> None:
    plan = words_of(calls, "plan")
    load_gin(*gin_words(words_of(calls, "train")))
    chips = parse_slice(flag(plan, "topology")).chips
    sizes = [gin.query_parameter(f"MeshConfig.{axis}") for axis in ("data", "fsdp", "model")]
    rest = chips // abs(sizes[0] * sizes[1] * sizes[2])
    assert ",".join(str(rest if size == -1 else size) for size in sizes) == flag(plan, "mesh")


def test_the_page_gives_up_when_resume_does() -> None:
    script = (ROOT / "tpu_scripts" / "resume.sh").read_text()
    default = re.search(r"^FAILURES=(\d+)$", script, re.MULTILINE)
    assert default is not None and f"(default {default[1]})" in script
    word = ("first", "second", "third", "fourth", "fifth")[int(default[1]) - 1]
    assert f"gives up at the {word} in a row (`--failures`)" in PAGE


def test_store_and_index_are_built_as_the_run_reads_them(calls: list[list[str]]) -> None:
    files, bindings = gin_words(words_of(calls, "train"))
    load_gin(files, bindings)
    length = gin.query_parameter("%PASSAGE_LENGTH")
    dtype = gin.query_parameter("CorpusConfig.dtype")
    checkpoint = gin.query_parameter("%INITIAL_CHECKPOINT_PATH")
    built_files, built = gin_words(words_of(calls, "build_index"))
    load_gin(built_files, built)
    assert gin.query_parameter("%PASSAGE_LENGTH") == length
    assert gin.query_parameter("%INDEX_DTYPE") == dtype
    assert gin.query_parameter("%INITIAL_CHECKPOINT_PATH") == checkpoint
    (kind,) = slice_types(calls, "builder")
    assert parse_slice(kind).chips <= 8
    for name in ("STORE", "INDEX"):  # made where the run reads it
        places = [
            [one for one in words if one.startswith(f"{name}=")] for words in (built, bindings)
        ]
        assert places[0] == places[1] and places[0][0].startswith(f"{name}=gs://")
