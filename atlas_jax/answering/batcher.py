"""From examples to token batches of one static shape."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import jax
import numpy as np
from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.meeting import Meeting
from atlas_jax.core.shortening import shortened
from atlas_jax.core.tokenizer import Side
from atlas_jax.core.types import EOS_ID, NO_ROW, Batch, Choices, Edited, Passages
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.index.store_files import encode as encode_passages
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.base import Example, PassageText

_CHECKED = 4096  # examples that `check` tokenises
_CHECKED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Shapes of a batch.

    Attributes:
      batch_size: queries of a training step, over all processes.
      query_length: reader tokens of the query.
      retriever_query_length: retriever tokens of the query, special tokens included.
      target_length: reader tokens of the target, end token included.
      truncate_query: the side on which a query that is too long loses tokens. The
        default, 'left', keeps the sentinel that ends a question.
      max_excluded: rows that one query may exclude. The search takes that many rows more than
        k, so that k are left.
      prompt_length: reader tokens of the decoder's prompt; 0 = there is none.
      prompt_and_target: how the two are tokenised. 'apart': a prompt has the same tokens in
        training and when an answer is generated. 'together': as one text, as Atlas does; its
        first tokens are the prompt, as many as the prompt has alone.
    """

    batch_size: bounds.BatchSize = 32
    query_length: bounds.Length = 64
    retriever_query_length: bounds.Length = 64
    target_length: bounds.Length = 16
    truncate_query: Side = "left"
    max_excluded: Annotated[int, Meta(ge=1, le=1 << 20)] = 1
    prompt_length: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    prompt_and_target: Literal["apart", "together"] = "apart"

    def __post_init__(self) -> None:
        """Refuse sizes below 1 and other sides.

        Raises:
          UserError: names the binding.
        """
        bounds.check(self)


