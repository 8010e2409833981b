"""The end of a gateway: not ready first, then streams, then requests in flight, then exit 0."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from integration.portal.test_portal_api import GOOD, assert_problem
from support.portals import Portal, files, portal
from support.servers import STOP_TIMEOUT, Server

PATIENCE = 60.0


@pytest.fixture
def stuck(model: Server) -> Iterator[threading.Event]:
    """A model that answers nothing until the event is set."""
    go = threading.Event()

    def wait() -> None:
        go.wait(2 * PATIENCE)
        for worker in model.workers():
            worker.resume()

    for worker in model.workers():
        worker.suspend()
    waiting = threading.Thread(target=wait)
    waiting.start()
    yield go
    go.set()
    waiting.join()


def asking(running: Portal, together: ThreadPoolExecutor) -> Future[httpx.Response]:
    """A request that waits for the model."""

    def ask() -> httpx.Response:
        with running.http() as http:
            return http.post("/v1/predictions", files=files(GOOD))

    future = together.submit(ask)
    deadline = time.monotonic() + PATIENCE
    while "cxr_portal_images_in_flight 1.0" not in running.metrics:
        assert time.monotonic() < deadline, "the request has not come to the model"
        time.sleep(0.05)
    return future


def test_a_request_in_flight_is_answered_and_a_stream_ends(
    model: Server, stuck: threading.Event
) -> None:
    options = (f"--server={model.grpc}", "--drain-delay=5", "--timeout=120")
    with (
        portal(*options) as running,
        running.http() as http,
        ThreadPoolExecutor() as together,
    ):
        answer = asking(running, together)
        job = http.post("/v1/jobs", files=files(GOOD)).json()["id"]
        with http.stream("GET", f"/v1/jobs/{job}/events", timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: progress"
            assert running.process is not None
            running.process.terminate()
            with running.http() as other:
                while (ready := other.get("/health/ready")).status_code == 200:
                    time.sleep(0.05)
                assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
                # Whoever has not noticed yet is still let in.
                assert other.get("/health/live").status_code == 200
            rest = list(lines)
        assert "event: end" not in rest, "the job has not finished, only the stream"
        assert not answer.done()
        stuck.set()
        assert answer.result(PATIENCE).status_code == 200
        assert running.process.wait(STOP_TIMEOUT) == 0


@pytest.mark.usefixtures("stuck")
def test_a_request_in_flight_has_its_whole_time(model: Server) -> None:
    options = (f"--server={model.grpc}", "--timeout=12")
    with portal(*options) as running, ThreadPoolExecutor() as together:
        answer = asking(running, together)
        assert running.stop() == 0
        assert_problem(answer.result(PATIENCE), 504, "model-timeout", "in time")
