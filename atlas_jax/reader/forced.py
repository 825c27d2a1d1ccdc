"""What decoding may not choose freely: the tokens of a prompt, and an end that comes too early."""

from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Int

from atlas_jax.core.types import PAD_ID, Array

if TYPE_CHECKING:
    from atlas_jax.reader.generate import GenerationConfig

NEVER = -1e9  # score of a hypothesis that may not be chosen


@flax.struct.dataclass
class Forced:
    """Forces the prompt's tokens, and forbids an end before the minimum length.

    Attributes:
      prompt_bp: tokens, padded right; p may be 0.
      length_b: tokens of each prompt.
      width: p.
    """

    prompt_bp: jax.Array
    length_b: jax.Array
    width: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, prompt_bp: Int[Array, "b p"] | None, b: int, config: "GenerationConfig"
    ) -> "Forced":
        """What is forced on b queries; without prompts only the minimum length.

        Args:
          prompt_bp: int32 tokens, padded right.
        """
        if prompt_bp is None:
            prompt_bp = jnp.zeros((b, 0), jnp.int32)
        length_b = jnp.sum(prompt_bp != PAD_ID, axis=1, dtype=jnp.int32)
        return cls(prompt_bp=prompt_bp, length_b=length_b, width=prompt_bp.shape[1])

    def token_b(self, index: jax.Array) -> jax.Array:
        """The prompt's token at this position; padding after its end."""
        return self.tokens(jnp.broadcast_to(index, (len(self.length_b), 1)))[:, 0]

    def tokens(self, places_bw: Int[Array, "b w"]) -> Int[Array, "b w"]:
        """The prompts' tokens at w positions of each query; padding after their ends."""
        if not self.width:
            return jnp.full_like(places_bw, PAD_ID)
        at_bw = jnp.minimum(places_bw, self.width - 1)
        tokens_bw = jnp.take_along_axis(self.prompt_bp, at_bw, axis=1)
        return jnp.where(places_bw < self.length_b[:, None], tokens_bw, PAD_ID)

    def is_last(self, places: jax.Array, config: "GenerationConfig") -> jax.Array:
        """Whether the token at a position is the last that may be generated.

        Args:
          places: int32, a scalar for all queries, or [b, ...].
        """
        return places + 1 >= self._lengths(places) + config.max_length

    def no_end(self, logits: jax.Array, places: jax.Array, config: "GenerationConfig") -> jax.Array:
        """Logits or scores [b, ..., v] that forbid the end token while it is too early.

        Args:
          places: int32, a scalar for all of them, or [b, ...] without v.
        """
        if not config.min_length:
            return logits
        early = places < self._lengths(places) + config.min_length
        early = early.reshape(*early.shape, *(1,) * (logits.ndim - early.ndim))
        is_end = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == config.eos_id
        return jnp.where(early & is_end, NEVER, logits)

    def _lengths(self, places: jax.Array) -> jax.Array:
        """The prompts' lengths, [b], or [b, 1, ...] beside positions [b, ...]."""
        return self.length_b.reshape(-1, *(1,) * max(0, places.ndim - 1))

    def remove(self, tokens_bt: Int[Array, "b t"], length: int) -> Int[Array, "b {length}"]:
        """The generated tokens alone, [b, length]."""
        if not self.width:
            return tokens_bt
        places = self.length_b[:, None] + jnp.arange(length)[None]
        return jnp.take_along_axis(tokens_bt, places, axis=1)
