"""The service behind every protocol: its model, whether it is ready, and its answers."""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from prometheus_client import Metric

from cxr.answer import Answer, Options, Prediction
from cxr.config import ModelConfig
from cxr.decode import check_size
from cxr.engine import warm_up_image
from cxr.errors import BadImageError
from cxr.quality import refusal
from cxr_server.errors import RequestError, bad_request, busy, check_batch, unavailable
from cxr_server.metrics import ANSWERED, Metrics
from cxr_server.settings import QualityPolicy, Settings
from cxr_server.startup import Phase, Startup

if TYPE_CHECKING:
    from cxr_server.tracing import Tracing

log = logging.getLogger(__name__)

DEFAULT_OPTIONS = Options()
# An encoded image, or what is already known to be wrong with it.
Image = bytes | BadImageError

_POLL_INTERVAL = 1.0
# Until the first readiness, since all of it is added to the start of a replica.
_STARTING_POLL_INTERVAL = 0.1
# Seconds without an answer of the runtime after which this process gives up. Workers that restart
# get as long as they had at first, since how long that takes depends on the machine.
_LOST_AFTER = 15.0
# What requests may hold in memory together, in units of the largest one.
_MAX_REQUESTS_HELD = 16


class Runtime(Protocol):
    """What runs the model.

    Attributes:
        name: what to call it in messages.
    """

    name: str

    @property
    def restarts(self) -> int:
        """How many workers ended by themselves and were replaced, as far as it knows."""

    def collect(self) -> Iterable[Metric]:
        """Metrics of its own, which the service shows beside its own; any thread may ask."""

    async def start(self) -> None:
        """Start; it need not be ready yet."""

    async def wait(self) -> str:
        """Wait until it has ended by itself, and return a sentence that says so."""

    async def stop(self, *, now: bool = False) -> None:
        """End it and free what it holds; `now` without waiting for it to end by itself."""

    async def ready_workers(self) -> int | None:
        """How many workers have the model loaded; None when it does not answer."""

    def load_error(self) -> str | None:
        """Why a worker could not load the model, once one could not."""

    async def predict(self, image: bytes, options: Options) -> Answer:
        """Answer one encoded image.

        Args:
            image: the file's bytes.
            options: what is wanted beside the probabilities; the model can give it.

        Raises:
            RequestError: there is no answer, and why.
        """


@dataclass
class Memory:
    """What all requests together hold in memory.

    Attributes:
        limit: in bytes.
        held: likewise.
    """

    limit: int
    held: int = 0


