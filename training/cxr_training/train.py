"""Manifest to trained head: splits, features, regularisation, thresholds, metrics."""

import platform
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import ValidationError

from cxr.config import Metrics, Source, TrainingData
from cxr_training.backbones import create_backbone
from cxr_training.data import (
    SPLITS,
    assign_splits,
    manifest_digest,
    read_manifest,
    validate_manifest,
)
from cxr_training.errors import TrainingError
from cxr_training.evaluation import Split, SplitMetrics, evaluate_predictions
from cxr_training.features import extract_features
from cxr_training.head import choose_thresholds, fit_head
from cxr_training.runs import HeadSelection, Run, RunRecord, Settings, save_run

_PACKAGES = ("cxr-serve", "numpy", "pandas", "pillow", "scikit-learn", "torch")


def train(
    manifest: pd.DataFrame | Path,
    out: Path,
    *,
    seed: int = 0,
    backbone: str = "efficientnet-lite0",
    weights: str = "imagenet",
    name: str = "cxr",
    version: str = "1.0",
    cache: Path | None = None,
) -> Run:
    """Train a classifier head on a frozen backbone and write a run folder.

    The head and its regularisation come from the training split, the thresholds from the
    validation split; the test split is used for the metrics alone.

    Args:
        manifest: a manifest or its file. A column `split` is kept; without it, groups are assigned
            to splits by the seed.
        out: the run folder (:mod:`cxr_training.runs`).
        seed: of splits, folds and bootstrap; equal seeds give equal runs.
        backbone: name of the backbone (:func:`cxr_training.backbones.backbone_names`).
        weights: `imagenet`, `none`, or the path of a state dict.
        name: model name: lower-case letters, digits and hyphens.
        version: model version: one to three numbers with dots between.
        cache: folder for extracted features; `None` keeps none.

    Returns:
        The run, as :func:`cxr_training.runs.load_run` would read it.

    Raises:
        TrainingError: a setting or the data does not allow training.
        DataError: the manifest is not valid, or too small to split.
        OSError: the run folder cannot be written.
    """
    settings = _settings(name=name, version=version, seed=seed, backbone=backbone, weights=weights)
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; a run is written to a folder.")
    frame = read_manifest(manifest) if isinstance(manifest, Path) else validate_manifest(manifest)
    frame = _with_splits(frame, seed)
    extractor = create_backbone(backbone, weights)
    features = extract_features(frame, extractor, cache=cache)
    labels, groups = _text(frame["label"]), _text(frame["group"])
    training, validation, test = ((frame["split"] == split).to_numpy() for split in SPLITS)
    head, selection = fit_head(features[training], labels[training], groups[training], seed=seed)
    thresholds = choose_thresholds(
        head.predict_proba(features[validation]), labels[validation], head.labels
    )
    metrics = evaluate_predictions(
        frame[test], head.predict_proba(features[test]), head.labels, seed=seed
    )
    run = Run(
        record=RunRecord(
            settings=settings,
            preprocessing=extractor.preprocessing,
            backbone_fingerprint=extractor.fingerprint,
            labels=head.labels,
            head=HeadSelection(
                folds=selection.folds,
                c=selection.chosen,
                log_loss=selection.log_loss[selection.chosen],
                accuracy=selection.accuracy[selection.chosen],
            ),
            training_data=_summary(frame, seed),
            versions={"python": platform.python_version()}
            | {package: installed(package) for package in _PACKAGES},
        ),
        frame=frame,
        head=head,
        thresholds=thresholds,
        metrics=Metrics.model_validate(metrics.model_dump()),
    )
    save_run(run, out)
    return run


def predict_proba(
    run: Run, frame: pd.DataFrame, *, cache: Path | None = None
) -> npt.NDArray[np.float64]:
    """Class probabilities for a manifest's images, through PyTorch.

    Args:
        run: a trained run.
        frame: a manifest; its labels are not used.
        cache: folder for extracted features; `None` keeps none.

    Returns:
        float64 `[images, classes]`, classes in the order of `run.head.labels`.

    Raises:
        TrainingError: an image cannot be used, or the backbone's weights have changed.
    """
    return run.head.predict_proba(extract_features(frame, run.backbone(), cache=cache))


def evaluate(run: Run, *, split: Split = "test", cache: Path | None = None) -> SplitMetrics:
    """Compute a run's metrics again, from its images and its head.

    Args:
        run: a trained run.
        split: `train`, `validation` or `test`. Figures on the first two flatter the model.
        cache: folder for extracted features; `None` keeps none.

    Raises:
        TrainingError: an image cannot be used, or the backbone's weights have changed.
    """
    frame = run.rows(split)
    probabilities = predict_proba(run, frame, cache=cache)
    seed = run.record.settings.seed
    return evaluate_predictions(frame, probabilities, run.head.labels, seed=seed, split=split)


def _settings(*, name: str, version: str, seed: int, backbone: str, weights: str) -> Settings:
    try:
        return Settings(name=name, version=version, seed=seed, backbone=backbone, weights=weights)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise TrainingError(
            f"The {first['loc'][0]} {first['input']!r} is not valid: {first['msg']}."
        ) from error


def _with_splits(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    if "split" not in frame:
        return frame.assign(split=assign_splits(frame, seed=seed))
    parted = frame.groupby("group")["split"].nunique()
    if (parted > 1).any():
        raise TrainingError(
            f"The manifest's splits part the group {parted.idxmax()!r}: one patient must not "
            "stand in two splits."
        )
    for split in SPLITS:
        absent = set(frame["label"]) - set(frame.loc[frame["split"] == split, "label"])
        if absent:
            raise TrainingError(f"The {split} split has no image of the class {min(absent)!r}.")
    return frame


def _summary(frame: pd.DataFrame, seed: int) -> TrainingData:
    return TrainingData(
        # One phantom among radiographs already makes the figures say less.
        synthetic=bool(frame["synthetic"].any()),
        manifest_sha256=manifest_digest(frame),
        sources=tuple(
            Source(name=name, images=count) for name, count in _counts(frame["source"]).items()
        ),
        labels=_counts(frame["label"]),
        images=len(frame),
        groups=int(frame["group"].nunique()),
        splits={split: int((frame["split"] == split).sum()) for split in SPLITS},
        seed=seed,
    )


def _counts(column: "pd.Series[str]") -> dict[str, int]:
    return {str(name): int(count) for name, count in column.value_counts().sort_index().items()}


def _text(column: "pd.Series[str]") -> npt.NDArray[np.str_]:
    return column.to_numpy(dtype=str)
