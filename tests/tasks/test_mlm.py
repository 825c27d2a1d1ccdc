"""Task `mlm`: what is masked, and that masking loses nothing."""

import re

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.mlm import MLMTask
from atlas_jax.tasks.spans import KINDS, layout, random_spans

FIELDS = (
    "Coastline: 14,500 km. Median age: total: 41.2 years (2025 est.); male: 39.3 years. "
    "Exports: Exports 2023: $3.153 billion (2023 est.); note: data in current dollars. "
    "Chief of state: President Wesley W. SIMINA (since 11 May 2023). "
    "Exports - partners: Jordan 34%, Colombia 31%, USA 7% (2023). Ethnic groups: NA."
)
PROSE = (
    "The Eiffel Tower is in Paris. Swiss workers and Gustave Eiffel began it on 28 January 1887; "
    "However much it cost, about 2 million people came. It opened in May 1889 at a "
    "height of 300 m, says the Museum of Fine Arts in “Élysée”."
)
PLAIN = "nothing of note happens in this text, which has only common words and no numbers at all"


def _spans(text, *kinds, max_words=10):
    return [text[s.start : s.end] for s in layout(text, kinds, max_words).salient]


def _load(tmp_path, task, *texts):
    path = tmp_path / "passages.jsonl"
    rows = [{"id": f"p{i}", "title": f"T{i}", "text": text} for i, text in enumerate(texts)]
    write_jsonl(path, rows)
    return task.load(path)


def _target_spans(target):
    return dict(re.findall(r"(<extra_id_\d+>) (.*?)(?= <extra_id_|$)", target))


def _restore(query, target):
    """Put the target's spans back where the query's sentinels stand."""
    spans = _target_spans(target)
    return re.sub(r"<extra_id_\d+>", lambda match: spans[match.group()], query)


def test_values_are_found_whole():
    assert _spans(FIELDS, "value") == [
        "14,500 km",
        "41.2 years",
        "39.3 years",
        "$3.153 billion",
        "President Wesley W. SIMINA",
        "Jordan 34%, Colombia 31%, USA 7%",
        "NA",
    ]
    assert "Jordan 34%, Colombia 31%, USA 7%" not in _spans(FIELDS, "value", max_words=4)


def test_numbers_and_dates_are_found_with_their_units():
    assert _spans(FIELDS, "number") == [
        "14,500 km", "41.2 years", "39.3 years", "$3.153 billion", "11 May 2023", "34%", "31%",
        "7%", "2023",
    ]  # fmt: skip
    assert _spans(PROSE, "number") == ["28 January 1887", "2 million", "May 1889", "300 m"]


def test_names_are_found_but_not_what_begins_a_sentence():
    assert _spans(PROSE, "entity") == [
        "Eiffel Tower", "Paris", "Gustave Eiffel", "January", "May",
        "Museum of Fine Arts", "Élysée",
    ]  # fmt: skip
    assert _spans(FIELDS, "entity") == [
        "President Wesley W. SIMINA", "May", "Jordan", "Colombia", "USA", "NA",
    ]  # fmt: skip


def test_random_spans_have_the_density_of_t5():
    rng = np.random.default_rng(0)
    for num_words in (2, 3, 10, 100, 512):
        for _ in range(20):
            spans = random_spans(num_words, 0.15, 3.0, 100, rng)
            masked = sum(last - first for first, last in spans)
            assert masked == max(round(num_words * 0.15), 1)
            assert len(spans) == max(round(masked / 3), 1)
            edges = [edge for span in spans for edge in span]
            assert edges == sorted(set(edges)), "spans are apart"
            assert edges[0] > 0 and edges[-1] == num_words
    assert len(random_spans(512, 0.15, 3.0, 4, rng)) == 4
    assert sum(b - a for a, b in random_spans(512, 0.15, 3.0, 4, rng)) == 12


