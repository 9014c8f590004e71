"""Creates OpenTelemetry spans and exports them by OTLP over HTTP; without an endpoint tracing is off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

AttributeValue = str | int | float | bool
_NO_ATTRIBUTES: Mapping[str, str] = {}


class Span:
    """An open span; exported when it ends. Without tracing all methods do nothing."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        """Add attributes, named by OpenTelemetry's semantic conventions where they exist."""
        if self._span is not None:
            self._span.set_attributes(dict(attributes))

    def name(self, name: str) -> None:
        """Rename the span, for example when the route is known."""
        if self._span is not None:
            self._span.update_name(name)


_NO_SPAN = Span()


class Tracing:
    """Creates spans and sends them to `endpoint`, the HTTP URL of an OTLP collector; no spans if it is empty.

    A span started inside another span is its child, also in asyncio tasks started there. `open` imports the packages
    of tracing-requirements.txt, which are needed only with an endpoint.
    """

    def __init__(self, endpoint: str = "", version: str = "") -> None:
        self._endpoint = endpoint.rstrip("/")
        self._version = version
        self._provider: TracerProvider | None = None
        self._tracer: Any = None

    def open(self) -> None:
        """Start the exporter. It drops spans while the collector does not answer."""
        if not self._endpoint:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "stable-diffusion-server", "service.version": self._version})
        # Not the global provider, and no shutdown at interpreter exit: the application's lifespan opens and closes it.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{self._endpoint}/v1/traces", timeout=5))
        )
        self._tracer = self._provider.get_tracer("stable_diffusion_server", self._version)

    def close(self) -> None:
        """Export the remaining spans. Blocks for seconds if the collector does not answer."""
        if self._provider is not None:
            self._provider.shutdown()
            self._provider = self._tracer = None

    @contextmanager
    def span(
        self,
        name: str,
        attributes: Mapping[str, AttributeValue] = _NO_ATTRIBUTES,
        *,
        parent_headers: Mapping[str, str] | None = None,
    ) -> Iterator[Span]:
        """Open a span around a block; with `parent_headers`, a server span that continues the trace in those headers.

        Records only the class of an exception, because messages may quote the prompt.
        """
        if self._tracer is None:
            yield _NO_SPAN
            return
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = None if parent_headers is None else TraceContextTextMapPropagator().extract(parent_headers)
        kind = SpanKind.INTERNAL if parent_headers is None else SpanKind.SERVER
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            kind=kind,
            attributes=dict(attributes),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield Span(span)
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise
