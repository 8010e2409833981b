"""KServe V1: JSON with Base64 images, or one raw image as the body."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from cxr.answer import Answer, Prediction, Quality
from cxr.config import ModelConfig
from cxr.decode import ACCEPTED
from cxr.errors import BadImageError, Rejection
from cxr_server.errors import bad_request, check_batch
from cxr_server.service import Image

# How one image is sent as it is, by the header; what its bytes are decides.
IMAGE_TYPES = ("image/jpeg", "image/png", "image/tiff", "application/dicom")

_ACCEPTED = f'send {{"instances": [{{"b64": "<Base64 of a {ACCEPTED} file>"}}, ...]}}'
_NOT_JSON = (
    f"The body is not valid JSON; {_ACCEPTED}, or one image file with the Content-Type "
    f"{', '.join(IMAGE_TYPES[:-1])} or {IMAGE_TYPES[-1]}."
)

_HEATMAP_DIGITS = 4


def parse(body: bytes, max_batch: int) -> tuple[list[Image], str | None]:
    """The images of a `:predict` or `:explain` body, and the class to explain if it names one.

    Raises:
        RequestError: not JSON or not of the V1 shape (400), or too many images (413).
    """
    document = parse_json(body, _NOT_JSON)
    instances = document.get("instances")
    if not isinstance(instances, list) or not instances:
        raise bad_request(f'"instances" must be a list with at least one item; {_ACCEPTED}.')
    check_batch(len(instances), max_batch)
    label = document.get("class")
    if label is not None and not isinstance(label, str):
        raise bad_request('"class" must be the name of a class.')
    return [_image(index, instance) for index, instance in enumerate(instances)], label


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


def response(config: ModelConfig, answers: Sequence[Answer], *, explained: bool = False) -> bytes:
    """The body of the answer; a bad image is marked with `error` and `reason` in its place.

    Args:
        config: of the model.
        answers: to the images.
        explained: whether a list of explanations stands beside that of predictions, null for a bad
            image.
    """
    document: dict[str, object] = {"predictions": [_prediction(answer) for answer in answers]}
    if explained:
        document["explanations"] = [_explanation(answer) for answer in answers]
    return orjson.dumps(document | {"model_name": config.name, "model_version": config.version})


def _prediction(answer: Answer) -> dict[str, object]:
    if isinstance(answer, Prediction):
        prediction: dict[str, object] = {
            "label": answer.label,
            "probabilities": answer.probabilities,
            "positive": answer.positive,
            "decisions": answer.decisions,
        }
        if answer.quality is not None:
            prediction["quality"] = quality(answer.quality)
        return prediction
    return {"error": str(answer), "reason": answer.reason.value}


def quality(found: Quality) -> dict[str, object]:
    """What guards say of an image, as it stands in answers."""
    return {"reasons": found.reasons, "scores": found.scores}


def _explanation(answer: Answer) -> dict[str, object] | None:
    if not isinstance(answer, Prediction) or answer.explanation is None:
        return None
    found = answer.explanation
    return {
        "class": found.label,
        "method": found.method,
        "heatmap": np.round(found.heatmap.astype(np.float64), _HEATMAP_DIGITS).tolist(),
        "overlay": {"b64": base64.b64encode(found.overlay).decode()},
    }
