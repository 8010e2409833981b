"""The gateway's process: starts everything, a model server too where one is wanted, and ends it."""

import asyncio
import contextlib
import ctypes
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

import prometheus_client
import uvicorn

from cxr_portal.app import create_app
from cxr_portal.gateway import End
from cxr_portal.metrics import Metrics
from cxr_portal.settings import Settings
from cxr_portal.store import DatabaseError, open_store

if TYPE_CHECKING:
    from cxr_portal.tracing import Tracing

log = logging.getLogger(__name__)

# Seconds that the model server has at the end.
_SERVER_GRACE = 45.0
# Longer than the idle timeout of common proxies, so that they close first.
_KEEP_ALIVE = 75
# Of <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1


class PortalError(RuntimeError):
    """The gateway could not start or could not go on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """Where the gateway listens."""

    portal: str
    metrics: str


def run(settings: Settings, archive: Path | None, on_ready: Callable[[Endpoints], None]) -> None:
    """Run the gateway until SIGTERM or SIGINT.

    Args:
        settings: how it runs.
        archive: a model to serve in a process of its own, instead of `settings.server`.
        on_ready: called once it takes requests.

    Raises:
        PortalError: an address is taken, the database cannot be used, or the model server ended.
    """
    # A database that cannot be used is told before anything starts.
    try:
        open_store(settings.database).close()
    except DatabaseError as error:
        raise PortalError(str(error)) from None
    metrics = Metrics()
    tracing = _tracing(settings)
    try:
        with (
            _model_server(archive) as server,
            _metrics_server(settings, metrics) as metrics_port,
            _listening(settings.host, settings.port) as listener,
        ):
            if server is not None:
                settings = replace(settings, server=server.address)
            app = create_app(settings, metrics, tracing)
            gateway = _Server(
                uvicorn.Config(
                    app,
                    http="httptools",
                    loop="uvloop",
                    proxy_headers=False,
                    log_config=None,
                    log_level="warning",
                    access_log=False,
                    server_header=False,
                    timeout_keep_alive=_KEEP_ALIVE,
                    timeout_graceful_shutdown=settings.grace,
                ),
                on_started=lambda: on_ready(
                    Endpoints(
                        portal=f"http://{_address(settings.host, listener.getsockname()[1])}",
                        metrics=f"http://{_address(settings.host, metrics_port)}/metrics",
                    )
                ),
                end=app.state.end,
                drain_delay=settings.drain_delay,
            )
            if server is not None:
                server.on_end(gateway.stop)
            gateway.run(sockets=[listener])
            if server is not None and server.ended_by_itself:
                raise PortalError("The model server has ended; its last lines say why.")
            log.info("stopped")
    finally:
        if tracing is not None:
            tracing.shutdown()


class _Server(uvicorn.Server):
    """Uvicorn that says when it has started, and ends in steps."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        on_started: Callable[[], None],
        end: End,
        drain_delay: float,
    ) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._end = end
        self._drain_delay = drain_delay

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End in order on a signal; Uvicorn would then end by that signal, too."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if not self.should_exit:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Be ready no more, then end streams, which would hold it up, and wait for requests."""
        self._end.draining = True
        log.info("not ready any more; draining")
        await asyncio.sleep(self._drain_delay)
        self._end.closing = True
        await super().shutdown(sockets)

    def stop(self) -> None:
        """End soon; may be called by any thread."""
        self.should_exit = True


class _ModelServer:
    """A `cxr serve` of this process."""

    def __init__(self, process: "subprocess.Popen[str]", address: str) -> None:
        self._process = process
        self._expected = False
        self.address = address

    def expect_end(self) -> None:
        """Say that it is going to be ended."""
        self._expected = True

    @property
    def ended_by_itself(self) -> bool:
        """Whether it has ended, and nobody told it to."""
        return self._process.poll() is not None and not self._expected

    def on_end(self, call: Callable[[], None]) -> None:
        """Call that once it has ended."""

        def wait() -> None:
            self._process.wait()
            call()

        threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _model_server(archive: Path | None) -> Iterator[_ModelServer | None]:
    """Serve an archive on free ports of this machine."""
    if archive is None:
        yield None
        return
    ports = [f"--{name}-port=0" for name in ("rest", "grpc", "metrics")]
    cxr_command = str(Path(sys.executable).with_name("cxr"))
    process = subprocess.Popen(
        [cxr_command, "serve", str(archive), "--runtime=inprocess", "--json", *ports],
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C reaches the gateway alone, which ends it when it needs it no more.
        process_group=0,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - there are no threads yet
    )
    assert process.stdout is not None  # noqa: S101 - piped above
    server = None
    try:
        line = process.stdout.readline()
        if not line:
            raise PortalError("The model server did not start; its log says why.")
        server = _ModelServer(process, json.loads(line)["grpc"])
        yield server
    finally:
        if server is not None:
            server.expect_end()
        process.terminate()
        try:
            process.wait(_SERVER_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """In a child: get SIGTERM when the parent ends, even where that was killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _tracing(settings: Settings) -> "Tracing | None":
    if not settings.tracing:
        return None
    try:
        from cxr_portal.tracing import Tracing  # noqa: PLC0415
    except ImportError as error:
        raise PortalError(
            f"OpenTelemetry is not installed here ({error.name} is missing): install "
            "cxr-serve[tracing], or leave --tracing out."
        ) from error
    return Tracing()


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise PortalError(f"Cannot listen on {_address(host, port)}: {error.strerror}.") from error
    with listener:
        yield listener


@contextlib.contextmanager
def _metrics_server(settings: Settings, metrics: Metrics) -> Iterator[int]:
    """Serve the metrics in a thread of their own, so that a scrape never waits for requests."""
    server: WSGIServer
    try:
        server, thread = prometheus_client.start_http_server(
            settings.metrics_port, settings.host, metrics.registry
        )
    except OSError as error:
        raise PortalError(
            f"Cannot listen on {_address(settings.host, settings.metrics_port)} for metrics: "
            f"{error.strerror}."
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
