"""Runs the model in worker processes of this service's own, without TorchServe.

Processes and not threads: a decoder that crashes on an image ends its worker, not the service, and
each worker runs the archive's own code. A worker has its connection to this process, cores of its
own, and one batch at a time; what waits, waits here, where it can still be dropped.
"""

import asyncio
import contextlib
import itertools
import logging
import mmap
import os
import shutil
import signal
import socket
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson
import yaml
from prometheus_client import Metric

from cxr.answer import OPTIONS_HEADER, Answer, Options
from cxr.engine import CPU, warm_up_image
from cxr_server import worker
from cxr_server.settings import Settings, available_cores
from cxr_server.workers import (
    SLOW,
    Job,
    at_once,
    ended_while_loading,
    failed_twice,
    killed_again,
    log_worker,
    no_worker,
    not_ready,
    parse_answer,
    taken_back,
    too_late,
    worker_environment,
)

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

MODEL_CONFIG = "model-config.yaml"
# Seconds that images wait for a worker while there is none; one needs about one to restart.
_PATIENCE = 3.0
# Seconds between two attempts of one worker to load the model.
_RESTART_DELAY = 0.2
# Seconds in which a worker whose connection has closed is expected to have ended.
_END_TIMEOUT = 5.0
# How others end a process, the kernel that runs out of memory included. A crash ends it otherwise.
_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
# Workers that may be killed over one image. Whoever kills all workers at once can meet it twice: in
# its own worker, and in the next that took it. The third is one that was started after that.
_KILLS = 3
_LINES_KEPT = 40


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How many images a worker is given at once.

    Attributes:
        size: images, at most.
        delay: seconds that the first of them waits for the others, at most.
    """

    size: int = 1
    delay: float = 0.0


@dataclass(kw_only=True, eq=False)
class _Job(Job[Answer]):
    """An image that waits for its answer.

    Attributes:
        failed: it has failed a worker by itself before.
        kills: how many workers were killed that had it.
        after: only a worker with a larger number may have it.
    """

    failed: bool = False
    kills: int = 0
    after: int = -1


class _WorkerError(Exception):
    """A worker ended, or did not answer in time.

    Attributes:
        killed: somebody else has ended it.
    """

    def __init__(self, *, killed: bool = False) -> None:
        super().__init__()
        self.killed = killed


class _Connection(asyncio.Protocol):
    """The connection to a worker, in messages as :mod:`cxr_server.worker` has them.

    No stream: an answer, which mostly comes in one piece, would go through half a dozen calls.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._lost = False
        self._message: asyncio.Future[_Message] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Take a part of a message."""
        self._received += data
        start = worker.LENGTH.size
        if len(self._received) < start:
            return
        end = start + worker.LENGTH.unpack_from(self._received)[0]
        if len(self._received) < end:
            return
        head = orjson.loads(self._received[start:end])
        if len(self._received) < end + sum(head["sizes"]):
            return
        parts = []
        for size in head["sizes"]:
            parts.append(bytes(self._received[end : end + size]))
            end += size
        del self._received[:end]
        if not self._message.done():
            self._message.set_result((head, parts))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as asyncio has it
        """The worker has ended, or nearly."""
        self._lost = True
        if not self._message.done():
            self._message.set_exception(ConnectionResetError())

    async def receive(self, timeout: float) -> "_Message":
        """The next message.

        Raises:
            ConnectionResetError: the worker has closed the connection.
            TimeoutError: it has sent none within this many seconds.
        """
        return await _within(self._message, timeout)

    def send(self, head: Mapping[str, Any], parts: Sequence[bytes]) -> None:
        """Send a message, whose answer will be the next one that is received."""
        self._message = self._loop.create_future()
        if self._lost:
            self._message.set_exception(ConnectionResetError())
            return
        data = orjson.dumps(head)
        self.transport.writelines((worker.LENGTH.pack(len(data)) + data, *parts))


# A message's JSON object, and what is behind it.
_Message = tuple[dict[str, Any], list[bytes]]


@dataclass(kw_only=True)
class _Worker:
    """One process and the connection to it; they are numbered as they are started."""

    number: int
    process: asyncio.subprocess.Process
    connection: _Connection
    shared: mmap.mmap
    output: "asyncio.Task[None]"
    busy: bool = False
    batching: Batching = field(default_factory=Batching)

    def several(self, jobs: Sequence[object]) -> bool:
        """Whether these are images that it takes one after the other, not a batch."""
        return self.batching.size == 1 and len(jobs) > 1

    async def receive(self, timeout: float) -> _Message:
        """The next message.

        Raises:
            _WorkerError: the process has ended, or sent none within this many seconds.
        """
        try:
            return await self.connection.receive(timeout)
        except ConnectionResetError as error:
            raise _WorkerError(killed=await self._was_killed()) from error
        except TimeoutError as error:
            raise _WorkerError from error

    async def ask(self, jobs: Sequence[_Job], timeout: float) -> _Message:
        """Send a batch, and wait for the answers.

        Raises:
            _WorkerError: the process has ended, or not answered within this many seconds.
        """
        head = {
            "together": self.batching.size > 1,
            "headers": [{OPTIONS_HEADER: job.options.to_json()} for job in jobs],
            "sizes": [len(job.image) for job in jobs],
        }
        self.connection.send(head, [job.image for job in jobs])
        return await self.receive(timeout)

    async def _was_killed(self) -> bool:
        """Whether somebody else has ended it; the connection is closed already."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT):
                return await self.process.wait() in _FROM_OUTSIDE
        return False

    async def end(self) -> None:
        """Kill it and what it has started."""
        self.connection.transport.abort()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        self.output.cancel()


