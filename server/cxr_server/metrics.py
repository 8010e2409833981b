"""Prometheus metrics of the serving process."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from threading import Lock

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)

from cxr.answer import Prediction, Stage
from cxr.config import ModelConfig
from cxr.drift import bin_of, summaries
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
# Images; powers of two up to the largest batch that an archive may ask for.
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Most scores are shares and probabilities; a distance is near 1, and a ratio may be more.
_SCORES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
# Answers that may wait to be counted.
_UNCOUNTED = 256


class Metrics:
    """The service's metrics, in a registry of their own.

    What an answer adds to some forty series is put off until somebody asks, or many have come
    together: between two images, with the model's work in the caches, each would cost several times
    as much.

    Labels are bounded: protocols, methods, status codes, reasons and the model's classes, never a
    name from a request.
    """

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        self.registry = CollectorRegistry()
        self._uncounted: deque[Callable[[], None]] = deque()
        self._counting = Lock()
        # The first one: the others are asked after it.
        self.registry.register(self)
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
        self.batches = Histogram(
            "cxr_batch_images",
            "Images that the engine answered together, once for each of them.",
            buckets=_BATCHES,
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
        self.scores = Histogram(
            "cxr_quality_score",
            "Scores of the guards; above the model's limit, they are a reason.",
            ("score",),
            buckets=_SCORES,
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
            "The model that is served; always 1. Its provider is known once it has answered.",
            ("name", "version", "graph_sha256", "runtime", "provider"),
            registry=self.registry,
        )
        self._model = (config.name, config.version, config.graph.sha256, settings.runtime.value)
        self.runs_on("")
        self._drift = self._drift_counters(config)
        # From the start, so that the first of each shows as an increase.
        for label in config.labels:
            self.predictions.labels(label)
        for outcome in (ANSWERED, *Rejection):
            self.images.labels(outcome)
        for reason in REASONS:
            self.flagged.labels(reason)
            self.scores.labels(reason)
        for (protocol, method), codes in _COUNTED_FROM_THE_START.items():
            for code in codes:
                self.requests.labels(protocol, method, code)

    def _drift_counters(
        self, config: ModelConfig
    ) -> dict[str, tuple[tuple[float, ...], list[Counter]]]:
        """Edges and counters of the bins of each number that the model has a reference for."""
        labels = ("version", "summary", "bin")
        images = Counter(
            "cxr_drift_images",
            "Answered images by the bin that a number of their answer falls into.",
            labels,
            registry=self.registry,
        )
        expected = Gauge(
            "cxr_drift_reference_ratio",
            "Part of the validation images of training in that bin.",
            labels,
            registry=self.registry,
        )
        counters = {}
        for name, reference in (config.reference or {}).items():
            bins = [(config.version, name, str(place)) for place in range(len(reference.shares))]
            for values, share in zip(bins, reference.shares, strict=True):
                expected.labels(*values).set(share)
            counters[name] = (reference.edges, [images.labels(*values) for values in bins])
        return counters

    def runs_on(self, provider: str) -> None:
        """Tell which execution provider runs the model's graph."""
        self.model.clear()
        self.model.labels(*self._model, provider).set(1)

    def collect(self) -> Iterable[Metric]:
        """Nothing more: what was put off is counted, for those who are asked next."""
        self.count()
        return ()

    def count(self) -> None:
        """Count what was put off; any thread may ask."""
        # One that begins while another thread counts comes back when that has counted all, too.
        with self._counting:
            while self._uncounted:
                self._uncounted.popleft()()

    def _later(self, counting: Callable[[], None]) -> None:
        self._uncounted.append(counting)
        if len(self._uncounted) >= _UNCOUNTED:
            self.count()

    def request(self, protocol: str, method: str, code: str, seconds: float) -> None:
        """Count a request that was answered, and how long that took."""
        self._later(partial(self._request, protocol, method, code, seconds))

    def arrived(self, size: int) -> None:
        """Count the bytes of encoded images."""
        self._later(partial(self.received.inc, size))

    def image(self, outcome: str) -> None:
        """Count an image by its outcome."""
        self._later(partial(self._image, outcome))

    def compared(self, prediction: Prediction) -> None:
        """Count what an image is like, whether or not it is refused for it."""
        self._later(partial(self._compared, _small(prediction)))

    def predicted(self, prediction: Prediction, seconds: float) -> None:
        """Count an answer by what it says, and how long its steps took of all the seconds."""
        self._later(partial(self._predicted, _small(prediction), seconds))

    def _image(self, outcome: str) -> None:
        self.images.labels(outcome).inc()

    def _request(self, protocol: str, method: str, code: str, seconds: float) -> None:
        self.requests.labels(protocol, method, code).inc()
        self.duration.labels(protocol, method).observe(seconds)

    def _compared(self, prediction: Prediction) -> None:
        for name, value in summaries(prediction).items():
            if name in self._drift:
                edges, counters = self._drift[name]
                counters[bin_of(value, edges)].inc()
        if prediction.quality is not None:
            for reason, score in prediction.quality.scores.items():
                self.scores.labels(reason).observe(score)
            for reason in prediction.quality.reasons:
                self.flagged.labels(reason.value).inc()

    def _predicted(self, prediction: Prediction, seconds: float) -> None:
        for stage, part in prediction.seconds.items():
            self.stages.labels(stage).observe(part)
        if prediction.seconds:
            rest = seconds - sum(prediction.seconds.values())
            self.stages.labels(Stage.QUEUE).observe(max(0.0, rest))
            self.batches.observe(prediction.batch)
        self.predictions.labels(prediction.label).inc()
        self.confidence.observe(prediction.probabilities[prediction.label])


def _small(prediction: Prediction) -> Prediction:
    """It without its heat map, which nothing here needs."""
    return replace(prediction, explanation=None) if prediction.explanation else prediction
