"""The compiled part of answering: write or choose an answer, and explain it.

The passages are encoded once for all of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int

from atlas_jax.core import partitioning
from atlas_jax.core.packing import Inputs, packed_or_padded
from atlas_jax.core.types import EOS_ID, PAD_ID, Array, Batch, Choices, Params, Passages
from atlas_jax.distillation import adist
from atlas_jax.reader import fid, inputs
from atlas_jax.reader.forced import NEVER
from atlas_jax.reader.generate import GenerationConfig, generate
from atlas_jax.reader.t5 import T5


@flax.struct.dataclass
class Evidence:
    """How much each passage contributed to the answer; see docs/tasks.md.

    Attributes:
      attention_bk: ADist's score: cross-attention probability times the norm of the value,
        averaged over heads, per layer and answer token, summed over the passage.
      alone_bk: log-probability of the answer read from this passage alone.
      left_out_bk: how much the answer's log-probability falls when this passage is left out;
        above 0 where the passage helped.
    """

    attention_bk: Array
    alone_bk: Array
    left_out_bk: Array


@flax.struct.dataclass
class Answers:
    """The answers of a batch.

    Attributes:
      tokens_bt: int32 tokens of the generated text, or of the best choice.
      scores_b: float32 log-probability of the generated text (`generate.generate`), or of the
        best choice among all choices.
      choice_log_probs_bc: float32, normalised over the choices of each query; None where
        answers are generated.
      evidence: None if it was not asked for.
      target_log_probs_b: float32 log-probability of the batch's own targets; None if it was not
        asked for.
      target_lengths_b: int32, tokens of these targets; None as they are.
      calls_b: int32, how often the decoder was called for each generated text; None where answers
        are chosen, or found by beam search.
    """

    tokens_bt: Array
    scores_b: Array
    choice_log_probs_bc: Array | None = None
    evidence: Evidence | None = None
    target_log_probs_b: Array | None = None
    target_lengths_b: Array | None = None
    calls_b: Array | None = None


Answer = Callable[..., Answers]  # (params, batch, passages, first=0), see `make_answer`


@dataclasses.dataclass(frozen=True)
class Reading:
    """How passages are read.

    Attributes:
      k: how many of the passages found are read, the best first.
      reader_length: tokens of one reader input.
      chooses: choose among the batch's choices instead of generating a text.
      explains: compute what each passage contributed.
      scores_targets: compute how likely the targets are.
      packed_rows: rows that the passages of a query share where they fit, see `packing`; 0 = each
        has its own.
    """

    k: int
    reader_length: int
    chooses: bool = False
    explains: bool = False
    scores_targets: bool = False
    packed_rows: int = 0


def make_answer(reader: T5, generation: GenerationConfig, reading: Reading, mesh: Mesh) -> Answer:
    """Build the jitted `answer(params, batch, passages, first=0) -> Answers`.

    `first` is the number of the batch's first question in the run. The seed of a sampled answer
    is GenerationConfig.seed and the question's number, so the batch size does not change it.
    """

    def answer(params: Params, batch: Batch, passages: Passages, first: Array | int = 0) -> Answers:
        tokens_bkl = joined(reader, params, batch, passages, reading)

        def of(given: Inputs) -> Answers:
            enc = encoded(reader, params, given, passages, reading)
            return answered((reader, params["reader"], enc, given), batch, first)

        return packed_or_padded(of, (tokens_bkl, reading.packed_rows))

    def answered(source: _Source, batch: Batch, first: Array | int) -> Answers:
        if reading.chooses:
            assert batch.choices is not None
            answers = _choose(source, batch.choices, batch.prompt_tokens_bp)
        else:
            answers = _generate(source, generation, batch.prompt_tokens_bp, first)
        more: dict[str, Any] = {}
        if reading.explains:
            more["evidence"] = explained(source, answers.tokens_bt, batch.prompt_tokens_bp)
        if reading.scores_targets:
            prompted = inputs.join_prompt(batch.taught_prompt_bp, batch.target_tokens_bt)
            more["target_log_probs_b"] = _log_probs(source, *prompted)
            more["target_lengths_b"] = jnp.sum(
                batch.target_tokens_bt != PAD_ID, axis=1, dtype=jnp.int32
            )
        return answers.replace(**more)  # type: ignore[attr-defined]

    return jax.jit(answer, out_shardings=partitioning.replicated(mesh))


def joined(
    reader: T5, params: Params, batch: Batch, passages: Passages, reading: Reading
) -> Int[Array, "b k l"]:
    """The reader's input for each passage that is read, tokens_bkl."""
    tokens_bkl = inputs.join_inputs(
        batch.query_tokens_bq,
        passages.reader_tokens_bkl[:, : reading.k],
        passages.mask_bk[:, : reading.k],
        reading.reader_length,
        EOS_ID,
        reader.config.block_start,
    )
    return inputs.behind_prompt(reader, params["reader"], tokens_bkl)


