"""Latencies as counts in buckets that grow by 1 %: small, mergeable, and exact to 0.5 %."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

_GROWTH = math.log(1.01)
_SMALLEST = 1e-4

Buckets = Counter[int]


def bucket(seconds: float) -> int:
    """The bucket of a latency."""
    return round(math.log(max(seconds, _SMALLEST) / _SMALLEST) / _GROWTH)


def seconds_of(number: int) -> float:
    """The latency that stands for a bucket."""
    return _SMALLEST * math.exp(number * _GROWTH)


def merged(parts: Iterable[Mapping[int, int]]) -> Buckets:
    """The counts of several histograms together."""
    total: Buckets = Counter()
    for part in parts:
        total.update(part)
    return total


def percentile(buckets: Mapping[int, int], share: float) -> float | None:
    """The latency that a share (0 to 1) of the requests does not exceed; None without requests."""
    count = sum(buckets.values())
    if not count:
        return None
    rank = max(1, math.ceil(share * count))
    for number in sorted(buckets):
        rank -= buckets[number]
        if rank <= 0:
            return seconds_of(number)
    raise AssertionError("unreachable: the ranks end within the counts")


def mean(buckets: Mapping[int, int]) -> float:
    """Mean latency in seconds; NaN without requests."""
    count = sum(buckets.values())
    if not count:
        return math.nan
    return sum(seconds_of(number) * n for number, n in buckets.items()) / count
