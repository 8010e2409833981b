"""`cxr spark score`: a row for every image, whatever happens on the way."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
from pyspark.sql import SparkSession

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_training.data import write_manifest
from support.bundles import LABELS, encoded_image, make_bundle
from support.spark import QUICK, run_spark

PATIENCE = 180


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images in and below a folder; and what is none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "b/c").mkdir(parents=True)
    for number in range(9):
        place = folder / ("b/c" if number % 3 else ".")
        (place / f"{number}.png").write_bytes(encoded_image(40 + 20 * number, seed=number))
    (folder / "empty.png").touch()
    (folder / "b/damaged.png").write_bytes(encoded_image()[:200])
    (folder / "b/notes.txt").write_text("not an image")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / ".hidden").write_bytes(b"hidden")
    return folder


def score(*arguments: object) -> dict[str, object]:
    result = run_spark("score", *arguments, "--part-size", 3, "--batch-size", 2, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, object] = json.loads(result.stdout)
    return report


def parts(out: Path) -> dict[str, tuple[int, int]]:
    """Each part with what changes when it is written anew."""
    found = [(path.name, path.stat()) for path in out.glob("part-*.parquet")]
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found}


def refused(*arguments: object) -> str:
    """What one sentence a run that is refused prints."""
    result = run_spark("score", *arguments)
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    return line


def test_every_image_has_its_row(
    spark: SparkSession, archive: Path, bundle: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = score(archive, images, "--out", out)
    assert report["images"] == 13
    assert report["scored_before"] == 0
    assert report["errors"] == {"damaged": 1, "empty": 1, "not_an_image": 1, "unreadable": 1}
    assert len(parts(out)) == 5
    frame = pd.read_parquet(out)
    files = sorted(str(p) for p in images.rglob("*") if p.suffix and not p.is_dir())
    assert frame["path"].tolist() == files
    assert set(frame["model_name"] + " " + frame["model_version"]) == {"cxr 1.0"}
    assert frame["graph_sha256"].nunique() == 1
    engine = Engine(bundle)
    for row in frame.to_dict(orient="records"):
        if row["error_reason"] == "unreadable":
            assert row["error"] == "The file cannot be read: No such file or directory."
            assert row["sha256"] is None
            continue
        content = Path(row["path"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        (answer,) = engine.predict([content])
        if isinstance(answer, Prediction):
            assert row["label"] == answer.label
            assert tuple(row["positive"]) == answer.positive
            for label in LABELS:
                assert row[f"probability: {label}"] == pytest.approx(answer.probabilities[label])
            assert row["error"] is row["error_reason"] is None
        else:
            assert (row["error_reason"], row["error"]) == (answer.reason, str(answer))
            assert row["label"] is row["positive"] is None
            assert pd.isna(row[f"probability: {LABELS[0]}"])


def test_an_image_over_the_limit_is_hashed_and_not_decoded(
    spark: SparkSession, bundle: Path, tmp_path: Path
) -> None:
    size = Engine(bundle).limits.max_bytes + 2**21
    (tmp_path / "in").mkdir()
    with (tmp_path / "in/huge.png").open("wb") as file:
        file.truncate(size)
    score(bundle, tmp_path / "in", "--out", tmp_path / "out")
    (row,) = pd.read_parquet(tmp_path / "out").to_dict(orient="records")
    assert row["error_reason"] == "too_many_bytes"
    assert row["sha256"] == hashlib.sha256(bytes(size)).hexdigest()


def test_starting_again_does_only_what_is_missing(
    spark: SparkSession, bundle: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    score(bundle, images, "--out", out)
    before, written = pd.read_parquet(out), parts(out)
    (out / "part-000001.parquet").unlink()
    assert score(bundle, images, "--out", out)["scored_before"] == 10
    after = parts(out)
    assert {name for name in written if after[name] != written[name]} == {"part-000001.parquet"}
    pd.testing.assert_frame_equal(pd.read_parquet(out), before)
    result = run_spark("score", bundle, images, "--out", out, "--part-size", 3)
    assert "13 images had been scored before." in result.output
    assert "Not usable: 1 (damaged)." in result.output
    assert parts(out) == after


def test_another_model_or_input_is_refused(
    spark: SparkSession, bundle: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "few").mkdir()
    (tmp_path / "few/1.png").write_bytes(encoded_image())
    score(bundle, tmp_path / "few", "--out", out)
    other = make_bundle(tmp_path / "other", thresholds=dict.fromkeys(LABELS, 0.1))
    assert "holds predictions of another model;" in refused(
        other, tmp_path / "few", "--out", out, "--part-size", 3
    )
    assert "another input;" in refused(bundle, images, "--out", out, "--part-size", 3)
    score(other, tmp_path / "few", "--out", out, "--overwrite")
    assert pd.read_parquet(out)["positive"].map(len).tolist() == [3]


@pytest.fixture
def things(bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good and bad models and inputs in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("bundle").symlink_to(bundle)
    Path("images").symlink_to(images)
    Path("damaged.mar").write_bytes(b"PK damaged")
    Path("hollow").mkdir()


@pytest.mark.parametrize(
    ("model", "source", "says"),
    [
        ("nowhere.mar", "images", "There is no archive at nowhere.mar."),
        ("damaged.mar", "images", "damaged.mar is not a readable model archive"),
        ("bundle", "nowhere.parquet", "There is no manifest nowhere.parquet"),
        ("bundle", "hollow", "hollow holds no files."),
    ],
)
def test_a_mistake_is_one_sentence(things: None, model: str, source: str, says: str) -> None:
    assert says in refused(model, source, "--out", "out")
    assert not Path("out").exists()


def test_an_out_that_cannot_be_made(bundle: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Error: " in refused(bundle, images, "--out", tmp_path / "file/out")


def test_an_out_within_the_input(bundle: Path, images: Path) -> None:
    result = run_spark("score", bundle, images, "--out", images / "out")
    assert result.exit_code == 2
    assert "--out must not be within INPUT." in result.output


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_run_goes_on_where_it_was(
    spark: SparkSession, bundle: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded_image(100 + number, seed=number))
    manifest = tmp_path / "manifest.parquet"
    write_manifest(pd.DataFrame([manifest_row(path) for path in paths]), manifest)
    # Reading a pipe waits for a writer that never comes: this run cannot finish by itself.
    content = paths[4].read_bytes()
    paths[4].unlink()
    os.mkfifo(paths[4])
    arguments = ["score", bundle, manifest, "--out", out, "--part-size", 3, "--master", "local[2]"]
    arguments += [f"--conf={key}={value}" for key, value in QUICK.items()]
    command = "from cxr_training.spark.cli import spark; spark()"
    with subprocess.Popen(
        [sys.executable, "-c", command, *map(str, arguments)], stderr=subprocess.DEVNULL
    ) as run:
        wait_for(lambda: len(parts(out)) == 2)
        children = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    _, alive = psutil.wait_procs(children, PATIENCE)
    assert not alive
    written = parts(out)
    assert not (out / "_SUCCESS").exists()
    paths[4].unlink()
    paths[4].write_bytes(content)
    report = score(bundle, manifest, "--out", out)
    assert (report["images"], report["scored_before"]) == (8, 5)
    assert written.items() < parts(out).items()
    frame = pd.read_parquet(out)
    assert frame["path"].tolist() == list(map(str, paths))
    assert frame["label"].notna().all()
    assert (out / "_SUCCESS").exists()


def manifest_row(path: Path) -> dict[str, object]:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "path": str(path), "label": LABELS[0], "finding": LABELS[0],
        "finding_text": None, "source": "made-up", "origin": None, "patient": None, "view": None,
        "sex": None, "age": None, "sha256": sha256, "dhash": "0" * 64, "group": sha256[:16],
        "synthetic": True,
    }  # fmt: skip
