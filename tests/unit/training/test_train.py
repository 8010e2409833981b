import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from cxr_training.data import DataError, assign_splits, write_manifest
from cxr_training.errors import TrainingError
from cxr_training.export import export
from cxr_training.head_settings import RbfSettings
from cxr_training.model import sample_weights
from cxr_training.recipes import Recipe, candidates
from cxr_training.runs import Run, load_run, save_run
from cxr_training.train import evaluate, predict_proba, train


def test_the_run_says_what_it_was_made_from(run: Run, frame: pd.DataFrame) -> None:
    data = run.record.training_data
    assert data.synthetic
    assert data.images == len(frame) == sum(data.splits.values())
    assert data.labels == frame["label"].value_counts().to_dict()
    assert run.record.settings.name == "phantom"
    assert {"python", "torch", "scikit-learn", "cxr-serve"} <= set(run.record.versions)


def test_no_group_stands_in_two_splits(run: Run) -> None:
    assert run.frame.groupby("group")["split"].nunique().max() == 1
    assert set(run.frame["split"]) == {"train", "validation", "test"}


def test_evaluation_finds_the_metrics_that_training_wrote(run: Run, cache: Path) -> None:
    assert evaluate(run, cache=cache).model_dump() == run.metrics.model_dump()
    assert run.metrics.images == len(run.rows("test"))


def test_other_splits_can_be_evaluated_under_their_name(run: Run, cache: Path) -> None:
    metrics = evaluate(run, split="train", cache=cache)
    assert metrics.split == "train"
    assert metrics.images == len(run.rows("train"))


def test_probabilities_sum_to_one(run: Run, frame: pd.DataFrame) -> None:
    probabilities = predict_proba(run, frame.head(3))
    assert probabilities.shape == (3, len(run.head.labels))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_the_same_seed_gives_the_same_run(
    run_folder: Path,
    frame: pd.DataFrame,
    tmp_path: Path,
    train_again: Callable[..., Run],
) -> None:
    shuffled = frame.sample(frac=1, random_state=0)
    file = tmp_path / "manifest.parquet"
    write_manifest(frame, file)
    train_again(file, tmp_path / "run")
    for name in ("run.json", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run_folder / name).read_bytes()
    again = train_again(shuffled, tmp_path / "other")
    assert again.record.training_data == load_run(run_folder).record.training_data


def test_the_run_has_the_size_that_its_training_images_chose(
    frame: pd.DataFrame, recipe: Recipe, cache: Path, tmp_path: Path
) -> None:
    rbf = RbfSettings(kind="rbf", c=(1.0, 10.0))
    sized = recipe.model_copy(update={"preprocessing": {}, "sizes": (16, 64), "head": rbf})
    run = train(frame, tmp_path / "run", recipe=sized, cache=cache)
    alone = {
        one.preprocessing["height"]: train(frame, tmp_path / "one", recipe=one, cache=cache)
        for one in candidates(sized)
    }
    best = min(alone, key=lambda size: alone[size].record.head.log_loss)
    assert run.record.head.parameters["size"] == best
    assert (run.record.preprocessing.height, run.record.preprocessing.width) == (best, best)
    # What is evaluated and exported later is made from the record.
    again = load_run(tmp_path / "run")
    assert evaluate(again, cache=cache) == evaluate(alone[best], cache=cache)
    report = export(tmp_path / "run", tmp_path / "bundle")
    assert report.max_difference <= 1e-4
    assert report.config.preprocessing.height == best
    assert f"size = {best}" in report.config.architecture.head


def test_nothing_is_learnt_from_the_test_split(
    run: Run, tmp_path: Path, train_again: Callable[..., Run]
) -> None:
    frame = run.frame.copy()
    test = frame["split"] == "test"
    frame.loc[test, "label"] = np.roll(frame.loc[test, "label"], 1)
    other = train_again(frame, tmp_path / "run")
    for name, array in run.head.state().items():
        np.testing.assert_array_equal(other.head.state()[name], array)
    assert other.thresholds == run.thresholds
    assert other.metrics != run.metrics


def test_splits_of_the_manifest_are_kept(
    frame: pd.DataFrame, recipe: Recipe, cache: Path, tmp_path: Path
) -> None:
    given = frame.assign(split=assign_splits(frame, seed=77))
    run = train(given, tmp_path / "run", recipe=recipe, seed=1, cache=cache)
    assert run.frame["split"].tolist() == given["split"].tolist()


def test_splits_that_part_a_patient_are_refused(run: Run, tmp_path: Path) -> None:
    frame = run.frame.copy()
    frame.loc[frame["split"].isin(["train", "test"]), "group"] = "one"
    with pytest.raises(TrainingError, match="part the group 'one'"):
        train(frame, tmp_path / "run", weights="none")


