"""The routes of the API, version 1."""

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect

from cxr_client.schemas import Health, Job, JobResult, Jobs, Model, Models, Predictions
from cxr_portal.auth import Principal
from cxr_portal.gateway import Gateway, audit, in_database, model_problem, unless_gone
from cxr_portal.model import Caller, ModelError
from cxr_portal.problems import MEDIA_TYPE, ProblemError
from cxr_portal.settings import Scope
from cxr_portal.store import TooManyJobsError
from cxr_portal.uploads import FIELD, uploaded

router = APIRouter()

# Seconds between looks at a job that somebody watches, and between signs of life.
_WATCH = 0.3
_SIGN_OF_LIFE = 15.0
_CLIENT_CLOSED_REQUEST = 499


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


Parts = Annotated[Gateway, Depends(_gateway)]
OnBehalf = Annotated[Caller, Depends(_caller)]
_bearer = HTTPBearer(
    auto_error=False, description="An API key, or a token of the issuer that the gateway trusts."
)


async def _anybody(
    gateway: Parts, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal:
    return await gateway.authenticator.authenticate(bearer.credentials if bearer else None)


Anybody = Annotated[Principal, Depends(_anybody)]


def _with(scope: Scope) -> Any:
    async def allowed(gateway: Parts, principal: Anybody) -> Principal:
        gateway.authenticator.require(principal, scope)
        return principal

    return Depends(allowed)


Predicting = Annotated[Principal, _with(Scope.PREDICT)]
WithJobs = Annotated[Principal, _with(Scope.JOBS)]

IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x21-\x7e]{1,128}$",
        description="Of your choice. A request that is sent again with it is not done again: it "
        "gets the first one's answer.",
    ),
]
Explain = Annotated[
    str | None,
    Query(
        max_length=64,
        description="`true` for a heat map of the most probable class, or the name of a class.",
        examples=["true"],
    ),
]
JobId = Annotated[
    str, Path(max_length=64, pattern="^[-0-9A-Za-z]+$", description="The job's `id`.")
]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the document says of the errors of a route."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


_AUTH = (401, 403, 421)
_UPLOAD = (400, 408, 409, 413, 415, 422, 429)
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "additionalProperties": False,
                    "properties": {
                        FIELD: {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "JPEG, PNG, TIFF or DICOM files.",
                        }
                    },
                },
                "encoding": {
                    FIELD: {
                        "contentType": "image/jpeg, image/png, image/tiff, application/dicom, "
                        "application/octet-stream"
                    }
                },
            }
        },
    }
}


@router.get("/health/live", tags=["health"])
async def live() -> Health:
    """Whether the gateway runs."""
    return Health(status="live")


@router.get(
    "/health/ready",
    tags=["health"],
    responses={
        503: {
            "model": Health,
            "description": "The database does not answer, or the gateway is about to end.",
        }
    },
)
async def ready(gateway: Parts, response: Response) -> Health:
    """Whether the gateway can take requests. A model that is away is told by `/v1/models`."""
    if gateway.end.draining:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return Health(status="draining")
    try:
        await in_database(gateway.store.ping)
    except ProblemError:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return Health(status="unavailable")
    return Health(status="ready")


@router.get("/v1/models", tags=["models"], responses=_problems(*_AUTH, 503, 504))
async def models(gateway: Parts, principal: Anybody, caller: OnBehalf) -> Models:  # noqa: ARG001
    """The models that can be asked, each with its model card."""
    return Models(models=(await _described(gateway, caller),))


@router.get("/v1/models/{name}", tags=["models"], responses=_problems(*_AUTH, 404, 422, 503, 504))
async def model(
    gateway: Parts,
    principal: Anybody,  # noqa: ARG001
    caller: OnBehalf,
    name: Annotated[str, Path(max_length=64)],
) -> Model:
    """A model and its model card."""
    described = await _described(gateway, caller)
    if name != described.name:
        raise ProblemError(404, "not-found", "There is no such model here.")
    return described


async def _described(gateway: Gateway, caller: Caller) -> Model:
    try:
        return await gateway.model.describe(caller)
    except ModelError as error:
        raise model_problem(error) from None


