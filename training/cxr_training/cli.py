"""`cxr train`, `cxr evaluate` and `cxr export`.

PyTorch and scikit-learn are imported inside the commands, so that `--help` is quick.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cxr_training.command import (
    DEFAULT_RECIPE,
    FILE,
    FOLDER,
    clear_errors,
    json_option,
    layout_option,
    print_json,
    seed_option,
    task_option,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from cxr.config import Interval, Metrics
    from cxr_training.folds import FoldSummary
    from cxr_training.recipes import Recipe
    from cxr_training.runs import Run

_SYNTHETIC = (
    "Synthetic data: this model knows nothing of real radiographs, and its figures say nothing "
    "about them."
)

_FURTHER_FIGURES = (
    "balanced_accuracy", "macro_precision", "macro_f1", "macro_roc_auc", "macro_average_precision",
    "expected_calibration_error", "brier_score", "log_loss",
)  # fmt: skip
_CLASS_FIGURES = (
    "sensitivity", "specificity", "precision", "f1", "roc_auc", "average_precision",
)  # fmt: skip


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "cxr-serve" / "features"


# Options that say something about a model, which a cross-validation does not keep.
_OF_A_MODEL = ("split", "tabular", "name", "version")


def _given(names: "Sequence[str]") -> list[str]:
    """Those of the current command's options that were given, as they are typed."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return [f"--{name}" for name in names if context.get_parameter_source(name) != default]


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
@task_option
@click.option("--manifest", type=FILE, help="Manifest to use instead of folders.")
@click.option(
    "--out", type=FOLDER,
    help="Run folder to write; of a cross-validation, folder for its figures and predictions.",
)  # fmt: skip
@seed_option
@click.option(
    "--recipe", default=DEFAULT_RECIPE, show_default=True,
    help="What to train and how: a name of `cxr recipes`, or a YAML file.",
)  # fmt: skip
@click.option("--backbone", help="Another network than the recipe's.")
@click.option(
    "--weights", show_default="the recipe's",
    help="imagenet, none (random), or the path of a state dict.",
)  # fmt: skip
@click.option(
    "--split", type=click.Choice(["grouped", "random"]), default="grouped", show_default=True,
    help="By patient; or by image, as published studies do, which flatters.",
)  # fmt: skip
@click.option(
    "--tabular", is_flag=True,
    help="Add age, sex and view as inputs, to see what they give away; not for serving.",
)  # fmt: skip
@click.option(
    "--cv", "folds", type=click.IntRange(2, 20),
    help="Instead of a model: cross-validation in so many folds, by patient and by image.",
)  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(1, 20), default=1, show_default=True,
    help="With --cv: so many cross-validations, from --seed upward.",
)  # fmt: skip
@click.option(
    "--leave-one-source-out", "by_source", is_flag=True,
    help="Instead of a model: test on each source after training on the others.",
)  # fmt: skip
@click.option("--name", default="cxr", show_default=True, help="Model name, part of its URL.")
@click.option("--version", default="1.0", show_default=True, help="Model version.")
@_cache_option
@json_option
def train(
    *,
    folders: tuple[Path, ...],
    layout: str,
    task: str,
    manifest: Path | None,
    out: Path | None,
    seed: int,
    recipe: str,
    backbone: str | None,
    weights: str | None,
    split: str,
    tabular: bool,
    folds: int | None,
    seeds: int,
    by_source: bool,
    name: str,
    version: str,
    cache: Path,
    as_json: bool,
) -> None:
    """Train a classifier by a recipe.

    Images are split by patient into training, validation and test unless the manifest has splits
    already. The test split serves the printed figures alone.
    """
    if bool(folders) == bool(manifest):
        raise click.UsageError("Give either --data or --manifest.")
    if folds and by_source:
        raise click.UsageError("Give either --cv or --leave-one-source-out.")
    if out is None and not (folds or by_source):
        raise click.UsageError("Give --out: the run folder to write.")
    if seeds > 1 and not folds:
        raise click.UsageError("--seeds counts cross-validations; it goes with --cv only.")
    if (folds or by_source) and (ignored := _given(_OF_A_MODEL)):
        kind = "--cv" if folds else "--leave-one-source-out"
        raise click.UsageError(f"{' and '.join(ignored)} cannot be combined with {kind}.")
    with clear_errors():
        from cxr_training.data import build_manifest, read_manifest  # noqa: PLC0415
        from cxr_training.recipes import adapted, load_recipe  # noqa: PLC0415

        chosen = adapted(load_recipe(recipe), backbone=backbone, weights=weights)
        if out is None or folds or by_source:
            frame = (
                read_manifest(manifest)
                if manifest
                else build_manifest(folders, layout=layout, task=task).frame
            )
            several = range(seed, seed + seeds)
            _validate(frame, chosen, out, folds, several, cache=cache, as_json=as_json)
            return
        from cxr_training.train import train as run_training  # noqa: PLC0415

        run = run_training(
            manifest or build_manifest(folders, layout=layout, task=task).frame,
            out,
            recipe=chosen,
            seed=seed,
            name=name,
            version=version,
            split=split,  # type: ignore[arg-type]
            tabular=tabular,
            cache=cache,
        )
        from cxr_training.processes import is_first  # noqa: PLC0415
    if not is_first():
        return
    if as_json:
        print_json({"out": str(out), **_train_summary(run)})
        return
    head = run.record.head
    unit = _unit(run.frame, run.record.settings.split)
    picked = ", ".join(f"{name} = {value:.3g}" for name, value in head.parameters.items())
    how = (
        f"{head.folds}-fold cross-validation by {unit} on the training split"
        if head.folds
        else f"Validation split, best of {len(run.record.history)} epochs"
    )
    click.echo(f"{how}: accuracy {head.accuracy:.3f}, {picked}")
    click.echo(_headline(run.metrics, by=unit))
    if (ablation := run.record.ablation) is not None:
        click.echo(
            f"test accuracy of the image alone {ablation.image:.3f}, with age, sex and view "
            f"{ablation.image_and_tabular:.3f}, of age, sex and view alone {ablation.tabular:.3f}"
        )
    _warn_temperature(run)
    _warn_synthetic(run)
    click.echo(f"Wrote {out}.")


