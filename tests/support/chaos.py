"""Faults in a running service, and the load that notices them."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cxr_loadtests.results import Figures, Result, load_result, pooled
from support.cluster import Gateway, Namespace, run, wait_for
from support.figures import report
from support.servers import CXR

RATE = 20.0
_TABLE = "cxr_chaos"
_LONGEST = 600
PROFILE: dict[str, Any] = {
    "timeout_seconds": 20,
    "images": [{"format": "jpeg", "height": 480, "count": 4}],
    "scenarios": {"rest-v1": 1, "rest-raw": 1, "v2-binary": 1, "grpc": 1},
    "think_time": {"median_seconds": 0},
    "shapes": {
        "chaos": {
            "description": "a constant rate until told to stop",
            "phases": [{"name": "chaos", "rate": RATE, "seconds": _LONGEST, "judged": True}],
        }
    },
}
# Each fault has promises of its own.
_OBJECTIVES = {"objectives": [{"name": "any", "error_ratio": 1.0}]}


class Storm:
    """`cxr loadtest` at a constant rate for as long as the block lasts.

    Every answer is checked; latency counts from when a request was due.

    Attributes:
        result: the run, once the block has ended.
    """

    def __init__(self, gateway: Gateway, archives: Sequence[Path], images: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        (self._folder / "profile.yaml").write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
        (self._folder / "objectives.yaml").write_text(yaml.safe_dump(_OBJECTIVES), encoding="utf-8")
        self._command = [
            CXR,
            "loadtest",
            "run",
            f"--host=http://{gateway.address}",
            f"--host-header={gateway.host}",
            f"--grpc={gateway.address}",
            f"--authority={gateway.grpc_host}",
            f"--profile={self._folder / 'profile.yaml'}",
            f"--objectives={self._folder / 'objectives.yaml'}",
            f"--images={images}",
            f"--out={self._folder / 'out'}",
            "--shape=chaos",
            *(f"--archive={archive}" for archive in archives),
        ]
        self.result: Result | None = None

    def __enter__(self) -> Self:
        self._log = (self._folder / "log").open("w+")
        self._process = subprocess.Popen(
            self._command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        wait_for(lambda: "begins" in self._said() or self._ended(), "load", 60)
        time.sleep(3)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                time.sleep(3)
            self._process.send_signal(signal.SIGINT)
            self._process.wait(90)
            if kind is None:
                assert (self._folder / "out" / "result.json").exists(), self._said()
                self.result = load_result(self._folder / "out")
        finally:
            self._process.kill()
            self._process.wait()
            self._log.close()
            shutil.rmtree(self._folder)

    def _ended(self) -> bool:
        return self._process.poll() is not None

    def _said(self) -> str:
        return (self._folder / "log").read_text(encoding="utf-8")

    @property
    def figures(self) -> Figures:
        assert self.result is not None
        phase = self.result.phases[0]
        return pooled(self.result.bins, phase.end - phase.start)

    @property
    def failures(self) -> Counter[str]:
        """What went wrong, and how often."""
        return self.figures.failures

    def failed_after(self, moment: float) -> int:
        """Requests due after a Unix time, or in the whole second that holds it, that failed."""
        assert self.result is not None
        late = [item for item in self.result.bins if item.second + 1 > moment]
        return sum(sum(item.failures.values()) for item in late)


@dataclass(frozen=True)
class Promise:
    """What a fault may do at most.

    Attributes:
        text: the same in words.
        failures: requests that may fail, with whatever code.
        p99: seconds.
    """

    text: str
    failures: int = 0
    p99: float | None = None


def keep(fault: str, promise: Promise, storm: Storm, more: str = "") -> None:
    """Print promised against observed, and check it."""
    found = storm.figures
    p99 = found.percentile(0.99)
    observed = (
        f"{found.answered + found.failed} requests, {found.failed} failed"
        + (f" {dict(found.failures)}" if found.failures else "")
        + f", p99 {0 if p99 is None else p99 * 1000:.0f} ms"
        + (f"; {more}" if more else "")
    )
    report(fault, f"promised {promise.text}; observed {observed}")
    assert found.answered > 50, observed
    assert found.failures["wrong answer"] == 0, observed
    assert found.failed <= promise.failures, observed
    if promise.p99 is not None:
        assert p99 is not None, observed
        assert p99 <= promise.p99, observed


def workers(action: str) -> str:
    """A program that does something to each process that runs the model, `pid`."""
    marks = ("model_service_worker", "cxr_server/worker.py")
    return (
        "import os, pathlib, signal, time\n"
        "stopped = []\n"
        "for folder in pathlib.Path('/proc').glob('[0-9]*'):\n"
        "    pid = folder.name\n"
        "    if int(pid) == os.getpid(): continue\n"
        "    try: command = (folder / 'cmdline').read_bytes().decode()\n"
        "    except OSError: continue\n"
        f"    if any(mark in command for mark in {marks}):\n"
        f"        {action}\n"
    )


# The processes that run the model stand still for a while.
STUTTER = (
    workers("stopped.append(int(pid)); os.kill(int(pid), signal.SIGSTOP)")
    + "time.sleep(3.5)\n"
    + "for pid in stopped: os.kill(pid, signal.SIGCONT)\n"
)


def process_of(pod: dict[str, Any]) -> int:
    """A process of a pod, whose network can be entered; this machine must be the pod's node."""
    uid = pod["metadata"]["uid"].replace("-", "[-_]")
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        with contextlib.suppress(OSError):
            if re.search(uid, path.read_text(encoding="ascii")):
                return int(path.parent.name)
    raise AssertionError("the pod's node is not this machine, or its processes cannot be seen")


