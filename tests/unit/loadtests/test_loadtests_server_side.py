"""What the servers say of a run: their counts, and a run that must not be lost without them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cxr_loadtests import server_side
from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.judge import Objectives, judge
from cxr_loadtests.report import render
from cxr_loadtests.results import Result, load_result
from cxr_loadtests.server_side import Prometheus, scrape, with_metrics, with_prometheus
from support.loadtests import LENIENT, START, make_result, verdict_of, write_inputs

# 40 requests, all answered.
RUN = make_result({second: [0.1] * 4 for second in range(10)})
ANY = Objectives.model_validate({"objectives": [{"name": "all", "error_ratio": 0.0}]})

Answer = Callable[[str, dict[str, str]], tuple[int, Any]]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """URL of a server that says what `answer` makes of a path and its fields."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            form = message_from_bytes(head + self.rfile.read(int(self.headers["Content-Length"])))
            fields = {
                str(part.get_param("name", header="content-disposition")): str(part.get_payload())
                for part in form.walk()
                if not part.is_multipart()
            }
            self._send(*answer(self.path, fields))

        def do_GET(self) -> None:
            self._send(*answer(self.path, {}))

        def _send(self, status: int, document: Any) -> None:
            body = document if isinstance(document, str) else json.dumps(document)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def samples(*series: dict[int, int], code: str = "200") -> dict[str, Any]:
    """A range vector of request counters: values by seconds since the start."""
    result = [
        {
            "metric": {"protocol": "v1", "code": code, "instance": str(number)},
            "values": [[START + at, str(value)] for at, value in one.items()],
        }
        for number, one in enumerate(series)
    ]
    return {"status": "success", "data": {"result": result}}


def counted(*series: dict[int, int]) -> int:
    asked: list[dict[str, str]] = []

    def answer(path: str, fields: dict[str, str]) -> tuple[int, Any]:
        assert path == "/api/v1/query"
        asked.append(fields)
        return 200, samples(*series)

    with answering(answer) as url:
        counts = Prometheus(url, 'namespace="imaging"').counts(START, START + 30)
    (fields,) = asked
    assert fields["query"] == (
        'cxr_requests_total{namespace="imaging",method=~"predict|infer|explain"}[90s]'
    )
    assert float(fields["time"]) == START + 30
    assert set(counts) == {("v1", "200")}
    return counts["v1", "200"]


def test_what_was_counted_before_the_run_does_not_count() -> None:
    assert counted({-20: 100, -5: 110, 10: 130, 25: 150}) == 40


def test_a_counter_that_begins_again_loses_nothing() -> None:
    assert counted({-5: 110, 10: 130, 15: 7, 25: 20}) == 20 + 20
    # It began again before the run.
    assert counted({-20: 110, -5: 3, 10: 13}) == 10


def test_a_replica_that_comes_counts_from_nothing_and_one_that_ends_until_then() -> None:
    came, ended = {12: 5, 25: 15}, {-5: 200, 5: 230}
    assert counted(came) == 15
    assert counted(ended) == 30
    assert counted({-5: 110, 25: 120}, came, ended) == 10 + 15 + 30


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_side, "_SCRAPE_SECONDS", -1.0)


def broken(result: Result) -> dict[str, str]:
    """Observed, by what was not kept."""
    return {c.name: c.observed for c in judge(result, ANY).checks if not c.passed}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("document", ["no JSON", [], {"status": "success"}, {"status": "error"}])
def test_a_run_is_kept_where_prometheus_is_gone_after_it(document: Any) -> None:
    with answering(lambda *_: (503, document)) as url:
        result = with_prometheus(RUN, Prometheus(url, ""), START)
    assert (result.bins, result.reconciliation) == (RUN.bins, None)
    found = broken(result)
    assert found == {"clients and servers count the same": "not known: Prometheus does not answer."}
    text = render(result.model_copy(update={"verdict": judge(result, ANY)}))
    assert "not known, or not wholly: Prometheus does not answer." in text


