"""Spans, as a loopback collector receives them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import RunningApp
from fakes import until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from stable_diffusion_server.observability.tracing import Tracing

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
CALLERS = "0af7651916cd43dd8448eb211c80319c"
TRACE = {"traceparent": f"00-{CALLERS}-b7ad6b7169203331-01"}
ORDER = {"prompt": "a confidential red square", "width": 64, "height": 64}


class Collector:
    """Accepts OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    data = gzip.decompress(data)
                request = ExportTraceServiceRequest.FromString(data)
                collector.spans += [
                    span for one in request.resource_spans for scope in one.scope_spans for span in scope.spans
                ]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *what: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def facts(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in span.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    taking = Collector()
    yield taking
    taking.close()


def test_a_request_and_its_parts_are_spans_of_the_callers_trace(
    run_app: Callable[..., RunningApp], collector: Collector
) -> None:
    """The request by its route, and child spans for lookup, layout, generation and storage.

    No prompt in any of them.
    """
    running_app = run_app(otel_exporter_otlp_endpoint=collector.url, api_keys="anna:secret-of-anna")
    headers = {**TRACE, "X-API-Key": "secret-of-anna", "X-Request-ID": "the-id"}
    assert running_app.client.get(CREATE, params=ORDER, headers=headers).status_code == 200
    until(lambda: len(collector.named(f"GET {CREATE}")) == 1, 30)
    (request,) = collector.named(f"GET {CREATE}")
    assert request.trace_id.hex() == CALLERS
    reported = facts(request)
    assert (reported["http.response.status_code"], reported["http.route"], reported["sds.key"]) == (200, CREATE, "anna")
    assert reported["sds.request_id"] == "the-id"
    for name in ("cache_lookup", "prepare", "generate", "store"):
        (part,) = collector.named(name)
        assert (part.trace_id.hex(), part.parent_span_id) == (CALLERS, request.span_id)
    assert facts(collector.named("generate")[0])["sds.steps"] == 4
    sent = "".join(map(str, collector.spans))
    assert not [word for word in ("confidential", "secret-of-anna") if word in sent]


def test_a_span_names_an_error_by_its_class_alone(run_app: Callable[..., RunningApp], collector: Collector) -> None:
    """Error messages may quote the prompt."""
    running_app = run_app(otel_exporter_otlp_endpoint=collector.url)
    assert running_app.draw(prompt="an unpreparable square").status_code == 500
    until(lambda: len(collector.named("generate")) == 1, 30)
    (span,) = collector.named("generate")
    assert facts(span)["error.type"]
    assert "cannot prepare" not in str(span)


def test_a_collector_that_is_not_there_costs_no_request(run_app: Callable[..., RunningApp]) -> None:
    """Images are generated, stored and served as with tracing off; requests do not wait for the export."""
    running_app = run_app(otel_exporter_otlp_endpoint="http://127.0.0.1:1")
    for prompt in ("a red square", "a green square"):
        answer = running_app.draw(prompt=prompt)
        assert answer.status_code == 200
        image = running_app.client.get(answer.json()["path"])
        assert (image.status_code, image.headers["content-type"]) == (200, "image/webp")
    assert running_app.metric('sds_generations_total{source="drawn"}') == 2


def test_without_an_address_there_are_no_spans() -> None:
    """A traced block runs as if there were no tracing."""
    tracing = Tracing()
    tracing.open()
    with tracing.span("anything") as span:
        span.set_attributes({"a": 1})
        span.name("other")
    tracing.close()
