"""The files of a request."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cxr.decode import ACCEPTED, DecodeLimits, check_size
from cxr.errors import BadImageError
from cxr_client.schemas import RefusedImage
from cxr_portal.problems import ProblemError

FIELD = "images"
_MULTIPART = "multipart/form-data"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What a request has sent.

    Attributes:
        images: each encoded, or why it is refused already.
        fingerprint: of all of them.
    """

    images: list[bytes | RefusedImage]
    fingerprint: str

    @property
    def size(self) -> int:
        """Bytes of the images that are not refused."""
        return sum(len(image) for image in self.images if isinstance(image, bytes))


@asynccontextmanager
async def uploaded(request: Request, *, limit: int, limits: DecodeLimits) -> AsyncIterator[Upload]:
    """Read the files of a multipart form; their names are not looked at.

    Args:
        request: whose body was not read yet.
        limit: files, at most.
        limits: of one image.

    Raises:
        ProblemError: another content type (415), no form or no files (400), too many files (413).
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _MULTIPART:
        raise ProblemError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "not-multipart",
            f"Send {_MULTIPART} with {ACCEPTED} files in the field {FIELD!r}.",
        )
    try:
        # One more than allowed, so that the answer can say what is wrong.
        form = await request.form(max_files=limit + 1, max_fields=limit + 1)
    except HTTPException as error:
        if "Too many" in str(error.detail):
            raise _too_many(limit) from None
        raise ProblemError(
            HTTPStatus.BAD_REQUEST, "malformed-form", "The body is not a whole multipart form."
        ) from None
    try:
        files = form.getlist(FIELD)
        if len(files) > limit:
            raise _too_many(limit)
        if not files or len(form.multi_items()) != len(files):
            raise ProblemError(
                HTTPStatus.BAD_REQUEST,
                "no-files",
                f"The form must have the field {FIELD!r} once for each file, and no other.",
            )
        images: list[bytes | RefusedImage] = []
        digest = hashlib.sha256()
        for index, file in enumerate(files):
            if not isinstance(file, UploadFile):
                raise ProblemError(
                    HTTPStatus.BAD_REQUEST,
                    "no-files",
                    f"Each field {FIELD!r} must be a file, with a file name in its header.",
                )
            data = await file.read()
            digest.update(hashlib.sha256(data).digest())
            try:
                check_size(data, limits)
            except BadImageError as error:
                refused = RefusedImage(index=index, reason=error.reason.value, detail=str(error))
                images.append(refused)
            else:
                images.append(data)
        yield Upload(images=images, fingerprint=digest.hexdigest())
    finally:
        await form.close()


def _too_many(limit: int) -> ProblemError:
    return ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "too-many-files",
        f"There are too many files; at most {limit} are accepted at once.",
    )
