"""Turns events into log lines, metrics, a console bar and a heartbeat file. Decides nothing."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from tqdm import tqdm

from stable_diffusion_server.orders import Event, EventKind

Observer = Callable[[Event], None]
# A shape's name, the most jobs that share a step of it, and seconds a step by how many do.
ShapeFigures = tuple[str, int, Mapping[int, float]]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


def configure_logging(level: str, log_format: str) -> None:
    """Structured lines on standard error: for people at a terminal, JSON otherwise, unless `log_format` says which."""
    for_people = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks without local variables: those hold prompts, and may hold keys.
    if for_people:
        processors.append(structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback))
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


class Metrics:
    """Prometheus figures, in a registry of their own."""

    def __init__(
        self,
        waiting: Callable[[], float],
        running: Callable[[], float],
        shapes: Callable[[], Iterable[ShapeFigures]] = tuple,
    ) -> None:
        self.registry = CollectorRegistry()
        self._jobs = Counter("sds_jobs", "Jobs by what became of them", ["outcome"], registry=self.registry)
        self._steps = Counter("sds_steps", "Denoising steps done, summed over jobs", registry=self.registry)
        self._seconds = Histogram(
            "sds_job_seconds", "From acceptance to picture", buckets=_SECONDS, registry=self.registry
        )
        self._answers = Counter(
            "sds_orders",
            "Orders answered, by where the picture came from",
            ["source"],
            registry=self.registry,
        )
        Gauge("sds_queue_waiting", "Jobs waiting", registry=self.registry).set_function(waiting)
        Gauge("sds_queue_running", "Jobs on the device", registry=self.registry).set_function(running)
        self.registry.register(_Shapes(shapes))
        ProcessCollector(registry=self.registry)  # memory and file handles of the process

    def follow_storage(self, figures: Callable[[], Mapping[str, float]]) -> None:
        """Show what waits for the storage, and how often it failed."""
        self.registry.register(_Storage(figures))

    def observe(self, event: Event) -> None:
        """Count an event of the engine."""
        if event.kind is EventKind.STEP:
            self._steps.inc()
        else:
            self._jobs.labels(event.kind.value).inc()
        if event.kind is EventKind.DONE:
            self._seconds.observe(event.seconds)

    def answered(self, source: str) -> None:
        """Count an order answered from `source`: drawn, cached or coalesced."""
        self._answers.labels(source).inc()

    def drawn(self) -> int:
        """How many pictures the engine has drawn."""
        return int(self.registry.get_sample_value("sds_jobs_total", {"outcome": EventKind.DONE.value}) or 0)

    def exposition(self) -> bytes:
        """The figures in Prometheus's text format."""
        return generate_latest(self.registry)


class _Shapes(Collector):
    """Figures by shape, asked for when they are read."""

    def __init__(self, shapes: Callable[[], Iterable[ShapeFigures]]) -> None:
        self._shapes = shapes

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """A gauge of caps, and one of step times."""
        caps = GaugeMetricFamily("sds_batch_cap", "Most jobs of a shape that share a step", labels=["shape"])
        seconds = GaugeMetricFamily("sds_step_seconds", "Seconds of one step, measured", labels=["shape", "jobs"])
        for shape, cap, by_size in self._shapes():
            caps.add_metric([shape], cap)
            for size, value in by_size.items():
                seconds.add_metric([shape, str(size)], value)
        yield from (caps, seconds)


class _Storage(Collector):
    """Figures of the spool, asked for when they are read."""

    def __init__(self, figures: Callable[[], Mapping[str, float]]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Three gauges and a counter."""
        figures = self._figures()
        for name, told in (
            ("pictures", "Pictures that wait for the storage"),
            ("bytes", "Bytes on disk of the pictures that wait"),
            ("oldest_seconds", "Age of the oldest picture that waits"),
        ):
            yield GaugeMetricFamily(f"sds_spool_{name}", told, value=figures[name])
        yield CounterMetricFamily("sds_storage_failures", "Times the storage failed", value=figures["failures"])


class ConsoleProgress:
    """One bar over the steps of all pictures under way; on a stream that is no terminal it stays silent."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm[None] | None = None
        self._left: dict[str, int] = {}

    def observe(self, event: Event) -> None:
        """Move the bar on; it closes when nothing is under way."""
        if event.kind is EventKind.STARTED:
            self._start(event)
        elif event.kind is EventKind.STEP and self._bar is not None:
            self._left[event.job_id] = event.steps - event.step
            self._bar.update()
        elif event.kind in (EventKind.DONE, EventKind.FAILED, EventKind.CANCELLED):
            self._end(event)

    def _start(self, event: Event) -> None:
        if self._bar is None:
            self._bar = tqdm(total=0, desc="drawing", unit="step", file=self._stream, disable=None, leave=False)
        self._left[event.job_id] = event.steps
        self._bar.total = (self._bar.total or 0) + event.steps
        self._bar.set_description(f"drawing {len(self._left)}")

    def _end(self, event: Event) -> None:
        self._left.pop(event.job_id, None)
        if not self._left and self._bar is not None:
            self._bar.close()
            self._bar = None


class Heartbeat:
    """Touches `progress.txt` at each sign of life, so that a watchdog can tell work from a hang.

    The first line is the time of day (UTC, HH:MM:SS), as users of the file expect, the second the jobs under way.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._under_way: set[str] = set()

    def observe(self, event: Event) -> None:
        """Note a sign of life. Waiting is none, but for the first job to come: from then on something is to happen."""
        idle = not self._under_way
        if event.kind in (EventKind.DONE, EventKind.FAILED, EventKind.CANCELLED):
            self._under_way.discard(event.job_id)
        else:
            self._under_way.add(event.job_id)
        if event.kind is not EventKind.QUEUED or idle:
            self._path.write_text(time.strftime("%H:%M:%S\n", time.gmtime()) + f"{len(self._under_way)}\n")


def each(observers: Iterable[Observer]) -> Observer:
    """One observer that tells several, in order."""
    told = tuple(observers)

    def observe(event: Event) -> None:
        for observer in told:
            observer(event)

    return observe
