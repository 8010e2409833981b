"""Jobs: images that are answered in the background, whatever happens to the gateway."""

import asyncio
import contextlib
import csv
import io
import json
import resource
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from cxr_client.schemas import RefusedImage
from cxr_portal import jobs
from cxr_portal.jobs import JobRunner
from cxr_portal.settings import Settings
from cxr_portal.store import Claim, Store, TooManyJobsError
from integration.portal.test_portal_api import BRIGHT, GOOD, answered_by, assert_problem
from support.archives import Files, before_each_batch, edited_archive
from support.bundles import LABELS, encoded_image
from support.figures import figures
from support.portals import Portal, files, portal
from support.servers import Server, free_port, serving

JOBS = "/v1/jobs"
MANY = 500


def submit(http: httpx.Client, *images: bytes, **options: Any) -> dict[str, Any]:
    answer = http.post(JOBS, files=files(*images), **options)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"{JOBS}/{job['id']}"
    return job


def wait(http: httpx.Client, job_id: str, timeout: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while True:
        job: dict[str, Any] = http.get(f"{JOBS}/{job_id}").json()
        if job["state"] in {"done", "cancelled"}:
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.05)


def result(http: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    answer = http.get(f"{JOBS}/{job_id}/result").json()
    images: list[dict[str, Any]] = answer["images"]
    return images


@pytest.fixture
def slow(model: Server) -> Iterator[None]:
    """A model server that answers nothing for now."""
    for worker in model.workers():
        worker.suspend()
    yield
    for worker in model.workers():
        worker.resume()


class TestJobs:
    def test_each_image_gets_its_answer(self, http: httpx.Client) -> None:
        job = submit(http, GOOD, b"not an image", b"", BRIGHT)
        assert job["total"] == 4
        done = wait(http, job["id"])
        counts = {key: done[key] for key in ("answered", "refused", "failed", "cancelled")}
        assert counts == {"answered": 2, "refused": 2, "failed": 0, "cancelled": 0}
        answers = result(http, job["id"])
        assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
        (good, bright) = http.post("/v1/predictions", files=files(GOOD, BRIGHT)).json()["images"]
        assert answers[0] == good
        assert answers[3] == bright | {"index": 3}
        assert [answer.get("reason") for answer in answers[1:3]] == ["not_an_image", "empty"]

    def test_csv(self, http: httpx.Client) -> None:
        job = submit(http, GOOD, b"not an image")
        wait(http, job["id"])
        answer = http.get(f"{JOBS}/{job['id']}/result", params={"format": "csv"})
        assert answer.headers["content-type"].startswith("text/csv")
        good, bad = csv.DictReader(io.StringIO(answer.text))
        (expected,) = http.post("/v1/predictions", files=files(GOOD)).json()["images"]
        assert good["label"] == expected["label"]
        for label in LABELS:
            assert float(good[f"p({label})"]) == expected["probabilities"][label]
            assert good[f"decision({label})"] == expected["decisions"][label]
        assert (bad["index"], bad["outcome"], bad["reason"]) == ("1", "refused", "not_an_image")

    def test_progress_is_told_as_it_happens(self, http: httpx.Client, model: Server) -> None:
        for worker in model.workers():
            worker.suspend()
        job = submit(http, *[GOOD] * 6)
        events = []
        try:
            with http.stream("GET", f"{JOBS}/{job['id']}/events") as stream:
                assert stream.headers["content-type"].startswith("text/event-stream")
                for line in stream.iter_lines():
                    kind, _, text = line.partition(": ")
                    if kind == "event":
                        events.append([text])
                    if kind == "data":
                        events[-1].append(json.loads(text))
                        for worker in model.workers():
                            worker.resume()
        finally:
            for worker in model.workers():
                worker.resume()
        assert [kind for kind, _ in events] == ["progress"] * (len(events) - 1) + ["end"]
        assert len(events) >= 2
        answered = [state["answered"] for _, state in events]
        assert answered[0] < 6
        assert answered == sorted(answered)
        assert answered[-1] == 6

    @pytest.mark.usefixtures("slow")
    def test_cancel(self, http: httpx.Client, gateway: Portal) -> None:
        job = submit(http, *[GOOD] * 20)
        cancelled = http.post(f"{JOBS}/{job['id']}/cancel").json()
        assert cancelled["state"] == "cancelled"
        assert cancelled["answered"] + cancelled["cancelled"] == 20
        assert cancelled["cancelled"] > 0
        assert result(http, job["id"]) == []
        assert http.get(f"{JOBS}/{job['id']}").json() == cancelled
        assert pending(gateway, job["id"]) == 0, "no image of it is kept"

    def test_delete(self, http: httpx.Client) -> None:
        job = submit(http, GOOD)
        wait(http, job["id"])
        assert http.delete(f"{JOBS}/{job['id']}").status_code == 204
        for answer in (
            http.get(f"{JOBS}/{job['id']}"),
            http.get(f"{JOBS}/{job['id']}/result"),
            http.get(f"{JOBS}/{job['id']}/events"),
            http.post(f"{JOBS}/{job['id']}/cancel"),
            http.delete(f"{JOBS}/{job['id']}"),
        ):
            assert_problem(answer, 404, "not-found", "no such job")

    def test_the_newest_is_listed_first(self, http: httpx.Client) -> None:
        first, second = submit(http, GOOD)["id"], submit(http, GOOD)["id"]
        listed = [job["id"] for job in http.get(JOBS).json()["jobs"]]
        assert listed.index(second) < listed.index(first)

    def test_idempotency(self, http: httpx.Client) -> None:
        headers = {"Idempotency-Key": "batch-1"}
        first = submit(http, GOOD, headers=headers)
        again = http.post(JOBS, files=files(GOOD), headers=headers)
        assert again.status_code == 202
        assert again.json()["id"] == first["id"]
        assert again.headers["idempotent-replayed"] == "true"
        answer = http.post(JOBS, files=files(BRIGHT), headers=headers)
        assert_problem(answer, 422, "idempotency-key-reused", "another request")

    def test_none_stands_still_while_others_come(self, tmp_path: Path) -> None:
        """Of three claims a round, a job has its share, however many new ones come."""
        store = Store(f"sqlite:///{tmp_path}/portal.db")
        about: dict[str, Any] = {"retention": timedelta(hours=1), "request_id": "", "trace": ""}
        old = store.submit("me", [GOOD] * 40, max_active=100, **about)
        for _ in range(20):
            (claim,) = store.claim("worker", 1)
            store.finish("worker", claim, RefusedImage(index=claim.index, reason="r", detail="d"))
        turns = []
        for _ in range(10):
            store.submit("others", [GOOD] * 4, max_active=100, **about)
            for claim in store.claim("worker", 3):
                turns.append(claim.job_id == old.id)
                store.finish(
                    "worker", claim, RefusedImage(index=claim.index, reason="r", detail="d")
                )
        assert len(turns) == 30
        assert sum(turns) >= 4
        # Of two jobs, each gets every second claim.
        alone = Store(f"sqlite:///{tmp_path}/alone.db")
        pair = [alone.submit("me", [GOOD] * 9, max_active=2, **about).id for _ in range(2)]
        claims = alone.claim("worker", 6)
        assert [claims.index(claim) for claim in claims if claim.job_id == pair[0]] == [0, 2, 4]
        assert [claim.index for claim in claims] == [0, 0, 1, 1, 2, 2]
        alone.close()
        store.close()

    def test_the_limit_of_jobs_holds_for_those_that_come_together(self, database: str) -> None:
        store = Store(database)
        about: dict[str, Any] = {"retention": timedelta(hours=1), "request_id": "", "trace": ""}

        def one(_: int) -> bool:
            try:
                store.submit("me", [GOOD] * 5, max_active=3, **about)
            except TooManyJobsError:
                return False
            return True

        with ThreadPoolExecutor(8) as together:
            assert sum(together.map(one, range(8))) == 3
        assert len(store.jobs("me")) == 3
        store.close()

    def test_small_jobs_do_not_wait_for_large_ones(self, http: httpx.Client, model: Server) -> None:
        for worker in model.workers():
            worker.suspend()
        large = submit(http, *[GOOD] * 150)
        small = submit(http, GOOD)
        for worker in model.workers():
            worker.resume()
        wait(http, small["id"])
        assert http.get(f"{JOBS}/{large['id']}").json()["state"] == "running"
        http.post(f"{JOBS}/{large['id']}/cancel")


def wait_for_both(database: str, job_id: str) -> None:
    """Wait until two gateways ask about a job's images."""
    query = "SELECT DISTINCT worker FROM job_images WHERE job_id = %s AND state = 'running'"
    deadline = time.monotonic() + 60
    with psycopg.connect(database, autocommit=True) as connection:
        while len(connection.execute(query, [job_id]).fetchall()) < 2:
            assert time.monotonic() < deadline, "only one of them works"
            time.sleep(0.05)


def pending(gateway: Portal, job_id: str) -> int:
    """Images of a job in the database."""
    path = gateway.database.removeprefix("sqlite:///")
    query = "SELECT count(*) FROM pending_images WHERE job_id = ?"
    return int(sqlite3.connect(path).execute(query, [job_id]).fetchone()[0])


def everything_in(folder: Path) -> bytes:
    """What can be read from the database's files."""
    return b"".join(path.read_bytes() for path in folder.glob("portal.db*"))


class TestPrivacy:
    def test_no_image_is_left_once_it_has_its_answer(self, model: Server) -> None:
        mark = b"an image that can be found again"
        image = GOOD + mark
        with portal(f"--server={model.grpc}") as running, running.http() as http:
            folder = running.folder
            job = submit(http, image, image)
            wait(http, job["id"])
            assert pending(running, job["id"]) == 0
            deadline = time.monotonic() + 30
            while mark in (kept := everything_in(folder)):
                assert time.monotonic() < deadline, "deleted images can be read from the disk"
                time.sleep(0.1)
            assert b"patient-0" not in kept, "file names are not kept at all"

    def test_a_log_that_cannot_be_emptied_is_tried_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class FullForAMoment:
            """A database with nothing to do."""

            scrubs = 0

            def claim(self, worker: str, limit: int) -> list[Claim]:  # noqa: ARG002
                return []

            def scrub(self) -> None:
                self.scrubs += 1
                if self.scrubs == 1:
                    raise OperationalError("PRAGMA", None, OSError())

        async def work(store: Any) -> None:
            runner = JobRunner(Settings(), store, cast("Any", None), cast("Any", None))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runner._work(), 0.5)

        monkeypatch.setattr(jobs, "_POLL", 0.01)
        store = FullForAMoment()
        asyncio.run(work(store))
        assert store.scrubs == 2

    def test_jobs_are_deleted_when_they_expire(self, model: Server) -> None:
        hour = 3 / 3600
        options = (f"--server={model.grpc}", f"--retention-hours={hour}")
        with portal(*options) as running:
            with running.http() as http:
                job = submit(http, GOOD)
                wait(http, job["id"])
                assert result(http, job["id"])
            running.stop()
            time.sleep(3)
            running.start()
            with running.http() as http:
                assert http.get(JOBS).json() == {"jobs": []}
            assert "deleted 1 jobs" in running.log


