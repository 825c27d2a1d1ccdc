"""Where folders may be made, what a kill leaves, and one process at a time."""

import multiprocessing
import os
from pathlib import Path

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.locks import locked
from atlas_jax.core.whole import whole_folder


def fill(directory):
    with whole_folder(directory) as folder:
        (folder / "manifest.json").write_text("{}")
        (folder / "tokens").write_text("1")


def test_a_directory_behind_a_link_is_made_where_the_link_leads(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "store").symlink_to("big")
    fill(tmp_path / "store")
    assert (tmp_path / "store").is_symlink()
    assert sorted(os.listdir(tmp_path / "big")) == ["manifest.json", "tokens"]
    assert sorted(os.listdir(tmp_path)) == ["big", "store"]


def test_a_directory_behind_a_link_to_nothing_is_made_there(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to("disk/store")
    fill(tmp_path / "store")
    assert sorted(os.listdir(tmp_path / "disk" / "store")) == ["manifest.json", "tokens"]


def test_the_present_folder_and_an_empty_one_are_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(".")
    assert sorted(os.listdir()) == ["manifest.json", "tokens"]
    with pytest.raises(UserError, match="exists already"):
        fill(".")
    # An empty folder keeps its place on the disk, as a mount point has to.
    Path("empty").mkdir()
    before = Path("empty").stat().st_ino
    fill("empty")
    assert Path("empty").stat().st_ino == before


def test_what_a_kill_left_is_cleared_away(tmp_path):
    for place in (tmp_path, tmp_path / "store"):
        (place / ".store.partial").mkdir(parents=True)
        (place / ".store.partial" / "old").write_text("")
        (place / ".store.lock").write_text("999999")
    fill(tmp_path / "store")
    assert sorted(os.listdir(tmp_path / "store")) == ["manifest.json", "tokens"]


def _hold(path, begun, end):
    with locked(Path(path), "it"):
        begun.set()
        end.wait(30)


def test_one_process_at_a_time_makes_a_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    begun, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / ".store.lock"), begun, end))
    other.start()
    try:
        assert begun.wait(60)
        (tmp_path / ".store.partial").mkdir()
        with pytest.raises(UserError, match=f"is being written by another process .{other.pid}."):
            fill(tmp_path / "store")
        assert (tmp_path / ".store.partial").is_dir()  # the other one's
    finally:
        end.set()
        other.join(30)
    fill(tmp_path / "store")
    assert os.listdir(tmp_path) == ["store"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "store"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_folder_gives_way_at_the_end_and_not_before(tmp_path):
    fill(tmp_path / "model")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "model", replace=True):
        raise ZeroDivisionError
    assert sorted(os.listdir(tmp_path / "model")) == ["manifest.json", "tokens"]
    with whole_folder(tmp_path / "model", replace=True) as folder:
        (folder / "new").write_text("")
        assert (tmp_path / "model" / "tokens").exists()
    assert os.listdir(tmp_path / "model") == ["new"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    fill(tmp_path / ".model.old")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "model", replace=True):
        raise ZeroDivisionError
    assert sorted(os.listdir(tmp_path / "model")) == ["manifest.json", "tokens"]
    assert os.listdir(tmp_path) == ["model"]
