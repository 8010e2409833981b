"""The run folder: what training leaves behind, and evaluation and export read.

| file | content |
|---|---|
| `manifest.parquet` | the manifest, with the column `split` |
| `head.npz` | `labels` (text), `thresholds` `[classes]`, `weight` `[classes, features]`, `bias` `[classes]`, float64 |
| `metrics.json` | metrics of the test split (:class:`cxr.config.Metrics`) |
| `run.json` | everything else (:class:`RunRecord`) |
"""  # noqa: E501 - a table

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cxr.config import Label, Metrics, ModelName, ModelVersion, Sha256, TrainingData
from cxr.preprocess import Preprocessing
from cxr_training.backbones import Backbone, create_backbone
from cxr_training.data import read_manifest, write_manifest
from cxr_training.errors import TrainingError
from cxr_training.head import Head

MANIFEST_FILE = "manifest.parquet"
HEAD_FILE = "head.npz"
METRICS_FILE = "metrics.json"
RUN_FILE = "run.json"

_Document = TypeVar("_Document", bound=BaseModel)


class Settings(BaseModel):
    """What the user chose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ModelName = "cxr"
    version: ModelVersion = "1.0"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    backbone: str = "efficientnet-lite0"
    weights: str = "imagenet"


class HeadSelection(BaseModel):
    """How the head's regularisation was chosen, by cross-validation on the training split.

    Attributes:
        folds: number of folds, none of which parts a group.
        c: the chosen inverse L2 strength.
        log_loss: class-weighted, at that C, mean over the folds.
        accuracy: at that C, mean over the folds; a little optimistic, as C was chosen on them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folds: int
    c: float
    log_loss: float
    accuracy: float


class RunRecord(BaseModel):
    """The content of `run.json`.

    Attributes:
        settings: what the user chose.
        preprocessing: how images became tensors.
        backbone_fingerprint: identifies weights, pooling and preprocessing.
        labels: class names, in the order of the output.
        head: how the head's regularisation was chosen.
        training_data: summary of the manifest.
        versions: software that trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: Settings
    preprocessing: Preprocessing
    backbone_fingerprint: Sha256
    labels: tuple[Label, ...]
    head: HeadSelection
    training_data: TrainingData
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with its data and figures.

    Attributes:
        record: settings, data summary, versions.
        frame: the manifest, with the column `split`.
        head: the linear head.
        thresholds: decision threshold of each class.
        metrics: metrics of the test split.
    """

    record: RunRecord
    frame: pd.DataFrame
    head: Head
    thresholds: dict[str, float]
    metrics: Metrics

    def backbone(self) -> Backbone:
        """Build the backbone that this run was trained with.

        Raises:
            TrainingError: its weights are gone, or are others now.
        """
        settings = self.record.settings
        backbone = create_backbone(settings.backbone, settings.weights)
        if backbone.fingerprint != self.record.backbone_fingerprint:
            raise TrainingError(
                f"The backbone {settings.backbone!r} with weights {settings.weights!r} is no "
                "longer the one that this run was trained with; train again."
            )
        return backbone

    def rows(self, split: str) -> pd.DataFrame:
        """The manifest's rows of one split."""
        return self.frame[self.frame["split"] == split]


def save_run(run: Run, out: Path) -> None:
    """Write a run folder; files of an earlier run there are replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    with staged(out) as folder:
        write_manifest(run.frame, folder / MANIFEST_FILE)
        np.savez(
            folder / HEAD_FILE,
            labels=np.asarray(run.head.labels),
            thresholds=np.asarray([run.thresholds[label] for label in run.head.labels]),
            weight=run.head.weight,
            bias=run.head.bias,
        )
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
    return Run(
        record=_read_document(folder / RUN_FILE, RunRecord),
        frame=read_manifest(folder / MANIFEST_FILE),
        head=head,
        thresholds=thresholds,
        metrics=_read_document(folder / METRICS_FILE, Metrics),
    )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, whose files move into `out` if the block succeeds.

    So a failure leaves nothing behind, and what stood in `out` before stays whole.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary)
        yield folder
        out.mkdir(exist_ok=True)
        for file in sorted(folder.iterdir()):
            file.replace(out / file.name)


def _read_head(path: Path) -> tuple[Head, dict[str, float]]:
    try:
        with np.load(path) as arrays:
            labels = tuple(str(label) for label in arrays["labels"])
            head = Head(labels=labels, weight=arrays["weight"], bias=arrays["bias"])
            thresholds = dict(zip(labels, arrays["thresholds"].tolist(), strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} is missing or damaged; train again.") from error
    return head, thresholds


def _read_document(path: Path, kind: type[_Document]) -> _Document:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise TrainingError(f"{path} is missing or damaged; train again.") from error
