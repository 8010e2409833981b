"""Asks a portal over HTTP."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from cxr_client import schemas

_Answer = TypeVar("_Answer", bound=BaseModel)
_FIELD = "images"
Image = bytes | Path


class PortalError(Exception):
    """The portal gave no answer; the message is its sentence.

    Attributes:
        status: the HTTP status; 0 where the portal was not reached.
        kind: stable, for programs, such as `urn:cxr:problem:image-refused`.
        request_id: what the portal's log knows the request by.
        images: what is wrong with each image, where that is why.
        retry_after: seconds after which the same request may succeed, if the portal says so.
    """

    def __init__(
        self,
        detail: str,
        *,
        status: int = 0,
        kind: str = "",
        request_id: str = "",
        images: Sequence[schemas.RefusedImage] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.request_id = request_id
        self.images = tuple(images)
        self.retry_after = retry_after


class Client:
    """A portal. Use it as a context manager, or close it.

    Every method raises PortalError where the portal gives no answer.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60.0) -> None:
        """Make a client; nothing is sent yet.

        Args:
            url: of the portal, such as `https://cxr.example.org`.
            key: an API key, or a token of the issuer that the portal trusts.
            timeout: seconds for each request.
        """
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> tuple[schemas.Model, ...]:
        """The models that can be asked, each with its model card."""
        return self._get("/v1/models", schemas.Models).models

    def predict(
        self, *images: Image, explain: bool | str = False, idempotency_key: str | None = None
    ) -> schemas.Predictions:
        """Ask about images.

        Args:
            images: each an encoded JPEG, PNG, TIFF or DICOM file, or where one is.
            explain: with a heat map: of the most probable class, or of the class named.
            idempotency_key: makes it safe to ask again after a broken connection.

        Returns:
            An answer for each image. One that cannot be used is told in its place; where none can,
            there is a PortalError.
        """
        parameters = {} if explain is False else {"explain": "true" if explain is True else explain}
        response = self._post("/v1/predictions", images, idempotency_key, params=parameters)
        return schemas.Predictions.model_validate_json(response.content)

    def submit(self, *images: Image, idempotency_key: str | None = None) -> "Job":
        """Have many images answered in the background."""
        response = self._post("/v1/jobs", images, idempotency_key)
        return Job(self, schemas.Job.model_validate_json(response.content))

    def job(self, job_id: str) -> "Job":
        """A job that was submitted before."""
        return Job(self, self._get(_job_path(job_id), schemas.Job))

    def jobs(self) -> tuple[schemas.Job, ...]:
        """One's own jobs, the newest first."""
        return self._get("/v1/jobs", schemas.Jobs).jobs

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send any request, and turn failures into PortalError."""
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise PortalError(f"The portal cannot be reached: {type(error).__name__}.") from error
        if response.is_error:
            raise _error(response)
        return response

    def _get(self, path: str, answer: type[_Answer]) -> _Answer:
        return answer.model_validate_json(self.request("GET", path).content)

    def _post(
        self, path: str, images: Sequence[Image], idempotency_key: str | None, **options: Any
    ) -> httpx.Response:
        # The file's own name stays here: names of radiographs often are names of patients.
        files = [
            (_FIELD, (str(index), image.read_bytes() if isinstance(image, Path) else image))
            for index, image in enumerate(images)
        ]
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self.request("POST", path, files=files, headers=headers, **options)


class Job:
    """A job of a portal.

    Attributes:
        status: how it stood when it was last asked.
    """

    def __init__(self, client: Client, status: schemas.Job) -> None:
        self._client = client
        self.status = status

    @property
    def id(self) -> str:
        """What `Client.job` finds it by."""
        return self.status.id

    def refresh(self) -> schemas.Job:
        """Ask how it stands."""
        self.status = self._client.job(self.id).status
        return self.status

    def progress(self, interval: float = 0.5) -> Iterator[schemas.Job]:
        """How it stands, again and again, until it has finished."""
        while not self.refresh().finished:
            yield self.status
            time.sleep(interval)
        yield self.status

    def wait(self) -> schemas.Job:
        """Wait until it has finished."""
        *_, last = self.progress()
        return last

    def result(self) -> schemas.JobResult:
        """What is known of its images so far."""
        response = self._client.request("GET", f"{_job_path(self.id)}/result")
        return schemas.JobResult.model_validate_json(response.content)

    def result_csv(self) -> str:
        """The same as a table."""
        parameters = {"format": "csv"}
        return self._client.request("GET", f"{_job_path(self.id)}/result", params=parameters).text

    def cancel(self) -> schemas.Job:
        """Have no more of its images answered."""
        response = self._client.request("POST", f"{_job_path(self.id)}/cancel")
        self.status = schemas.Job.model_validate_json(response.content)
        return self.status

    def delete(self) -> None:
        """Delete it with everything in it."""
        self._client.request("DELETE", _job_path(self.id))


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _error(response: httpx.Response) -> PortalError:
    try:
        problem = schemas.Problem.model_validate_json(response.content)
    except ValueError:
        return PortalError(
            f"The portal answered {response.status_code}.", status=response.status_code
        )
    wait = response.headers.get("Retry-After", "")
    return PortalError(
        problem.detail,
        status=problem.status,
        kind=problem.type,
        request_id=problem.request_id,
        images=[schemas.RefusedImage.model_validate(image) for image in problem.images or ()],
        retry_after=float(wait) if wait.isdigit() else None,
    )
