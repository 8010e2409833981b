"""The served model, asked over the Open Inference Protocol's gRPC form."""

import base64
import io
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from circuitbreaker import CircuitBreaker, CircuitBreakerError
from PIL import Image
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from cxr.context import REQUEST_ID
from cxr.errors import Rejection
from cxr.quality import REASONS
from cxr_client.schemas import (
    AnsweredImage,
    ClassCard,
    Figure,
    HeatMap,
    ImageQuality,
    Model,
    ModelCard,
    QualityReason,
)
from cxr_portal.metrics import Metrics
from cxr_portal.settings import Settings

# The protocol's names, as docs/serving.md lists them.
_OUTPUTS = ("probabilities", "label", "decision", "quality")
_EXPLANATION = ("heatmap", "explained")
_CONFIG = "cxr-model.json"
_REJECTION = "cxr-rejection"
# Colours of a heat map, for the class and against it; the page shows the picture made with them.
_FOR, _AGAINST = (255, 140, 0), (30, 120, 255)
# Seconds that a model's description is believed.
_DESCRIPTION_LIFE = 30.0
# Failures in a row after which the model is left alone, and for how many seconds.
_BREAKER_FAILURES = 5
_BREAKER_SECONDS = 5.0
# Only what never reached the server's own code is sent again: asking twice would cost twice. It
# answers each call with headers first, and gRPC does not repeat what has them.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService"}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
_Code = grpc.StatusCode


class ModelError(Exception):
    """The model gave no answer. The message is one sentence for the caller.

    Attributes:
        retry_after: seconds after which it may; None where the same request is of no use.
    """

    retry_after: float | None = None


class ModelUnavailableError(ModelError):
    """It cannot be reached, or is not ready."""

    def __init__(self, retry_after: float = 1.0) -> None:
        super().__init__("The model cannot be reached at the moment; try again later.")
        self.retry_after = max(1.0, retry_after)


class ModelLostError(ModelUnavailableError):
    """It has ended, or was cut off, while it had the image."""


class ModelBusyError(ModelError):
    """It has too much to do."""

    retry_after = 1.0

    def __init__(self) -> None:
        super().__init__("The model is busy; try again later.")


class ModelTimeoutError(ModelError):
    """It took too long."""

    def __init__(self) -> None:
        super().__init__("The model did not answer in time.")


class ModelFailedError(ModelError):
    """It failed on this image."""

    def __init__(self) -> None:
        super().__init__("The model failed on this image; do not send it again.")


class RefusedError(Exception):
    """The image cannot be used; the message is one sentence for the person who sent it.

    Attributes:
        reason: stable and machine-readable; a later server may have reasons of its own.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason

    @property
    def status(self) -> int:
        """The HTTP status that answers it."""
        try:
            return Rejection(self.reason).http_status
        except ValueError:
            return HTTPStatus.UNPROCESSABLE_ENTITY


class UnknownClassError(ValueError):
    """There is no such class to explain, or the model explains nothing."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """On whose behalf the model is asked.

    Attributes:
        request_id: passed on, so that both logs name the same request.
        trace: W3C trace context, by header.
    """

    request_id: str
    trace: Mapping[str, str]

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with a call."""
        return ((REQUEST_ID, self.request_id), *self.trace.items())