class InProcess:
    """Worker processes that serve one archive.

    Attributes:
        name: what to call it in messages.
        folder: private folder with the unpacked archive.
        restarts: how many workers ended by themselves and were replaced.
    """

    name = "The worker pool"

    def __init__(self, archive: Path, settings: Settings) -> None:
        self._archive = archive
        self._settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="cxr-"))
        self._model_config: dict[str, Any] = {}
        # Ordered by arrival, so that an image whose worker has died is not sent to the end.
        self._waiting: asyncio.PriorityQueue[_Job] = asyncio.PriorityQueue()
        self._arrivals = itertools.count()
        # Images that wait for a worker that is yet to be started.
        self._confined: list[_Job] = []
        self._numbers = itertools.count()
        self._supervisors: list[asyncio.Task[None]] = []
        self.restarts = 0
        self._ready = 0
        self._giving_up: asyncio.TimerHandle | None = None
        self._load_error: str | None = None
        self._failed_loads = 0
        self._output: deque[str] = deque(maxlen=_LINES_KEPT)

    async def start(self) -> None:
        """Unpack the archive and start the workers; they need not be ready yet."""
        with zipfile.ZipFile(self._archive) as mar:
            mar.extractall(self.folder)
        path = self.folder / MODEL_CONFIG
        if path.is_file():
            self._model_config = yaml.safe_load(path.read_bytes()) or {}
        self._supervisors = [
            asyncio.create_task(self._supervise(cores)) for cores in worker_cores(self._settings)
        ]

    async def wait(self) -> str:
        """Wait until it cannot go on by itself, and return the reason."""
        done, _ = await asyncio.wait(self._supervisors, return_when=asyncio.FIRST_EXCEPTION)
        errors = {type(task.exception()).__name__ for task in done if task.exception()}
        return f"{self.name} ended by itself ({', '.join(errors) or 'no worker is left'})."

    async def stop(self, *, now: bool = False) -> None:  # noqa: ARG002 - nothing takes long here
        """End the workers, and remove their files."""
        for task in self._supervisors:
            task.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        self._give_up()
        shutil.rmtree(self.folder, ignore_errors=True)

    def collect(self) -> Iterable[Metric]:
        """None: the service has all that there is to tell."""
        return ()

    async def ready_workers(self) -> int:
        """How many workers have the model loaded."""
        return self._ready

    def load_error(self) -> str | None:
        """Why a worker could not load the model, once one could not."""
        if self._load_error is not None:
            return self._load_error
        # One may be bad luck, as when someone kills it; all of them and one again is not.
        if self._failed_loads <= self._settings.workers:
            return None
        for line in self._output:
            log.error("worker: %s", line)
        return ended_while_loading(self._failed_loads)

    async def predict(self, image: bytes, options: Options) -> Answer:
        """Answer one encoded image.

        It is repeated when its worker died: inference changes nothing.

        Raises:
            RequestError: no worker was there (503), none answered in time (504), or two failed on
                this image, or three were killed (500).
        """
        if not self._ready and self._giving_up is None:
            raise not_ready()
        job = self._job(image, options)
        self._waiting.put_nowait(job)
        try:
            return await _within(job.outcome, self._settings.request_timeout)
        except TimeoutError as error:
            raise too_late(self._settings) from error
        finally:
            job.leave()

    def _job(self, image: bytes, options: Options) -> _Job:
        outcome = asyncio.get_running_loop().create_future()
        return _Job(arrival=next(self._arrivals), image=image, options=options, outcome=outcome)

    async def _supervise(self, cores: Sequence[int]) -> None:
        """Keep one worker running, until it says that it cannot load the model."""
        while self._load_error is None:
            process = await self._spawn(cores)
            try:
                if await self._load(process):
                    await self._serve(process)
                else:
                    await asyncio.sleep(_RESTART_DELAY)
            finally:
                await process.end()

    async def _spawn(self, cores: Sequence[int]) -> _Worker:
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        memory = os.memfd_create("cxr-worker")
        os.ftruncate(memory, worker.SHARED_BYTES)
        shared = mmap.mmap(memory, worker.SHARED_BYTES)
        with theirs, os.fdopen(memory):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                # Without the folder of this file on the path.
                "-P",
                worker.__file__,
                str(theirs.fileno()),
                str(memory),
                ",".join(map(str, cores)),
                cwd=self.folder,
                env=os.environ | worker_environment(self._settings) | {"TMPDIR": str(self.folder)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs.fileno(), memory),
                # A Ctrl-C in the terminal must reach this process alone: it drains first. And what
                # a worker has started ends with it.
                start_new_session=True,
            )
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, sock=ours)
        output = asyncio.create_task(self._forward_output(process))
        return _Worker(
            number=number, process=process, connection=connection, shared=shared, output=output
        )

    async def _load(self, process: _Worker) -> bool:
        """Whether the worker has loaded the model."""
        try:
            hello, _ = await process.receive(self._settings.startup_timeout)
            if error := hello.get("error"):
                self._load_error = error
                return False
            provider = hello.get("provider", "")
            if unusable := hello.get("unusable"):
                names = " and ".join(unusable)
                log.warning("%s cannot be used here; the model runs on %s", names, provider)
            process.batching = self._batching(provider)
            await self._warm_up(process)
        except _WorkerError:
            self._failed_loads += 1
            self.restarts += 1
            return False
        return True

    async def _warm_up(self, process: _Worker) -> None:
        """Have the worker answer a batch of the largest size.

        On a GPU, that is the size of all from then on; the first one takes half a second.

        Raises:
            _WorkerError: it has ended, or not answered in time.
        """
        if (size := process.batching.size) > 1:
            job = self._job(warm_up_image(), Options())
            await process.ask([job] * size, self._settings.startup_timeout)

    async def _serve(self, process: _Worker) -> None:
        """Let a worker answer until it ends."""
        self._ready += 1
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        if self._ready >= self._settings.workers:
            self._failed_loads = 0
        answering = asyncio.create_task(self._answer(process))
        ended = asyncio.create_task(process.process.wait())
        try:
            await asyncio.wait((answering, ended), return_when=asyncio.FIRST_COMPLETED)
            if process.busy:
                # Its end shows on the connection, too; perhaps behind a last answer.
                await asyncio.wait((answering,))
            with contextlib.suppress(_WorkerError):
                if answering.done():
                    answering.result()
            self.restarts += 1
            log.warning("a worker ended; another one is started")
        finally:
            answering.cancel()
            ended.cancel()
            self._ready -= 1
            if not self._ready:
                loop = asyncio.get_running_loop()
                self._giving_up = loop.call_later(_PATIENCE, self._give_up)

    async def _answer(self, process: _Worker) -> None:
        """Hand batches to a worker, one after the other.

        Raises:
            _WorkerError: it has ended, or took longer than a request may.
        """
        while True:
            process.busy = False
            first = self._next_confined(process) or await self._next()
            process.busy = True
            jobs = await self._batch(first, process.batching)
            asked = list(jobs)
            try:
                _, texts = await self._ask(process, jobs)
            except _WorkerError as error:
                if process.several(jobs):
                    self._take_back(process, jobs)
                if error.killed:
                    self._struck(jobs)
                else:
                    self._failed(jobs, alone=len(jobs) == 1)
                raise
            except asyncio.CancelledError:
                _turn_away(asked)
                raise
            unanswered = []
            for job, text in zip(asked, texts, strict=True):
                answer = parse_answer(text)
                if answer is not None:
                    job.settle(answer)
                elif job in jobs:
                    unanswered.append(job)
            self._failed(unanswered, alone=len(asked) == 1 or process.batching.size == 1)

    async def _ask(self, process: _Worker, jobs: list[_Job]) -> _Message:
        """What a worker says to images.

        Args:
            process: the worker.
            jobs: at the end, only those that it still has.

        Raises:
            _WorkerError: it has ended, or took longer than a request may.
        """
        if not process.several(jobs):
            return await process.ask(jobs, self._settings.request_timeout)
        process.shared[:] = bytes(worker.SHARED_BYTES)
        for place, job in enumerate(jobs, 1):
            job.skip = partial(process.shared.__setitem__, place, 1)
        loop = asyncio.get_running_loop()
        slow = loop.call_later(SLOW, self._take_back, process, jobs)
        try:
            return await process.ask(jobs, self._settings.request_timeout)
        finally:
            slow.cancel()
            for job in jobs:
                job.skip = None

    def _take_back(self, process: _Worker, jobs: list[_Job]) -> None:
        """Let all images wait again but the one that a worker is at."""
        for job in taken_back(jobs, process.shared[0]):
            self._waiting.put_nowait(job)

    async def _next(self) -> _Job:
        """The next image that somebody still waits for."""
        while True:
            job = await self._waiting.get()
            if not job.outcome.done():
                return job

    def _next_confined(self, process: _Worker) -> _Job | None:
        """An image that waits for this worker or a later one."""
        for job in [one for one in self._confined if one.after < process.number]:
            self._confined.remove(job)
            if not job.outcome.done():
                return job
        return None

    async def _batch(self, first: _Job, batching: Batching) -> list[_Job]:
        """That image and, where the worker takes several, those that come soon after it.

        Where many wait, one that takes no batches is given some of them all the same: a message for
        several costs hardly more than one for a single image, and this process, which has lost the
        caches to the workers each time that it comes, comes less often.
        """
        jobs = [first]
        if batching.size == 1:
            most = at_once(self._waiting.qsize(), self._ready)
            while len(jobs) < most and self._waiting.qsize() and not first.alone:
                job = self._waiting.get_nowait()
                if job.alone:
                    self._waiting.put_nowait(job)
                    break
                if not job.outcome.done():
                    jobs.append(job)
            return jobs
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(batching.delay):
                while len(jobs) < batching.size and not first.alone:
                    job = await self._next()
                    if job.alone:
                        self._waiting.put_nowait(job)
                        break
                    jobs.append(job)
        return jobs

    def _failed(self, jobs: Sequence[_Job], *, alone: bool) -> None:
        """Give images another try by themselves, unless they had it."""
        for job in jobs:
            if job.outcome.done():
                continue
            # An image that kills its worker is not passed on until all are dead.
            if job.failed:
                job.fail(failed_twice())
                continue
            job.failed = alone
            job.alone = True
            self._waiting.put_nowait(job)

    def _struck(self, jobs: Sequence[_Job]) -> None:
        """Give images whose worker was killed to another one.

        Most often they have nothing to do with it; but the kernel may have killed it for the memory
        that one of them takes.
        """
        for job in jobs:
            if job.outcome.done():
                continue
            job.kills += 1
            job.alone = True
            if job.kills >= _KILLS:
                job.fail(killed_again())
            elif job.kills == _KILLS - 1:
                job.after = next(self._numbers)
                self._confined.append(job)
            else:
                self._waiting.put_nowait(job)

    def _give_up(self) -> None:
        """Turn all away that wait: there is nobody to answer them."""
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        _turn_away(self._waiting.get_nowait() for _ in range(self._waiting.qsize()))
        _turn_away(self._confined)
        self._confined.clear()

    def _batching(self, provider: str) -> Batching:
        """The archive's batching, which is another one on a GPU."""
        gpu = provider not in {"", CPU}
        given = self._model_config | (self._model_config.get("gpu") or {} if gpu else {})
        return Batching(
            size=int(given.get("batchSize", 1)), delay=int(given.get("maxBatchDelay", 0)) / 1000
        )

    async def _forward_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - piped
        while True:
            try:
                data = await process.stdout.readline()
            except ValueError:  # a line longer than the buffer; the rest must go on being read
                continue
            if not data:
                return
            line = data.decode(errors="replace").rstrip("\r\n")
            self._output.append(line)
            log_worker(line, log, verbose=self._settings.verbose)


async def _within(answer: "asyncio.Future[_Result]", seconds: float) -> _Result:
    """What a future comes to; `asyncio.timeout`, which does the same for anything, costs more.

    Raises:
        TimeoutError: nothing within this time; the future is done with that.
    """
    timer = asyncio.get_running_loop().call_later(seconds, _expire, answer)
    try:
        return await answer
    finally:
        timer.cancel()


def _expire(answer: "asyncio.Future[Any]") -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


def _turn_away(jobs: Iterable[_Job]) -> None:
    for job in jobs:
        job.fail(no_worker())


def worker_cores(settings: Settings) -> Iterator[Sequence[int]]:
    """For each worker, the cores that it is pinned to; empty where it is not.

    Pinned are the workers of a process that has its cores to itself. One that may only use a share
    of many cores, as under a container's CPU quota, must not crowd the same few as its neighbours.
    """
    cores = sorted(os.sched_getaffinity(0))
    own = len(cores) == available_cores() and settings.workers <= len(cores)
    each = settings.threads_per_worker
    for number in range(settings.workers):
        yield cores[number * each : (number + 1) * each] if own else ()
