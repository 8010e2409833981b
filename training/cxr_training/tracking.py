"""Runs in MLflow: parameters, figures, curves, artefacts and a registered model.

By default in a folder of files, without a server. MLflow keeps that store as it is and no longer
extends it; a server or a database is named by its address. Tables of images stay at home: they name
files and patients.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cxr.config import Interval
from cxr_training.errors import TrainingError
from cxr_training.folds import CV_FILE, LOSO_FILE, FoldSummary, read_folds
from cxr_training.report.collect import parameters
from cxr_training.runs import Run, is_current, load_run
from cxr_training.shortcuts import SHORTCUTS_FILE

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

STORE = "mlruns"
# What tells files or patients apart from each other; everything else in the run folder is logged.
_PRIVATE = (".parquet", ".csv")
# Written after the run; of an earlier run in the same folder they would describe another model.
_BESIDE = (CV_FILE, LOSO_FILE, SHORTCUTS_FILE)
# MLflow's limit for the value of a parameter.
_LONGEST = 500
_NOT_A_NAME = re.compile(r"[^\w\-. /]")
# Set before MLflow is imported: the first and second stop it from reporting its use, the third lets
# it write to files, the fourth silences its advice about servers.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}


@dataclass(frozen=True)
class Tracked:
    """Where a run went: store, experiment, MLflow's id of the run, version of the model."""

    uri: str
    experiment: str
    run_id: str
    model_version: str


def track_run(folder: Path, uri: str | None = None, *, extra: tuple[Path, ...] = ()) -> Tracked:
    """Log a run folder in MLflow and register its model under the run's name.

    Args:
        folder: the run folder; what :mod:`cxr_training.folds` writes there is logged too, unless
            it is older than the run.
        uri: address of the store: a folder, `http(s)://` or a database's. `None` is the folder
            :data:`STORE` beside the run folder.
        extra: further files to log, such as the report or an archive.

    Raises:
        TrainingError: the folder is not a run, or the store does not take it.
    """
    run = load_run(folder)
    store = uri or str(folder.resolve().parent / STORE)
    if "://" not in store and not store.startswith("sqlite:"):
        store = Path(store).resolve().as_uri()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Seconds to import, and only who tracks needs it.
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from mlflow.tracking import MlflowClient, set_tracking_uri  # noqa: PLC0415

    # A registry in a folder asks the default store, too, which would be made in the current folder.
    set_tracking_uri(store)
    try:
        return _log(MlflowClient(store, store), store, run, folder, extra)
    except MlflowException as error:
        first = str(error).splitlines()[0]
        raise TrainingError(f"MLflow's store {store} does not take the run: {first}") from error


def _log(
    client: "MlflowClient", store: str, run: Run, folder: Path, extra: tuple[Path, ...]
) -> Tracked:
    settings = run.record.settings
    experiment = client.get_experiment_by_name(settings.name)
    number = experiment.experiment_id if experiment else client.create_experiment(settings.name)
    logged = client.create_run(number, run_name=f"{settings.name} {settings.version}")
    run_id = logged.info.run_id
    try:
        for name, value in parameters(run).items():
            client.log_param(run_id, name, value[:_LONGEST])
        client.set_tag(run_id, "manifest_sha256", run.record.training_data.manifest_sha256)
        client.set_tag(run_id, "synthetic", str(run.record.training_data.synthetic).lower())
        for name, figure, step in _figures(run, folder):
            client.log_metric(run_id, _NOT_A_NAME.sub("_", name), figure, step=step)
        for path in _public(folder):
            client.log_artifact(run_id, str(path), "run")
        for path in extra:
            client.log_artifact(run_id, str(path))
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id)
    return Tracked(
        uri=store,
        experiment=settings.name,
        run_id=run_id,
        model_version=_register(client, settings.name, run_id, logged.info.artifact_uri),
    )


def _register(client: "MlflowClient", name: str, run_id: str, artifacts: str) -> str:
    if not any(model.name == name for model in client.search_registered_models()):
        client.create_registered_model(name)
    version = client.create_model_version(name, f"{artifacts}/run", run_id)
    return str(version.version)


def _figures(run: Run, folder: Path) -> Iterator[tuple[str, float, int]]:
    """Name, value and step of everything that MLflow can draw."""
    for name, value in run.metrics:
        if isinstance(value, Interval):
            yield from _with_ends(f"test/{name}", value)
    for label, row in run.metrics.per_class.items():
        for name, value in row:
            if isinstance(value, Interval):
                yield f"test/{label}/{name}", value.value, 0
    for epoch in run.record.model_dump().get("history", ()):
        for name, value in epoch.items():
            if name != "epoch":
                yield f"training/{name}", value, epoch["epoch"]
    for file in (CV_FILE, LOSO_FILE):
        if is_current(folder / file):
            for summary in read_folds(folder / file):
                yield from _fold_figures(summary)


def _fold_figures(summary: FoldSummary) -> Iterator[tuple[str, float, int]]:
    for name, spread in summary.figures.items():
        yield from _with_ends(f"{summary.scheme}/{name}", spread.pooled)
    for step, fold in enumerate(summary.folds):
        for name, value in fold.figures.items():
            yield f"{summary.scheme}/by fold/{name}", value, step


def _with_ends(name: str, interval: Interval) -> Iterator[tuple[str, float, int]]:
    yield name, interval.value, 0
    yield f"{name}.low", interval.low, 0
    yield f"{name}.high", interval.high, 0


def _public(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix not in _PRIVATE
        and not path.name.startswith(".")
        and (path.name not in _BESIDE or is_current(path))
    ]
