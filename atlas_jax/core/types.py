"""The axis legend and the array structs that pass between the parts.

Every array name ends with its axes, one letter each::

    b  batch (queries)          q  query tokens, reader vocabulary
    k  passages per query       r  query tokens, retriever vocabulary
    l  passage or input tokens  m  passage tokens, retriever vocabulary
    t  target tokens            n  index rows
    s  source positions (k*l)   e  embedding width
    d  model width              h  heads
    v  vocabulary               x  excluded rows per query
    c  choices per query        p  decoder prompt tokens
    g  packed rows per query

Token id 0 is padding everywhere; row -1 means "no passage".
"""

from typing import Any

import flax.struct
import jax

Array = jax.Array | Any  # numpy arrays are accepted wherever jax arrays are
Params = Any  # a nested dict of arrays

PAD_ID = 0
EOS_ID = 1  # end of sequence, in every T5 vocabulary
NO_ROW = -1


@flax.struct.dataclass
class Passages:
    """Retrieved (or given) passages of a batch of queries.

    Attributes:
      rows_bk: int32 index rows, best first; -1 where there is no passage.
      scores_bk: float32 inner products at search time; -inf where there is none.
      reader_tokens_bkl: int32 reader tokens of the passage part, without end token.
      retriever_tokens_bkm: int32 retriever tokens with their special tokens; None where nothing
        embeds the passages anew.
      mask_bk: bool, True for a real passage. Decides every later mask.
      embeddings_bke: the passages' embeddings as they lie in the index. Used for the
        retriever's scores when the passage tower is not trained; None re-embeds them. Those
        of an int8 index come as float32; re-ranked ones are fresh.
      apart_bkf: what a pair encoder's lower layers make of the passages, m tokens x d of each
        in a row; None = it is not kept.
    """

    rows_bk: Array
    scores_bk: Array
    reader_tokens_bkl: Array
    retriever_tokens_bkm: Array | None
    mask_bk: Array
    embeddings_bke: Array | None = None
    apart_bkf: Array | None = None


@flax.struct.dataclass
class Choices:
    """The answers among which each query's is chosen.

    Attributes:
      tokens_bct: int32 reader tokens of each choice with its end token; a choice that is
        none is all padding.
      weights_bct: float32, what the log-probability of each token counts.
    """

    tokens_bct: Array
    weights_bct: Array


@flax.struct.dataclass
class Edited:
    """Passages that a query finds and reads with another text than the index has.

    Attributes:
      rows_bw: int32 index rows; -1 pads.
      reader_tokens_bwl: int32 reader tokens of the new text, as in `Passages`.
      retriever_tokens_bwm: int32 retriever tokens of the new text.
    """

    rows_bw: Array
    reader_tokens_bwl: Array
    retriever_tokens_bwm: Array


@flax.struct.dataclass
class Batch:
    """One batch of tokenised queries with static shapes.

    Attributes:
      query_tokens_bq: int32 reader tokens of the query, no end token, padded right.
      retriever_tokens_br: int32 retriever tokens of the query with special tokens.
      target_tokens_bt: int32 reader tokens of the target with its end token.
      excluded_rows_bx: int32 index rows that may not be retrieved; -1 pads.
      weight_b: float32, 1 for a real row and 0 for a row that only fills the batch.
      given: passages that came with the data file, instead of retrieved ones.
      prompt_tokens_bp: int32 reader tokens that the decoder begins with, padded right; None
        = no row has any.
      joined_prompt_bp: the same as it is tokenised together with the target, which can differ
        where the two meet; None = they are tokenised apart.
      choices: None = answers are generated.
      hidden_b3: int32 index row, and first and last + 1 of its reader tokens that the reader does
        not see; row -1 = none. None = no row has any.
      included_rows_b: int32 index row that is read whatever is found, as the first; -1 = none.
        None = no row has any.
      k_b: int32 number of passages that each query gets at most; None = as many as are searched.
      edited: passages with another text; their rows are excluded. None = no row has any.
    """

    query_tokens_bq: Array
    retriever_tokens_br: Array
    target_tokens_bt: Array
    excluded_rows_bx: Array
    weight_b: Array
    given: Passages | None = None
    prompt_tokens_bp: Array | None = None
    joined_prompt_bp: Array | None = None
    choices: Choices | None = None
    hidden_b3: Array | None = None
    included_rows_b: Array | None = None
    k_b: Array | None = None
    edited: Edited | None = None

    @property
    def taught_prompt_bp(self) -> Array | None:
        """What stands before the target; `prompt_tokens_bp` stands before what is generated."""
        return self.prompt_tokens_bp if self.joined_prompt_bp is None else self.joined_prompt_bp


@flax.struct.dataclass
class DeviceIndex:
    """The index as it lies on the devices: every array sharded on axis n, on each slice.

    Attributes:
      embeddings_ne: float32 or bfloat16 passage embeddings, or in 8 bits (`index.int8.Int8Rows`).
      reader_tokens_nl: unsigned or int32 reader tokens of each passage.
      retriever_tokens_nm: unsigned or int32 retriever tokens of each passage; None where nothing
        embeds the passages anew.
      count: int32 scalar, number of real rows; rows at or above it are padding.
      version: int32 scalar, how often the embeddings have been refreshed.
      apart_nf: float16 states of a pair encoder's lower layers, m tokens x d of each passage in a
        row; None = they are not kept.
    """

    embeddings_ne: Array
    reader_tokens_nl: Array
    retriever_tokens_nm: Array | None
    count: Array
    version: Array
    apart_nf: Array | None = None
