"""The inference engine: encoded images in, probabilities out, through ONNX Runtime."""

import contextlib
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr.answer import Answer, Options, Prediction, Stage, decide
from cxr.decode import DEFAULT_LIMITS, DecodeLimits
from cxr.errors import BadImageError, ModelLoadError, Rejection
from cxr.explain import explanation
from cxr.preprocess import Loaded, Preprocessing, load, load_tensor
from cxr.quality import judged, pixel_scores

if TYPE_CHECKING:
    import onnxruntime as ort

CONFIG_FILE = "cxr-model.json"
SCHEMA_VERSION: Literal[1] = 1

# What a serving process tells the handler in its workers, by environment variables. Without them
# the handler runs in any TorchServe.
THREADS_ENV = "CXR_WORKER_THREADS"
MAX_BYTES_ENV = "CXR_MAX_IMAGE_BYTES"
MAX_PIXELS_ENV = "CXR_MAX_IMAGE_PIXELS"
LOAD_ERROR_FILE_ENV = "CXR_LOAD_ERROR_FILE"
# What a handler's lines for the serving process's log begin with. Nothing of an image is in them,
# which nobody knows of what else a worker prints.
WORKER_LOG = "cxr-worker: "

_SUM_TOLERANCE = 1e-3

# ONNX Runtime's execution providers.
CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"

_Provider = tuple[str, dict[str, str]]


class _Row(NamedTuple):
    """What the graph makes of one image: float32 arrays, or nothing."""

    probabilities: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32] | None
    evidence: npt.NDArray[np.float32] | None


def usable_providers(wanted: Sequence[str], *, float16: bool = False) -> list[_Provider]:
    """Those execution providers that ONNX Runtime offers here, their libraries loaded.

    Args:
        wanted: names, the preferred one first.
        float16: whether TensorRT may compute in half precision.

    Returns:
        Names and options, as an `InferenceSession` takes them.
    """
    # Imported here: reading a configuration must not need the runtime.
    import onnxruntime as ort  # noqa: PLC0415

    offered = [name for name in wanted if name in ort.get_available_providers()]
    # The libraries come as packages, where no loader looks.
    if CUDA in offered:
        with contextlib.redirect_stdout(sys.stderr):  # what is missing is printed
            ort.preload_dlls()
    if TENSORRT in offered:
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt_libs")  # loads them by being imported
    options: dict[str, dict[str, str]] = {
        # Convolutions in full float32, as on a CPU, and their algorithms chosen by rule: by trial,
        # which is ONNX Runtime's default, the first batch of each size waits for it.
        CUDA: {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
        TENSORRT: {"trt_fp16_enable": str(int(float16))},
    }
    return [(name, options.get(name, {})) for name in offered]


def new_session(
    model: bytes | str, options: "ort.SessionOptions", providers: Sequence[_Provider]
) -> "ort.InferenceSession":
    """A session on the first of the providers that can be used, and never on another unnoticed.

    Raises:
        Exception: the graph cannot be loaded; ONNX Runtime's types are not public.
    """
    import onnxruntime as ort  # noqa: PLC0415

    # ONNX Runtime's own way back loses the options of the other providers, and takes a session to
    # them for ever after one failed run.
    if providers[0][0] == TENSORRT:
        # It raises where its libraries are missing; CUDA is passed over.
        with contextlib.suppress(Exception):
            return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        providers = providers[1:]
    return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)


