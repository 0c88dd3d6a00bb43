"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flagai_altdiff.web.jobs import Job

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.jobs = Counter("altdiff_jobs", "Jobs that are over, by how they ended.", ["state"], registry=registry)
        self.images = Counter("altdiff_images", "Images that were drawn.", registry=registry)
        self.refused = Counter("altdiff_jobs_refused", "Jobs that were refused: too many waited.", registry=registry)
        self.restarts = Counter("altdiff_worker_restarts", "Processes that died and were replaced.", registry=registry)
        self.batch = Histogram(
            "altdiff_batch_jobs", "Jobs that were drawn together.", buckets=(1, 2, 4, 8, 16), registry=registry
        )
        self._waited = Histogram("altdiff_wait_seconds", "Time in the queue.", buckets=_SECONDS, registry=registry)
        self._drawn = Histogram("altdiff_draw_seconds", "Time of drawing.", buckets=_SECONDS, registry=registry)
        self._waiting = Gauge("altdiff_jobs_waiting", "Jobs in the queue.", registry=registry)

    def watch_waiting(self, number: Callable[[], int]) -> None:
        """Ask this for the length of the queue."""
        self._waiting.set_function(number)

    def count(self, job: Job) -> None:
        """A job is over."""
        self.jobs.labels(job.state).inc()
        if job.began is not None and job.ended is not None:
            self._waited.observe(job.began - job.created)
            self._drawn.observe(job.ended - job.began)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
