"""Words of a text in any script, for finding answers in passages and for leak control.

Tokens follow DPR's rule (`SimpleTokenizer`, Karpukhin et al. 2020), with which Atlas and similar
models report whether a passage has the answer. A token is a run of letters, digits and marks, or a
single other visible sign; case does not count. Additions for other scripts:

* both texts in one Unicode form (NFKD of the case-folded text): ligatures, full-width letters,
  composed and decomposed accents;
* invisible characters are left out (soft hyphens, joiners, byte order marks, the Arabic tatweel);
* typographic quotes and hyphens become ASCII ones;
* scripts without blanks between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) count
  character by character, each with its marks.
"""

import unicodedata

import regex

_NO_BLANKS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TOKEN = regex.compile(
    rf"(?V1)[{_NO_BLANKS}--\p{{M}}--\p{{P}}]\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}\p{{M}}]--[{_NO_BLANKS}--\p{{M}}]]+"
    r"|[^\p{Z}\p{C}]"
)
_ASCII_TOKEN = regex.compile(r"[a-z0-9]+|[!-~]")
_UNSEEN = regex.compile(r"[\p{Cf}\p{Default_Ignorable_Code_Point}\u0640]")
_TYPOGRAPHIC = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4\u02b9", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
    }
)


def tokens(text: str) -> list[str]:
    """The text's words and signs, in one form; no token has a blank in it."""
    if text.isascii():
        return _ASCII_TOKEN.findall(text.lower())
    plain = _UNSEEN.sub("", text.translate(_TYPOGRAPHIC))
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", plain).casefold())
    return list(_TOKEN.findall(plain.translate(_TYPOGRAPHIC)))


def words(text: str) -> list[str]:
    """The tokens that have a letter or digit."""
    return [token for token in tokens(text) if any(map(str.isalnum, token))]
