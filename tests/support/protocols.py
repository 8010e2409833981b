"""Requests of each protocol, made by hand, so that they can also be made wrong."""

import base64
import json
import struct
from collections.abc import Sequence
from typing import Any

from tritonclient.grpc import service_pb2

V1 = "/v1/models/cxr:predict"
V2 = "/v2/models/cxr/infer"
JSON = "application/json"
BINARY = "application/octet-stream"
LENGTH_HEADER = "Inference-Header-Content-Length"


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def v1_body(images: Sequence[bytes]) -> bytes:
    return json.dumps({"instances": [{"b64": base64_text(image)} for image in images]}).encode()


def v2_document(images: Sequence[bytes], **changes: Any) -> dict[str, Any]:
    """A V2 request as JSON, with some members of its input replaced."""
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(images)],
        "data": [base64_text(image) for image in images],
    }
    return {"inputs": [tensor | changes]}


def pack(images: Sequence[bytes]) -> bytes:
    """Binary BYTES data: each item behind its length."""
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def v2_binary(images: Sequence[bytes], **document: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a V2 request with binary data."""
    data = pack(images)
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(images)],
        "parameters": {"binary_data_size": len(data)},
    }
    header = json.dumps({"inputs": [tensor]} | document).encode()
    return header + data, {"Content-Type": BINARY, LENGTH_HEADER: str(len(header))}


def grpc_request(images: Sequence[bytes], *, raw: bool = False, **changes: Any) -> Any:
    """A ModelInferRequest, with some fields of its input replaced."""
    request = service_pb2.ModelInferRequest(model_name="cxr")
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(images)]} | changes
    added = request.inputs.add(**tensor)
    if raw:
        request.raw_input_contents.append(pack(images))
    else:
        added.contents.bytes_contents.extend(images)
    return request
