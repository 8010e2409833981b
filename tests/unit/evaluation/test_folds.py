from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from cxr_training.errors import TrainingError
from cxr_training.folds import (
    FoldSummary,
    compare_folds,
    prediction_table,
    read_folds,
    summarize_folds,
    write_folds,
)
from cxr_training.published import published_on

LABELS = ("COVID-19", "No finding")


def _frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": ["COVID-19", "No finding"] * 15 + ["COVID-19"] * 10,
            "source": ["both"] * 30 + ["covid"] * 10,
            "group": [f"g{number}" for number in range(40)],
        }
    )


def _predictions(wrong: int) -> npt.NDArray[np.float64]:
    truth = (_frame()["label"] == "COVID-19").to_numpy()
    truth[:wrong] = ~truth[:wrong]
    return np.where(truth[:, None], [0.9, 0.1], [0.2, 0.8])


def _summary(**changes: object) -> FoldSummary:
    arguments: dict[str, object] = {
        "seeds": (0, 1),
        "scheme": "grouped",
        "recipe": "test",
        "baseline": (_predictions(12), _predictions(12)),
    }
    folds = np.arange(40) % 4 // 2
    return summarize_folds(
        _frame(),
        (_predictions(4), _predictions(8)),
        LABELS,
        (folds, folds),
        **(arguments | changes),  # type: ignore[arg-type]
    )


def test_figures_are_averaged_over_seeds_and_spread_over_folds() -> None:
    summary = _summary()
    accuracy = summary.figures["accuracy"]
    assert accuracy.seeds == (0.9, 0.8)
    assert accuracy.pooled.value == pytest.approx(0.85)
    assert accuracy.pooled.low < 0.85 < accuracy.pooled.high
    by_fold = [fold.figures["accuracy"] for fold in summary.folds]
    assert accuracy.deviation == pytest.approx(np.std(by_fold, ddof=1))
    assert len(summary.folds) == 4
    assert summary.baseline is not None
    assert summary.baseline["accuracy"].pooled.value == pytest.approx(0.7)
    assert summary.metrics.split == "out-of-fold"
    assert summary.metrics.accuracy.value == pytest.approx(0.9)


def test_a_left_out_source_of_one_class_has_no_balanced_accuracy_of_its_own() -> None:
    source = _frame()["source"]
    summary = summarize_folds(
        _frame(),
        [_predictions(4)],
        LABELS,
        [source],
        seeds=[0],
        scheme="leave-one-source-out",
        recipe="test",
    )
    both, covid = summary.folds
    assert (both.fold, covid.fold) == ("both", "covid")
    assert "balanced_accuracy" in both.figures
    assert not {"balanced_accuracy", "macro_roc_auc", "positive_specificity"} & set(covid.figures)
    assert covid.figures["accuracy"] == 1
    # 23 of 25 with COVID-19 found, 13 of 15 without it left alone.
    pooled = summary.figures["positive_balanced_accuracy"].pooled
    assert pooled.value == pytest.approx((23 / 25 + 13 / 15) / 2)
    assert summary.figures["positive_sensitivity"].deviation is not None
    assert summary.figures["positive_specificity"].deviation is None


def test_without_the_positive_class_no_such_figures_are_made() -> None:
    summary = _summary(positive="Tuberculosis")
    assert summary.positive is None
    assert not [name for name in summary.figures if name.startswith("positive")]


def test_a_document_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "cv.json"
    assert read_folds(path) == ()
    summary = _summary()
    write_folds(path, [summary])
    assert read_folds(path) == (summary,)
    path.write_text('{"summaries": []}', encoding="utf-8")
    with pytest.raises(TrainingError, match="damaged"):
        read_folds(path)


def test_an_image_without_prediction_is_refused() -> None:
    missing = _predictions(4)
    missing[7] = np.nan
    with pytest.raises(TrainingError, match="no fold tests it"):
        _summary(baseline=(missing, missing))


@pytest.mark.parametrize("seeds", [(), (0,), (0, 1, 2)])
def test_seeds_without_predictions_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(TrainingError, match="Each seed"):
        _summary(seeds=seeds)


def test_published_figures_stand_beside_the_same_images_only() -> None:
    assert {figure.model for figure in published_on({"ozturk"})} == {"DarkCovidNet", "CoroNet"}
    assert published_on({"ozturk", "cohen"}) == ()
    assert published_on({"elsewhere"}) == ()


def test_a_left_out_source_of_one_class_is_compared_without_balanced_accuracy(
    tmp_path: Path,
) -> None:
    frame = _frame().assign(sha256=[f"{number:064x}" for number in range(40)])
    files = []
    for wrong in (4, 12):
        table = prediction_table(
            frame,
            [_predictions(wrong)],
            LABELS,
            [frame["source"]],
            seeds=[0],
            scheme="leave-one-source-out",
        )
        files.append(tmp_path / f"{wrong}.json")
        write_folds(files[-1], [_summary(scheme="leave-one-source-out")], table)
    found = compare_folds(*files)
    for figures in (found.first, found.second, found.difference):
        assert "balanced_accuracy" in figures[""]
        assert "balanced_accuracy" in figures["both"]
        assert "accuracy" in figures["covid"]
        assert "balanced_accuracy" not in figures["covid"]
