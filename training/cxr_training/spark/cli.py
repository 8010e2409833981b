"""`cxr spark`: the long jobs on Apache Spark.

PySpark, pandas and ONNX Runtime are imported inside the commands, so that `--help` is quick.
"""

from collections.abc import Callable
from pathlib import Path

import click

from cxr_training.command import (
    FILE,
    FOLDER,
    clear_errors,
    json_option,
    layout_option,
    print_json,
    task_option,
)
from cxr_training.data_cli import print_manifest_report


@click.group()
def spark() -> None:
    """Manifests and predictions of many images, on Apache Spark.

    Spark runs in this process unless --master names a cluster. Its machines then need the same
    Python environment and the same files, under the same paths.
    """


def _properties(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if any(not (key and separator) for key, separator, _ in pairs):
        raise click.BadParameter("Give KEY=VALUE.")
    return {key: value for key, _, value in pairs}


def _session_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that starts Spark."""
    for option in (
        click.option(
            "--log-level", default="off", show_default=True,
            type=click.Choice(["off", "error", "warn", "info"]),
            help="How much of Spark's own log to print; it may name files.",
        ),
        click.option(
            "--conf", multiple=True, metavar="KEY=VALUE", callback=_properties,
            help="Spark property, such as spark.executor.memory=4g; may be given again.",
        ),
        click.option(
            "--master", default="local[*]", show_default=True,
            help="Where Spark runs: local[CORES], spark://HOST:PORT, yarn, k8s://URL.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@spark.command(epilog="Example: cxr spark manifest ozturk cohen cxnet --out manifest.parquet")
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=FOLDER)
@layout_option
@task_option
@click.option("--out", type=FILE, default="manifest.parquet", show_default=True)
@_session_options
@json_option
def manifest(
    *,
    folders: tuple[Path, ...],
    layout: str,
    task: str,
    out: Path,
    master: str,
    conf: dict[str, str],
    log_level: str,
    as_json: bool,
) -> None:
    """Read the data sets in each FOLDER into one manifest, as 'cxr data manifest' does.

    The result is the same, row for row; decoding, hashing and the search for near-duplicates run
    on Spark.
    """
    from cxr_training.data import write_manifest  # noqa: PLC0415
    from cxr_training.spark.manifest import build_manifest  # noqa: PLC0415
    from cxr_training.spark.session import session  # noqa: PLC0415

    with clear_errors():
        with session(master, conf=conf, log_level=log_level) as opened:
            report = build_manifest(opened, folders, layout=layout, task=task)
        write_manifest(report.frame, out)
    print_manifest_report(report, out, as_json=as_json)


@spark.command(epilog="Example: cxr spark score cxr.mar manifest.parquet --out predictions.parquet")
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option(
    "--out", type=FOLDER, default="predictions.parquet", show_default=True,
    help="Folder to write: Parquet in parts.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace predictions of another model or input.")
@click.option(
    "--part-size", type=click.IntRange(1), default=1000, show_default=True,
    help="Images in a part: what one task does, and what a killed run may have to do again.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True,
    help="Images that a core holds and scores at once.",
)  # fmt: skip
@_session_options
@json_option
def score(
    *,
    model_path: Path,
    source: Path,
    out: Path,
    part_size: int,
    batch_size: int,
    master: str,
    conf: dict[str, str],
    log_level: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Score the images of INPUT with MODEL, into a folder of Parquet.

    MODEL is a bundle folder or a .mar archive. INPUT is a manifest, or a folder: then all files in
    and below it. A bad image gets a row that says so. A run that was stopped continues where it
    was when it is started again with the same --out.
    """
    from cxr_training.spark.model import read_model  # noqa: PLC0415
    from cxr_training.spark.predictions import count_errors, opened  # noqa: PLC0415
    from cxr_training.spark.score import (  # noqa: PLC0415
        Report,
        list_images,
        make_job,
        score,
    )
    from cxr_training.spark.session import session  # noqa: PLC0415

    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise click.UsageError("--out must not be within INPUT.")
    with clear_errors():
        model = read_model(model_path)
        images = list_images(source)
        job = make_job(model, images, part_size)
        report = Report(images=0, seconds=0.0)
        with opened(out, job, overwrite=overwrite) as missing:
            if missing:
                with session(master, conf=conf, log_level=log_level) as running:
                    report = score(
                        running, model, images, out,
                        job=job, parts=missing, batch_size=batch_size,
                    )  # fmt: skip
        errors = count_errors(out)
    earlier = job.images - report.images
    rate = report.images / report.seconds if report.seconds else None
    if as_json:
        print_json(
            {
                "out": str(out),
                "model": job.model,
                "images": job.images,
                "scored_before": earlier,
                "errors": errors,
                "seconds": report.seconds,
                "images_per_second": rate,
            }
        )
        return
    if earlier:
        click.echo(f"{earlier} images had been scored before.")
    if rate is not None:
        click.echo(f"Scored {report.images} images in {report.seconds:.1f} s: {rate:.1f} images/s.")
    for reason, count in errors.items():
        click.echo(f"Not usable: {count} ({reason}).")
    click.echo(f"Wrote {out}: {job.images} images, {job.model}.")
