"""The REST endpoints: KServe V1, raw images, Open Inference Protocol V2 and SageMaker's two."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import cxr
from cxr import context
from cxr.answer import Answer, Options
from cxr_server import v1, v2
from cxr_server.errors import RequestError, bad_request, unavailable, without_message
from cxr_server.logs import log_access
from cxr_server.service import Image, Service, check_model, raise_if_all_bad
from cxr_server.wire import on_leaving

log = logging.getLogger(__name__)

_JSON = "application/json"
_BINARY = "application/octet-stream"
# `curl --data` sends a form's type where none is given; such bodies are JSON too.
_JSON_TYPES = ("", _JSON, "application/x-www-form-urlencoded")
# The second one is what SageMaker's own containers take.
_RAW_TYPES = (*v1.IMAGE_TYPES, _BINARY, "application/x-image")
# SageMaker's paths; all others belong to V1 or V2.
_SAGEMAKER = ("/ping", "/invocations")
# Of a body that is too large, this many times the limit is read and dropped, so that the client
# gets to read the answer instead of a broken connection.
_DROP_FACTOR = 8
_CLIENT_CLOSED_REQUEST = 499
_CONTEXT = (context.REQUEST_ID.encode(), context.TRACEPARENT.encode())

Endpoint = Callable[[Request], Awaitable[Response]]


class _ModelName(StringConvertor):
    """A model's name in a path, without the `:predict` behind it."""

    regex = "[^/:]+"


register_url_convertor("model", _ModelName())


def create_app(service: Service) -> ASGIApp:
    """The REST application of a service."""
    endpoints = _Endpoints(service)
    routes = [
        ("/", "live", endpoints.root, "GET"),
        ("/v1/models", "list", endpoints.v1_list, "GET"),
        ("/v1/models/{name:model}", "ready", endpoints.v1_ready, "GET"),
        ("/v1/models/{name:model}:predict", "predict", endpoints.v1_predict, "POST"),
        ("/ping", "ready", endpoints.ping, "GET"),
        ("/invocations", "predict", endpoints.invocations, "POST"),
        ("/v1/models/{name:model}:explain", "explain", endpoints.v1_explain, "POST"),
        ("/v2", "metadata", endpoints.v2_server, "GET"),
        ("/v2/health/live", "live", endpoints.v2_live, "GET"),
        ("/v2/health/ready", "ready", endpoints.v2_ready, "GET"),
        ("/v2/models", "list", endpoints.v2_list, "GET"),
    ]
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            (prefix, "metadata", endpoints.v2_model, "GET"),
            (f"{prefix}/ready", "ready", endpoints.v2_model_ready, "GET"),
            (f"{prefix}/infer", "infer", endpoints.v2_infer, "POST"),
        ]
    observed = [
        (path, method, _observed(service, path, method, endpoint), verb)
        for path, method, endpoint, verb in routes
    ]
    app = Starlette(
        routes=[Route(path, endpoint, methods=[verb]) for path, _, endpoint, verb in observed],
        exception_handlers={HTTPException: _http_error},
    )
    name = service.config.name
    direct = {
        path.replace("{name:model}", name).replace("{name}", name): endpoint
        for path, method, endpoint, _ in observed
        if method in context.INFERENCE and "{version}" not in path
    }
    return _identified(_directly(direct, name, app))