class TestSurvival:
    def test_five_hundred_images_and_a_kill(self, model: Server, database: str) -> None:
        images = [encoded_image(60 + number % 180, seed=number) for number in range(MANY)]
        workers = 4
        options = (f"--server={model.grpc}", f"--job-workers={workers}")
        with portal(*options, database=database) as running:
            before = answered_by(model)
            with running.http() as http:
                job = submit(http, *images)
                while http.get(f"{JOBS}/{job['id']}").json()["answered"] < MANY // 2:
                    time.sleep(0.02)
            running.kill()
            start = time.monotonic()
            running.start()
            with running.http() as http:
                done = wait(http, job["id"])
                seconds = time.monotonic() - start
                answers = result(http, job["id"])
            assert (done["answered"], done["refused"], done["failed"]) == (MANY, 0, 0)
            assert [answer["index"] for answer in answers] == list(range(MANY))
            asked = answered_by(model) - before
            # Those that were on their way when it was killed are asked about again.
            assert MANY <= asked <= MANY + workers
        figures.append(
            f"job of {MANY} images, gateway killed halfway ({database.partition(':')[0]}): "
            f"done {seconds:.1f} s after the new start, the model answered {asked:.0f}"
        )

    def test_gateways_may_start_together(self, postgresql: str) -> None:
        with ThreadPoolExecutor(8) as together:
            stores = list(together.map(lambda _: Store(postgresql), range(8)))
        for store in stores:
            store.close()

    def test_two_gateways_share_the_work(self, model: Server, postgresql: str) -> None:
        options = (f"--server={model.grpc}", "--job-workers=2")
        with (
            portal(*options, database=postgresql) as one,
            portal(*options, database=postgresql) as two,
            one.http() as http,
            two.http() as other,
        ):
            before = answered_by(model)
            for worker in model.workers():
                worker.suspend()
            job = submit(http, *[GOOD] * 60)
            wait_for_both(postgresql, job["id"])
            for worker in model.workers():
                worker.resume()
            done = wait(other, job["id"])
            assert done["answered"] == 60
            assert answered_by(model) - before == 60
            for running in (one, two):
                assert 'outcome="answered",way="job"' in running.metrics

    def test_another_gateway_goes_on_with_a_job(self, model: Server, postgresql: str) -> None:
        workers, count = 2, 60
        options = (f"--server={model.grpc}", f"--job-workers={workers}")
        with (
            portal(*options, database=postgresql) as one,
            portal(*options, database=postgresql) as two,
            one.http() as http,
            two.http() as other,
        ):
            before = answered_by(model)
            for worker in model.workers():
                worker.suspend()
            job = submit(http, *[GOOD] * count)
            wait_for_both(postgresql, job["id"])
            one.kill()
            for worker in model.workers():
                worker.resume()
            done = wait(other, job["id"])
            assert (done["answered"], done["refused"], done["failed"]) == (count, 0, 0)
            answers = result(other, job["id"])
            assert [answer["index"] for answer in answers] == list(range(count))
            assert count <= answered_by(model) - before <= count + workers

    def test_an_image_that_ends_the_whole_server_is_given_up(self, tmp_path: Path) -> None:
        """As one for whose memory the kernel ends the container; its neighbours are answered."""

        def deadly(files: Files) -> None:
            code = """import os, signal
if b"deadly" in bodies[0]:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()"""
            before_each_batch(files, code)

        archive = edited_archive(tmp_path, deadly)
        port, ended = free_port(), 0
        own = ("--runtime=inprocess", "--workers=1", f"--grpc-port={port}")
        options = (*own, "--rest-port=0", "--metrics-port=0")
        started = f"--server=127.0.0.1:{port}", "--job-workers=1"
        with portal(*started) as running, running.http() as http:
            job = submit(http, GOOD + b"deadly", GOOD)
            while http.get(f"{JOBS}/{job['id']}").json()["state"] != "done":
                # It may be ended as soon as it is ready.
                with serving(archive, *options, wait=False, free_ports=False) as server:
                    deadline = time.monotonic() + 60
                    while server.process.poll() is None:
                        assert time.monotonic() < deadline, "nobody asks the model"
                        if http.get(f"{JOBS}/{job['id']}").json()["state"] == "done":
                            break
                        time.sleep(0.1)
                    ended += server.process.poll() is not None
            given_up, answered = result(http, job["id"])
        assert ended == 3
        assert (given_up["outcome"], answered["outcome"]) == ("failed", "answered")
        assert given_up["detail"] == "The model gave no answer in 3 attempts."

    def test_jobs_go_on_when_the_disk_has_room_again(self, model: Server) -> None:
        """Which a limit of the process on files stands in for."""
        with portal(f"--server={model.grpc}") as running, running.http() as http:
            wait(http, submit(http, GOOD)["id"])
            path = Path(running.database.removeprefix("sqlite:///"))
            full = (path.stat().st_size, resource.RLIM_INFINITY)
            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, full)
            failed = http.post(JOBS, files=files(GOOD + bytes(200_000)))
            assert_problem(failed, 503, "database-unavailable", "does not answer")
            time.sleep(3)
            endless = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, endless)
            assert wait(http, submit(http, GOOD)["id"], 20)["answered"] == 1

    def test_a_job_waits_while_the_model_is_away(self, guarded_archive: Path) -> None:
        port = free_port()
        options = ("--runtime=inprocess", "--workers=1", f"--grpc-port={port}")
        with portal(f"--server=127.0.0.1:{port}") as running, running.http() as http:
            job = submit(http, GOOD, GOOD)
            time.sleep(1.5)
            assert http.get(f"{JOBS}/{job['id']}").json()["state"] != "done"
            with serving(
                guarded_archive, *options, "--rest-port=0", "--metrics-port=0", free_ports=False
            ):
                assert wait(http, job["id"])["answered"] == 2
