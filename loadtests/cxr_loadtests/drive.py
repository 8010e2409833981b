"""Locust drives the clients. Importing this module replaces blocking calls in the whole process."""

# First: Locust lets gevent replace Python's sockets and sleeps, before anything has used them.
import locust  # isort: skip
from grpc.experimental import gevent as grpc_gevent  # isort: skip

grpc_gevent.init_gevent()

import logging  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any, Self  # noqa: E402

import gevent  # noqa: E402
from gevent.event import Event  # noqa: E402
from gevent.pool import Pool  # noqa: E402
from locust.env import Environment  # noqa: E402
from locust.runners import WorkerRunner  # noqa: E402

from cxr_loadtests.clients import GrpcClient, RestClient  # noqa: E402
from cxr_loadtests.errors import LoadTestError  # noqa: E402
from cxr_loadtests.histogram import bucket, percentile  # noqa: E402
from cxr_loadtests.mix import Mix, pause  # noqa: E402
from cxr_loadtests.plan import Plan  # noqa: E402
from cxr_loadtests.profile import Phase, Shape  # noqa: E402
from cxr_loadtests.recorder import Recorder  # noqa: E402
from cxr_loadtests.results import (  # noqa: E402
    BinRecord,
    CodeRecord,
    Generator,
    PhaseRecord,
    Step,
    knee,
    pooled,
    saturated,
)
from cxr_loadtests.scenarios import Outcome, Request, check  # noqa: E402

log = logging.getLogger(__name__)

DEFAULT_PORT = 5557
# Connections of the open model: requests share them, as those of many clients share a gateway's.
_REST_CONNECTIONS = 64
_GRPC_CONNECTIONS = 8
_WORKERS_SECONDS = 120.0
# How much longer than a request's timeout the run waits at its end, so that one that hangs fails.
_OVERTIME_SECONDS = 5.0
# How long workers may take to stop, beyond that.
_LAST_REPORT_SECONDS = 15.0
# Users that start or leave within a second; Locust warns above.
_AT_ONCE = 100.0
_UNSENT = "not sent: too many requests under way"


