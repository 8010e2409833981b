"""`cxr data`: phantoms, manifests, summaries, audits and splits from the command line.

pandas and SciPy are imported inside the commands, so that `--help` is quick.
"""

from dataclasses import asdict
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
    task_option,
)

if TYPE_CHECKING:
    from cxr_training.data import LeakAudit, ManifestReport, ManifestSummary, SplitKind


@click.group()
def data() -> None:
    """Prepare images for training: phantoms, manifests, splits."""


@data.command(epilog="Example: cxr data phantoms phantoms --patients-per-class 40 --seed 7")
@click.argument("out", type=FOLDER)
@click.option(
    "--patients-per-class", type=click.IntRange(1), default=40, show_default=True,
    help="Patients for each class.",
)  # fmt: skip
@seed_option
def phantoms(out: Path, patients_per_class: int, seed: int) -> None:
    """Draw synthetic chest phantoms into the new folder OUT.

    They need no download and no patient: use them to try the platform, never to judge a model.
    """
    from cxr_training.data import PHANTOM_LABELS, generate_phantoms  # noqa: PLC0415

    with clear_errors():
        generate_phantoms(out, patients_per_class=patients_per_class, seed=seed, progress=True)
    click.echo(f"Wrote phantoms of {patients_per_class * len(PHANTOM_LABELS)} patients to {out}.")


@data.command(epilog="Example: cxr data manifest ozturk cohen cxnet --out manifest.parquet")
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=FOLDER)
@layout_option
@task_option
@click.option("--out", type=FILE, default="manifest.parquet", show_default=True)
@json_option
def manifest(folders: tuple[Path, ...], layout: str, task: str, out: Path, as_json: bool) -> None:
    """Read the data sets in each FOLDER into one manifest.

    Images of one patient, and near-duplicates across data sets, get one group, which no split
    parts. Images that cannot be used, or that the task has no class for, are left out and counted.
    """
    from cxr_training.data import build_manifest, write_manifest  # noqa: PLC0415

    with clear_errors():
        report = build_manifest(folders, layout=layout, task=task)
        write_manifest(report.frame, out)
    print_manifest_report(report, out, as_json=as_json)


def print_manifest_report(report: "ManifestReport", out: Path, *, as_json: bool) -> None:
    """Say what is in a manifest that was written to `out`, and what was left out."""
    from cxr_training.data import summarize  # noqa: PLC0415

    summary = summarize(report.frame)
    if as_json:
        print_json({"out": str(out), "excluded": report.excluded, **asdict(summary)})
        return
    click.echo(f"Wrote {summary.images} images in {summary.groups} groups to {out}.")
    for reason, count in report.excluded.items():
        click.echo(f"Left out: {count} ({reason}).")


@data.command(epilog="Example: cxr data summary manifest.parquet")
@click.argument("manifest_file", metavar="MANIFEST", type=FILE)
@json_option
def summary(manifest_file: Path, as_json: bool) -> None:
    """Show what is in a MANIFEST, and what a careless split would leak."""
    from cxr_training.data import read_manifest, summarize  # noqa: PLC0415

    with clear_errors():
        figures = summarize(read_manifest(manifest_file))
    if as_json:
        print_json(asdict(figures))
    else:
        _print_summary(figures)


@data.command(epilog="Example: cxr data audit manifest.parquet")
@click.argument("manifest_file", metavar="MANIFEST", type=FILE)
@seed_option
@json_option
def audit(manifest_file: Path, seed: int, as_json: bool) -> None:
    """Say what a random split of a MANIFEST by image would leak.

    Counts are means over five such splits: test images whose patient, near-duplicate or
    byte-identical copy stands in training.
    """
    from cxr_training.data import audit_split, read_manifest  # noqa: PLC0415

    with clear_errors():
        report = audit_split(read_manifest(manifest_file), seed)
    if as_json:
        print_json(asdict(report))
    else:
        _print_audit(report)


