"""Prometheus metrics of the serving process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Seconds; from a cache-warm small image to the request timeout.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The service's metrics, in a registry of their own.

    Labels are bounded: protocols, methods, status codes and reasons, never a name from a request.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cxr_requests",
            "Requests answered.",
            ("protocol", "method", "code"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "cxr_request_duration_seconds",
            "Time to answer a request; over REST, receiving its body included.",
            ("protocol", "method"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "cxr_requests_in_flight", "Requests being answered now.", registry=self.registry
        )
        self.images = Counter(
            "cxr_images",
            "Images by outcome: answered, or the reason of the rejection.",
            ("outcome",),
            registry=self.registry,
        )
        self.ready = Gauge("cxr_ready", "1 while the service is ready.", registry=self.registry)
        self.workers = Gauge(
            "cxr_workers_ready", "Workers that have the model loaded.", registry=self.registry
        )
        self.model = Gauge(
            "cxr_model_info",
            "The model that is served; always 1.",
            ("name", "version", "graph_sha256"),
            registry=self.registry,
        )