class State:
    """What the users of this process share.

    Attributes:
        interrupted: whether the run is to end now.
        over: when it came to its end, as `time.monotonic`; None before.
        recorder: what they saw.
        rate: requests a second that this process sends in the open model.
        think: whether clients of the closed model pause.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.over: float | None = None
        self.recorder = Recorder()
        self.rate = 0.0
        self.think = True
        self.plan: Plan | None = None
        self._mix: Mix | None = None
        self.random = random.Random()  # noqa: S311 - pauses and gaps

    def interrupt(self) -> None:
        """End the run; what there is will be judged."""
        self.interrupted = True

    def take(self, plan: Plan) -> None:
        """Get ready for a plan."""
        self.plan = plan
        self._mix = Mix(plan.requests(), plan.profile.scenarios, plan.profile.images)

    @property
    def ready(self) -> Plan:
        """The plan."""
        if self.plan is None:
            raise LoadTestError("This worker has no plan from its master.")
        return self.plan

    @property
    def patience(self) -> float:
        """Seconds after which every request has ended."""
        return self.ready.profile.timeout_seconds + _OVERTIME_SECONDS

    def next(self) -> Request:
        """The request whose turn it is in this process."""
        assert self._mix is not None  # noqa: S101 - `take` comes first
        return self._mix.next()

    def phase(self, environment: Any, msg: Any, **_: Any) -> None:  # noqa: ARG002 - Locust's names
        """Hear of a new phase from the master."""
        self.rate, self.think = msg.data["rate"], msg.data["think"]

    def finish(self, environment: Any, msg: Any, **_: Any) -> None:  # noqa: ARG002 - Locust's names
        """Hear from the master that the run is over."""
        self.over = time.monotonic()

    def ask(
        self, rest: RestClient, grpc: GrpcClient | None, request: Request, asked: float
    ) -> Outcome:
        """Send a request, check its answer, and count both.

        Args:
            rest: connection to send it over.
            grpc: the same for gRPC.
            request: what to send.
            asked: when the clock starts, as `time.monotonic`.
        """
        plan = self.ready
        key = self.recorder.start(request, asked)
        client = grpc if request.protocol == "grpc" and grpc is not None else rest
        reply = client.send(request.sendable)
        seconds = time.monotonic() - asked
        outcome = check(request, reply, plan.expectations, plan.profile.tolerance)
        self.recorder.finish(key, outcome, seconds)
        return outcome


# Locust makes the users itself, and hands them nothing but the environment.
state = State()


class ClosedUser(locust.User):
    """A client that waits for its answer, pauses, and asks again.

    A slow answer also delays the requests that would have come after it (coordinated omission), so
    latencies of this model are those of so many patient clients, and no more.
    """

    def on_start(self) -> None:
        """Connect."""
        plan = state.ready
        timeout = plan.profile.timeout_seconds
        self._rest = RestClient(plan.target, timeout)
        self._grpc = GrpcClient(plan.target, timeout) if plan.target.grpc else None
        self._asking = gevent.spawn(lambda: None)

    def on_stop(self) -> None:
        """Wait for the answer, and leave."""
        self._asking.join(state.patience)
        self._rest.close()
        if self._grpc:
            self._grpc.close()

    def wait_time(self) -> float:
        """Seconds until the next request."""
        return pause(state.ready.profile.think_time, state.random) if state.think else 0.0

    @locust.task
    def ask(self) -> None:
        """One request, in a greenlet of its own: Locust can end a user in the middle of a task."""
        self._asking = gevent.spawn(self._ask)
        self._asking.join()

    def _ask(self) -> None:
        state.ask(self._rest, self._grpc, state.next(), time.monotonic())


class ArrivalUser(locust.User):
    """Sends requests when they are due, whatever has become of the earlier ones.

    The latency of a request counts from when it was due. So what waits because the service is slow
    is in the figures, and so would be what this process itself sends late.
    """

    def on_start(self) -> None:
        """Connect; the first request is due after one gap."""
        plan = state.ready
        timeout = plan.profile.timeout_seconds
        self._rest = RestClient(plan.target, timeout, connections=_REST_CONNECTIONS)
        self._grpcs = (
            [GrpcClient(plan.target, timeout) for _ in range(_GRPC_CONNECTIONS)]
            if plan.target.grpc
            else []
        )
        self._pool = Pool(plan.profile.longest_backlog)
        self._due = time.monotonic()
        self._number = 0

    def on_stop(self) -> None:
        """Wait for what is under way, and leave."""
        self._pool.join(state.patience)
        self._rest.close()
        for client in self._grpcs:
            client.close()

    def wait_time(self) -> float:
        """Nothing: the task waits until its request is due."""
        return 0.0

    @locust.task
    def arrive(self) -> None:
        """Send one request when it is due."""
        if state.rate <= 0:
            gevent.sleep(0.1)
            self._due = time.monotonic()
            return
        poisson = state.ready.profile.gaps == "poisson"
        gap = state.random.expovariate(state.rate) if poisson else 1 / state.rate
        self._due += gap
        gevent.sleep(max(0.0, self._due - time.monotonic()))
        if state.over is not None and self._due > state.over:
            return  # nobody would wait for its answer
        request = state.next()
        if self._pool.full():
            key = state.recorder.start(request, self._due)
            state.recorder.finish(key, Outcome("", _UNSENT, from_server=False), 0.0)
            return
        self._number += 1
        grpc = self._grpcs[self._number % len(self._grpcs)] if self._grpcs else None
        self._pool.spawn(self._send, request, grpc, self._due)

    def _send(self, request: Request, grpc: GrpcClient | None, due: float) -> None:
        state.recorder.lags[bucket(time.monotonic() - due)] += 1
        state.ask(self._rest, grpc, request, due)


@dataclass
class Driven:
    """What came out of a run.

    Attributes:
        phases: as they were.
        bins: what clients saw.
        codes: the answers of the whole run.
        generator: how the load generator fared.
    """

    phases: list[PhaseRecord]
    bins: list[BinRecord]
    codes: list[CodeRecord]
    generator: Generator


class _Schedule(locust.LoadTestShape):
    """Walks through the phases of a shape."""

    def __init__(self, shape: Shape, dispatchers: int, say: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shape = shape
        self._dispatchers = dispatchers
        self._say = say
        self._upcoming = list(shape.phases)
        self._phase: Phase | None = None
        self._began = 0.0
        self._rate: float | None = None
        self._model: type[locust.User] | None = None
        self._steps: list[Step] = []
        self.records: list[PhaseRecord] = []

    def tick(self) -> tuple[int, float, list[type[locust.User]]] | None:
        """The load of now; None at the end."""
        now = time.time()
        if state.interrupted:
            self._finish()
            return None
        if self._phase is None or now - self._began >= self._phase.seconds:
            self.end()
            self._phase = self._next()
            if self._phase is None:
                self._finish()
                return None
            self._begin(self._phase)
            model = ClosedUser if self._phase.users is not None else ArrivalUser
            if self._model not in (None, model):
                # Locust would keep users of the other model, so long as their number fits.
                leaving, self._model = self._model, model
                return 0, _AT_ONCE, [leaving]
            self._model = model
        users = self._phase.users or self._dispatchers
        return (
            users,
            min(float(users), _AT_ONCE),
            [ClosedUser if self._phase.users is not None else ArrivalUser],
        )

    def _finish(self) -> None:
        self.end()
        assert self.runner is not None  # noqa: S101 - `drive` has set it
        # Before Locust lets the users stop: workers hear nothing while they do.
        self.runner.send_message("over", {})

    def end(self) -> None:
        """The current phase is over."""
        if self._phase is None:
            return
        record = PhaseRecord(
            name=self._phase.name,
            start=self._began,
            end=time.time(),
            users=self._phase.users,
            rate=self._rate,
            settle=self._phase.settle,
            judged=self._phase.judged,
            step=self._phase.step,
        )
        self.records.append(record)
        self._tell(record)
        self._phase = None

    def _next(self) -> Phase | None:
        while self._upcoming:
            phase = self._upcoming.pop(0)
            if phase.step and self._shape.stop_at_knee and saturated(self._steps):
                continue
            if phase.knee_share is not None and knee(self._steps) is None:
                self._say(f"{phase.name} is left out: no step has got an answer, so none is a knee")
                continue
            return phase
        return None

    def _begin(self, phase: Phase) -> None:
        self._say(f"{phase.name} begins")
        self._began = time.time()
        self._rate = phase.rate
        if phase.knee_share is not None:
            at = knee(self._steps)
            assert at is not None  # noqa: S101 - `_next` leaves it out otherwise
            self._rate = phase.knee_share * at.throughput
        # A process sends its part of the rate.
        rate = (self._rate or 0.0) / self._dispatchers
        assert self.runner is not None  # noqa: S101 - `drive` has set it
        self.runner.send_message("phase", {"rate": rate, "think": phase.think})

    def _tell(self, record: PhaseRecord) -> None:
        """Say what the phase has brought; of a step, also keep it."""
        found = [item for item in state.recorder.records() if record.holds(item.second)]
        good = [item for item in found if item.scenario != "bad-input"]
        whole = max(1, int(record.end - 1) - int(record.start + record.settle))
        some = pooled(good, float(whole))
        p50, p95, p99 = (some.percentile(share) for share in (0.5, 0.95, 0.99))
        load = f"{record.users} clients" if record.users else f"{record.rate or 0:.1f}/s due"
        shown = "no answer" if p95 is None else f"p95 {p95 * 1000:.0f} ms"
        failed = sum(sum(item.failures.values()) for item in found)
        waiting = sum(
            count
            for (second, *_), count in state.recorder.under_way.items()
            if record.holds(second)
        )
        self._say(
            f"{record.name}: {load}, {some.throughput:.1f}/s answered, {shown}, {failed} failed"
            + (f", {waiting} not answered yet" if waiting else "")
        )
        if record.step and record.users is not None:
            ratio = some.error_ratio if some.answered + some.failed else 1.0
            self._steps.append(
                Step(
                    users=record.users,
                    throughput=some.throughput,
                    error_ratio=ratio,
                    p50=p50,
                    p95=p95,
                    p99=p99,
                )
            )


class Crew:
    """Who sends the requests: this process, or workers, which may come before there is a plan.

    As a context, it lets the workers go at the end, also where there was no run.
    """

    def __init__(self, workers: int = 0, port: int = DEFAULT_PORT) -> None:
        """Wait for workers from now on.

        Args:
            workers: processes that send the requests, as `work`; without any, this one does.
            port: on which this process waits for workers.
        """
        self.workers = workers
        self.environment = Environment(user_classes=[ClosedUser, ArrivalUser])
        self._plan: Plan | None = None
        self._asked: set[str] = set()
        self._have: set[str] = set()
        self._ended: set[str] = set()
        # A worker that comes in place of a lost one does not make the run whole.
        self._expected: set[str] = set()
        if not workers:
            self.runner: Any = self.environment.create_local_runner()
            self.runner.register_message("phase", state.phase)
            self.runner.register_message("over", state.finish)
            return
        self.runner = self.environment.create_master_runner("*", port)
        self.runner.register_message("need-plan", self._need)
        self.runner.register_message("have-plan", self._has)
        self.runner.register_message("end", self._end_of)
        self.environment.events.worker_report.add_listener(_merge)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.quit()

    @property
    def lost(self) -> int:
        """Workers that began, and have not sent their last report."""
        return len(self._expected - self._ended)

    @property
    def busy(self) -> bool:
        """Whether a process had too much to do to send in time."""
        clients = self.runner.clients.values() if self.workers else []
        return bool(
            self.runner.cpu_warning_emitted or any(client.cpu_warning_emitted for client in clients)
        )

    def hand_out(self, plan: Plan) -> None:
        """Give every worker the plan, and wait until all have it.

        Raises:
            LoadTestError: they do not come.
        """
        self._plan = plan
        for node in tuple(self._asked):
            self._send_plan(node)
        end = time.monotonic() + _WORKERS_SECONDS
        while len(self._have) < self.workers:
            if time.monotonic() > end:
                raise LoadTestError(
                    f"Only {len(self._have)} of {self.workers} workers came within "
                    f"{_WORKERS_SECONDS:g} s."
                )
            gevent.sleep(0.2)
        self._expected = set(self._have)

    def stop(self) -> None:
        """End the load, and wait for the last reports."""
        self.runner.stop()
        end = time.monotonic() + state.patience + _LAST_REPORT_SECONDS
        while self.lost and time.monotonic() < end:
            gevent.sleep(0.1)

    def _send_plan(self, node: str) -> None:
        assert self._plan is not None  # noqa: S101 - its callers have looked
        self.runner.send_message("plan", self._plan.to_document(), client_id=node)

    def _need(self, environment: Any, msg: Any, **_: Any) -> None:  # noqa: ARG002 - Locust's names
        self._asked.add(msg.node_id)
        if self._plan is not None:
            self._send_plan(msg.node_id)

    def _has(self, environment: Any, msg: Any, **_: Any) -> None:  # noqa: ARG002
        self._have.add(msg.node_id)

    def _end_of(self, environment: Any, msg: Any, **_: Any) -> None:  # noqa: ARG002
        state.recorder.merge(msg.data)
        self._ended.add(msg.node_id)


def drive(plan: Plan, shape: Shape, crew: Crew, say: Callable[[str], None]) -> Driven:
    """Run a shape against a service; SIGINT ends it early.

    Args:
        plan: what is asked.
        shape: how much.
        crew: who sends the requests.
        say: is told when each phase begins, and how it went.

    Raises:
        LoadTestError: the workers do not come.
    """
    schedule = _Schedule(shape, max(1, crew.workers), say)
    runner = crew.runner
    crew.environment.shape_class = schedule
    state.take(plan)
    crew.environment.stop_timeout = state.patience
    crew.hand_out(plan)
    schedule.runner = runner
    problems: list[BaseException] = []
    handler = gevent.signal_handler(signal.SIGINT, state.interrupt)
    runner.start_shape()
    walker = runner.shape_greenlet
    walker.link_exception(lambda failed: problems.append(failed.exception))
    walker.join()
    schedule.end()
    handler.cancel()
    busy = crew.busy
    crew.stop()
    if problems:
        raise LoadTestError(str(problems[0])) from problems[0]
    recorder = state.recorder
    unfinished = recorder.cut_off()
    return Driven(
        phases=schedule.records,
        bins=recorder.records(),
        codes=[
            CodeRecord(protocol=protocol, code=code, from_server=server, count=count)
            for (protocol, code, server), count in sorted(recorder.codes.items())
        ],
        generator=Generator(
            workers=max(1, crew.workers),
            lost=crew.lost,
            busy=busy,
            lag_p99=percentile(recorder.lags, 0.99),
            unfinished=unfinished,
        ),
    )


def work(master: str, port: int, wait: float, say: Callable[[str], None]) -> None:
    """Send requests for a master until it says that the run is over.

    Args:
        master: host name or address.
        port: of the master.
        wait: seconds within which it must be there.
        say: is told when it is.

    Raises:
        LoadTestError: there is no master, or it is gone before the run is over.
    """
    environment = Environment(user_classes=[ClosedUser, ArrivalUser])
    none = LoadTestError(f"There was no master at {master}:{port} within {wait:g} s.")
    try:
        with gevent.Timeout(wait, none):
            runner: WorkerRunner = environment.create_worker_runner(master, port)
    except OSError as error:
        raise none from error
    say(f"The master at {master}:{port} is there.")
    # Locust counts from the first sign of life, which may never come.
    runner.last_heartbeat_timestamp = time.time()
    environment.events.report_to_master.add_listener(_report)  # type: ignore[no-untyped-call]

    def take(environment: Any, msg: Any, **_: Any) -> None:
        plan = Plan.from_document(msg.data)
        state.take(plan)
        environment.stop_timeout = state.patience
        runner.send_message("have-plan", {})

    runner.register_message("plan", take)
    runner.register_message("over", state.finish)
    runner.register_message("phase", state.phase)
    # Asked for, because what comes before the handler is there would be lost.
    runner.send_message("need-plan", {})
    stopped = Event()
    environment.events.test_stop.add_listener(lambda **_: stopped.set())  # type: ignore[no-untyped-call]
    # Without a master, Locust ends the runner's greenlets.
    while not stopped.wait(1) and len(runner.greenlet):
        pass
    runner.send_message("end", state.recorder.drain())
    gevent.sleep(1)
    if state.over is None:
        raise LoadTestError(
            f"The master at {master}:{port} ended, or fell silent, before the run was over."
        )


def _report(client_id: str, data: dict[str, Any]) -> None:  # noqa: ARG001 - Locust's names
    data["cxr"] = state.recorder.drain()


def _merge(client_id: str, data: dict[str, Any]) -> None:  # noqa: ARG001
    state.recorder.merge(data["cxr"])