class Batcher:
    """Turns examples into a `Batch`, tokenising each kind of text in one call.

    Training, evaluation and `ask` all use it, so a question has the same tokens everywhere.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        config: DataConfig,
        store: PassageStore | None = None,
        given_passages: int = 0,
        formats: StoreConfig = StoreConfig(),
        choices: int = 0,
        length_penalty: float = GenerationConfig().length_penalty,
        limits: bool = False,
        edited: int = 0,
    ) -> None:
        """Fix the shapes.

        Args:
          tokenizers: of both models.
          config: the lengths.
          store: gives the rows of excluded ids. An id that it lacks excludes nothing; nor
            does any id without a store.
          given_passages: k > 0 puts the first k of each example's own passages into
            `Batch.given`. Row numbers are then places in the example's list.
          formats: text and lengths of given passages.
          choices: c > 0 puts the examples' choices, up to c of each, into `Batch.choices`.
          length_penalty: for the likelihoods of choices, see `GenerationConfig`.
          limits: put each example's own k into `Batch.k_b`.
          edited: w > 0 puts the examples' edited passages, up to w of each, into `Batch.edited`.

        Raises:
          UserError: the reader's tokenizer has another end token than the models.
        """
        if tokenizers.reader.eos_id != EOS_ID:
            raise UserError(
                f"the reader's end token </s> has id {tokenizers.reader.eos_id}, but must have "
                f"{EOS_ID}, as in every T5"
            )
        self._tokenizers = tokenizers
        self._config = config
        self._store = store
        self._k = given_passages
        self._formats = formats
        self._choices = choices
        self._length_penalty = length_penalty
        self._limits, self._edited_width = limits, edited

    def over(self, store: PassageStore) -> "Batcher":
        """The same batches for another version of the store."""
        other = copy.copy(self)
        other._store = store
        return other

    def __call__(
        self,
        examples: Sequence[Example],
        rows: int | None = None,
        mine: Sequence[int] | None = None,
    ) -> Batch:
        """Make a batch of the examples, or this process's rows of it.

        Args:
          examples: at least one.
          rows: rows of the batch; None = as many as there are examples. Rows without an
            example repeat the first example's query, with an empty target and weight 0.
          mine: the rows of the batch that are made, `multihost.local_rows`; None = all.

        Raises:
          UserError: an example has no passages of its own although they are to be read, or
            excludes too many rows, or is too long even when shortened. Or two choices begin
            with the same token although the first token decides.
          ValueError: there are no examples, or more than rows.
        """
        rows = len(examples) if rows is None else rows
        if not 0 < len(examples) <= rows:
            raise ValueError(f"{len(examples)} examples for a batch of {rows} rows")
        rows_b = np.arange(rows) if mine is None else np.asarray(mine)
        is_real_b = rows_b < len(examples)
        # Rows beyond the examples take the first one's content.
        used, take = np.unique(np.where(is_real_b, rows_b, 0), return_inverse=True)
        examples = [examples[row] for row in used.tolist()]
        for example in examples:
            self._check(example)
        config, tokenizers = self._config, self._tokenizers
        reader, retriever = tokenizers.reader, tokenizers.retriever
        read = [self._query(e) for e in examples]
        queries = reader.encode_batch(read, add_special=False)
        asked = retriever.encode_batch(
            [
                query if e.retriever_text == e.query_text else e.retriever_text
                for e, query in zip(examples, read, strict=True)
            ],
            add_special=True,
        )
        prompts, targets, joined = self._prompts_and_targets(examples)
        side = config.truncate_query
        targets_bt = reader.pad_to(targets, config.target_length)[take]
        given = self._given(examples) if self._k else None
        choices = self._choice_tokens(examples) if self._choices else None

        def padded(rows: list[list[int]] | None) -> np.ndarray | None:
            return None if rows is None else reader.pad_to(rows, config.prompt_length, side)[take]

        return Batch(
            query_tokens_bq=reader.pad_to(queries, config.query_length, side)[take],
            retriever_tokens_br=retriever.pad_to(asked, config.retriever_query_length, side)[take],
            target_tokens_bt=np.where(is_real_b[:, None], targets_bt, 0),
            excluded_rows_bx=self._excluded(examples)[take],
            weight_b=is_real_b.astype(np.float32),
            given=jax.tree.map(lambda leaf: leaf[take], given),
            prompt_tokens_bp=padded(prompts),
            joined_prompt_bp=padded(joined),
            choices=jax.tree.map(lambda leaf: leaf[take], choices),
            hidden_b3=jax.tree.map(lambda leaf: leaf[take], self._hidden(examples)),
            included_rows_b=jax.tree.map(lambda leaf: leaf[take], self._included(examples)),
            k_b=self._limited(examples)[take] if self._limits else None,
            edited=jax.tree.map(lambda leaf: leaf[take], self._edited(examples)),
        )

    def _limited(self, examples: Sequence[Example]) -> np.ndarray:
        return np.array([example.k or bounds.LARGEST for example in examples], np.int32)

    def _edited(self, examples: Sequence[Example]) -> Edited | None:
        """The tokens of edited passages, made as those of the store were."""
        if not self._edited_width or self._store is None:
            return None
        lists = [example.edited for example in examples]
        flat = [dict(passage) for passage in itertools.chain.from_iterable(lists)]
        counts_b = np.array([len(passages) for passages in lists])
        mask_bw = np.arange(self._edited_width) < counts_b[:, None]
        rows_bw = np.full(mask_bw.shape, NO_ROW, np.int32)
        rows_bw[mask_bw] = [self._row_of(passage["id"]) for passage in flat]

        def spread(tower: str) -> np.ndarray:
            assert self._store is not None
            config = self._store.config
            tokens_bwl = np.zeros((*mask_bw.shape, getattr(config, f"{tower}_length")), np.int32)
            if flat:
                tokenizer = getattr(self._tokenizers, tower)
                tokens_bwl[mask_bw] = encode_passages(flat, tower, config, tokenizer)
            return tokens_bwl

        return Edited(rows_bw, spread("reader"), spread("retriever"))

    def _included(self, examples: Sequence[Example]) -> np.ndarray | None:
        """The row that each example always reads; None if no example has one."""
        if not any(example.included_id for example in examples):
            return None
        return np.array([self._row_of(example.included_id) for example in examples], np.int32)

    def _hidden(self, examples: Sequence[Example]) -> np.ndarray | None:
        """The tokens, by row, that are hidden from the reader; None for a task that hides none.

        Either all examples of a task may hide something or none: `Example.may_hide`.
        """
        if not any(example.may_hide for example in examples):
            return None
        formats, reader = self._formats, self._tokenizers.reader
        hidden_b3 = np.full((len(examples), 3), NO_ROW, np.int32)
        for number, example in enumerate(examples):
            hidden = example.hidden
            row = self._row_of(hidden.passage_id) if hidden else NO_ROW
            if hidden is None or row == NO_ROW or self._store is None:
                continue
            passage = dict(self._store.passage(row))
            text = passage["text"]
            cuts = []
            for end in (hidden.start, hidden.end):
                passage["text"] = text[:end].rstrip()
                cuts.append(len(reader.encode(formats.text("reader", passage), False)))
            hidden_b3[number] = (row, *cuts)
        return hidden_b3

    def check(self, examples: Sequence[Example], file: str) -> None:
        """Refuse, before any work, an example of a file that cannot become part of a batch.

        Some faults show only in the tokens: a query that does not fit, choices that begin alike.
        One process looks for them in the first few thousand examples. Several processes look at
        all, each at its share, and agree: later one of them would stop while the others wait.

        All processes must call it with the same examples.

        Raises:
          UserError: as `__call__` does, of the first example at fault, on every process; the file
            is named, too.
        """
        try:
            for example in examples:
                self._check(example)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        costly = [e for e in examples if e.shorten or e.choice_score == "first_token"]
        meeting = Meeting(f"checking {file}")
        if meeting.count == 1:
            costly = costly[:_CHECKED]
        mine = range(meeting.index, len(costly), meeting.count)
        found = meeting.together("examples", lambda: self._fault(costly, mine))
        faults = [json.loads(one) for one in found if one]
        if faults:
            raise UserError(f"{file}: {min(faults)[1]}")

    def _fault(self, examples: Sequence[Example], rows: Sequence[int]) -> str:
        """Of the first of these rows at fault the row and the error, as JSON; '' for none."""
        for start in range(0, len(rows), _CHECKED_AT_ONCE):
            some = rows[start : start + _CHECKED_AT_ONCE]
            try:
                self([examples[row] for row in some])
            except UserError:
                for row in some:
                    try:
                        self([examples[row]])
                    except UserError as error:
                        return json.dumps([row, str(error)])
                raise
        return ""

    def _check(self, example: Example) -> None:
        """Refuse an example with too much or too little in it."""
        width, excluded = self._config.max_excluded, len(_not_to_be_found(example))
        if excluded > width:
            raise UserError(
                f"record {example.id!r} excludes {excluded} passages, more than "
                f"DataConfig.max_excluded = {width}"
            )
        if len(example.edited) > self._edited_width:
            raise UserError(
                f"record {example.id!r} edits {len(example.edited)} passages; at most "
                f"{self._edited_width} can be"
            )
        if self._choices and not 2 <= len(example.choices) <= self._choices:
            raise UserError(
                f"record {example.id!r} has {len(example.choices)} choices; all records of a file "
                "have two or more, or none has any"
            )
        if example.prompt_text and not self._config.prompt_length:
            raise UserError(
                "the task gives the decoder a prompt, but DataConfig.prompt_length = 0: bind it to "
                "the tokens of the longest one"
            )
        if self._k:
            _passages_of(example)

    def _query(self, example: Example) -> str:
        """The query's text; its parts that may be cut are shortened to fit."""
        text, cuts, room = example.query_text, example.shorten, self._config.query_length
        # A token is at least a byte, so such a text fits as it is.
        least = min((room, *(cut.max_tokens for cut in cuts if cut.max_tokens is not None)))
        if not cuts or len(text.encode("utf-8")) <= least:
            return text
        fitted = shortened(self._tokenizers.reader, text, cuts, room)
        if fitted is None:
            raise UserError(
                f"record {example.id!r}: what has to stay whole of its query takes more than "
                f"DataConfig.query_length = {room} tokens"
            )
        return fitted

    def _prompts_and_targets(
        self, examples: Sequence[Example]
    ) -> tuple[list[list[int]] | None, list[list[int]], list[list[int]] | None]:
        """Prompts, targets, and the prompts as tokenised together with the targets.

        The last is None if there are no prompts, or if they are tokenised apart.
        """
        reader = self._tokenizers.reader
        texts, targets = [e.prompt_text for e in examples], [e.target_text for e in examples]
        if not self._config.prompt_length:
            return None, reader.encode_batch(targets, add_special=True), None
        prompts = reader.encode_batch(texts, add_special=False)
        if self._config.prompt_and_target == "apart":
            return prompts, reader.encode_batch(targets, add_special=True), None
        whole = reader.encode_batch(list(map(str.__add__, texts, targets)), add_special=True)
        parts = [
            (ids[: len(prompt)], ids[len(prompt) :])
            for ids, prompt in zip(whole, prompts, strict=True)
        ]
        return prompts, [target for _, target in parts], [prompt for prompt, _ in parts]

    def _choice_tokens(self, examples: Sequence[Example]) -> Choices:
        reader, length = self._tokenizers.reader, self._config.target_length
        texts = [choice.target_text for example in examples for choice in example.choices]
        flat = iter(reader.pad_to(reader.encode_batch(texts, add_special=True), length))
        tokens_bct = np.zeros((len(examples), self._choices, length), np.int32)
        weights_bct = np.zeros(tokens_bct.shape, np.float32)
        for row, example in enumerate(examples):
            tokens_ct = np.stack(list(itertools.islice(flat, len(example.choices))))
            tokens_bct[row, : len(tokens_ct)] = tokens_ct
            if example.choice_score == "first_token":
                weights_bct[row, : len(tokens_ct), _first_difference(example, tokens_ct)] = 1.0
            else:
                real_ct = tokens_ct != 0
                lengths_c1 = real_ct.sum(axis=1, keepdims=True).astype(np.float32)
                weights_bct[row, : len(tokens_ct)] = real_ct / lengths_c1**self._length_penalty
        return Choices(tokens_bct=tokens_bct, weights_bct=weights_bct)

    def _excluded(self, examples: Sequence[Example]) -> np.ndarray:
        width = self._config.max_excluded
        excluded_bx = np.full((len(examples), width), NO_ROW, np.int32)
        for row, example in enumerate(examples):
            for place, passage_id in enumerate(_not_to_be_found(example)):
                excluded_bx[row, place] = self._row_of(passage_id)
        return excluded_bx

    def _row_of(self, passage_id: str) -> int:
        row = self._store.find(passage_id) if self._store else None
        # A passage that is not in this corpus cannot be found anyway.
        return NO_ROW if row is None else row

    def _given(self, examples: Sequence[Example]) -> Passages:
        formats = self._formats
        lists = [_passages_of(example)[: self._k] for example in examples]
        flat = list(itertools.chain.from_iterable(lists))
        counts_b = np.array([len(passages) for passages in lists])
        mask_bk = np.arange(self._k) < counts_b[:, None]

        def spread(tokens_nl: np.ndarray) -> np.ndarray:
            tokens_bkl = np.zeros((*mask_bk.shape, tokens_nl.shape[1]), np.int32)
            tokens_bkl[mask_bk] = tokens_nl
            return tokens_bkl

        def encode(part: str) -> np.ndarray:
            tokenizer = getattr(self._tokenizers, part)
            texts = [formats.text(part, passage) for passage in flat]
            ids = tokenizer.encode_batch(texts, add_special=part == "retriever")
            return spread(tokenizer.pad_to(ids, getattr(formats, f"{part}_length")))

        return Passages(
            rows_bk=np.where(mask_bk, np.arange(self._k), NO_ROW).astype(np.int32),
            scores_bk=np.where(mask_bk, 0.0, -np.inf).astype(np.float32),
            reader_tokens_bkl=encode("reader"),
            retriever_tokens_bkm=encode("retriever"),
            mask_bk=mask_bk,
        )


def _not_to_be_found(example: Example) -> list[str]:
    """Ids of the passages that the search leaves out: those excluded, and those edited."""
    return [*example.excluded_ids, *(passage["id"] for passage in example.edited)]


def most_choices(examples: Iterable[Example]) -> int:
    """The `choices` of a Batcher for these examples; 0 if none has any."""
    return max((len(example.choices) for example in examples), default=0)


def _first_difference(example: Example, tokens_ct: np.ndarray) -> int:
    """The first position where the choices' tokens differ; there all of them must differ."""
    differs_t = (tokens_ct != tokens_ct[:1]).any(axis=0)
    at = int(differs_t.argmax())
    if not differs_t[at] or len(set(tokens_ct[:, at].tolist())) < len(tokens_ct):
        raise UserError(
            f"record {example.id!r}: two choices begin with one token in this tokenizer, so their "
            "first token cannot decide; score them by likelihood"
        )
    return at


def _passages_of(example: Example) -> tuple[PassageText, ...]:
    if example.given_passages is None:
        raise UserError(
            f"record {example.id!r} has no field 'passages', from which its passages shall come"
        )
    return example.given_passages
