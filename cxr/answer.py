"""What is asked of the engine about an image, what it answers, and both as JSON.

The JSON is what a worker and the process in front of it speak. Each reads what an older one wrote:
whatever is missing was not asked for or not known.
"""

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr.errors import BadImageError, Rejection

# Header of a request to the worker that carries its options as JSON.
OPTIONS_HEADER = "X-CXR-Options"
# Header of a request to the worker whose images are on the board; a worker that takes such requests
# has it in its answers, too.
BOARD_HEADER = "X-CXR-Board"
# Names the file with the memory that a worker shares with the process in front of it.
BOARD_FILE_ENV = "CXR_BOARD_FILE"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is wanted of an image beside its probabilities.

    Attributes:
        explain: a heat map: for the most probable class, or for the class named.
        quality: how good the image is, and how far from the training images, if the model can tell.
    """

    explain: bool | str = False
    quality: bool = True

    @functools.cache  # noqa: B019 - few different ones, and equal ones are one
    def to_json(self) -> str:
        """The options as ASCII on one line, fit for a header."""
        return json.dumps({"explain": self.explain, "quality": self.quality})

    @classmethod
    def from_json(cls, text: str) -> "Options":
        """Read what `to_json` wrote; an option that is missing keeps its default.

        Raises:
            ValueError: not a JSON object, or a value of another type.
        """
        return cls.of(json.loads(text))

    @classmethod
    def of(cls, document: object) -> "Options":
        """The same of what was read already.

        Raises:
            ValueError: not an object, or a value of another type.
        """
        if not isinstance(document, dict):
            raise ValueError("options must be a JSON object")
        options = cls(**{key: document[key] for key in ("explain", "quality") if key in document})
        if not isinstance(options.explain, (bool, str)) or not isinstance(options.quality, bool):
            raise ValueError("an option has a value of another type")
        return options


@dataclass(frozen=True, kw_only=True)
class OnBoard:
    """What the header of a request says whose images are on the board.

    The board is memory that both sides share. The answer is a JSON array with one answer for each
    image; `null` where there is none.

    Attributes:
        at: where the board has a byte in which the worker tells which image it is at, counted from
            1, and behind it one for each image, which tells the worker to pass it over.
        start: where the first image is; the others follow it without a gap.
        sizes: of the images, in bytes.
        options: what is wanted of each.
    """

    at: int
    start: int
    sizes: tuple[int, ...]
    options: tuple[Options, ...]

    def to_json(self) -> str:
        """ASCII on one line, fit for a header."""
        options = ", ".join(one.to_json() for one in self.options)
        return (
            f'{{"at": {self.at}, "start": {self.start}, "sizes": {list(self.sizes)}, '
            f'"options": [{options}]}}'
        )

    @classmethod
    def from_json(cls, text: str) -> "OnBoard":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it did not write that.
        """
        try:
            document = json.loads(text)
            return cls(
                at=int(document["at"]),
                start=int(document["start"]),
                sizes=tuple(int(size) for size in document["sizes"]),
                options=tuple(Options.of(one) for one in document["options"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError("not what a request says whose images are on the board") from error


class Stage(StrEnum):
    """A step of answering an image, in the order of the steps; `queue` comes before all others."""

    QUEUE = "queue"
    DECODE = "decode"
    PREPROCESS = "preprocess"
    INFERENCE = "inference"
    POSTPROCESS = "postprocess"
    EXPLAIN = "explain"


# Going through an enumeration itself is slow.
_STAGES = tuple(Stage)


class Decision(StrEnum):
    """Whether a finding counts as present."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    UNCERTAIN = "uncertain"


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Where in an image the model sees a class.

    Attributes:
        label: the class.
        method: how the map was made; see `docs/explanations.md`.
        heatmap: float32 `[rows, columns]` over the whole image as it is displayed, from its top
            left: evidence for the class where positive, against it where negative, the largest
            magnitude 1. It is 0 where the model does not look.
        overlay: the map over the image: a PNG, the image's longer side reduced to 256 pixels.
    """

    label: str
    method: str
    heatmap: npt.NDArray[np.float32]
    overlay: bytes


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Whether an image is one that the model can judge.

    Attributes:
        reasons: what is wrong with it, the worst first; empty where nothing is.
        scores: what the reasons rest on, by name.
    """

    reasons: tuple[Rejection, ...]
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to one image.

    Attributes:
        label: the most probable class.
        probabilities: class name to probability, in the model's order; they sum to 1.
        positive: the classes at or above their decision threshold.
        decisions: class name to decision, in the model's order; `uncertain` within the band that
            training has found about the threshold.
        quality: where it was wanted and the model can tell.
        explanation: where it was wanted.
        seconds: how long the engine took for each step of its own; an image of a batch takes as
            long as its batch in `inference`. Empty from older archives.
        batch: images that the engine answered together.
        provider: ONNX Runtime's execution provider that ran the graph; empty from older archives.

    How it was made, the last three, makes no difference to equality.
    """

    label: str
    probabilities: Mapping[str, float]
    positive: tuple[str, ...]
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    quality: Quality | None = None
    explanation: Explanation | None = None
    seconds: Mapping[Stage, float] = field(default_factory=dict, compare=False)
    batch: int = field(default=1, compare=False)
    provider: str = field(default="", compare=False)


Answer = Prediction | BadImageError


def decide(
    probabilities: Sequence[float],
    labels: Sequence[str],
    thresholds: Mapping[str, float],
    bands: Mapping[str, Sequence[float]] | None = None,
) -> Prediction:
    """Turn one row of probabilities into an answer.

    Args:
        probabilities: one number per label, in the labels' order.
        labels: class names.
        thresholds: per class, the probability from which it counts as present.
        bands: per class, from which probability and below which one it is uncertain.
    """
    named = dict(zip(labels, (float(p) for p in probabilities), strict=True))
    decisions = {}
    for label, probability in named.items():
        low, high = (bands or {}).get(label, (1.0, 0.0))
        if low <= probability < high:
            decisions[label] = Decision.UNCERTAIN
        elif probability >= thresholds[label]:
            decisions[label] = Decision.POSITIVE
        else:
            decisions[label] = Decision.NEGATIVE
    return Prediction(
        label=max(named, key=named.__getitem__),
        probabilities=named,
        positive=tuple(label for label in labels if named[label] >= thresholds[label]),
        decisions=decisions,
    )


def answer_to_json(answer: Answer) -> str:
    """An answer as one JSON object: `label` and so on, or `reason` and `error`."""
    if isinstance(answer, BadImageError):
        return json.dumps({"reason": answer.reason.value, "error": str(answer)})
    document: dict[str, Any] = {
        "label": answer.label,
        "probabilities": dict(answer.probabilities),
        "positive": list(answer.positive),
        "decisions": dict(answer.decisions),
        "seconds": dict(answer.seconds),
        "batch": answer.batch,
        "provider": answer.provider,
    }
    if quality := answer.quality:
        document["quality"] = {"reasons": list(quality.reasons), "scores": dict(quality.scores)}
    if explanation := answer.explanation:
        document["explanation"] = {
            "label": explanation.label,
            "method": explanation.method,
            "shape": list(explanation.heatmap.shape),
            "heatmap": base64.b64encode(explanation.heatmap.tobytes()).decode(),
            "overlay": base64.b64encode(explanation.overlay).decode(),
        }
    return json.dumps(document)


def answer_from_json(text: str | bytes) -> Answer:
    """Read what :func:`answer_to_json` wrote, in this release or an earlier one.

    Raises:
        ValueError: it did not write that.
    """
    return answer_from(json.loads(text))


def answer_from(document: Any) -> Answer:
    """The same of what any reader of JSON made of it.

    Raises:
        ValueError: it is no answer.
    """
    try:
        if "reason" in document:
            return BadImageError(Rejection(document["reason"]), document["error"])
        decisions = document.get("decisions", {})
        return Prediction(
            label=document["label"],
            probabilities=document["probabilities"],
            positive=tuple(document["positive"]),
            decisions={label: Decision(value) for label, value in decisions.items()},
            quality=_quality(document.get("quality")),
            explanation=_explanation(document.get("explanation")),
            seconds=_seconds(document.get("seconds", {})),
            batch=int(document.get("batch", 1)),
            provider=str(document.get("provider", "")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not an answer") from error


def _seconds(document: Mapping[str, Any]) -> dict[Stage, float]:
    """What is known of them: a later release may have more steps."""
    return {stage: float(document[stage]) for stage in _STAGES if stage in document}


def _quality(document: Mapping[str, Any] | None) -> Quality | None:
    if document is None:
        return None
    reasons = tuple(Rejection(reason) for reason in document["reasons"])
    return Quality(reasons=reasons, scores=document["scores"])


def _explanation(document: Mapping[str, Any] | None) -> Explanation | None:
    if document is None:
        return None
    values = np.frombuffer(base64.b64decode(document["heatmap"]), dtype=np.float32)
    return Explanation(
        label=document["label"],
        method=document["method"],
        heatmap=values.reshape(document["shape"]),
        overlay=base64.b64decode(document["overlay"]),
    )
