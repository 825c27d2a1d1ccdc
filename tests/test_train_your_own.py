"""README's "Train your own", as it stands, on passages that nobody has prepared."""

import importlib
import json
import random
import shlex
from pathlib import Path

import pytest

from atlas_jax.models.folder import load_expects
from tests.test_docs import ROOT, code

# The package's own `train` is the function of its face.
train = importlib.import_module("atlas_jax.train")
ask = importlib.import_module("atlas_jax.ask")

# What a test may not wait for; everything else is README's.
SMALL = ["--gin.TRAIN_STEPS=2"]


def readme_command(name: str) -> list[str]:
    """The arguments of the first such command of that section."""
    text = (ROOT / "README.md").read_text("utf-8")
    section = text.split("\n## Train your own\n")[1].split("\n## ")[0]
    (line, *_) = [
        line for line in code("README.md") if line.startswith(f"atlas-jax {name} --gin_file")
    ]
    assert f"atlas-jax {name}" in section
    return shlex.split(line)[2:]


def write_corpus(folder: Path, passages: int = 300) -> None:
    """Passages of 20 to 400 words without sections, a third also without a title, and questions."""
    rng = random.Random(0)
    words = "water stone river light music city garden engine letter bridge winter market".split()
    rows, questions = [], []
    for number in range(passages):
        name, use = f"Thing{number}", rng.choice(words)
        length = rng.randint(20, 400) - 5
        text = f"{name} is used for {use}. " + " ".join(rng.choices(words, k=length))
        title = {} if number % 3 == 0 else {"title": name}
        rows.append({"id": str(number), **title, "text": text})
        questions.append({"question": f"What is {name} used for?", "answers": [use]})
    for file, content in (
        ("passages.jsonl", rows), ("train.jsonl", questions[:64]), ("dev.jsonl", questions[64:80])
    ):  # fmt: skip
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.mark.slow
def test_readme_trains_on_any_corpus_and_asks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    (tmp_path / "atlas_jax").symlink_to(ROOT / "atlas_jax")
    arguments = [*readme_command("train"), *SMALL]

    assert (
        train.main([*arguments, "--gin.StoreConfig.retriever_length=192"]) == 2
    )  # refused, with the reason
    error = capsys.readouterr().err
    assert "StoreConfig.retriever_length = 192, but the retriever can read 128 tokens" in error
    assert not (tmp_path / "work").exists()

    assert train.main(arguments) == 0  # and the retry works
    told = capsys.readouterr().err
    assert "the retriever sees the first 64 tokens" in told and "of 300 passages" in told
    expects = load_expects("work/run/final")
    nano = load_expects("atlas_jax/checkpoints/nano")
    assert expects.store == nano.store and expects.text_length == nano.text_length
    assert expects.tasks["cloze"] == nano.tasks["cloze"]
    assert expects.tasks["qa"].query_length == 64
    assert expects.tasks["qa"].wording["target_format"] == "<extra_id_0> {answer}"

    assert (
        ask.main([*readme_command("ask"), "--gin.K=2", "--question=What is Thing7 used for?"]) == 0
    )
    shown = capsys.readouterr().out
    assert "answer: " in shown and "Thing" in shown