@contextlib.contextmanager
def packet_rules(pod: dict[str, Any], *rules: str) -> Iterator[Callable[[], int]]:
    """nftables rules in a pod's network namespace; each begins with its chain: `input` or `output`,
    or `nat` for what comes in.

    Yields:
        how many packets the rules with a `counter` have met until now.
    """
    enter = ("nsenter", "-t", str(process_of(pod)), "-n", "nft")
    hooks = {"input": "filter", "output": "filter", "nat": "nat"}
    text = [f"table ip {_TABLE} {{"]
    for chain, kind in hooks.items():
        mine = [rule.partition(" ")[2] for rule in rules if rule.split()[0] == chain]
        hook = "prerouting" if chain == "nat" else chain
        priority = "dstnat" if chain == "nat" else "filter"
        if mine:
            text.append(f" chain {chain} {{ type {kind} hook {hook} priority {priority};")
            text += [f"  {rule}" for rule in mine]
            text.append(" }")
    text.append("}")
    run(*enter, "-f", "-", stdin="\n".join(text) + "\n")

    def met() -> int:
        listed = json.loads(run(*enter, "-j", "list", "table", "ip", _TABLE))["nftables"]
        parts = [part for item in listed if "rule" in item for part in item["rule"]["expr"]]
        return sum(part["counter"]["packets"] for part in parts if "counter" in part)

    try:
        yield met
    finally:
        run(*enter, "delete", "table", "ip", _TABLE, check=False)


def loss(percent: int) -> tuple[str, str]:
    """Rules that lose some of the packets, both ways."""
    rule = f"numgen random mod 100 < {percent} counter drop"
    return f"input {rule}", f"output {rule}"


# Passes a connection on, and everything half of the delay later in each direction.
_PROXY = """
import asyncio, sys
port, target, delay = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 2

async def pump(reader, writer):
    queue = asyncio.Queue()
    async def later():
        while True:
            due, data = await queue.get()
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
    task = asyncio.ensure_future(later())
    try:
        while True:
            data = await reader.read(65536)
            queue.put_nowait((asyncio.get_running_loop().time() + delay, data))
            if not data:
                return await task
    except OSError:
        task.cancel()

async def serve(reader, writer):
    try:
        near, far = await asyncio.open_connection("127.0.0.1", target)
    except OSError:
        writer.close()
        return
    await asyncio.gather(pump(reader, far), pump(near, writer), return_exceptions=True)
    for end in (far, writer):
        end.close()

async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", port)
    await server.serve_forever()

asyncio.run(main())
"""


