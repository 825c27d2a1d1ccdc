"""The functions of `import atlas_jax`: load, ask, train and index, without gin or globals."""

import contextlib
import dataclasses
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from atlas_jax.answering import inference
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig
from atlas_jax.answering.defaults import Fields, defaults_of, fields_of
from atlas_jax.answering.run import AnswerRun, IndexRun
from atlas_jax.core.devices import Devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.parts import PARTS
from atlas_jax.corpus.change import compact
from atlas_jax.corpus.config import AUTO, CorpusConfig, CorpusSpec, ReadConfig
from atlas_jax.index.changes import Batch, Passage, change
from atlas_jax.index.scann_index import ScannConfig
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.config import ModelSpec
from atlas_jax.models.folder import partial_parts
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.base import Task
from atlas_jax.training import trainer
from atlas_jax.training.config import FINAL
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.run import TrainRun

AnyPath = str | os.PathLike[str]


def load(
    model: AnyPath,
    *,
    retriever: AnyPath = "",
    base: AnyPath = "",
    passages: AnyPath | Sequence[AnyPath] = "",
    store: AnyPath = "",
    index: AnyPath = "",
    as_of: str | int = "",
    capacity: int = 0,
    reader_states: AnyPath = "",
    task: str | Task = "qa",
    read: ReadConfig | Fields | None = None,
    data: DataConfig | Fields | None = None,
    formats: StoreConfig | Fields | None = None,
    generation: GenerationConfig | Fields | None = None,
    devices: Devices = Devices(),
) -> Atlas:
    """Load a model folder, and the passages that it answers from.

    The folder says how its models read. What ``read``, ``data``, ``formats`` and ``generation``
    tell otherwise counts instead: a dict of some fields, or a whole config.

    Args:
      model: folder with both models, such as a run's ``final``.
      retriever: another folder to take the retriever from.
      base: folder of the models that partial ones stand on, if not where it lay.
      passages: file, folder or pattern of passages, or several. Without ``store`` they are prepared
        in a temporary folder, which is removed when the `Atlas` is no longer used.
      store: folder of prepared passages; if it does not exist it is made from ``passages``.
      index: folder of their embeddings, made by `build_index`; without it they are embedded now.
      as_of: version of the store, or a time in ISO 8601, that is searched; "" = the newest.
      capacity: passages to have room for on the devices, see `Atlas.change_passages`; 0 = as many
        as there are, rounded up.
      reader_states: folder for what a reader that reads passages apart from the question computes
        of them once, see `CorpusConfig`; "" = it computes it for every question.
      task: the kind of questions. A name is asked in the wording that the models were trained
        with, an object of a task's class in its own.
      read: `ReadConfig`: number of passages read for each question, and how much of each.
      data: `DataConfig`: lengths of questions.
      formats: `StoreConfig`: text and lengths of passages.
      generation: `GenerationConfig`: how answers are decoded.
      devices: the mesh.

    Returns:
      An `Atlas`. Without passages, store and index it answers only from its weights.

    Raises:
      UserError: a folder or file is at fault, the retriever cannot read a length, or settings
        contradict each other. Nothing was written then.
    """
    if index and not (store or passages):
        raise UserError("load: an index needs the passages it is of: give store or passages, too")
    searches = bool(store or passages)
    spec = ModelSpec.of_folder(model, retriever)
    if base:
        spec = _on_base(spec, base)
    name = task if isinstance(task, str) else task.name
    defaults = defaults_of(spec, name, retrieves=searches)
    texts = defaults.store(fields_of(formats, StoreConfig, "formats"))
    with contextlib.ExitStack() as kept:  # until the Atlas is no longer used
        if passages and not store:
            folder = tempfile.TemporaryDirectory(prefix="atlas-jax-")
            store = os.path.join(kept.enter_context(folder), "store")
        config = CorpusConfig(
            passages=_passages(passages),
            store=os.fspath(store),
            index=os.fspath(index),
            as_of=str(as_of),
            capacity=capacity,
            reader_states=os.fspath(reader_states),
        )
        told = AnswerRun(
            models=spec,
            corpus=CorpusSpec(config, texts),
            evaluation=EvalConfig(passages="index" if searches else "none"),
            task=defaults.task(task, {}) if isinstance(task, str) else task,
            read=defaults.read(ReadConfig, fields_of(read, ReadConfig, "read")),
            data=defaults.data(fields_of(data, DataConfig, "data")),
            generation=defaults.generation(fields_of(generation, GenerationConfig, "generation")),
            devices=devices,
        )
        atlas = Atlas(told)
        weakref.finalize(atlas, kept.pop_all().close)
    return atlas


