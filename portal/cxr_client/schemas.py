"""What the portal's API takes and gives: one definition for gateway, document and clients."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True)


class ImageDecision(StrEnum):
    """Whether a finding counts as present."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    UNCERTAIN = "uncertain"


class QualityReason(_Document):
    """One thing that is wrong with an image."""

    reason: Annotated[str, Field(description="Stable and machine-readable, such as `too_dark`.")]
    text: Annotated[str, Field(description="The same in plain words.")]


class ImageQuality(_Document):
    """Whether the image is one that the model can judge."""

    reasons: Annotated[
        tuple[QualityReason, ...],
        Field(description="What is wrong with it, the worst first; empty where nothing is."),
    ]
    scores: Annotated[
        dict[str, float], Field(description="What the reasons rest on, by name; higher is worse.")
    ]


class HeatMap(_Document):
    """Where in the image the model sees the class."""

    label: Annotated[str, Field(description="The class that is explained.")]
    rows: int
    columns: int
    values: Annotated[
        tuple[float, ...],
        Field(
            description="Row by row over the whole image as it is displayed, from its top left: "
            "evidence for the class where positive, against it where negative, -1 to 1."
        ),
    ]
    png: Annotated[
        str,
        Field(
            description="The same as a picture to lay over the image, stretched to its size: a PNG "
            "in Base64, orange for the class, blue against it, transparent where there is no "
            "evidence. Nothing of the image is in it.",
            json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"},
        ),
    ]


class AnsweredImage(_Document):
    """The model's answer to one image."""

    outcome: Literal["answered"] = "answered"
    index: Annotated[int, Field(ge=0, description="Place of the file in the request, from 0.")]
    label: Annotated[str, Field(description="The most probable class.")]
    probabilities: Annotated[
        dict[str, Probability], Field(description="Calibrated, by class; they sum to 1.")
    ]
    decisions: Annotated[
        dict[str, ImageDecision],
        Field(description="By class; `uncertain` is within the band about its threshold."),
    ]
    quality: Annotated[
        ImageQuality | None, Field(description="Null where the model has no guards.")
    ] = None
    heatmap: Annotated[HeatMap | None, Field(description="Where it was asked for.")] = None
    model_version: str


class RefusedImage(_Document):
    """An image that cannot be used: do not send it again as it is."""

    outcome: Literal["refused"] = "refused"
    index: Annotated[int, Field(ge=0, description="Place of the file in the request, from 0.")]
    reason: Annotated[str, Field(description="Stable and machine-readable, such as `damaged`.")]
    detail: Annotated[str, Field(description="One sentence for the person who sent it.")]


class FailedImage(_Document):
    """An image of a job that the model could not answer, though nothing is known to be wrong."""

    outcome: Literal["failed"] = "failed"
    index: Annotated[int, Field(ge=0)]
    detail: str


ImageResult = Annotated[AnsweredImage | RefusedImage | FailedImage, Field(discriminator="outcome")]


_PREDICTIONS: dict[str, Any] = {
    "request_id": "a2704736-7b20-4b0f-9437-b3fc2c84063b",
    "model": "cxr",
    "images": [
        {
            "outcome": "answered",
            "index": 0,
            "label": "No finding",
            "probabilities": {"COVID-19": 0.02, "No finding": 0.91, "Pneumonia": 0.07},
            "decisions": {
                "COVID-19": "negative",
                "No finding": "positive",
                "Pneumonia": "negative",
            },
            "quality": {"reasons": [], "scores": {"too_dark": 0.1}},
            "heatmap": None,
            "model_version": "1.0",
        },
        {
            "outcome": "refused",
            "index": 1,
            "reason": "not_an_image",
            "detail": "The data is not an image; send one JPEG, PNG, TIFF or DICOM file.",
        },
    ],
}


class Predictions(_Document):
    """Answers to the images of one request, in its order."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [_PREDICTIONS]})

    request_id: str
    model: Annotated[str, Field(description="The model's name.")]
    images: tuple[Annotated[AnsweredImage | RefusedImage, Field(discriminator="outcome")], ...]


class JobState(StrEnum):
    """Where a job stands. The last two are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"


_JOB: dict[str, Any] = {
    "id": "63c814bb-1d23-41fd-8039-ff7fb4070848",
    "state": "running",
    "total": 500,
    "answered": 249,
    "refused": 1,
    "failed": 0,
    "cancelled": 0,
    "created": "2026-01-31T09:30:00Z",
    "expires": "2026-02-01T09:30:00Z",
}


class Job(_Document):
    """A batch of images that is answered in the background."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [_JOB]})

    id: str
    state: JobState
    total: Annotated[int, Field(ge=1, description="Images.")]
    answered: Annotated[int, Field(ge=0)]
    refused: Annotated[int, Field(ge=0)]
    failed: Annotated[int, Field(ge=0)]
    cancelled: Annotated[int, Field(ge=0, description="Images that are no longer asked about.")]
    created: datetime
    expires: Annotated[datetime, Field(description="When the job and its result are deleted.")]

    @property
    def finished(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in (JobState.DONE, JobState.CANCELLED)


class Jobs(_Document):
    """The caller's own jobs, the newest first."""

    jobs: tuple[Job, ...]


class JobResult(_Document):
    """What is known of a job's images so far, in their order."""

    job: Job
    images: tuple[ImageResult, ...]


class Figure(_Document):
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class ClassCard(_Document):
    """One class of a model, and how well it is told from the others."""

    label: str
    threshold: Annotated[
        Probability, Field(description="From which probability it counts as present.")
    ]
    images: Annotated[int, Field(ge=0, description="For training, validation and test together.")]
    sensitivity: Figure | None = None
    specificity: Figure | None = None
    roc_auc: Figure | None = None


class ModelCard(_Document):
    """What a reader should know of a model before believing it."""

    intended_use: str
    limitations: tuple[str, ...]
    architecture: dict[str, str]
    synthetic: Annotated[bool, Field(description="Made from drawn phantoms only.")]
    sources: Annotated[dict[str, int], Field(description="Images by where they come from.")]
    images: Annotated[int, Field(description="For training, validation and test together.")]
    test_images: int
    accuracy: Figure
    balanced_accuracy: Figure
    expected_calibration_error: Figure
    classes: tuple[ClassCard, ...]


class Model(_Document):
    """A model that can be asked."""

    name: str
    version: str
    description: str
    ready: bool
    labels: Annotated[tuple[str, ...], Field(description="The classes, in the model's order.")]
    explains: Annotated[bool, Field(description="Whether it can give heat maps.")]
    guarded: Annotated[bool, Field(description="Whether it judges the quality of images.")]
    card: ModelCard


class Models(_Document):
    """The models behind this gateway."""

    models: tuple[Model, ...]


class Health(_Document):
    """Whether this gateway can be used."""

    status: Literal["live", "ready", "unavailable", "draining"]


class Problem(BaseModel):
    """Why there is no answer (RFC 9457)."""

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:cxr:problem:too-many-images",
                    "title": "Too Many Requests",
                    "status": 429,
                    "detail": "These credentials allow 600 images a minute; try again later.",
                    "request_id": "a2704736-7b20-4b0f-9437-b3fc2c84063b",
                }
            ]
        },
    )

    type: Annotated[str, Field(description="Stable, for programs.")]
    title: str
    status: int
    detail: Annotated[str, Field(description="One sentence for people.")]
    request_id: str
    images: Annotated[
        list[dict[str, Any]] | None,
        Field(description="What is wrong with each image, where that is why."),
    ] = None