def encoded(
    reader: T5,
    params: Params,
    given: Inputs,
    passages: Passages,
    reading: Reading,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "b g l d"]:
    """States of the inputs that `joined` made, packed or not; see `fid.encode`."""
    apart = passages.apart_bkf
    return fid.encode(
        reader,
        params["reader"],
        given,
        dropout_key,
        apart_bkf=None if apart is None else apart[:, : reading.k],
    )


def sample_keys(config: GenerationConfig, b: int, first: Array | int) -> jax.Array | None:
    """Randomness of each question by its number in the run; None where nothing is sampled."""
    if config.method != "sample":
        return None
    numbers_b = jnp.asarray(first, jnp.uint32) + jnp.arange(b, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), numbers_b)


_Source = tuple[T5, Params, jax.Array, Inputs]  # reader, parameters, states, what they encode


def _generate(
    source: _Source, config: GenerationConfig, prompt_bp: Array | None, first: Array | int
) -> Answers:
    reader, params, *read = source
    enc_bsd, mask_bs, copyable_bs = fid.fuse(reader, *read)
    keys_b = sample_keys(config, len(enc_bsd), first)
    made = generate(reader, params, enc_bsd, mask_bs, config, keys_b, prompt_bp, copyable_bs)
    return Answers(tokens_bt=made.tokens_bt, scores_b=made.scores_b, calls_b=made.calls_b)


def choice_scores(
    source: _Source,
    choices: Choices,
    prompt_bp: Int[Array, "b p"] | None,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "b c"]:
    """Weighted log-probability of each choice, read from all passages: float32 [b, c].

    A choice that is none has `NEVER`.
    """
    b, c, t = choices.tokens_bct.shape
    prompt = None if prompt_bp is None else jnp.repeat(prompt_bp, c, axis=0)
    decoder, targets = inputs.join_prompt(prompt, choices.tokens_bct.reshape(b * c, t))
    decoded = targets.reshape(b, c, -1), decoder.reshape(b, c, -1)
    logp_bct = fid.variant_logprobs(*source, *decoded, dropout_key)
    # A prompt shifts the targets to the right: shift their log-probabilities back.
    prompt_b = jnp.zeros((b,), jnp.int32)
    if prompt_bp is not None:
        prompt_b = jnp.sum(prompt_bp != PAD_ID, axis=1, dtype=jnp.int32)
    places_bt = prompt_b[:, None] + jnp.arange(t)[None]
    logp_bct = jnp.take_along_axis(logp_bct, places_bt[:, None], axis=2)
    scores_bc = jnp.sum(logp_bct * choices.weights_bct, axis=-1)
    is_choice_bc = jnp.any(choices.tokens_bct != PAD_ID, axis=-1)
    return jnp.where(is_choice_bc, scores_bc, NEVER)


def _choose(source: _Source, choices: Choices, prompt_bp: Array | None) -> Answers:
    """Take the choice with the highest weighted log-probability; the first of equal ones."""
    log_probs_bc = jax.nn.log_softmax(choice_scores(source, choices, prompt_bp), axis=-1)
    best_b1 = jnp.argmax(log_probs_bc, axis=-1, keepdims=True)
    return Answers(
        tokens_bt=jnp.take_along_axis(choices.tokens_bct, best_b1[..., None], axis=1)[:, 0],
        scores_b=jnp.take_along_axis(log_probs_bc, best_b1, axis=1)[:, 0],
        choice_log_probs_bc=log_probs_bc,
    )


def _log_probs(source: _Source, decoder_bt: Array, targets_bt: Array) -> Array:
    """Log-probability of each row's target read from all passages: [b]."""
    logp_b1t = fid.variant_logprobs(*source, targets_bt[:, None], decoder_bt[:, None])
    return jnp.sum(jnp.where(targets_bt != PAD_ID, logp_b1t[:, 0], 0.0), axis=-1)


def explained(
    source: _Source, tokens_bt: Int[Array, "b t"], prompt_bp: Int[Array, "b p"] | None
) -> Evidence:
    """What each passage did for the answers with these tokens."""
    decoder_bt, targets_bt = inputs.join_prompt(prompt_bp, tokens_bt)

    def total(logp: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(targets_bt[:, None] != PAD_ID, logp, 0.0), axis=-1)

    together_b1 = _log_probs(source, decoder_bt, targets_bt)[:, None]
    without_bk = total(fid.leave_one_out_logprobs(*source, targets_bt, decoder_bt))
    mass_bk = fid.cross_attention_mass(*source, targets_bt, decoder_bt)
    layers = source[0].config.num_decoder_layers
    return Evidence(
        attention_bk=adist.gold_scores(mass_bk, targets_bt, layers, "target"),
        alone_bk=total(fid.passage_logprobs(*source, targets_bt, decoder_bt=decoder_bt)),
        left_out_bk=together_b1 - without_bk,
    )
