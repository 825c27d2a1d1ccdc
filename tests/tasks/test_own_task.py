"""The worked example of docs/tasks.md, as it stands there."""

import re
import sys
from pathlib import Path

import pytest

import atlas_jax
from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks import registry
from atlas_jax.tasks.base import Prediction

DOCS = Path(atlas_jax.__file__).parents[1] / "docs" / "tasks.md"


@pytest.fixture
def my_tasks(tmp_path, monkeypatch):
    """The module of the docs on the path; forgotten afterwards."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "TASKS", dict(registry.TASKS))
    yield
    sys.modules.pop("my_tasks", None)


def test_the_worked_example_works(my_tasks, tmp_path):
    gin_file = tmp_path / "language.gin"
    gin_file.write_text("import my_tasks\nLanguageTask.query_format = 'which: {text}'\n")
    load_gin([str(gin_file)])
    task = from_gin.task("language")
    write_jsonl(tmp_path / "x.jsonl", [{"text": "Guten Tag", "language": "German"}])
    (record,) = task.load(tmp_path / "x.jsonl")
    example = task.example(record)
    assert (example.query_text, example.answers) == ("which: Guten Tag", ("German",))
    assert task.evaluate([Prediction(example, "german")]) == {"accuracy": 1.0}


def test_a_name_is_given_once(monkeypatch):
    monkeypatch.setattr(registry, "TASKS", dict(registry.TASKS))

    class Another:
        name = "qa"

    with pytest.raises(UserError, match="a task is called 'qa' already: QATask"):
        registry.register(Another)


def test_every_task_has_a_gin_file_and_a_line_in_the_docs():
    text = DOCS.read_text(encoding="utf-8")
    folder = DOCS.parents[1] / "gin" / "tasks"
    for name in registry.TASKS:
        assert (folder / f"{name}.gin").is_file()
        assert f"`{name}`" in text
