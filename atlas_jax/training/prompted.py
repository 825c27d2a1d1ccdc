"""Class logits of texts by an encoder: from the words at a prompt's mask, or from a head."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Array, Params
from atlas_jax.encoders.model import EncoderModel
from atlas_jax.index.embed import lengths_of
from atlas_jax.tasks.base import Record
from atlas_jax.tasks.classification import ClassificationTask
from atlas_jax.tasks.templates import LabelTokens, encode_prompts, mask_text

NO_LABEL = -1
LENGTH_STEP = 16  # of rows that are cut: few programs, little padding
# (parameters, rows, key for dropout or None) -> logits [b, c].
LogitsFn = Callable[[Params, "Texts", "jax.Array | None"], jax.Array]


@flax.struct.dataclass
class Texts:
    """Texts of a task, as an encoder reads them.

    Attributes:
      tokens_bl: int32 [b, l], padded with 0.
      types_bl: int32 [b, l], 1 for the second text of a pair under a head; else 0.
      mask_at_b: int32 [b], the place of a prompt's mask; 0 under a head.
      labels_b: int32 [b], `NO_LABEL` where it is not known.
    """

    tokens_bl: Array
    types_bl: Array
    mask_at_b: Array
    labels_b: Array

    def rows(self, index: Any) -> "Texts":
        """Some of the rows, on the host."""
        return jax.tree.map(lambda x: x[index], self)

    def lengths(self) -> np.ndarray:
        """Tokens of each row without the padding behind them, [b]; on the host."""
        return lengths_of(self.tokens_bl, 0, len(self.tokens_bl))

    def fitted(self) -> "Texts":
        """The rows, cut to the longest of them, rounded up to a multiple of `LENGTH_STEP`."""
        longest = -(-int(self.lengths().max()) // LENGTH_STEP) * LENGTH_STEP
        cut = {"tokens_bl": self.tokens_bl[:, :longest], "types_bl": self.types_bl[:, :longest]}
        return dataclasses.replace(self, **cut)


@flax.struct.dataclass
class SoftTexts:
    """Texts with the class logits that other models gave them.

    Attributes:
      texts: of the task.
      logits_bc: the others' class logits [b, c].
    """

    texts: Texts
    logits_bc: Array

    @property
    def tokens_bl(self) -> Array:
        """As in `Texts`."""
        return self.texts.tokens_bl

    @property
    def labels_b(self) -> Array:
        """As in `Texts`; most are not known."""
        return self.texts.labels_b

    def rows(self, index: Any) -> "SoftTexts":
        """Some of the rows, on the host."""
        return jax.tree.map(lambda x: x[index], self)


def prompt_texts(
    task: ClassificationTask,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    length: int,
    soft: Sequence[int] = (),
) -> Texts:
    """Records in the task's template.

    Args:
      soft: ids of the prompt's vectors, which stand at the template's `{soft}` marks, or without
        marks in front of the text.

    Raises:
      UserError: what has to stay whole of a prompt does not fit; names the line.
    """
    mask, template = mask_text(tokenizer), task.template
    prompts = [template.filled(record.fields, mask) for record in records]
    names = [r.place for r in records]
    if not soft or template.soft:
        tokens_bl, mask_at_b = encode_prompts(tokenizer, prompts, length, names, template, soft)
    else:
        room = length - len(soft)
        tokens_bl, mask_at_b = encode_prompts(tokenizer, prompts, room, names)
        tokens_bl = _in_front(tokens_bl, tokenizer, soft)
        mask_at_b = mask_at_b + np.int32(len(soft))
    return Texts(tokens_bl, np.zeros_like(tokens_bl), mask_at_b, _labels(task, records))


def _in_front(tokens_bl: np.ndarray, tokenizer: Tokenizer, soft: Sequence[int]) -> np.ndarray:
    """The prompt's vectors in front of each text, behind its start token."""
    first = 0 if tokenizer.cls_id is None else 1
    soft_bp = np.broadcast_to(np.asarray(soft, tokens_bl.dtype), (len(tokens_bl), len(soft)))
    return np.concatenate([tokens_bl[:, :first], soft_bp, tokens_bl[:, first:]], axis=1)


