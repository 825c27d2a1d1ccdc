"""What /metrics tells."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server, apart from those of any other in the process."""

    def __init__(self, waiting: Callable[[], float], ready: Callable[[], float]) -> None:
        """Begin to count.

        Args:
          waiting: tells the questions in the queue.
          ready: tells 1 or 0.
        """
        own = self._registry = CollectorRegistry()
        name = "atlas_jax_"
        self.requests = Counter(
            f"{name}requests", "Requests by route and status.", ["route", "status"], registry=own
        )
        self.seconds = Histogram(
            f"{name}request_seconds", "Seconds of a request.", ["route"],
            registry=own, buckets=_SECONDS,
        )  # fmt: skip
        self.questions = Counter(f"{name}questions", "Questions answered.", registry=own)
        self.shed = Counter(
            f"{name}questions_shed", "Questions refused by a full queue.", registry=own
        )
        self.late = Counter(
            f"{name}questions_late", "Questions given up at the deadline.", registry=own
        )
        self.left = Counter(f"{name}questions_left", "Questions whose client left.", registry=own)
        self.batch = Histogram(
            f"{name}batch_questions", "Questions answered together.",
            registry=own, buckets=(1, 2, 4, 8, 16, 32, 64),
        )  # fmt: skip
        self.stage = Histogram(
            f"{name}stage_seconds", "Seconds of a batch in a stage: find or read.", ["stage"],
            registry=own, buckets=_SECONDS,
        )  # fmt: skip
        queued = Gauge(f"{name}queue_questions", "Questions that wait.", registry=own)
        queued.set_function(waiting)
        compiled = Gauge(f"{name}ready", "1 once every program is compiled.", registry=own)
        compiled.set_function(ready)

    def text(self) -> bytes:
        """All of them, in Prometheus' text form."""
        return generate_latest(self._registry)
