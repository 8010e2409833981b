"""The run folder: what training leaves behind, and evaluation and export read.

| file | content |
|---|---|
| `manifest.parquet` | the manifest, with the column `split` |
| `head.npz` | `thresholds` `[classes]`, float64, and the arrays of the head (:meth:`cxr_training.heads.Head.state`) |
| `guards.npz` | arrays of the guards (:meth:`cxr_training.guards.Guards.state`), if there are any |
| `backbone.pt` | state dict of the feature extractor, if it was fine-tuned |
| `metrics.json` | metrics of the test split (:class:`cxr.config.Metrics`) |
| `run.json` | everything else (:class:`RunRecord`) |
"""  # noqa: E501 - a table

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from cxr.config import Label, Metrics, ModelName, ModelVersion, Sha256, TrainingData
from cxr.preprocess import Preprocessing
from cxr_training.backbones import Backbone, combine, create_backbone, read_state, retrained
from cxr_training.data import read_manifest, write_manifest
from cxr_training.errors import TrainingError
from cxr_training.guards import Guards, guards_from_state
from cxr_training.heads import Head, head_from_state
from cxr_training.recipes import Recipe

MANIFEST_FILE = "manifest.parquet"
HEAD_FILE = "head.npz"
GUARDS_FILE = "guards.npz"
BACKBONE_FILE = "backbone.pt"
METRICS_FILE = "metrics.json"
RUN_FILE = "run.json"

