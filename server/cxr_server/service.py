"""The service behind every protocol: its model, whether it is ready, and its answers."""

import asyncio
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol

from cxr.config import ModelConfig
from cxr.decode import check_size
from cxr.engine import Prediction, warm_up_image
from cxr.errors import BadImageError
from cxr_server.errors import RequestError, bad_request, check_batch, unavailable
from cxr_server.metrics import Metrics
from cxr_server.settings import Settings

log = logging.getLogger(__name__)

Answer = Prediction | BadImageError
# An encoded image, or what is already known to be wrong with it.
Image = bytes | BadImageError

_POLL_INTERVAL = 1.0
# Seconds without an answer of TorchServe after which this process gives up. Workers that restart
# get as long as they had at first, since how long that takes depends on the machine.
_LOST_AFTER = 15.0
# Images that wait or are being answered, at most, and their bytes in units of the largest request:
# what would wait longer than that is better sent to another replica.
_MAX_IMAGES = 1000
_MAX_REQUESTS_HELD = 16


class Runtime(Protocol):
    """What runs the model: TorchServe, or anything that can stand in its place."""

    async def start(self) -> None:
        """Start; it need not be ready yet."""

    async def wait(self) -> int:
        """Wait until it has ended by itself, and return its exit code."""

    async def stop(self, *, now: bool = False) -> None:
        """End it and free what it holds; `now` without waiting for it to end by itself."""

    async def ready_workers(self) -> int | None:
        """How many workers have the model loaded; None when it does not answer."""

    def load_error(self) -> str | None:
        """Why a worker could not load the model, once one could not."""

    async def predict(self, image: bytes) -> Answer:
        """Answer one encoded image."""


class Service:
    """One model, ready or not.

    Attributes:
        config: the model's configuration.
        settings: how the service runs.
        metrics: its metrics.
        draining: no longer ready, but requests still get answers.
    """

    def __init__(self, runtime: Runtime, config: ModelConfig, settings: Settings) -> None:
        self.config = config
        self.settings = settings
        self.metrics = Metrics()
        self.metrics.model.labels(config.name, config.version, config.graph.sha256).set(1)
        self.draining = False
        self._runtime = runtime
        self._warm = False
        self._workers = 0
        self._failed = False
        self._images_held = 0
        self._bytes_held = 0
        self.metrics.ready.set_function(lambda: self.ready)

    @property
    def ready(self) -> bool:
        """Whether a request sent now can be expected to succeed."""
        return self._able and not self.draining

    @property
    def _able(self) -> bool:
        return self._warm and self._workers > 0 and not self._failed

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
        return self._load_failure() or f"TorchServe ended by itself (exit code {ended.result()})."

    async def stop(self, *, now: bool = False) -> None:
        """End the runtime; `now` when there is nothing left of it to wait for."""
        self._publish(0)
        await self._runtime.stop(now=now)

    async def predict(self, images: Sequence[Image]) -> list[Answer]:
        """Answer each image by itself, in order.

        Raises:
            RequestError: too many images; not ready; too busy; or the runtime could not answer one.
        """
        check_batch(len(images), self.settings.max_batch)
        if not self._able:
            raise unavailable("The model is not ready; try again later.")
        size = sum(len(image) for image in images if isinstance(image, bytes))
        if (
            self._images_held + len(images) > _MAX_IMAGES
            or self._bytes_held + size > _MAX_REQUESTS_HELD * self.settings.max_request_bytes
        ):
            raise unavailable("The service is busy; try again later.")
        self._images_held += len(images)
        self._bytes_held += size
        try:
            return await self._answers(images)
        finally:
            self._images_held -= len(images)
            self._bytes_held -= size

    async def _answers(self, images: Sequence[Image]) -> list[Answer]:
        # Bad images are answers, so an exception here fails the request as a whole; gather would
        # leave the others running, the group ends them.
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer(image)) for image in images]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, image: Image) -> Answer:
        answer: Answer
        if isinstance(image, BadImageError):
            answer = image
        else:
            try:
                check_size(image, self.settings.limits)
                answer = await self._runtime.predict(image)
            except BadImageError as error:
                answer = error
        outcome = answer.reason.value if isinstance(answer, BadImageError) else "answered"
        self.metrics.images.labels(outcome).inc()
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
            now = loop.time()
            if answer is not None:
                last_answer = now
            if workers:
                last_ready = now
            if self._warm:
                if not workers and self._workers:
                    log.error("not ready: no worker has the model loaded")
                if workers and not self._workers:
                    log.info("ready again")
                self._publish(workers)
                if now - last_answer > _LOST_AFTER:
                    return f"TorchServe has not answered for {_LOST_AFTER:g} s."
                if now - last_ready > self.settings.startup_timeout:
                    return (
                        "No worker has had the model loaded for "
                        f"{self.settings.startup_timeout:g} s."
                    )
            elif workers >= self.settings.workers and await self._warm_up():
                self._publish(workers)
            elif now > deadline:
                return (
                    f"The workers were not ready within {self.settings.startup_timeout:g} s: "
                    f"{workers} of {self.settings.workers} have the model loaded."
                )
            await asyncio.sleep(_POLL_INTERVAL)

    async def _warm_up(self) -> bool:
        """Have every worker answer one image through the whole path."""
        image = warm_up_image()
        try:
            answers = await asyncio.gather(
                *(self._runtime.predict(image) for _ in range(self.settings.workers))
            )
        except RequestError as error:
            log.warning("warm-up failed: %s", error)
            return False
        self._warm = all(isinstance(answer, Prediction) for answer in answers)
        return self._warm

    def _load_failure(self) -> str | None:
        reason = self._runtime.load_error()
        return f"A worker could not load the model: {reason}" if reason else None

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
        raise RequestError(HTTPStatus(first.reason.http_status), str(first))
    # Not all of the sentences: a gRPC status message has to fit into 8 KiB.
    sentence = f"None of the {len(errors)} images can be used; the first: {first}"
    if len({error.reason.http_status for error in errors}) > 1:
        raise bad_request(sentence)
    raise RequestError(HTTPStatus(first.reason.http_status), sentence)