class ModelClient:
    """One model on one server, with deadlines, safe retries and a circuit breaker."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        options = [
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # gRPC's own is two minutes: much longer than a server takes to come back.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if settings.server_tls:
            credentials = grpc.ssl_channel_credentials(_read(settings.server_ca))
            self._channel = grpc.aio.secure_channel(settings.server, credentials, options)
        else:
            self._channel = grpc.aio.insecure_channel(settings.server, options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._breaker = CircuitBreaker(
            _BREAKER_FAILURES,
            int(_BREAKER_SECONDS),
            (ModelUnavailableError, ModelTimeoutError),
            name=f"model {settings.model}",
        )
        self._unless_open = self._breaker.decorate(self._call)
        self._described: Model | None = None
        self._described_at = 0.0
        metrics.breaker_open.set_function(lambda: self._breaker.opened)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def ready(self) -> bool:
        """Whether a request sent now can be expected to succeed."""
        request = pb.ModelReadyRequest(name=self._settings.model)
        try:
            answer = await self._stub.ModelReady(request, timeout=2.0)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.ready)

    async def describe(self, caller: Caller) -> Model:
        """The model and its card; as it was half a minute ago at most.

        Raises:
            ModelError: the server gives none.
        """
        now = time.monotonic()
        if self._described is None or now - self._described_at > _DESCRIPTION_LIFE:
            request = pb.ModelConfigRequest(name=self._settings.model)
            answer = await self._guarded(
                lambda: self._stub.ModelConfig(
                    request, timeout=self._settings.timeout, metadata=caller.metadata()
                )
            )
            self._described = _model(json.loads(answer.config.parameters[_CONFIG].string_value))
            self._described_at = now
        return self._described.model_copy(update={"ready": await self.ready()})

    async def predict(
        self, image: bytes, index: int, caller: Caller, *, explain: bool | str = False
    ) -> AnsweredImage:
        """Ask about one image.

        Args:
            image: the encoded file.
            index: its place in the request.
            caller: who asks.
            explain: a heat map: for the most probable class, or for the class named.

        Raises:
            RefusedError: the image cannot be used.
            UnknownClassError: it cannot be explained like that.
            ModelError: there is no answer, and why.
        """
        request = pb.ModelInferRequest(model_name=self._settings.model)
        tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(image)
        for name in (*_OUTPUTS, *(_EXPLANATION if explain else ())):
            request.outputs.add(name=name)
        if explain is True:
            request.parameters["explain"].bool_param = True
        elif explain:
            request.parameters["explain"].string_param = explain
        answer = await self._guarded(
            lambda: self._stub.ModelInfer(
                request, timeout=self._settings.timeout, metadata=caller.metadata()
            )
        )
        return _answered(answer, index)

    async def _guarded(self, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await self._unless_open(call)
        except CircuitBreakerError:
            raise ModelUnavailableError(self._breaker.open_remaining) from None

    async def _call(self, call: Callable[[], Awaitable[Any]]) -> Any:
        start = time.perf_counter()
        code = "CANCELLED"
        try:
            answer = await call()
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            raise _meaning(error) from None
        else:
            return answer
        finally:
            self._metrics.model_calls.labels(code).inc()
            self._metrics.model_duration.observe(time.perf_counter() - start)


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _meaning(error: Any) -> Exception:
    """What a failed call means for the caller."""
    code = error.code()
    metadata = dict(error.trailing_metadata() or ())
    if code is _Code.INVALID_ARGUMENT:
        reason = metadata.get(_REJECTION)
        if reason is None:
            return UnknownClassError(error.details())
        return RefusedError(reason, error.details())
    if code is _Code.RESOURCE_EXHAUSTED:
        return ModelBusyError()
    if code is _Code.DEADLINE_EXCEEDED:
        return ModelTimeoutError()
    if code is _Code.UNAVAILABLE or code is _Code.NOT_FOUND or code is _Code.UNIMPLEMENTED:
        # The server had begun, and it is not one of its sentences that ends the call.
        lost = error.initial_metadata() and not error.details().endswith(".")
        return ModelLostError() if lost else ModelUnavailableError()
    return ModelFailedError()


def _answered(answer: Any, index: int) -> AnsweredImage:
    outputs = {output.name: output for output in answer.outputs}
    probabilities = outputs["probabilities"]
    labels = json.loads(probabilities.parameters["labels"].string_param)
    decisions = [item.decode() for item in outputs["decision"].contents.bytes_contents]
    return AnsweredImage(
        index=index,
        label=outputs["label"].contents.bytes_contents[0].decode(),
        probabilities=dict(zip(labels, probabilities.contents.fp32_contents, strict=True)),
        decisions=dict(zip(labels, decisions, strict=True)),
        quality=_quality(outputs["quality"].contents.bytes_contents[0]),
        heatmap=_heatmap(outputs),
        model_version=answer.model_version,
    )


def _quality(text: bytes) -> ImageQuality | None:
    if not text:
        return None
    document = json.loads(text)
    reasons = (
        QualityReason(reason=reason, text=REASONS.get(reason, "it has a fault that is new here"))
        for reason in document["reasons"]
    )
    return ImageQuality(reasons=tuple(reasons), scores=document["scores"])


def _heatmap(outputs: Mapping[str, Any]) -> HeatMap | None:
    if "heatmap" not in outputs:
        return None
    _, rows, columns = outputs["heatmap"].shape
    values = np.array(outputs["heatmap"].contents.fp32_contents, np.float64)
    return HeatMap(
        label=outputs["explained"].contents.bytes_contents[0].decode(),
        rows=rows,
        columns=columns,
        values=tuple(values.round(4).tolist()),
        png=base64.b64encode(_drawn(values.reshape(rows, columns))).decode(),
    )


def _drawn(values: npt.NDArray[np.float64]) -> bytes:
    """A heat map as a transparent PNG file, a pixel for each value."""
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.where(values[..., np.newaxis] > 0, _FOR, _AGAINST)
    pixels[..., 3] = (255 * np.abs(values).clip(0, 1)).round()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _model(config: Mapping[str, Any]) -> Model:
    """A model's configuration, as far as the API shows it.

    It is read as plain JSON: the model's release may be a later one than the gateway's.
    """
    data, metrics = config["training_data"], config["metrics"]
    classes = []
    for label in config["labels"]:
        figures = metrics["per_class"].get(label, {})
        classes.append(
            ClassCard(
                label=label,
                threshold=config["thresholds"][label],
                images=data["labels"].get(label, 0),
                sensitivity=_figure(figures.get("sensitivity")),
                specificity=_figure(figures.get("specificity")),
                roc_auc=_figure(figures.get("roc_auc")),
            )
        )
    return Model(
        name=config["name"],
        version=config["version"],
        description=config["description"],
        ready=True,
        labels=tuple(config["labels"]),
        explains=config.get("explanation") is not None,
        guarded=config.get("guards") is not None,
        card=ModelCard(
            intended_use=config["intended_use"],
            limitations=tuple(config["limitations"]),
            architecture=dict(config["architecture"]),
            synthetic=data["synthetic"],
            sources={source["name"]: source["images"] for source in data["sources"]},
            images=data["images"],
            test_images=metrics["images"],
            accuracy=Figure(**metrics["accuracy"]),
            balanced_accuracy=Figure(**metrics["balanced_accuracy"]),
            expected_calibration_error=Figure(**metrics["expected_calibration_error"]),
            classes=tuple(classes),
        ),
    )


def _figure(document: Mapping[str, float] | None) -> Figure | None:
    return None if document is None else Figure(**document)
