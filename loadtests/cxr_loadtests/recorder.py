"""What clients saw, second by second, small enough to be sent from worker to master."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cxr_loadtests.histogram import Buckets, bucket
from cxr_loadtests.scenarios import Outcome, Request

Key = tuple[int, str, str]


@dataclass
class Bin:
    """One second of one scenario over one protocol.

    Attributes:
        buckets: latencies of the answers that were as expected.
        failures: the others, by what went wrong.
    """

    buckets: Buckets = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)


class Recorder:
    """Counts requests; those of several processes can be merged.

    Attributes:
        bins: by second (Unix time of the answer), scenario and protocol.
        codes: answers by protocol, code and whether the server itself gave it; the code is empty
            where there was no answer.
        started: requests that were sent or, in the open model, due.
        lags: how much later than due the open model has sent, as a histogram.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.bins: dict[Key, Bin] = {}
        self.codes: Counter[tuple[str, str, bool]] = Counter()
        self.started = 0
        self.lags: Buckets = Counter()

    def finish(self, request: Request, outcome: Outcome, seconds: float) -> None:
        """Count one request that has ended.

        Args:
            request: what was sent.
            outcome: what became of it.
            seconds: from when it was sent or, in the open model, due.
        """
        found = self._bin((int(time.time()), request.scenario, request.protocol))
        if outcome.failure:
            found.failures[outcome.failure] += 1
        else:
            found.buckets[bucket(seconds)] += 1
        self.codes[request.protocol, outcome.code, outcome.from_server] += 1

    @property
    def finished(self) -> int:
        """Requests that have ended, in whatever way."""
        return sum(self.codes.values())

    def drain(self) -> dict[str, Any]:
        """What was counted since the last time, as plain data; it is forgotten here."""
        document = {
            "bins": [
                [*key, list(found.buckets.items()), list(found.failures.items())]
                for key, found in self.bins.items()
            ],
            "codes": [[*key, count] for key, count in self.codes.items()],
            "started": self.started,
            "lags": list(self.lags.items()),
        }
        self._clear()
        return document

    def merge(self, document: dict[str, Any]) -> None:
        """Add what another process has drained."""
        for second, scenario, protocol, buckets, failures in document["bins"]:
            found = self._bin((second, scenario, protocol))
            found.buckets.update(dict(_pairs(buckets)))
            found.failures.update(dict(_pairs(failures)))
        for protocol, code, server, count in document["codes"]:
            self.codes[protocol, code, server] += count
        self.started += document["started"]
        self.lags.update(dict(_pairs(document["lags"])))

    def _bin(self, key: Key) -> Bin:
        if key not in self.bins:
            self.bins[key] = Bin()
        return self.bins[key]


def _pairs(items: Sequence[Sequence[Any]]) -> list[tuple[Any, Any]]:
    return [(key, value) for key, value in items]
