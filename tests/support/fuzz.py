"""Many requests at once, some of them hostile, and what became of them."""

import json
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPResponse, RemoteDisconnected
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pydicom
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2_grpc

from cxr.answer import Prediction
from cxr.engine import Engine
from support.bundles import encoded_image
from support.dicoms import dicom_bytes
from support.protocols import V1, V2, grpc_request, v1_body, v2_binary
from support.servers import Server

CONCURRENCY = 16
BAD_SHARE = 0.2
REFUSALS = {"400", "413", "415", "422", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
TRY_AGAIN = {"503", "UNAVAILABLE"}
# Of the good requests. A server takes far more images at a time than there are clients here, and so
# has no reason to turn one away; whoever stands in for it must answer nearly all.
LEAST_ANSWERED = 0.95
# Of a probability; another number of threads adds up in another order.
TOLERANCE = 1e-6
# Some of the damaged files can still be read.
ALLOWED = {"200", "OK", "left"} | REFUSALS | TRY_AGAIN
PNG = {"Content-Type": "image/png"}
# Share of the requests after which the memory is taken as what it is from then on.
_SETTLED = 0.3


def good_images() -> list[bytes]:
    images = [
        encoded_image(brightness, size=size, kind=kind, seed=brightness)
        for brightness, size, kind in (
            (30, (96, 80), "PNG"),
            (90, (400, 300), "JPEG"),
            (140, (640, 512), "JPEG"),
            (220, (200, 240), "PNG"),
        )
    ]
    return [*images, dicom_bytes(np.arange(96 * 80, dtype=np.uint16).reshape(96, 80))]


def hostile_images(rng: random.Random) -> Iterator[bytes]:
    """Endlessly: damaged files, bombs, huge sizes in few bytes, and no images at all."""
    whole = good_images()
    while True:
        yield from (
            damaged(rng, rng.choice(whole)),
            cut(rng, rng.choice(whole)),
            png_that_declares(rng.choice((20_000, 60_000, 2**31 - 1)), 60_000),
            bomb(),
            whole[1][:4] + rng.randbytes(2000),
            whole[-1][:140] + rng.randbytes(2000),
            dicom_bytes(np.zeros((64, 64), np.uint8), Rows=60_000, Columns=60_000),
            rng.randbytes(rng.randrange(1, 3000)),
        )


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 30)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))]


@cache
def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in 0.05 MB."""
    buffer = BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


def png_that_declares(width: int, height: int) -> bytes:
    """A few bytes that promise as many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def pydicom_samples() -> list[Path]:
    """The sample files that pydicom comes with."""
    assert pydicom.__file__
    return sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))


# Label and probabilities, in order of the labels; None where the image was refused.
_Answer = tuple[str, Sequence[float]] | None


def _same(answer: _Answer, prediction: Prediction) -> bool:
    if answer is None:
        return False
    label, found = answer
    expected = list(prediction.probabilities.values())
    return (
        label == prediction.label
        and len(found) == len(expected)
        and np.allclose(found, expected, rtol=0, atol=TOLERANCE)
    )


def _listed(counts: "Counter[str]") -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


