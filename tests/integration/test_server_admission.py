"""What is not computed: more than may wait, and what nobody waits for any more."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2_grpc

from cxr_server.settings import RuntimeName
from support.archives import Files, before_each_batch, edited_archive
from support.bundles import encoded_image
from support.protocols import V1, grpc_request, v1_body
from support.servers import Server, serving

MAX_QUEUE = 8
# As many as TorchServe is given at once for one worker.
OCCUPYING = 4
SECONDS_EACH = 0.5
REQUEST_TIMEOUT = 4
IMAGE = encoded_image(70)
PNG = {"Content-Type": "image/png"}


@dataclass(frozen=True)
class Watched:
    """A server with one worker, which writes down what it is given."""

    server: Server
    seen: Path

    @property
    def computed(self) -> list[str]:
        return self.seen.read_text().split() if self.seen.exists() else []

    def post(self, *images: bytes) -> httpx.Response:
        return httpx.post(self.server.rest + V1, content=v1_body(images), timeout=60)

    def occupy(self, pool: ThreadPoolExecutor, images: int = OCCUPYING) -> "Future[httpx.Response]":
        """Keep the worker busy with so many images of `SECONDS_EACH`."""
        before = self.computed.count("slow")
        occupied = pool.submit(self.post, *[b"slow"] * images)
        self.server.wait_for("work", lambda: self.computed.count("slow") > before, 20)
        return occupied


@pytest.fixture(scope="module", params=RuntimeName)
def watched(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    seen = folder / "seen"

    def with_a_list(files: Files) -> None:
        before_each_batch(
            files,
            f"""import time
with open({str(seen)!r}, "a") as file:
    for body in bodies:
        print(body.decode() if len(body) < 20 else "image", file=file)
if b"slow" in bodies:
    time.sleep({SECONDS_EACH})""",
        )

    archive = edited_archive(folder, with_a_list)
    options = (
        f"--runtime={request.param}",
        "--workers=1",
        "--max-batch=8",
        f"--max-queue={MAX_QUEUE}",
        f"--request-timeout={REQUEST_TIMEOUT}",
    )
    with serving(archive, *options) as server:
        yield Watched(server, seen)


def test_more_than_may_wait_is_turned_away_at_once(watched: Watched) -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        grpc.insecure_channel(watched.server.grpc) as channel,
    ):
        occupied = watched.occupy(pool)
        start = time.monotonic()
        answer = watched.post(*[IMAGE] * (MAX_QUEUE - OCCUPYING + 1))
        with pytest.raises(grpc.RpcError) as failure:
            images = [IMAGE] * (MAX_QUEUE - OCCUPYING + 1)
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(grpc_request(images))
        assert time.monotonic() - start < SECONDS_EACH * OCCUPYING
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json() == {"error": "The service is busy; try again later."}
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # There is room for a single one, which waits its turn.
        assert watched.post(IMAGE).status_code == 200
        # The fillers are no images.
        assert occupied.result().status_code == 400
    assert watched.post(*[IMAGE] * MAX_QUEUE).status_code == 200


def test_what_nobody_waits_for_is_not_computed(watched: Watched) -> None:
    """A gRPC deadline that has passed, and clients that have left."""
    host, _, port = watched.server.rest.removeprefix("http://").rpartition(":")
    with (
        ThreadPoolExecutor(1) as pool,
        grpc.insecure_channel(watched.server.grpc) as channel,
    ):
        # TorchServe is given the next one whenever it has answered one.
        occupied = watched.occupy(pool, OCCUPYING + 2)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as failure:
            stub.ModelInfer(grpc_request([b"expired"]), timeout=0.2)
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        cancelled = stub.ModelInfer.future(grpc_request([b"cancelled"]))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(watched.server.rest + V1, content=b"left", headers=PNG, timeout=0.2)
        cancelled.cancel()
        with socket.create_connection((host, int(port))) as raw:
            head = f"POST {V1} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            raw.sendall(f"{head}Content-Length: 4\r\n\r\ngone".encode())
            time.sleep(0.2)
        assert not occupied.done()
        assert watched.post(b"last").status_code == 400
    computed = watched.computed
    assert computed[-1] == "last"
    assert not {"expired", "cancelled", "left", "gone"} & set(computed)
    metrics = httpx.get(watched.server.metrics).text
    assert "cxr_requests_in_flight 0.0" in metrics
    assert "cxr_images_queued 0.0" in metrics


def test_a_request_that_does_not_arrive(watched: Watched) -> None:
    host, _, port = watched.server.rest.removeprefix("http://").rpartition(":")
    start = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        head = f"POST {V1} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        raw.sendall(f"{head}Content-Length: 1000\r\n\r\nslowly".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
    assert REQUEST_TIMEOUT <= time.monotonic() - start < 2 * REQUEST_TIMEOUT
    assert answer.startswith("HTTP/1.1 408 ")
    assert f"The request did not arrive within {REQUEST_TIMEOUT} s." in answer


def test_a_call_that_does_not_arrive(archive: Path) -> None:
    """Of one that has stalled gRPC itself would hold what has come, for ever."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        head = len(payload).to_bytes(3, "big") + bytes([kind, flags])
        return head + stream.to_bytes(4, "big") + payload

    def literal(name: str, value: str) -> bytes:
        return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))

    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/inference.GRPCInferenceService/ModelInfer",
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    head = b"".join(literal(*pair) for pair in headers.items())
    message = bytes(1) + (5000).to_bytes(4, "big") + bytes(1000)
    options = ("--runtime=inprocess", "--workers=1", "--connection-age=1", "--request-timeout=1")
    with serving(archive, *options) as server:
        host, _, port = server.grpc.rpartition(":")
        start = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
            raw.sendall(frame(1, 4, 1, head) + frame(0, 0, 1, message))
            received = b"".join(iter(lambda: raw.recv(65536), b""))
        # It has said that it takes no more calls on this connection (GOAWAY) before.
        assert frame(7, 0, 0, b"")[3:9] in received
        assert 2 < time.monotonic() - start < 15
