"""The model configuration: one validated document that travels inside the archive.

Training writes it, the packager checks it against the graph, serving reads it. A bundle is the
folder that training exports: :data:`CONFIG_FILE` and the graph that it names.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cxr.engine import CONFIG_FILE, SCHEMA_VERSION
from cxr.errors import ModelLoadError
from cxr.preprocess import Preprocessing

Probability = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A model name becomes part of URLs, file names and metric labels.
ModelName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
ModelVersion = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){0,2}$")]
Label = Annotated[str, Field(min_length=1, max_length=64)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Document):
    """One input or output of the graph; -1 stands for the batch axis."""

    name: str
    dtype: Literal["float32"]
    shape: tuple[int, ...]


class Graph(_Document):
    """The ONNX graph, head and softmax included."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    sha256: Sha256
    opset: Annotated[int, Field(ge=7)]
    input: TensorSpec
    output: TensorSpec


class Architecture(_Document):
    """What the graph is made of."""

    backbone: str
    weights: str
    features: str
    head: str


class Interval(_Document):
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class ClassMetrics(_Document):
    """One class against the rest, at the argmax decision."""

    support: Annotated[int, Field(ge=0)]
    sensitivity: Probability | None
    specificity: Probability | None
    precision: Probability | None
    f1: Probability | None
    roc_auc: Probability | None


class Metrics(_Document):
    """Evaluation on the test split.

    `method` says how the intervals were made.
    """

    split: Literal["test"]
    images: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)]
    method: str
    accuracy: Interval
    balanced_accuracy: Interval
    per_class: dict[Label, ClassMetrics]
    per_source: dict[str, Interval]
    confusion: tuple[tuple[int, ...], ...]


class Source(_Document):
    """One data source within the training data."""

    name: str
    images: Annotated[int, Field(ge=0)]


class TrainingData(_Document):
    """Summary of the data that the model was made from."""

    synthetic: bool
    manifest_sha256: Sha256
    sources: tuple[Source, ...]
    labels: dict[Label, int]
    images: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)]
    splits: dict[str, int]
    seed: int


class ModelConfig(_Document):
    """Everything that serving must know about a model, and a reader should.

    Attributes:
        schema_version: version of this document's layout.
        labels: class names in the order of the graph's output.
        thresholds: per label, the probability from which that finding counts as present.
        versions: what produced the model (Python, torch, ...).
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: ModelName
    version: ModelVersion
    description: str
    architecture: Architecture
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    preprocessing: Preprocessing
    thresholds: dict[Label, Probability]
    graph: Graph
    intended_use: str
    limitations: Annotated[tuple[str, ...], Field(min_length=1)]
    training_data: TrainingData
    metrics: Metrics
    versions: dict[str, str]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be unique")
        for field in ("thresholds", "training_data.labels", "metrics.per_class"):
            value: object = self
            for part in field.split("."):
                value = getattr(value, part)
            if not isinstance(value, dict) or set(value) != set(self.labels):
                raise ValueError(f"{field} must have exactly one entry for each label")
        expected = (-1, *self.preprocessing.item_shape)
        if self.graph.input.shape != expected:
            raise ValueError(
                f"graph.input.shape is {list(self.graph.input.shape)}, "
                f"but the preprocessing makes {list(expected)}"
            )
        if self.graph.output.shape != (-1, len(self.labels)):
            raise ValueError(
                f"graph.output.shape is {list(self.graph.output.shape)}, "
                f"but there are {len(self.labels)} labels"
            )
        return self

    def to_json(self) -> str:
        """The document as it stands in an archive: indented JSON with a final newline."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read and validate a configuration.

        Raises:
            ModelLoadError: not JSON, an unknown field, or a value that does not fit.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise ModelLoadError(
                f"The model configuration is not valid: {where}: {first['msg']}"
            ) from None


def load_config(bundle: Path) -> ModelConfig:
    """Read the configuration of a bundle folder.

    Raises:
        ModelLoadError: no such file, or not a valid configuration.
    """
    path = bundle / CONFIG_FILE
    try:
        return ModelConfig.from_json(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"Cannot read {path}: {error.strerror}.") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
