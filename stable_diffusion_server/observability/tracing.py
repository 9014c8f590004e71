"""Spans of what is done, for a collector that takes OTLP; nothing at all where none is named. Knows no requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Fact = str | int | float | bool
_NONE: Mapping[str, str] = {}


class Span:
    """Something that is done now; what is told of it goes to the collector with its end."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def set_attributes(self, facts: Mapping[str, Fact]) -> None:
        """Add facts, by the names of OpenTelemetry's conventions where there are any."""
        if self._span is not None:
            self._span.set_attributes(dict(facts))

    def name(self, name: str) -> None:
        """Name it anew, since what it is was found out meanwhile."""
        if self._span is not None:
            self._span.update_name(name)


_NOTHING = Span()


class Tracing:
    """Makes spans and sends them to `endpoint`, an OTLP collector's address over HTTP; an empty one makes none.

    A span that is begun within another is its child, also in the tasks that are begun there. Needs the packages of
    tracing-requirements.txt, which are imported when it is opened.
    """

    def __init__(self, endpoint: str = "", version: str = "") -> None:
        self._endpoint = endpoint.rstrip("/")
        self._version = version
        self._provider: TracerProvider | None = None
        self._tracer: Any = None

    def open(self) -> None:
        """Begin to send; a collector that does not answer costs nothing but its spans."""
        if not self._endpoint:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "stable-diffusion-server", "service.version": self._version})
        # Not the global one, and not ended by the interpreter: the lifespan does both.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{self._endpoint}/v1/traces", timeout=5))
        )
        self._tracer = self._provider.get_tracer("stable_diffusion_server", self._version)

    def close(self) -> None:
        """Send what is left. Blocks for seconds where the collector does not answer."""
        if self._provider is not None:
            self._provider.shutdown()
            self._provider = self._tracer = None

    @contextmanager
    def span(
        self, name: str, facts: Mapping[str, Fact] = _NONE, *, within: Mapping[str, str] | None = None
    ) -> Iterator[Span]:
        """A span around a block. `within`, the headers of a request, makes it that request's, in its caller's trace.

        An error that leaves the block is told by its class alone: messages may quote what was asked.
        """
        if self._tracer is None:
            yield _NOTHING
            return
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = None if within is None else TraceContextTextMapPropagator().extract(within)
        kind = SpanKind.INTERNAL if within is None else SpanKind.SERVER
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            kind=kind,
            attributes=dict(facts),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield Span(span)
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise
