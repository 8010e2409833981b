"""A fleet of replicas that follows its load: what a cluster would do, at any size.

Discrete events (SimPy): replicas that start and end, scrapes, and the autoscaler's loop with the
rules of Kubernetes' HorizontalPodAutoscaler, which KEDA uses, too. Requests are either events of
their own (`exact`), or a flow with the queueing theory of each second (`fluid`), which takes a day
of a thousand replicas in seconds. A test holds the two together.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simpy

from cxr_loadtests.profile import Positive, Strict

Array = npt.NDArray[np.float64]
Rate = Callable[[float], float]
Events = Generator[simpy.Event, Any, None]

# HPA's defaults: how many replicas may come within 15 s, at least and as a share.
_UP_PODS, _UP_SHARE, _POLICY_SECONDS = 4, 1.0, 15.0
_TOLERANCE = 0.1
# Points of the distribution of latency within a second of the flow.
_QUANTILES = (np.arange(24) + 0.5) / 24
# Above this load of a second, waiting is what the flow has left over, not the steady state's.
_STEADY = 0.97
_STEP = 1.0


class Scaling(Strict):
    """How a fleet is scaled and fed; names are those of the chart's values where there are any.

    Attributes:
        metric: requests that are being answered, CPU use, or nothing.
        target: per replica: requests in flight, or CPU use as a share of what is requested.
        window: seconds over which Prometheus averages the requests in flight.
        scrape: seconds between two scrapes.
        interval: seconds between two decisions.
        up_stabilization: seconds; the smallest advice of these counts.
        down_stabilization: seconds; the largest advice of these counts.
        cold_start: seconds from the decision to a ready replica.
        cpu_seconds: that a request takes, for the metric `cpu`.
        cpu_request: cores that a replica requests, for the metric `cpu`.
        max_queue: images that one replica lets wait; more are refused.
        balancing: what the gateway does: each replica gets one of every round, in an order that
            changes (Traefik's, whose weighted round robin leaves it to a heap) or always the same
            (`turn`); or chance decides (kube-proxy).
    """

    metric: Literal["inFlight", "cpu", "none"] = "inFlight"
    target: Positive = 4.0
    min: int = 1
    max: int = 4
    window: Positive = 60.0
    scrape: Positive = 15.0
    interval: Positive = 15.0
    up_stabilization: float = 0.0
    down_stabilization: float = 300.0
    cold_start: Positive = 30.0
    cpu_seconds: Positive = 0.05
    cpu_request: Positive = 1.0
    max_queue: int = 1000
    balancing: Literal["rounds", "turn", "random"] = "rounds"


@dataclass(frozen=True)
class Service:
    """One replica, as it was measured.

    Attributes:
        seconds: times that single requests took when nothing else was there, as a sample.
        parallel: requests that a replica works on at once.
        slowdown: factor on `seconds` while 1, 2, ... `parallel` requests are worked on.
        held: share of a request's time for which the replica is taken; the rest is the way there
            and back, meanwhile the replica works on others.
    """

    seconds: Array
    parallel: int
    slowdown: tuple[float, ...]
    held: float = 1.0

    @property
    def throughput(self) -> float:
        """Most answers a second."""
        return self.parallel / (float(self.seconds.mean()) * self.held * self.slowdown[-1])


@dataclass
class Outcome:
    """What a simulation has found.

    Attributes:
        times: seconds since the start, one item a second, as the next three.
        rates: requests due a second.
        ready: replicas.
        asked: replicas that the scaler wants.
        latencies: seconds, a sample; each stands for as many requests as `weights` says.
        refused: requests beyond the queue.
    """

    times: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    latencies: list[Array] = field(default_factory=list)
    weights: list[Array] = field(default_factory=list)
    refused: float = 0.0

    def percentile(self, share: float) -> float:
        """Seconds that a share of the answers did not exceed; NaN without answers."""
        if not self.latencies:
            return math.nan
        values, weights = np.concatenate(self.latencies), np.concatenate(self.weights)
        order = np.argsort(values)
        total = np.cumsum(weights[order])
        return float(values[order][np.searchsorted(total, share * total[-1])])

    @property
    def replica_hours(self) -> float:
        """Hours of replicas, those that start included."""
        return sum(self.asked) * _STEP / 3600

    @property
    def mean_ready(self) -> float:
        """Ready replicas on average."""
        return float(np.mean(self.ready))


@dataclass(eq=False)
class _Replica:
    """A replica, from the decision to its end.

    Attributes:
        born: when it became ready; None before.
        gone: when it ended; None before.
        servers: what its requests queue for.
        samples: time and requests in flight of each scrape within the window; `total` of these.
    """

    born: float | None = None
    gone: float | None = None
    servers: Any = None
    in_flight: int = 0
    samples: deque[tuple[float, float]] = field(default_factory=deque)
    total: float = 0.0


class _Fleet:
    """Replicas, scrapes and the scaler; how requests are answered is the subclasses' part."""

    def __init__(
        self, rate: Rate, service: Service, scaling: Scaling, seconds: float, seed: int
    ) -> None:
        self.env = simpy.Environment()
        self.rate = rate
        self.service = service
        self.scaling = scaling
        self.seconds = seconds
        self.random = np.random.default_rng(seed)
        self.outcome = Outcome()
        self.replicas: list[_Replica] = []
        self.ready: list[_Replica] = []
        self.ended: list[_Replica] = []
        self.advice: deque[tuple[float, int]] = deque()
        self.changes: deque[tuple[float, int]] = deque()
        self.answered_lately = 0.0
        for _ in range(scaling.min):
            self._add().born = 0.0
        self.ready += self.replicas

    def run(self) -> Outcome:
        """Until the end."""
        for process in (self._watch(), self._scrape(), self._scale(), self.traffic()):
            self.env.process(process)
        self.env.run(until=self.seconds)
        return self.outcome

    def traffic(self) -> Events:
        """Requests."""
        raise NotImplementedError

    def load_of(self, replica: _Replica) -> float:
        """Requests in flight at a replica."""
        raise NotImplementedError

    def _add(self) -> _Replica:
        replica = _Replica(servers=simpy.Resource(self.env, capacity=self.service.parallel))
        self.replicas.append(replica)
        return replica

    def _start(self, replica: _Replica) -> Events:
        yield self.env.timeout(self.scaling.cold_start)
        if replica.gone is None:
            replica.born = self.env.now
            self.ready.append(replica)

    def _watch(self) -> Events:
        while True:
            self.outcome.times.append(self.env.now)
            self.outcome.rates.append(self.rate(self.env.now))
            self.outcome.ready.append(len(self.ready))
            self.outcome.asked.append(len(self.replicas))
            yield self.env.timeout(_STEP)

    def _scrape(self) -> Events:
        # Nobody's clocks agree, nor do they wait for the load.
        yield self.env.timeout(self.random.uniform(0, self.scaling.scrape))
        while True:
            oldest = self.env.now - self.scaling.window
            for replica in self.ready:
                load = self.load_of(replica)
                replica.samples.append((self.env.now, load))
                replica.total += load
            for replica in itertools.chain(self.replicas, self.ended):
                while replica.samples and replica.samples[0][0] <= oldest:
                    replica.total -= replica.samples.popleft()[1]
            self.ended = [replica for replica in self.ended if replica.samples]
            yield self.env.timeout(self.scaling.scrape)

    def _scale(self) -> Events:
        yield self.env.timeout(self.random.uniform(0, self.scaling.interval))
        while self.scaling.metric != "none":
            yield self.env.timeout(self.scaling.interval)
            self._become(self._limited(self._stable(self._wanted())))

    def _wanted(self) -> int:
        """The metric's advice, before anything dampens it."""
        current = len(self.replicas)
        if self.scaling.metric == "cpu":
            ready = max(1, len(self.ready))
            used = self.answered_lately * self.scaling.cpu_seconds / self.scaling.cpu_request
            ratio = used / ready / self.scaling.target
            if abs(ratio - 1) <= _TOLERANCE:
                return current
            if ratio > 1:
                # Replicas that still start count as idle, so that nobody is called twice.
                ratio = used / current / self.scaling.target
                return current if ratio <= 1 + _TOLERANCE else math.ceil(ratio * current)
            return math.ceil(ratio * ready)
        # The sum of the averages of all series, those that ended within the window included.
        total = sum(
            replica.total / len(replica.samples)
            for replica in itertools.chain(self.replicas, self.ended)
            if replica.samples
        )
        if abs(total / (self.scaling.target * current) - 1) <= _TOLERANCE:
            return current
        return math.ceil(total / self.scaling.target)

    def _stable(self, wanted: int) -> int:
        """Stabilisation: down to the largest advice of its window, up to the smallest of its."""
        now, current = self.env.now, len(self.replicas)
        self.advice.append((now, wanted))
        longest = max(self.scaling.up_stabilization, self.scaling.down_stabilization)
        while self.advice and self.advice[0][0] < now - longest:
            self.advice.popleft()
        up = min(advice for at, advice in self.advice if at >= now - self.scaling.up_stabilization)
        down = max(
            advice for at, advice in self.advice if at >= now - self.scaling.down_stabilization
        )
        if current < up:
            return up
        return down if current > down else current

    def _limited(self, wanted: int) -> int:
        """HPA's default policies, and the bounds."""
        now, current = self.env.now, len(self.replicas)
        while self.changes and self.changes[0][0] <= now - _POLICY_SECONDS:
            self.changes.popleft()
        if wanted > current:
            before = current - sum(change for _, change in self.changes if change > 0)
            most = max(before + _UP_PODS, math.ceil(before * (1 + _UP_SHARE)))
            wanted = min(wanted, max(current, most))
        return min(self.scaling.max, max(self.scaling.min, wanted))

    def _become(self, wanted: int) -> None:
        current = len(self.replicas)
        if wanted != current:
            self.changes.append((self.env.now, wanted - current))
        for _ in range(wanted - current):
            self.env.process(self._start(self._add()))
        for _ in range(current - wanted):
            # As Kubernetes does: those that are not ready first, then the youngest.
            leaving = max(self.replicas, key=lambda r: math.inf if r.born is None else r.born)
            leaving.gone = self.env.now
            self.replicas.remove(leaving)
            if leaving.born is not None:
                self.ready.remove(leaving)
            self.ended.append(leaving)


class _Exact(_Fleet):
    """Each request is an event."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._found: list[float] = []
        # Who has not had a request of this round yet, the last first.
        self._round: list[_Replica] = []

    def run(self) -> Outcome:
        """Until the end; the requests that are then under way do not count."""
        outcome = super().run()
        if self._found:
            outcome.latencies.append(np.asarray(self._found))
            outcome.weights.append(np.ones(len(self._found)))
        return outcome

    def load_of(self, replica: _Replica) -> float:
        return float(replica.in_flight)

    def traffic(self) -> Events:
        lately: deque[float] = deque()
        while True:
            rate = self.rate(self.env.now)
            if rate <= 0:
                yield self.env.timeout(_STEP)
                continue
            gap = float(self.random.exponential(1 / rate))
            if gap > _STEP:
                # The rate may be another by then; a gap has no memory.
                yield self.env.timeout(_STEP)
                continue
            yield self.env.timeout(gap)
            lately.append(self.env.now)
            while lately[0] < self.env.now - self.scaling.window:
                lately.popleft()
            self.answered_lately = len(lately) / min(self.scaling.window, max(_STEP, self.env.now))
            if not self.ready:
                self.outcome.refused += 1
                continue
            replica = self._chosen()
            if replica.in_flight >= self.scaling.max_queue:
                self.outcome.refused += 1
                continue
            self.env.process(self._request(replica))

    def _chosen(self) -> _Replica:
        ready = self.ready
        if self.scaling.balancing == "random":
            return ready[int(self.random.integers(len(ready)))]
        while True:
            if not self._round:
                order = np.arange(len(ready))[::-1]
                if self.scaling.balancing == "rounds":
                    order = self.random.permutation(order)
                self._round = [ready[place] for place in order]
            replica = self._round.pop()
            if replica.gone is None:
                return replica

    def _request(self, replica: _Replica) -> Events:
        due = self.env.now
        replica.in_flight += 1
        with replica.servers.request() as turn:
            yield turn
            busy = min(replica.servers.count, self.service.parallel)
            seconds = float(self.random.choice(self.service.seconds))
            held = seconds * self.service.held
            yield self.env.timeout(held * self.service.slowdown[busy - 1])
        replica.in_flight -= 1
        self._found.append(self.env.now - due + seconds - held)


class _Fluid(_Fleet):
    """Requests as a flow: each second has a rate, queues and a distribution of latency."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # What waits stays where it is: a queue does not move to replicas that come.
        self._queues: dict[_Replica, float] = {}
        self._under_way = 0.0
        self._service = np.quantile(self.service.seconds, _QUANTILES)
        self._spread = float(self.service.seconds.var() / self.service.seconds.mean() ** 2)

    def load_of(self, replica: _Replica) -> float:
        return self._queues.get(replica, 0.0) + self._under_way

    def traffic(self) -> Events:
        while True:
            count, rate = len(self.ready), self.rate(self.env.now)
            if not count:
                self.outcome.refused += rate * _STEP
                yield self.env.timeout(_STEP)
                continue
            capacity = self.service.throughput * _STEP
            before = np.zeros(count)
            if self._queues:
                before[:] = [self._queues.get(replica, 0.0) for replica in self.ready]
            waiting = before + rate * _STEP / count
            served = np.minimum(waiting, capacity)
            after = np.minimum(waiting - served, self.scaling.max_queue)
            self.outcome.refused += float(np.sum(waiting - served - after))
            self._queues = dict(zip(self.ready, after.tolist(), strict=True)) if after.any() else {}
            self.answered_lately = float(np.sum(served)) / _STEP
            # A queue is there as well in the second in which it is worked off.
            queued = np.maximum(before, after) > 0
            behind = (before + after) / 2 / self.service.throughput
            idle = ~queued
            busy = float(np.mean(served[idle])) / capacity if idle.any() else 1.0
            mean = self._latency(rate, count, busy, behind[queued])
            # Little's law.
            self._under_way = float(np.mean(served)) / _STEP * mean
            yield self.env.timeout(_STEP)

    def _latency(self, rate: float, count: int, busy: float, behind: Array) -> float:
        """Note how long requests of this second take; their mean at a replica without a queue.

        Args:
            rate: requests a second of all replicas.
            count: replicas.
            busy: share that is used of the capacity of those without a queue.
            behind: seconds until each queue is worked off.
        """
        servers = self.service.parallel
        at_work = max(1.0, busy * servers)
        factor = float(np.interp(at_work, np.arange(1, servers + 1), self.service.slowdown))
        way = self._service * (1 - self.service.held)
        service = self._service * self.service.held * factor
        load = min(busy, _STEADY)
        chance = erlang_c(servers, load * servers)
        held = float(service.mean())
        # Allen and Cunneen's approximation.
        spread = (self._unevenness(count, load) + self._spread) / 2
        mean_wait = chance * held / servers / (1 - load) * spread
        waits = np.zeros_like(_QUANTILES)
        if chance > 0 and mean_wait > 0:
            waiting = 1 - chance < _QUANTILES
            conditional = mean_wait / chance
            waits[waiting] = -conditional * np.log((1 - _QUANTILES[waiting]) / chance)
        self._note(way + service, waits, rate * (count - len(behind)) / count)
        if len(behind):
            full = self._service * self.service.held * self.service.slowdown[-1]
            self._note(way + full, np.quantile(behind, _QUANTILES), rate * len(behind) / count)
        return held + mean_wait

    def _unevenness(self, count: int, load: float) -> float:
        """Squared coefficient of variation of the gaps between two requests at one replica."""
        if self.scaling.balancing == "random":
            return 1.0
        # In turn, a gap is the sum of as many gaps as there are replicas.
        in_turn = 1 / count
        if self.scaling.balancing == "turn":
            return in_turn
        # In rounds it is the sum of 1 to 2 * count - 1. Short and long ones take turns, which
        # counts for less the longer the queue is: by how much, the events say (a test compares).
        return in_turn + (1 - in_turn**2) / 6 * min(1.0, 2 * (1 - load))

    def _note(self, service: Array, waits: Array, rate: float) -> None:
        if rate > 0:
            kept = np.quantile((service[:, None] + waits[None, :]).ravel(), _QUANTILES)
            self.outcome.latencies.append(kept)
            self.outcome.weights.append(np.full(len(kept), rate * _STEP / len(kept)))


def erlang_c(servers: int, load: float) -> float:
    """The chance that a request has to wait, with Poisson arrivals.

    Args:
        servers: how many.
        load: in servers, less than `servers`.
    """
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def simulate(
    rate: Rate,
    service: Service,
    scaling: Scaling,
    seconds: float,
    *,
    exact: bool = False,
    seed: int = 0,
) -> Outcome:
    """What a fleet would do.

    Args:
        rate: requests a second, by seconds since the start.
        service: one replica.
        scaling: how the fleet follows.
        seconds: length.
        exact: each request is an event.
        seed: of the gaps and service times.
    """
    fleet = (_Exact if exact else _Fluid)(rate, service, scaling, seconds, seed)
    return fleet.run()


def interpolated(points: Sequence[tuple[float, float]]) -> Rate:
    """A rate that goes straight from point to point: seconds, requests a second."""
    times = [at for at, _ in points]
    rates = [rate for _, rate in points]
    return lambda now: float(np.interp(now, times, rates))