@click.command(epilog="Example: cxr recipes")
@json_option
def recipes(as_json: bool) -> None:
    """List the recipes that `cxr train --recipe` knows by name."""
    with clear_errors():
        from cxr_training.recipes import load_recipe, recipe_names  # noqa: PLC0415

        known = [load_recipe(name) for name in recipe_names()]
    if as_json:
        print_json({recipe.name: recipe.model_dump(mode="json") for recipe in known})
        return
    for one in known:
        click.echo(f"{one.name}\n    {one.description}")


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
    click.echo(_headline(metrics, by=_unit(run.frame, run.record.settings.split)))
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


def _validate(
    frame: "pd.DataFrame",
    recipe: "Recipe",
    out: Path | None,
    folds: int | None,
    seeds: range,
    *,
    cache: Path,
    as_json: bool,
) -> None:
    """Cross-validate a recipe, print the figures, and write them where asked to."""
    from cxr_training.crossval import cross_validate, validate_by_source  # noqa: PLC0415
    from cxr_training.folds import CV_FILE, LOSO_FILE, FoldDocument, write_folds  # noqa: PLC0415
    from cxr_training.published import published_on  # noqa: PLC0415

    if folds:
        found = cross_validate(frame, recipe, folds=folds, seeds=seeds, cache=cache)
    else:
        found = validate_by_source(frame, recipe, seed=seeds[0], cache=cache)
    summaries = found.summaries
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_folds(out / (CV_FILE if folds else LOSO_FILE), summaries, found.predictions)
    published = published_on(set(frame["source"]))
    if as_json:
        document = FoldDocument(summaries=summaries).model_dump(mode="json")
        print_json(document | {"published": [figure._asdict() for figure in published]})
        return
    _print_folds(summaries, _unit(frame))
    for figure in published:
        low, high = figure.accuracy
        click.echo(f"{figure.model}: accuracy {low:.3f} to {high:.3f}. {figure.differs}")
    if frame["synthetic"].any():
        click.echo(_SYNTHETIC)
    if out is not None:
        click.echo(f"Wrote {out}.")


_SCHEMES = {
    "grouped": "by {unit}",
    "random": "by image, as published figures are; relatives of test images stand in training",
    "leave-one-source-out": "by source: tested on each after training on the others",
}
_FOLD_FIGURES = ("accuracy", "balanced_accuracy", "expected_calibration_error")