class Held:
    """What one request holds of it, until the end of the context."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._size = 0

    def __enter__(self) -> "Held":
        return self

    def add(self, size: int) -> None:
        """Count further bytes.

        Raises:
            RequestError: all requests together would hold too much (503).
        """
        if self._memory.held + size > self._memory.limit:
            raise busy()
        self._size += size
        self._memory.held += size

    def __exit__(self, *_: object) -> None:
        self._memory.held -= self._size


class Service:
    """One model, ready or not.

    Attributes:
        config: the model's configuration.
        settings: how the service runs.
        metrics: its metrics.
        tracing: makes spans; None where there are none.
        draining: no longer ready, but requests still get answers.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: ModelConfig,
        settings: Settings,
        startup: Startup,
        tracing: "Tracing | None" = None,
    ) -> None:
        self.config = config
        self.settings = settings
        self.metrics = Metrics(config, settings)
        self.tracing = tracing
        self.draining = False
        self._runtime = runtime
        self._predict = tracing.predict(runtime.predict) if tracing else runtime.predict
        self._warm = False
        self._provider = ""
        self._workers = 0
        self._restarts = 0
        self._failed = False
        self._lost = False
        self._images_held = 0
        self._memory = Memory(_MAX_REQUESTS_HELD * settings.max_request_bytes)
        self._startup = startup
        self.metrics.registry.register(runtime)
        self.metrics.ready.set_function(lambda: self.ready)
        self.metrics.queued.set_function(lambda: max(0, self._images_held - self._workers))

    @property
    def ready(self) -> bool:
        """Whether a request sent now can be expected to succeed."""
        able = self._warm and self._workers > 0 and not self._failed
        return able and not self.draining

    async def start(self) -> None:
        """Start the runtime; it is not ready yet."""
        await self._runtime.start()

    async def run(self) -> str:
        """Watch over the runtime until it has failed for good.

        Returns:
            The reason of the failure, one sentence.
        """
        ended = asyncio.create_task(self._runtime.wait())
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait((ended, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            watching.cancel()
        self._failed = True
        self._publish(0)
        if watching.done():
            return watching.result()
        return self._load_failure() or ended.result()

    async def stop(self, *, now: bool = False) -> None:
        """End the runtime; `now` when there is nothing left of it to wait for."""
        self._publish(0)
        await self._runtime.stop(now=now)

    async def predict(
        self, images: Sequence[Image], options: Options = DEFAULT_OPTIONS
    ) -> list[Answer]:
        """Answer each image by itself, in order.

        Args:
            images: encoded images, or what is wrong with them.
            options: what is wanted of each beside the probabilities.

        Raises:
            RequestError: too many images; an explanation that the model cannot give; not ready; too
                busy; or the runtime could not answer one.
        """
        check_batch(len(images), self.settings.max_batch)
        self._check_explanation(options.explain)
        if self.settings.quality_policy == QualityPolicy.OFF:
            options = replace(options, quality=False)
        # While workers restart, which takes a second or two, requests wait for them in the runtime.
        if not self._warm or self._lost or self._failed:
            raise unavailable("The model is not ready; try again later.")
        if self._images_held + len(images) > self.settings.max_queue:
            raise busy()
        with self.holding() as held:
            size = sum(len(image) for image in images if isinstance(image, bytes))
            held.add(size)
            self.metrics.arrived(size)
            self._images_held += len(images)
            try:
                return await self._answers(images, options)
            finally:
                self._images_held -= len(images)

    def holding(self) -> "Held":
        """What a request holds in memory, counted until the end of this context."""
        return Held(self._memory)

    def _check_explanation(self, explain: bool | str) -> None:
        if explain is False:
            return
        if self.config.explanation is None:
            raise bad_request("This model has no explanation; export it again.")
        if explain is not True and explain not in self.config.labels:
            raise bad_request(
                f"There is no such class to explain; the classes are "
                f"{', '.join(self.config.labels)}."
            )

    async def _answers(self, images: Sequence[Image], options: Options) -> list[Answer]:
        if len(images) == 1:
            return [await self._answer(images[0], options)]
        # Bad images are answers, so an exception here fails the request as a whole; gather would
        # leave the others running, the group ends them.
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer(image, options)) for image in images]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, image: Image, options: Options) -> Answer:
        answer: Answer
        start = time.perf_counter()
        if isinstance(image, BadImageError):
            answer = image
        else:
            try:
                check_size(image, self.settings.limits)
                answer = self._as_policy(await self._predict(image, options))
            except BadImageError as error:
                answer = error
        outcome = ANSWERED
        if isinstance(answer, BadImageError):
            outcome = answer.reason.value
        else:
            self.metrics.predicted(answer, time.perf_counter() - start)
        self.metrics.image(outcome)
        return answer

    def _as_policy(self, answer: Answer) -> Answer:
        """Count what the image is like, and refuse it for that where the policy says so."""
        if isinstance(answer, BadImageError):
            return answer
        self.metrics.compared(answer)
        reasons = answer.quality.reasons if answer.quality else ()
        if reasons and self.settings.quality_policy == QualityPolicy.REFUSE:
            return refusal(reasons)
        return answer

    async def _watch(self) -> str:
        """Keep the readiness true to the workers; return once there is no hope left."""
        loop = asyncio.get_running_loop()
        last_answer = last_ready = loop.time()
        deadline = last_ready + self.settings.startup_timeout
        while True:
            if failure := self._load_failure():
                return failure
            answer = await self._runtime.ready_workers()
            workers = answer or 0
            self._lost = answer is None
            self._count_restarts()
            self.metrics.count()
            now = loop.time()
            if answer is not None:
                last_answer = now
                self._startup.ended(Phase.RUNTIME)
            if workers:
                last_ready = now
            if self._warm:
                if not workers and self._workers:
                    log.error("not ready: no worker has the model loaded")
                if workers and not self._workers:
                    log.info("ready again")
                self._publish(workers)
                if now - last_answer > _LOST_AFTER:
                    return f"{self._runtime.name} has not answered for {_LOST_AFTER:g} s."
                if now - last_ready > self.settings.startup_timeout:
                    return (
                        "No worker has had the model loaded for "
                        f"{self.settings.startup_timeout:g} s."
                    )
            elif workers >= self.settings.workers and await self._warm_up():
                self._publish(workers)
                self._report_start()
            elif now > deadline:
                return (
                    f"The workers were not ready within {self.settings.startup_timeout:g} s: "
                    f"{workers} of {self.settings.workers} have the model loaded."
                )
            await asyncio.sleep(_POLL_INTERVAL if self._warm else _STARTING_POLL_INTERVAL)

    async def _warm_up(self) -> bool:
        """Have every worker answer one image through the whole path."""
        self._startup.ended(Phase.LOAD)
        image = warm_up_image()
        try:
            answers = await asyncio.gather(
                *(
                    self._runtime.predict(image, DEFAULT_OPTIONS)
                    for _ in range(self.settings.workers)
                )
            )
        except RequestError as error:
            log.warning("warm-up failed: %s", error)
            return False
        predictions = [answer for answer in answers if isinstance(answer, Prediction)]
        self._warm = len(predictions) == len(answers)
        if self._warm:
            self._provider = predictions[0].provider
            self.metrics.runs_on(self._provider)
        return self._warm

    def _report_start(self) -> None:
        self._startup.ended(Phase.WARM_UP)
        for phase, seconds in self._startup.seconds.items():
            self.metrics.startup.labels(phase).set(seconds)
        log.info("ready %s, on %s", self._startup, self._provider or "a provider of its own")

    def _load_failure(self) -> str | None:
        reason = self._runtime.load_error()
        return f"A worker could not load the model: {reason}" if reason else None

    def _count_restarts(self) -> None:
        restarts = self._runtime.restarts
        self.metrics.restarts.inc(restarts - self._restarts)
        self._restarts = restarts

    def _publish(self, workers: int) -> None:
        self._workers = workers
        self.metrics.workers.set(workers)


