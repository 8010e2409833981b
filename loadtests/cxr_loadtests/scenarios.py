"""The requests of each scenario, and whether an answer is the expected one."""

import base64
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from cxr_loadtests.clients import Reply, Sendable
from cxr_loadtests.images import Sample
from cxr_loadtests.profile import Scenario

_BINARY = "application/octet-stream"
_JSON = "application/json"
_HEADER_LENGTH = "Inference-Header-Content-Length"
_MEDIA_TYPES = {"jpeg": "image/jpeg", "png": "image/png", "dicom": "application/dicom"}

# What each scenario speaks, as the server's metrics name it.
PROTOCOLS: dict[Scenario, str] = {
    "rest-v1": "v1",
    "rest-raw": "v1",
    "v2-json": "v2",
    "v2-binary": "v2",
    "grpc": "grpc",
    "explain": "v1",
    "dicom": "v1",
}
OK = {"200", "OK"}
WRONG_ANSWER = "wrong answer"
_UNREADABLE = (DecodeError, IndexError, KeyError, TypeError, ValueError, struct.error)


@dataclass(frozen=True)
class Expected:
    """What a model says of an image.

    Attributes:
        label: the most probable class.
        probabilities: of each class.
    """

    label: str
    probabilities: Mapping[str, float]


# By model version; one list has an item for each sample.
Expectations = Mapping[str, Sequence[Expected]]


