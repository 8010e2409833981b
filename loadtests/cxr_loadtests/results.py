"""What a run has found: the document `result.json`, and figures of parts of it."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.histogram import Buckets, merged, percentile
from cxr_loadtests.profile import Profile, Strict

RESULT_FILE = "result.json"
# The knee is where this share of the highest throughput is reached: more clients then only wait.
KNEE_SHARE = 0.95
# Seconds after it was due; a request that leaves later was held up by the generator.
LONGEST_LAG = 0.1


class PhaseRecord(Strict):
    """A phase as it was.

    Attributes:
        start: Unix time.
        end: Unix time.
        users: clients of the closed model; None in the open one.
        rate: requests a second of the open model.
        settle: seconds after `start` that count for nothing.
    """

    name: str
    start: float
    end: float
    users: int | None
    rate: float | None
    settle: float
    judged: bool
    step: bool

    @property
    def seconds(self) -> float:
        """Length of the part that counts."""
        return self.end - self.start - self.settle

    def holds(self, second: int) -> bool:
        """Whether that whole second counts."""
        return self.start + self.settle <= second < self.end - 1


class BinRecord(Strict):
    """One second of one scenario over one protocol.

    Attributes:
        second: Unix time.
        buckets: latencies of the requests asked in it (sent or, in the open model, due) that were
            answered as expected.
        failures: the other requests asked in it, by what went wrong.
        answers: those as expected that came in it, whenever they were asked for.
    """

    second: int
    scenario: str
    protocol: str
    buckets: dict[int, int]
    failures: dict[str, int]
    answers: int


class CodeRecord(Strict):
    """Answers with one code over one protocol; an empty code stands for no answer."""

    protocol: str
    code: str
    from_server: bool
    count: int


class Step(Strict):
    """One step: clients without a pause, and what they got.

    Attributes:
        throughput: answers as expected that came, a second.
        error_ratio: of all requests.
        p50: seconds, as the other two.
    """

    users: int
    throughput: float
    error_ratio: float
    p50: float | None
    p95: float | None
    p99: float | None


class Check(Strict):
    """One thing that was promised.

    Attributes:
        name: what it is about.
        promised: in words.
        observed: in words.
    """

    name: str
    promised: str
    observed: str
    passed: bool


class Verdict(Strict):
    """Whether everything that was promised was kept.

    Attributes:
        notes: what could not be judged, a sentence each.
    """

    passed: bool
    checks: list[Check]
    notes: list[str] = Field(default_factory=list)


class Series(Strict):
    """A figure of the server over time.

    Attributes:
        name: what it is.
        unit: of `values`.
        group: figures that belong into one picture.
        times: Unix time.
    """

    name: str
    group: Literal["stages", "replicas", "queue", "memory"]
    unit: str
    times: list[float]
    values: list[float]


class Generator(Strict):
    """How the load generator itself fared.

    Attributes:
        workers: processes that sent requests.
        lost: of these, how many have left before the end.
        busy: whether one used its processor core to more than 90 %, so that latencies may be its
            own.
        lag_p99: seconds after they were due within which 99 % of the open model's requests were
            sent; None without any.
        unfinished: requests that had no outcome when the run ended; they count as failed.
    """

    workers: int
    lost: int
    busy: bool
    lag_p99: float | None
    unfinished: int

    @property
    def note(self) -> str:
        """What a reader of latencies should know; empty where the generator kept up."""
        late = self.lag_p99 is not None and self.lag_p99 > LONGEST_LAG
        if not self.busy and not late:
            return ""
        what = "used its processor core to more than 90 %" if self.busy else ""
        if late and self.lag_p99 is not None:
            sent = f"sent requests up to {self.lag_p99 * 1000:.0f} ms late (p99)"
            what = f"{what} and {sent}" if what else sent
        return f"The load generator {what}: some of the latency is its own."


class Reconciliation(Strict):
    """What clients and servers counted.

    Attributes:
        source: where the servers' counts come from.
        sent: by clients.
        answered: answers of the server itself that clients have got.
        counted: requests by the servers.
        by_code: protocol and code, then both counts.
    """

    source: str
    sent: int
    answered: int
    counted: int
    by_code: list[tuple[str, str, int, int]]


class Result(Strict):
    """A run.

    Attributes:
        prometheus: whether it was asked for the servers' side.
        unknown: why the servers' side, or a part of it, is missing; empty where it was not asked
            for, or is whole.
    """

    schema_version: Literal[1] = 1
    tool: str
    shape: str
    started: str
    target: dict[str, Any]
    reference: str
    versions: list[str]
    left_out: list[str]
    profile: Profile
    phases: list[PhaseRecord]
    bins: list[BinRecord]
    codes: list[CodeRecord]
    generator: Generator
    reconciliation: Reconciliation | None = None
    server: list[Series] = Field(default_factory=list)
    prometheus: bool = False
    unknown: str = ""
    verdict: Verdict | None = None

    def save(self, folder: Path) -> Path:
        """Write `result.json` into a folder."""
        path = folder / RESULT_FILE
        path.write_text(self.model_dump_json(), encoding="utf-8")
        return path


def load_result(path: Path) -> Result:
    """Read a result: the file, or the folder that holds it.

    Raises:
        LoadTestError: it cannot be read, or is none.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        return Result.model_validate_json(file.read_bytes())
    except OSError as error:
        raise LoadTestError(f"Cannot read {file}: {error.strerror}.") from error
    except ValidationError as error:
        raise LoadTestError(f"{file} is not the result of a load test.") from error


