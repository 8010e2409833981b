"""`cxr loadtest` on real servers: it passes, and it fails where it must."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3

from cxr_archive.packager import pack
from cxr_loadtests.histogram import seconds_of
from cxr_loadtests.results import load_result
from support.archives import before_each_batch, edited_archive
from support.bundles import make_bundle
from support.loadtests import LENIENT, PROFILE, loadtest, verdict_of, write_inputs
from support.servers import CXR, Server, free_port, serving

CAPTURED: dict[str, Any] = {
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "text": True,
    "env": {**os.environ, "PYTHONUNBUFFERED": "1"},
}


@contextmanager
def joined(port: int, silence: int = 60) -> Iterator["subprocess.Popen[str]"]:
    """A worker; a master that is silent for so many seconds is gone (Locust's default: 60)."""
    words = ["loadtest", "worker", "--master=127.0.0.1", f"--port={port}"]
    code = f"""import locust.runners
from cxr.cli import main
locust.runners.MASTER_HEARTBEAT_TIMEOUT = {silence}
main({words})"""
    with subprocess.Popen([sys.executable, "-c", code], **CAPTURED) as worker:
        try:
            yield worker
        finally:
            worker.kill()


@pytest.fixture(scope="module")
def plain(archive: Path) -> Iterator[Server]:
    """A server that is not small: the session's refuses the images of a load test."""
    with serving(archive, "--runtime=inprocess", "--workers=2") as running:
        yield running


def addresses(server: Server) -> list[str]:
    return [f"--host={server.rest}", f"--grpc={server.grpc}", f"--metrics={server.metrics}"]


def test_a_run_passes_and_says_so_everywhere(archive: Path, tmp_path: Path) -> None:
    """Over every protocol, closed and open, with a service of its own."""
    done = loadtest("run", f"--serve={archive}", "--shape=all", *write_inputs(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = load_result(tmp_path / "out")
    assert {item.scenario for item in result.bins} == {
        "rest-v1", "rest-raw", "v2-json", "v2-binary", "grpc", "explain", "dicom", "bad-input",
    }  # fmt: skip
    assert [phase.name for phase in result.phases] == ["warm-up", "1", "2", "half"]
    counts = result.reconciliation
    assert counts is not None
    assert counts.sent == counts.answered == counts.counted > 100
    assert all(clients == servers for _, _, clients, servers in counts.by_code)
    knee_rate = result.phases[-1].rate
    assert knee_rate is not None
    asked = sum(sum(item.buckets.values()) for item in result.bins)
    assert asked > knee_rate
    assert 'failures="0"' in (tmp_path / "out" / "junit.xml").read_text(encoding="utf-8")
    assert "knee" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Passed" in done.stdout


def test_a_broken_objective_fails_the_run(plain: Server, tmp_path: Path) -> None:
    strict = {"objectives": [{"name": "no service can", "p95_seconds": 0.0001}]}
    done = loadtest(
        "run", *addresses(plain), "--shape=closed", "--seconds=3", *write_inputs(tmp_path, strict)
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
    assert [name for name, check in verdict_of(tmp_path).items() if not check["passed"]] == [
        "no service can: p95"
    ]
    assert 'failures="1"' in (tmp_path / "out" / "junit.xml").read_text(encoding="utf-8")


def test_an_answer_that_differs_from_the_archive_s_fails_the_run(
    plain: Server, tmp_path: Path
) -> None:
    """Status 200, and the wrong model: another preprocessing of the same graph."""
    other = tmp_path / "other.mar"
    bundle = make_bundle(tmp_path / "bundle")
    config = json.loads((bundle / "cxr-model.json").read_bytes())
    config["preprocessing"]["mean"] = [0.2, 0.5, 0.5]
    (bundle / "cxr-model.json").write_text(json.dumps(config), encoding="utf-8")
    pack(bundle, other)
    done = loadtest(
        "run",
        *addresses(plain),
        f"--archive={other}",
        "--shape=closed",
        "--seconds=3",
        *("--scenario=rest-raw", "--scenario=grpc"),
        *write_inputs(tmp_path, {"objectives": [{"name": "any", "error_ratio": 1.0}]}),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    check = verdict_of(tmp_path)["answers are the expected ones"]
    assert not check["passed"]
    assert not check["observed"].startswith("0 ")


def test_the_open_model_sees_what_the_closed_one_hides(plain: Server, tmp_path: Path) -> None:
    """All workers stand still for two seconds. A client that waits notices once; those that come
    meanwhile notice each (coordinated omission)."""

    def slow_answers(shape: str) -> int:
        def stand_still() -> None:
            for signum in (signal.SIGSTOP, signal.SIGCONT):
                for worker in plain.workers():
                    worker.send_signal(signum)
                time.sleep(2)

        folder = tmp_path / shape
        inputs = write_inputs(folder, LENIENT)
        stop = threading.Thread(target=stand_still)
        with subprocess.Popen(
            [CXR, "loadtest", "run", *addresses(plain), f"--shape={shape}", *inputs],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as running:
            before = plain_requests(plain)
            plain.wait_for("load", lambda: plain_requests(plain) > before + 25, 60)
            stop.start()
            said, _ = running.communicate(timeout=60)
        stop.join()
        assert running.returncode == 0, said.decode()
        return sum(
            count
            for item in load_result(folder / "out").bins
            for number, count in item.buckets.items()
            if seconds_of(number) > 0.3
        )

    assert slow_answers("closed") <= 6
    # 20 a second for the 1.7 s in which who comes waits longer than that, without bad input.
    assert slow_answers("open") >= 15


@pytest.mark.parametrize("workers", [0, 1])
def test_a_service_that_freezes_until_the_end_fails(
    archive: Path, tmp_path: Path, workers: int
) -> None:
    """Every answer is good, and what hangs has its timeout after the judged phase."""
    port = free_port()
    inputs = write_inputs(tmp_path, {"objectives": [{"name": "all", "error_ratio": 0.1}]})
    impatient = json.dumps({**PROFILE, "timeout_seconds": 6, "gaps": "constant"})
    (tmp_path / "profile.yaml").write_text(impatient, encoding="utf-8")
    options = [f"--workers={workers}", f"--port={port}", "--shape=open", "--rate=4", *inputs]
    with (
        serving(archive, "--runtime=inprocess", "--workers=1") as server,
        ExitStack() as stack,
        subprocess.Popen(
            [CXR, "loadtest", "run", *addresses(server)[:2], *options], **CAPTURED
        ) as master,
    ):
        if workers:
            stack.enter_context(joined(port))
        assert master.stdout is not None
        assert any("begins" in line for line in master.stdout)
        # Of 8 s, so that no timeout is over within the phase.
        time.sleep(4)
        for worker in server.workers():
            worker.suspend()
        said = master.communicate(timeout=60)[0]
        for worker in server.workers():
            worker.resume()
    assert master.returncode == 1, said
    assert [name for name, check in verdict_of(tmp_path).items() if not check["passed"]] == [
        "all: errors"
    ], said
    result = load_result(tmp_path / "out")
    assert result.generator.unfinished == 0
    (phase,) = result.phases
    failed = [item.second for item in result.bins if item.failures]
    assert phase.start + 3 < min(failed) <= max(failed) < phase.end


def plain_requests(server: Server) -> float:
    text = urllib3.PoolManager().request("GET", server.metrics).data.decode()
    lines = [line for line in text.splitlines() if line.startswith("cxr_requests_total")]
    return sum(float(line.split()[-1]) for line in lines)


def test_a_master_and_two_workers_are_one_run(plain: Server, tmp_path: Path) -> None:
    port = free_port()
    workers = [
        subprocess.Popen(
            [CXR, "loadtest", "worker", "--master=127.0.0.1", f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    try:
        done = loadtest(
            "run",
            *addresses(plain),
            "--shape=open",
            "--seconds=5",
            "--workers=2",
            f"--port={port}",
            *write_inputs(tmp_path),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert [worker.wait(20) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    result = load_result(tmp_path / "out")
    assert (result.generator.workers, result.generator.lost) == (2, 0)
    counts = result.reconciliation
    assert counts is not None
    # 20 a second from both together, as Poisson has it.
    assert 50 < counts.sent < 170
    assert counts.sent == counts.counted


def test_a_lost_worker_fails_the_run_though_another_has_come(plain: Server, tmp_path: Path) -> None:
    port = free_port()
    join = [CXR, "loadtest", "worker", "--master=127.0.0.1", f"--port={port}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    workers = [subprocess.Popen(join, **quiet) for _ in range(2)]
    command = [
        CXR,
        "loadtest",
        "run",
        *addresses(plain),
        "--shape=open",
        "--seconds=15",
        "--workers=2",
        f"--port={port}",
        *write_inputs(tmp_path),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as master:
        try:
            assert master.stdout is not None
            assert any("begins" in line for line in master.stdout)
            workers[0].kill()
            workers.append(subprocess.Popen(join, **quiet))
            said = master.communicate(timeout=90)[0]
        finally:
            for worker in workers:
                worker.kill()
            master.kill()
    assert master.returncode == 1, said
    whole = verdict_of(tmp_path)["the load generator is whole"]
    assert not whole["passed"]
    assert "1 workers lost" in whole["observed"]


def test_a_service_that_fails_under_load_is_judged_by_its_failures(tmp_path: Path) -> None:
    """Without an answer there is no knee, and the phase at half of its rate is left out."""
    code = """import pathlib
asked = pathlib.Path("asked")
number = int(asked.read_text()) if asked.exists() else 0
asked.write_text(str(number + len(bodies)))
if number > 20:
    raise RuntimeError"""
    archive = edited_archive(tmp_path, lambda files: before_each_batch(files, code))
    with serving(archive, "--runtime=inprocess", "--workers=1") as server:
        options = [*addresses(server), "--shape=all", *write_inputs(tmp_path)]
        done = loadtest("run", *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "half is left out: no step has got an answer" in done.stdout
    assert [phase.name for phase in load_result(tmp_path / "out").phases] == ["warm-up", "1", "2"]
    errors = verdict_of(tmp_path)["all: errors"]
    assert not errors["passed"]
    assert float(errors["observed"].partition("%")[0]) > 50


def test_workers_end_when_their_master_finds_no_service(tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"--host=http://127.0.0.1:{silent.getsockname()[1]}"
        options = ["--shape=closed", "--workers=2", f"--port={port}", *write_inputs(tmp_path)]
        patient = json.dumps({**PROFILE, "timeout_seconds": 100})
        (tmp_path / "profile.yaml").write_text(patient, encoding="utf-8")
        with (
            joined(port) as worker,
            subprocess.Popen([CXR, "loadtest", "run", address, *options], **CAPTURED) as master,
        ):
            assert worker.stdout is not None
            # The master is still asking a service that accepts connections, and no more.
            assert "is there" in worker.stdout.readline()
            silent.close()
            refusal = master.communicate(timeout=60)[1]
            said = worker.communicate(timeout=60)[1]
    assert "does not answer an image before the load" in refusal
    assert (master.returncode, worker.returncode) == (2, 2)
    assert "Traceback" not in said
    assert "ended, or fell silent, before the run was over" in said


def test_workers_end_when_their_master_is_killed(plain: Server, tmp_path: Path) -> None:
    port = free_port()
    options = ["--shape=open", "--workers=1", f"--port={port}", *write_inputs(tmp_path)]
    command = [CXR, "loadtest", "run", *addresses(plain), *options]
    with (
        joined(port, silence=3) as worker,
        subprocess.Popen(command, **CAPTURED) as master,
    ):
        assert master.stdout is not None
        assert any("begins" in line for line in master.stdout)
        master.kill()
        said = worker.communicate(timeout=60)[1]
    assert worker.returncode == 2
    assert "ended, or fell silent, before the run was over" in said


def test_a_worker_without_a_master_ends(tmp_path: Path) -> None:
    done = loadtest("worker", "--master=127.0.0.1", f"--port={free_port()}", "--wait=1")
    assert done.returncode == 2
    assert "There was no master" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host=http://127.0.0.1:1"], "does not answer an image before the load"),
        (["--host=ftp://x"], "must be a URL"),
        (["--host=http://127.0.0.1:1", "--shape=nothing"], "no shape nothing"),
        (["--host=http://127.0.0.1:1", "--upload=/tmp"], "s3://BUCKET/PREFIX"),
        ([], "--host, or an archive with --serve"),
    ],
)
def test_without_a_run_there_is_one_sentence_and_exit_code_2(
    tmp_path: Path, options: list[str], words: str
) -> None:
    inputs = write_inputs(tmp_path)
    shape = [] if any(item.startswith("--shape") for item in options) else ["--shape=closed"]
    done = loadtest("run", *options, *shape, *inputs)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "verdict.json").exists()