@pytest.mark.parametrize("settings", [
    {"masking": "random"},
    {"masking": "random", "max_query_words": 12, "noise_density": 0.4, "mean_span_words": 1.5},
    {"masking": "salient"},
    {"masking": "salient", "max_query_words": 8, "max_spans": 1},
    {"masking": "salient", "max_query_words": 12, "noise_density": 0.5},
])  # fmt: skip
@pytest.mark.parametrize("text", [FIELDS, PROSE, PLAIN])
def test_putting_the_spans_back_gives_the_text(tmp_path, settings, text):
    task = MLMTask(**settings)
    [record] = _load(tmp_path, task, text)
    for seed in range(40):
        example = task.example(record, np.random.default_rng(seed))
        restored = _restore(example.query_text, example.target_text)
        limit = task.max_query_words
        assert restored in text
        if limit:
            assert len(restored.split()) <= max(limit, task.max_span_words)
        else:
            assert restored == text
        count = example.query_text.count("<extra_id_")
        assert 1 <= count <= task.max_spans
        assert "<extra_id_" not in example.retriever_text
        numbers = [int(i) for i in re.findall(r"<extra_id_(\d+)>", example.query_text)]
        assert numbers == list(range(count))
        without = re.sub(r"<extra_id_\d+>", "", example.query_text)
        assert example.retriever_text == without
        assert example.answers == (" ".join(_target_spans(example.target_text).values()),)


def test_the_masked_share_is_about_the_density(tmp_path):
    text = "The Nile and the Congo meet Kenya with 14 boats and 22 ships in Chad or Mali. " * 8
    task = MLMTask(masking="salient", noise_density=0.2, max_spans=99)
    [record] = _load(tmp_path, task, text.strip())
    for seed in range(10):
        example = task.example(record, np.random.default_rng(seed))
        assert len(example.answers[0].split()) == round(0.2 * len(text.split()))


def test_the_same_rng_masks_the_same(tmp_path):
    for masking in ("random", "salient"):
        task = MLMTask(masking=masking)
        [record] = _load(tmp_path, task, FIELDS)
        one, two, other = (task.example(record, np.random.default_rng(s)) for s in (1, 1, 2))
        assert one == two != other
        assert task.example(record) == task.example(record)


def test_the_passage_itself_is_excluded(tmp_path):
    [record] = _load(tmp_path, MLMTask(), PROSE)
    assert MLMTask().example(record).excluded_ids == ("p0",)
    assert MLMTask(filter_self=False).example(record).excluded_ids == ()
    late = MLMTask(filter_self_after=10)
    assert [late.example(record, step=s).excluded_ids for s in (9, 10)] == [(), ("p0",)]


def test_formats_put_the_title_in_front(tmp_path):
    task = MLMTask(query_format="{title}: {text}", retriever_format="{title} {section} {text}")
    [record] = _load(tmp_path, task, PROSE)
    example = task.example(record)
    assert example.query_text.startswith("T0: ")
    assert example.retriever_text.startswith("T0  ")


def test_short_passages_are_left_out(tmp_path):
    assert len(_load(tmp_path, MLMTask(min_words=5), PLAIN, "too short")) == 1
    with pytest.raises(UserError, match="no passage has 10 words"):
        _load(tmp_path, MLMTask(), "too short")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masking": "both"}, "MLMTask.masking = 'both': expected 'random' or 'salient'"),
        ({"noise_density": 0.0}, "MLMTask.noise_density = 0.0"),
        ({"mean_span_words": 0.5}, "MLMTask.mean_span_words"),
        ({"max_spans": 0}, "MLMTask.max_spans"),
        ({"max_span_words": 0}, "MLMTask.max_span_words"),
        ({"max_query_words": 1}, "MLMTask.max_query_words"),
        ({"min_words": 1}, "MLMTask.min_words"),
        ({"span_kinds": ("values",)}, f"MLMTask.span_kinds.*{KINDS[0]}"),
        ({"query_format": "{question}"}, "MLMTask.query_format"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        MLMTask(**settings)
