"""Prometheus metrics: counters and histograms of events, gauges that call a function at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stable_diffusion_server.types import EngineEvent, EngineEventKind

# Label values and value of one sample.
Sample = tuple[Sequence[str], float]
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_MOMENTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_GROUPS = (1, 2, 4, 8, 16, 32, 64)


class UsageMetrics:
    """Records the outcome of generation requests; this base class records nothing."""

    def record_generation(self, source: str) -> None:
        """Record a request answered from `source`: drawn, cached or coalesced."""

    def record_quality_check(self, check: str) -> None:
        """Record that a quality check found a fault in an image; `check` is the code of the caller's warning."""

    def record_stored(self, timings: Mapping[str, float]) -> None:
        """Record a generated and stored image; `timings` are the seconds of each stage."""


@dataclass(frozen=True, slots=True)
class RequestSample:
    """An answered HTTP request: route, status, duration in seconds, and API key.

    `route` is the path template, empty if no route matched; `reason` is the kind of error of a refused request,
    otherwise empty; `key` is the name of the caller's API key. So each label has few values for any request.
    """

    route: str
    status: int
    seconds: float
    reason: str = ""
    key: str = ""


class Metrics(UsageMetrics):
    """Prometheus metrics in a separate registry. Thread-safe."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._jobs = Counter("sds_jobs", "Jobs by outcome", ["outcome"], registry=registry)
        self._failures = Counter(
            "sds_job_failures", "Jobs that failed, by the kind of error", ["kind"], registry=registry
        )
        self._retries = Counter("sds_job_retries", "Jobs restarted, by cause", ["cause"], registry=registry)
        self._steps = Counter("sds_steps", "Denoising steps done, summed over jobs", registry=registry)
        self._batch_sizes = Histogram(
            "sds_batch_size",
            "Batch size of each step of each job",
            buckets=_GROUPS,
            registry=registry,
        )
        self._queued = Histogram(
            "sds_queue_seconds", "From acceptance to the device", buckets=_SECONDS, registry=registry
        )
        self._seconds = Histogram("sds_job_seconds", "From acceptance to image", buckets=_SECONDS, registry=registry)
        self._generations = Counter(
            "sds_generations", "Generation requests answered, by source of the image", ["source"], registry=registry
        )
        self._quality_checks = Counter(
            "sds_quality_checks", "Images in which a quality check found a fault", ["check"], registry=registry
        )
        self._stages = Histogram(
            "sds_stage_seconds", "Seconds of each stage of a generation", ["stage"], buckets=_MOMENTS, registry=registry
        )
        self._storage = Histogram(
            "sds_storage_seconds", "Calls to the bucket", ["call"], buckets=_MOMENTS, registry=registry
        )
        self._storage_errors = Counter(
            "sds_storage_errors", "Calls to the bucket that failed", ["call"], registry=registry
        )
        self._requests = Counter("sds_http_requests", "Requests answered", ["route", "status"], registry=registry)
        self._request_seconds = Histogram(
            "sds_http_request_seconds", "Seconds of a request", ["route"], buckets=_MOMENTS, registry=registry
        )
        self._refusals = Counter(
            "sds_refusals", "Requests refused, by why and for whom", ["reason", "key"], registry=registry
        )

    def register_gauge(
        self,
        name: str,
        description: str,
        read: Callable[[], float | Iterable[Sample]],
        labels: Sequence[str] = (),
        *,
        counts: bool = False,
    ) -> None:
        """Register a metric that calls `read` at each scrape: a number, or samples with these labels.

        `counts`: the value only grows, so export it as a counter.
        """
        self.registry.register(_CallbackCollector(name, description, read, labels, counts=counts))

    def register_info(self, name: str, description: str, labels: Mapping[str, str]) -> None:
        """Register constant facts as the labels of a gauge with value 1."""
        Gauge(name, description, list(labels), registry=self.registry).labels(**labels).set(1)

    def observe(self, event: EngineEvent) -> None:
        """Count an event of the engine."""
        match event.kind:
            case EngineEventKind.STEP:
                self._steps.inc()
                self._batch_sizes.observe(event.batch_size)
                return
            case EngineEventKind.RESTARTED:
                self._retries.labels(event.cause).inc()
                return
            case EngineEventKind.STARTED:
                self._queued.observe(event.seconds)
            case EngineEventKind.DONE:
                self._seconds.observe(event.seconds)
            case EngineEventKind.FAILED:
                self._failures.labels(event.cause).inc()
        self._jobs.labels(event.kind.value).inc()

    def record_generation(self, source: str) -> None:
        """Count a request answered from `source`: drawn, cached or coalesced."""
        self._generations.labels(source).inc()

    def record_quality_check(self, check: str) -> None:
        """Count an image in which a quality check found a fault."""
        self._quality_checks.labels(check).inc()

    def record_stored(self, timings: Mapping[str, float]) -> None:
        """Record the seconds of each stage of a generation."""
        for stage, seconds in timings.items():
            self._stages.labels(stage).observe(seconds)

    def record_storage_call(self, call: str, seconds: float, failed: bool) -> None:
        """Record the duration in seconds of a bucket call, and whether it failed."""
        self._storage.labels(call).observe(seconds)
        if failed:
            self._storage_errors.labels(call).inc()

    def record_request(self, sample: RequestSample) -> None:
        """Count a request, its duration, and its refusal if it has a `reason`."""
        self._requests.labels(sample.route, str(sample.status)).inc()
        self._request_seconds.labels(sample.route).observe(sample.seconds)
        if sample.reason:
            self._refusals.labels(sample.reason, sample.key).inc()

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus text format. Blocks, because gauges may read disks and devices."""
        return generate_latest(self.registry)


class _CallbackCollector(Collector):
    """Collects one metric by calling a function at each scrape."""

    def __init__(
        self,
        name: str,
        description: str,
        read: Callable[[], float | Iterable[Sample]],
        labels: Sequence[str],
        *,
        counts: bool,
    ) -> None:
        self._family = CounterMetricFamily if counts else GaugeMetricFamily
        self._name, self._description, self._read, self._labels = name, description, read, tuple(labels)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric with its current samples."""
        found = self._read()
        family = self._family(self._name, self._description, labels=self._labels)
        for labels, value in [((), found)] if isinstance(found, int | float) else found:
            family.add_metric(list(labels), value)
        yield family