def head_texts(
    task: ClassificationTask,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    length: int,
    soft: Sequence[int] = (),
) -> Texts:
    """Records without a template: `[CLS] text [SEP]`, or `[CLS] a [SEP] b [SEP]` for two texts.

    Of two texts the longer one loses tokens at its end first. RoBERTa's own pairs have two
    separators; here there is one. The ids `soft` of a prompt's vectors stand in front.
    """
    length -= len(soft)
    sides = [
        tokenizer.encode_batch([str(record.fields[name]) for record in records], False)
        for name in task.asks
    ]
    tokens_bl = np.zeros((len(records), length), np.int32)
    types_bl = np.zeros_like(tokens_bl)
    head = [] if tokenizer.cls_id is None else [tokenizer.cls_id]
    room = length - len(head) - len(sides)
    if room < len(sides):
        raise UserError(
            f"{length} tokens are too few for the {len(sides)} texts of {task.name} and their ends"
        )
    for row, texts in enumerate(zip(*sides, strict=True)):
        ids, types = list(head), [0] * len(head)
        for number, text in enumerate(_longest_first(texts, room)):
            ids += [*text, tokenizer.eos_id]
            types += [number] * (len(text) + 1)
        tokens_bl[row, : len(ids)], types_bl[row, : len(ids)] = ids, types
    zeros_b = np.zeros(len(records), np.int32)
    if soft:
        tokens_bl = _in_front(tokens_bl, tokenizer, soft)
        types_bl = np.pad(types_bl, ((0, 0), (len(soft), 0)))
    return Texts(tokens_bl, types_bl, zeros_b, _labels(task, records))


def _longest_first(texts: Sequence[list[int]], room: int) -> list[list[int]]:
    kept = [list(text) for text in texts]
    while sum(map(len, kept)) > room:
        max(kept, key=len).pop()
    return kept


def _labels(task: ClassificationTask, records: Sequence[Record]) -> np.ndarray:
    places = {label: number for number, label in enumerate(task.labels)}
    return np.array([places.get(r.fields.get(task.label), NO_LABEL) for r in records], np.int32)


def label_logits(logits_bv: Float[Array, "b v"], words: LabelTokens) -> Float[Array, "b c"]:
    """Logits over the vocabulary [b, v] -> of the labels [b, c]: the mean over a label's words."""
    return jnp.einsum("bcw,cw->bc", logits_bv[:, words.ids_cw], jnp.asarray(words.weights_cw))


def prompt_logits(model: EncoderModel, words: LabelTokens) -> LogitsFn:
    """Class logits by the words at the mask; the MLM head sees that one state of a row alone."""

    def logits(params: Params, texts: Texts, key: jax.Array | None) -> jax.Array:
        states_bld = _states(model, params, texts.tokens_bl, None, key)
        at_b11 = jnp.asarray(texts.mask_at_b)[:, None, None]
        states_bd = jnp.take_along_axis(states_bld, at_b11, axis=1)[:, 0]
        found: Any = model.apply({"params": params}, states_bd, method="token_logits")
        return label_logits(found, words)

    return logits


def head_logits(model: EncoderModel) -> LogitsFn:
    """Class logits by the sentence head."""
    typed = model.config.type_vocab_size > 1

    def logits(params: Params, texts: Texts, key: jax.Array | None) -> jax.Array:
        types_bl = texts.types_bl if typed else None
        states_bld = _states(model, params, texts.tokens_bl, types_bl, key)
        rngs = {} if key is None else {"dropout": jax.random.fold_in(key, 1)}
        found: Any = model.apply(
            {"params": params}, states_bld, key is None, method="sentence_logits", rngs=rngs
        )
        return jnp.asarray(found)

    return logits


def _states(
    model: EncoderModel, params: Params, tokens_bl: Any, types_bl: Any, key: jax.Array | None
) -> jax.Array:
    rngs = {} if key is None else {"dropout": key}
    states: Any = model.apply(
        {"params": params}, tokens_bl, key is None, types_bl=types_bl, method="states", rngs=rngs
    )
    return jnp.asarray(states)


