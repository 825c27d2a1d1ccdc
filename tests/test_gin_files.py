"""Every gin file parses, its header tells the truth, and its model passes eval_shape."""

import functools
import importlib
import json
import re
from pathlib import Path

import gin
import jax
import pytest

import atlas_jax
from atlas_jax import from_gin
from atlas_jax.core.config import gin_folder, load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.models.parameters import Models, abstract_params
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.config import CheckpointConfig, TrainConfig
from benchmarks.plan_table import ROW_LIST, ROWS

# Their imports register every configurable a gin file may bind.
ENTRY_POINTS = (
    "train", "evaluate", "build_index", "retrieve", "ask", "serve", "train_retriever",
    "pretrain_encoder", "train_tokenizer", "train_classifier", "self_train", "pet",
    "remove_leaks",
)  # fmt: skip
for _name in ENTRY_POINTS:
    importlib.import_module(f"atlas_jax.{_name}")

FOLDER = gin_folder()
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.gin"))
RUNS = [name for name in FILES if name.startswith("runs/")]
MODELS = ("nano", "mini", "small", "base", "large", "xl", "xxl")
HEADER = ("Requires:", "Data:", "Mesh:")
# Recipes of the paper, by how their names begin; those that vary one are not among them.
RECIPES = (
    "mlm_pretrain", "lm_", "section_", "nq_", "triviaqa_", "fever_", "mmlu_", "kilt_", "templama",
)  # fmt: skip
VARIED = ("runs/mlm_pretrain_rolling.gin",)


def header(name: str) -> dict[str, str]:
    """The fields of the comment at the top of a gin file; a field may go over several lines."""
    comment = re.match(r"(?:#.*\n)+", (FOLDER / name).read_text(encoding="utf-8"))
    assert comment is not None, f"{name} has no header"
    fields: dict[str, str] = {}
    key = "about"
    for line in comment[0].splitlines():
        text = line.removeprefix("#").strip()
        found = re.match(r"([A-Z][a-z]+:)\s*(.*)", text)
        if found:
            key, text = found[1], found[2]
        fields[key] = f"{fields.get(key, '')} {text}".strip()
    return fields


def required(name: str) -> list[str]:
    """The macros that a header says are required."""
    return re.findall(r"\b[A-Z][A-Z_]+\b", header(name)["Requires:"])


def dummy(macro: str) -> str:
    return f"{macro}={'30' if macro.endswith('_STEPS') else 'some/' + macro.lower()}"


def load(name: str, without: str = "") -> None:
    load_gin([name], [dummy(macro) for macro in required(name) if macro != without])


@pytest.mark.parametrize(
    "name",
    [
        "runs/mini_pretrain.gin",
        "runs/mini_titles.gin",
        "runs/mini_titles_found.gin",
        "runs/mini_64shot.gin",
    ],
)
def test_the_mini_runs_read_whole_passages_of_the_store(name):
    load(name)
    lengths = {
        key: gin.query_parameter(f"%{key}")
        for key in ("QUERY_LENGTH", "PASSAGE_LENGTH", "TEXT_LENGTH")
    }
    # two blocks, each with its start and end token
    assert lengths["TEXT_LENGTH"] == lengths["QUERY_LENGTH"] + lengths["PASSAGE_LENGTH"] + 4


@pytest.mark.parametrize("name", FILES)
def test_a_header_names_the_file_its_macros_data_and_mesh(name):
    fields = header(name)
    assert fields["about"].startswith(f"{Path(name).stem}: ") or fields["about"].startswith(
        f"{Path(name).stem}, "
    )
    assert all(fields.get(key) for key in HEADER), f"{name}: the header lacks one of {HEADER}"


@pytest.mark.parametrize(
    "name", [n for n in RUNS if Path(n).stem.startswith(RECIPES) and n not in VARIED]
)
def test_a_recipe_of_the_paper_says_what_the_paper_reports(name):
    told = re.search(r"The paper\b(.*)", " ".join(header(name).values()))
    assert told, f"{name}: the header says nothing of the paper"
    assert re.search(r"\b\d\d\.\d\b", told[1]), f"{name}: no figure of the paper's in {told[0]!r}"


@pytest.mark.parametrize("model", ["base", "large", "xl", "xxl"])
def test_a_models_header_names_the_smallest_slices_of_the_plan_table(model):
    rows, smallest = json.loads(ROWS.read_text()), {}
    for row in ROW_LIST:
        fits = row.name in rows and rows[row.name]["plan"]["programs"][0]["fits"]
        if fits and (row.model, row.recipe, row.index) == (model, "nq_64shot", "bfloat16"):
            found = smallest.setdefault(row.slice.chip.name, row.slice)
            smallest[row.slice.chip.name] = min(found, row.slice, key=lambda one: one.chips)
    mesh = header(f"models/{model}.gin")["Mesh:"]
    told = re.search(r"smallest slices for runs/nq_64shot.gin.*", mesh)
    assert told is not None
    assert sorted(re.findall(r"v\d\w?-\d+", told[0])) == sorted(s.name for s in smallest.values())


