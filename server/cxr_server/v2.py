"""Open Inference Protocol V2: what its REST and gRPC forms have in common, and the REST form."""

import base64
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from tritonclient.utils import serialize_byte_tensor

from cxr.answer import Answer, Options, Prediction
from cxr.config import ModelConfig
from cxr.decode import ACCEPTED
from cxr.explain import HEATMAP_SIDE
from cxr_server.errors import bad_request, check_batch
from cxr_server.service import DEFAULT_OPTIONS, Image
from cxr_server.v1 import decode_base64, parse_json, quality

INPUT = "image"
PROBABILITIES = "probabilities"
LABEL = "label"
DECISION = "decision"
QUALITY = "quality"
ERROR = "error"
HEATMAP = "heatmap"
OVERLAY = "overlay"
EXPLAINED = "explained"
EXPLANATION = (HEATMAP, OVERLAY, EXPLAINED)
OUTPUTS = (PROBABILITIES, LABEL, DECISION, QUALITY, *EXPLANATION, ERROR)
# Parameter of a request: true, or the class to explain.
EXPLAIN = "explain"
# Parameter of the output `probabilities`: its columns' names, a JSON list.
LABELS_PARAMETER = "labels"
# Header of the binary tensor data extension: length of the JSON part, in bytes.
JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data",)
SERVER_NAME = "cxr-serve"
PLATFORM = "onnxruntime"

_LENGTH = struct.Struct("<I")
# Digits of a body's length, at most; Python refuses to read numbers of thousands of digits.
_MAX_DIGITS = 18


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A request of either form.

    Attributes:
        id: the caller's, or a new one.
        images: encoded images, or what is wrong with them.
        outputs: names of the wanted outputs; empty for the default ones.
        binary: outputs to send as binary data (REST only).
        options: what is wanted of each image beside its probabilities.
    """

    id: str
    images: list[Image]
    outputs: tuple[str, ...] = ()
    binary: frozenset[str] = field(default_factory=frozenset)
    options: Options = DEFAULT_OPTIONS


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One output.

    Attributes:
        data: float32 for FP32, an object array of bytes for BYTES; the first axis is the images.
        parameters: what else a caller should know about it.
    """

    name: str
    datatype: str
    data: np.ndarray[Any, Any]
    parameters: Mapping[str, str] = field(default_factory=dict)

    def raw(self) -> bytes:
        """Row-major little-endian data; BYTES items carry their length in four bytes."""
        if self.datatype != "BYTES":
            return self.data.tobytes()
        packed = serialize_byte_tensor(self.data)
        return bytes(packed.item()) if packed.size else b""

    def plain(self) -> list[Any]:
        """Row-major values for JSON."""
        if self.datatype != "BYTES":
            return [float(value) for value in self.data.ravel()]
        if self.name == OVERLAY:
            return [base64.b64encode(item).decode() for item in self.data]
        return [item.decode() for item in self.data.ravel()]