def check_model(service: Service, name: str, version: str | None = None) -> None:
    """Make sure that a request means the model that is served.

    Raises:
        RequestError: another name or version (404).
    """
    served = service.config
    if name != served.name:
        raise RequestError(
            HTTPStatus.NOT_FOUND, f"There is no such model here; this service has {served.name!r}."
        )
    if version and version != served.version:
        raise RequestError(
            HTTPStatus.NOT_FOUND,
            f"There is no such version of {served.name!r} here; "
            f"this service has {served.version!r}.",
        )


def raise_if_all_bad(answers: Sequence[Answer]) -> None:
    """Fail a request of which no image could be answered.

    Raises:
        RequestError: with the status that they share, else 400.
    """
    errors = [answer for answer in answers if isinstance(answer, BadImageError)]
    if len(errors) < len(answers):
        return
    first = errors[0]
    if len(errors) == 1:
        raise RequestError(HTTPStatus(first.reason.http_status), str(first), rejection=first.reason)
    # Not all of the sentences: a gRPC status message has to fit into 8 KiB.
    sentence = f"None of the {len(errors)} images can be used; the first: {first}"
    if len({error.reason.http_status for error in errors}) > 1:
        raise bad_request(sentence)
    raise RequestError(HTTPStatus(first.reason.http_status), sentence)
