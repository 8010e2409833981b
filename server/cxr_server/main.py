"""The serving process: starts everything, watches over it, and ends it in order."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

import prometheus_client
import uvicorn
import uvloop

from cxr.config import ModelConfig
from cxr.mar import find_archive, verify
from cxr_server.origin import checked_origin
from cxr_server.rest import create_app
from cxr_server.rpc import start_grpc
from cxr_server.service import Runtime, Service
from cxr_server.settings import QualityPolicy, RuntimeName, Settings, address
from cxr_server.startup import Phase, Startup
from cxr_server.wire import HttpProtocol

if TYPE_CHECKING:
    from cxr_server.tracing import Tracing

log = logging.getLogger(__name__)

# Seconds for requests in flight once the runtime is lost: they will hardly get an answer.
_GRACE_AFTER_FAILURE = 5.0


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """Where the service listens."""

    rest: str
    grpc: str
    metrics: str


class ServeError(RuntimeError):
    """The service could not start or could not go on; the message says why."""


def serve(path: Path, settings: Settings, on_ready: Callable[[Endpoints], None]) -> None:
    """Serve an archive until SIGTERM or SIGINT.

    Args:
        path: the `.mar`, or a folder that holds exactly one.
        settings: how to serve.
        on_ready: called once, when the service is first ready.

    Raises:
        ModelLoadError: the archive is not fit to be served.
        ServeError: an address is taken, or the model was lost while serving.
    """
    startup = Startup()
    startup.ended(Phase.PROCESS)
    with checked_origin(find_archive(path), settings) as archive:
        config = verify(archive)
        startup.ended(Phase.VERIFY)
        if settings.quality_policy == QualityPolicy.REFUSE and config.guards is None:
            raise ServeError(
                "This model has no guards, so that no image could be refused by them; train it "
                "again, or use --quality-policy flag."
            )
        runtime = _runtime(archive, config, settings)
        log.info("serving %s %s with %d workers", config.name, config.version, settings.workers)
        tracing = _tracing(config, settings)
        service = Service(runtime, config, settings, startup, tracing)
        try:
            uvloop.run(_serve(service, settings, on_ready))
        finally:
            if tracing is not None:
                tracing.shutdown()


def _runtime(archive: Path, config: ModelConfig, settings: Settings) -> Runtime:
    """What the settings name; what the other one needs is not even imported."""
    if settings.runtime is RuntimeName.INPROCESS:
        from cxr_server.inprocess import InProcess  # noqa: PLC0415

        return InProcess(archive, settings)
    try:
        from cxr_server.torchserve import TorchServe  # noqa: PLC0415
    except ImportError as error:
        raise ServeError(
            f"TorchServe is not installed here ({error.name} is missing): install "
            "cxr-serve[torchserve], or use --runtime inprocess."
        ) from error
    return TorchServe(archive, config, settings)


def _tracing(config: ModelConfig, settings: Settings) -> "Tracing | None":
    if not settings.tracing:
        return None
    try:
        from cxr_server.tracing import Tracing  # noqa: PLC0415
    except ImportError as error:
        raise ServeError(
            f"OpenTelemetry is not installed here ({error.name} is missing): install "
            "cxr-serve[tracing], or leave --tracing out."
        ) from error
    return Tracing(config)


async def _serve(
    service: Service, settings: Settings, on_ready: Callable[[Endpoints], None]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        with _metrics_server(service, settings) as metrics_port:
            rest_socket = _listen(settings.host, settings.rest_port)
            rest, rest_task = _start_rest(service, settings, rest_socket)
            try:
                grpc_server, grpc_port = await start_grpc(service)
            except RuntimeError as error:
                raise ServeError(
                    f"Cannot listen on {address(settings.host, settings.grpc_port)} for gRPC."
                ) from error
            rest_port = rest_socket.getsockname()[1]
            endpoints = Endpoints(
                rest=f"http://{address(settings.host, rest_port)}",
                grpc=address(settings.host, grpc_port),
                metrics=f"http://{address(settings.host, metrics_port)}/metrics",
            )
            failure = await _until_stopped(service, stop, lambda: on_ready(endpoints))
            if failure:
                # Requests in flight are told so at once, instead of waiting for what is gone.
                await service.stop(now=True)
            await _drain(service, settings, rest, rest_task, grpc_server, failed=bool(failure))
    finally:
        await service.stop()
    if failure:
        raise ServeError(failure)
    log.info("stopped")


async def _until_stopped(
    service: Service, stop: asyncio.Event, on_ready: Callable[[], None]
) -> str | None:
    """Run until a signal, or until the service has failed; the reason in the second case."""
    await service.start()
    running = asyncio.create_task(service.run())
    stopping = asyncio.create_task(stop.wait())
    announcing = asyncio.create_task(_announce(service, on_ready))
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    announcing.cancel()
    stopping.cancel()
    if not running.done():
        running.cancel()
        await asyncio.wait((running,))
        return None
    failure = running.result()
    log.error("%s", failure)
    return failure


async def _announce(service: Service, on_ready: Callable[[], None]) -> None:
    while not service.ready:
        await asyncio.sleep(0.1)
    on_ready()


async def _drain(
    service: Service,
    settings: Settings,
    rest: uvicorn.Server,
    rest_task: asyncio.Task[None],
    grpc_server: Any,
    *,
    failed: bool,
) -> None:
    """Stop taking requests, and wait for those in flight."""
    service.draining = True
    grace = _GRACE_AFTER_FAILURE if failed else settings.grace_period
    if not failed:
        log.info("not ready any more; draining")
        await asyncio.sleep(settings.drain_delay)
    rest.config.timeout_graceful_shutdown = int(grace)
    rest.should_exit = True
    await asyncio.gather(rest_task, grpc_server.stop(grace))


class _RestServer(uvicorn.Server):
    """Uvicorn without its own signal handling: this process has one order of ending."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _start_rest(
    service: Service, settings: Settings, listener: socket.socket
) -> tuple[uvicorn.Server, asyncio.Task[None]]:
    config = uvicorn.Config(
        create_app(service),
        http=HttpProtocol,
        ws="none",
        # Nothing here asks where a request came from.
        proxy_headers=False,
        log_config=None,
        log_level="info" if settings.verbose else "warning",
        # It would log what stands in the query; cxr_server.logs has one of its own.
        access_log=False,
        server_header=False,
        # Longer than the idle timeout of common proxies, so that they close first.
        timeout_keep_alive=75,
        lifespan="off",
    )
    server = _RestServer(config)
    return server, asyncio.create_task(server.serve(sockets=[listener]))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ServeError(f"Cannot listen on {address(host, port)}: {error.strerror}.") from error


@contextlib.contextmanager
def _metrics_server(service: Service, settings: Settings) -> Iterator[int]:
    """Serve the metrics in a thread of their own, so that a scrape never waits for requests."""
    try:
        server: WSGIServer
        thread: threading.Thread
        server, thread = prometheus_client.start_http_server(
            settings.metrics_port, settings.host, service.metrics.registry
        )
    except OSError as error:
        raise ServeError(
            f"Cannot listen on {address(settings.host, settings.metrics_port)} for metrics: "
            f"{error.strerror}."
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
