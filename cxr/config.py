"""The model configuration: one validated document that travels inside the archive.

Training writes it, the packager checks it against the graph, serving reads it. A bundle is the
folder that training exports: :data:`CONFIG_FILE` and the graph that it names.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)

from cxr.drift import summary_names
from cxr.engine import CONFIG_FILE, SCHEMA_VERSION
from cxr.errors import ModelLoadError, Rejection
from cxr.preprocess import Preprocessing
from cxr.quality import PIXEL_REASONS, REASONS

Probability = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A model name becomes part of URLs, file names and metric labels.
ModelName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
ModelVersion = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){0,2}$")]
Label = Annotated[str, Field(min_length=1, max_length=64)]
_ROUNDING = 1e-6


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


class ExplanationOutput(_Document):
    """What the graph adds for heat maps.

    Attributes:
        switch: name of the graph's optional input, a truth value: false leaves the map out.
        output: evidence for each class at each place, `[N, classes, rows, columns]`.
        method: how it is made: `class-activation`, the exact share of each place in a linear
            margin; `ablation`, the loss of probability without each place.
    """

    switch: str
    output: TensorSpec
    method: Literal["class-activation", "ablation"]


class Guards(_Document):
    """What tells that an image is not one that the model can judge.

    Attributes:
        output: scores of each image, `[N, scores]`.
        scores: names of its columns: the reasons that they give.
        limits: by reason, the score above which it is one.
        passed: share of the validation images that pass all of them.
        detected: by reason, the share found among copies of validation images made for it.
    """

    output: TensorSpec
    scores: tuple[Rejection, ...]
    limits: dict[Rejection, float]
    passed: Probability
    detected: dict[Rejection, Probability]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.output.shape != (-1, len(self.scores)):
            raise ValueError("guards.output.shape must be -1 and the number of scores")
        if sorted(self.scores) != sorted(set(REASONS) - set(PIXEL_REASONS)):
            raise ValueError("guards.scores must be the reasons that pixels do not tell")
        if set(self.limits) != set(REASONS):
            raise ValueError("guards.limits must have exactly one entry for each reason")
        return self


class Distribution(_Document):
    """How a number is distributed over some images.

    Attributes:
        edges: between the bins, ascending; each bin holds its upper edge, the last one all above.
        shares: of the images in each bin, all above 0; their sum is 1.
        images: how many there were.
    """

    edges: Annotated[tuple[float, ...], Field(min_length=1)]
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    images: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.shares) != len(self.edges) + 1:
            raise ValueError("shares must have one entry more than edges")
        if sorted(set(self.edges)) != list(self.edges):
            raise ValueError("edges must ascend")
        if abs(sum(self.shares) - 1) > _ROUNDING:
            raise ValueError("the sum of shares must be 1")
        return self


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


class OperatingPoint(_Document):
    """One class at the decision "present if its probability reaches the threshold"."""

    threshold: Probability
    sensitivity: Interval | None
    specificity: Interval | None
    precision: Interval | None


class ClassMetrics(_Document):
    """One class against the rest: at the most probable class, over all thresholds, and at one.

    A figure that is not defined, such as the precision of a class that was never predicted, is
    `None`.
    """

    support: Annotated[int, Field(ge=0)]
    sensitivity: Interval | None
    specificity: Interval | None
    precision: Interval | None
    f1: Interval | None
    roc_auc: Interval | None
    average_precision: Interval | None
    at_threshold: OperatingPoint | None = None


class Subgroup(_Document):
    """Figures of one part of the images.

    `balanced_accuracy` and `macro_roc_auc` are `None` where there is one class only.
    """

    images: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)]
    labels: dict[Label, int]
    accuracy: Interval
    balanced_accuracy: Interval | None
    macro_roc_auc: Interval | None


class Metrics(_Document):
    """Evaluation on the test split.

    Attributes:
        method: how decisions, figures and intervals were made.
        balanced_accuracy: mean sensitivity over the classes that occur; also called macro recall.
        macro_precision: mean over the classes; as for every macro figure, those without it are
            left out.
        macro_average_precision: mean area under the precision-recall curves.
        expected_calibration_error: of the most probable class, 0 to 1.
        brier_score: summed over the classes, 0 to 2.
        log_loss: mean negative log probability of the true class, in nats.
        per_source: by data set.
        per_sex: by sex; `per_age` by age band and `per_view` by projection. Each is empty where
            nothing is known, and otherwise has an entry `unknown` for the rest.
        confusion: images by true class (rows) and most probable class (columns).
    """

    split: Literal["test"]
    images: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)]
    method: str
    accuracy: Interval
    balanced_accuracy: Interval
    macro_precision: Interval | None
    macro_f1: Interval
    macro_roc_auc: Interval | None
    macro_average_precision: Interval | None
    expected_calibration_error: Interval
    brier_score: Interval
    log_loss: Interval
    per_class: dict[Label, ClassMetrics]
    per_source: dict[str, Subgroup]
    per_sex: dict[str, Subgroup]
    per_age: dict[str, Subgroup]
    per_view: dict[str, Subgroup]
    confusion: tuple[tuple[int, ...], ...]


class Calibration(_Document):
    """How the graph's probabilities were calibrated, on the validation split.

    Attributes:
        method: `temperature`: the logits were divided by `temperature`, inside the graph.
        log_loss_before: on the images that chose the temperature.
        log_loss_after: on the same images; flattering, as they chose it.
        threshold_rule: how the thresholds were chosen, in words.
    """

    method: Literal["temperature", "none"]
    temperature: Annotated[float, Field(gt=0)]
    log_loss_before: float
    log_loss_after: float
    threshold_rule: str


class Source(_Document):
    """One data source within the training data."""

    name: str
    images: Annotated[int, Field(ge=0)]


class TrainingData(_Document):
    """Summary of the data that the model was made from.

    Attributes:
        manifest_sha256: over what the manifest says about the images, but not of their splits.
        splits_sha256: the same with each image's split; `None` in archives of before.
        excluded: images that were left out of the manifest, by reason; empty where nobody counted.
    """

    synthetic: bool
    manifest_sha256: Sha256
    splits_sha256: Sha256 | None = None
    sources: tuple[Source, ...]
    labels: dict[Label, int]
    images: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)]
    splits: dict[str, int]
    seed: int
    excluded: dict[str, int] = {}


class Candidate(_Document):
    """One graph that `cxr compile` tried, on the validation split.

    Attributes:
        name: `original`; `optimized`, by ONNX Runtime; `int8-S`, with the share S of its
            convolutions left in float32.
        accuracy: share of images whose most probable class is the true one.
        labels_changed: images whose most probable class is not the original's.
        difference_p95: of the largest change of a class probability, the 95th percentile.
        difference_max: its largest.
        flags_changed: images of which guards say something else; `None` where there are none.
        milliseconds: processor time of one image on one thread, the median.
        speedup: the original's time over this one's.
        passed: whether it is within the limits.
    """

    name: str
    accuracy: Probability
    labels_changed: Annotated[int, Field(ge=0)]
    difference_p95: Probability
    difference_max: Probability
    flags_changed: Annotated[int, Field(ge=0)] | None = None
    milliseconds: Annotated[float, Field(gt=0)]
    speedup: Annotated[float, Field(gt=0)]
    passed: bool


class Compilation(_Document):
    """How the graph was compiled, and what was tried.

    Attributes:
        chosen: name of the graph in the bundle: the fastest that passed.
        source_sha256: the graph that it was made from.
        images: of the validation split.
        accuracy_limit: share of accuracy that may be lost.
        difference_limit: largest `difference_p95` that passes.
        flags_limit: largest share of `flags_changed` that passes, where the model has guards.
        candidates: all graphs, the original first.
        execution_provider: ONNX Runtime's provider to prefer, where it is there.
        precision: what that provider may compute in; `None` for the graph's own.
        onnxruntime: version that compiled.
    """

    chosen: str
    source_sha256: Sha256
    images: Annotated[int, Field(ge=1)]
    accuracy_limit: Probability
    difference_limit: Probability
    flags_limit: Probability | None = None
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)]
    execution_provider: Literal["TensorrtExecutionProvider"] | None = None
    precision: Literal["float16"] | None = None
    onnxruntime: str

    @property
    def choice(self) -> Candidate:
        """The candidate that was chosen."""
        return next(one for one in self.candidates if one.name == self.chosen)

    @model_validator(mode="after")
    def _choice_passed(self) -> Self:
        if not any(one.passed and one.name == self.chosen for one in self.candidates):
            raise ValueError("chosen must name a candidate that passed")
        return self


class ModelConfig(_Document):
    """Everything that serving must know about a model, and a reader should.

    Attributes:
        schema_version: version of this document's layout.
        labels: class names in the order of the graph's output.
        thresholds: per label, the probability from which that finding counts as present.
        calibration: how the probabilities were calibrated; `None` where they were not.
        explanation: what the graph adds for heat maps; `None` where it adds nothing.
        guards: what the graph adds to judge an image's quality, likewise.
        reference: how the numbers of :mod:`cxr.drift` are distributed over validation images;
            `None` where nobody measured it.
        uncertain: per label, from which probability and below which one a decision is uncertain;
            `None` where none is.
        versions: what produced the model (Python, torch, ...).
        compilation: how the graph was compiled; `None` where training's own serves. The metrics are
            those of training's graph.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: ModelName
    version: ModelVersion
    description: str
    architecture: Architecture
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    preprocessing: Preprocessing
    thresholds: dict[Label, Probability]
    uncertain: dict[Label, tuple[Probability, Probability]] | None = None
    calibration: Calibration | None = None
    graph: Graph
    explanation: ExplanationOutput | None = None
    guards: Guards | None = None
    reference: dict[str, Distribution] | None = None
    intended_use: str
    limitations: Annotated[tuple[str, ...], Field(min_length=1)]
    training_data: TrainingData
    metrics: Metrics
    versions: dict[str, str]
    compilation: Compilation | None = None

    @field_serializer("preprocessing")
    def _without_unused_steps(self, value: Preprocessing) -> dict[str, Any]:
        return value.distinctive()

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
        if self.uncertain is not None and set(self.uncertain) != set(self.labels):
            raise ValueError("uncertain must have exactly one entry for each label")
        unknown = set(self.reference or ()) - set(summary_names(self.labels))
        if unknown:
            raise ValueError(f"reference has an unknown entry {min(unknown)!r}")
        explained = self.explanation and self.explanation.output.shape[:2]
        if explained not in (None, (-1, len(self.labels))):
            raise ValueError("explanation.output.shape must begin with -1 and the number of labels")
        return self

    def to_json(self) -> str:
        """The document as it stands in an archive: indented JSON with a final newline."""
        # Older releases read a configuration without them.
        left_out = {name for name in ("compilation", "reference") if getattr(self, name) is None}
        return self.model_dump_json(indent=2, exclude=left_out) + "\n"

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
