"""Two processes without a second one: threads that meet in memory."""

import threading
import types
from concurrent import futures

import pytest

from atlas_jax.core import meeting
from atlas_jax.core.errors import UserError


@pytest.fixture
def two(monkeypatch):
    """Two processes: threads that meet in memory. Gives what each returned or raised."""
    place, values = threading.local(), {}

    class Service:
        def key_value_set(self, key, value, allow_overwrite):
            values[key] = value

        def key_value_dir_get(self, folder):
            return [(key, value) for key, value in list(values.items()) if key.startswith(folder)]

    def number():
        place.meetings = getattr(place, "meetings", 0) + 1
        return place.meetings

    def run(work):
        values.clear()

        def one(index):
            place.index = index
            try:
                return work(index)
            except (UserError, OSError) as error:
                return error

        with futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, (0, 1)))

    client = types.SimpleNamespace(client=Service())
    plain = meeting.joined
    monkeypatch.setattr(
        meeting, "joined", lambda: (place.index, 2) if hasattr(place, "index") else plain()
    )
    monkeypatch.setattr(meeting, "_NUMBERS", iter(number, None))
    monkeypatch.setattr(meeting, "distributed", types.SimpleNamespace(global_state=client))
    return run
