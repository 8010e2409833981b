"""Which request comes next: scenarios and kinds of image in proportion to their weights."""

import itertools
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from cxr_loadtests.profile import ImageKind, Scenario, ThinkTime
from cxr_loadtests.scenarios import Request

Item = TypeVar("Item", bound=Hashable)


class Turns(Generic[Item]):
    """Items in turn, each as often as its weight says, evenly spread.

    A run is short: drawn at random, a rare scenario could be missing in it.
    """

    def __init__(self, weights: Mapping[Item, float]) -> None:
        self._weights = dict(weights)
        self._total = sum(self._weights.values())
        self._credit = dict.fromkeys(self._weights, 0.0)

    def next(self) -> Item:
        """The item whose turn it is (smooth weighted round robin)."""
        for item, weight in self._weights.items():
            self._credit[item] += weight
        chosen = max(self._credit, key=lambda item: self._credit[item])
        self._credit[chosen] -= self._total
        return chosen


class Mix:
    """The requests of a run, without an end."""

    def __init__(
        self,
        requests: Sequence[Request],
        weights: Mapping[Scenario, float],
        kinds: Sequence[ImageKind],
    ) -> None:
        """Prepare the turns.

        Args:
            requests: every request that may be sent.
            weights: of each scenario; those without requests are left out.
            kinds: the profile's kinds of image, which have weights of their own.
        """
        groups: dict[tuple[Scenario, int], list[Request]] = {}
        for request in requests:
            groups.setdefault((request.scenario, request.kind), []).append(request)
        self._members: dict[tuple[Scenario, int], Iterator[Request]] = {
            key: itertools.cycle(members) for key, members in groups.items()
        }
        by_scenario: dict[Scenario, dict[int, float]] = {}
        for scenario, kind in groups:
            by_scenario.setdefault(scenario, {})[kind] = kinds[kind].weight
        self._scenarios = Turns({name: weights[name] for name in by_scenario})
        self._kinds = {name: Turns(found) for name, found in by_scenario.items()}

    def next(self) -> Request:
        """The request whose turn it is."""
        scenario = self._scenarios.next()
        return next(self._members[scenario, self._kinds[scenario].next()])


def pause(think: ThinkTime, random: random.Random) -> float:
    """Seconds until a client asks again."""
    if not think.median_seconds:
        return 0.0
    drawn = think.median_seconds * random.lognormvariate(0, think.sigma)
    return min(drawn, think.longest_seconds)
