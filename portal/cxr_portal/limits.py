"""How much a caller may ask for."""

import logging
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar

from limits import RateLimitItemPerMinute
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

from cxr_portal.auth import Principal
from cxr_portal.metrics import Metrics
from cxr_portal.problems import ProblemError
from cxr_portal.settings import Settings

log = logging.getLogger(__name__)

# Seconds that the shared storage has for an answer.
_STORAGE_TIMEOUT = 0.5
_T = TypeVar("_T")


class RateLimits:
    """Images a minute of each caller: of all gateways together where they share a storage.

    While that does not answer, each gateway counts by itself.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._default = settings.images_per_minute
        self._metrics = metrics
        self._own = MovingWindowRateLimiter(storage_from_string("async+memory://"))
        self._shared = _shared(settings.rate_storage) if settings.rate_storage else None

    async def check(self, principal: Principal) -> None:
        """Refuse a caller who may not ask about a single image now.

        Raises:
            ProblemError: too many in the last minute (429).
        """
        item = self._item(principal)
        if not await self._counted(lambda limiter: limiter.test(item, principal.id)):
            raise await self._refusal(principal)

    async def spend(self, principal: Principal, images: int) -> None:
        """Count images.

        Raises:
            ProblemError: more than the caller may ask about now (429); then none counts.
        """
        item = self._item(principal)
        if not await self._counted(lambda limiter: limiter.hit(item, principal.id, cost=images)):
            raise await self._refusal(principal)

    async def _counted(self, ask: Callable[[MovingWindowRateLimiter], Awaitable[_T]]) -> _T:
        if self._shared is not None:
            try:
                return await ask(self._shared)
            except StorageError as error:
                self._metrics.rate_storage_errors.inc()
                log.error(
                    "the storage of limits does not answer (%s): this gateway counts by itself",
                    type(error.storage_error).__name__,
                )
        return await ask(self._own)

    def _item(self, principal: Principal) -> RateLimitItemPerMinute:
        return RateLimitItemPerMinute(principal.images_per_minute or self._default)

    async def _refusal(self, principal: Principal) -> ProblemError:
        item = self._item(principal)
        window = await self._counted(lambda limiter: limiter.get_window_stats(item, principal.id))
        self._metrics.refused_callers.labels("rate").inc()
        wait = max(1, round(window.reset_time - time.time()))
        return ProblemError(
            HTTPStatus.TOO_MANY_REQUESTS,
            "too-many-images",
            f"These credentials allow {item.amount} images a minute; try again later.",
            headers={"Retry-After": str(wait)},
        )


def _shared(url: str) -> MovingWindowRateLimiter:
    storage = storage_from_string(
        f"async+{url}",
        # Which speaks to Redis, too.
        implementation="valkey",
        wrap_exceptions=True,
        socket_timeout=_STORAGE_TIMEOUT,
        socket_connect_timeout=_STORAGE_TIMEOUT,
    )
    return MovingWindowRateLimiter(storage)
