from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_training.errors import TrainingError
from cxr_training.export import export
from cxr_training.recipes import Recipe
from cxr_training.runs import load_run
from cxr_training.tabular import tabular_inputs
from cxr_training.train import evaluate, train


def test_what_is_unknown_is_said_to_be_unknown() -> None:
    frame = pd.DataFrame(
        {"age": [60.0, None], "sex": ["F", None], "view": ["AP Supine", "elsewhere"]}
    )
    known, unknown = tabular_inputs(frame).tolist()
    assert known == pytest.approx([0.6, 0, 1, 0, 0, 0, 0, 1, 0])
    assert unknown == pytest.approx([0.5, 1, 0, 0, 1, 0, 0, 0, 1])


def test_tabular_inputs_are_measured_and_not_exported(
    frame: pd.DataFrame, recipe: Recipe, cache: Path, tmp_path: Path
) -> None:
    # Whoever is ill is X-rayed lying down: the view gives the class away.
    views = dict(zip(sorted(set(frame["label"])), ("PA", "AP", "AP Supine"), strict=True))
    telling = frame.assign(view=frame["label"].map(views), age=np.nan, sex=None)
    run = train(telling, tmp_path / "run", recipe=recipe, seed=1, tabular=True, cache=cache)
    ablation = run.record.ablation
    assert ablation is not None
    assert ablation.tabular == 1
    assert ablation.image <= ablation.image_and_tabular
    assert ablation.image_and_tabular == pytest.approx(run.metrics.accuracy.value)
    again = load_run(tmp_path / "run")
    assert evaluate(again, cache=cache).accuracy == run.metrics.accuracy
    with pytest.raises(TrainingError, match="cannot be exported"):
        export(again, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_tabular_inputs_do_not_go_with_fine_tuning(
    frame: pd.DataFrame, recipe: Recipe, tmp_path: Path
) -> None:
    tuned = Recipe.model_validate(
        recipe.model_dump(exclude_unset=True, exclude={"head"}) | {"finetune": {"epochs": 1}}
    )
    with pytest.raises(TrainingError, match="frozen features only"):
        train(frame, tmp_path / "run", recipe=tuned, tabular=True)