def tensor_metadata(config: ModelConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs of the model, as the metadata calls describe them."""
    inputs = [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}]
    classes = len(config.labels)
    outputs = [
        {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, classes]},
        {"name": LABEL, "datatype": "BYTES", "shape": [-1]},
        {"name": DECISION, "datatype": "BYTES", "shape": [-1, classes]},
    ]
    if config.guards is not None:
        outputs.append({"name": QUALITY, "datatype": "BYTES", "shape": [-1]})
    if config.explanation is not None:
        outputs += [
            {"name": HEATMAP, "datatype": "FP32", "shape": [-1, HEATMAP_SIDE, HEATMAP_SIDE]},
            {"name": OVERLAY, "datatype": "BYTES", "shape": [-1]},
            {"name": EXPLAINED, "datatype": "BYTES", "shape": [-1]},
        ]
    outputs.append({"name": ERROR, "datatype": "BYTES", "shape": [-1]})
    return inputs, outputs


def check_input(names: Sequence[str], datatype: str, shape: Sequence[int], max_batch: int) -> int:
    """Check the description of a request's inputs.

    Returns:
        The number of images.

    Raises:
        RequestError: not exactly one input `image` of type BYTES and shape [N] (400), or N is
            larger than `max_batch` (413).
    """
    if list(names) != [INPUT]:
        raise bad_request(f"The request must have exactly one input, named {INPUT!r}.")
    if datatype != "BYTES":
        raise bad_request(
            f"Input {INPUT!r} must have datatype BYTES, one encoded {ACCEPTED} file an item."
        )
    if len(shape) != 1 or shape[0] < 1:
        raise bad_request(f"Input {INPUT!r} must have shape [N] with N of at least 1.")
    check_batch(shape[0], max_batch)
    return shape[0]


def check_count(images: Sequence[Image], count: int) -> None:
    """Check that the data have as many items as the shape says.

    Raises:
        RequestError: they do not (400).
    """
    if len(images) != count:
        raise bad_request(f"Input {INPUT!r} does not have as many items as its shape says.")


def check_outputs(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of the wanted outputs.

    Raises:
        RequestError: one of them does not exist, or twice (400).
    """
    if len(set(names)) != len(names) or not set(names) <= set(OUTPUTS):
        raise bad_request(f"The outputs can be any of {', '.join(OUTPUTS)}, each once.")
    return tuple(names)


def options(explain: object, outputs: Sequence[str]) -> Options:
    """What a request wants of each image, from its parameter and the outputs that it names.

    Raises:
        RequestError: the parameter is neither a truth value nor a name (400).
    """
    if explain is None or explain == "":
        return Options(explain=not set(outputs).isdisjoint(EXPLANATION))
    if not isinstance(explain, (bool, str)):
        raise bad_request(f"The parameter {EXPLAIN!r} must be true or the name of a class.")
    return Options(explain=explain)


def unpack_bytes(raw: bytes | memoryview, count: int) -> list[Image]:
    """The items of a binary BYTES tensor.

    No more than `count` and one are read: a body of zeros would have millions of empty ones.

    Raises:
        RequestError: a length runs past the end (400).
    """
    items: list[Image] = []
    offset = 0
    while offset < len(raw) and len(items) <= count:
        start = offset + _LENGTH.size
        offset = start + _LENGTH.unpack_from(raw, offset)[0] if start <= len(raw) else start
        if offset > len(raw):
            raise bad_request(
                f"The binary data of input {INPUT!r} is cut off; each item is its length in four "
                "bytes, little-endian, and then its bytes."
            )
        items.append(bytes(raw[start:offset]))
    return items


def output_tensors(
    config: ModelConfig, answers: Sequence[Answer], wanted: Sequence[str]
) -> list[Tensor]:
    """The answers as tensors.

    The row of a bad image has NaN probabilities, an empty label, and its sentence in `error`, an
    output that is there when it is wanted or when an image was bad. Explanations are there when one
    was made or is wanted; where there is none, the map is NaN.
    """
    classes = len(config.labels)
    probabilities = np.full((len(answers), classes), np.nan, dtype=np.float32)
    labels = np.full(len(answers), b"", dtype=np.object_)
    decisions = np.full((len(answers), classes), b"", dtype=np.object_)
    heatmaps = np.full((len(answers), HEATMAP_SIDE, HEATMAP_SIDE), np.nan, dtype=np.float32)
    overlays, explained, qualities, errors = (
        np.full(len(answers), b"", dtype=np.object_) for _ in range(4)
    )
    any_explained = any_judged = False
    any_bad = False
    for row, answer in enumerate(answers):
        if isinstance(answer, Prediction):
            probabilities[row] = [answer.probabilities[label] for label in config.labels]
            labels[row] = answer.label.encode()
            decisions[row] = [answer.decisions.get(label, "").encode() for label in config.labels]
            if answer.quality is not None:
                any_judged = True
                qualities[row] = orjson.dumps(quality(answer.quality))
            if answer.explanation is not None:
                any_explained = True
                heatmaps[row] = answer.explanation.heatmap
                overlays[row] = answer.explanation.overlay
                explained[row] = answer.explanation.label.encode()
        else:
            any_bad = True
            errors[row] = str(answer).encode()
    columns = {LABELS_PARAMETER: orjson.dumps(config.labels).decode()}
    tensors = {
        tensor.name: tensor
        for tensor in (
            Tensor(name=PROBABILITIES, datatype="FP32", data=probabilities, parameters=columns),
            Tensor(name=LABEL, datatype="BYTES", data=labels),
            Tensor(name=DECISION, datatype="BYTES", data=decisions, parameters=columns),
            Tensor(name=QUALITY, datatype="BYTES", data=qualities),
            Tensor(name=HEATMAP, datatype="FP32", data=heatmaps),
            Tensor(name=OVERLAY, datatype="BYTES", data=overlays),
            Tensor(name=EXPLAINED, datatype="BYTES", data=explained),
            Tensor(name=ERROR, datatype="BYTES", data=errors),
        )
    }
    names = list(wanted or (PROBABILITIES, LABEL, *((QUALITY,) if any_judged else ())))
    if any_explained and set(names).isdisjoint(EXPLANATION):
        names += EXPLANATION
    if any_bad and ERROR not in names:
        names.append(ERROR)
    return [tensors[name] for name in names]


def parse_rest(body: bytes, json_length: str | None, max_batch: int) -> InferRequest:
    """A REST request, with or without binary data behind the JSON.

    In JSON, where bytes cannot stand, each item of `image` is Base64.

    Args:
        body: the request's body.
        json_length: value of the header `Inference-Header-Content-Length`.
        max_batch: images in one request, at most.

    Raises:
        RequestError: anything of it is malformed (400), or too many images (413).
    """
    view = memoryview(body)
    split = len(body)
    if json_length is not None:
        number = json_length.isascii() and json_length.isdigit() and len(json_length) <= _MAX_DIGITS
        split = int(json_length) if number else -1
        if not 0 <= split <= len(body):
            raise bad_request(
                f"The header {JSON_LENGTH_HEADER} must be the length of the JSON part in bytes."
            )
    document = parse_json(view[:split])
    inputs = _objects(document, "inputs")
    first = inputs[0] if inputs else {}
    count = check_input(
        [str(item.get("name")) for item in inputs],
        str(first.get("datatype")),
        _shape(first.get("shape")) if first else (),
        max_batch,
    )
    images = _images(first, view[split:], count)
    check_count(images, count)
    outputs = _objects(document, "outputs")
    names = check_outputs([str(output.get("name")) for output in outputs])
    return InferRequest(
        id=_request_id(document.get("id")),
        images=images,
        outputs=names,
        binary=_binary_outputs(document, outputs),
        options=options(_parameters(document).get(EXPLAIN), names),
    )


def response_rest(
    config: ModelConfig, request: InferRequest, answers: Sequence[Answer]
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON part where binary data follow it."""
    outputs = []
    binary = []
    for tensor in output_tensors(config, answers, request.outputs):
        output: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.data.shape),
            "parameters": dict(tensor.parameters),
        }
        if tensor.name in request.binary:
            binary.append(tensor.raw())
            output["parameters"]["binary_data_size"] = len(binary[-1])
        else:
            output["data"] = tensor.plain()
        outputs.append(output)
    # NaN becomes null: JSON has no other word for it.
    header = orjson.dumps(
        {
            "model_name": config.name,
            "model_version": config.version,
            "id": request.id,
            "outputs": outputs,
        }
    )
    if not binary:
        return header, None
    return b"".join((header, *binary)), len(header)


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = document.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise bad_request(f'"{key}" must be a list of objects.')
    return value


def _shape(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(size) is int for size in value):
        raise bad_request('"shape" must be a list of whole numbers.')
    return value


def _parameters(item: Mapping[str, Any]) -> dict[str, Any]:
    value = item.get("parameters") or {}
    if not isinstance(value, dict):
        raise bad_request('"parameters" must be an object.')
    return value


def _images(tensor: Mapping[str, Any], binary: memoryview, count: int) -> list[Image]:
    size = _parameters(tensor).get("binary_data_size")
    data = tensor.get("data")
    if size is not None:
        if type(size) is not int or size != len(binary) or data is not None:
            raise bad_request(
                f'"binary_data_size" of input {INPUT!r} must be the number of bytes behind the '
                'JSON part, and there must be no "data" beside it.'
            )
        return unpack_bytes(binary, count)
    if binary:
        raise bad_request(
            f'There are bytes behind the JSON part, but input {INPUT!r} has no "binary_data_size".'
        )
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        raise bad_request(
            f'Input {INPUT!r} needs "data", a flat list of Base64 strings, or binary data.'
        )
    check_count(data, count)
    return [
        decode_base64(item, f"Item {index} of input {INPUT!r}") for index, item in enumerate(data)
    ]


def _binary_outputs(
    document: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]]
) -> frozenset[str]:
    default = _parameters(document).get("binary_data_output") is True
    asked = {
        str(output["name"]): _parameters(output).get("binary_data", default) for output in outputs
    }
    return frozenset(name for name in OUTPUTS if asked.get(name, default) is True)


def _request_id(value: object) -> str:
    if value is None or value == "":
        return str(uuid.uuid4())
    if not isinstance(value, str):
        raise bad_request('"id" must be a string.')
    return value
