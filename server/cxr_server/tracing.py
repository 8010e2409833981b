"""OpenTelemetry traces of the requests for an answer, sent over OTLP/HTTP.

The only module that imports OpenTelemetry, and itself imported only where tracing is on. Where
spans go and how many are kept stands in OpenTelemetry's environment variables (`OTEL_...`).
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.requests import Request
from starlette.responses import Response

import cxr
from cxr import context as contexts
from cxr.answer import Answer, Options, Prediction, Stage
from cxr.config import ModelConfig
from cxr.errors import BadImageError
from cxr_server.errors import RequestError

Endpoint = Callable[[Request], Awaitable[Response]]
Call = Callable[[Any, Any], Awaitable[Any]]
Predict = Callable[[bytes, Options], Awaitable[Answer]]

# Statuses of gRPC with which this service fails, by OpenTelemetry's semantic conventions.
_FAILURES = {"DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE"}
# Seconds for the last spans at the end; a collector that is not there must not hold the end up.
_LAST_SPANS = 5.0
_NANOSECONDS = 10**9


class Tracing:
    """Makes spans of requests, and sends them.

    Names and attributes of spans hold nothing of a request beyond what the access log has.
    """

    def __init__(self, config: ModelConfig) -> None:
        served = Resource.create(
            {
                "service.name": "cxr-serve",
                "service.version": cxr.__version__,
                "cxr.model.name": config.name,
                "cxr.model.version": config.version,
            }
        )
        # What the environment says wins; Resource.create has it the other way round.
        resource = served.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("cxr_server", cxr.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def endpoint(self, route: str, endpoint: Endpoint) -> Endpoint:
        """That endpoint of REST, with a span for each request.

        Args:
            route: the path, with the names of its parameters.
            endpoint: answers failures itself.
        """
        attributes = {"http.request.method": "POST", "http.route": route}

        async def traced(request: Request) -> Response:
            with self._request(f"POST {route}", request.headers, attributes) as span:
                response = await endpoint(request)
                span.set_attribute("http.response.status_code", response.status_code)
                if response.status_code >= 500:  # noqa: PLR2004 - HTTP's server errors
                    span.set_status(StatusCode.ERROR)
                return response

        return traced

    def call(self, method: str, call: Call) -> Call:
        """That method of gRPC, with a span for each call.

        Args:
            method: its full name.
            call: ends with `abort` on failures.
        """
        attributes = {"rpc.system.name": "grpc", "rpc.method": method}

        async def traced(request: Any, context: Any) -> Any:
            with self._request(method, dict(context.invocation_metadata()), attributes) as span:
                status = "OK"
                try:
                    return await call(request, context)
                except asyncio.CancelledError:
                    status = "CANCELLED"
                    raise
                except grpc.aio.AbortError:
                    status = context.code().name
                    raise
                finally:
                    span.set_attribute("rpc.response.status_code", status)
                    if status in _FAILURES:
                        span.set_status(StatusCode.ERROR)

        return traced

    def predict(self, predict: Predict) -> Predict:
        """What answers one image, with a span from its wait for a worker to its answer."""

        async def traced(image: bytes, options: Options) -> Answer:
            with self._span("predict image") as span:
                try:
                    answer = await predict(image, options)
                except RequestError as error:
                    span.set_attribute("error.type", str(error.status.value))
                    span.set_status(StatusCode.ERROR)
                    raise
                if isinstance(answer, BadImageError):
                    span.set_attribute("cxr.rejection", answer.reason.value)
                elif span.is_recording():
                    self._steps(answer)
                return answer

        return traced

    def _steps(self, answer: Prediction) -> None:
        """Spans of what the worker did, which tells how long each step took.

        They end now: the way back is short, and what came before them was the queue.
        """
        place = time.time_ns() - round(sum(answer.seconds.values()) * _NANOSECONDS)
        for stage in Stage:
            if stage in answer.seconds:
                attributes = {"cxr.batch": answer.batch} if stage is Stage.INFERENCE else {}
                span = self._tracer.start_span(stage, start_time=place, attributes=attributes)
                place += round(answer.seconds[stage] * _NANOSECONDS)
                span.end(place)

    def shutdown(self) -> None:
        """Send what is left, and stop."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_LAST_SPANS)

    @contextlib.contextmanager
    def _request(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
    ) -> Iterator[Span]:
        """A span that goes on with the client's trace, or begins one; the log names it."""
        parent = self._propagator.extract(headers)
        with self._span(name, kind=SpanKind.SERVER, context=parent, attributes=attributes) as span:
            if span.get_span_context().is_valid:
                contexts.join(f"{span.get_span_context().trace_id:032x}")
            yield span

    def _span(self, name: str, **arguments: Any) -> contextlib.AbstractContextManager[Span]:
        # An exception's text and frames stay out of it: they might quote the request.
        return self._tracer.start_as_current_span(
            name, record_exception=False, set_status_on_exception=False, **arguments
        )
