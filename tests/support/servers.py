"""Starts the real `cxr serve`, workers and all, and looks at it from outside."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CXR = str(Path(sys.executable).with_name("cxr"))
# Generous: the tests may share a slow machine. Nothing waits this long unless something is wrong.
START_TIMEOUT = 120.0
STOP_TIMEOUT = 60.0


class ServerError(AssertionError):
    """The server did not do what the test waits for; the message holds its log."""


@dataclass(frozen=True)
class Server:
    """A `cxr serve` process.

    Attributes:
        folder: its temporary folder (TMPDIR), which it must leave empty.
    """

    process: "subprocess.Popen[bytes]"
    folder: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def runtime(self) -> str:
        """The one that it was asked for by name."""
        (name,) = (word for word in self.process.args if word.startswith("--runtime="))
        return name.removeprefix("--runtime=")

    @property
    def stdout(self) -> str:
        return (self.folder.parent / "stdout").read_text()

    @property
    def log(self) -> str:
        return (self.folder.parent / "stderr").read_text()

    @property
    def endpoints(self) -> dict[str, str]:
        """The announcement of readiness: `rest`, `grpc` and `metrics`."""
        return json.loads(self.stdout.splitlines()[0])

    @property
    def rest(self) -> str:
        return self.endpoints["rest"]

    @property
    def grpc(self) -> str:
        return self.endpoints["grpc"]

    @property
    def metrics(self) -> str:
        return self.endpoints["metrics"]

    def tree(self) -> list[psutil.Process]:
        """All processes below this one."""
        return psutil.Process(self.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        """The worker processes of either runtime, in order of their number."""
        words = ("model_service_worker", "cxr_server/worker.py")
        tree = self.tree()
        found = [process for word in words for process in _running(tree, word)]
        return sorted(found, key=lambda worker: worker.pid)

    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self.workers()]

    def left(self) -> list[psutil.Process]:
        """Processes that it has started, also after its end: each has its temporary folder."""
        return [process for process in psutil.process_iter() if self._started(process)]

    def _started(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            folder = process.environ().get("TMPDIR", "")
            return process.pid != self.pid and folder.startswith(str(self.folder))
        return False

    def java(self) -> psutil.Process:
        """TorchServe itself."""
        (found,) = _running(self.tree(), "org.pytorch.serve.ModelServer")
        return found

    def wait_for(self, what: str, condition: Callable[[], object], timeout: float) -> float:
        """Wait until a condition holds.

        Returns:
            Seconds that it took.
        """
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > timeout:
                raise ServerError(f"not within {timeout:g} s: {what}\n{self.log}")
            time.sleep(0.05)
        return time.monotonic() - start

    def wait_ready(self) -> None:
        def announced() -> bool:
            if self.process.poll() is not None:
                raise ServerError(f"ended with {self.process.returncode}\n{self.log}")
            return "\n" in self.stdout

        self.wait_for("ready", announced, START_TIMEOUT)

    def wait_exit(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait until it has ended by itself, and return its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServerError(f"still running after {timeout:g} s\n{self.log}") from None

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait_exit()


@contextlib.contextmanager
def serving(
    archive: Path, *options: str, wait: bool = True, free_ports: bool = True
) -> Iterator[Server]:
    """Run `cxr serve` on an archive.

    Args:
        archive: the `.mar`.
        options: further options of the command.
        wait: until it is ready.
        free_ports: pick free ports rather than the options' or the default ones.
    """
    home = Path(tempfile.mkdtemp(prefix="s-"))
    # Not below pytest's folders: a Unix socket's path may have 107 characters.
    folder = home / "tmp"
    folder.mkdir()
    ports = ("--rest-port=0", "--grpc-port=0", "--metrics-port=0") if free_ports else ()
    with (home / "stdout").open("wb") as stdout, (home / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [CXR, "serve", str(archive), "--json", *ports, *options],
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "TMPDIR": str(folder)},
        )
    server = Server(process, folder)
    tree: list[psutil.Process] = []
    try:
        if wait:
            server.wait_ready()
        yield server
    except BaseException:
        sys.stderr.write(f"\n--- log of cxr serve ---\n{server.log}")
        raise
    finally:
        if process.poll() is None:
            tree = server.tree()
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in alive(tree):
            child.kill()
        shutil.rmtree(home, ignore_errors=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run."""
    return [process for process in processes if _is_alive(process)]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _running(processes: list[psutil.Process], word: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if _is_alive(process) and any(word in part for part in process.cmdline()):
                found.append(process)
    return found
