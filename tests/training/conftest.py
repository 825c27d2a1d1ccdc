"""What several tests of whole runs begin with."""

from pathlib import Path

import pytest

from tests.training.runs import write_run


@pytest.fixture
def arguments(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> list[str]:
    """Flags of a tiny run of one step."""
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    return [
        f"--gin_file={gin_file}",
        f"--gin.TrainConfig.model_dir={tmp_path / 'run'}",
        "--gin.TrainConfig.total_steps=1",
    ]
