"""Both Spark jobs on two executors, each a process of its own, checked against one machine.

Spark's `local-cluster` master starts a small cluster on this machine: a driver and executors that
share nothing but the file system, as on a real one. Each step is a `cxr` command that is printed
before it runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyspark
from steps import cxr, show, step

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_training.data import read_manifest

CORES, MEMORY_MIB = 1, 1024
TOLERANCE = 1e-5
PART_SIZE = 40


def main() -> int:
    """Run the demo; the exit code says whether every check held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/spark-demo"))
    parser.add_argument("--patients", type=int, default=40, help="phantom patients per class")
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.environ["SPARK_HOME"] = str(writable_spark_home(out / "spark-home"))
    started = time.monotonic()

    step("Drawing synthetic chest phantoms")
    data = out / "phantoms"
    cxr("data", "phantoms", data, "--patients-per-class", arguments.patients, "--seed", 0)
    step("The manifest: on this machine alone, and on two executors")
    alone, spread = out / "manifest.parquet", out / "manifest-spark.parquet"
    cxr("data", "manifest", data, "--out", alone)
    cxr("spark", "manifest", data, "--out", spread, "--master", master(2))
    same_rows(alone, spread)
    step("A model to score with")
    cxr("train", "--manifest", alone, "--out", out / "run")
    cxr("export", out / "run", "--out", out / "bundle")
    cxr("archive", out / "bundle", "--out", out / "cxr.mar")
    step("Scoring every image: on one executor, and on two")
    reports = {number: score(out, alone, number) for number in (1, 2)}
    same_predictions(out)
    rates = {number: report["images_per_second"] for number, report in reports.items()}
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. Throughput of the scorer, "
        f"{CORES} core for each executor, {os.cpu_count()} in this machine:\n"
        f"  1 executor   {rates[1]:6.1f} images/s\n"
        f"  2 executors  {rates[2]:6.1f} images/s  (x {rates[2] / rates[1]:.2f})\n"
        f"Predictions: {out / 'predictions-2.parquet'}. Research use only."
    )
    return 0


def writable_spark_home(folder: Path) -> Path:
    """The installed Spark, in a folder where its executors may write their logs (`work/`)."""
    folder.mkdir()
    installed = Path(pyspark.__file__).parent
    for name in ("bin", "jars", "python", "sbin"):
        (folder / name).symlink_to(installed / name)
    return folder


def master(executors: int) -> str:
    """A cluster on this machine."""
    return f"local-cluster[{executors},{CORES},{MEMORY_MIB}]"


def same_rows(alone: Path, spread: Path) -> None:
    """End the demo unless both manifests say the same, row for row."""
    expected = read_manifest(alone)
    pd.testing.assert_frame_equal(read_manifest(spread), expected)
    print(f"Both manifests are the same, row for row: {len(expected)} rows.")


def score(out: Path, manifest: Path, executors: int) -> dict[str, float]:
    """Score a manifest on so many executors."""
    command = show(
        "spark", "score", out / "cxr.mar", manifest, "--out",
        out / f"predictions-{executors}.parquet", "--master", master(executors),
        "--part-size", PART_SIZE, "--json",
    )  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    report: dict[str, float] = json.loads(done.stdout)
    print(
        f"{report['images']} images in {report['seconds']:.1f} s: "
        f"{report['images_per_second']:.1f} images/s"
    )
    return report


def same_predictions(out: Path) -> None:
    """End the demo unless one executor, two and this process give the same answers."""
    one, two = (pd.read_parquet(out / f"predictions-{number}.parquet") for number in (1, 2))
    pd.testing.assert_frame_equal(one, two, rtol=0, atol=TOLERANCE)
    engine = Engine(out / "bundle")
    for row in two.groupby("label").head(3).to_dict(orient="records"):
        (expected,) = engine.predict([Path(row["path"]).read_bytes()])
        if not isinstance(expected, Prediction) or expected.label != row["label"]:
            sys.exit("FAILED: an executor's answer is not that of this process.")
    print(
        f"\nOne and two executors give the same answers to all {len(two)} images, and this process "
        "to those it was asked about."
    )


if __name__ == "__main__":
    sys.exit(main())
