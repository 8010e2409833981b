import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cxr_training import cli, report_cli
from cxr_training.crossval import Validator, cross_validate, validate_by_source
from cxr_training.data import DataError, write_manifest
from cxr_training.errors import TrainingError
from cxr_training.folds import compare_folds, read_folds, write_folds
from cxr_training.head_settings import LogisticSettings
from cxr_training.model import fit_frozen, frozen_features
from cxr_training.recipes import Recipe, candidates
from cxr_training.runs import recipe_backbone


@pytest.fixture(scope="module")
def ozturk(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(source="ozturk")


def _two_sources(frame: pd.DataFrame) -> pd.DataFrame:
    number = frame.groupby("label").cumcount()
    return frame.assign(source=np.where(number % 2, "b", "a"), group=frame["sha256"])


def test_figures_by_patient_and_by_image_stand_beside_those_of_trivial_features(
    frame: pd.DataFrame, recipe: Recipe, cache: Path
) -> None:
    found = cross_validate(frame, recipe, folds=2, seeds=(0, 1), cache=cache)
    by_patient, by_image = found.summaries
    assert (by_patient.scheme, by_image.scheme) == ("grouped", "random")
    for summary in (by_patient, by_image):
        assert summary.images == len(frame)
        assert len(summary.figures["accuracy"].seeds) == 2
        assert len(summary.folds) == 4
        assert summary.baseline is not None
    accuracy = by_patient.figures["accuracy"]
    assert accuracy.pooled.value == pytest.approx(np.mean(accuracy.seeds))


def test_folds_by_patient_part_no_group(frame: pd.DataFrame, recipe: Recipe, cache: Path) -> None:
    grouped = Validator(frame, recipe, cache=cache).out_of_fold(3, seed=0, kind="grouped")
    assert pd.Series(grouped.fold).groupby(frame["group"].to_numpy()).nunique().max() == 1


def test_nothing_is_learnt_from_the_test_fold(
    frame: pd.DataFrame, recipe: Recipe, cache: Path
) -> None:
    validator = Validator(frame, recipe, cache=cache)
    test = np.arange(len(frame)) % 4 == 0
    expected = validator.predict(frame, ~test, test, seed=0)
    other = frame.copy()
    other.loc[test, "label"] = np.roll(other.loc[test, "label"], 1)
    np.testing.assert_array_equal(validator.predict(other, ~test, test, seed=0), expected)


def test_the_size_is_chosen_by_folds_of_the_training_images(
    frame: pd.DataFrame, recipe: Recipe, cache: Path
) -> None:
    sized = recipe.model_copy(update={"preprocessing": {}, "sizes": (16, 64)})
    test = np.arange(len(frame)) % 4 == 0
    losses, answers = [], []
    for one in candidates(sized):
        features = frozen_features(frame, recipe_backbone(one), one, cache)
        _, selection = fit_frozen(one, frame[~test], features.of(~test), seed=0)
        losses.append(selection.log_loss)
        answers.append(Validator(frame, one, cache=cache).predict(frame, ~test, test, seed=0))
    found = Validator(frame, sized, cache=cache).predict(frame, ~test, test, seed=0)
    chosen = int(np.argmin(losses))
    np.testing.assert_array_equal(found, answers[chosen])
    assert np.abs(found - answers[1 - chosen]).max() > 0


def test_each_source_is_tested_by_a_model_that_has_not_seen_it(
    frame: pd.DataFrame, recipe: Recipe, cache: Path
) -> None:
    (summary,) = validate_by_source(_two_sources(frame), recipe, cache=cache).summaries
    assert [fold.fold for fold in summary.folds] == ["a", "b"]
    assert sum(fold.images for fold in summary.folds) == len(frame)


def test_one_source_cannot_be_left_out(frame: pd.DataFrame, recipe: Recipe, cache: Path) -> None:
    with pytest.raises(DataError, match="at least two sources"):
        validate_by_source(frame.assign(source="a"), recipe, cache=cache)


def test_a_source_without_which_a_class_is_missing_is_named(
    frame: pd.DataFrame, recipe: Recipe, cache: Path
) -> None:
    first = frame["label"].iloc[0]
    sources = np.where(frame["label"] == first, "a", "b")
    with pytest.raises(TrainingError, match=r"Without the source b: .*at least two classes"):
        validate_by_source(frame.assign(source=sources), recipe, cache=cache)


def test_the_command_prints_and_writes_both_kinds_of_folds(
    ozturk: pd.DataFrame, recipe: Recipe, cache: Path, tmp_path: Path
) -> None:
    manifest, file, out = (tmp_path / name for name in ("m.parquet", "tiny.yaml", "out"))
    write_manifest(ozturk, manifest)
    file.write_text(recipe.model_dump_json())
    options = ["--manifest", str(manifest), "--recipe", str(file), "--cache", str(cache)]
    arguments = [*options, "--cv", "2", "--out", str(out)]
    result = CliRunner().invoke(cli.train, arguments)
    assert result.exit_code == 0, result.output
    for words in ("by patient", "by image", "trivial", "DarkCovidNet", "Synthetic data"):
        assert words in result.output
    grouped, random = read_folds(out / "cv.json")
    assert (grouped.scheme, random.scheme) == ("grouped", "random")


def test_the_command_leaves_sources_out_and_gives_the_figures_as_json(
    frame: pd.DataFrame, recipe: Recipe, cache: Path, tmp_path: Path
) -> None:
    manifest, file = tmp_path / "m.parquet", tmp_path / "tiny.yaml"
    write_manifest(_two_sources(frame), manifest)
    file.write_text(recipe.model_dump_json())
    options = ["--manifest", str(manifest), "--recipe", str(file), "--cache", str(cache)]
    result = CliRunner().invoke(cli.train, [*options, "--leave-one-source-out", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert [summary["scheme"] for summary in printed["summaries"]] == ["leave-one-source-out"]
    # Published figures stand beside their own images only.
    assert printed["published"] == []


def test_two_recipes_are_compared_on_the_predictions_that_the_command_wrote(
    frame: pd.DataFrame, recipe: Recipe, cache: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "m.parquet"
    write_manifest(_two_sources(frame), manifest)
    weak = recipe.model_copy(update={"head": LogisticSettings(c=(1e-9,))})
    files = []
    for name, one in (("strong", recipe), ("weak", weak)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(one.model_dump_json())
        options = ["--manifest", str(manifest), "--recipe", str(file), "--cache", str(cache)]
        arguments = [*options, "--leave-one-source-out", "--out", str(tmp_path / name)]
        result = CliRunner().invoke(cli.train, arguments)
        assert result.exit_code == 0, result.output
        files.append(str(tmp_path / name / "loso.json"))

    result = CliRunner().invoke(report_cli.compare, [*files, "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert set(printed["difference"]) == {"", "a", "b"}
    difference = printed["difference"][""]["log_loss"]
    assert difference["low"] < difference["value"] < difference["high"]
    both = [printed[side][""]["log_loss"]["value"] for side in ("first", "second")]
    assert difference["value"] == pytest.approx(both[0] - both[1])
    summary = read_folds(Path(files[0]))[0]
    assert both[0] == pytest.approx(summary.figures["log_loss"].pooled.value)

    swapped = CliRunner().invoke(report_cli.compare, [*reversed(files), "--json"])
    other = json.loads(swapped.stdout)["difference"][""]["log_loss"]
    assert other["low"] == pytest.approx(-difference["high"])
    itself = CliRunner().invoke(report_cli.compare, [files[0], files[0], "--json"])
    assert json.loads(itself.stdout)["difference"]["a"]["brier_score"] == {
        "value": 0,
        "low": 0,
        "high": 0,
    }

    table = CliRunner().invoke(report_cli.compare, files)
    assert "balanced accuracy" in table.output


def test_recipes_on_other_images_are_not_compared(
    frame: pd.DataFrame, recipe: Recipe, cache: Path, tmp_path: Path
) -> None:
    for name, rows in (("one", frame), ("two", frame.iloc[:-1])):
        found = validate_by_source(_two_sources(rows), recipe, cache=cache)
        (tmp_path / name).mkdir()
        write_folds(tmp_path / name / "loso.json", found.summaries, found.predictions)
    one, two = (tmp_path / name / "loso.json" for name in ("one", "two"))
    with pytest.raises(TrainingError, match="same data"):
        compare_folds(one, two)
    with pytest.raises(TrainingError, match="--leave-one-source-out"):
        compare_folds(one, tmp_path / "loso.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --out"),
        (["--cv", "2", "--leave-one-source-out"], "either --cv or"),
        (["--out", "run", "--seeds", "3"], "--seeds counts"),
        (["--leave-one-source-out", "--seeds", "3"], "--seeds counts"),
        (["--cv", "2", "--split", "random"], "--split cannot be combined with --cv"),
        (["--cv", "2", "--tabular"], "--tabular cannot be combined"),
        (["--cv", "2", "--name", "a", "--version", "2"], "--name and --version cannot be"),
        (["--leave-one-source-out", "--tabular"], "combined with --leave-one-source-out"),
    ],
)
def test_the_command_says_what_it_lacks(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.train, ["--data", str(tmp_path), *options])
    assert result.exit_code == 2
    assert message in result.output
