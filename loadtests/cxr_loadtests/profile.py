"""What is asked and how: image sizes, scenarios, think times and shapes, in one file."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cxr_loadtests.errors import LoadTestError

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Scenario = Literal[
    "rest-v1", "rest-raw", "v2-json", "v2-binary", "grpc", "explain", "dicom", "bad-input"
]
ImageFormat = Literal["jpeg", "png", "dicom"]


class Strict(BaseModel):
    """A part of a file; what it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Document = TypeVar("Document", bound=Strict)


class ImageKind(Strict):
    """Images of one size and format.

    Attributes:
        height: pixels; the width follows from the drawn image.
        weight: how often they are sent, beside the other kinds.
        count: different images of this kind.
        quality: of JPEG.
    """

    format: ImageFormat
    height: Annotated[int, Field(ge=32, le=6000)]
    weight: Positive = 1.0
    count: Count = 2
    quality: Annotated[int, Field(ge=1, le=100)] = 90


class ThinkTime(Strict):
    """How long a client waits between an answer and its next request: log-normal, as people do.

    Attributes:
        median_seconds: half of the pauses are shorter.
        sigma: standard deviation of the logarithm; 0 makes all pauses equal.
        longest_seconds: pauses are cut here.
    """

    median_seconds: Annotated[float, Field(ge=0)]
    sigma: Annotated[float, Field(ge=0, le=3)] = 0.5
    longest_seconds: Positive = 30.0


class Phase(Strict):
    """A part of a run with one load.

    Attributes:
        users: clients that wait for each answer before they ask again (closed model).
        rate: requests a second, sent when they are due, whatever the answers do (open model).
        knee_share: the same, as a share of the throughput at the knee that this run has found.
        settle: seconds at the beginning that count for nothing.
        judged: whether latency and throughput objectives apply.
        step: whether this is a step towards the knee.
        think: whether clients pause between requests.
    """

    name: str
    users: Count | None = None
    rate: Positive | None = None
    knee_share: Annotated[float, Field(gt=0, le=2)] | None = None
    seconds: Positive
    settle: Annotated[float, Field(ge=0)] = 0.0
    judged: bool = False
    step: bool = False
    think: bool = True

    @model_validator(mode="after")
    def _one_load(self) -> Self:
        given = [self.users, self.rate, self.knee_share]
        if sum(value is not None for value in given) != 1:
            raise ValueError("a phase has one of users, rate and knee_share")
        if self.step and self.users is None:
            raise ValueError("a step has users")
        if self.settle >= self.seconds:
            raise ValueError("settle must be shorter than the phase")
        return self


class Shape(Strict):
    """The phases of a run, in order.

    Attributes:
        stop_at_knee: leave out the steps that follow once more clients bring no more answers.
    """

    description: str
    phases: Annotated[list[Phase], Field(min_length=1)]
    stop_at_knee: bool = False

    @model_validator(mode="after")
    def _knee_comes_first(self) -> Self:
        stepped = False
        for phase in self.phases:
            if phase.knee_share is not None and not stepped:
                raise ValueError("a knee_share needs steps before it")
            stepped |= phase.step
        return self


class Profile(Strict):
    """A profile file.

    Attributes:
        timeout_seconds: a client gives up after this long.
        tolerance: largest difference of a probability from the expected one.
        gaps: of the open model: `poisson`, as independent clients come, or `constant`.
        longest_backlog: requests of the open model under way at most; more count as failed.
        scenarios: how often each is asked, beside the others.
    """

    timeout_seconds: Positive = 30.0
    tolerance: Positive = 1e-4
    gaps: Literal["poisson", "constant"] = "poisson"
    longest_backlog: Count = 2000
    seed: int = 7
    images: Annotated[list[ImageKind], Field(min_length=1)]
    scenarios: Annotated[dict[Scenario, Positive], Field(min_length=1)]
    think_time: ThinkTime
    shapes: Annotated[dict[str, Shape], Field(min_length=1)]

    @model_validator(mode="after")
    def _images_for_scenarios(self) -> Self:
        formats = {kind.format for kind in self.images}
        if "dicom" in self.scenarios and "dicom" not in formats:
            raise ValueError("the scenario dicom needs images of format dicom")
        if formats == {"dicom"} and set(self.scenarios) - {"dicom"}:
            raise ValueError("scenarios beside dicom need images of format jpeg or png")
        return self

    def shape(self, name: str) -> Shape:
        """A shape by its name.

        Raises:
            LoadTestError: there is none of that name.
        """
        if name not in self.shapes:
            raise LoadTestError(
                f"The profile has no shape {name}; it has {', '.join(self.shapes)}."
            )
        return self.shapes[name]


def read_profile(path: Path | None) -> Profile:
    """A profile file; without one, the default profile.

    Raises:
        LoadTestError: it cannot be read, or something in it is not valid.
    """
    return read_yaml(path, "profile.yaml", Profile)


def read_yaml(path: Path | None, default: str, kind: type[Document]) -> Document:
    """A YAML file, checked; without one, that of this package.

    Raises:
        LoadTestError: it cannot be read, or something in it is not valid.
    """
    try:
        source = path or files("cxr_loadtests").joinpath("data", default)
        return kind.model_validate(yaml.safe_load(source.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        name = path.name if path else default
        raise LoadTestError(f"Cannot read {name}: {str(error).splitlines()[0]}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        name = path.name if path else default
        raise LoadTestError(f"{name}, {where}: {first['msg']}.") from error


def scaled(
    shape: Shape,
    *,
    users: int | None = None,
    rate: float | None = None,
    seconds: float | None = None,
) -> Shape:
    """A shape with another load or length.

    Args:
        shape: as in the profile.
        users: clients of the first phase of the closed model that is no step; the others change in
            proportion.
        rate: the same of the open model; replaces a `knee_share`, too.
        seconds: of each judged phase.

    Raises:
        LoadTestError: the shape has no phase that this could mean.
    """
    phases = list(shape.phases)
    if users is not None:
        closed = [phase.users for phase in phases if phase.users and not phase.step]
        if not closed:
            raise LoadTestError("This shape has no phase with users; leave --users out.")
        factor = users / closed[0]
        phases = [
            phase
            if phase.users is None or phase.step
            else phase.model_copy(update={"users": max(1, round(phase.users * factor))})
            for phase in phases
        ]
    if rate is not None:
        rates = [phase.rate or phase.knee_share for phase in phases if phase.users is None]
        if not rates or rates[0] is None:
            raise LoadTestError("This shape has no phase with a rate; leave --rate out.")
        first = rates[0]
        phases = [
            phase
            if phase.users is not None
            else phase.model_copy(
                update={
                    "rate": rate * ((phase.rate or phase.knee_share or 0) / first),
                    "knee_share": None,
                }
            )
            for phase in phases
        ]
        # Steps only serve to find the knee.
        phases = [phase for phase in phases if not phase.step]
    if seconds is not None:
        if not any(phase.judged for phase in phases):
            raise LoadTestError("This shape has no judged phase; leave --seconds out.")
        phases = [
            phase.model_copy(update={"seconds": seconds}) if phase.judged else phase
            for phase in phases
        ]
        if any(phase.settle >= phase.seconds for phase in phases):
            raise LoadTestError("--seconds must be longer than the time that a phase settles.")
    return shape.model_copy(update={"phases": phases})
