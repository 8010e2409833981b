"""Everything that a report shows, computed from a run folder."""

import base64
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image

from cxr.answer import Options, Prediction
from cxr.config import Interval
from cxr.decode import decode
from cxr.engine import Engine
from cxr.preprocess import preprocess
from cxr_training.baselines import trivial_features, trivial_predictions
from cxr_training.calibration import (
    apply_temperature,
    choose_thresholds_for_sensitivity,
    fit_temperature,
)
from cxr_training.card import intended_use, limitations, parted_groups
from cxr_training.data import (
    SPLITS,
    DataError,
    LeakAudit,
    ManifestSummary,
    audit_split,
    summarize,
)
from cxr_training.evaluation import SplitMetrics, compare_predictions, evaluate_predictions
from cxr_training.export import export
from cxr_training.faithfulness import Drop, deletion_drops
from cxr_training.features import extract_features
from cxr_training.folds import CV_FILE, LOSO_FILE, FoldSummary, read_folds
from cxr_training.published import PublishedFigure, published_on
from cxr_training.runs import Run, is_current, load_run
from cxr_training.shortcuts import ShortcutAudit, audit_shortcuts, source_readability
from cxr_training.train import predict_proba

Float64Array = npt.NDArray[np.float64]

SENSITIVITIES = (0.90, 0.95)
THUMBNAIL = 160  # pixels
# Test images of the deletion test; each is asked about five times.
DELETIONS = 40


@dataclass(frozen=True)
class Example:
    """A test image: its truth, the model's answer, and small JPEGs as data URIs.

    Attributes:
        truth: its class.
        predicted: the most probable class.
        probability: of that class.
        image: the image.
        heatmap: where the model sees that class.
    """

    truth: str
    predicted: str
    probability: float
    image: str
    heatmap: str

    @property
    def right(self) -> bool:
        """Whether the most probable class is the true one."""
        return self.truth == self.predicted


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a report shows.

    Attributes:
        run: the run.
        parameters: what was chosen, and how, as flat text.
        curves: epochs of fine-tuning, if any.
        table: images by source and label.
        splits: images by split and label.
        summary: of the manifest.
        leaks: what the study's random split would leak; `None` if a class is too small for one.
        parted: groups that stand in more than one split: 0, or the figures are worth nothing.
        metrics: of the test split.
        baseline: of the trivial baseline on the same split.
        gain: how much higher the model's figures are than the baseline's.
        truth: true class of each test image, as a column number.
        probabilities: of the test images, calibrated.
        uncalibrated: of the test images, with temperature 1.
        before: metrics of `uncalibrated`.
        temperature: the run's; where it has none, one fitted on validation for the report.
        calibrated: whether the temperature is part of the model.
        thresholds: by stated sensitivity: thresholds from validation and their figures on test.
        folds: summaries of the cross-validation, if the run folder has one.
        sources_out: summaries of leave-one-source-out, likewise.
        audit: of shortcuts; `None` where it was not asked for or cannot be made.
        published: figures on the same source.
        examples: test images, if they were asked for.
        drops: what hiding parts of some test images does to their probability, with the examples.
    """

    run: Run
    parameters: Mapping[str, str]
    curves: Sequence[Mapping[str, Any]]
    table: pd.DataFrame
    splits: pd.DataFrame
    summary: ManifestSummary
    leaks: LeakAudit | None
    parted: int
    metrics: SplitMetrics
    baseline: SplitMetrics
    gain: Mapping[str, Interval]
    truth: npt.NDArray[np.int_]
    probabilities: Float64Array
    uncalibrated: Float64Array
    before: SplitMetrics
    temperature: float
    calibrated: bool
    thresholds: Mapping[float, SplitMetrics]
    folds: tuple[FoldSummary, ...]
    sources_out: tuple[FoldSummary, ...]
    audit: ShortcutAudit | None
    published: tuple[PublishedFigure, ...]
    examples: tuple[Example, ...]
    drops: tuple[Drop, ...]
    limitations: tuple[str, ...]
    intended_use: str


class RunPredictor:
    """A run as functions of decoded images, for the shortcut audit."""

    def __init__(self, run: Run) -> None:
        self._backbone = run.backbone()
        self._head = run.head
        self._last: tuple[list[int], npt.NDArray[np.float32]] = ([], np.empty((0, 0), np.float32))

    def features(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """The backbone's features: float32 `[images, features]`."""
        key = [id(image) for image in images]
        if self._last[0] != key:
            batch = np.stack([preprocess(image, self._backbone.preprocessing) for image in images])
            with torch.inference_mode():
                self._last = (key, self._backbone.module(torch.from_numpy(batch)).numpy())
        return self._last[1]

    def predict(self, images: Sequence[Image.Image]) -> Float64Array:
        """Class probabilities: float64 `[images, classes]`."""
        return self._head.predict_proba(self.features(images))


