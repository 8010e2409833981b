"""How much a caller may ask for."""

import time
from http import HTTPStatus

from limits import RateLimitItemPerMinute
from limits.aio.strategies import MovingWindowRateLimiter
from limits.storage import storage_from_string

from cxr_portal.auth import Principal
from cxr_portal.metrics import Metrics
from cxr_portal.problems import ProblemError
from cxr_portal.settings import Settings


class RateLimits:
    """Images a minute of each caller."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._default = settings.images_per_minute
        self._metrics = metrics
        self._limiter = MovingWindowRateLimiter(storage_from_string(settings.rate_storage))

    async def check(self, principal: Principal) -> None:
        """Refuse a caller who may not ask about a single image now.

        Raises:
            ProblemError: too many in the last minute (429).
        """
        if not await self._limiter.test(self._item(principal), principal.id):
            raise await self._refusal(principal)

    async def spend(self, principal: Principal, images: int) -> None:
        """Count images.

        Raises:
            ProblemError: more than the caller may ask about now (429); then none counts.
        """
        if not await self._limiter.hit(self._item(principal), principal.id, cost=images):
            raise await self._refusal(principal)

    def _item(self, principal: Principal) -> RateLimitItemPerMinute:
        return RateLimitItemPerMinute(principal.images_per_minute or self._default)

    async def _refusal(self, principal: Principal) -> ProblemError:
        item = self._item(principal)
        window = await self._limiter.get_window_stats(item, principal.id)
        self._metrics.refused_callers.labels("rate").inc()
        wait = max(1, round(window.reset_time - time.time()))
        return ProblemError(
            HTTPStatus.TOO_MANY_REQUESTS,
            "too-many-images",
            f"These credentials allow {item.amount} images a minute; try again later.",
            headers={"Retry-After": str(wait)},
        )
