"""What README and docs tell to type is there: commands, macros, bindings."""

import importlib
import re
import shlex
import string
from pathlib import Path

import pytest

import atlas_jax
from atlas_jax import cli, from_gin
from atlas_jax.answering.config import EvalConfig
from atlas_jax.core.config import load_gin
from atlas_jax.index.scann_index import ScannConfig
from atlas_jax.training.config import StepConfig, TrainConfig

ROOT = Path(atlas_jax.__file__).parents[1]
PAGES = ("README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md"))))
WITH_GIN = ("train", "evaluate", "build_index", "retrieve", "ask", "train_retriever",
            "pretrain_encoder", "train_tokenizer", "train_classifier", "self_train", "pet",
            "remove_leaks",
            "serve")  # fmt: skip


def commands(page: str) -> list[tuple[str, list[str]]]:
    """The commands of a page's code that take gin: name and arguments, variables filled in."""
    variables = {"task": "mlm"}
    found: list[tuple[str, list[str]]] = []
    for file in ("docs/tasks.md", page):  # other pages refer to its variables
        found.clear()
        for line in code(file):
            line = string.Template(line).safe_substitute(variables)
            told = re.match(r"atlas-jax (\w+) ", line)
            if told and told[1] in WITH_GIN and ("--gin" in line or line.endswith("...")):
                found.append((told[1], shlex.split(line, comments=True)))
            elif re.match(r"(export )?[A-Z]+=", line):
                pairs = shlex.split(line.removeprefix("export "), comments=True)
                variables.update(pair.split("=", 1) for pair in pairs)
    return found


def code(page: str) -> list[str]:
    """The indented lines of a page, those joined that a backslash joins."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.strip() for line in lines if line.startswith("    ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_a_command_is_complete_or_ends_with_dots(page: str) -> None:
    for name, arguments in commands(page):
        importlib.import_module(f"atlas_jax.{name}")
        if arguments[-1] == "...":
            continue
        files = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file=")]
        if any(file.startswith("work/") for file in files):  # what a run leaves
            continue
        bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
        load_gin(files, bindings)  # names what is missing


def test_the_commands_of_every_kind_are_found() -> None:
    names = {name for page in PAGES for name, _ in commands(page)}
    assert names == set(WITH_GIN)


def test_the_readme_lists_every_command() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Commands\n")[1]
    listed = re.findall(r"^    atlas-jax (\w+) {2,}\S", section, re.MULTILINE)
    assert listed == list(cli.COMMANDS)


@pytest.mark.parametrize(
    ("flags", "passages", "training"),
    [
        ([], "index", "query_side"),
        (["PASSAGE_SOURCE='none'", "RETRIEVER_TRAINING=fixed"], "none", "fixed"),
        (["PASSAGE_SOURCE=file", "RETRIEVER_TRAINING=joint"], "file", "joint"),
    ],
)
def test_the_modes_are_selected_as_the_table_has_it(
    flags: list[str], passages: str, training: str
) -> None:
    needed = ["MODEL_DIR=run", "INITIAL_CHECKPOINT_PATH=model", "TRAIN_FILE=train.jsonl"]
    load_gin(["runs/finetune_qa.gin"], [*needed, "STORE=store", "TRAIN_STEPS=1", *flags])
    assert from_gin.told(TrainConfig).passages == from_gin.told(EvalConfig).passages == passages
    assert from_gin.told(StepConfig).retriever_training == training


def test_the_table_of_scann_has_its_defaults() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert f"below {ScannConfig().hash_from:,} (`hash_from`)" in page
    assert f"from {ScannConfig().tree_from:,} on (`tree_from`)" in page
