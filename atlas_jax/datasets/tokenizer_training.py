"""Train small tokenizers for a reader and a retriever from text.

Both are byte-pair encodings of words; a word's leading blank is `▁`. Every digit and every
punctuation mark is a token of its own, so a value has the same tokens in an answer and in a
passage. Rare characters are encoded as their UTF-8 bytes, so nothing is unknown. The tokens of a
word depend only on the word: `encode(a) + encode(b) == encode(a + " " + b)`. So query and passages
can be joined as ids.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, RowsConfig, read_jsonl
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.tokenizer import Tokenizer

READER_FILE = "reader_tokenizer.json"
RETRIEVER_FILE = "retriever_tokenizer.json"

READER_SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5
RETRIEVER_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))

# One digit or one mark, with the blank before it; `▁` counts as a symbol too.
_LONE_CHARACTER = r"▁?(?:\p{N}|[^\p{L}\p{M}\p{N}\s▁])"
# The accents of Latin, Greek and Cyrillic; other scripts' vowel signs stay.
_ACCENTS = r"[\u0300-\u036f]"


def train_tokenizers(
    passages_path: str | Sequence[str],
    out_dir: str,
    vocab_size: int = 8192,
    retriever_vocab_size: int | None = None,
    num_sentinels: int = 100,
    reader_lowercase: bool = False,
    retriever_lowercase: bool = True,
    min_character_count: int = 20,
    fields: Sequence[str] = ("title", "section", "text"),
    rows: RowsConfig = STRICT,
) -> tuple[Tokenizer, Tokenizer]:
    """Train and save the reader's and the retriever's tokenizer; the same text, the same files.

    Args:
      passages_path: one jsonl file or several.
      out_dir: folder for `reader_tokenizer.json` and `retriever_tokenizer.json`.
      vocab_size: ids of the reader's tokenizer in all: `<pad> </s> <unk>`, 256 bytes, the
        pieces, and the sentinels from `<extra_id_{num_sentinels - 1}>` down to
        `<extra_id_0>`, which is the last id, as in T5. Little text may give fewer pieces.
      retriever_vocab_size: the same for the retriever's tokenizer, which has `[PAD] [UNK] [CLS]
        [SEP] [MASK]` and no sentinels; None = `vocab_size`.
      num_sentinels: largest number of masked spans in one text.
      reader_lowercase: the reader sees and writes lower-case text. Then a name in capitals has
        the same tokens as in small letters.
      retriever_lowercase: the retriever sees lower-case text without accents.
      min_character_count: a character that occurs less often is encoded in bytes.
      fields: the text fields of a record that are used.
      rows: what happens to a broken line.

    Returns:
      The reader's and the retriever's tokenizer, as saved.

    Raises:
      UserError: a file is faulty or has no text, or a vocabulary is too small.
    """
    paths = [passages_path] if isinstance(passages_path, str) else list(passages_path)
    folder = check_output_folder(out_dir, "train_tokenizers.out_dir")
    texts = read_texts(paths, fields, rows)
    reader = train_reader_tokenizer(
        texts, vocab_size, num_sentinels, reader_lowercase, min_character_count
    )
    retriever = train_retriever_tokenizer(
        texts, retriever_vocab_size or vocab_size, retriever_lowercase, min_character_count
    )
    reader.save(folder / READER_FILE)
    retriever.save(folder / RETRIEVER_FILE)
    return reader, retriever


def read_texts(
    paths: Iterable[str | os.PathLike[str]], fields: Sequence[str], rows: RowsConfig = STRICT
) -> list[str]:
    """The text fields of every record of jsonl files.

    Raises:
      UserError: a record is bad, or a file has none of the fields.
    """
    texts: list[str] = []
    for path in paths:
        before = len(texts)
        for _, record in read_jsonl(path, optional=dict.fromkeys(fields, str), rows=rows):
            texts.extend(record[name] for name in fields if record.get(name))
        if len(texts) == before:
            raise UserError(f"{path}: no record has text in any of {', '.join(fields)}")
    return texts


def train_reader_tokenizer(
    texts: Sequence[str],
    vocab_size: int,
    num_sentinels: int = 100,
    lowercase: bool = False,
    min_character_count: int = 20,
) -> Tokenizer:
    """Train a tokenizer in T5's layout, which appends `</s>`; see `train_tokenizers`."""
    if num_sentinels < 1:
        raise UserError(f"num_sentinels is {num_sentinels}, but must be at least 1")
    backend = _train(
        texts,
        vocab_size - num_sentinels,
        READER_SPECIAL,
        "<unk>",
        _cleaning(lowercase, accents=True),
        min_character_count,
    )
    # A sentinel includes the blanks before it; the word after it keeps its own blank.
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(f"<extra_id_{i}>", special=True, lstrip=True, normalized=False)
            for i in reversed(range(num_sentinels))
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return Tokenizer(backend.to_str(), "the reader's tokenizer")


def train_retriever_tokenizer(
    texts: Sequence[str],
    vocab_size: int,
    lowercase: bool = True,
    min_character_count: int = 20,
) -> Tokenizer:
    """Train a tokenizer in BERT's form, `[CLS] text [SEP]`; see `train_tokenizers`."""
    backend = _train(
        texts,
        vocab_size,
        RETRIEVER_SPECIAL,
        "[UNK]",
        _cleaning(lowercase, accents=not lowercase),
        min_character_count,
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, RETRIEVER_SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    return Tokenizer(backend.to_str(), "the retriever's tokenizer")


def _train(
    texts: Sequence[str],
    size: int,
    special: Sequence[str],
    unknown: str,
    cleaning: normalizers.Normalizer,
    min_character_count: int,
) -> tokenizers.Tokenizer:
    """Train a tokenizer with special tokens, bytes and byte-pair pieces, `size` in all."""
    clean = [cleaning.normalize_str(text) for text in texts]
    alphabet, rare = _alphabet(clean, min_character_count)
    num_fixed = len(special) + len(BYTE_PIECES)
    if size < num_fixed + len(alphabet):
        raise UserError(
            f"a vocabulary of {size} is too small: {num_fixed} special tokens and bytes and "
            f"{len(alphabet)} characters come before any piece"
        )
    learner = tokenizers.Tokenizer(models.BPE(unk_token=unknown))
    learner.pre_tokenizer = _splitting()
    trainer = trainers.BpeTrainer(
        vocab_size=size - num_fixed,
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    # Rare characters are removed here, since the trainer's own limit breaks ties at random.
    learner.train_from_iterator((text.translate(rare) for text in clean), trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {piece: i for i, piece in enumerate([*special, *BYTE_PIECES, *pieces])}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token=unknown,
            byte_fallback=True,
        )
    )
    backend.normalizer = cleaning
    backend.pre_tokenizer = _splitting()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in special]
    )
    return backend


def _alphabet(texts: Iterable[str], min_count: int) -> tuple[list[str], dict[int, str]]:
    """Sorted common characters, and a translation that blanks the rare ones out."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    counts.pop(" ", None)
    alphabet = sorted(c for c, count in counts.items() if count >= min_count)
    rare = {ord(c): " " for c, count in counts.items() if count < min_count}
    return alphabet, rare


def _cleaning(lowercase: bool, accents: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.NFC()]
    if lowercase:
        steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFC()]
    if not accents:
        bare = normalizers.Replace(tokenizers.Regex(_ACCENTS), "")
        steps = [*steps[:-1], normalizers.NFD(), bare, normalizers.NFC()]
    return normalizers.Sequence(
        [
            *steps,
            normalizers.Replace(tokenizers.Regex(r"\s+$"), ""),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        ]
    )


def _splitting() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True),
            pre_tokenizers.Split(tokenizers.Regex(_LONE_CHARACTER), behavior="isolated"),
        ]
    )