@dataclass
class Fuzz:
    """One run.

    Attributes:
        outcomes: what came back, by status.
        good: what came back for good images, by status.
        wrong: good images that were answered with another label, or other probabilities, than by
            the engine.
        without_retry_after: answers of 503 that do not say when to try again.
        images: what the server says became of them: answered, or the reason of the rejection.
        memory: bytes of all the server's processes together, first when settled and at the end.
        seconds: how long it took.
    """

    server: Server
    bundle: Path
    requests: int
    seed: int = 0
    outcomes: "Counter[str]" = field(default_factory=Counter)
    good: "Counter[str]" = field(default_factory=Counter)
    wrong: int = 0
    without_retry_after: int = 0
    images: "Counter[str]" = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def run(self) -> "Fuzz":
        """Send all requests."""
        images = good_images()
        predictions = Engine(self.bundle).predict(images)
        self._good = [
            (image, prediction)
            for image, prediction in zip(images, predictions, strict=True)
            if isinstance(prediction, Prediction)
        ]
        assert len(self._good) == len(images)
        self._labels = list(self._good[0][1].probabilities)
        self._lock = threading.Lock()
        bomb()
        before = images_of(self.server)
        start = time.monotonic()
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            for share in (_SETTLED, 1 - _SETTLED):
                each = round(self.requests * share / CONCURRENCY)
                seeds = [self.seed + int(1000 * share) + client for client in range(CONCURRENCY)]
                list(pool.map(self._client, seeds, [each] * CONCURRENCY))
                self.memory.append(memory_of(self.server))
        self.seconds = time.monotonic() - start
        self.images = images_of(self.server) - before
        return self

    @property
    def growth(self) -> float:
        """Of the memory, as a fraction of what it was when settled."""
        return self.memory[1] / self.memory[0] - 1

    @property
    def answered(self) -> float:
        """Of the good requests, as a fraction."""
        return (self.good["200"] + self.good["OK"]) / self.good.total()

    def __str__(self) -> str:
        first, last = (size / 2**20 for size in self.memory)
        return (
            f"{self.outcomes.total()} requests in {self.seconds:.0f} s, {_listed(self.outcomes)}; "
            f"{self.good.total()} good ones, {self.answered:.1%} answered ({_listed(self.good)}), "
            f"{self.wrong} wrong; images {_listed(self.images)}; "
            f"memory {first:.0f} MiB, {last:.0f} MiB ({self.growth:+.1%}) at the end"
        )

    def check(self) -> None:
        """Assert what is promised, but for the memory."""
        assert set(self.outcomes) <= ALLOWED, self
        assert set(self.good) <= {"200", "OK"} | TRY_AGAIN | {"RESOURCE_EXHAUSTED"}, self
        assert self.answered >= LEAST_ANSWERED, self
        assert self.wrong == 0, self
        assert self.without_retry_after == 0, self

    def _client(self, seed: int, requests: int) -> None:
        rng = random.Random(seed)  # noqa: S311
        hostile = hostile_images(rng)
        options = [("grpc.use_local_subchannel_pool", 1)]
        with (
            httpx.Client(base_url=self.server.rest, timeout=120) as http,
            grpc.insecure_channel(self.server.grpc, options) as channel,
        ):
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            asks: Sequence[Callable[[bytes], tuple[str, Any]]] = (
                lambda image: self._post(http, V1, image, PNG),
                lambda image: self._post(http, V1, v1_body([image]), {}),
                lambda image: self._post(http, V2, *v2_binary([image])),
                lambda image: self._call(stub, image),
            )
            for _ in range(requests):
                if rng.random() >= BAD_SHARE:
                    image, prediction = rng.choice(self._good)
                    outcome, answer = rng.choice(asks)(image)
                    with self._lock:
                        self.good[outcome] += 1
                        self.wrong += outcome in ("200", "OK") and not _same(answer, prediction)
                elif rng.random() < 0.1:
                    outcome = rng.choice((self._slow, self._half_closed))(rng.choice(self._good)[0])
                else:
                    outcome, _ = rng.choice(asks)(next(hostile))
                with self._lock:
                    self.outcomes[outcome] += 1

    def _post(
        self, http: httpx.Client, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[str, _Answer]:
        answer = http.post(path, content=body, headers=headers)
        self._note(answer.status_code, "retry-after" in answer.headers)
        if answer.status_code != 200:
            return str(answer.status_code), None
        document = answer.json()
        if "predictions" in document:
            (prediction,) = document["predictions"]
            if "label" not in prediction:
                return "200", None
            probabilities = [prediction["probabilities"][label] for label in self._labels]
            return "200", (prediction["label"], probabilities)
        outputs = {output["name"]: output for output in document["outputs"]}
        assert json.loads(outputs["probabilities"]["parameters"]["labels"]) == self._labels
        return "200", (outputs["label"]["data"][0], outputs["probabilities"]["data"])

    def _call(self, stub: Any, image: bytes) -> tuple[str, _Answer]:
        try:
            answer = stub.ModelInfer(grpc_request([image]), timeout=120)
        except grpc.RpcError as error:
            return error.code().name, None
        outputs = {output.name: output.contents for output in answer.outputs}
        label = outputs["label"].bytes_contents[0].decode()
        return "OK", (label, list(outputs["probabilities"].fp32_contents))

    def _note(self, status: int, retry_after: bool) -> None:
        if status == 503 and not retry_after:
            with self._lock:
                self.without_retry_after += 1

    def _slow(self, image: bytes) -> str:
        """A client that takes its time, and leaves in the middle of its request."""
        with self._started(image) as raw:
            for start in range(0, len(image) // 2, max(1, len(image) // 8)):
                raw.sendall(image[start : start + len(image) // 8])
                time.sleep(0.02)
        return "left"

    def _half_closed(self, image: bytes) -> str:
        """A client that closes its side once it has sent its request."""
        with self._started(image) as raw:
            raw.sendall(image)
            raw.shutdown(socket.SHUT_WR)
            with HTTPResponse(raw, method="POST") as answer:
                try:
                    answer.begin()
                except RemoteDisconnected:  # the server may take it as one that has left
                    return "left"
                answer.read()
        self._note(answer.status, answer.getheader("Retry-After") is not None)
        return str(answer.status)

    def _started(self, image: bytes) -> socket.socket:
        host, _, port = self.server.rest.removeprefix("http://").rpartition(":")
        raw = socket.create_connection((host, int(port)), timeout=60)
        head = f"POST {V1} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        raw.sendall(f"{head}Content-Length: {len(image)}\r\n\r\n".encode())
        return raw


def memory_of(server: Server) -> int:
    """Resident bytes of the server's processes together."""
    processes = [psutil.Process(server.pid), *server.tree()]
    return sum(process.memory_info().rss for process in processes)


def images_of(server: Server) -> "Counter[str]":
    """What the server says that became of images: answered, or the reason of the rejection."""
    families = text_string_to_metric_families(httpx.get(server.metrics).text)
    (images,) = (family for family in families if family.name == "cxr_images")
    return Counter(
        {
            sample.labels["outcome"]: int(sample.value)
            for sample in images.samples
            if sample.name == "cxr_images_total"
        }
    )