def collect(
    folder: Path, *, cache: Path | None = None, examples: int = 0, audit: bool = True
) -> ReportData:
    """Compute what the report of a run shows.

    Args:
        folder: the run folder; `cv.json` and `loso.json` in it are read, if they are no older.
        cache: folder for extracted features; `None` keeps none.
        examples: wrongly, and as many rightly classified test images to show, most certain first.
        audit: make the shortcut audit; it asks the model about each test image three times.

    Raises:
        TrainingError: the folder is not a run, or an image cannot be used.
        DataError: the manifest is damaged.
    """
    run = load_run(folder)
    labels, seed = run.record.labels, run.record.settings.seed
    validation, test = run.rows("validation"), run.rows("test")
    on_validation = predict_proba(run, validation, cache=cache)
    probabilities = predict_proba(run, test, cache=cache)
    names = validation["label"].to_numpy(dtype=str)
    temperature = float(run.record.head.model_dump().get("temperature", 1.0))
    calibrated = run.record.settings.recipe.calibration != "none"
    uncalibrated = apply_temperature(probabilities, 1 / temperature)
    if not calibrated:
        temperature = fit_temperature(on_validation, names, labels)
    baseline = _baseline(run, seed)
    shown, drops = _examples(run, probabilities, examples)
    return ReportData(
        run=run,
        parameters=parameters(run),
        curves=run.record.model_dump().get("history", ()),
        table=pd.crosstab(run.frame["source"], run.frame["label"]),
        splits=pd.crosstab(run.frame["split"], run.frame["label"]).reindex(SPLITS, fill_value=0),
        summary=summarize(run.frame),
        leaks=_leaks(run.frame, seed),
        parted=parted_groups(run.frame),
        metrics=evaluate_predictions(
            test, probabilities, labels, seed=seed, thresholds=run.thresholds
        ),
        baseline=evaluate_predictions(test, baseline, labels, seed=seed),
        gain={
            figure: compare_predictions(
                test, probabilities, baseline, labels, figure=figure, seed=seed
            )
            for figure in ("accuracy", "balanced_accuracy")
        },
        truth=np.asarray([labels.index(name) for name in test["label"]]),
        probabilities=apply_temperature(uncalibrated, temperature),
        uncalibrated=uncalibrated,
        before=evaluate_predictions(test, uncalibrated, labels, seed=seed),
        temperature=temperature,
        calibrated=calibrated,
        thresholds={
            sensitivity: evaluate_predictions(
                test,
                probabilities,
                labels,
                seed=seed,
                thresholds=choose_thresholds_for_sensitivity(
                    on_validation, names, labels, sensitivity
                ),
            )
            for sensitivity in SENSITIVITIES
        },
        folds=_folds(folder / CV_FILE),
        sources_out=_folds(folder / LOSO_FILE),
        audit=audit_run(run, cache=cache) if audit else None,
        published=published_on(set(run.frame["source"])),
        examples=shown,
        drops=drops,
        limitations=limitations(run),
        intended_use=intended_use(synthetic=run.record.training_data.synthetic),
    )


