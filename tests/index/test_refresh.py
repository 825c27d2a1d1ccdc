"""Refresh schedules."""

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.index.refresh import RefreshPolicy


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        ("-1", []),
        (-1, []),
        ("1000", list(range(1000, 12001, 1000))),
        (3000, [3000, 6000, 9000, 12000]),
        ("0-1000:500,1000-10000:2000", [500, 1000, 3000, 5000, 7000, 9000]),
        ("0-100:10,100-1000:450", [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 550]),
        ("0-100:100", []),
        ("5000-5001:1000", [5000]),
    ],
)
def test_due_steps(schedule, due):
    policy = RefreshPolicy(schedule)
    assert [step for step in range(12001) if policy.due(step)] == due


@pytest.mark.parametrize(
    "schedule", ["", "0", "-2", "often", "0-10", "10-0:5", "0-10:0", "0-20:5,10-30:5", "0-9:1,"]
)
def test_bad_schedule_names_the_binding(schedule):
    with pytest.raises(UserError, match="RefreshPolicy.schedule"):
        RefreshPolicy(schedule)


@pytest.mark.parametrize(
    ("frozen", "due"), [(0, [2, 4, 6, 8]), (3, [4, 6, 8]), (4, [6, 8]), (8, [])]
)
def test_what_a_frozen_tower_embedded_is_not_embedded_again(frozen, due):
    """Once 4 steps are done of which 4 were frozen, the tower is still as it was."""
    assert [step for step in range(9) if RefreshPolicy(2).due(step, frozen)] == due
    rolling = RefreshPolicy(rolling_rows=3, rolling_every=2)
    assert [step for step in range(9) if rolling.rolls(step, frozen)] == due


def test_slices_go_round_within_the_bound():
    policy = RefreshPolicy(rolling_rows=3, rolling_every=2)
    assert [step for step in range(9) if policy.rolls(step)] == [2, 4, 6, 8]
    assert policy.round_steps(16) == 12  # six slices
    assert policy.refreshes and not RefreshPolicy().refreshes and RefreshPolicy(5).refreshes
    assert not any(RefreshPolicy(5).rolls(step) for step in range(20))


@pytest.mark.parametrize("fields", [{"rolling_rows": -1}, {"rolling_every": 0}])
def test_bad_slices_name_the_binding(fields):
    with pytest.raises(UserError, match=f"RefreshPolicy.{next(iter(fields))} = "):
        RefreshPolicy(**fields)