def _print_folds(summaries: "Sequence[FoldSummary]", unit: str) -> None:
    import numpy as np  # noqa: PLC0415
    from tabulate import tabulate  # noqa: PLC0415

    for summary in summaries:
        scheme = _SCHEMES[summary.scheme].format(unit=unit)
        click.echo(f"{summary.recipe}, {scheme}: {summary.images} images, {summary.groups} groups")
        rows = []
        for name in _FOLD_FIGURES:
            spread = summary.figures[name]
            deviation = np.std(spread.seeds, ddof=1) if len(spread.seeds) > 1 else None
            trivial = summary.baseline[name].pooled.value if summary.baseline else None
            rows.append((name.replace("_", " "), _with_interval(spread.pooled), deviation, trivial))
        headers = ("", "mean over seeds", "deviation over seeds", "trivial features")
        click.echo(tabulate(rows, headers=headers, floatfmt=".3f", missingval="-"))
        if summary.scheme == "leave-one-source-out":
            parts = [
                (fold.fold, fold.images, *(fold.figures.get(name) for name in _FOLD_FIGURES[:2]))
                for fold in summary.folds
            ]
            headers = ("left out", "images", "accuracy", "balanced accuracy")
            click.echo("\n" + tabulate(parts, headers=headers, floatfmt=".3f", missingval="-"))
        click.echo()


def _train_summary(run: "Run") -> dict[str, object]:
    return {
        "synthetic": run.record.training_data.synthetic,
        "labels": run.record.labels,
        "splits": run.record.training_data.splits,
        "recipe": run.record.settings.recipe.name,
        "cross_validation": run.record.head.model_dump(),
        "ablation": run.record.ablation and run.record.ablation.model_dump(),
        "thresholds": run.thresholds,
        "metrics": run.metrics.model_dump(),
    }


def _headline(metrics: "Metrics", *, by: str) -> str:
    return (
        f"accuracy {_with_interval(metrics.accuracy)}, {metrics.images} images, "
        f"{metrics.groups} groups, {metrics.split} split by {by}"
    )


def _unit(frame: "pd.DataFrame", split: str = "grouped") -> str:
    """What the splits keep whole: a patient only where each image's is known."""
    if split != "grouped":
        return "image"
    return "group" if frame["patient"].isna().any() else "patient"


def _with_interval(interval: "Interval") -> str:
    return f"{interval.value:.3f} (95 % {interval.low:.2f}-{interval.high:.2f})"


def _print_metrics(metrics: "Metrics") -> None:
    from tabulate import tabulate  # noqa: PLC0415

    labels = list(metrics.per_class)
    for name in _FURTHER_FIGURES:
        if (interval := getattr(metrics, name)) is not None:
            click.echo(f"{name.replace('_', ' ')} {_with_interval(interval)}")
    classes = [
        {
            "class": label,
            "support": row.support,
            **{name: _cell(getattr(row, name)) for name in _CLASS_FIGURES},
        }
        for label, row in metrics.per_class.items()
    ]
    click.echo("\n" + tabulate(classes, headers="keys"))
    parts = [
        (kind, name, row.images, _cell(row.accuracy), _cell(row.balanced_accuracy))
        for kind in ("source", "sex", "age", "view")
        for name, row in getattr(metrics, f"per_{kind}").items()
    ]
    click.echo("\n" + tabulate(parts, headers=("by", "", "images", "accuracy", "balanced")))
    confusion = [(name, *row) for name, row in zip(labels, metrics.confusion, strict=True)]
    click.echo("\n" + tabulate(confusion, headers=("truth \\ predicted", *labels)))
    click.echo(f"\nIntervals: {metrics.method}.")


def _cell(interval: "Interval | None") -> str:
    return _with_interval(interval).replace("95 % ", "") if interval else "-"


def _warn_temperature(run: "Run") -> None:
    from cxr_training.calibration import at_bound  # noqa: PLC0415

    if at_bound(temperature := run.record.head.temperature):
        click.echo(
            f"The temperature ended at its bound, {temperature:.3g}: the validation split does not "
            "fit one, and the probabilities mean little."
        )


def _warn_synthetic(run: "Run") -> None:
    if run.record.training_data.synthetic:
        click.echo(_SYNTHETIC)
