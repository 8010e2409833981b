"""Load tests: results made by hand, and `cxr loadtest` as a user runs it."""

import json
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from cxr_loadtests.clients import Sendable
from cxr_loadtests.histogram import bucket
from cxr_loadtests.profile import Profile
from cxr_loadtests.recorder import Recorder
from cxr_loadtests.results import BinRecord, CodeRecord, Generator, PhaseRecord, Result
from cxr_loadtests.scenarios import Outcome, Request
from support.bundles import encoded_image
from support.servers import CXR

START = 1_000_000
PROFILE: dict[str, Any] = {
    "timeout_seconds": 10,
    "images": [
        {"format": "jpeg", "height": 200, "count": 2},
        {"format": "dicom", "height": 100, "count": 1},
    ],
    "scenarios": dict.fromkeys(
        (
            "rest-v1",
            "rest-raw",
            "v2-json",
            "v2-binary",
            "grpc",
            "explain",
            "dicom",
            "bad-input",
        ),
        1,
    ),
    "think_time": {"median_seconds": 0.05},
    "shapes": {
        "all": {
            "description": "every kind of phase",
            "stop_at_knee": True,
            "phases": [
                {"name": "warm-up", "users": 2, "seconds": 2, "think": False},
                {"name": "1", "users": 1, "seconds": 4, "step": True, "think": False},
                {"name": "2", "users": 2, "seconds": 4, "step": True, "think": False},
                {"name": "half", "knee_share": 0.5, "seconds": 5, "judged": True},
            ],
        },
        "closed": {
            "description": "two clients",
            "phases": [{"name": "two", "users": 2, "seconds": 5, "judged": True}],
        },
        "open": {
            "description": "a rate",
            "phases": [{"name": "rate", "rate": 20, "seconds": 8, "judged": True}],
        },
    },
}
LENIENT = {"objectives": [{"name": "all", "error_ratio": 0.0, "p99_seconds": 20.0}]}


def make_result(
    latencies: Mapping[int, Sequence[float]],
    *,
    failures: Mapping[str, int] | None = None,
    scenario: str = "rest-raw",
    protocol: str = "v1",
    shape: str = "closed",
    phases: Sequence[PhaseRecord] | None = None,
    **changes: Any,
) -> Result:
    """A run: latencies by second since the start."""
    last = max(latencies) + 2
    bins = [
        BinRecord(
            second=START + second,
            scenario=scenario,
            protocol=protocol,
            buckets=dict(Counter(bucket(value) for value in values)),
            failures=dict(failures or {}) if second == min(latencies) else {},
            answers=len(values),
        )
        for second, values in latencies.items()
    ]
    answered = sum(len(values) for values in latencies.values())
    code = CodeRecord(protocol=protocol, code="200", from_server=True, count=answered)
    whole = make_phase("two", 0, last, judged=True)
    document: dict[str, Any] = {
        "tool": "0",
        "shape": shape,
        "started": "2026-01-01T00:00:00+00:00",
        "target": {"rest": "http://127.0.0.1", "grpc": None, "host": None, "model": "cxr"},
        "reference": "a test",
        "versions": ["1.0"],
        "left_out": [],
        "profile": Profile.model_validate(PROFILE),
        "phases": list(phases or [whole]),
        "bins": bins,
        "codes": [code],
        "generator": Generator(workers=1, lost=0, busy=False, lag_p99=None, unfinished=0),
    }
    return Result(**(document | changes))


class _Clock:
    """In place of the module `time`: seconds since the start."""

    now = 0.0

    def time(self) -> float:
        return START + self.now

    def monotonic(self) -> float:
        return self.now


def record(
    monkeypatch: pytest.MonkeyPatch, requests: Iterable[tuple[float, float | None, str]]
) -> Recorder:
    """What a generator counts of requests: when each is asked, how long it takes, what fails.

    Times are seconds since the start; a request without a length does not end.
    """
    clock, recorder = _Clock(), Recorder()
    monkeypatch.setattr("cxr_loadtests.recorder.time", clock)
    request = Request("rest-raw", "v1", Sendable("/", b""))
    begun: dict[int, Any] = {}
    events: list[tuple[float, int, Callable[[], None]]] = []

    def begin(number: int, asked: float) -> None:
        begun[number] = recorder.start(request, asked)

    def end(number: int, seconds: float, failure: str) -> None:
        code = "" if failure else "200"
        recorder.finish(begun[number], Outcome(code, failure, from_server=not failure), seconds)

    for number, (asked, seconds, failure) in enumerate(requests):
        events.append((asked, number, partial(begin, number, asked)))
        if seconds is not None:
            events.append((asked + seconds, number, partial(end, number, seconds, failure)))
    for clock.now, _, happen in sorted(events, key=lambda event: event[:2]):
        happen()
    return recorder


def make_phase(
    name: str, start: float, end: float, *, users: int | None = 2, **changes: Any
) -> PhaseRecord:
    """A phase: seconds since the start."""
    document = {"rate": None, "settle": 0.0, "judged": False, "step": False} | changes
    return PhaseRecord(name=name, start=START + start, end=START + end, users=users, **document)


def make_steps(throughputs: Mapping[int, int]) -> Result:
    """A run with a step for each number of clients, and so many answers a second."""
    phases, latencies = [], {}
    for number, (users, answers) in enumerate(throughputs.items()):
        start = 5 * number
        phases.append(make_phase(f"{users}", start, start + 5, users=users, step=True))
        for second in range(start, start + 5):
            latencies[second] = [users / answers] * answers
    return make_result(latencies, phases=phases, shape="step")


def write_inputs(folder: Path, objectives: Mapping[str, Any] = LENIENT) -> list[str]:
    """Options of `cxr loadtest run` for a small profile, objectives, and images."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number in (60, 160):
        (images / f"{number}.png").write_bytes(encoded_image(number, (160, 140), seed=number))
    (folder / "profile.yaml").write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
    (folder / "objectives.yaml").write_text(yaml.safe_dump(dict(objectives)), encoding="utf-8")
    return [
        f"--profile={folder / 'profile.yaml'}",
        f"--objectives={folder / 'objectives.yaml'}",
        f"--images={images}",
        f"--out={folder / 'out'}",
    ]


def loadtest(*arguments: object, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run `cxr loadtest` in a process of its own, as Locust needs it."""
    return subprocess.run(
        [CXR, "loadtest", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def verdict_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The checks of a run's verdict by name."""
    document = json.loads((folder / "out" / "verdict.json").read_text(encoding="utf-8"))
    return {check["name"]: check for check in document["checks"]}