@dataclass(frozen=True)
class Request:
    """A request and what must come back.

    Attributes:
        scenario: that it belongs to.
        protocol: as the server's metrics name it: `v1`, `v2` or `grpc`.
        sendable: what is sent.
        sample: place of its image among the samples; None for bad input.
        refusal: the one code that bad input must be answered with.
        kind: of image, to choose by weight.
    """

    scenario: Scenario
    protocol: str
    sendable: Sendable
    sample: int | None = None
    refusal: str = ""
    kind: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        code: HTTP status or name of the gRPC status; empty where there was no answer.
        failure: in a few words; empty where all is as expected.
        from_server: whether the server itself has answered.
    """

    code: str
    failure: str
    from_server: bool


def requests_of(
    scenario: Scenario, samples: Sequence[Sample], model: str, *, grpc: bool
) -> list[Request]:
    """Every request of a scenario.

    Args:
        scenario: which one.
        samples: images to send.
        model: its name.
        grpc: whether bad input goes over gRPC, too.
    """
    if scenario == "bad-input":
        return _bad_input(samples, model, grpc=grpc)
    wanted = {"dicom"} if scenario == "dicom" else {"jpeg", "png"}
    return [
        Request(
            scenario,
            PROTOCOLS[scenario],
            _sendable(scenario, sample, model),
            sample=place,
            kind=sample.kind,
        )
        for place, sample in enumerate(samples)
        if sample.format in wanted
    ]


def check(request: Request, reply: Reply, expectations: Expectations, tolerance: float) -> Outcome:
    """Whether an answer is the expected one: not its status alone, but label and probabilities."""
    code, server = reply.code, reply.from_server
    if reply.problem:
        return Outcome("", reply.problem, from_server=False)
    if request.refusal:
        failure = "" if code == request.refusal else f"{code}, expected {request.refusal}"
        return Outcome(code, failure, server)
    if code not in OK:
        return Outcome(code, code, server)
    try:
        version, found = read_answer(request, reply)
        expected = expectations[version][request.sample or 0]
    except _UNREADABLE:
        return Outcome(code, WRONG_ANSWER, server)
    same = found.label == expected.label and found.probabilities.keys() == (
        expected.probabilities.keys()
    )
    near = same and all(
        math.isclose(found.probabilities[name], value, rel_tol=0, abs_tol=tolerance)
        for name, value in expected.probabilities.items()
    )
    return Outcome(code, "" if near else WRONG_ANSWER, server)


def read_answer(request: Request, reply: Reply) -> tuple[str, Expected]:
    """The model's version and its answer to one image.

    Raises:
        Exception: one of `_UNREADABLE`: it is not what the protocol says.
    """
    if request.scenario == "grpc":
        return _read_grpc(reply.body)
    if request.scenario == "v2-binary":
        return _read_binary(reply)
    document = json.loads(reply.body)
    if request.protocol == "v2":
        outputs = {output["name"]: output for output in document["outputs"]}
        names = json.loads(outputs["probabilities"]["parameters"]["labels"])
        values = outputs["probabilities"]["data"]
        label = outputs["label"]["data"][0]
        return document["model_version"], _expected(label, names, values)
    prediction = document["predictions"][0]
    if request.scenario == "explain":
        explanation = document["explanations"][0]
        rows = explanation["heatmap"]
        largest = max(abs(value) for row in rows for value in row)
        if explanation["class"] != prediction["label"] or not explanation["overlay"]["b64"]:
            raise ValueError("the explanation is of another class, or has no overlay")
        if not math.isfinite(largest) or largest > 1:
            raise ValueError("a heat map has values from -1 to 1")
    return document["model_version"], Expected(prediction["label"], prediction["probabilities"])


def _expected(label: str, names: Sequence[str], values: Sequence[float]) -> Expected:
    return Expected(label, dict(zip(names, values, strict=True)))


def _read_binary(reply: Reply) -> tuple[str, Expected]:
    length = int(reply.headers[_HEADER_LENGTH.lower()])
    document = json.loads(reply.body[:length])
    place, found = length, {}
    for output in document["outputs"]:
        end = place + output["parameters"]["binary_data_size"]
        found[output["name"]] = (reply.body[place:end], output)
        place = end
    raw, output = found["probabilities"]
    names = json.loads(output["parameters"]["labels"])
    label = found["label"][0]
    (size,) = struct.unpack_from("<I", label)
    values = struct.unpack(f"<{len(names)}f", raw)
    return document["model_version"], _expected(label[4 : 4 + size].decode(), names, values)


def _read_grpc(body: bytes) -> tuple[str, Expected]:
    answer = service_pb2.ModelInferResponse.FromString(body)
    outputs = {output.name: output for output in answer.outputs}
    probabilities = outputs["probabilities"]
    names = json.loads(probabilities.parameters["labels"].string_param)
    label = outputs["label"].contents.bytes_contents[0].decode()
    values = list(probabilities.contents.fp32_contents)
    return answer.model_version, _expected(label, names, values)


def _sendable(scenario: Scenario, sample: Sample, model: str) -> Sendable:
    data = sample.data
    if scenario in ("rest-raw", "dicom"):
        headers = {"Content-Type": _MEDIA_TYPES[sample.format]}
        return Sendable(f"/v1/models/{model}:predict", data, headers)
    if scenario in ("rest-v1", "explain"):
        verb = "explain" if scenario == "explain" else "predict"
        body = json.dumps({"instances": [{"b64": base64.b64encode(data).decode()}]}).encode()
        return Sendable(f"/v1/models/{model}:{verb}", body, {"Content-Type": _JSON})
    if scenario == "grpc":
        return Sendable("", _grpc_message(data, model))
    outputs = [{"name": "probabilities"}, {"name": "label"}]
    tensor: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [1]}
    if scenario == "v2-json":
        tensor["data"] = [base64.b64encode(data).decode()]
        body = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
        return Sendable(f"/v2/models/{model}/infer", body, {"Content-Type": _JSON})
    packed = struct.pack("<I", len(data)) + data
    tensor["parameters"] = {"binary_data_size": len(packed)}
    header = json.dumps(
        {
            "inputs": [tensor],
            "outputs": [output | {"parameters": {"binary_data": True}} for output in outputs],
        }
    ).encode()
    return Sendable(
        f"/v2/models/{model}/infer",
        header + packed,
        {"Content-Type": _BINARY, _HEADER_LENGTH: str(len(header))},
    )


def _grpc_message(data: bytes, model: str) -> bytes:
    message = service_pb2.ModelInferRequest(model_name=model)
    tensor = message.inputs.add(name="image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(data)
    return bytes(message.SerializeToString())


def _bad_input(samples: Sequence[Sample], model: str, *, grpc: bool) -> list[Request]:
    """What must be refused, each with one code."""
    whole = next(sample for sample in samples if sample.format != "dicom")
    media = {"Content-Type": _MEDIA_TYPES[whole.format]}
    predict = f"/v1/models/{model}:predict"
    truncated = whole.data[: len(whole.data) // 2]
    json_type = {"Content-Type": _JSON}
    cases = [
        ("400", predict, truncated, media),
        ("400", predict, b"This is no image.", media),
        ("400", predict, b"", media),
        ("413", predict, _huge_png(), {"Content-Type": "image/png"}),
        ("415", predict, whole.data, {"Content-Type": "text/plain"}),
        ("400", predict, b'{"instances": [', json_type),
        ("400", predict, b'{"instances": [{"b64": "no base64!"}]}', json_type),
        ("400", f"/v2/models/{model}/infer", b'{"inputs": []}', json_type),
    ]
    requests = [
        Request(
            "bad-input",
            "v2" if path.startswith("/v2") else "v1",
            Sendable(path, body, headers),
            refusal=code,
        )
        for code, path, body, headers in cases
    ]
    if grpc:
        sendable = Sendable("", _grpc_message(truncated, model))
        requests.append(Request("bad-input", "grpc", sendable, refusal="INVALID_ARGUMENT"))
    return requests


def _huge_png() -> bytes:
    """A small PNG that declares 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(60_001)))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")
