"""`cxr report`, `cxr compare` and `cxr track`.

PyTorch, scikit-learn, matplotlib and MLflow are imported inside the commands, so that `--help` is
quick.
"""

from dataclasses import asdict
from pathlib import Path

import click

from cxr_training.cli import _cache_option
from cxr_training.command import FILE, FOLDER, clear_errors, json_option, print_json


@click.command(epilog="Example: cxr report run --out report.html")
@click.argument("run_folder", metavar="RUN", type=FOLDER)
@click.option(
    "--out", type=FILE, help="HTML file to write.  [default: report.html in the run folder]"
)
@click.option(
    "--examples", type=click.IntRange(0, 48), default=0, show_default=True,
    help="Show this many mistakes, and as many right answers, as small images. They are "
    "radiographs of people: only for data that whoever gets the report may see.",
)  # fmt: skip
@click.option(
    "--audit/--no-audit", default=True, show_default=True,
    help="Ask the model about its test images without lungs, and without all else.",
)  # fmt: skip
@_cache_option
@json_option
def report(
    *, run_folder: Path, out: Path | None, examples: int, audit: bool, cache: Path, as_json: bool
) -> None:
    """Write the report of a RUN as one HTML file that needs nothing else.

    Figures with intervals beside the trivial baseline, subgroups, curves, calibration, thresholds,
    leaks, cross-validation and left-out sources (if the run has them), the shortcut audit, and
    published figures on the same images.
    """
    target = out or run_folder / "report.html"
    with clear_errors():
        from cxr_training.report import write_report  # noqa: PLC0415

        data = write_report(run_folder, target, cache=cache, examples=examples, audit=audit)
    if as_json:
        print_json(
            {
                "out": str(target),
                "metrics": data.metrics.model_dump(),
                "baseline": data.baseline.model_dump(),
                "gain": {name: value.model_dump() for name, value in data.gain.items()},
                "audit": data.audit.model_dump() if data.audit else None,
            }
        )
        return
    click.echo(
        f"accuracy {data.metrics.accuracy.value:.3f}, trivial baseline "
        f"{data.baseline.accuracy.value:.3f}"
    )
    if data.audit:
        click.echo(data.audit.verdict[0])
    click.echo(f"Wrote {target}.")


@click.command(epilog="Example: cxr compare loso-robust/loso.json loso-best/loso.json")
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@json_option
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Compare two recipes on the same images: FIRST minus SECOND, groups paired.

    Both are a `cv.json` or `loso.json` that `cxr train --cv` or `--leave-one-source-out` has
    written, with the predictions beside it.
    """
    with clear_errors():
        from cxr_training.folds import compare_folds  # noqa: PLC0415

        found = compare_folds(first, second)
    if as_json:
        print_json(found.model_dump())
        return
    from tabulate import tabulate  # noqa: PLC0415

    rows = []
    for part, figures in found.difference.items():
        for name, difference in figures.items():
            sides = [side[part][name] for side in (found.first, found.second)]
            cells = [f"{x.value:.3f} ({x.low:.3f} to {x.high:.3f})" for x in (*sides, difference)]
            rows.append((part or "all", name.replace("_", " "), *cells))
    headers = ("on", "figure", str(first.parent), str(second.parent), "difference")
    click.echo(tabulate(rows, headers=headers))
    click.echo("\n95 % intervals; they resample groups, the same ones for both.")


@click.command(epilog="Example: cxr track run --store http://127.0.0.1:5000")
@click.argument("run_folder", metavar="RUN", type=FOLDER)
@click.option(
    "--store",
    help="MLflow's store: a folder or an address.  [default: mlruns beside the run folder]",
)
@click.option(
    "--file", "files", multiple=True, type=FILE,
    help="Further file to log, such as an archive; may be given again.",
)  # fmt: skip
@json_option
def track(*, run_folder: Path, store: str | None, files: tuple[Path, ...], as_json: bool) -> None:
    """Log a RUN in MLflow: parameters, figures, curves, files, and a registered model.

    The manifest stays at home: it names files and patients.
    """
    with clear_errors():
        from cxr_training.tracking import track_run  # noqa: PLC0415

        tracked = track_run(run_folder, store, extra=files)
    if as_json:
        print_json(asdict(tracked))
        return
    click.echo(
        f"Logged as run {tracked.run_id} of the experiment {tracked.experiment!r}, model version "
        f"{tracked.model_version}, in {tracked.uri}."
    )
