"""The inference engine: encoded images in, probabilities out, through ONNX Runtime."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr.decode import DEFAULT_LIMITS, DecodeLimits
from cxr.errors import BadImageError, ModelLoadError
from cxr.preprocess import Preprocessing, load_tensor

CONFIG_FILE = "cxr-model.json"
SCHEMA_VERSION: Literal[1] = 1

# What a serving process tells the handler in its workers, by environment variables. Without them
# the handler runs in any TorchServe.
THREADS_ENV = "CXR_WORKER_THREADS"
MAX_BYTES_ENV = "CXR_MAX_IMAGE_BYTES"
MAX_PIXELS_ENV = "CXR_MAX_IMAGE_PIXELS"
LOAD_ERROR_FILE_ENV = "CXR_LOAD_ERROR_FILE"

_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to one image.

    Attributes:
        label: the most probable class.
        probabilities: class name to probability, in the model's order; they sum to 1.
        positive: the classes at or above their decision threshold.
    """

    label: str
    probabilities: Mapping[str, float]
    positive: tuple[str, ...]


def decide(
    probabilities: Sequence[float], labels: Sequence[str], thresholds: Mapping[str, float]
) -> Prediction:
    """Turn one row of probabilities into an answer.

    Args:
        probabilities: one number per label, in the labels' order.
        labels: class names.
        thresholds: per class, the probability from which it counts as present.
    """
    named = dict(zip(labels, (float(p) for p in probabilities), strict=True))
    return Prediction(
        label=max(named, key=named.__getitem__),
        probabilities=named,
        positive=tuple(label for label in labels if named[label] >= thresholds[label]),
    )


class Engine:
    """A loaded model.

    One engine belongs to one worker; ONNX Runtime lets several threads call it at once.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        threads: int = 1,
        limits: DecodeLimits = DEFAULT_LIMITS,
        providers: Sequence[str] | None = None,
    ) -> None:
        """Load the model of a bundle folder.

        Args:
            bundle: the folder with `cxr-model.json` and the graph.
            threads: threads that one forward pass may use.
            limits: the largest image that is accepted.
            providers: ONNX Runtime execution providers; by default CUDA where it is available,
                then CPU.

        Raises:
            ModelLoadError: a file is missing, damaged, or does not fit the configuration.
        """
        # Imported here: reading a configuration must not need the runtime.
        import onnxruntime as ort  # noqa: PLC0415

        config = _read_config(bundle / CONFIG_FILE)
        self.name: str = config["name"]
        self.version: str = config["version"]
        self.labels: tuple[str, ...] = tuple(config["labels"])
        self.thresholds: dict[str, float] = dict(config["thresholds"])
        self.limits = limits
        try:
            self.preprocessing = Preprocessing(**config["preprocessing"])
        except (TypeError, ValueError) as error:
            raise ModelLoadError(f"The model's preprocessing is not valid: {error}.") from error
        graph = config["graph"]
        model = _checked_graph(bundle / graph["file"], graph["sha256"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        wanted = providers or ("CUDAExecutionProvider", "CPUExecutionProvider")
        usable = [name for name in wanted if name in ort.get_available_providers()]
        try:
            self._session = ort.InferenceSession(model, options, providers=usable)
        except Exception as error:  # ONNX Runtime's exception types are not public
            raise ModelLoadError("ONNX Runtime cannot load the model's graph.") from error
        self.provider: str = self._session.get_providers()[0]
        self._input = graph["input"]["name"]
        self._output = graph["output"]["name"]
        self._check_signature(graph)

    def _check_signature(self, graph: Mapping[str, Any]) -> None:
        for actual, expected, kind in (
            (self._session.get_inputs(), graph["input"], "input"),
            (self._session.get_outputs(), graph["output"], "output"),
        ):
            found = {
                a.name: (a.type, [d if isinstance(d, int) else -1 for d in a.shape]) for a in actual
            }
            wanted = ("tensor(float)", list(expected["shape"]))
            if found.get(expected["name"]) != wanted:
                raise ModelLoadError(
                    f"The graph's {kind}s are {found}, but the configuration names "
                    f"{expected['name']} with {wanted}."
                )

    def tensor(self, data: bytes | bytearray | memoryview) -> npt.NDArray[np.float32]:
        """Encoded image to the model's input, without the batch axis.

        Raises:
            BadImageError: the image cannot be used.
        """
        return load_tensor(data, self.preprocessing, self.limits)

    def forward(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the graph.

        Args:
            batch: float32 `[N, *preprocessing.item_shape]`.

        Returns:
            float32 `[N, classes]`, rows sum to 1.
        """
        return np.asarray(self._session.run([self._output], {self._input: batch})[0])

    def predict(self, images: Sequence[bytes]) -> list[Prediction | BadImageError]:
        """Answer several images; a bad one is marked in its place and harms no other."""
        answers: list[Prediction | BadImageError | None] = []
        tensors = []
        for data in images:
            try:
                tensors.append(self.tensor(data))
                answers.append(None)
            except BadImageError as error:
                answers.append(error)
        rows = iter(self.forward(np.stack(tensors)) if tensors else ())
        return [
            decide(next(rows), self.labels, self.thresholds) if answer is None else answer
            for answer in answers
        ]

    def warm_up(self) -> Prediction:
        """Send one blank image through the whole path; the first call pays for allocations."""
        answer = self.predict([warm_up_image()])[0]
        if isinstance(answer, BadImageError):
            raise ModelLoadError(f"The warm-up image was refused: {answer}")
        total = sum(answer.probabilities.values())
        if not np.isfinite(total):
            raise ModelLoadError("The model answers the warm-up image with non-finite values.")
        if abs(total - 1) > _SUM_TOLERANCE:
            raise ModelLoadError(
                f"The model's probabilities sum to {total:g}, not 1; its graph must end in softmax."
            )
        return answer


def warm_up_image() -> bytes:
    """A small grey PNG that every worker must be able to answer before it counts as ready."""
    buffer = BytesIO()
    Image.new("L", (64, 64), 128).save(buffer, "PNG")
    return buffer.getvalue()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"Cannot read {path.name}: {error.strerror}.") from error
    except ValueError as error:
        raise ModelLoadError(f"{path.name} is not JSON.") from error
    version = config.get("schema_version") if isinstance(config, dict) else None
    if version != SCHEMA_VERSION:
        raise ModelLoadError(
            f"{path.name} has schema version {version!r}; this release reads {SCHEMA_VERSION}."
        )
    assert isinstance(config, dict)  # noqa: S101 - for the type checker
    return config


def _checked_graph(path: Path, sha256: str) -> bytes:
    try:
        model = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"Cannot read {path.name}: {error.strerror}.") from error
    actual = hashlib.sha256(model).hexdigest()
    if actual != sha256:
        raise ModelLoadError(
            f"{path.name} is damaged or not the graph of this configuration: its SHA-256 is "
            f"{actual}, the configuration says {sha256}."
        )
    return model
