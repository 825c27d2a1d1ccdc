"""Commands, each with one of its inputs broken."""

import dataclasses
import hashlib
import json
import random
import shutil
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atlas_jax import convert, import_index, prepare, remove_leaks, retrieve
from atlas_jax.build_index import main as build_index_main
from atlas_jax.core import bounds
from atlas_jax.from_gin import CONFIGURABLES
from tests.hostile import mutations
from tests.hostile.mutations import PERHAPS, SURE, Broken

Main = Callable[[Sequence[str]], int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line, what is wrong with it, and whether it has to be refused."""

    main: Main
    argv: list[str]
    told: str
    sure: bool


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where one case is made: `sound` is never written to, `work` is its own folder."""

    rng: random.Random
    sound: Path
    work: Path

    def take(self, name: str) -> Path:
        """A copy of a sound file or folder."""
        source, target = self.sound / name, self.work / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target

    def put(self, path: Path, broken: Broken) -> tuple[str, bool]:
        """Write what is broken; says what it is."""
        raw, told, sure = broken
        same = path.read_bytes() == raw
        path.write_bytes(raw)
        return f"{path.relative_to(self.work)}: {told}", sure and not same


def _retrieve(bench: Bench, *more: str, **paths: Path | str) -> list[str]:
    sound, out = bench.sound, bench.work / "out" / "found.jsonl"
    given: dict[str, Path | str] = {
        "INITIAL_CHECKPOINT_PATH": sound / "model", "STORE": sound / "store",
        "INDEX": sound / "index", "EVAL_FILE": sound / "test.jsonl", "OUTPUT": out,
    }  # fmt: skip
    flags = [f"--gin.{name}={value}" for name, value in (given | paths).items()]
    sizes = ["--gin.K=2", "--gin.BATCH_SIZE=8"]
    return ["--gin_file=runs/retrieve.gin", *flags, *sizes, *more]


def _convert(bench: Bench, source: str, target: str, given: Path) -> list[str]:
    flags = {"from": source, "to": target, "input": given, "output": bench.work / "out" / "new"}
    return [f"--{name}={value}" for name, value in flags.items()]


def _leaks(bench: Bench, *more: str, **paths: Path) -> list[str]:
    out = bench.work / "out"
    given = {
        "passages": bench.sound / "passages.jsonl", "files": bench.sound / "test.jsonl",
        "output": out / "clean.jsonl", "report": out / "leaks.jsonl",
    }  # fmt: skip
    return [*(f"--gin.LeakConfig.{k}={v}" for k, v in (given | paths).items()), *more]


def model_folder(bench: Bench) -> Case:
    """convert or retrieve, of a model folder with a broken file; half of them with its SHA-256."""
    folder = bench.take("model")
    name = bench.rng.choice(
        ("config.json", "config.json", "retriever.safetensors", "reader_tokenizer.json",
         "retriever_tokenizer.json")
    )  # fmt: skip
    path = folder / name
    if name == "config.json":
        told, sure = bench.put(path, mutations.break_json(bench.rng, path.read_bytes(), _typed))
    else:
        broken = mutations.break_bytes(bench.rng, path.read_bytes())
        told, sure = bench.put(path, broken)
        if bench.rng.random() < 0.5:  # whoever publishes a folder writes both
            config = json.loads((folder / "config.json").read_text())
            config["sha256"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
            (folder / "config.json").write_text(json.dumps(config))
    if bench.rng.random() < 0.2 and sure and "reader" not in told:
        return Case(retrieve.main, _retrieve(bench, INITIAL_CHECKPOINT_PATH=folder), told, PERHAPS)
    argv = _convert(bench, "atlas-jax", bench.rng.choice(("hf", "atlas-jax")), folder)
    return Case(convert.main, argv, told, sure)


def _typed(path: tuple[Any, ...], old: Any) -> bool:
    """Whether the type of this field of a config.json counts."""
    # Which activations, how they are stored: lists whose items are looked at together.
    return path[0] in ("models", "format", "sha256") and (
        len(path) < 2 or path[1] in ("reader", "retriever") or path[0] == "sha256"
    )


SENTENCES: dict[str, Any] = {
    "config_sentence_transformers.json": {
        "prompts": {"query": "q: ", "document": "p: "},
        "default_prompt_name": "query",
        "similarity_fn_name": "cosine",
    },
    "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": True},
    "tokenizer_config.json": {"do_lower_case": True},
}


def huggingface(bench: Bench) -> Case:
    """convert, of a Hugging Face folder with a broken file."""
    kind = bench.rng.choice(("reader", "retriever"))
    folder = bench.take("hf") / kind
    files = ["config.json", "config.json", "tokenizer.json", "model.safetensors"]
    if kind == "retriever":
        for name, content in SENTENCES.items():
            (folder / name).write_text(json.dumps(content))
        files += ["modules.json", "1_Pooling/config.json", *SENTENCES]
    path = folder / bench.rng.choice(files)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        broken = mutations.break_json(bench.rng, path.read_bytes(), _never)
    else:
        broken = mutations.break_bytes(bench.rng, path.read_bytes())
    told, sure = bench.put(path, broken)
    return Case(convert.main, _convert(bench, "hf", "atlas-jax", folder), told, sure)


def _never(path: tuple[Any, ...], old: Any) -> bool:
    return False


def t5x(bench: Bench) -> Case:
    """convert, of a T5X checkpoint with a broken index, .zarray or chunk."""
    folder = bench.take("t5x")
    files = sorted(path for path in folder.glob("checkpoint_0/**/*") if path.is_file())
    path = bench.rng.choice(files)
    if path.name == ".zarray":
        broken = mutations.break_json(bench.rng, path.read_bytes(), _never)
    else:
        broken = mutations.break_bytes(bench.rng, path.read_bytes())
    told, sure = bench.put(path, broken)
    argv = _convert(bench, "t5x", "hf", folder)
    return Case(convert.main, argv, told, sure and path.name != "checkpoint")


def store(bench: Bench) -> Case:
    """retrieve, with a broken file of the store; of one in shards, a file that is surely read."""
    shard, by_choice = "shards/00000-00000", bench.rng.choice(("store", "flat"))
    folder = bench.take(by_choice)
    arrays = ["offsets", "id_hashes", "id_rows", "reader_tokens", "retriever_tokens"]
    files = [f"{array}.npy" for array in arrays]
    if by_choice == "store":
        files = [f"{shard}/{array}/zarr.json" for array in ("offsets", "reader")]
        files += [f"{shard}/offsets/c/0/0", f"{shard}/reader/c/0"]
    path = folder / bench.rng.choice(["manifest.json"] * 4 + files)
    if path.name == "manifest.json":
        broken = mutations.break_json(bench.rng, path.read_bytes(), lambda path, old: True)
    elif path.name == "zarr.json":
        broken = mutations.break_json(bench.rng, path.read_bytes(), _never)
    elif path.suffix == ".npy":
        broken = mutations.break_array(bench.rng, path.read_bytes())
    else:
        broken = mutations.break_bytes(bench.rng, path.read_bytes())[:2] + (PERHAPS,)
    told, sure = bench.put(path, broken)
    index = "index" if by_choice == "store" else "flat_index"
    argv = _retrieve(bench, STORE=folder, INDEX=bench.sound / index)
    return Case(retrieve.main, argv, told, sure)


def index(bench: Bench) -> Case:
    """retrieve, with a broken file of the index."""
    name = bench.rng.choice(("index", "index8", "flat_index"))
    folder = bench.take(name)
    arrays = [path for path in folder.glob("embeddings-*/**/*") if path.is_file()]
    path = bench.rng.choice(sorted([*folder.glob("*.npy"), *arrays, folder / "index.json"]))
    if path.name == "index.json":
        broken = mutations.break_json(bench.rng, path.read_bytes(), lambda path, old: True)
    elif path.name == "zarr.json":
        broken = mutations.break_json(bench.rng, path.read_bytes(), _never)
    elif path.suffix == ".npy":
        broken = mutations.break_array(bench.rng, path.read_bytes())
    else:
        broken = mutations.break_bytes(bench.rng, path.read_bytes())[:2] + (PERHAPS,)
    told, sure = bench.put(path, broken)
    store = bench.sound / ("flat" if name == "flat_index" else "store")
    return Case(retrieve.main, _retrieve(bench, INDEX=folder, STORE=store), told, sure)


def questions(bench: Bench) -> Case:
    """retrieve or remove_leaks, of a questions file with a broken line."""
    path = bench.take("test.jsonl")
    broken = mutations.break_line(bench.rng, path.read_bytes(), ("question",))
    told, sure = bench.put(path, broken)
    if sure and bench.rng.random() < 0.2:
        return Case(retrieve.main, _retrieve(bench, EVAL_FILE=path), told, sure)
    return Case(remove_leaks.main, _leaks(bench, files=path), told, sure)


def passages(bench: Bench) -> Case:
    """build_index or remove_leaks, of a corpus with a broken line, or a damaged gzip file."""
    rng = bench.rng
    if rng.random() < 0.3:
        path = bench.take("passages.jsonl.gz")
        raw, told, sure = mutations.break_bytes(rng, path.read_bytes())
        if told == "empty":  # no gzip at all is an empty one
            sure = PERHAPS
        told, sure = bench.put(path, (raw, told, sure))
    else:
        path = bench.take("passages.jsonl")
        broken = mutations.break_line(rng, path.read_bytes(), ("id", "text"))
        told, sure = bench.put(path, broken)
    if sure and rng.random() < 0.3:
        out = bench.work / "out"
        flags = {
            "INITIAL_CHECKPOINT_PATH": bench.sound / "model", "PASSAGES": path,
            "STORE": out / "store", "INDEX": out / "index", "EMBED_BATCH_SIZE": 8,
        }  # fmt: skip
        argv = ["--gin_file=runs/build_index.gin", *(f"--gin.{k}={v}" for k, v in flags.items())]
        return Case(build_index_main, argv, told, sure)
    # An id that occurs twice and a text that is empty take nothing out, so they stay.
    sure = sure and not told.endswith(("twice", "blank"))
    return Case(remove_leaks.main, _leaks(bench, passages=path), told, sure)


def published(bench: Bench) -> Case:
    """prepare, of a published file that is broken."""
    folder = bench.take("squad")
    path = folder / "train-v1.1.json"
    broken = mutations.break_json(bench.rng, path.read_bytes(), _never)
    told, sure = bench.put(path, broken)
    argv = ["squad", f"--source={folder}", f"--out={bench.work / 'out'}", "--sample"]
    return Case(prepare.main, argv, told, sure and "version" not in told)


def shards(bench: Bench) -> Case:
    """import_index, of a saved index whose pickle is broken and whose embeddings are missing."""
    folder = bench.take("shards")
    path = folder / "passages.0.pt"
    told, _ = bench.put(path, mutations.break_bytes(bench.rng, path.read_bytes()))
    out = bench.work / "out"
    argv = [f"--shards={folder}", "--check=0", f"--gin.CorpusConfig.passages={out / 'p.jsonl'}",
            f"--gin.CorpusConfig.store={out / 'store'}",
            f"--gin.CorpusConfig.index={out / 'index'}"]  # fmt: skip
    return Case(import_index.main, argv, told, SURE)


def gin_file(bench: Bench) -> Case:
    """retrieve, with a gin file that no run can use."""
    text, told, sure = mutations.break_gin(bench.rng)
    path = bench.work / "x.gin"
    path.write_text(text)
    more = (f"--gin_search_paths={bench.work}", "--gin_file=x.gin")
    argv = [flag for flag in _retrieve(bench, *more) if flag != "--gin.K=2"]
    if not sure:  # only whether it is read
        argv.append("--gin.EVAL_FILE=nowhere.jsonl")
    return Case(retrieve.main, argv, f"x.gin: {told}", SURE)


def output(bench: Bench) -> Case:
    """A command that is to write where it cannot."""
    path, told, sure = mutations.break_output(bench.rng, bench.work)
    kind = bench.rng.choice(("convert", "leaks", "report", "prepare"))
    if kind == "convert":
        argv = _convert(bench, "atlas-jax", "hf", bench.sound / "model")
        return Case(convert.main, [*argv, f"--output={path}"], f"--output {told}", sure)
    if kind == "prepare":
        argv = ["squad", f"--source={bench.sound / 'squad'}", f"--out={path}", "--sample"]
        return Case(prepare.main, argv, f"--out {told}", sure)
    name = "output" if kind == "leaks" else "report"
    argv = [*_leaks(bench), f"--gin.LeakConfig.{name}='{ascii(path)[1:-1]}'"]
    return Case(remove_leaks.main, argv, f"LeakConfig.{name} {told}", sure)


def setting(bench: Bench) -> Case:
    """A field of any config, bound to what it cannot be."""
    rng = bench.rng
    config = rng.choice([one for one in CONFIGURABLES if dataclasses.is_dataclass(one)])
    name, annotation = rng.choice(sorted(bounds.annotations(config).items(), key=str))
    values: list[str] = ["'a\\x00b'", mutations.deep_json(), str(10**30), "1e999", str(2**63)]
    kind, most = annotation, 2**33 - 1
    if typing.get_origin(annotation) is typing.Annotated:
        kind, limits = typing.get_args(annotation)[0], typing.get_args(annotation)[1]
        if limits.ge is not None:
            values.append(str(limits.ge - 1))
        most = most if limits.le is None else limits.le
    if kind in (int, float, bool):  # None is no fault: it leaves the field as it would be
        values += ["'many'", "[1]", str(most + 1) if kind is int else "'x'"]
    value = rng.choice(values)
    binding = f"--gin.{config.__name__}.{name}={value}"
    return Case(remove_leaks.main, _leaks(bench, binding), binding[:80], SURE)


# How often each is tried; those that compile nothing most.
KINDS: dict[Callable[[Bench], Case], int] = {
    model_folder: 16, huggingface: 14, t5x: 10, store: 10, index: 10, questions: 8, passages: 10,
    published: 6, shards: 4, gin_file: 8, output: 8, setting: 16,
}  # fmt: skip
