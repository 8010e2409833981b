"""The gateway's parts, and what requests do with them."""

import asyncio
import logging
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import ClientDisconnect, Request

from cxr_client.schemas import AnsweredImage, Predictions, RefusedImage
from cxr_portal.auth import Authenticator, Principal
from cxr_portal.jobs import JobRunner
from cxr_portal.limits import RateLimits
from cxr_portal.metrics import Metrics
from cxr_portal.model import (
    Caller,
    ModelClient,
    ModelError,
    ModelFailedError,
    ModelTimeoutError,
    RefusedError,
    UnknownClassError,
)
from cxr_portal.problems import ProblemError, busy, unavailable
from cxr_portal.settings import Settings
from cxr_portal.store import IdempotencyError, Store

_audit = logging.getLogger("cxr_portal.audit")
_T = TypeVar("_T")


@dataclass(kw_only=True)
class End:
    """How far the gateway's end has come.

    Attributes:
        draining: it is not ready any more, but still takes requests.
        closing: it takes none, and event streams are to end.
    """

    draining: bool = False
    closing: bool = False


@dataclass(kw_only=True)
class Gateway:
    """Everything that a request may need.

    Attributes:
        end: how far the gateway's end has come.
        in_flight: images of requests for predictions that the model is asked about now.
    """

    settings: Settings
    store: Store
    model: ModelClient
    jobs: JobRunner
    authenticator: Authenticator
    rates: RateLimits
    metrics: Metrics
    end: End
    in_flight: int = 0

    async def predictions(
        self,
        images: Sequence[bytes | RefusedImage],
        caller: Caller,
        *,
        explain: bool | str = False,
    ) -> Predictions:
        """Ask about all images at once.

        Raises:
            ProblemError: there is no answer to one, no image can be used, or too much is asked.
        """
        with self._flight(len(images)):
            answers = await self._ask(images, caller, explain)
        for answer in answers:
            outcome = answer.reason if isinstance(answer, RefusedImage) else answer.outcome
            self.metrics.images.labels("request", outcome).inc()
        refused = [answer for answer in answers if isinstance(answer, RefusedImage)]
        if len(refused) == len(answers):
            raise _none_usable(refused)
        return Predictions(
            request_id=caller.request_id, model=self.settings.model, images=tuple(answers)
        )

    async def _ask(
        self, images: Sequence[bytes | RefusedImage], caller: Caller, explain: bool | str
    ) -> list[AnsweredImage | RefusedImage]:
        try:
            # One that fails ends the others: nobody will read their answers.
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._ask_one(image, index, caller, explain))
                    for index, image in enumerate(images)
                ]
        except ExceptionGroup as failures:
            raise _as_problem(failures.exceptions[0]) from None
        return [task.result() for task in tasks]

    async def _ask_one(
        self, image: bytes | RefusedImage, index: int, caller: Caller, explain: bool | str
    ) -> AnsweredImage | RefusedImage:
        if isinstance(image, RefusedImage):
            return image
        try:
            return await self.model.predict(image, index, caller, explain=explain)
        except RefusedError as error:
            return RefusedImage(index=index, reason=error.reason, detail=str(error))

    @contextmanager
    def _flight(self, images: int) -> Iterator[None]:
        if self.in_flight + images > self.settings.max_in_flight:
            raise busy()
        self.in_flight += images
        self.metrics.in_flight.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= images
            self.metrics.in_flight.set(self.in_flight)

    async def begin_once(self, principal: Principal, key: str, fingerprint: str) -> str | None:
        """Begin a request with an idempotency key; the first one's answer, if there was one.

        Raises:
            ProblemError: the key belongs to another request, or its first one still runs.
        """
        lease = timedelta(seconds=2 * self.settings.timeout)
        try:
            answer: str | None = await in_database(
                self.store.begin_once, principal.id, key, fingerprint, lease
            )
        except IdempotencyError as error:
            if error.running:
                raise ProblemError(
                    HTTPStatus.CONFLICT,
                    "still-running",
                    "The first request with this idempotency key has no answer yet.",
                    headers={"Retry-After": "1"},
                ) from None
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                "This idempotency key belongs to another request.",
            ) from None
        return answer


def _none_usable(refused: Sequence[RefusedImage]) -> ProblemError:
    """Why a request has no answer whose images are all refused."""
    statuses = {RefusedError(image.reason, "").status for image in refused}
    first = refused[0]
    detail = first.detail
    if len(refused) > 1:
        detail = f"None of the {len(refused)} images can be used; the first: {first.detail}"
    return ProblemError(
        statuses.pop() if len(statuses) == 1 else HTTPStatus.BAD_REQUEST,
        "image-refused",
        detail,
        images=[image.model_dump(mode="json") for image in refused],
    )


def _as_problem(error: Exception) -> Exception:
    if isinstance(error, UnknownClassError):
        return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, "not-explainable", str(error))
    return model_problem(error) if isinstance(error, ModelError) else error


def model_problem(error: ModelError) -> ProblemError:
    """Why the model gave no answer."""
    if isinstance(error, ModelTimeoutError):
        return ProblemError(HTTPStatus.GATEWAY_TIMEOUT, "model-timeout", str(error))
    if isinstance(error, ModelFailedError):
        return ProblemError(HTTPStatus.BAD_GATEWAY, "model-failed", str(error))
    return unavailable("model-unavailable", str(error), error.retry_after or 1.0)


async def in_database(call: Any, *arguments: Any, **named: Any) -> Any:
    """Do something in the database, in a thread.

    Raises:
        ProblemError: it does not answer (503).
    """
    try:
        return await asyncio.to_thread(call, *arguments, **named)
    except SQLAlchemyError:
        raise unavailable(
            "database-unavailable", "The gateway's database does not answer; try again later."
        ) from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Do something for a client, and stop where it has left.

    Raises:
        ClientDisconnect: it has.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        leaving.cancel()
        working.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def audit(action: str, principal: Principal, **facts: object) -> None:
    """Write down who did what; facts are counts and ids of our own, never content or names."""
    words = " ".join(f"{key}={value}" for key, value in facts.items())
    _audit.info(
        "%s %s %s",
        action,
        principal.id,
        words,
        extra={"action": action, "principal": principal.id} | facts,
    )