@router.post(
    "/v1/predictions",
    tags=["predictions"],
    openapi_extra=_FORM,
    response_model=Predictions,
    responses=_problems(*_AUTH, *_UPLOAD, 502, 503, 504),
)
async def predictions(  # noqa: PLR0917 - called by name
    request: Request,
    gateway: Parts,
    principal: Predicting,
    caller: OnBehalf,
    explain: Explain = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Ask about one image, or some.

    An image that cannot be used is told in its place, and the others are answered; where none can
    be used, the answer is a problem with the reason. No image is kept.
    """
    await gateway.rates.check(principal)
    settings = gateway.settings
    async with _files(request, gateway, limit=settings.max_images) as upload:
        await gateway.rates.spend(principal, len(upload.images))
        wanted = _explanation(explain)
        once = f"predictions {wanted} {upload.fingerprint}"
        if idempotency_key:
            earlier = await gateway.begin_once(principal, idempotency_key, once)
            if earlier is not None:
                return _json(earlier, replayed=True)
        answer = None
        try:
            asking = gateway.predictions(upload.images, caller, explain=wanted)
            result = await unless_gone(request, asking)
            answer = result.model_dump_json()
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        finally:
            if idempotency_key:
                # Without an answer, the key is free again.
                await in_database(gateway.store.end_once, principal.id, idempotency_key, answer)
            audit(
                "predict",
                principal,
                images=len(upload.images),
                outcome="answered" if answer else "none",
            )
    return _json(answer)


@router.post(
    "/v1/jobs",
    tags=["jobs"],
    status_code=202,
    openapi_extra=_FORM,
    response_model=Job,
    responses=_problems(*_AUTH, *_UPLOAD, 503),
)
async def submit(
    request: Request,
    gateway: Parts,
    principal: WithJobs,
    caller: OnBehalf,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Have many images answered in the background.

    Each image is deleted as soon as it has its answer, and the job with its results when it
    `expires`.
    """
    settings = gateway.settings
    if not settings.job_workers:
        raise ProblemError(503, "no-jobs", "This gateway does not offer jobs.")
    too_many = ProblemError(
        HTTPStatus.TOO_MANY_REQUESTS,
        "too-many-jobs",
        f"At most {settings.max_active_jobs} jobs can be unfinished; wait, or cancel one.",
        headers={"Retry-After": "10"},
    )
    if await in_database(gateway.store.unfinished, principal.id) >= settings.max_active_jobs:
        # Before the files are read; an idempotency key is of no use here.
        raise too_many
    async with _files(request, gateway, limit=settings.max_job_images) as upload:
        if idempotency_key:
            once = f"jobs {upload.fingerprint}"
            earlier = await gateway.begin_once(principal, idempotency_key, once)
            if earlier is not None:
                known = await _job(gateway, principal, earlier)
                return _json(known.model_dump_json(), 202, replayed=True, job=known)
        try:
            taken: Job = await in_database(
                gateway.store.submit,
                principal.id,
                upload.images,
                retention=settings.retention,
                request_id=caller.request_id,
                trace=caller.trace.get("traceparent", ""),
                max_active=settings.max_active_jobs,
                idempotency_key=idempotency_key or "",
            )
        except TooManyJobsError:
            # Others came while the files were read.
            if idempotency_key:
                await in_database(gateway.store.end_once, principal.id, idempotency_key, None)
            raise too_many from None
    audit("submit", principal, job=taken.id, images=taken.total)
    gateway.jobs.wake()
    return _json(taken.model_dump_json(), 202, job=taken)


@router.get("/v1/jobs", tags=["jobs"], responses=_problems(*_AUTH, 503))
async def list_jobs(gateway: Parts, principal: WithJobs) -> Jobs:
    """The caller's own jobs, the newest first."""
    return Jobs(jobs=tuple(await in_database(gateway.store.jobs, principal.id)))


@router.get("/v1/jobs/{job_id}", tags=["jobs"], responses=_problems(*_AUTH, 404, 422, 503))
async def read_job(gateway: Parts, principal: WithJobs, job_id: JobId) -> Job:
    """Where a job stands."""
    return await _job(gateway, principal, job_id)


@router.delete(
    "/v1/jobs/{job_id}",
    tags=["jobs"],
    status_code=204,
    responses=_problems(*_AUTH, 404, 422, 503),
)
async def delete_job(gateway: Parts, principal: WithJobs, job_id: JobId) -> None:
    """Delete a job with everything in it, now."""
    if not await in_database(gateway.store.delete, principal.id, job_id):
        raise _no_such_job()
    gateway.jobs.drop(job_id)
    audit("delete", principal, job=job_id)


@router.post("/v1/jobs/{job_id}/cancel", tags=["jobs"], responses=_problems(*_AUTH, 404, 422, 503))
async def cancel_job(gateway: Parts, principal: WithJobs, job_id: JobId) -> Job:
    """Ask about no more of a job's images; the answers that there are stay."""
    job: Job | None = await in_database(gateway.store.cancel, principal.id, job_id)
    if job is None:
        raise _no_such_job()
    gateway.jobs.drop(job_id)
    audit("cancel", principal, job=job_id)
    return job


@router.get(
    "/v1/jobs/{job_id}/events",
    tags=["jobs"],
    response_class=StreamingResponse,
    responses=_problems(*_AUTH, 404, 422, 503)
    | {
        200: {
            "description": "Server-sent events `progress`, and `end` as the last one, each with "
            "the job as JSON. It begins with how the job stands.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def watch_job(
    request: Request, gateway: Parts, principal: WithJobs, job_id: JobId
) -> StreamingResponse:
    """The progress of a job, as it happens."""
    await _job(gateway, principal, job_id)
    return StreamingResponse(
        _events(request, gateway, principal, job_id),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )


@router.get(
    "/v1/jobs/{job_id}/result",
    tags=["jobs"],
    response_model=JobResult,
    responses=_problems(*_AUTH, 404, 422, 503)
    | {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
async def job_result(
    gateway: Parts,
    principal: WithJobs,
    job_id: JobId,
    format: Annotated[
        Literal["json", "csv"], Query(description="What the answer is written in.")
    ] = "json",
) -> Response:
    """What is known of a job's images so far, in the order of the request's files."""
    job = await _job(gateway, principal, job_id)
    results: list[dict[str, Any]] = await in_database(gateway.store.results, job_id)
    audit("result", principal, job=job_id, images=len(results))
    if format == "csv":
        disposition = f'attachment; filename="{job.id}.csv"'
        return Response(
            _csv(results), media_type="text/csv", headers={"Content-Disposition": disposition}
        )
    return _json(json.dumps({"job": job.model_dump(mode="json"), "images": results}))


def _files(request: Request, gateway: Gateway, *, limit: int) -> Any:
    return uploaded(request, limit=limit, limits=gateway.settings.limits)


def _explanation(explain: str | None) -> bool | str:
    if explain in (None, "", "false"):
        return False
    return True if explain == "true" else explain or False


def _json(
    text: str | None, status: int = 200, *, replayed: bool = False, job: Job | None = None
) -> Response:
    headers = {"Idempotent-Replayed": "true"} if replayed else {}
    if job is not None:
        headers["Location"] = f"/v1/jobs/{job.id}"
    return Response(text, status, headers, "application/json")


async def _job(gateway: Gateway, principal: Principal, job_id: str) -> Job:
    job: Job | None = await in_database(gateway.store.job, principal.id, job_id)
    if job is None:
        raise _no_such_job()
    return job


def _no_such_job() -> ProblemError:
    return ProblemError(404, "not-found", "There is no such job of these credentials.")


async def _events(
    request: Request, gateway: Gateway, principal: Principal, job_id: str
) -> AsyncIterator[str]:
    """The events of a job, until it has finished, or the client or the gateway leaves."""
    loop = asyncio.get_running_loop()
    last, spoken = "", loop.time()
    while not gateway.end.closing and not await request.is_disconnected():
        try:
            job = await _job(gateway, principal, job_id)
        except ProblemError:
            return
        text = job.model_dump_json()
        if text != last:
            yield f"event: {'end' if job.finished else 'progress'}\ndata: {text}\n\n"
            last, spoken = text, loop.time()
        if job.finished:
            return
        if loop.time() - spoken > _SIGN_OF_LIFE:
            yield ": still there\n\n"
            spoken = loop.time()
        await asyncio.sleep(_WATCH)


def _csv(results: list[dict[str, Any]]) -> str:
    """A row for each image; a column for each class's probability and decision."""
    labels = next((list(row["probabilities"]) for row in results if "probabilities" in row), [])
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(
        [
            "index",
            "outcome",
            "label",
            *(f"p({label})" for label in labels),
            *(f"decision({label})" for label in labels),
            "quality",
            "reason",
            "detail",
            "model_version",
        ]
    )
    for row in results:
        quality = row.get("quality") or {}
        table.writerow(
            [
                row["index"],
                row["outcome"],
                row.get("label", ""),
                *(row.get("probabilities", {}).get(label, "") for label in labels),
                *(row.get("decisions", {}).get(label, "") for label in labels),
                " ".join(reason["reason"] for reason in quality.get("reasons", ())),
                row.get("reason", ""),
                row.get("detail", ""),
                row.get("model_version", ""),
            ]
        )
    return text.getvalue()