class _Endpoints:
    """One coroutine per endpoint; what they raise is answered by `_measured`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def root(self, _: Request) -> Response:
        return _json({"status": "alive"})

    async def v1_list(self, _: Request) -> Response:
        return _json({"models": [self._service.config.name]})

    async def v1_ready(self, request: Request) -> Response:
        name = self._checked(request)
        self._require_ready()
        return _json({"name": name, "ready": True})

    async def ping(self, _: Request) -> Response:
        self._require_ready()
        return Response()

    async def v1_predict(self, request: Request) -> Response:
        self._checked(request)
        return await self.invocations(request)

    async def invocations(self, request: Request) -> Response:
        images, _ = await self._v1_images(request)
        answers = await _for_client(request, self._service.predict(images))
        raise_if_all_bad(answers)
        return Response(v1.response(self._service.config, answers), media_type=_JSON)

    async def v1_explain(self, request: Request) -> Response:
        self._checked(request)
        images, label = await self._v1_images(request)
        label = label or request.query_params.get("class")
        options = Options(explain=label or True)
        answers = await _for_client(request, self._service.predict(images, options))
        raise_if_all_bad(answers)
        body = v1.response(self._service.config, answers, explained=True)
        return Response(body, media_type=_JSON)

    async def _v1_images(self, request: Request) -> tuple[list[Image], str | None]:
        """The images of the body, and the class that it names."""
        content_type = _media_type(request)
        body = await self._body(request)
        if content_type in _RAW_TYPES:
            return [body], None
        if content_type in _JSON_TYPES:
            return v1.parse(body, self._service.settings.max_batch)
        raise RequestError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"This content type is not accepted; send {_JSON}, "
            f"{', '.join(v1.IMAGE_TYPES[:-1])} or {v1.IMAGE_TYPES[-1]}.",
        )

    async def v2_server(self, _: Request) -> Response:
        return _json(
            {
                "name": v2.SERVER_NAME,
                "version": cxr.__version__,
                "extensions": list(v2.EXTENSIONS),
            }
        )

    async def v2_live(self, _: Request) -> Response:
        return _json({"live": True})

    async def v2_ready(self, _: Request) -> Response:
        return _json({"ready": self._service.ready}, self._ready_status())

    async def v2_list(self, _: Request) -> Response:
        return _json({"models": [self._service.config.name]})

    async def v2_model(self, request: Request) -> Response:
        name = self._checked(request)
        inputs, outputs = v2.tensor_metadata(self._service.config)
        return _json(
            {
                "name": name,
                "versions": [self._service.config.version],
                "platform": v2.PLATFORM,
                "inputs": inputs,
                "outputs": outputs,
            }
        )

    async def v2_model_ready(self, request: Request) -> Response:
        name = self._checked(request)
        return _json({"name": name, "ready": self._service.ready}, self._ready_status())

    async def v2_infer(self, request: Request) -> Response:
        self._checked(request)
        json_length = request.headers.get(v2.JSON_LENGTH_HEADER)
        accepted = (*_JSON_TYPES, _BINARY) if json_length is not None else _JSON_TYPES
        if _media_type(request) not in accepted:
            raise RequestError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"This content type is not accepted; send application/json, or {_BINARY} with "
                f"the header {v2.JSON_LENGTH_HEADER}.",
            )
        infer = v2.parse_rest(
            await self._body(request), json_length, self._service.settings.max_batch
        )
        answers = await _for_client(request, self._service.predict(infer.images, infer.options))
        raise_if_all_bad(answers)
        body, length = v2.response_rest(self._service.config, infer, answers)
        if length is None:
            return Response(body, media_type=_JSON)
        return Response(body, media_type=_BINARY, headers={v2.JSON_LENGTH_HEADER: str(length)})

    def _checked(self, request: Request) -> str:
        name: str = request.path_params["name"]
        check_model(self._service, name, request.path_params.get("version"))
        return name

    def _ready_status(self) -> HTTPStatus:
        return HTTPStatus.OK if self._service.ready else HTTPStatus.SERVICE_UNAVAILABLE

    def _require_ready(self) -> None:
        if not self._service.ready:
            raise unavailable("The model is not ready; try again later.")

    async def _body(self, request: Request) -> bytes:
        """The request's body, of which no more than the limit is ever held."""
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise RequestError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "Compressed requests are not accepted; send no Content-Encoding.",
            )
        settings = self._service.settings
        limit = settings.max_request_bytes
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(settings.request_timeout):
                with self._service.holding() as held:
                    async for chunk in request.stream():
                        size += len(chunk)
                        if size <= limit:
                            held.add(len(chunk))
                            chunks.append(chunk)
                        else:
                            chunks.clear()
                        if size > _DROP_FACTOR * limit:
                            break
        except TimeoutError as error:
            raise RequestError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The request did not arrive within {settings.request_timeout:g} s.",
            ) from error
        if size > limit:
            raise RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The request is larger than {limit / 2**20:g} MiB.",
            )
        if size == 0:
            raise bad_request("The request has no body.")
        return b"".join(chunks)