@data.command(epilog="Example: cxr data split manifest.parquet --seed 7 --out split.parquet")
@click.argument("manifest_file", metavar="MANIFEST", type=FILE)
@click.option(
    "--kind", type=click.Choice(["grouped", "random"]), default="grouped", show_default=True,
    help="grouped: 64, 16 and 20 %, no group parted. random: 70, 20 and 10 %, image by image.",
)  # fmt: skip
@seed_option
@click.option("--out", type=FILE, required=True, help="Where to write the manifest with splits.")
@json_option
def split(manifest_file: Path, kind: "SplitKind", seed: int, out: Path, as_json: bool) -> None:
    """Assign the images of a MANIFEST to train, validation and test.

    A grouped split parts no group, so no patient stands on two sides. A random one does: use it
    only to repeat published figures.
    """
    from tabulate import tabulate  # noqa: PLC0415

    from cxr_training.data import assign_splits, read_manifest, write_manifest  # noqa: PLC0415
    from cxr_training.data.summary import count_splits  # noqa: PLC0415

    with clear_errors():
        frame = read_manifest(manifest_file)
        frame["split"] = assign_splits(frame, seed=seed, kind=kind)
        write_manifest(frame, out)
    counts = count_splits(frame)
    if as_json:
        print_json(
            {
                "out": str(out),
                "kind": kind,
                "seed": seed,
                "splits": {k: asdict(v) for k, v in counts.items()},
            }
        )
        return
    rows = [
        {"split": name, "images": count.images, "groups": count.groups, **count.labels}
        for name, count in counts.items()
    ]
    click.echo(tabulate(rows, headers="keys"))
    click.echo(f"Wrote {out}.")


def _print_summary(figures: "ManifestSummary") -> None:
    from tabulate import tabulate  # noqa: PLC0415

    rows = [
        {"source": source, **labels, "total": sum(labels.values())}
        for source, labels in figures.labels.items()
    ]
    click.echo(tabulate(rows, headers="keys"))
    click.echo(
        f"\n{figures.images} images, {figures.synthetic} of them synthetic; "
        f"{figures.patients} known patients, {figures.images_without_patient} images without one; "
        f"{figures.groups} groups."
    )
    click.echo("\nLargest groups:")
    for group in figures.largest_groups:
        sources, labels = ", ".join(group.sources), ", ".join(group.labels)
        click.echo(f"  {group.group}  {group.images} images from {sources}: {labels}")
    spanning = figures.cross_source_groups
    click.echo(f"\n{spanning} groups span sources ({figures.cross_source_images} images).")
    for pair, count in figures.shared_groups.items():
        click.echo(f"  {pair}: {count} groups")
    if leak := figures.random_split:
        click.echo(
            f"\nA random split by image (70, 20, 10 %) would leak: about {leak['leaked']} of "
            f"{leak['test_images']} test images would have an image of their group in training."
        )
    click.echo(f"SHA-256 of the manifest: {figures.sha256}")


def _print_audit(report: "LeakAudit") -> None:
    from tabulate import tabulate  # noqa: PLC0415

    parts = [("all", report.total), *report.by_source.items(), *report.by_label.items()]
    headers = ["test images", "any relative", "same patient", "near-duplicate", "identical"]
    click.echo(
        "Test images of a random split (70, 20, 10 % by image) with a relative in training, "
        f"mean of {len(report.seeds)} splits:\n"
    )
    rows = [[name, *asdict(leak).values()] for name, leak in parts]
    click.echo(tabulate(rows, headers=["", *headers], floatfmt=".1f"))
    click.echo("\nExamples, by the beginning of their SHA-256:")
    for pair in report.examples:
        click.echo(
            f"  {pair.test} ({pair.test_source}) is tested, {pair.train} ({pair.train_source}) "
            f"trained on: {pair.relation.replace('_', '-')}, {pair.distance} of 256 bits apart"
        )