def test_a_class_that_a_split_lacks_is_named(run: Run, tmp_path: Path) -> None:
    frame = run.frame.copy()
    lost = frame["label"].iloc[0]
    frame.loc[(frame["split"] == "validation") & (frame["label"] == lost), "split"] = "train"
    with pytest.raises(TrainingError, match=f"validation split has no image of the class '{lost}'"):
        train(frame, tmp_path / "run", weights="none")


@pytest.mark.parametrize(
    ("setting", "value"), [("name", "Not A Name"), ("version", "one"), ("seed", -1)]
)
def test_a_setting_that_is_not_valid_is_named(
    frame: pd.DataFrame, tmp_path: Path, setting: str, value: object
) -> None:
    with pytest.raises(TrainingError, match=f"The {setting} .* is not valid"):
        train(frame, tmp_path / "run", **{"weights": "none", setting: value})  # type: ignore[arg-type]


def test_failed_training_leaves_nothing_behind(frame: pd.DataFrame, tmp_path: Path) -> None:
    broken = frame.assign(path=str(tmp_path / "gone.jpg"))
    with pytest.raises(TrainingError, match="gone"):
        train(broken, tmp_path / "run", weights="none")
    assert list(tmp_path.iterdir()) == []


def test_too_few_patients_are_refused(frame: pd.DataFrame, tmp_path: Path) -> None:
    few = frame.groupby("label").head(2)
    with pytest.raises(DataError):
        train(few, tmp_path / "run", weights="none")


def test_a_run_is_not_written_over_a_file(frame: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(TrainingError, match="is a file"):
        train(frame, file, weights="none")
    assert file.read_text() == "mine"


def test_weights_that_changed_since_training_are_refused(
    frame: pd.DataFrame, recipe: Recipe, tmp_path: Path
) -> None:
    frame = frame.groupby("label").head(4)
    file = tmp_path / "weights.pt"
    network = EfficientNet.from_name("efficientnet-lite0", image_size=320)
    torch.save(network.state_dict(), file)
    run = train(frame, tmp_path / "run", recipe=recipe, weights=str(file), seed=1)
    network.state_dict()["_conv_stem.weight"].zero_()
    torch.save(network.state_dict(), file)
    with pytest.raises(TrainingError, match="no longer the one"):
        predict_proba(run, frame.head(1))


def test_nothing_of_an_earlier_run_stays_in_its_folder(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    save_run(replace(run, trained={"weight": torch.zeros(1)}), folder)
    assert {"guards.npz", "backbone.pt"} <= {file.name for file in folder.iterdir()}
    save_run(replace(run, guards=None), folder)
    assert not {"guards.npz", "backbone.pt"} & {file.name for file in folder.iterdir()}
    assert load_run(folder).guards is None


def test_guards_are_ignored_where_the_recipe_has_none(run: Run, tmp_path: Path) -> None:
    recipe = run.record.settings.recipe.model_copy(update={"guards": None})
    settings = run.record.settings.model_copy(update={"recipe": recipe})
    bare = replace(run, record=run.record.model_copy(update={"settings": settings}))
    save_run(bare, tmp_path / "run")
    # As a retraining of before left it.
    assert (tmp_path / "run" / "guards.npz").is_file()
    assert load_run(tmp_path / "run").guards is None


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is not a run folder"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["head.npz", "metrics.json", "run.json"])
def test_a_damaged_run_is_refused(run_folder: Path, tmp_path: Path, name: str) -> None:
    for file in run_folder.iterdir():
        content = b"{}" if file.name == name else file.read_bytes()
        (tmp_path / file.name).write_bytes(content)
    with pytest.raises(TrainingError, match=f"{name} is missing or damaged"):
        load_run(tmp_path)


def test_the_record_holds_the_cross_validation(run_folder: Path) -> None:
    head = json.loads((run_folder / "run.json").read_text())["head"]
    assert 0 <= head["accuracy"] <= 1
    assert head["parameters"]["c"] > 0
    assert head["temperature"] > 0


def test_sources_of_one_class_tip_no_balance_between_the_classes() -> None:
    frame = pd.DataFrame(
        {"label": ["a"] * 12 + ["b"] * 4, "source": ["x"] * 10 + ["y"] * 2 + ["x"] * 4}
    )
    weights = pd.Series(sample_weights(frame, "label-source"))
    assert weights.mean() == pytest.approx(1)
    by_class = weights.groupby(frame["label"]).sum()
    assert by_class["a"] == pytest.approx(by_class["b"])
    by_source = weights[frame["label"] == "a"].groupby(frame["source"]).sum()
    assert by_source["x"] == pytest.approx(by_source["y"])
