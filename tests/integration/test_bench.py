"""The benchmark's short form: it runs and writes its page. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from cxr_archive.packager import pack
from support.bundles import encoded_image, make_bundle

BENCH = Path(__file__).parents[2] / "bench" / "bench.py"
SHORT = ("--concurrency", "1", "2", "--seconds", "0.3", "--warm-up", "0", "--rounds", "1")


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """A small archive, and a run folder with a few test images."""
    pack(make_bundle(tmp_path / "bundle"), tmp_path / "cxr.mar")
    run = tmp_path / "run"
    run.mkdir()
    paths = []
    for brightness in (40, 120, 200):
        paths.append(tmp_path / f"{brightness}.jpg")
        paths[-1].write_bytes(encoded_image(brightness, kind="JPEG"))
    frame = pd.DataFrame({"path": [str(path) for path in paths], "split": "test"})
    frame.to_parquet(run / "manifest.parquet")
    return ["--archive", str(tmp_path / "cxr.mar"), "--run", str(run), "--out", str(tmp_path / "o")]


def test_what_is_watched_costs_is_measured(inputs: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- measured: written by make bench-overhead -->\n<!-- end -->\nafter\n"
    )
    short = ("--seconds", "0.3", "--rounds", "2", "--page", str(page))
    done = subprocess.run(
        [sys.executable, str(BENCH.with_name("overhead.py")), *inputs, *short],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o" / "overhead.json").read_text())["rows"]
    assert len(rows) == 4
    assert rows[0]["throughput against nothing"] == "1.000 (1.000-1.000)"
    for row in rows:
        assert row["with"] in page.read_text()


def bench(*options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(BENCH), *SHORT, *options], capture_output=True, text=True, check=False
    )


def test_the_short_form_writes_table_and_plot(inputs: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: written by make bench -->\nold\n<!-- end -->\nafter\n")
    done = bench(*inputs, "--subjects", "inprocess", "--page", str(page))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o" / "benchmark.json").read_text())["rows"]
    limit, *ours = rows
    assert limit["name"] == "in-process limit"
    assert [(row["name"], row["concurrency"]) for row in ours] == [
        ("cxr serve, inprocess", 1),
        ("cxr serve, inprocess", 2),
    ]
    for row in ours:
        assert row["requests"] > 0
        assert row["failures"] == 0
        assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["start_s"] > 0
        assert row["memory_mb"] > 10
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for words in ("| in-process limit ", "| cxr serve, inprocess ", "ms on one core"):
        assert words in text
    assert (tmp_path / "benchmarks.svg").read_text().count("cxr serve, inprocess") == 1


def test_an_archive_that_cannot_be_served_ends_it(inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "cxr.mar").write_bytes((tmp_path / "cxr.mar").read_bytes()[:-100])
    done = bench(*inputs, "--subjects", "inprocess")
    assert done.returncode != 0
    assert not (tmp_path / "o" / "benchmark.json").exists()


def test_run_and_archive_belong_together(inputs: list[str]) -> None:
    done = bench(*inputs[2:], "--subjects", "inprocess")
    assert done.returncode == 2
    assert "give --run and --archive together, or neither" in done.stderr
