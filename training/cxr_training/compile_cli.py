"""`cxr compile`."""

from pathlib import Path

import click

from cxr_training.command import FILE, clear_errors, json_option, print_json


@click.command(
    "compile",
    epilog="Example: cxr compile run/bundle --manifest run/manifest.parquet --out compiled.mar",
)
@click.argument("source", metavar="BUNDLE|MAR", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--manifest", type=FILE, required=True,
    help="manifest.parquet of the run: its training images calibrate, its validation images judge.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), required=True,
    help="Bundle folder to write, or an archive if it ends in .mar.",
)  # fmt: skip
@click.option(
    "--max-accuracy-loss", type=click.FloatRange(0, 100), default=0.5, show_default=True,
    help="Points of accuracy that a graph may lose.",
)  # fmt: skip
@click.option(
    "--max-difference", type=click.FloatRange(0, 1), default=0.05, show_default=True,
    help="95th percentile of the change of a probability.",
)  # fmt: skip
@click.option(
    "--max-flags-changed", type=click.FloatRange(0, 100), default=1.0, show_default=True,
    help="Per cent of the images of which guards may come to say something else.",
)  # fmt: skip
@click.option(
    "--tensorrt", is_flag=True,
    help="Try TensorRT in float32 and float16 instead, against CUDA; needs a GPU here.",
)  # fmt: skip
@json_option
def compile_command(
    *,
    source: Path,
    manifest: Path,
    out: Path,
    max_accuracy_loss: float,
    max_difference: float,
    max_flags_changed: float,
    tensorrt: bool,
    as_json: bool,
) -> None:
    """Replace a model's graph by the fastest that answers as well.

    Tried are ONNX Runtime's offline optimisation and int8 with more or fewer layers left in
    float32. Each runs on the validation split beside the original; one that is worse is refused.
    The choice and all figures go into the written configuration.
    """
    with clear_errors():
        from cxr_training.compilation import Gate, compile_bundle  # noqa: PLC0415

        gate = Gate(
            accuracy=max_accuracy_loss / 100,
            difference=max_difference,
            flags=max_flags_changed / 100,
        )
        compilation = compile_bundle(source, manifest, out, gate=gate, tensorrt=tensorrt)
    if as_json:
        print_json({"out": str(out), **compilation.model_dump()})
        return
    from tabulate import tabulate  # noqa: PLC0415

    rows = [
        (
            one.name, f"{one.accuracy:.3f}", one.labels_changed, f"{one.difference_p95:.3f}",
            f"{one.difference_max:.3f}", "-" if one.flags_changed is None else one.flags_changed,
            f"{one.milliseconds:.1f}", f"{one.speedup:.2f}", "passed" if one.passed else "refused",
        )
        for one in compilation.candidates
    ]  # fmt: skip
    headers = (
        "graph", "accuracy", "labels changed", "difference p95", "max", "flags changed", "ms",
        "speed-up", "gate",
    )  # fmt: skip
    click.echo(tabulate(rows, headers=headers, disable_numparse=True))
    click.echo(f"Chosen: {compilation.chosen}. Wrote {out}.")
