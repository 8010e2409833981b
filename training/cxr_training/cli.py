"""`cxr train`, `cxr evaluate` and `cxr export`.

PyTorch and scikit-learn are imported inside the commands, so that `--help` is quick.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cxr_training.command import (
    FILE,
    FOLDER,
    clear_errors,
    json_option,
    layout_option,
    print_json,
    seed_option,
)

if TYPE_CHECKING:
    from cxr.config import Interval, Metrics
    from cxr_training.runs import Run

_SYNTHETIC = (
    "Synthetic data: this model knows nothing of real radiographs, and its figures say nothing "
    "about them."
)


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "cxr-serve" / "features"


_cache_option = click.option(
    "--cache", type=FOLDER, default=_default_cache, show_default="user's cache folder",
    help="Folder that keeps extracted features, so that a second run takes seconds.",
)  # fmt: skip


@click.command(epilog="Example: cxr train --data ozturk --data cohen --out run --name cxr")
@click.option(
    "--data", "folders", multiple=True, type=FOLDER,
    help="Folder of one data set; may be given again.",
)  # fmt: skip
@layout_option
@click.option("--manifest", type=FILE, help="Manifest to use instead of folders.")
@click.option("--out", type=FOLDER, required=True, help="Run folder to write.")
@seed_option
@click.option("--backbone", default="efficientnet-lite0", show_default=True)
@click.option(
    "--weights", default="imagenet", show_default=True,
    help="imagenet, none (random), or the path of a state dict.",
)  # fmt: skip
@click.option("--name", default="cxr", show_default=True, help="Model name, part of its URL.")
@click.option("--version", default="1.0", show_default=True, help="Model version.")
@_cache_option
@json_option
def train(
    *,
    folders: tuple[Path, ...],
    layout: str,
    manifest: Path | None,
    out: Path,
    seed: int,
    backbone: str,
    weights: str,
    name: str,
    version: str,
    cache: Path,
    as_json: bool,
) -> None:
    """Train a classifier: frozen features and a logistic-regression head.

    Images are split by patient into training, validation and test unless the manifest has splits
    already. The test split serves the printed figures alone.
    """
    if bool(folders) == bool(manifest):
        raise click.UsageError("Give either --data or --manifest.")
    with clear_errors():
        from cxr_training.data import build_manifest  # noqa: PLC0415
        from cxr_training.train import train as run_training  # noqa: PLC0415

        run = run_training(
            manifest or build_manifest(folders, layout=layout).frame,
            out,
            seed=seed,
            backbone=backbone,
            weights=weights,
            name=name,
            version=version,
            cache=cache,
        )
    if as_json:
        print_json({"out": str(out), **_train_summary(run)})
        return
    head = run.record.head
    click.echo(
        f"{head.folds}-fold cross-validation by patient on the training split: "
        f"accuracy {head.accuracy:.3f}, C = {head.c:.3g}"
    )
    click.echo(_headline(run.metrics))
    _warn_synthetic(run)
    click.echo(f"Wrote {out}.")


@click.command(epilog="Example: cxr evaluate run")
@click.argument("run_folder", metavar="RUN", type=FOLDER)
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), default="test",
    show_default=True, help="Figures on train and validation flatter the model.",
)  # fmt: skip
@_cache_option
@json_option
def evaluate(run_folder: Path, split: str, cache: Path, as_json: bool) -> None:
    """Compute the metrics of a RUN again, from its images and its saved head."""
    with clear_errors():
        from cxr_training.runs import load_run  # noqa: PLC0415
        from cxr_training.train import evaluate as evaluate_run  # noqa: PLC0415

        run = load_run(run_folder)
        metrics = evaluate_run(run, split=split, cache=cache)  # type: ignore[arg-type]
    if as_json:
        click.echo(metrics.model_dump_json())
        return
    click.echo(_headline(metrics))
    _print_metrics(metrics)
    _warn_synthetic(run)


@click.command(epilog="Example: cxr export run --out bundle")
@click.argument("run_folder", metavar="RUN", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Bundle folder to write.")
@json_option
def export(run_folder: Path, out: Path, as_json: bool) -> None:
    """Write the model of a RUN as a bundle: one ONNX graph and its configuration.

    The bundle is written only if it answers like PyTorch on images of the test split.
    """
    with clear_errors():
        from cxr_training.export import export as export_run  # noqa: PLC0415

        report = export_run(run_folder, out)
    config = report.config
    if as_json:
        print_json(
            {
                "out": str(out),
                "name": config.name,
                "version": config.version,
                "graph": config.graph.model_dump(),
                "parity_images": report.parity_images,
                "max_difference": report.max_difference,
                "synthetic": config.training_data.synthetic,
            }
        )
        return
    click.echo(
        f"Largest difference between PyTorch and ONNX Runtime on {report.parity_images} test "
        f"images: {report.max_difference:.1e} in probability"
    )
    if config.training_data.synthetic:
        click.echo(_SYNTHETIC)
    click.echo(f"Wrote {config.name} {config.version} to {out}.")


def _train_summary(run: "Run") -> dict[str, object]:
    return {
        "synthetic": run.record.training_data.synthetic,
        "labels": run.record.labels,
        "splits": run.record.training_data.splits,
        "cross_validation": run.record.head.model_dump(),
        "thresholds": run.thresholds,
        "metrics": run.metrics.model_dump(),
    }


def _headline(metrics: "Metrics") -> str:
    return (
        f"accuracy {_with_interval(metrics.accuracy)}, {metrics.images} images, "
        f"{metrics.groups} groups, {metrics.split} split by patient"
    )


def _with_interval(interval: "Interval") -> str:
    return f"{interval.value:.3f} (95 % {interval.low:.2f}-{interval.high:.2f})"


def _print_metrics(metrics: "Metrics") -> None:
    from tabulate import tabulate  # noqa: PLC0415

    labels = list(metrics.per_class)
    click.echo(f"balanced accuracy {_with_interval(metrics.balanced_accuracy)}\n")
    classes = [{"class": name} | row.model_dump() for name, row in metrics.per_class.items()]
    click.echo(tabulate(classes, headers="keys", floatfmt=".3f", missingval="-"))
    sources = [(name, _with_interval(row)) for name, row in metrics.per_source.items()]
    click.echo("\n" + tabulate(sources, headers=("source", "accuracy")))
    confusion = [(name, *row) for name, row in zip(labels, metrics.confusion, strict=True)]
    click.echo("\n" + tabulate(confusion, headers=("truth \\ predicted", *labels)))
    click.echo(f"\nIntervals: {metrics.method}.")


def _warn_synthetic(run: "Run") -> None:
    if run.record.training_data.synthetic:
        click.echo(_SYNTHETIC)
