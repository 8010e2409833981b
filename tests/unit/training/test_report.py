import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_training.errors import TrainingError
from cxr_training.folds import FoldSummary, summarize_folds
from cxr_training.published import published_on
from cxr_training.report import ReportData, render, write_report
from cxr_training.report_cli import report
from cxr_training.runs import Run
from cxr_training.shortcuts import read_audit


@pytest.fixture(scope="module")
def reported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("reported") / "run"))
    for name in ("cv.json", "loso.json"):
        (folder / name).write_text("of an earlier run", encoding="utf-8")
        os.utime(folder / name, (0, 0))
    return folder


@pytest.fixture(scope="module")
def data(reported: Path, cache: Path) -> ReportData:
    return write_report(reported, reported / "report.html", cache=cache, examples=2)


@pytest.fixture(scope="module")
def page(reported: Path, data: ReportData) -> str:
    return (reported / "report.html").read_text(encoding="utf-8")


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                self.addresses.append(value or "")


def _summary(run: Run, scheme: str) -> FoldSummary:
    labels = run.record.labels
    truth = run.frame["label"].to_numpy()
    probabilities = np.where(np.asarray(labels)[None] == truth[:, None], 0.8, 0.1)
    folds = run.frame["source"] if scheme == "leave-one-source-out" else np.arange(len(truth)) % 2
    return summarize_folds(
        run.frame,
        [probabilities],
        labels,
        [folds],
        seeds=[0],
        scheme=scheme,  # type: ignore[arg-type]
        recipe="lite0-frozen",
        baseline=[np.full_like(probabilities, 1 / 3)],
    )


def test_the_page_needs_no_other_file_and_asks_no_host(page: str) -> None:
    tags = _Tags(page)
    assert all(address.startswith(("#", "data:image/")) for address in tags.addresses)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "@import" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_ids_are_unique_and_every_link_within_the_page_leads_somewhere(page: str) -> None:
    tags = _Tags(page)
    assert [name for name, count in Counter(tags.ids).items() if count > 1] == []
    inner = {address[1:] for address in tags.addresses if address.startswith("#")}
    assert inner <= set(tags.ids)


def test_every_figure_stands_beside_the_trivial_baseline(page: str, data: ReportData) -> None:
    accuracy, baseline = data.metrics.accuracy, data.baseline.accuracy
    row = re.search(r'<th scope="row">accuracy</th>(.*?)</tr>', page, re.DOTALL)
    assert row is not None
    assert f"{accuracy.value:.3f}" in row[1]
    assert f"{baseline.value:.3f}" in row[1]
    for words in (
        "Research use only",
        "Synthetic data",
        "What a split by image would leak",
        "Near-duplicate",
        "Shortcut audit",
        "sensitivity 95.0%",
        "has no cross-validation",
        "has no leave-one-source-out figures",
    ):
        assert words in page


def test_no_file_and_no_patient_is_named(page: str, run: Run) -> None:
    for column in ("path", "patient", "sha256"):
        for value in run.frame[column].dropna():
            assert str(value) not in page
            assert Path(str(value)).name not in page


def test_guards_are_shown_where_there_are_any(page: str, data: ReportData) -> None:
    assert "of the validation images pass all checks" in page
    without = render(replace(data, run=replace(data.run, guards=None)))
    assert "This run has none" in without


def test_images_are_shown_only_on_demand(page: str, data: ReportData) -> None:
    assert 0 < page.count("<img") <= 8
    assert page.count('alt="Heat map for') == len(data.examples)
    assert "With the hottest fifth of an image blurred" in page
    assert "<img" not in render(replace(data, examples=()))


def test_the_audit_is_kept_with_the_run(reported: Path, data: ReportData) -> None:
    assert data.audit is not None
    assert read_audit(reported / "shortcuts.json") == data.audit
    assert set(data.audit.views) == {"original", "blanked", "only_lungs"}
    original = data.audit.views["original"].accuracy
    assert original.value == pytest.approx(data.metrics.accuracy.value)


def test_folds_and_left_out_sources_are_shown(data: ReportData, run: Run) -> None:
    page = render(
        replace(
            data,
            folds=(_summary(run, "grouped"), _summary(run, "random")),
            sources_out=(_summary(run, "leave-one-source-out"),),
        )
    )
    assert "Grouped, lite0-frozen" in page
    assert "Random, lite0-frozen" in page
    assert "Each source left out in turn" in page
    assert "COVID-19 balanced accuracy" in page
    assert all(source in page for source in run.frame["source"].unique())


def test_a_split_is_by_patient_only_where_each_is_known(data: ReportData, run: Run) -> None:
    published = replace(data, folds=(_summary(run, "grouped"),), published=published_on({"ozturk"}))
    assert render(published).count("Split by patient") == 2
    summary = replace(data.summary, images_without_patient=1)
    page = render(replace(published, summary=summary))
    assert page.count("Split by group") == 2
    assert "Split by patient" not in page


def test_a_split_that_leaks_is_called_so(page: str, data: ReportData) -> None:
    assert "This split leaks" not in page
    assert "This split leaks:</strong> 3 groups" in render(replace(data, parted=3))


def test_text_of_the_users_cannot_become_markup(data: ReportData) -> None:
    page = render(replace(data, limitations=("<script>alert(1)</script>",)))
    assert "<script" not in page


def test_epochs_are_drawn_where_there_were_any(page: str, data: ReportData) -> None:
    epoch = {"training_loss": 1.0, "validation_loss": 0.9}
    drawn = render(replace(data, curves=({"epoch": 1, **epoch}, {"epoch": 2, **epoch})))
    assert "Loss by epoch" in drawn
    assert "Loss by epoch" not in page


def test_the_command_writes_the_page_and_prints_figures(reported: Path, cache: Path) -> None:
    out = reported / "again" / "page.html"
    result = CliRunner().invoke(
        report, [str(reported), "--out", str(out), "--cache", str(cache), "--no-audit", "--json"]
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["audit"] is None
    assert printed["baseline"]["accuracy"]["value"] <= 1
    text = out.read_text(encoding="utf-8")
    assert "No shortcut audit was made" in text
    assert "<img" not in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not a run folder"):
        write_report(tmp_path, tmp_path / "report.html")
    result = CliRunner().invoke(report, [str(tmp_path)])
    assert result.exit_code == 1
    assert "not a run folder" in result.output
