"""What every test shares: eight simulated devices, a clean gin, small tokenizers and a corpus."""

import contextlib
import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before the first import of jax: the tests run on the CPU, whatever else the machine has.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests compile much and compute little: a third of the time without XLA's optimisations.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false",
)

# What several tests compile alike is compiled once, also by the processes that they start. A
# folder named in JAX_COMPILATION_CACHE_DIR serves the next call of pytest, too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # with workers it is there already
    _COMPILED = tempfile.TemporaryDirectory(prefix="atlas-jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import gin
import jax
import pytest
from jaxtyping import install_import_hook
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# Before their first import: the axes and types that these modules' annotations give are checked at
# each call. Outside the tests nobody looks at them.
CHECKED = (
    "atlas_jax.answering.answers",
    "atlas_jax.core.adapters",
    "atlas_jax.core.experts",
    "atlas_jax.core.fused",
    "atlas_jax.core.layers",
    "atlas_jax.core.packing",
    "atlas_jax.core.soft_prompts",
    "atlas_jax.corpus.retrieval",
    "atlas_jax.corpus.sources",
    "atlas_jax.distillation",
    "atlas_jax.encoders",
    "atlas_jax.index",
    "atlas_jax.models",
    "atlas_jax.reader",
    "atlas_jax.retriever",
    "atlas_jax.training.classifier_scores",
    "atlas_jax.training.demonstrations",
    "atlas_jax.training.loss",
    "atlas_jax.training.optimizers",
    "atlas_jax.training.prompted",
    "atlas_jax.training.self_training_step",
)
install_import_hook(CHECKED, "tests.array_types.checked")

import tests.array_types  # noqa: E402, F401  (the hook looks it up)
from tests.training.runs import write_run  # noqa: E402

MOST = 4 << 30  # bytes of a process, after which it forgets its programs

jax.config.update("jax_num_cpu_devices", 8)
# Types and ranks are made equal by hand, never by JAX. For all threads, so not as a context.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

READER_WORDS = (
    "what is the capital of which country question answer : title context where river city people "
    "speak language . , ? a in and large small north south east west lies on"
).split()
PASSAGES = [
    {"id": "arvo-1", "title": "Arvo", "text": "The capital of Arvo is Lindel. People speak Arvic."},
    {"id": "arvo-2", "title": "Arvo", "text": "The river Sann lies in the north of Arvo."},
    {"id": "bera-1", "title": "Bera", "text": "The capital of Bera is Tomund, a large city."},
    {"id": "bera-2", "title": "Bera", "text": "In Bera people speak Beric and Arvic."},
    {"id": "coro-1", "title": "Coro", "text": "Coro is a small country. Its capital is Essin."},
    {"id": "coro-2", "title": "Coro", "text": "The river Olt lies on the south of Coro."},
]


@pytest.fixture(autouse=True)
def clean_gin() -> Iterator[None]:
    """Gin's bindings are global: without this one test's configuration reaches the next."""
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    """Compiled programs of other modules take some 30 MB each: two workers would reach 15 GB."""
    yield
    status = Path("/proc/self/statm")
    if status.exists() and int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _byte_level(tokens: list[str]) -> Tokenizer:
    """A tokenizer whose ids are `tokens`, then the 256 bytes: any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*tokens, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def reader_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level reader tokenizer: <pad> 0, </s> 1, <unk> 2, 100 sentinels; appends </s>."""
    specials = ["<pad>", "</s>", "<unk>", *[f"<extra_id_{i}>" for i in range(100)]]
    tokenizer = _byte_level(specials)
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = tmp_path_factory.mktemp("reader_tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def retriever_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-piece retriever tokenizer of single letters and a few words: [PAD] is 0."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,:?'-")
    pieces = [*specials, *letters, *[f"##{c}" for c in letters]]
    pieces += [word for word in READER_WORDS if word not in pieces]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = tmp_path_factory.mktemp("retriever_tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def passages_file(tmp_path: Path) -> Path:
    """Six passages about three invented countries, as jsonl."""
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES), encoding="utf-8")
    return path


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