@pytest.mark.parametrize("name", FILES)
def test_a_file_parses_with_the_macros_its_header_requires(name):
    load(name)


@pytest.mark.parametrize(("name", "macro"), [(n, m) for n in FILES for m in required(n)])
def test_a_required_macro_is_missed_by_name(name, macro):
    with pytest.raises(UserError, match=rf"\b{macro} \(required by .*{name}:\d+\)|{macro} \("):
        load(name, without=macro)


# They take a few minutes at most, and are begun anew.
UNSAVED = ("demo_", "small_squad_64shot")
FINE_TUNING = (
    "finetune_qa", "nq_", "triviaqa_", "fever_", "mmlu_5", "mmlu_full", "mmlu_multi", "kilt_",
    "templama", "demo_64shot", "demo_read", "demo_task", "small_squad",
)  # fmt: skip


@pytest.mark.parametrize("name", [n for n in RUNS if Path(n).stem.startswith(FINE_TUNING)])
def test_a_killed_fine_tuning_run_has_a_checkpoint_to_go_on_from(name):
    load(name)
    every, steps = from_gin.told(CheckpointConfig).every, from_gin.told(TrainConfig).total_steps
    if Path(name).stem.startswith(UNSAVED):
        assert every == 0
    else:
        assert 0 < every < steps
        assert steps / every <= 100  # a checkpoint of 11B parameters takes its time


@functools.cache
def configurables() -> dict[str, type]:
    return {name.split(".")[-1]: item.wrapped for name, item in gin.config._REGISTRY.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_config_that_a_file_binds_can_be_built(name):
    load(name)
    bound = {(scope, selector.split(".")[-1]) for scope, selector in gin.config._CONFIG}
    for scope, selector in sorted(bound):
        config = configurables()[selector]
        if isinstance(config, type):  # not a macro or a function
            from_gin.told(config, scope)


@functools.cache
def counts(reader: ReaderConfig, retriever: RetrieverConfig) -> tuple[int, int]:
    """Parameters of both models by eval_shape, which runs every layer without its numbers."""
    params = abstract_params(Models(T5(reader), DualEncoder(retriever)))
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in ("reader", "retriever")
    ]
    return sizes[0], sizes[1]


def counts_of(*bindings: str, files: tuple[str, ...]) -> tuple[int, int]:
    load_gin(files, bindings)
    return counts(from_gin.told(ReaderConfig), from_gin.told(RetrieverConfig))


# Those of base and larger are the counts of the published T5 1.1 and BERT-base (without its
# pooler) checkpoints.
COUNTS = {
    "small": (37_368_192, 17_136_384),
    "base": (247_577_856, 108_891_648),
    "large": (783_150_080, 108_891_648),
    "xl": (2_849_757_184, 108_891_648),
    "xxl": (11_135_332_352, 108_891_648),
}


@pytest.mark.parametrize("size", COUNTS)
def test_a_model_has_the_parameters_of_its_size(size):
    assert counts_of(files=(f"models/{size}.gin",)) == COUNTS[size]


def test_nano_fits_a_laptop():
    assert 5e6 < sum(counts_of(files=("models/nano.gin",))) < 15e6


@pytest.mark.parametrize("scan", [True, False])
def test_a_models_size_does_not_depend_on_scanning_its_layers(scan):
    binding = f"ReaderConfig.scan_layers={scan}"
    assert counts_of(binding, files=("models/base.gin",)) == COUNTS["base"]


@pytest.mark.parametrize("run", [name for name in RUNS if "tokenizer" not in name])
def test_a_runs_model_passes_eval_shape(run):
    size = next((m for m in MODELS if m in run), "xxl")
    bindings = [dummy(macro) for macro in required(run)]
    assert counts_of(*bindings, files=(f"models/{size}.gin", run))[0] > 1e6


def test_the_sizes_are_those_promised():
    assert {Path(name).stem for name in FILES if name.startswith("models/")} == set(MODELS)


def test_gin_holds_no_python():
    """A Python file would make gin/ a package that hides gin-config."""
    others = [path.name for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".gin"]
    assert others == []


def test_an_installation_carries_every_folder():
    text = (Path(atlas_jax.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for folder in {Path(name).parent.as_posix() for name in FILES}:
        below = "" if folder == "." else f"/{folder}"
        assert f'"share/atlas-jax/gin{below}" = ["gin{below}/*.gin"]' in text
