"""Make a pair encoder from a tower of the retriever, with a tokenizer for it.

So a reader knows a language from the first step, if there is a pretrained BERT for it.
"""

import json
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import EOS_ID, Params
from atlas_jax.reader.config import ReaderConfig

_SENTINELS = 100
_END, _GAP = "[SEP]", "[MASK]"


def reader_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """BERT's tokenizer with T5's special tokens in it.

    The end token `</s>` gets id 1, as in every reader. The unused token that BERT has there moves
    to the place of `[SEP]`. `<extra_id_0>` is `[MASK]`; the other sentinels are unused tokens.
    `start_from_tower` moves the embeddings in the same way.

    Raises:
      UserError: the tokenizer is not BERT's (WordPiece with [CLS], [SEP], [MASK] and [unused0] as
        id 1).
    """
    content: dict[str, Any] = json.loads(tokenizer.text)
    model = content["model"]
    vocab: dict[str, int] = model.get("vocab", {})
    unused = [f"[unused{i}]" for i in range(_SENTINELS)]
    lacking = [t for t in ("[CLS]", _END, _GAP, *unused) if t not in vocab]
    if model.get("type") != "WordPiece" or lacking or vocab["[unused0]"] != EOS_ID:
        raise UserError(
            "ModelConfig.reader_init = 'retriever' needs a retriever with BERT's vocabulary, "
            f"whose id {EOS_ID} is [unused0]; it lacks {', '.join(lacking[:3]) or 'that'}"
        )
    names = {"[unused0]": "</s>", _GAP: "<extra_id_0>"}
    names |= {unused[i]: f"<extra_id_{i}>" for i in range(1, _SENTINELS)}
    model["vocab"] = {names.get(token, token): number for token, number in vocab.items()}
    special = [
        "[PAD]",
        "</s>",
        "[UNK]",
        "[CLS]",
        _END,
        *(f"<extra_id_{i}>" for i in range(_SENTINELS)),
    ]
    content["added_tokens"] = [
        {
            "id": model["vocab"][token],
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for token in sorted(special, key=model["vocab"].__getitem__)
    ]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [EOS_ID], "tokens": ["</s>"]}},
    }
    return Tokenizer(json.dumps(content), "the reader's tokenizer, made from the retriever's")


def start_from_tower(drawn: Params, tower: Params, config: ReaderConfig, end_id: int) -> Params:
    """Random parameters of a reader, but with encoder and token embedding from a tower.

    Args:
      drawn: random parameters of the reader, on the host.
      tower: parameters of one tower of the retriever, on the host.
      config: of the reader.
      end_id: the tower's end token ([SEP]); the reader's end token gets its embedding.

    Raises:
      UserError: the tower has another shape; names the first parameter that differs.
    """
    words = np.array(tower["embeddings"]["word_embeddings"]["embedding"], np.float32)
    rows, width = words.shape
    if config.encoder != "pair" or width != config.emb_dim or rows > config.vocab_size:
        raise UserError(
            "ModelConfig.reader_init = 'retriever' needs ReaderConfig.encoder = 'pair', "
            f"emb_dim = {width} and vocab_size of at least {rows}"
        )
    words[[EOS_ID, end_id]] = words[[end_id, EOS_ID]]
    table = np.zeros((config.vocab_size, width), np.float32)
    table[:rows] = words
    encoder = dict(drawn["encoder"])
    for name in [n for n in encoder if n.startswith("layers_")]:
        encoder[name] = tower.get(name)
    encoder["embeddings"] = {n: v for n, v in tower["embeddings"].items() if n != "word_embeddings"}
    return {**drawn, "token_embedder": {"embedding": table}, "encoder": encoder}