_Document = TypeVar("_Document", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(_Record):
    """What the user chose.

    Attributes:
        name: the model's name.
        version: the model's version.
        seed: of splits, folds and whatever else is random.
        split: `grouped` parts no patient; `random` is by image, as published studies do it.
        tabular: whether age, sex and view were inputs beside the image.
        recipe: what was trained and how.
    """

    name: ModelName = "cxr"
    version: ModelVersion = "1.0"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    split: Literal["grouped", "random"] = "grouped"
    tabular: bool = False
    recipe: Recipe


class HeadSelection(_Record):
    """How the head's free parameters were chosen, by cross-validation on the training split.

    Attributes:
        kind: kind of head; `finetuned` where it was trained with the network.
        folds: number of folds, none of which parts a group; 0 without cross-validation.
        parameters: what was chosen, by name.
        log_loss: weighted as in training, mean over the folds; of a fine-tuned network, on the
            validation split.
        accuracy: likewise; a little optimistic, as the parameters were chosen on the same images.
        temperature: what the logits are divided by.
        log_loss_before: on the validation split, without the temperature.
        log_loss_after: on the validation split, with it.
    """

    kind: str
    folds: int
    parameters: dict[str, float]
    log_loss: float
    accuracy: float
    temperature: float
    log_loss_before: float
    log_loss_after: float


class Epoch(_Record):
    """One pass over the training split.

    Attributes:
        epoch: from 1.
        training_loss: mean cross-entropy while training.
        validation_loss: after the epoch.
        validation_accuracy: after the epoch.
        learning_rate: of the head, at the end of the epoch.
    """

    epoch: int
    training_loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float


class Ablation(_Record):
    """Test accuracy with and without age, sex and view as inputs.

    Attributes:
        image: of the image alone.
        image_and_tabular: of both.
        tabular: of age, sex and view alone: what no radiograph was needed for.
    """

    image: float
    image_and_tabular: float
    tabular: float


class RunRecord(_Record):
    """The content of `run.json`.

    Attributes:
        settings: what the user chose.
        preprocessing: how images became tensors.
        backbone_fingerprint: identifies weights, pooling and preprocessing.
        labels: class names, in the order of the output.
        head: how the head was chosen.
        uncertain: grey zone of each class about its threshold.
        history: epochs of fine-tuning.
        ablation: what tabular inputs change, where they were asked for.
        training_data: summary of the manifest.
        versions: software that trained.
    """

    settings: Settings
    preprocessing: Preprocessing
    backbone_fingerprint: Sha256
    labels: tuple[Label, ...]
    head: HeadSelection
    uncertain: dict[Label, tuple[float, float]] | None = None
    history: tuple[Epoch, ...] = ()
    ablation: Ablation | None = None
    training_data: TrainingData
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with its data and figures.

    Attributes:
        record: settings, data summary, versions.
        frame: the manifest, with the column `split`.
        head: the head, calibrated as the recipe says.
        trained: state dict of a fine-tuned feature extractor; `None` where it stayed frozen.
        guards: fitted on its features; `None` where there are none.
        thresholds: decision threshold of each class.
        metrics: metrics of the test split.
    """

    record: RunRecord
    frame: pd.DataFrame
    head: Head
    trained: Mapping[str, Tensor] | None = None
    guards: Guards | None = None
    thresholds: dict[str, float]
    metrics: Metrics

    def backbone(self) -> Backbone:
        """Build the backbone that this run was trained with.

        Raises:
            TrainingError: its weights are gone, or are others now.
        """
        recipe = self.record.settings.recipe
        if self.trained is None:
            backbone = recipe_backbone(recipe)
        else:
            backbone = retrained(recipe_backbone(recipe, "none"), self.trained, recipe.weights)
        if backbone.fingerprint != self.record.backbone_fingerprint:
            raise TrainingError(
                f"The backbone {backbone.name!r} with weights {recipe.weights!r} is no "
                "longer the one that this run was trained with; train again."
            )
        return backbone

    def rows(self, split: str) -> pd.DataFrame:
        """The manifest's rows of one split."""
        return self.frame[self.frame["split"] == split]


def recipe_backbone(recipe: Recipe, weights: str | None = None) -> Backbone:
    """Build the feature extractor of a recipe, frozen.

    Args:
        recipe: the recipe.
        weights: in place of the recipe's.

    Raises:
        TrainingError: an unknown network, or weights that are missing or do not fit.
    """
    return combine(
        [
            create_backbone(
                settings.name,
                weights or recipe.weights,
                pooling=settings.pooling,
                flip=recipe.flip,
                preprocessing=recipe.preprocessing,
            )
            for settings in recipe.backbones
        ]
    )


def save_run(run: Run, out: Path) -> None:
    """Write a run folder; files of an earlier run there are replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    with staged(out, optional=(GUARDS_FILE, BACKBONE_FILE)) as folder:
        write_manifest(run.frame, folder / MANIFEST_FILE)
        thresholds = np.asarray([run.thresholds[label] for label in run.head.labels])
        np.savez(folder / HEAD_FILE, thresholds=thresholds, **run.head.state())  # type: ignore[arg-type]
        if run.guards is not None:
            np.savez(folder / GUARDS_FILE, **run.guards.state())  # type: ignore[arg-type]
        if run.trained is not None:
            torch.save(dict(run.trained), folder / BACKBONE_FILE)
        for name, document in ((METRICS_FILE, run.metrics), (RUN_FILE, run.record)):
            text = document.model_dump_json(indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        TrainingError: a file is missing, damaged, or from another version.
        DataError: the manifest is.
    """
    if not (folder / RUN_FILE).is_file():
        raise TrainingError(f"{folder} is not a run folder: it has no {RUN_FILE}.")
    head, thresholds = _read_head(folder / HEAD_FILE)
    record = _read_document(folder / RUN_FILE, RunRecord)
    recipe = record.settings.recipe
    return Run(
        record=record,
        frame=read_manifest(folder / MANIFEST_FILE),
        head=head,
        trained=read_state(folder / BACKBONE_FILE) if recipe.finetune is not None else None,
        # A folder of before may still hold those of an earlier run.
        guards=_read_guards(folder / GUARDS_FILE) if recipe.guards is not None else None,
        thresholds=thresholds,
        metrics=_read_document(folder / METRICS_FILE, Metrics),
    )


def is_current(file: Path) -> bool:
    """Whether a file in a run folder, such as `cv.json`, was written since the run itself.

    What is older belongs to an earlier run in the same folder.
    """
    return file.is_file() and file.stat().st_mtime >= (file.parent / RUN_FILE).stat().st_mtime


@contextmanager
def staged(out: Path, *, optional: tuple[str, ...] = ()) -> Iterator[Path]:
    """A temporary folder beside `out`, whose files move into `out` if the block succeeds.

    So a failure leaves nothing behind, and what stood in `out` before stays whole.

    Args:
        out: the folder to write.
        optional: names of files that the block may leave unwritten; those of before are removed
            then, because they belong to another model.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary)
        yield folder
        out.mkdir(exist_ok=True)
        written = set()
        for file in sorted(folder.iterdir()):
            file.replace(out / file.name)
            written.add(file.name)
        for name in set(optional) - written:
            (out / name).unlink(missing_ok=True)


def _read_head(path: Path) -> tuple[Head, dict[str, float]]:
    try:
        with np.load(path) as arrays:
            state = dict(arrays)
        head = head_from_state(state)
        thresholds = dict(zip(head.labels, state["thresholds"].tolist(), strict=True))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise TrainingError(f"{path} is missing or damaged; train again.") from error
    return head, thresholds


def _read_guards(path: Path) -> Guards | None:
    """The guards; none where the run has none, as before there were any."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            return guards_from_state(dict(arrays))
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} is damaged; train again.") from error


def _read_document(path: Path, kind: type[_Document]) -> _Document:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise TrainingError(f"{path} is missing or damaged; train again.") from error
