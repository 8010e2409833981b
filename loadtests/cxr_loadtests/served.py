"""`cxr serve` as a child process, for a run without a service."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxr_loadtests.errors import LoadTestError

_STOP_SECONDS = 60


@dataclass(frozen=True)
class Served:
    """A running service: its URL, `host:port` of gRPC, and URL of the metrics."""

    rest: str
    grpc: str
    metrics: str


@contextlib.contextmanager
def served(archive: Path) -> Iterator[Served]:
    """Serve an archive on free ports of this machine, without TorchServe.

    Raises:
        LoadTestError: it does not start.
    """
    ports = [f"--{name}-port=0" for name in ("rest", "grpc", "metrics")]
    command = [sys.executable, "-c", "from cxr.cli import main; main()", "serve", str(archive)]
    options = ["--runtime=inprocess", "--json", "--no-access-log", *ports]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log)
        try:
            line = server.stdout.readline() if server.stdout else b""
            if not line:
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()
                raise LoadTestError(
                    f"cxr serve did not start: {said[-1] if said else 'it said nothing'}"
                )
            ready = json.loads(line)
            yield Served(ready["rest"], ready["grpc"], ready["metrics"])
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