def audit_run(run: Run, *, cache: Path | None = None) -> ShortcutAudit | None:
    """The shortcut audit of a run's test split.

    Returns:
        `None` for a run whose inputs are not images alone.

    Raises:
        TrainingError: an image cannot be used.
    """
    if run.record.settings.model_dump().get("tabular"):
        return None
    predictor = RunPredictor(run)
    seed = run.record.settings.seed
    return audit_shortcuts(
        run.rows("test"),
        predictor.predict,
        run.record.labels,
        seed=seed,
        features=predictor.features,
        sources=source_readability(
            run.frame, extract_features(run.frame, run.backbone(), cache=cache), seed=seed
        ),
    )


def parameters(run: Run) -> dict[str, str]:
    """What was chosen for a run, and how its head was, as flat text."""
    record = run.record.model_dump(mode="json")
    chosen: dict[str, str] = {}
    for section in ("settings", "head"):
        _flatten(section, record[section], chosen)
    return {name.split(".", 1)[1]: value for name, value in chosen.items()}


def _folds(file: Path) -> tuple[FoldSummary, ...]:
    return read_folds(file) if is_current(file) else ()


def _leaks(frame: pd.DataFrame, seed: int) -> LeakAudit | None:
    try:
        return audit_split(frame, seed)
    except DataError:  # a class of a handful of images: no random split of it exists
        return None


def _flatten(name: str, value: object, into: dict[str, str]) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _flatten(f"{name}.{key}", part, into)
    elif isinstance(value, float):
        into[name] = f"{value:.4g}"
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _flatten(f"{name}.{number}" if len(value) > 1 else name, part, into)
    elif value is not None:
        into[name] = str(value)


def _baseline(run: Run, seed: int) -> Float64Array:
    """The trivial baseline, trained on the training split, about the test split."""
    frame = run.frame[run.frame["split"] != "validation"]
    training, test = ((frame["split"] == split).to_numpy() for split in ("train", "test"))
    return trivial_predictions(
        trivial_features(frame),
        frame["label"].to_numpy(dtype=str),
        run.record.labels,
        [(training, test)],
        seed=seed,
    )[test]


def _examples(
    run: Run, probabilities: Float64Array, count: int
) -> tuple[tuple[Example, ...], tuple[Drop, ...]]:
    """Examples with heat maps, and a deletion test on some test images."""
    if not count or run.record.settings.tabular:
        return (), ()
    frame, labels = run.rows("test"), run.record.labels
    predicted = probabilities.argmax(axis=1)
    certainty = probabilities.max(axis=1)
    truth = frame["label"].to_numpy(dtype=str)
    right = np.asarray(labels)[predicted] == truth
    shown = [
        index
        for kind in (~right, right)
        for index in sorted(np.flatnonzero(kind), key=lambda index: -certainty[index])[:count]
    ]
    with tempfile.TemporaryDirectory() as folder:
        export(run, Path(folder) / "bundle")
        engine = Engine(Path(folder) / "bundle", threads=torch.get_num_threads())
    seed = run.record.settings.seed
    some = frame.sample(n=min(DELETIONS, len(frame)), random_state=seed)
    examples = []
    for index in shown:
        data = Path(frame["path"].iloc[index]).read_bytes()
        (answer,) = engine.predict([data], [Options(explain=True)])
        assert isinstance(answer, Prediction)  # noqa: S101 - the run has used the image
        assert answer.explanation is not None  # noqa: S101 - just exported
        examples.append(
            Example(
                truth=truth[index],
                predicted=labels[predicted[index]],
                probability=float(certainty[index]),
                image=_thumbnail(decode(data).convert("L")),
                heatmap=_thumbnail(Image.open(BytesIO(answer.explanation.overlay))),
            )
        )
    images = [Path(path).read_bytes() for path in some["path"]]
    return tuple(examples), tuple(deletion_drops(engine, images, seed=seed))


def _thumbnail(image: Image.Image) -> str:
    """The image as a small JPEG without metadata, as a data URI."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
