"""OpenTelemetry traces of the gateway's requests, sent over OTLP/HTTP, joined with the model's.

The only module that imports OpenTelemetry, and itself imported only where tracing is on.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import cxr
from cxr import context

# Seconds for the last spans at the end; a collector that is not there must not hold the end up.
_LAST_SPANS = 5.0
_SERVER_ERROR = 500


@dataclass(frozen=True)
class RequestSpan:
    """The span of a request.

    Attributes:
        span: itself.
        method: of HTTP.
    """

    span: Span
    method: str

    def end(self, route: str, status: int) -> None:
        """Say what became of it."""
        self.span.update_name(f"{self.method} {route}")
        self.span.set_attribute("http.route", route)
        self.span.set_attribute("http.response.status_code", status)
        if status >= _SERVER_ERROR:
            self.span.set_status(StatusCode.ERROR)


class Tracing:
    """Makes spans of requests, and sends them; they hold no more than the access log."""

    def __init__(self) -> None:
        own = Resource.create({"service.name": "cxr-portal", "service.version": cxr.__version__})
        # What the environment says wins; Resource.create has it the other way round.
        self._provider = TracerProvider(
            resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("cxr_portal", cxr.__version__)
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def request(self, method: str, trace: dict[str, str]) -> Iterator[RequestSpan]:
        """A span that goes on with the client's trace, or begins one.

        Args:
            method: of HTTP.
            trace: the client's trace context, which becomes the one to pass on.
        """
        with self._tracer.start_as_current_span(
            method,
            kind=SpanKind.SERVER,
            context=self._propagator.extract(trace),
            attributes={"http.request.method": method},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            self._propagator.inject(trace)
            if span.get_span_context().is_valid:
                context.join(f"{span.get_span_context().trace_id:032x}")
            yield RequestSpan(span, method)

    def shutdown(self) -> None:
        """Send what is left, and stop."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_LAST_SPANS)
