"""Requests that the server cannot use get a status and one sentence, and do no harm."""

import base64
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from integration.conftest import (
    MAX_BATCH,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    MAX_REQUEST_BYTES,
)
from support.bundles import encoded_image
from support.dicoms import dicom_bytes
from support.fuzz import png_that_declares
from support.protocols import (
    BINARY,
    JSON,
    LENGTH_HEADER,
    V1,
    V2,
    grpc_request,
    pack,
    v1_body,
    v2_binary,
    v2_document,
)
from support.servers import Server

GOOD = encoded_image(90)
# Part of what is sent; it must not come back, nor get into the log.
SECRET = "patient-4711"  # noqa: S105
Code = grpc.StatusCode


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (600, 600), dtype=np.uint8)
SMALL = Image.fromarray(NOISE[:64, :64])

# Name: bytes, HTTP status, words of the sentence. Statuses: 413 too large, 415 another format,
# 422 no radiograph of the chest.
BAD_IMAGES: dict[str, tuple[bytes, int, str]] = {
    "text": (f"not an image: {SECRET}".encode(), 400, "not an image"),
    "zeros": (bytes(1000), 400, "not an image"),
    "json": (json.dumps({"name": SECRET}).encode(), 400, "not an image"),
    "truncated jpeg": (encoded_image(kind="JPEG")[:-700], 400, "truncated"),
    "truncated png": (GOOD[: len(GOOD) // 2], 400, "truncated"),
    "only a jpeg signature": (b"\xff\xd8\xff\xe0", 400, "truncated"),
    "only a png signature": (b"\x89PNG\r\n\x1a\n", 400, "truncated"),
    "png with damaged header": (GOOD[:16] + bytes(10) + GOOD[26:], 400, "damaged"),
    "damaged dicom": (bytes(128) + b"DICM" + SECRET.encode() * 10, 400, "DICOM"),
    "ct": (
        dicom_bytes(NOISE[:64, :64], Modality="CT", PatientID=SECRET),
        422,
        "computed tomography",
    ),
    "hand": (
        dicom_bytes(NOISE[:64, :64], BodyPartExamined="HAND", PatientID=SECRET),
        422,
        "(hand)",
    ),
    "several frames": (dicom_bytes(NOISE[:64, :64], NumberOfFrames=2), 422, "several frames"),
    "several pages": (save(SMALL, "TIFF", save_all=True, append_images=[SMALL]), 422, "pages"),
    "gif": (save(SMALL, "GIF"), 415, "GIF"),
    "bmp": (save(SMALL, "BMP"), 415, "BMP"),
    "pdf": (b"%PDF-1.7 " + SECRET.encode(), 415, "PDF"),
    "too many bytes": (save(Image.fromarray(NOISE), "PNG"), 413, "MiB"),
    "too many pixels": (png_that_declares(20_000, 20_000), 413, "megapixels"),
    "slightly too many pixels": (save(Image.new("L", (2000, 1001)), "PNG"), 413, "megapixels"),
}
images = pytest.mark.parametrize(
    ("image", "status", "words"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys()
)
GRPC_CODE = dict.fromkeys([400, 413, 415, 422], Code.INVALID_ARGUMENT)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.rest) as client:
        yield client


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc, options) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module", autouse=True)
def unharmed(server: Server, http: httpx.Client) -> Iterator[None]:
    """After all of it, the same workers answer a good request."""
    before = server.worker_pids()
    yield
    assert_good(http)
    assert server.worker_pids() == before
    assert "Traceback" not in server.log
    assert "unexpected" not in server.log
    assert SECRET not in server.log


def assert_good(http: httpx.Client) -> None:
    answer = http.post(V1, content=GOOD, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["label"]


def assert_sentence(text: str, words: str = "") -> None:
    """One sentence for a person, without what was sent and without the inside of the program."""
    assert words in text
    assert text.endswith(".")
    assert len(text) < 300
    for forbidden in ("\n", SECRET, "Traceback", "Error", "Exception", "0x", ".py"):
        assert forbidden not in text


def assert_refused(answer: httpx.Response, status: int, words: str = "") -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == JSON
    document = answer.json()
    assert set(document) == {"error"}
    assert_sentence(document["error"], words)


def assert_grpc_refused(call: Callable[[], Any], code: grpc.StatusCode, words: str = "") -> None:
    with pytest.raises(grpc.RpcError) as failure:
        call()
    assert failure.value.code() is code, failure.value.details()
    assert_sentence(failure.value.details(), words)


class TestBadImages:
    @images
    def test_raw(self, http: httpx.Client, image: bytes, status: int, words: str) -> None:
        answer = http.post(V1, content=image, headers={"Content-Type": "image/jpeg"})
        assert_refused(answer, status, words)

    @images
    def test_v1(self, http: httpx.Client, image: bytes, status: int, words: str) -> None:
        assert_refused(http.post(V1, content=v1_body([image])), status, words)

    @images
    def test_v2_json(self, http: httpx.Client, image: bytes, status: int, words: str) -> None:
        assert_refused(http.post(V2, json=v2_document([image])), status, words)

    @images
    def test_v2_binary(self, http: httpx.Client, image: bytes, status: int, words: str) -> None:
        body, headers = v2_binary([image])
        assert_refused(http.post(V2, content=body, headers=headers), status, words)

    @images
    @pytest.mark.parametrize("raw", [True, False], ids=["raw", "contents"])
    def test_grpc(self, stub: Any, image: bytes, status: int, words: str, raw: bool) -> None:
        request = grpc_request([image], raw=raw)
        assert_grpc_refused(lambda: stub.ModelInfer(request), GRPC_CODE[status], words)

    def test_grpc_names_the_reason_for_programs(self, stub: Any) -> None:
        for image, reason in ((b"", "empty"), (b"not an image", "not_an_image")):
            with pytest.raises(grpc.RpcError) as failure:
                stub.ModelInfer(grpc_request([image]))
            assert dict(failure.value.trailing_metadata())["cxr-rejection"] == reason

    def test_empty_raw(self, http: httpx.Client) -> None:
        answer = http.post(V1, content=b"", headers={"Content-Type": "image/png"})
        assert_refused(answer, 400, "no body")

    def test_empty_in_every_other_protocol(self, http: httpx.Client, stub: Any) -> None:
        assert_refused(http.post(V1, content=v1_body([b""])), 400, "empty")
        assert_refused(http.post(V2, json=v2_document([b""])), 400, "empty")
        body, headers = v2_binary([b""])
        assert_refused(http.post(V2, content=body, headers=headers), 400, "empty")
        for raw in (True, False):
            request = grpc_request([b""], raw=raw)
            assert_grpc_refused(
                lambda r=request: stub.ModelInfer(r), Code.INVALID_ARGUMENT, "empty"
            )

    def test_all_of_a_batch(self, http: httpx.Client, stub: Any) -> None:
        """One sentence, however many images there are."""
        same = [b"no image", b"no image either"]
        assert_refused(http.post(V1, content=v1_body(same)), 400, "None of the 2 images")
        large = [png_that_declares(20_000, height) for height in range(20_000, 20_000 + MAX_BATCH)]
        assert_refused(http.post(V1, content=v1_body(large)), 413, "None of the 8 images")
        mixed = [b"no image", save(SMALL, "GIF")]
        assert_refused(http.post(V2, json=v2_document(mixed)), 400, "None of the 2 images")
        assert_grpc_refused(
            lambda: stub.ModelInfer(grpc_request(large)), Code.INVALID_ARGUMENT, "None of the 8"
        )


V1_BODIES: dict[str, tuple[bytes, int]] = {
    "not json": (f"{{{SECRET}".encode(), 400),
    "an image without a content type": (GOOD, 400),
    "not utf-8": (b'{"instances": "\xff\xfe"}', 400),
    "nan": (b'{"instances": [NaN]}', 400),
    "deep nesting": (b'{"instances": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400),
    "a list": (b"[]", 400),
    "a string": (f'"{SECRET}"'.encode(), 400),
    "null": (b"null", 400),
    "a huge number": (b"1" * 5000, 400),
    "no instances": (b"{}", 400),
    "instances of another type": (b'{"instances": {"b64": ""}}', 400),
    "no instance": (b'{"instances": []}', 400),
    "instance of another type": (f'{{"instances": ["{SECRET}"]}}'.encode(), 400),
    "no b64": (f'{{"instances": [{{"{SECRET}": 1}}]}}'.encode(), 400),
    "b64 of another type": (b'{"instances": [{"b64": 5}]}', 400),
    "not base64": (f'{{"instances": [{{"b64": "*{SECRET}*"}}]}}'.encode(), 400),
    "base64 not ascii": ('{"instances": [{"b64": "äöü"}]}'.encode(), 400),
    "base64 cut off": (v1_body([GOOD])[:-6] + b'"}]}', 400),
    "data url": (b'{"instances": [{"b64": "data:image/png;base64,iVBO"}]}', 400),
    "too many instances": (v1_body([GOOD] * (MAX_BATCH + 1)), 413),
    "many empty instances": (b'{"instances": [' + b"{}," * 50_000 + b"{}]}", 413),
}


@pytest.mark.parametrize(("body", "status"), V1_BODIES.values(), ids=V1_BODIES.keys())
def test_v1_body(http: httpx.Client, body: bytes, status: int) -> None:
    assert_refused(http.post(V1, content=body, headers={"Content-Type": JSON}), status)


def with_input(**changes: Any) -> bytes:
    return json.dumps(v2_document([GOOD], **changes)).encode()


def with_document(**members: Any) -> bytes:
    return json.dumps(v2_document([GOOD]) | members).encode()


V2_BODIES: dict[str, tuple[bytes, int, str]] = {
    "not json": (f"{{{SECRET}".encode(), 400, "JSON"),
    "an image": (GOOD, 400, "JSON"),
    "deep nesting": (b'{"inputs": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, "JSON"),
    "a list": (b"[]", 400, "JSON object"),
    "no inputs": (b"{}", 400, "exactly one input"),
    "inputs of another type": (with_document(inputs=SECRET), 400, "inputs"),
    "input of another type": (with_document(inputs=[SECRET]), 400, "inputs"),
    "no input": (with_document(inputs=[]), 400, "exactly one input"),
    "two inputs": (with_document(inputs=v2_document([GOOD])["inputs"] * 2), 400, "exactly one"),
    "another name": (with_input(name=SECRET), 400, "named 'image'"),
    "name of another type": (with_input(name=["image"]), 400, "named 'image'"),
    "another type": (with_input(datatype="UINT8"), 400, "BYTES"),
    "no type": (with_input(datatype=None), 400, "BYTES"),
    "unknown type": (with_input(datatype=SECRET), 400, "BYTES"),
    "no shape": (with_input(shape=None), 400, "shape"),
    "shape [0]": (with_input(shape=[0], data=[]), 400, "shape"),
    "negative shape": (with_input(shape=[-1]), 400, "shape"),
    "two dimensions": (with_input(shape=[1, 1]), 400, "shape"),
    "no dimension": (with_input(shape=[]), 400, "shape"),
    "huge shape": (with_input(shape=[2**63 - 1]), 413, "at most"),
    "shape beyond 64 bits": (with_input(shape=[10**40]), 400, "shape"),
    "text in shape": (with_input(shape=[SECRET]), 400, "shape"),
    "true as shape": (with_input(shape=[True]), 400, "shape"),
    "fraction in shape": (with_input(shape=[1.0]), 400, "shape"),
    "nan in shape": (with_input().replace(b"[1]", b"[NaN]"), 400, "JSON"),
    "fewer items than shape": (with_input(shape=[2]), 400, "as many items"),
    "more items than shape": (with_input(data=[base64.b64encode(GOOD).decode()] * 2), 400, "many"),
    "too many images": (json.dumps(v2_document([GOOD] * 9)).encode(), 413, "at most 8"),
    "no data": (with_input(data=None), 400, "data"),
    "data of another type": (with_input(data=SECRET), 400, "data"),
    "item of another type": (with_input(data=[5]), 400, "data"),
    "nested data": (with_input(data=[["iVBO"]]), 400, "data"),
    "not base64": (with_input(data=[f"*{SECRET}*"]), 400, "Base64"),
    "parameters of another type": (with_input(parameters=5), 400, "parameters"),
    "binary size without binary data": (
        with_input(data=None, parameters={"binary_data_size": 5}),
        400,
        "binary_data_size",
    ),
    "id of another type": (with_document(id=5), 400, "id"),
    "request parameters of another type": (with_document(parameters=[1]), 400, "parameters"),
    "unknown output": (with_document(outputs=[{"name": SECRET}]), 400, "outputs"),
    "the same output twice": (with_document(outputs=[{"name": "label"}] * 2), 400, "outputs"),
    "output without a name": (with_document(outputs=[{}]), 400, "outputs"),
    "outputs of another type": (with_document(outputs="label"), 400, "outputs"),
}


@pytest.mark.parametrize(("body", "status", "words"), V2_BODIES.values(), ids=V2_BODIES.keys())
def test_v2_body(http: httpx.Client, body: bytes, status: int, words: str) -> None:
    assert_refused(http.post(V2, content=body, headers={"Content-Type": JSON}), status, words)


BODY, HEADERS = v2_binary([GOOD])
SPLIT = int(HEADERS[LENGTH_HEADER])


class TestV2Binary:
    @pytest.mark.parametrize(
        "length",
        ["-1", "x", "", " ", "1.5", "1e3", "+5", "0x10", "٣", "9" * 20, "9" * 5000, "1_0"],
    )
    def test_length_header(self, server: Server, length: str) -> None:
        """Sent over a plain socket: HTTP libraries refuse to send some of them."""
        request = (
            f"POST {V2} HTTP/1.1\r\nHost: x\r\nContent-Type: {BINARY}\r\n"
            f"{LENGTH_HEADER}: {length}\r\nContent-Length: {len(BODY)}\r\n"
            "Connection: close\r\n\r\n"
        ).encode() + BODY
        status, text = exchange(server, request)
        assert status == 400
        assert_sentence(json.loads(text)["error"], LENGTH_HEADER)

    @pytest.mark.parametrize("length", [len(BODY) + 1, SPLIT - 1, SPLIT + 1, 0, len(BODY)])
    def test_wrong_length(self, http: httpx.Client, length: int) -> None:
        headers = HEADERS | {LENGTH_HEADER: str(length)}
        assert_refused(http.post(V2, content=BODY, headers=headers), 400)

    @pytest.mark.parametrize("size", [0, 1, len(BODY), -1, 10**30, "5", True, 1.5, [1]])
    def test_wrong_binary_data_size(self, http: httpx.Client, size: Any) -> None:
        header = with_input(data=None, parameters={"binary_data_size": size})
        headers = HEADERS | {LENGTH_HEADER: str(len(header))}
        answer = http.post(V2, content=header + pack([GOOD]), headers=headers)
        assert_refused(answer, 400, "binary_data_size")

    def test_data_in_both_places(self, http: httpx.Client) -> None:
        data = pack([GOOD])
        header = with_input(parameters={"binary_data_size": len(data)})
        headers = HEADERS | {LENGTH_HEADER: str(len(header))}
        assert_refused(http.post(V2, content=header + data, headers=headers), 400, "beside")

    def test_bytes_that_belong_to_no_input(self, http: httpx.Client) -> None:
        header = with_input()
        headers = HEADERS | {LENGTH_HEADER: str(len(header))}
        assert_refused(http.post(V2, content=header + b"more", headers=headers), 400, "behind")

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"\x00", "cut off"),
            (struct.pack("<I", 100) + b"short", "cut off"),
            (struct.pack("<I", 2**32 - 1), "cut off"),
            (pack([GOOD, GOOD]), "as many items"),
            (b"", "as many items"),
            (bytes(MAX_REQUEST_BYTES // 2), "as many items"),
        ],
        ids=["no length", "short item", "huge length", "two items", "none", "empty items"],
    )
    def test_data(self, http: httpx.Client, stub: Any, data: bytes, words: str) -> None:
        header = with_input(data=None, parameters={"binary_data_size": len(data)})
        headers = HEADERS | {LENGTH_HEADER: str(len(header))}
        assert_refused(http.post(V2, content=header + data, headers=headers), 400, words)
        request = grpc_request([GOOD], raw=True)
        request.raw_input_contents[0] = data
        assert_grpc_refused(lambda: stub.ModelInfer(request), Code.INVALID_ARGUMENT, words)


class TestHttp:
    @pytest.mark.parametrize(
        "content_type",
        ["text/plain", "multipart/form-data; boundary=x", "image/gif", "application/pdf", SECRET],
    )
    @pytest.mark.parametrize("path", [V1, V2])
    def test_content_type(self, http: httpx.Client, path: str, content_type: str) -> None:
        answer = http.post(path, content=GOOD, headers={"Content-Type": content_type})
        assert_refused(answer, 415, "content type")

    @pytest.mark.parametrize("content_type", ["image/png", BINARY])
    def test_v2_needs_the_length_of_its_json(self, http: httpx.Client, content_type: str) -> None:
        answer = http.post(V2, content=GOOD, headers={"Content-Type": content_type})
        assert_refused(answer, 415, LENGTH_HEADER)

    @pytest.mark.parametrize("path", [V1, V2])
    def test_compressed_body(self, http: httpx.Client, path: str) -> None:
        headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
        answer = http.post(path, content=zlib.compress(v1_body([GOOD])), headers=headers)
        assert_refused(answer, 415, "Content-Encoding")

    @pytest.mark.parametrize("path", [V1, V2])
    def test_no_body(self, http: httpx.Client, path: str) -> None:
        assert_refused(http.post(path), 400, "no body")

    @pytest.mark.parametrize("path", [V1, V2])
    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("factor", [1, 3, 20])
    def test_body_over_the_limit(
        self, http: httpx.Client, path: str, chunked: bool, factor: int
    ) -> None:
        size = factor * MAX_REQUEST_BYTES + 1
        step = 50_000
        parts = (bytes(min(step, size - start)) for start in range(0, size, step))
        answer = http.post(
            path, content=parts if chunked else bytes(size), headers={"Content-Type": JSON}
        )
        assert_refused(answer, 413, "larger than")

    def test_raw_image_over_its_limit(self, http: httpx.Client) -> None:
        body = bytes(MAX_IMAGE_BYTES + 1)
        answer = http.post(V1, content=body, headers={"Content-Type": "image/png"})
        assert_refused(answer, 413, "The image is larger")

    def test_largest_image_is_not_too_large(self, http: httpx.Client) -> None:
        image = GOOD + bytes(MAX_IMAGE_BYTES - len(GOOD))
        assert http.post(V1, content=v1_body([image])).status_code == 200
        width = MAX_IMAGE_PIXELS // 1000
        image = save(Image.new("L", (width, 1000)), "PNG")
        assert http.post(V1, content=v1_body([image])).status_code == 200

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", f"/v1/models/{SECRET}:predict"),
            ("GET", f"/v1/models/{SECRET}"),
            ("GET", f"/v2/models/{SECRET}"),
            ("GET", f"/v2/models/{SECRET}/ready"),
            ("POST", f"/v2/models/{SECRET}/infer"),
            ("GET", "/v2/models/cxr/versions/9"),
            ("GET", f"/v2/models/cxr/versions/{SECRET}/ready"),
            ("POST", "/v2/models/cxr/versions/9/infer"),
            ("POST", "/v2/models/%ff%00/infer"),
        ],
    )
    def test_unknown_model(self, http: httpx.Client, method: str, path: str) -> None:
        assert_refused(http.request(method, path, content=b"{}"), 404, "'cxr'")

    @pytest.mark.parametrize(
        "path",
        [
            f"/{SECRET}",
            "/v3",
            "/v1/models/cxr:generate",
            "/v2/models/cxr/generate",
            "/predictions/cxr",
            "/models",
            "/models/cxr",
            "/v2/repository/index",
            "/v2/repository/models/cxr/unload",
            "/..%2f..%2fmodels",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    def test_unknown_path(self, http: httpx.Client, path: str, method: str) -> None:
        answer = http.request(method, path)
        assert answer.status_code in (404, 405)
        assert_sentence(answer.json()["error"])

    @pytest.mark.parametrize(
        ("method", "path"),
        [("GET", V1), ("PUT", V1), ("DELETE", V1), ("GET", V2), ("POST", "/v2/health/ready")],
    )
    def test_wrong_method(self, http: httpx.Client, method: str, path: str) -> None:
        answer = http.request(method, path)
        assert_refused(answer, 405, "not allowed")
        assert answer.headers["allow"]

    @pytest.mark.parametrize(
        "request_bytes",
        [
            b"\x00\x01\x02\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            f"POST {V1} HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n".encode(),
            f"POST {V1} HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n".encode(),
            f"POST {V1} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
            b"GET /v1/models/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        ],
    )
    def test_malformed_http(self, server: Server, request_bytes: bytes) -> None:
        status, text = exchange(server, request_bytes)
        assert status == 400
        assert_sentence(text)

    def test_client_that_leaves(self, server: Server, http: httpx.Client) -> None:
        """In the middle of its request, or before the answer."""
        head = f"POST {V1} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        for declared in (len(GOOD) * 2, len(GOOD)):
            with connection(server) as raw:
                raw.sendall(f"{head}Content-Length: {declared}\r\n\r\n".encode() + GOOD)
        assert_good(http)
        server.wait_for(
            "no request in flight",
            lambda: "cxr_requests_in_flight 0.0" in httpx.get(server.metrics).text,
            10,
        )


def connection(server: Server) -> socket.socket:
    host, _, port = server.rest.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def exchange(server: Server, request: bytes) -> tuple[int, str]:
    """Status and body of the answer to a request that is sent as it is."""
    with connection(server) as raw:
        raw.sendall(request)
        raw.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


class TestGrpc:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"name": SECRET}, "named 'image'"),
            ({"name": ""}, "named 'image'"),
            ({"datatype": "FP32"}, "BYTES"),
            ({"datatype": ""}, "BYTES"),
            ({"shape": []}, "shape"),
            ({"shape": [0]}, "shape"),
            ({"shape": [-1]}, "shape"),
            ({"shape": [1, 1]}, "shape"),
            ({"shape": [2]}, "as many items"),
            ({"shape": [MAX_BATCH + 1]}, "at most"),
            ({"shape": [2**63 - 1]}, "at most"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("raw", [True, False], ids=["raw", "contents"])
    def test_input(self, stub: Any, changes: dict[str, Any], words: str, raw: bool) -> None:
        request = grpc_request([GOOD], raw=raw, **changes)
        assert_grpc_refused(lambda: stub.ModelInfer(request), Code.INVALID_ARGUMENT, words)

    def test_inputs(self, stub: Any) -> None:
        none = service_pb2.ModelInferRequest(model_name="cxr")
        assert_grpc_refused(lambda: stub.ModelInfer(none), Code.INVALID_ARGUMENT, "exactly one")
        two = grpc_request([GOOD])
        two.inputs.add().CopyFrom(two.inputs[0])
        assert_grpc_refused(lambda: stub.ModelInfer(two), Code.INVALID_ARGUMENT, "exactly one")

    def test_data(self, stub: Any) -> None:
        both = grpc_request([GOOD], raw=True)
        both.inputs[0].contents.bytes_contents.append(GOOD)
        assert_grpc_refused(lambda: stub.ModelInfer(both), Code.INVALID_ARGUMENT, "either")
        twice = grpc_request([GOOD], raw=True)
        twice.raw_input_contents.append(pack([GOOD]))
        assert_grpc_refused(lambda: stub.ModelInfer(twice), Code.INVALID_ARGUMENT, "either")
        numbers = grpc_request([])
        numbers.inputs[0].shape[:] = [3]
        numbers.inputs[0].contents.fp32_contents.extend([1, 2, float("nan")])
        assert_grpc_refused(lambda: stub.ModelInfer(numbers), Code.INVALID_ARGUMENT, "many items")

    def test_outputs(self, stub: Any) -> None:
        for names in ([SECRET], ["label", "label"], [""]):
            request = grpc_request([GOOD])
            for name in names:
                request.outputs.add(name=name)
            assert_grpc_refused(
                lambda r=request: stub.ModelInfer(r), Code.INVALID_ARGUMENT, "outputs"
            )

    def test_unknown_model_and_version(self, stub: Any) -> None:
        for name, version in ((SECRET, ""), ("", ""), ("cxr", SECRET), ("cxr", "9")):
            infer = grpc_request([GOOD])
            infer.model_name, infer.model_version = name, version
            for call, request in (
                (stub.ModelInfer, infer),
                (stub.ModelReady, service_pb2.ModelReadyRequest(name=name, version=version)),
                (stub.ModelMetadata, service_pb2.ModelMetadataRequest(name=name, version=version)),
            ):
                assert_grpc_refused(lambda c=call, r=request: c(r), Code.NOT_FOUND, "'cxr'")

    def test_message_over_the_limit(self, stub: Any) -> None:
        """gRPC itself answers this one, in words of its own."""
        with pytest.raises(grpc.RpcError) as failure:
            stub.ModelInfer(grpc_request([bytes(MAX_REQUEST_BYTES + 1)]))
        assert failure.value.code() is Code.RESOURCE_EXHAUSTED

    @pytest.mark.parametrize("method", ["ModelInfer", "ModelReady", "ModelMetadata"])
    def test_malformed_message(self, server: Server, method: str) -> None:
        with grpc.insecure_channel(server.grpc) as channel:
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            assert_grpc_refused(lambda: call(b"\xff\xff" + GOOD), Code.INVALID_ARGUMENT, "valid")

    def test_unknown_method(self, server: Server) -> None:
        with grpc.insecure_channel(server.grpc) as channel:
            for path in ("/inference.GRPCInferenceService/Nothing", "/x.Y/Z"):
                with pytest.raises(grpc.RpcError) as failure:
                    channel.unary_unary(path)(b"")
                assert failure.value.code() is Code.UNIMPLEMENTED

    def test_client_that_leaves(self, stub: Any, http: httpx.Client) -> None:
        calls = [stub.ModelInfer.future(grpc_request([GOOD] * MAX_BATCH)) for _ in range(5)]
        for call in calls:
            call.cancel()
        assert_good(http)


def test_200_malformed_requests(server: Server, http: httpx.Client, stub: Any) -> None:
    """However many, in whichever order: the service does not fail, and answers a good one."""
    rng = random.Random(20_240_229)  # noqa: S311
    refuse = [image for image, _, _ in BAD_IMAGES.values()]
    before = server.worker_pids()
    seen: dict[str, int] = {}

    def damaged(data: bytes) -> bytes:
        """Cut off, with some bytes changed."""
        changed = bytearray(data[: rng.randrange(len(data))])
        for _ in range(rng.randrange(1, 20)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)

    def raw_image() -> str:
        return post(V1, damaged(rng.choice(refuse)), {"Content-Type": "image/jpeg"})

    def v1_image() -> str:
        return post(V1, v1_body([rng.choice(refuse)]), {"Content-Type": JSON})

    def v1_structure() -> str:
        return post(V1, damaged(v1_body([GOOD])), {"Content-Type": JSON})

    def v2_image() -> str:
        return post(V2, *v2_binary([rng.choice(refuse)]))

    def v2_structure() -> str:
        return post(V2, damaged(rng.choice(list(V2_BODIES.values()))[0]), {"Content-Type": JSON})

    def v2_damaged_binary() -> str:
        return post(V2, damaged(BODY), HEADERS)

    def grpc_image() -> str:
        return call(grpc_request([rng.choice(refuse)], raw=rng.random() < 0.5))

    def grpc_structure() -> str:
        shape = [rng.randrange(-3, 1000) for _ in range(rng.randrange(4))]
        request = grpc_request([GOOD], raw=True, shape=shape)
        request.raw_input_contents[0] = damaged(pack([GOOD]))
        return call(request)

    def post(path: str, body: bytes, headers: dict[str, str]) -> str:
        return str(http.post(path, content=body, headers=headers).status_code)

    def call(request: Any) -> str:
        try:
            stub.ModelInfer(request)
        except grpc.RpcError as error:
            return error.code().name
        return "OK"

    kinds = [raw_image, v1_image, v1_structure, v2_image]
    kinds += [v2_structure, v2_damaged_binary, grpc_image, grpc_structure]
    for _ in range(200):
        answer = rng.choice(kinds)()
        seen[answer] = seen.get(answer, 0) + 1

    refused = {"400", "413", "415", "422", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
    assert set(seen) <= refused, seen
    assert_good(http)
    assert server.worker_pids() == before
