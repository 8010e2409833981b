"""What clients saw, second by second, small enough to be sent from worker to master."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cxr_loadtests.histogram import Buckets, bucket
from cxr_loadtests.results import BinRecord
from cxr_loadtests.scenarios import Outcome, Request

# Unix time, scenario and protocol.
Key = tuple[int, str, str]
CUT_OFF = "no outcome when the run ended"


@dataclass
class Bin:
    """One second of one scenario over one protocol.

    Attributes:
        buckets: latencies of the requests asked in it that were answered as expected.
        failures: the other requests asked in it, by what went wrong.
        answers: those as expected that came in it, whenever they were asked for.
    """

    buckets: Buckets = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    answers: int = 0


class Recorder:
    """Counts requests; those of several processes can be merged.

    A request belongs to the second in which it was asked: sent or, in the open model, due. What
    hangs ends much later, when the phase that it was asked in may be over.

    Attributes:
        bins: by second, scenario and protocol.
        codes: answers by protocol, code and whether the server itself gave it; the code is empty
            where there was no answer.
        under_way: requests without an outcome, by when they were asked; since the last `drain`,
            and so negative where more have ended.
        lags: how much later than due the open model has sent, as a histogram.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.bins: dict[Key, Bin] = {}
        self.codes: Counter[tuple[str, str, bool]] = Counter()
        self.under_way: Counter[Key] = Counter()
        self.lags: Buckets = Counter()

    def start(self, request: Request, asked: float) -> Key:
        """Count one request that is under way from now on.

        Args:
            request: what is sent.
            asked: when it was sent or, in the open model, due, as `time.monotonic`.

        Returns:
            where it belongs, for `finish`.
        """
        second = int(time.time() - (time.monotonic() - asked))
        key = (second, request.scenario, request.protocol)
        self.under_way[key] += 1
        return key

    def finish(self, key: Key, outcome: Outcome, seconds: float) -> None:
        """Count one request that has ended.

        Args:
            key: what `start` has said of it.
            outcome: what became of it.
            seconds: from when it was asked.
        """
        self.under_way[key] -= 1
        _, scenario, protocol = key
        if outcome.failure:
            self._bin(key).failures[outcome.failure] += 1
        else:
            self._bin(key).buckets[bucket(seconds)] += 1
            self._bin((int(time.time()), scenario, protocol)).answers += 1
        self.codes[protocol, outcome.code, outcome.from_server] += 1

    def cut_off(self) -> int:
        """Count what is still under way as failed, and say how many requests that are."""
        cut = +self.under_way
        for key, count in cut.items():
            self._bin(key).failures[CUT_OFF] += count
            self.codes[key[2], "", False] += count
        self.under_way.clear()
        return cut.total()

    def records(self) -> list[BinRecord]:
        """What was counted until now, second by second."""
        return [
            BinRecord(
                second=second,
                scenario=scenario,
                protocol=protocol,
                buckets=dict(found.buckets),
                failures=dict(found.failures),
                answers=found.answers,
            )
            for (second, scenario, protocol), found in sorted(self.bins.items())
        ]

    def drain(self) -> dict[str, Any]:
        """What was counted since the last time, as plain data; it is forgotten here."""
        document = {
            "bins": [
                [*key, list(found.buckets.items()), list(found.failures.items()), found.answers]
                for key, found in self.bins.items()
            ],
            "codes": [[*key, count] for key, count in self.codes.items()],
            "under_way": [[*key, count] for key, count in self.under_way.items() if count],
            "lags": list(self.lags.items()),
        }
        self._clear()
        return document

    def merge(self, document: dict[str, Any]) -> None:
        """Add what another process has drained."""
        for second, scenario, protocol, buckets, failures, answers in document["bins"]:
            found = self._bin((second, scenario, protocol))
            found.buckets.update(dict(_pairs(buckets)))
            found.failures.update(dict(_pairs(failures)))
            found.answers += answers
        for protocol, code, server, count in document["codes"]:
            self.codes[protocol, code, server] += count
        for second, scenario, protocol, count in document["under_way"]:
            self.under_way[second, scenario, protocol] += count
        self.lags.update(dict(_pairs(document["lags"])))

    def _bin(self, key: Key) -> Bin:
        if key not in self.bins:
            self.bins[key] = Bin()
        return self.bins[key]


def _pairs(items: Sequence[Sequence[Any]]) -> list[tuple[Any, Any]]:
    return [(key, value) for key, value in items]
