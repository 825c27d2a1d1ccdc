"""Make sentencepiece.model and sentencepiece.json: a small T5 vocabulary and what it gives.

    python tests/goldens/make_sentencepiece_goldens.py      # needs the extra [parity]

The model is trained as T5's was: unigram, the normaliser nmt_nfkc, <pad> 0, </s> 1, <unk> 2,
no start token. The text it learns from, and most of what it is tried on, is the first article
of the Universal Declaration of Human Rights in several scripts. The JSON holds the ids that
the sentencepiece library itself gives. tests/interop/test_vocabularies.py reads both.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "sentencepiece.model"
EXPECTED = FOLDER / "sentencepiece.json"

DECLARATION = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with "
    "reason and conscience and should act towards one another in a spirit of brotherhood.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués "
    "de raison et de conscience et doivent agir les uns envers les autres dans un esprit de "
    "fraternité.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft "
    "und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены "
    "разумом и совестью и должны поступать в отношении друг друга в духе братства.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "zh": "人人生而自由，在尊严和权利上一律平等。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
}
ODD = [
    "", " ", "  two  blanks\t a tab\nand a line ", "ﬁne ① ㌔ ｆｕｌｌ",
    "zero\u200bwidth",
    "e\u0301 combined", "smile 😀 and flag 🇫🇷", "\u00a0hard\u00a0blank", "a▁b", "12,345.67 km²",
    "tabs\t\tand\r\nlines", "the end ",
]  # fmt: skip


def texts() -> list[str]:
    """What the vocabulary is tried on."""
    return [*DECLARATION.values(), *ODD]


def main() -> None:
    """Train and record."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*DECLARATION.values()] * 20),
        model_prefix=str(MODEL.with_suffix("")),
        vocab_size=340,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        minloglevel=2,
    )
    MODEL.with_suffix(".vocab").unlink()
    library = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    rows = [{"text": text, "ids": library.encode(text)} for text in texts()]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    EXPECTED.write_text(f"[\n{lines}\n]\n", "utf-8")
    print(f"{MODEL}: {MODEL.stat().st_size} bytes, {len(rows)} texts")


if __name__ == "__main__":
    main()
