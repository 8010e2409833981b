"""Several images in one message to a worker, as where many wait: each is answered by itself."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2_grpc

from support.archives import Files, before_each_batch, edited_archive
from support.bundles import encoded_image
from support.protocols import V1, grpc_request
from support.servers import Server, serving

IMAGES = [encoded_image(brightness) for brightness in range(20, 240, 20)]
PNG = {"Content-Type": "image/png"}


def ask(server: Server, body: bytes) -> int:
    return httpx.post(server.rest + V1, content=body, headers=PNG, timeout=60).status_code


def with_traps(files: Files) -> None:
    """An archive that writes down what it computes, one image at a time."""
    before_each_batch(
        files,
        """import os, pathlib, time
(body,) = bodies
with pathlib.Path("computed").open("a") as file:
    print("image" if len(body) > 20 else body.decode().partition(" ")[0], file=file)
if body.startswith(b"sleep"):
    time.sleep(float(body.split()[1]))
if body == b"die":
    os._exit(1)
if body == b"raise":
    raise ValueError""",
    )


@pytest.fixture(params=["inprocess", "torchserve"])
def trapped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    archive = edited_archive(tmp_path, with_traps)
    options = (f"--runtime={request.param}", "--workers=2", "--request-timeout=8")
    with serving(archive, *options) as running:
        yield running


def computed(server: Server) -> list[str]:
    """What was computed since the service is ready."""
    files = server.folder.glob("cxr-*/**/computed")
    return [word for file in files for word in file.read_text().split()]


def occupy(server: Server, pool: ThreadPoolExecutor, *seconds: float) -> list[Future[int]]:
    """Have both workers wait, so that what comes then is given to them several at a time."""
    busy = [pool.submit(ask, server, f"sleep {length}".encode()) for length in seconds]
    server.wait_for("busy workers", lambda: computed(server).count("sleep") == len(busy), 10)
    if server.runtime == "torchserve":
        # It is given one more for each worker.
        for _ in seconds:
            pool.submit(ask, server, b"filler")
        time.sleep(0.1)
    return busy


@pytest.mark.parametrize(("bad", "status"), [(b"die", 500), (b"raise", 500), (b"sleep 99", 504)])
def test_neighbours_in_the_same_message_are_answered(
    trapped: Server, bad: bytes, status: int
) -> None:
    """It is known which one failed, or takes long; the others are answered all the same."""
    bodies = [IMAGES[0], bad, *IMAGES[1:]]
    with ThreadPoolExecutor(16) as pool:
        busy = occupy(trapped, pool, 1, 1)
        waiting = []
        for body in bodies:
            waiting.append(pool.submit(ask, trapped, body))
            time.sleep(0.02)  # in this order
        assert not any(one.done() for one in busy)
        found = [one.result() for one in waiting]
    assert found.pop(1) == status
    assert set(found) == {200}


def test_what_waits_behind_a_slow_image_goes_to_another_worker(trapped: Server) -> None:
    ended = {}

    def note(body: bytes) -> None:
        ask(trapped, body)
        ended[body] = time.monotonic()

    with ThreadPoolExecutor(16) as pool:
        occupy(trapped, pool, 1, 1)
        pool.submit(note, b"sleep 6")
        time.sleep(0.05)
        for image in IMAGES:
            pool.submit(note, image)
    slow = ended.pop(b"sleep 6")
    assert all(slow - moment > 2 for moment in ended.values())


def test_what_expires_behind_another_image_is_not_computed(trapped: Server) -> None:
    with ThreadPoolExecutor(16) as pool, grpc.insecure_channel(trapped.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        busy = occupy(trapped, pool, 1, 4)
        slow = pool.submit(ask, trapped, b"sleep 0.9")
        time.sleep(0.05)
        expires = stub.ModelInfer.future(grpc_request([b"expires"]), timeout=1.3)
        time.sleep(0.05)
        last = [pool.submit(ask, trapped, image) for image in IMAGES[:6]]
        assert not busy[0].done()
        assert expires.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # It was in the worker by then.
        assert computed(trapped).count("sleep") == 3
        assert not slow.done()
        assert [one.result() for one in last] == [200] * 6
    assert "expires" not in computed(trapped)
