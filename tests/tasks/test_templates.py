"""Templates and label words: what they make, what is cut, and every way to write them wrong."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import unmarked
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.tasks.templates import (
    Template,
    Verbaliser,
    encode_prompts,
    mask_text,
)

FIELDS = ("premise", "hypothesis")


def parsed(text: str, fields: tuple[str, ...] = ("text",)) -> Template:
    return Template.parse(text, fields, "Some.query_format")


@pytest.fixture(scope="module")
def wordpiece(retriever_tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_file(retriever_tokenizer_file)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As RoBERTa's: a word's token has the blank before it, and the mask takes one, too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    merged = ["ok", "\u0120o", "\u0120ok"]
    vocab = {piece: number for number, piece in enumerate([*specials, *alphabet, *merged])}
    merges = [("o", "k"), ("\u0120", "o"), ("\u0120", "ok")]
    made = Library(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(
        [AddedToken(name, lstrip=name == "<mask>", normalized=False) for name in specials]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    made.save(str(path))
    return Tokenizer.from_file(path)


def test_fields_are_changed_as_the_template_says() -> None:
    template = parsed("{premise!drop} ? {mask} , {hypothesis!lower}", FIELDS)
    prompt = template.filled({"premise": "It rains.", "hypothesis": "It is Wet"}, "M")
    assert prompt.text == "It rains ? M , it is Wet"
    assert [prompt.text[cut.start : cut.end] for cut in prompt.cuts] == ["It rains", "it is Wet"]
    kept = template.filled({"premise": "It rains", "hypothesis": ""}, "M")
    assert kept.text == "It rains ? M , "
    assert parsed("{{{text}}} {mask}").filled({"text": "x"}, "M").text == "{x} M"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{text} It was", r"0 times {mask}; a template has it exactly once"),
        ("{mask} {text} {mask}", r"2 times {mask}"),
        ("{txt} {mask}", r"no field {txt}; did you mean text\?"),
        ("{text!upper} {mask}", r"{text!upper} is no field with a change; there is {name!drop}"),
        ("{text} {mask!lower}", r"{mask!lower} is no field with a change"),
        ("{soft!0} {text} {mask}", r"{soft!0} is no field with a change"),
        ("{soft!3} {mask}", r"it asks nothing of a line; put {text} into it"),
        ("It was {mask}", r"it asks nothing of a line; put {text} into it"),
        ("{text} {mask} }", r"a single '}'; {{ and }} stand for braces"),
        ("{text} [MASK] {mask}", r"write {mask} in place of \[MASK\]"),
        ("{text} <extra_id_0> {mask}", r"write {mask} in place of <extra_id_0>"),
    ],
)
def test_a_wrong_template_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"^Some.query_format = .*: {says}"):
        parsed(text)


def test_a_long_text_is_cut_at_its_end_and_the_mask_is_not(wordpiece: Tokenizer) -> None:
    template = parsed("{premise} ? {mask} , {hypothesis}", FIELDS)
    mask = mask_text(wordpiece)
    asked = {"premise": "what is the capital of which country", "hypothesis": "river city"}
    prompts = [template.filled(asked, mask), template.filled({**asked, "premise": "the"}, mask)]
    tokens_bl, mask_at_b = encode_prompts(wordpiece, prompts, 9, ["x:1", "x:2"])
    texts = [wordpiece.decode(row, skip_special=True) for row in tokens_bl]
    assert texts == ["what is?, river city", "the?, river city"]
    assert tokens_bl[[0, 1], mask_at_b].tolist() == [wordpiece.mask_id] * 2
    assert mask_at_b.tolist() == [4, 3]
    tight, _ = encode_prompts(wordpiece, prompts[:1], 6, ["x:1"])
    assert wordpiece.decode(tight[0]) == "what?,"
    with pytest.raises(UserError, match=r"x:1: what has to stay whole .* more than 4 tokens"):
        encode_prompts(wordpiece, prompts[:1], 4, ["x:1"])


def test_marks_are_the_vectors_of_a_trained_prompt(wordpiece: Tokenizer) -> None:
    template = parsed("{soft} {text} {soft!2} {mask} , {soft}")
    assert (template.soft, template.masked) == (4, 3)
    prompt = template.filled({"text": "the river of [MASK]"}, mask_text(wordpiece))
    soft = range(900, 904)
    tokens_bl, mask_at_b = encode_prompts(wordpiece, [prompt] * 2, 20, ["x:1"] * 2, template, soft)
    row = tokens_bl[1].tolist()
    assert [row.index(one) for one in soft] == [1, row.index(902) - 1, row.index(902), 18 - 3]
    assert tokens_bl[0, mask_at_b[0]] == wordpiece.mask_id == row[row.index(902) + 1]
    assert row.count(wordpiece.mask_id) == 1
    words = Verbaliser.of({"a": "small", "b": "large"}, ("a", "b"), "T.label_words")
    ids = words.tokens(template, wordpiece).ids_cw[:, 0].tolist()
    assert ids == [wordpiece.encode(word, False)[0] for word in ("small", "large")]


def test_a_mask_in_a_lines_text_is_text(wordpiece: Tokenizer) -> None:
    prompt = parsed("{text} {mask}").filled({"text": "the [MASK] city"}, mask_text(wordpiece))
    tokens_bl, mask_at_b = encode_prompts(wordpiece, [prompt], 20, ["x:1"])
    assert (tokens_bl == wordpiece.mask_id).sum() == 1
    assert mask_at_b[0] == (tokens_bl[0] != 0).sum() - 2
    assert unmarked(prompt.text) == "the [MASK] city [MASK]"


def test_words_are_tokens_and_several_are_a_mean(wordpiece: Tokenizer) -> None:
    words = Verbaliser.of({"b": ["large", "city"], "a": "Small"}, ("a", "b"), "T.label_words")
    found = words.tokens(parsed("{text} It was {mask} ."), wordpiece)
    ids = {word: wordpiece.encode(word, False) for word in ("small", "large", "city")}
    assert found.ids_cw.tolist() == [[*ids["small"], 0], [*ids["large"], *ids["city"]]]
    assert found.weights_cw.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert words.first == {"a": "Small", "b": "large"}


def test_the_leading_blank_belongs_to_the_word(byte_level: Tokenizer) -> None:
    words = Verbaliser.of({"a": "ok"}, ("a",), "T.label_words")
    (within,) = words.tokens(parsed("{text} is {mask} ."), byte_level).ids_cw[:, 0]
    (first,) = words.tokens(parsed("{mask} : {text}"), byte_level).ids_cw[:, 0]
    assert byte_level.decode([within]) == byte_level.decode([first]) == "ok"
    assert within == first + 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"a": "small", "b": "lake"},
         r"label 'b': the word 'lake' is 4 tokens in '{text} It was {mask} .' "
         r"\('l', '##a', '##k', '##e'\); give a word that is one"),
        ({"a": "small", "b": "\u03b2"}, "label 'b': the word '\u03b2' is not in the vocabulary"),
        ({"a": "small", "b": "SMALL"}, r"the word 'SMALL' is the token of 'small' \(label 'a'\)"),
    ],
)  # fmt: skip
def test_a_word_that_is_no_token_of_its_own_is_refused(
    wordpiece: Tokenizer, given: dict[str, str], says: str
) -> None:
    words = Verbaliser.of(given, ("a", "b"), "T.label_words")
    with pytest.raises(UserError, match=f"^T.label_words: .*{says}"):
        words.tokens(parsed("{text} It was {mask} ."), wordpiece)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"a": "x"}, "the label 'b' has no word"),
        ({"a": "x", "b": "y", "bb": "z"}, r"the task has no label 'bb'"),
        ({"a": "x", "b": []}, "label 'b': expected a word or a list of words"),
        ({"a": "x", "b": ["y", 1]}, "label 'b': expected a word or a list of words"),
        ("x", "expected a dict"),
    ],
)
def test_label_words_that_do_not_fit_the_labels_are_refused(given: Any, says: str) -> None:
    with pytest.raises(UserError, match=f"^T.label_words.*{says}"):
        Verbaliser.of(given, ("a", "b"), "T.label_words")


def test_an_encoder_without_a_mask_token_cannot_be_prompted(reader_tokenizer_file: Path) -> None:
    with pytest.raises(UserError, match=r"has no mask token \(\[MASK\] or <mask>\)"):
        mask_text(Tokenizer.from_file(reader_tokenizer_file))