def build_index(
    model: AnyPath,
    *,
    passages: AnyPath | Sequence[AnyPath] = "",
    store: AnyPath,
    index: AnyPath,
    dtype: str = AUTO,
    formats: StoreConfig | Fields | None = None,
    devices: Devices = Devices(),
) -> int:
    """Prepare passages in a store and embed them into an index; existing ones that fit are kept.

    Args:
      model: folder with both models.
      passages: file, folder or pattern of passages, or several; needed if there is no store yet.
      store, index: folders.
      dtype: of the embeddings, as ``CorpusConfig.dtype``.
      formats: text and lengths of passages, as in `load`.
      devices: the mesh.

    Returns:
      How many passages there are.

    Raises:
      UserError: a folder or file at fault.
    """
    config = CorpusConfig(
        passages=_passages(passages), store=os.fspath(store), index=os.fspath(index), dtype=dtype
    )
    spec = ModelSpec.of_folder(model)
    texts = defaults_of(spec).store(fields_of(formats, StoreConfig, "formats"))
    return inference.build_index(
        IndexRun(models=spec, corpus=CorpusSpec(config, texts), devices=devices)
    )[0]


def _passages(passages: AnyPath | Sequence[AnyPath]) -> str | tuple[str, ...]:
    if isinstance(passages, str | os.PathLike):
        return os.fspath(passages)
    return tuple(os.fspath(one) for one in passages)


def change_index(
    model: AnyPath = "",
    *,
    store: AnyPath,
    index: AnyPath = "",
    add: Sequence[Passage] = (),
    replace: Sequence[Passage] = (),
    delete: Sequence[str] = (),
    devices: Devices = Devices(),
) -> int:
    """Add, replace and delete passages of a store and its index, together as one version.

    Only the new passages are tokenised and embedded. Earlier versions can still be read, see
    ``as_of`` of `load`. `Atlas.change_passages` does the same to passages that are being searched.
    All processes of a run call it with the same changes; each does its share of the work.

    Args:
      model: folder with both models; not needed where passages are only deleted.
      store, index: folders; without an index no embeddings are kept.
      add: passages `{id, title?, section?, text}` with new ids.
      replace: passages whose ids the store has.
      delete: ids that the store has.
      devices: the mesh.

    Returns:
      The number of the new version.

    Raises:
      UserError: an id, passage or folder at fault, or another run that changes the store; of
        another process of this run, too, or one that is missing. Nothing is changed then.
    """
    batch = Batch(add, replace, delete)
    if not (add or replace):
        return change(store, batch, {}).version["version"]
    if not os.fspath(model):
        raise UserError("change_index: new passages need the model that embeds them")
    config = CorpusConfig(store=os.fspath(store), index=os.fspath(index))
    spec = ModelSpec.of_folder(model)
    return inference.change_index(
        IndexRun(models=spec, corpus=CorpusSpec(config), devices=devices), batch
    )


def compact_index(
    *,
    store: AnyPath,
    index: AnyPath = "",
    keep: int = 1,
    reader_states: AnyPath = "",
    scann: ScannConfig = ScannConfig(),
) -> int:
    """Join the segments of a store and its index, and give up all but the newest versions.

    All processes of a run call it; each copies its share.

    Args:
      store, index: folders; name the index, or its old embeddings stay and new ones are missing.
      reader_states: folder of ``CorpusConfig.reader_states``, whose parts are joined, too.
      keep: versions that can still be read, the compacted one among them.
      scann: how the index is searched, if ScaNN searches it: for this it is trained anew.

    Returns:
      The number of the compacted version.

    Raises:
      UserError: a folder at fault, or another process that changes the store.
    """
    return compact(store, index, keep, reader_states, scann).version["version"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training run.

    Attributes:
      model: its model folder, for `load`.
      steps: number of steps.
      skipped: number of steps that were skipped since loss or gradient was not finite.
    """

    model: Path
    steps: int
    skipped: int

    def metrics(self) -> list[dict[str, float]]:
        """Everything that was logged, a row for each line of the run's metrics file."""
        return read_metrics(self.model.parent)


def train(config: TrainRun) -> Trained:
    """Train reader and retriever; an interrupted run continues from its last checkpoint.

    `TrainRun.from_folder` makes a run that reads as its model folder says.

    Raises:
      UserError: a setting or file at fault.
    """
    state = trainer.train(config)
    return Trained(Path(config.train.model_dir) / FINAL, int(state.step), int(state.skipped))


def _on_base(spec: ModelSpec, base: AnyPath) -> ModelSpec:
    """The models, those that are partial on top of this folder's."""
    folders = {part: str(getattr(spec.config, part)) for part in PARTS}
    partial = partial_parts(folders)
    reader, retriever = (os.fspath(base) if part in partial else "" for part in PARTS)
    config = dataclasses.replace(spec.config, reader_base=reader, retriever_base=retriever)
    return dataclasses.replace(spec, config=config)
