"""Prometheus metrics of the gateway; docs/metrics.md lists them."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

disable_created_metrics()  # type: ignore[no-untyped-call]

# With which it fails because of itself or of the model, as objectives count.
_FAILURES = ("500", "502", "503", "504")
# Seconds; from an answer without the model to the longest deadline.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The gateway's metrics, in a registry of their own.

    Labels are bounded: routes, status codes and outcomes, never anything of a request.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "cxr_portal_requests",
            "Requests answered.",
            ("method", "route", "code"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "cxr_portal_request_duration_seconds",
            "Time to answer a request, receiving its body included; streams are left out.",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "cxr_portal_images_in_flight",
            "Images of requests for predictions that the model is asked about now.",
            registry=self.registry,
        )
        self.images = Counter(
            "cxr_portal_images",
            "Images, by way and outcome: answered, a reason of refusal, or failed.",
            ("way", "outcome"),
            registry=self.registry,
        )
        self.model_calls = Counter(
            "cxr_portal_model_calls",
            "Calls of the model, by gRPC status.",
            ("code",),
            registry=self.registry,
        )
        self.model_duration = Histogram(
            "cxr_portal_model_call_duration_seconds",
            "Time of a call of the model, retries included.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.breaker_open = Gauge(
            "cxr_portal_breaker_open",
            "1 while the model is left alone because it failed too often.",
            registry=self.registry,
        )
        self.refused_callers = Counter(
            "cxr_portal_refused_callers",
            "Requests turned away: no credentials, invalid, expired, scope, or too many.",
            ("reason",),
            registry=self.registry,
        )
        self.rate_storage_errors = Counter(
            "cxr_portal_rate_storage_errors",
            "Times that the shared storage of limits did not answer.",
            registry=self.registry,
        )
        self.open_images = Gauge(
            "cxr_portal_job_images_open",
            "Images of jobs without an answer, of all gateways on this database.",
            registry=self.registry,
        )

    def expect(self, method: str, route: str) -> None:
        """Show a route's failures before there are any, so that the first one is an increase."""
        for code in _FAILURES:
            self.requests.labels(method, route, code)