@pytest.mark.usefixtures("impatient")
def test_counts_are_kept_where_only_the_figures_over_time_are_missing() -> None:
    def answer(path: str, fields: dict[str, str]) -> tuple[int, Any]:
        if path == "/api/v1/query":
            return 200, samples({5: 40})
        return 422, {"status": "error", "error": "too many samples"}

    with answering(answer) as url:
        result = with_prometheus(RUN, Prometheus(url, ""), START)
    assert result.reconciliation is not None
    assert result.reconciliation.counted == 40
    assert broken(result) == {
        "the servers' figures over time": (
            "not known: Prometheus refuses a query: too many samples."
        )
    }


def test_prometheus_may_be_away_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_side.time, "sleep", lambda _: None)
    replies = iter([(503, "away"), (200, samples({5: 40}))])

    def answer(path: str, fields: dict[str, str]) -> tuple[int, Any]:
        return next(replies) if path == "/api/v1/query" else (200, samples())

    with answering(answer) as url:
        assert not broken(with_prometheus(RUN, Prometheus(url, ""), START))


def test_a_run_is_kept_where_the_server_is_gone_after_it() -> None:
    line = 'cxr_requests_total{protocol="v1",method="predict",code="200"} 40.0\n'
    with answering(lambda *_: (200, line)) as url:
        assert not broken(with_metrics(RUN, url, server_side.Counts()))
    with answering(lambda *_: (502, "<html>")) as url, pytest.raises(LoadTestError, match="502"):
        scrape(url)
    found = broken(with_metrics(RUN, url, server_side.Counts()))
    assert found == {
        "clients and servers count the same": "not known: The metrics' URL does not answer."
    }


def judged_run(
    folder: Path, result: Result, *options: str, objectives: dict[str, Any] = LENIENT
) -> "subprocess.CompletedProcess[str]":
    """`cxr loadtest run` after whose last phase there is this result."""
    result.save(folder)
    code = f"""
import cxr_loadtests.run as run
from pathlib import Path
from cxr.cli import main
from cxr_loadtests.results import load_result
result = load_result(Path({str(folder)!r}))
run._measured = lambda job, say: result
main()
"""
    words = ["loadtest", "run", "--host=http://127.0.0.1:1", "--shape=closed", *options]
    # Where there is no S3, and boto3 does not try again.
    s3 = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *words, *write_inputs(folder, objectives)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **s3},
    )


@pytest.mark.parametrize(
    ("failures", "code", "word"), [({}, 3, "Passed."), ({"503": 1}, 1, "Failed.")]
)
def test_a_verdict_is_told_and_kept_where_s3_is_away(
    tmp_path: Path, failures: dict[str, int], code: int, word: str
) -> None:
    result = make_result({second: [0.1] * 4 for second in range(10)}, failures=failures)
    done = judged_run(tmp_path, result, "--upload=s3://bucket/x")
    assert done.returncode == code, done.stderr
    assert word in done.stdout
    assert "all: errors" in done.stdout
    assert "Cannot write to the bucket bucket" in done.stderr
    assert "Traceback" not in done.stderr
    assert verdict_of(tmp_path)["all: errors"]["passed"] == (not failures)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "result.json", "verdict.json", "junit.xml", "report.html",
    }  # fmt: skip


def test_a_verdict_is_told_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out" / "verdict.json").mkdir(parents=True)
    done = judged_run(tmp_path, RUN)
    assert done.returncode == 3, done.stderr
    assert "Passed." in done.stdout
    assert "Cannot write to" in done.stderr
    assert load_result(tmp_path / "out").verdict is not None


def test_a_run_that_cannot_be_judged_is_kept(tmp_path: Path) -> None:
    dicom = {"objectives": [{"name": "DICOM", "scenario": "dicom", "p99_seconds": 1.0}]}
    done = judged_run(tmp_path, RUN, objectives=dicom)
    assert done.returncode == 2
    assert "nothing that this run has asked" in done.stderr
    assert load_result(tmp_path / "out") == RUN
