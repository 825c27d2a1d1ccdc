"""`build_index`, killed on the way and started again, writes the bytes of an undisturbed build."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.index.index_files import index_bytes
from tests.training.runs import write_lines, write_run

ROOT, PASSAGES, WINDOW = Path(__file__).parents[1], 608, 16
# The command as it is, but for the size of a window and a pause before each.
CHILD = """
import sys, time
from atlas_jax.build_index import main as build_index_main
from atlas_jax.index import embed
embed.WINDOW, batches = int(sys.argv[1]), embed._batches
def slowly(*chunks):
    time.sleep(float(sys.argv[2]))
    yield from batches(*chunks)
embed._batches = slowly
sys.exit(build_index_main(sys.argv[3:]))
"""


def start(folder: Path, index: str, dtype: str, cores: int, pause: float) -> subprocess.Popen[str]:
    bindings = [
        f"CompilerConfig.cores={cores}",
        f"CorpusConfig.passages='{folder / 'many.jsonl'}'",
        f"CorpusConfig.store='{folder / 'many'}'",
        f"CorpusConfig.index='{folder / index}'",
        f"CorpusConfig.dtype='{dtype}'",
    ]
    flags = [f"--gin_file={folder / 'run.gin'}", *(f"--gin.{binding}" for binding in bindings)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(WINDOW), str(pause), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it prints on stderr, where its progress is."""
    told, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert told.endswith(f"{PASSAGES} passages\n")
    return errors


def rows_kept(index: Path) -> int:
    """Of an unfinished index; 0 where there is none. A chunk of int8 has its scales beside it."""
    if not (index / ".index.json.unfinished").exists():
        return 0
    arrays = [path for path in index.glob("*/*") if path.is_dir()]
    files = ([one for one in path.glob("c/**/*") if one.name.isdigit()] for path in arrays)
    return WINDOW * min((sum(one.is_file() for one in of_one) for of_one in files), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, cores", [("bfloat16", 0), ("bfloat16", 1), ("int8", 0)])
def test_a_killed_build_goes_on_to_the_same_bytes(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    dtype: str,
    cores: int,
) -> None:
    write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    texts = [{"id": str(i), "title": "T", "text": "word " * (1 + i % 9)} for i in range(PASSAGES)]
    write_lines(tmp_path / "many.jsonl", texts)
    finish(start(tmp_path, "whole", dtype, cores, 0))

    index, kept = tmp_path / "killed", 0
    for least in (2 * WINDOW, 10 * WINDOW):  # killed twice
        process = start(tmp_path, "killed", dtype, cores, 0.2)
        while rows_kept(index) < least and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        assert kept < least <= (kept := rows_kept(index)) < PASSAGES
        assert not (index / "index.json").exists()
    # The last build tells the rows that are kept before it begins.
    assert f"embed: {kept} of {PASSAGES}, 0 s\n" in finish(
        start(tmp_path, "killed", dtype, cores, 0)
    )
    assert rows_kept(index) == 0
    assert index_bytes(index) == index_bytes(tmp_path / "whole")
    names = {name.partition("/")[0] for name in index_bytes(index)}
    assert names == ({"rows", "scales"} if dtype == "int8" else {"rows"})
