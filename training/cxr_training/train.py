"""Manifest to run: splits, model, thresholds, metrics."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import ValidationError

from cxr.config import Metrics, Source, TrainingData
from cxr_training.command import DEFAULT_RECIPE
from cxr_training.data import (
    EXCLUDED,
    SPLITS,
    SplitKind,
    assign_splits,
    manifest_digest,
    read_manifest,
    validate_manifest,
)
from cxr_training.errors import TrainingError
from cxr_training.evaluation import Split, SplitMetrics, evaluate_predictions
from cxr_training.guards import fit_guards
from cxr_training.heads import fit_head
from cxr_training.model import Model, fit_model, model_inputs, text
from cxr_training.processes import is_first
from cxr_training.recipes import Recipe, adapted, load_recipe
from cxr_training.runs import Ablation, Run, RunRecord, Settings, save_run
from cxr_training.tabular import tabular_inputs
from cxr_training.thresholds import choose_thresholds, uncertain_bands

_PACKAGES = ("cxr-serve", "numpy", "pandas", "pillow", "scikit-learn", "torch", "torchvision")

CHECKPOINT_FILE = "checkpoint.pt"


def train(
    manifest: pd.DataFrame | Path,
    out: Path,
    *,
    recipe: Recipe | str | Path = DEFAULT_RECIPE,
    seed: int = 0,
    backbone: str | None = None,
    weights: str | None = None,
    name: str = "cxr",
    version: str = "1.0",
    split: SplitKind = "grouped",
    tabular: bool = False,
    cache: Path | None = None,
) -> Run:
    """Train a classifier by a recipe and write a run folder.

    The model comes from the training split; temperature and thresholds, and when fine-tuning
    stops, from the validation split; the test split is used for the metrics alone.

    Args:
        manifest: a manifest or its file. A column `split` is kept; without it, images are assigned
            to splits by the seed.
        out: the run folder (:mod:`cxr_training.runs`).
        recipe: a recipe, its name or its file.
        seed: of splits, folds and bootstrap; equal seeds give equal runs.
        backbone: name of one network, in place of the recipe's.
        weights: `imagenet`, `none`, or the path of a state dict, in place of the recipe's.
        name: model name: lower-case letters, digits and hyphens.
        version: model version: one to three numbers with dots between.
        split: `grouped`, or `random` by image, whose figures flatter.
        tabular: give the head age, sex and view beside the features; such a run can be measured
            and not exported.
        cache: folder for extracted features; `None` keeps none.

    Started by `torchrun`, all processes train one network and the first one writes. A fine-tuning
    that was killed goes on from the checkpoint in `out`.

    Returns:
        The run, as :func:`cxr_training.runs.load_run` would read it.

    Raises:
        TrainingError: a setting or the data does not allow training.
        DataError: the manifest is not valid, or too small to split.
        OSError: the run folder cannot be written.
    """
    given = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    given = adapted(given, backbone=backbone, weights=weights)
    settings = _settings(
        name=name, version=version, seed=seed, split=split, tabular=tabular, recipe=given
    )
    if tabular and given.finetune is not None:
        raise TrainingError("Age, sex and view can stand beside frozen features only.")
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; a run is written to a folder.")
    frame = read_manifest(manifest) if isinstance(manifest, Path) else validate_manifest(manifest)
    frame = _with_splits(frame, settings)
    parts = {part: frame[frame["split"] == part] for part in SPLITS}
    checkpoint = out / CHECKPOINT_FILE
    model = fit_model(
        given,
        parts["train"],
        parts["validation"],
        seed=seed,
        tabular=tabular,
        cache=cache,
        checkpoint=checkpoint,
    )
    chosen = model.recipe
    on_validation = model.predict_proba(parts["validation"], cache=cache)
    names = text(parts["validation"]["label"])
    thresholds = choose_thresholds(on_validation, names, model.head.labels)
    metrics = evaluate_predictions(
        parts["test"],
        model.predict_proba(parts["test"], cache=cache),
        model.head.labels,
        seed=seed,
        thresholds=thresholds,
    )
    guards = None
    if chosen.guards is not None and not tabular and is_first():
        guards = fit_guards(
            parts["train"],
            parts["validation"],
            model.backbone,
            images=chosen.guards.images,
            seed=seed,
        )
    run = Run(
        record=RunRecord(
            settings=settings.model_copy(update={"recipe": chosen}),
            preprocessing=model.backbone.preprocessing,
            backbone_fingerprint=model.backbone.fingerprint,
            labels=model.head.labels,
            head=model.selection,
            uncertain=uncertain_bands(on_validation, names, model.head.labels, thresholds),
            history=model.history,
            ablation=_ablation(chosen, parts, model, seed, cache) if tabular else None,
            training_data=_summary(frame, seed),
            versions=_versions(),
        ),
        frame=frame,
        head=model.head,
        guards=guards,
        trained=model.backbone.module.state_dict() if chosen.finetune else None,
        thresholds=thresholds,
        metrics=Metrics.model_validate(metrics.model_dump()),
    )
    if is_first():
        save_run(run, out)
        checkpoint.unlink(missing_ok=True)
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
    features = model_inputs(frame, run.backbone(), tabular=run.record.settings.tabular, cache=cache)
    return run.head.predict_proba(features)


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
    return evaluate_predictions(
        frame, probabilities, run.head.labels, seed=seed, split=split, thresholds=run.thresholds
    )


def _ablation(
    recipe: Recipe, parts: dict[str, pd.DataFrame], both: Model, seed: int, cache: Path | None
) -> Ablation:
    """Test accuracy of the image alone, of both, and of age, sex and view alone."""
    training, test = parts["train"], parts["test"]
    image = fit_model(recipe, training, parts["validation"], seed=seed, cache=cache)
    labels, groups = text(training["label"]), text(training["group"])
    head, _ = fit_head(tabular_inputs(training), labels, groups, seed=seed)
    truth = text(test["label"])

    def accuracy(labels: tuple[str, ...], probabilities: npt.NDArray[np.float64]) -> float:
        return float((np.asarray(labels)[probabilities.argmax(axis=1)] == truth).mean())

    return Ablation(
        image=accuracy(image.head.labels, image.predict_proba(test, cache=cache)),
        image_and_tabular=accuracy(both.head.labels, both.predict_proba(test, cache=cache)),
        tabular=accuracy(head.labels, head.predict_proba(tabular_inputs(test))),
    )


def _settings(**chosen: object) -> Settings:
    try:
        return Settings.model_validate(chosen)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise TrainingError(
            f"The {first['loc'][0]} {first['input']!r} is not valid: {first['msg']}."
        ) from error


def _with_splits(frame: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    if "split" not in frame:
        return frame.assign(split=assign_splits(frame, seed=settings.seed, kind=settings.split))
    parted = frame.groupby("group")["split"].nunique()
    if (parted > 1).any() and settings.split == "grouped":
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
        splits_sha256=manifest_digest(frame, splits=True),
        sources=tuple(
            Source(name=name, images=count) for name, count in _counts(frame["source"]).items()
        ),
        labels=_counts(frame["label"]),
        images=len(frame),
        groups=int(frame["group"].nunique()),
        splits={split: int((frame["split"] == split).sum()) for split in SPLITS},
        seed=seed,
        excluded=dict(frame.attrs.get(EXCLUDED, {})),
    )


def _counts(column: "pd.Series[str]") -> dict[str, int]:
    return {str(name): int(count) for name, count in column.value_counts().sort_index().items()}


def _versions() -> dict[str, str]:
    """What trained; torchvision is only needed for its own networks."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = installed(package)
    return versions
