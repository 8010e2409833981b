"""Hostile files and clients among good ones; `make fuzz` is the long form."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.figures import report
from support.fuzz import Fuzz, pydicom_samples
from support.protocols import V1
from support.servers import Server

DICOM = {"Content-Type": "application/dicom"}
REQUESTS = 320


def test_good_answers_among_hostile_requests(server: Server, bundle: Path) -> None:
    workers = server.worker_pids()
    fuzz = Fuzz(server, bundle, REQUESTS).run()
    report(f"fuzz, {server.runtime}", str(fuzz))
    fuzz.check()
    assert server.worker_pids() == workers
    assert "unexpected" not in server.log
    assert fuzz.growth < 0.3, fuzz  # of few requests, most of it is the first use of things


@pytest.fixture(scope="module")
def statuses(server: Server) -> Iterator["Counter[int]"]:
    """What became of pydicom's samples, told at the end of the run."""
    counts: Counter[int] = Counter()
    yield counts
    listed = ", ".join(f"{status} {count}" for status, count in sorted(counts.items()))
    report(f"pydicom's samples, {server.runtime}", f"{counts.total()} asked; {listed}")


@pytest.mark.parametrize("path", pydicom_samples(), ids=lambda path: path.stem)
def test_pydicoms_samples_are_answered_or_refused(
    server: Server, path: Path, statuses: "Counter[int]"
) -> None:
    workers = server.worker_pids()
    answer = httpx.post(server.rest + V1, content=path.read_bytes(), headers=DICOM, timeout=60)
    statuses[answer.status_code] += 1
    assert answer.status_code in (200, 400, 413, 415, 422), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].endswith(".")
    assert server.worker_pids() == workers