def _directly(endpoints: Mapping[str, Endpoint], name: str, app: ASGIApp) -> ASGIApp:
    """Answer what nearly all requests are by these endpoints, by path, and the rest by the app.

    A search through all routes and two layers that catch exceptions, which none of these endpoints
    lets out, would cost a tenth of what a request costs here.
    """

    async def directly(scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = endpoints.get(scope["path"])
        if endpoint is None or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        scope["path_params"] = {"name": name}
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    return directly


def _identified(app: ASGIApp) -> ASGIApp:
    """Give every request its context, and every answer its id, those of unknown paths too."""

    async def identified(scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id, traceparent = (headers.get(name, b"").decode("latin-1") for name in _CONTEXT)
        entered = context.enter(request_id, traceparent)

        async def send_identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((_CONTEXT[0], entered.request_id.encode()))
            await send(message)

        await app(scope, receive, send_identified)

    return identified


def _observed(service: Service, path: str, method: str, endpoint: Endpoint) -> Endpoint:
    """The endpoint with its measurements, and with its spans where they are wanted."""
    measured = _measured(service, method, endpoint)
    if service.tracing is None or method not in context.INFERENCE:
        return measured
    return service.tracing.endpoint(path.replace("{name:model}", "{name}"), measured)


def _measured(service: Service, method: str, endpoint: Endpoint) -> Endpoint:
    """Answer what the endpoint raises, and count and time the request."""

    async def measured(request: Request) -> Response:
        path: str = request.scope["path"]
        protocol = "v2" if path.startswith("/v2") else "v1"
        if path in _SAGEMAKER:
            protocol = "sagemaker"
        start = time.perf_counter()
        with service.metrics.in_flight.track_inprogress():
            response = await _answered(endpoint, request)
        code = str(response.status_code)
        seconds = time.perf_counter() - start
        service.metrics.request(protocol, method, code, seconds)
        log_access(protocol, method, code, seconds)
        if service.draining:
            response.headers["Connection"] = "close"
        return response

    return measured


async def _answered(endpoint: Endpoint, request: Request) -> Response:
    try:
        return await endpoint(request)
    except RequestError as error:
        return _error(error.status, str(error))
    except ClientDisconnect:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    except Exception as error:
        log.error("%s: unexpected %s", endpoint.__name__, without_message(error))
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "The service failed; try again later.")


def _error(status: int, message: str) -> Response:
    response = _json({"error": message}, status)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        response.headers["Retry-After"] = "1"
    if status == HTTPStatus.REQUEST_TIMEOUT:
        response.headers["Connection"] = "close"
    return response


async def _for_client(
    request: Request, answering: Coroutine[Any, Any, list[Answer]]
) -> list[Answer]:
    """Wait for answers as long as the client does.

    Raises:
        ClientDisconnect: it has left; what was not computed yet is not computed any more.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - this is a coroutine
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        task.cancel()

    on_leaving(request.scope, leave)
    try:
        return await answering
    except asyncio.CancelledError:
        if left and not task.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        on_leaving(request.scope, None)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette raises by itself: no such path, no such method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    sentence = {
        HTTPStatus.NOT_FOUND: "There is no such endpoint.",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.method} is not allowed here.",
    }.get(HTTPStatus(error.status_code), error.detail)
    response = _error(error.status_code, sentence)
    response.headers.update(error.headers or {})
    return response


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _json(content: Any, status: int = HTTPStatus.OK) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type=_JSON)