# The same for datagrams; what has come is answered by a socket of its own.
_DATAGRAM_PROXY = """
import asyncio, sys
port, target, delay = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

class Far(asyncio.DatagramProtocol):
    def __init__(self, data, answer):
        self.data, self.answer = data, answer
    def connection_made(self, transport):
        self.transport = transport
        transport.sendto(self.data)
        asyncio.get_running_loop().call_later(10, transport.close)
    def datagram_received(self, data, _):
        self.answer(data)

class Near(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport
    def datagram_received(self, data, address):
        asyncio.ensure_future(self.pass_on(data, address))
    async def pass_on(self, data, address):
        await asyncio.sleep(delay)
        answer = lambda data: self.transport.sendto(data, address)
        await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: Far(data, answer), remote_addr=("127.0.0.1", target))

async def main():
    await asyncio.get_running_loop().create_datagram_endpoint(Near, local_addr=("0.0.0.0", port))
    await asyncio.Event().wait()

asyncio.run(main())
"""
_PROXIES = {"tcp": _PROXY, "udp": _DATAGRAM_PROXY}


@contextlib.contextmanager
def delayed(
    pod: dict[str, Any], seconds: float, protocol: str = "tcp", ports: Sequence[int] = (8080, 8081)
) -> Iterator[Callable[[], int]]:
    """Put a delaying proxy before ports of a pod, those of REST and gRPC, in its network namespace.

    Yields:
        how many connections, or senders of datagrams, have gone to it until now.
    """
    enter = ("nsenter", "-t", str(process_of(pod)), "-n")
    proxies = [
        subprocess.Popen(
            [
                *enter,
                sys.executable,
                "-c",
                _PROXIES[protocol],
                *map(str, (10000 + port, port, seconds)),
            ],
            stderr=subprocess.DEVNULL,
        )
        for port in ports
    ]
    try:
        time.sleep(1)
        assert all(proxy.poll() is None for proxy in proxies)
        rules = [
            f"nat {protocol} dport {port} counter redirect to :{10000 + port}" for port in ports
        ]
        with packet_rules(pod, *rules) as met:
            yield met
            # What was connected through the proxies goes on through them until it is closed.
        time.sleep(1)
    finally:
        for proxy in proxies:
            proxy.terminate()
            proxy.wait()


@contextlib.contextmanager
def late(pod: dict[str, Any], seconds: float) -> Iterator[Callable[[], int]]:
    """Make a pod's answers late: by netem where its node's kernel has it, else by `delayed`.

    Yields:
        how many packets, or connections, it has met until now.
    """
    try:
        with netem(process_of(pod), seconds) as met:
            yield met
    except NoNetemError:
        with delayed(pod, seconds) as met:
            yield met


class NoNetemError(RuntimeError):
    """The kernel, or this machine's tools, cannot delay packets."""


@contextlib.contextmanager
def netem(process: int, seconds: float, device: str = "eth0") -> Iterator[Callable[[], int]]:
    """Delay what leaves by a device of a process's network.

    Yields:
        how many packets have met it until now.

    Raises:
        NoNetemError: there is no netem.
    """
    qdisc = ("nsenter", "-t", str(process), "-n", "tc", "-s", "-j", "qdisc")
    place = ("dev", device, "root")
    rule = ("netem", "delay", f"{seconds * 1000:g}ms")
    words = [*qdisc, "add", *place, *rule]
    added = subprocess.run(words, check=False, capture_output=True, text=True)
    if re.search("kind is unknown|No such file", added.stderr):
        raise NoNetemError(added.stderr)
    assert added.returncode == 0, added.stderr

    def met() -> int:
        (shown,) = json.loads(run(*qdisc, "show", *place))
        return int(shown["packets"])

    try:
        yield met
    finally:
        run(*qdisc, "del", *place, check=False)


def pod_behind(service: str) -> dict[str, Any]:
    """A running pod behind a service, named `name.namespace`."""
    name, _, namespace = service.partition(".")
    inside = ("kubectl", "-n", namespace)
    selector = json.loads(run(*inside, "get", "service", name, "-o", "json"))["spec"]["selector"]
    labels = ",".join(f"{key}={value}" for key, value in selector.items())
    found = json.loads(run(*inside, "get", "pods", "-l", labels, "-o", "json"))["items"]
    running = [pod for pod in found if pod["status"]["phase"] == "Running"]
    assert running, f"no pod behind {service}"
    pod: dict[str, Any] = running[0]
    return pod


def ready_pod(cluster: Namespace) -> dict[str, Any]:
    """A pod of the predictor that is ready."""
    name = cluster.ready_pods()[0]
    return cluster.get("pod", name)
