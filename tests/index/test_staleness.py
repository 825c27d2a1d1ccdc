"""What the staleness meter measures, by hand and against NumPy."""

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.index.staleness import StalenessConfig, measure


def test_a_fresh_index_is_not_stale():
    rng = np.random.default_rng(0)
    queries, passages = rng.standard_normal((3, 8)), rng.standard_normal((20, 8))
    found = measure(queries, np.ones(3), passages, passages, k=4)
    assert (float(found["stale_recall"]), float(found["drift"])) == (1, 0)


def test_recall_and_drift_of_a_case_done_by_hand():
    # Two axes; a query along one sees the passages by that coordinate.
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    fresh = np.array([[3.0, 0.0], [0.0, 4.0], [2.0, 0.0], [0.0, 1.0]])
    stale = fresh.copy()
    stale[2] = [0.0, 2.0]  # the passage that has turned from the second axis to the first
    # Fresh top 2: {0, 2} and {1, 3}; stale: {0, 1}, the tie to the lower row, and {1, 2}.
    found = measure(queries, np.array([1.0, 1.0, 0.0]), stale, fresh, k=2)
    assert float(found["stale_recall"]) == pytest.approx((1 / 2 + 1 / 2) / 2)
    # |(2, 0) - (0, 2)| / |(2, 0)| = sqrt(2), for one passage of four.
    assert float(found["drift"]) == pytest.approx(np.sqrt(2) / 4)


def test_the_probe_is_the_same_in_every_run_and_never_repeats_a_row():
    config = StalenessConfig(passages=50)
    rows = config.probe_rows(1000)
    assert len(set(rows.tolist())) == 50 and rows.max() < 1000
    np.testing.assert_array_equal(rows, StalenessConfig(passages=50).probe_rows(1000))
    assert rows.tolist() != StalenessConfig(passages=50, seed=1).probe_rows(1000).tolist()
    np.testing.assert_array_equal(config.probe_rows(20), np.arange(20))
    with pytest.raises(UserError, match=r"StalenessConfig\.k = 10 is more than the 9 passages"):
        config.probe_rows(9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": -1}, r"StalenessConfig\.every = -1"),
        ({"k": 0}, r"StalenessConfig\.k = 0"),
        ({"k": 9, "passages": 8}, r"StalenessConfig\.k = 9 is more than .*passages = 8"),
        (
            {"every": 1, "refresh_below": 1.5},
            r"refresh_below = 1\.5: expected a finite",
        ),
        ({"refresh_below": 0.9}, r"refresh_below = 0\.9 is never looked at"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        StalenessConfig(**fields)
