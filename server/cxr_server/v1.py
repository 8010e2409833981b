"""KServe V1: JSON with Base64 images, or one raw image as the body."""

import binascii
from collections.abc import Sequence
from typing import Any

import orjson

from cxr.config import ModelConfig
from cxr.engine import Prediction
from cxr.errors import BadImageError, Rejection
from cxr_server.errors import bad_request, check_batch
from cxr_server.service import Answer, Image

_ACCEPTED = 'send {"instances": [{"b64": "<Base64 of a JPEG or PNG file>"}, ...]}'
_NOT_JSON = (
    f"The body is not valid JSON; {_ACCEPTED}, or one image file with the Content-Type image/jpeg "
    "or image/png."
)


def parse(body: bytes, max_batch: int) -> list[Image]:
    """The images of a `:predict` body.

    Raises:
        RequestError: not JSON or not of the V1 shape (400), or too many images (413).
    """
    document = parse_json(body, _NOT_JSON)
    instances = document.get("instances")
    if not isinstance(instances, list) or not instances:
        raise bad_request(f'"instances" must be a list with at least one item; {_ACCEPTED}.')
    check_batch(len(instances), max_batch)
    return [_image(index, instance) for index, instance in enumerate(instances)]


def parse_json(
    body: bytes | memoryview, not_json: str = "The body is not valid JSON."
) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RequestError: not JSON, or no object (400).
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise bad_request(not_json) from None
    if not isinstance(document, dict):
        raise bad_request("The body must be a JSON object.")
    return document


def decode_base64(text: str, where: str) -> Image:
    """Strict Base64; what is not harms no other image of the request."""
    try:
        return binascii.a2b_base64(text, strict_mode=True) if text else b""
    except (binascii.Error, ValueError):
        return BadImageError(Rejection.NOT_AN_IMAGE, f"{where} is not valid Base64.")


def _image(index: int, instance: object) -> Image:
    text = instance.get("b64") if isinstance(instance, dict) else None
    if not isinstance(text, str):
        return BadImageError(
            Rejection.NOT_AN_IMAGE, f'instances[{index}] has no string "b64"; {_ACCEPTED}.'
        )
    return decode_base64(text, f"instances[{index}].b64")


def response(config: ModelConfig, answers: Sequence[Answer]) -> bytes:
    """The body of the answer; a bad image is marked with `error` and `reason` in its place."""
    return orjson.dumps(
        {
            "predictions": [_prediction(answer) for answer in answers],
            "model_name": config.name,
            "model_version": config.version,
        }
    )


def _prediction(answer: Answer) -> dict[str, object]:
    if isinstance(answer, Prediction):
        return {
            "label": answer.label,
            "probabilities": answer.probabilities,
            "positive": answer.positive,
        }
    return {"error": str(answer), "reason": answer.reason.value}