def mean_states(model: EncoderModel, params: Params, texts: Texts) -> Float[Array, "b d"]:
    """The mean of a text's states, without its padding: the features of a linear probe."""
    types_bl = texts.types_bl if model.config.type_vocab_size > 1 else None
    states_bld = _states(model, params, texts.tokens_bl, types_bl, None).astype(jnp.float32)
    real_bl = (texts.tokens_bl != 0).astype(jnp.float32)
    total_bd = jnp.einsum("bld,bl->bd", states_bld, real_bl)
    return total_bd / jnp.maximum(real_bl.sum(axis=1, keepdims=True), 1.0)


def class_loss(logits_bc: Float[Array, "b c"], labels_b: Int[Array, " b"]) -> Float[Array, " b"]:
    """Cross-entropy over the classes alone, of each row."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_bc, labels_b)


def classify_loss(logits_fn: LogitsFn) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """The loss of a training step, as `encoder_state.make_step` takes it."""

    def loss(params: Params, key: jax.Array, texts: Texts) -> tuple[Array, dict[str, Array]]:
        logits_bc = logits_fn(params, texts, key)
        value = class_loss(logits_bc, jnp.asarray(texts.labels_b)).mean()
        right = (logits_bc.argmax(axis=1) == texts.labels_b).astype(jnp.float32)
        return value, {"accuracy": right.mean()}

    return loss


def distil_loss(
    logits_fn: LogitsFn, temperature: float
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """T^2 KL(softmax(z / T) || softmax(student / T)), the mean over the rows, as PET has it.

    The metric `agreement` is the share of rows for which both sides choose the same label.
    """

    def loss(params: Params, key: jax.Array, soft: SoftTexts) -> tuple[Array, dict[str, Array]]:
        own_bc = logits_fn(params, soft.texts, key)
        others_bc = jnp.asarray(soft.logits_bc)
        log_bc, target_bc = (
            jax.nn.log_softmax(x / temperature, axis=1) for x in (own_bc, others_bc)
        )
        apart_b = jnp.sum(jnp.exp(target_bc) * (target_bc - log_bc), axis=1)
        agree_b = (own_bc.argmax(axis=1) == others_bc.argmax(axis=1)).astype(jnp.float32)
        return temperature**2 * apart_b.mean(), {"agreement": agree_b.mean()}

    return loss


@dataclasses.dataclass(frozen=True)
class Asked:
    """How an encoder is asked: the records' texts, and their class logits."""

    texts: Callable[[Sequence[Record]], Texts]
    logits: LogitsFn


def asked_by(
    task: ClassificationTask,
    model: EncoderModel,
    tokenizer: Tokenizer,
    prompted: bool,
    length: int,
    soft: int = 0,
) -> Asked:
    """A task asked of an encoder, by its prompt or by its sentence head.

    Args:
      soft: the vectors of the encoder's prompt (kind 'prompt' of `DeltaConfig`).

    Raises:
      UserError: a label word that is no token of its own, texts longer than the encoder reads, no
        room for a text, or another number of `{soft}` marks than there are vectors.
    """
    if length > model.config.max_length:
        raise UserError(
            f"texts of {length} tokens: the encoder reads at most {model.config.max_length}"
        )
    marks = task.template.soft if prompted else 0
    if marks and marks != soft:
        raise UserError(
            f"{task.template.binding} has {marks} {{soft}} marks, but the encoder's prompt has "
            f"{soft} vectors; bind encoder/DeltaConfig.kind = 'prompt' and length = {marks}"
        )
    if soft + 4 > length:
        raise UserError(f"texts of {length} tokens have no room behind a prompt of {soft} vectors")
    ids = range(model.config.vocab_size, model.config.vocab_size + soft)
    make = prompt_texts if prompted else head_texts

    def texts(records: Sequence[Record]) -> Texts:
        return make(task, records, tokenizer, length, ids).fitted()

    if not prompted:
        return Asked(texts, head_logits(model))
    words = task.verbaliser.tokens(task.template, tokenizer)
    return Asked(texts, prompt_logits(model, words))
