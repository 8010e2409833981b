"""What only the runtime without TorchServe does: batches, and an end of what takes too long."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_archive import packager
from support.archives import Files, before_each_batch, edited_archive
from support.bundles import encoded_image
from support.protocols import V1, v1_body
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


def test_the_largest_batch_has_been_tried_before_the_service_is_ready(batching: Server) -> None:
    """On a GPU, all have this size, and the first one takes half a second."""
    assert batches(batching)[0] == BATCH


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
