"""Answers the images of jobs in the background."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from cxr_client.schemas import FailedImage, ImageResult, RefusedImage
from cxr_portal.metrics import Metrics
from cxr_portal.model import (
    Caller,
    ModelClient,
    ModelError,
    ModelFailedError,
    ModelLostError,
    ModelTimeoutError,
    RefusedError,
)
from cxr_portal.settings import Settings
from cxr_portal.store import LEASE, Claim, Store

log = logging.getLogger(__name__)

# Seconds between looks into the database: other gateways' jobs, and claims that have ended.
_POLL = 1.0
# Times that the model may not answer an image in time, or end while it has it.
_MAX_ATTEMPTS = 3
# Seconds after which deleted images are scrubbed, though others are being asked about.
_SCRUB = 30.0
# Seconds between deletions of what was kept long enough.
_HOUSEKEEPING = 60.0


class JobRunner:
    """Works on the jobs of the database, together with other gateways on it.

    Each image has one result: it counts only while the claim of the image holds, and the image goes
    with it. Where a gateway dies, its images are claimed by another one once their claims end.
    """

    def __init__(
        self, settings: Settings, store: Store, model: ModelClient, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._store = store
        self._model = model
        self._metrics = metrics
        self._name = str(uuid.uuid4())
        self._asking: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        # Whether images were deleted since the database was last scrubbed.
        self._deleted = True

    def start(self) -> None:
        """Begin to work."""
        loops = [self._clean]
        if self._settings.job_workers:
            loops += [self._work, self._hold]
        self._tasks = [asyncio.create_task(_kept_up(loop)) for loop in loops]

    async def stop(self) -> None:
        """Give back what is not answered yet."""
        running = [*self._tasks, *self._asking.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        with contextlib.suppress(SQLAlchemyError):
            await asyncio.to_thread(self._store.release, self._name)
            await asyncio.to_thread(self._store.scrub)

    def wake(self) -> None:
        """Say that there is something to do."""
        self._wake.set()

    def drop(self, job_id: str) -> None:
        """Stop asking about a job's images."""
        for (job, _), task in list(self._asking.items()):
            if job == job_id:
                task.cancel()
        self._deleted = True
        self.wake()

    async def _work(self) -> None:
        scrubbed = time.monotonic()
        while True:
            self._wake.clear()
            free = self._settings.job_workers - len(self._asking)
            claims: list[Claim] = []
            if free > 0:
                with _database_may_fail():
                    claims = await asyncio.to_thread(self._store.claim, self._name, free)
            for claim in claims:
                place = (claim.job_id, claim.index)
                task = asyncio.create_task(self._answer(claim))
                self._asking[place] = task
                task.add_done_callback(partial(self._ended, place))
            if self._deleted and (not self._asking or time.monotonic() > scrubbed + _SCRUB):
                scrubbed = time.monotonic()
                with _database_may_fail():
                    await self._scrub()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _POLL)

    async def _scrub(self) -> None:
        # Before: an image that is deleted meanwhile asks for another time.
        self._deleted = False
        try:
            await asyncio.to_thread(self._store.scrub)
        except SQLAlchemyError:
            self._deleted = True
            raise

    def _ended(self, place: tuple[str, int], task: asyncio.Task[None]) -> None:  # noqa: ARG002
        self._asking.pop(place, None)
        self._deleted = True
        self._wake.set()

    async def _answer(self, claim: Claim) -> None:
        caller = Caller(
            request_id=claim.request_id,
            trace={"traceparent": claim.trace} if claim.trace else {},
        )
        result: ImageResult | None = None
        outcome: str
        delay, asked = 0.0, False
        try:
            result = await self._model.predict(claim.data, claim.index, caller)
            outcome = result.outcome
        except RefusedError as error:
            result = RefusedImage(index=claim.index, reason=error.reason, detail=str(error))
            outcome = error.reason
        except ModelError as error:
            asked = isinstance(error, ModelTimeoutError | ModelLostError)
            if isinstance(error, ModelFailedError):
                result = FailedImage(index=claim.index, detail=str(error))
            elif asked and claim.attempts + 1 >= _MAX_ATTEMPTS:
                detail = f"The model gave no answer in {_MAX_ATTEMPTS} attempts."
                result = FailedImage(index=claim.index, detail=detail)
            outcome = "failed"
            delay = error.retry_after or 1.0
        except Exception as error:
            # Not its text, which might quote the image. Left alone, the image would come again.
            log.error("an image of a job: unexpected %s", type(error).__name__)
            result = FailedImage(index=claim.index, detail="The gateway failed on this image.")
            outcome = "failed"
        with _database_may_fail():
            if result is None:
                await asyncio.to_thread(
                    self._store.put_back, self._name, claim, delay=delay, asked=asked
                )
            elif await asyncio.to_thread(self._store.finish, self._name, claim, result):
                self._metrics.images.labels("job", outcome).inc()

    async def _hold(self) -> None:
        """Keep the claims, and let go of what was cancelled elsewhere."""
        while True:
            await asyncio.sleep(LEASE / 3)
            before = set(self._asking)
            with _database_may_fail():
                self._metrics.open_images.set(await asyncio.to_thread(self._store.open_images))
                mine = await asyncio.to_thread(self._store.renew, self._name)
                for place in before - mine:
                    if task := self._asking.get(place):
                        task.cancel()

    async def _clean(self) -> None:
        while True:
            with _database_may_fail():
                gone = await asyncio.to_thread(self._store.expire, self._settings.retention)
                if gone:
                    log.info("deleted %d jobs that were kept long enough", gone)
                    self._deleted = True
            await asyncio.sleep(_HOUSEKEEPING)


async def _kept_up(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Begin again where something has ended a loop: jobs would stand still, and nobody know."""
    while True:
        try:
            await loop()
        except Exception as error:
            # Not its text, which might quote an image.
            log.error("the work on jobs: unexpected %s; it goes on", type(error).__name__)
        await asyncio.sleep(_POLL)


@contextlib.contextmanager
def _database_may_fail() -> Iterator[None]:
    """Go on where the database does not answer: whatever was not written is done again."""
    try:
        yield
    except SQLAlchemyError as error:
        log.error("the database does not answer: %s", type(error).__name__)
