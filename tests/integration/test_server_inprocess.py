"""What only the runtime without TorchServe does: batches, and an end of what takes too long."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
import yaml
from tritonclient.grpc import service_pb2_grpc

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_archive import packager
from support.archives import Files, before_each_batch, edited_archive
from support.bundles import encoded_image
from support.protocols import V1, grpc_request, v1_body
from support.servers import Server, serving

BATCH = 4
IMAGES = [encoded_image(brightness) for brightness in range(20, 240, 20)]
PNG = {"Content-Type": "image/png"}


def with_batches(files: Files) -> None:
    """An archive that asks for batches, writes down how large they are, and has traps."""
    settings = yaml.safe_load(files[packager.MODEL_CONFIG])
    settings |= {"batchSize": BATCH, "maxBatchDelay": 500}
    files[packager.MODEL_CONFIG] = yaml.safe_dump(settings).encode()
    before_each_batch(
        files,
        """import os, pathlib, time
with pathlib.Path("batches").open("a") as file:
    print(len(bodies), file=file)
if b"die" in bodies:
    os._exit(1)
if b"hang" in bodies:
    time.sleep(1000)""",
    )


@pytest.fixture(scope="module")
def batching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    archive = edited_archive(tmp_path_factory.mktemp("batches"), with_batches)
    options = ("--runtime=inprocess", "--workers=1", "--request-timeout=8")
    with serving(archive, *options) as running:
        yield running


def ask(server: Server, body: bytes) -> int:
    return httpx.post(server.rest + V1, content=body, headers=PNG, timeout=60).status_code


def batches(server: Server) -> list[int]:
    """Sizes of the batches so far."""
    (file,) = server.folder.glob("cxr-*/batches")
    return [int(line) for line in file.read_text().splitlines()]


def test_each_size_of_batch_has_been_tried_before_the_service_is_ready(batching: Server) -> None:
    """On a GPU, the first batch of each size takes half a second."""
    assert batches(batching)[: BATCH - 1] == list(range(2, BATCH + 1))


def test_images_come_in_batches_and_answers_in_order(batching: Server, bundle: Path) -> None:
    before = len(batches(batching))
    answer = httpx.post(batching.rest + V1, content=v1_body([*IMAGES, b"no image"]), timeout=60)
    *good, bad = answer.json()["predictions"]
    expected = Engine(bundle).predict(IMAGES)
    for got, prediction in zip(good, expected, strict=True):
        assert isinstance(prediction, Prediction)
        assert got["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-6)
    assert bad["reason"] == "not_an_image"
    sizes = batches(batching)[before:]
    assert sum(sizes) == len(IMAGES) + 1
    assert max(sizes) == BATCH


@pytest.mark.parametrize(("bad", "status"), [(b"die", 500), (b"hang", 504)])
def test_an_image_that_fails_a_batch_fails_alone(batching: Server, bad: bytes, status: int) -> None:
    """Its neighbours get another try without it."""
    (pid,) = batching.worker_pids()
    bodies = [IMAGES[0], bad, IMAGES[1], IMAGES[2]]
    with ThreadPoolExecutor(BATCH) as pool:
        statuses = list(pool.map(ask, [batching] * len(bodies), bodies))
    # What shares a batch with one that hangs may find its time used up, too.
    neighbours = {200} if status == 500 else {200, 504}
    assert statuses.pop(1) == status
    assert set(statuses) <= neighbours
    batching.wait_for("recovery", lambda: ask(batching, IMAGES[0]) == 200, 30)
    (after,) = batching.worker_pids()
    assert after != pid
    assert not Path(f"/proc/{pid}").exists()


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


@pytest.fixture
def trapped(tmp_path: Path) -> Iterator[Server]:
    archive = edited_archive(tmp_path, with_traps)
    options = ("--runtime=inprocess", "--workers=2", "--request-timeout=8")
    with serving(archive, *options) as running:
        yield running


def computed(server: Server) -> list[str]:
    """What was computed since the service is ready."""
    (file,) = server.folder.glob("cxr-*/computed")
    return file.read_text().split()


def occupy(server: Server, pool: ThreadPoolExecutor, *seconds: float) -> list[Future[int]]:
    """Have both workers wait, so that what comes then is given to them several at a time."""
    busy = [pool.submit(ask, server, f"sleep {length}".encode()) for length in seconds]
    server.wait_for("busy workers", lambda: computed(server).count("sleep") == len(busy), 10)
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


def with_worker_that_ends(files: Files) -> None:
    """A handler whose process ends while it loads, and says nothing."""
    files[packager.HANDLER] = b"import os\nos._exit(3)\n"


def test_worker_that_ends_while_loading(tmp_path: Path) -> None:
    path = edited_archive(tmp_path, with_worker_that_ends)
    with serving(path, "--runtime=inprocess", "--workers=1", wait=False) as server:
        assert server.wait_exit(30) == 1
        assert server.log.splitlines()[-1].endswith(
            "A worker could not load the model: its process ended while loading, 2 times in a row."
        )
