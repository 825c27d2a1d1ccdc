"""The model that is shipped: whole, small, quick to load, and with a card."""

import re
import shutil
import time
from pathlib import Path

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.models.folder import load_model
from tests.nano import NANO

ROOT = NANO.parents[2]
HASHED = [f"{part}{end}" for part in ("reader", "retriever")
          for end in (".safetensors", "_tokenizer.json")]  # fmt: skip


def test_it_loads_quickly_and_is_small() -> None:
    start = time.process_time()
    parts = load_model(NANO)
    assert time.process_time() - start < 2  # seconds; a tenth of one is usual
    assert set(parts) == {"reader", "retriever"}
    assert sum(file.stat().st_size for file in NANO.iterdir()) < 25e6


@pytest.mark.parametrize("name", HASHED)
def test_a_changed_file_of_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(NANO, tmp_path / "nano"))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not the file that was saved: its SHA-256 is"):
        load_model(folder)


def test_its_card_says_what_a_card_has_to_say() -> None:
    text = (NANO / "README.md").read_text("utf-8")
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    for field in ("language: en", "license: apache-2.0", "library_name: atlas-jax"):
        assert field in front.splitlines()
    for topic in ("Data", "Use", "Figures", "Limits", "Licence"):
        assert f"**{topic}.**" in body
    for target in re.findall(r"`(docs/[^`]+)`", body):
        assert (ROOT / target).is_file()
    figures = re.findall(r"\d+\.\d ± \d\.\d", body)
    report = (ROOT / "docs" / "nano.md").read_text("utf-8")
    [mean] = [line for line in report.splitlines() if line.startswith("| mean ± standard")]
    assert figures and figures == re.findall(r"\d+\.\d ± \d\.\d", mean)
    for run in re.findall(r"`(nano_\w+)`", body):
        assert (ROOT / "gin" / "runs" / f"{run}.gin").is_file()
