"""Prometheus metrics of one server."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .batching import Scheduler

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """The registry and what the server reports into it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        self.registry.register(_State(scheduler))
        self._requests = Counter(
            "skimtvm_requests", "Inference requests answered, by HTTP status.", ["status"], registry=self.registry
        )
        self._seconds = Histogram(
            "skimtvm_request_seconds",
            "Seconds from the headers of an inference request that succeeded to its last byte sent.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        sizes = sorted({1, 2, 4, 8, 16, 32, 64, 128, scheduler.signature.capacity})
        self._rows = Histogram("skimtvm_batch_rows", "Rows in a batch.", buckets=sizes, registry=self.registry)
        self._run = Histogram(
            "skimtvm_batch_seconds", "Seconds that a batch ran.", buckets=_SECONDS, registry=self.registry
        )
        scheduler.on_batch = self.batch

    def request(self, status: int, seconds: float) -> None:
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def batch(self, rows: int, seconds: float) -> None:
        self._rows.observe(rows)
        self._run.observe(seconds)

    def page(self) -> bytes:
        """The text exposition format, version 0.0.4."""
        return generate_latest(self.registry)


class _State(Collector):
    """What is read off when asked."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def collect(self):  # type: ignore[no-untyped-def]
        scheduler, pool = self.scheduler, self.scheduler.pool
        yield GaugeMetricFamily("skimtvm_queue_requests", "Requests that wait for a worker.", scheduler.queued)
        yield GaugeMetricFamily("skimtvm_admitted_requests", "Requests that hold a place.", scheduler.admitted)
        yield GaugeMetricFamily("skimtvm_places", "Requests that can hold a place.", scheduler.limit)
        yield GaugeMetricFamily("skimtvm_workers_ready", "Workers that can run batches.", len(pool.workers))
        yield GaugeMetricFamily(
            "skimtvm_worker_restarts", "Starts of replacements since the server started.", pool.restarts
        )
        memory = GaugeMetricFamily(
            "skimtvm_worker_resident_bytes", "Resident memory of a worker.", labels=["worker", "pid"]
        )
        for index, worker in sorted(pool.workers.items()):
            memory.add_metric([str(index), str(worker.pid)], resident_bytes(worker.pid))
        yield memory


def resident_bytes(pid: int) -> int:
    """Resident memory of the process ``pid``; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/statm") as f:
            return int(f.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