@dataclass(frozen=True)
class Figures:
    """Requests of some seconds, taken together.

    Attributes:
        answered: requests asked in them that were answered as expected, whenever that was.
        failures: the others, by what went wrong.
        seconds: length of the time that they are from.
        buckets: latencies of those answered.
        answers: those as expected that came in these seconds, whenever they were asked for.
    """

    answered: int
    failures: Counter[str]
    seconds: float
    buckets: Buckets
    answers: int

    @property
    def failed(self) -> int:
        """Requests that were not answered as expected."""
        return sum(self.failures.values())

    @property
    def error_ratio(self) -> float:
        """Share of the requests that failed; NaN without requests."""
        total = self.answered + self.failed
        return self.failed / total if total else math.nan

    @property
    def throughput(self) -> float:
        """Answers as expected that came, a second.

        Counted by request, a service that falls behind would seem to keep up with the rate that is
        sent: its answers come after these seconds.
        """
        return self.answers / self.seconds if self.seconds > 0 else 0.0

    def percentile(self, share: float) -> float | None:
        """Seconds that a share of the answers did not exceed; None without answers."""
        return percentile(self.buckets, share)


def pooled(bins: Iterable[BinRecord], seconds: float) -> Figures:
    """Figures of some bins that are from so many seconds."""
    found = list(bins)
    buckets = merged(item.buckets for item in found)
    failures: Counter[str] = Counter()
    for item in found:
        failures.update(item.failures)
    answers = sum(item.answers for item in found)
    return Figures(sum(buckets.values()), failures, seconds, buckets, answers)


def figures(
    result: Result,
    phases: Sequence[PhaseRecord],
    wanted: Callable[[BinRecord], bool] | None = None,
) -> Figures:
    """Figures of the parts of some phases that count, and of those bins that are wanted."""
    bins = [
        item
        for item in result.bins
        if (wanted is None or wanted(item)) and any(phase.holds(item.second) for phase in phases)
    ]
    seconds = sum(
        sum(phase.holds(second) for second in range(int(phase.start), int(phase.end) + 1))
        for phase in phases
    )
    return pooled(bins, float(seconds))


def steps(result: Result) -> list[Step]:
    """The steps of a run, fewest clients first."""
    found = []
    for phase in result.phases:
        if phase.step and phase.users is not None:
            some = figures(result, [phase], lambda item: item.scenario != "bad-input")
            found.append(
                Step(
                    users=phase.users,
                    throughput=some.throughput,
                    error_ratio=some.error_ratio,
                    p50=some.percentile(0.5),
                    p95=some.percentile(0.95),
                    p99=some.percentile(0.99),
                )
            )
    return sorted(found, key=lambda step: step.users)


def knee(found: Sequence[Step]) -> Step | None:
    """The fewest clients that reach 95 % of the highest throughput; None without steps."""
    highest = max((step.throughput for step in found), default=0.0)
    return next((step for step in found if step.throughput >= KNEE_SHARE * highest > 0), None)


def saturated(found: Sequence[Step]) -> bool:
    """Whether two steps beyond the knee have brought no more answers."""
    at = knee(found)
    return at is not None and len(found) - list(found).index(at) > 2  # noqa: PLR2004


def judged_phases(result: Result) -> list[PhaseRecord]:
    """The phases that latency and throughput objectives are about.

    Those that the shape says; where it says none, the step at the knee. Where no step has got an
    answer, all steps.
    """
    judged = [phase for phase in result.phases if phase.judged]
    if judged:
        return judged
    at = knee(steps(result))
    return [
        phase for phase in result.phases if phase.step and (at is None or phase.users == at.users)
    ]
