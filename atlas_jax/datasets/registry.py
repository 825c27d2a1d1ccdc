"""Data sets by name."""

from atlas_jax.core.errors import UserError, nearest
from atlas_jax.datasets.benchmarks import BEIR, FEVER, KILT, MMLU
from atlas_jax.datasets.classification import CLASSIFICATION
from atlas_jax.datasets.convert import Dataset
from atlas_jax.datasets.passages import KILT_WIKIPEDIA, WIKIPEDIA
from atlas_jax.datasets.questions import NQ, TEMPLAMA, TRIVIAQA
from atlas_jax.datasets.squad import SQUAD

DATASETS = {
    dataset.name: dataset
    for dataset in (
        WIKIPEDIA, NQ, TRIVIAQA, SQUAD, FEVER, MMLU, KILT, KILT_WIKIPEDIA, TEMPLAMA, BEIR,
        *CLASSIFICATION,
    )
}  # fmt: skip


def get_dataset(name: str) -> Dataset:
    """The data set of this name.

    Raises:
      UserError: there is no such data set; names the nearest one.
    """
    if name not in DATASETS:
        raise UserError(f"no data set is called {name!r}{nearest(name, DATASETS)}")
    return DATASETS[name]
