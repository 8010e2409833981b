"""The gateway as an ASGI application: its parts, and how they start and end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

import cxr
from cxr.context import REQUEST_ID, TRACEPARENT
from cxr_client.schemas import Problem
from cxr_portal import api
from cxr_portal.auth import Authenticator
from cxr_portal.gateway import End, Gateway
from cxr_portal.jobs import JobRunner
from cxr_portal.limits import RateLimits
from cxr_portal.metrics import Metrics
from cxr_portal.middleware import RequestMiddleware
from cxr_portal.model import ModelClient
from cxr_portal.problems import ProblemError
from cxr_portal.settings import Settings
from cxr_portal.store import Store

if TYPE_CHECKING:
    from cxr_portal.tracing import Tracing

# What `npm run build` in portal/web makes.
PAGE = Path(__file__).with_name("static")
_HTTP_KINDS = {404: "not-found", 405: "method-not-allowed"}
_HTTP_SENTENCES = {
    404: "There is nothing here.",
    405: "This method is not allowed here.",
}
_DESCRIPTION = """Ask a served chest X-ray classifier about radiographs.

**Research use only: not a medical device.** Do not use it to diagnose or treat anyone.

No image is kept once it has its answer, and file names are not kept at all. Errors are
`application/problem+json`. Every answer has the header `x-request-id`."""


def create_app(
    settings: Settings, metrics: Metrics | None = None, tracing: "Tracing | None" = None
) -> FastAPI:
    """The gateway.

    Args:
        settings: how it runs.
        metrics: where it counts.
        tracing: makes spans; None where there are none.
    """
    metrics = metrics or Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = await asyncio.to_thread(Store, settings.database)
        model = ModelClient(settings, metrics)
        jobs = JobRunner(settings, store, model, metrics)
        app.state.gateway = Gateway(
            settings=settings,
            store=store,
            model=model,
            jobs=jobs,
            authenticator=Authenticator(settings, store, metrics),
            rates=RateLimits(settings, metrics),
            metrics=metrics,
            end=app.state.end,
        )
        jobs.start()
        try:
            yield
        finally:
            await jobs.stop()
            await model.close()
            await asyncio.to_thread(store.close)

    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("Authorization", "Content-Type", "Idempotency-Key", REQUEST_ID, TRACEPARENT),
        expose_headers=(REQUEST_ID, "Location", "Retry-After", "Idempotent-Replayed"),
        max_age=600,
    )
    app = FastAPI(
        title="cxr-serve portal",
        summary="Chest X-ray classification for research.",
        description=_DESCRIPTION,
        version=cxr.__version__,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        openapi_url="/v1/openapi.json",
        # Their pages take scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(RequestMiddleware, settings=settings, metrics=metrics, tracing=tracing),
            *([cors] if settings.cors_origins else []),
        ],
        exception_handlers={
            ProblemError: _problem,
            RequestValidationError: _invalid,
            HTTPException: _http,
        },
        separate_input_output_schemas=False,
    )
    app.state.end = End()
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    app.include_router(api.router)
    for route in api.router.routes:
        if isinstance(route, APIRoute):
            for method in route.methods or ():
                metrics.expect(method, route.path)
    if PAGE.is_dir():
        app.mount("/", _Page(directory=PAGE, html=True), name="page")
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the schema of problems, which no route answers by its type."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
    assert app.openapi_schema is not None  # noqa: S101 - made above
    return app.openapi_schema


class _Page(StaticFiles):
    """The page. What has its digest in its name is kept by browsers; the rest is asked for anew."""

    async def get_response(self, path: str, scope: object) -> Response:
        response = await super().get_response(path, scope)  # type: ignore[arg-type]
        fixed = path.startswith("assets/")
        response.headers["cache-control"] = (
            "public, max-age=31536000, immutable" if fixed else "no-cache"
        )
        return response


async def _problem(request: Request, error: Exception) -> Response:  # noqa: ARG001
    assert isinstance(error, ProblemError)  # noqa: S101 - registered for it
    return error.response()


async def _invalid(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """Say which parameters are wrong; never what they are."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it
    places = sorted({".".join(map(str, item["loc"][1:])) for item in error.errors()})
    detail = f"These parameters are missing or not valid: {', '.join(places)}."
    return ProblemError(422, "invalid-parameters", detail).response()


async def _http(request: Request, error: Exception) -> Response:  # noqa: ARG001
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    status = error.status_code
    return ProblemError(
        status,
        _HTTP_KINDS.get(status, "refused"),
        _HTTP_SENTENCES.get(status, "The request cannot be answered."),
        headers=error.headers,
    ).response()
