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
        ("0-1000:500,1000-10000:2000", [500, 2000, 4000, 6000, 8000]),
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