class Engine:
    """A loaded model.

    One engine belongs to one worker; ONNX Runtime lets several threads call it at once.

    Attributes:
        provider: ONNX Runtime's execution provider that runs the graph.
        unusable: providers that ONNX Runtime offered and then could not use, as where a GPU's
            driver or libraries are missing.
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
            threads: threads that one forward pass may use; on a GPU, that load the images of a
                batch.
            limits: the largest image that is accepted.
            providers: ONNX Runtime execution providers; by default the one that the model was
                compiled for, then CUDA, where they are available, then CPU.

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
        compilation = config.get("compilation") or {}
        compiled_for = compilation.get("execution_provider")
        wanted = providers or ((compiled_for, CUDA, CPU) if compiled_for else (CUDA, CPU))
        given = usable_providers(wanted, float16=compilation.get("precision") == "float16")
        try:
            self._session = new_session(model, options, given)
        except Exception as error:  # ONNX Runtime's exception types are not public
            raise ModelLoadError("ONNX Runtime cannot load the model's graph.") from error
        used = self._session.get_providers()
        self.provider: str = used[0]
        self.unusable = tuple(name for name, _ in given if name not in used)
        # The size of all batches on a GPU: after one of another size, it is set up anew.
        self._largest = 1
        on_gpu = self.provider != CPU
        # A GPU waits for all images of its batch, and decoders do not hold Python's lock.
        self._loaders = ThreadPoolExecutor(threads) if on_gpu and threads > 1 else None
        self._input = graph["input"]["name"]
        self._output = graph["output"]["name"]
        self._bands: dict[str, Sequence[float]] | None = config.get("uncertain")
        self._guards: dict[str, Any] | None = config.get("guards")
        self._explanation: dict[str, Any] | None = config.get("explanation")
        self._check_signature(graph)

    def _check_signature(self, graph: Mapping[str, Any]) -> None:
        outputs = self._session.get_outputs()
        checks = [
            (self._session.get_inputs(), graph["input"], "input"),
            (outputs, graph["output"], "output"),
        ]
        if self._guards is not None:
            checks.append((outputs, self._guards["output"], "output"))
        if self._explanation is not None:
            checks.append((outputs, self._explanation["output"], "output"))
            optional = [value.name for value in self._session.get_overridable_initializers()]
            if self._explanation["switch"] not in optional:
                raise ModelLoadError(
                    f"The graph has no optional input {self._explanation['switch']}, which the "
                    "configuration names."
                )
        for actual, expected, kind in checks:
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

    def predict(
        self,
        images: Sequence[bytes],
        options: Sequence[Options] | None = None,
    ) -> list[Answer]:
        """Answer several images; a bad one is marked in its place and harms no other.

        Args:
            images: encoded images.
            options: what is wanted of each; by default probabilities and, if the model has guards,
                quality.
        """
        wanted = options or [Options()] * len(images)
        answers: dict[int, Answer] = {}
        good: list[tuple[int, Loaded, Options, dict[Stage, float]]] = []
        pool = self._loaders if len(images) > 1 else None
        loaded = pool.map(self._load, images) if pool else map(self._load, images)
        for place, (found, option) in enumerate(zip(loaded, wanted, strict=True)):
            if isinstance(found, BadImageError):
                answers[place] = found
            else:
                good.append((place, found[0], option, found[1]))
        start = time.perf_counter()
        rows = self._rows(
            [image for _, image, _, _ in good],
            explain=any(option.explain for _, _, option, _ in good),
            judge=any(option.quality for _, _, option, _ in good),
        )
        inference = time.perf_counter() - start
        for (place, image, option, seconds), row in zip(good, rows, strict=True):
            seconds[Stage.INFERENCE] = inference
            answers[place] = self._answer(image, option, row, seconds, batch=len(good))
        return [answers[place] for place in range(len(images))]

    def _load(self, data: bytes) -> tuple[Loaded, dict[Stage, float]] | BadImageError:
        """An image as the graph wants it, and the seconds that it took."""
        start = time.perf_counter()
        try:
            image = load(data, self.preprocessing, self.limits)
        except BadImageError as error:
            return error
        rest = time.perf_counter() - start - image.decode_seconds
        return image, {Stage.DECODE: image.decode_seconds, Stage.PREPROCESS: rest}

    def _rows(self, images: Sequence[Loaded], *, explain: bool, judge: bool) -> list[_Row]:
        """What the graph makes of each image, in order."""
        if not images:
            return []
        tensors = [image.tensor for image in images]
        if self.provider != CPU:
            self._largest = max(self._largest, len(tensors))
            tensors += [np.zeros_like(tensors[0])] * (self._largest - len(tensors))
        inputs = {self._input: np.stack(tensors)}
        # What a name stands for in a row: the row's fields are in this order.
        names: list[str | None] = [self._output, None, None]
        if judge and self._guards is not None:
            names[1] = self._guards["output"]["name"]
        if explain and self._explanation is not None:
            names[2] = self._explanation["output"]["name"]
            inputs[self._explanation["switch"]] = np.asarray(True)
        wanted = [name for name in names if name is not None]
        found = dict(zip(wanted, self._session.run(wanted, inputs), strict=True))
        nothing = [None] * len(images)
        columns = [nothing if name is None else found[name][: len(images)] for name in names]
        return [_Row(*values) for values in zip(*columns, strict=True)]

    def _answer(
        self,
        image: Loaded,
        options: Options,
        row: _Row,
        seconds: dict[Stage, float],
        *,
        batch: int,
    ) -> Prediction:
        start = time.perf_counter()
        probabilities = row.probabilities.tolist()
        answer = decide(probabilities, self.labels, self.thresholds, self._bands)
        if row.scores is not None and self._guards is not None and options.quality:
            names = (Rejection(name) for name in self._guards["scores"])
            scores = dict(zip(names, row.scores.tolist(), strict=True))
            scores |= pixel_scores(image.image, self.preprocessing)
            answer = replace(answer, quality=judged(scores, self._guards["limits"]))
        answer = replace(answer, seconds=seconds, batch=batch, provider=self.provider)
        seconds[Stage.POSTPROCESS] = time.perf_counter() - start
        label = answer.label if options.explain is True else options.explain
        if row.evidence is None or self._explanation is None or label not in self.labels:
            return answer
        explained = explanation(
            image.image,
            image.view,
            row.evidence[self.labels.index(label)],
            label=label,
            method=self._explanation["method"],
        )
        seconds[Stage.EXPLAIN] = time.perf_counter() - start - seconds[Stage.POSTPROCESS]
        return replace(answer, explanation=explained)

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
