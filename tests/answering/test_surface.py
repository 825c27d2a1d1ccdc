"""Copied answers get the writing of the passage that they stand in."""

import pytest

from atlas_jax.answering.surface import as_written

TEXT = "Population: 174,370,536 (2024 est.). Chief: Mahamat Idriss Déby, of N'Djamena; GDP $1.5 bn."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("174, 370, 536", "174,370,536"),
        ("mahamat idriss deby", "Mahamat Idriss Déby"),
        ("n ' djamena", "N'Djamena"),
        ("$ 1. 5 bn", "$1.5 bn"),
        ("370, 536", "174,370,536"),  # a part of a number
        ("174, 370", "174,370,536"),
        ("somewhere else", "somewhere else"),
        ("12, 345 km", "12,345 km"),
        ("mahamat idr", "Mahamat Idriss"),  # stopped within a word
        ("hamat", "hamat"),  # no word begins so
        ("##hamat idriss", "Mahamat Idriss"),  # the decoded text says that it began within a word
        ("##hamat idr", "Mahamat Idriss"),
        ("##nowhere", "nowhere"),
        ("", ""),
    ],
)
def test_an_answer_is_written_as_in_the_text(answer: str, expected: str) -> None:
    assert as_written(answer, ["nothing here", TEXT]) == expected


def test_the_first_text_counts_and_a_long_letter_keeps_its_place() -> None:
    assert as_written("paris", ["in Paris", "PARIS"]) == "Paris"
    assert as_written("istanbul", ["İİ İstanbul"]) == "İstanbul"
