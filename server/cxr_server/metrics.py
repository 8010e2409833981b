"""Prometheus metrics of the serving process."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from cxr.answer import Prediction, Stage
from cxr.config import ModelConfig
from cxr.errors import Rejection
from cxr.quality import REASONS
from cxr_server.memory import ContainerMemory
from cxr_server.settings import Settings

# A second series for each counter and histogram, which nothing here reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Seconds; from a cache-warm small image to the request timeout.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Seconds; of one step, from a tenth of a millisecond.
_STAGE_BUCKETS = (0.0001, 0.0005, 0.001, 0.0025, *BUCKETS)
# The outcome of an image that got an answer; any other is a Rejection.
ANSWERED = "answered"
_HTTP_CODES = ("200", "500", "503", "504")
_GRPC_CODES = ("OK", "INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
# Answers that service level objectives count.
_COUNTED_FROM_THE_START = {
    ("v1", "predict"): _HTTP_CODES,
    ("v2", "infer"): _HTTP_CODES,
    ("grpc", "infer"): _GRPC_CODES,
}
# Probabilities of the most probable class; the last one holds all.
_CONFIDENCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    """The service's metrics, in a registry of their own.

    Labels are bounded: protocols, methods, status codes, reasons and the model's classes, never a
    name from a request.
    """

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(ContainerMemory())
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
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "cxr_stage_duration_seconds",
            "Time for each step of an image that was answered; queue is what the worker did not "
            "use itself: waiting for it, and the way to it and back.",
            ("stage",),
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "cxr_requests_in_flight", "Requests being answered now.", registry=self.registry
        )
        self.queued = Gauge(
            "cxr_images_queued",
            "Images of these requests that wait for a worker; each worker answers one at a time.",
            registry=self.registry,
        )
        self.queue_capacity = Gauge(
            "cxr_queue_capacity_images",
            "Images that may wait or be answered at once; more are turned away.",
            registry=self.registry,
        )
        self.queue_capacity.set(settings.max_queue)
        self.received = Counter(
            "cxr_received_bytes", "Encoded images that were received.", registry=self.registry
        )
        self.images = Counter(
            "cxr_images",
            "Images by outcome: answered, or the reason of the rejection.",
            ("outcome",),
            registry=self.registry,
        )
        self.predictions = Counter(
            "cxr_predictions",
            "Answered images by their most probable class.",
            ("label",),
            registry=self.registry,
        )
        self.confidence = Histogram(
            "cxr_prediction_confidence",
            "Probability of the most probable class.",
            buckets=_CONFIDENCES,
            registry=self.registry,
        )
        self.flagged = Counter(
            "cxr_images_flagged",
            "What guards have found wrong with images, by reason; one image can have several.",
            ("reason",),
            registry=self.registry,
        )
        self.ready = Gauge("cxr_ready", "1 while the service is ready.", registry=self.registry)
        self.workers = Gauge(
            "cxr_workers_ready", "Workers that have the model loaded.", registry=self.registry
        )
        self.restarts = Counter(
            "cxr_worker_restarts",
            "Workers that ended by themselves and were replaced.",
            registry=self.registry,
        )
        self.startup = Gauge(
            "cxr_startup_phase_seconds",
            "How long each step took from the start of the process until it was first ready.",
            ("phase",),
            registry=self.registry,
        )
        self.model = Gauge(
            "cxr_model_info",
            "The model that is served; always 1.",
            ("name", "version", "graph_sha256", "runtime"),
            registry=self.registry,
        )
        self.model.labels(
            config.name, config.version, config.graph.sha256, settings.runtime.value
        ).set(1)
        # From the start, so that the first of each shows as an increase.
        for label in config.labels:
            self.predictions.labels(label)
        for outcome in (ANSWERED, *Rejection):
            self.images.labels(outcome)
        for reason in REASONS:
            self.flagged.labels(reason)
        for (protocol, method), codes in _COUNTED_FROM_THE_START.items():
            for code in codes:
                self.requests.labels(protocol, method, code)

    def predicted(self, prediction: Prediction, seconds: float) -> None:
        """Count an answer by what it says, and how long its steps took of all the seconds."""
        for stage, part in prediction.seconds.items():
            self.stages.labels(stage).observe(part)
        if prediction.seconds:
            rest = seconds - sum(prediction.seconds.values())
            self.stages.labels(Stage.QUEUE).observe(max(0.0, rest))
        self.predictions.labels(prediction.label).inc()
        self.confidence.observe(prediction.probabilities[prediction.label])
