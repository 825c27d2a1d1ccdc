import pytest

from atlas_jax.claims.verdict import (
    NOT_RUN,
    NOT_SHOWN,
    ONE_SEED,
    OPPOSITE,
    SHOWN,
    judge,
    summarise,
)


def _judge(row, against, expects="more", floor=0.0):
    return judge(summarise(row), summarise(against), expects, floor)


def test_a_difference_counts_above_the_pooled_spread():
    # Standard deviations 1 and 2: pooled sqrt((1 + 4) / 2) = 1.58.
    low, high = [1.0, 2.0, 3.0], [1.6, 3.6, 5.6]
    found = _judge(high, low)
    assert found.verdict == SHOWN
    assert found.difference == pytest.approx(1.6)
    assert found.threshold == pytest.approx(1.5811, abs=1e-4)
    assert _judge([v - 0.1 for v in high], low).verdict == NOT_SHOWN
    assert _judge(low, high).verdict == OPPOSITE
    assert _judge(low, [v - 0.1 for v in high]).verdict == NOT_SHOWN


def test_alike_is_a_difference_that_does_not_count():
    low, high = [1.0, 2.0, 3.0], [1.6, 3.6, 5.6]
    assert _judge(high, low, "alike").verdict == NOT_SHOWN
    assert _judge(low, high, "alike").verdict == NOT_SHOWN
    assert _judge([v - 0.1 for v in high], low, "alike").verdict == SHOWN
    # Two rows that answer nothing are alike, and show nothing.
    assert _judge([0.4, 0.4], [0.0, 0.0], "alike", floor=0.5).verdict == NOT_SHOWN
    assert _judge([0.6, 0.6], [0.3, 0.3], "alike", floor=0.5).verdict == SHOWN


def test_one_question_is_no_difference_even_without_spread():
    assert _judge([0.5, 0.5], [0.0, 0.0], floor=0.5).verdict == NOT_SHOWN
    assert _judge([0.6, 0.6], [0.0, 0.0], floor=0.5).verdict == SHOWN


def test_without_two_seeds_there_is_no_verdict():
    assert _judge([9.0], [1.0, 1.0]).verdict == ONE_SEED
    assert _judge([9.0], [1.0, 1.0]).difference == 8.0
    assert _judge([], [1.0, 1.0]).verdict == NOT_RUN
