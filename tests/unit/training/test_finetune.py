import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_training.backbones import create_backbone
from cxr_training.data import assign_splits, write_manifest
from cxr_training.errors import TrainingError
from cxr_training.export import export
from cxr_training.finetune import layer_groups
from cxr_training.recipes import Recipe, load_recipe
from cxr_training.runs import load_run
from cxr_training.train import predict_proba, train

FINETUNE: dict[str, object] = {
    "epochs": 3,
    "batch_size": 4,
    "optimizer": "adam",
    "learning_rate": {"stem": 0, "early": 1e-4, "late": 1e-3, "head": 1e-2},
    "schedule": "cosine",
    "warmup": 0.1,
    "augmentation": "full",
    "checkpoint_steps": 2,
}

# Trains in a process of its own, which SIGKILL ends after so many checkpoints; 0 lets it finish.
DRIVER = """
import os, signal, sys
from pathlib import Path
import torch
from cxr_training import finetune
from cxr_training.recipes import load_recipe
from cxr_training.train import train

kills_after, manifest, recipe, out = int(sys.argv[1]), *map(Path, sys.argv[2:])
torch.set_num_threads(1)
write, written = finetune._Training.write, []

def write_and_die(self, file, key):
    write(self, file, key)
    written.append(file)
    if len(written) == kills_after:
        os.kill(os.getpid(), signal.SIGKILL)

finetune._Training.write = write_and_die
train(manifest, out, recipe=load_recipe(recipe), seed=1)
"""


def _recipe(**finetuning: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "description": "For tests.",
            "backbones": [{"name": "efficientnet-lite0", "pooling": "last"}],
            "weights": "none",
            "preprocessing": {"height": 32, "width": 32},
            "guards": None,
            "finetune": FINETUNE | finetuning,
        }
    )


@pytest.fixture(scope="module")
def few(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame.groupby("label").head(4)
    return rows.assign(split=assign_splits(rows, seed=0))


@pytest.fixture(scope="module")
def inputs(few: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("finetune")
    manifest, recipe = folder / "m.parquet", folder / "tiny.yaml"
    write_manifest(few, manifest)
    recipe.write_text(_recipe().model_dump_json(exclude_unset=True))
    return manifest, recipe


@pytest.fixture(scope="module")
def finished(inputs: tuple[Path, Path]) -> Path:
    return _trained(inputs, inputs[0].parent / "finished")


def _trained(inputs: tuple[Path, Path], out: Path) -> Path:
    manifest, recipe = inputs
    threads = torch.get_num_threads()
    # Sums over several threads may differ in their last bit.
    torch.set_num_threads(1)
    try:
        train(manifest, out, recipe=load_recipe(recipe), seed=1)
    finally:
        torch.set_num_threads(threads)
    return out


def test_a_killed_training_goes_on_to_the_same_numbers(
    inputs: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    # The third checkpoint is within the second epoch.
    command = [sys.executable, "-c", DRIVER, "3", *map(str, inputs), str(out)]
    assert subprocess.run(command, check=False, timeout=280).returncode == -signal.SIGKILL
    assert [file.name for file in out.iterdir()] == ["checkpoint.pt"]
    _trained(inputs, out)
    assert not (out / "checkpoint.pt").exists()
    for name in ("run.json", "metrics.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    again, once = (torch.load(folder / "backbone.pt") for folder in (out, finished))
    assert all(torch.equal(again[key], once[key]) for key in once)


def test_a_finetuned_run_is_measured_exported_and_served(
    finished: Path, few: pd.DataFrame, tmp_path: Path
) -> None:
    run = load_run(finished)
    assert len(run.record.history) == 3
    assert run.record.head.kind == "finetuned"
    assert run.record.head.log_loss == min(e.validation_loss for e in run.record.history)
    report = export(run, tmp_path / "bundle")
    assert "fine-tuned" in report.config.description
    expected = predict_proba(run, few)
    answers = Engine(tmp_path / "bundle").predict([Path(p).read_bytes() for p in few["path"]])
    for answer, row in zip(answers, expected, strict=True):
        assert isinstance(answer, Prediction)
        np.testing.assert_allclose(list(answer.probabilities.values()), row, atol=1e-4)


def test_a_rate_of_zero_and_frozen_statistics_leave_layers_as_they_are(finished: Path) -> None:
    spec = {"height": 32, "width": 32}
    start = create_backbone("efficientnet-lite0", "none", pooling="last", preprocessing=spec)
    trained = torch.load(finished / "backbone.pt")
    changed = {k for k, v in start.module.state_dict().items() if not torch.equal(v, trained[k])}
    assert changed
    assert not [key for key in changed if key.startswith("stem.")]
    assert not [key for key in changed if "running_" in key]


def test_two_processes_train_like_one(
    inputs: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(driver), "0", *map(str, inputs), str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"})
    together, alone = (
        json.loads((folder / "run.json").read_text())["history"] for folder in (out, finished)
    )
    assert len(together) == len(alone)
    for two, one in zip(together, alone, strict=True):
        assert two["training_loss"] == pytest.approx(one["training_loss"], abs=1e-3)
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], abs=1e-3)


def test_training_stops_when_the_validation_loss_no_longer_falls(
    few: pd.DataFrame, tmp_path: Path
) -> None:
    rates = {"stem": 0, "early": 0, "late": 0, "head": 1e-30}
    recipe = _recipe(epochs=9, patience=2, learning_rate=rates, augmentation=None)
    history = train(few, tmp_path / "run", recipe=recipe).record.history
    assert len(history) == 3


def test_the_head_may_start_from_the_frozen_features(few: pd.DataFrame, tmp_path: Path) -> None:
    recipe = _recipe(epochs=1, head="frozen", freeze_batch_norm=False)
    run = train(few, tmp_path / "run", recipe=recipe)
    assert len(run.record.history) == 1


def test_a_checkpoint_of_another_training_is_refused(few: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "run" / "checkpoint.pt"
    file.parent.mkdir()
    torch.save({"key": "other"}, file)
    with pytest.raises(TrainingError, match="of another recipe, seed or data"):
        train(few, file.parent, recipe=_recipe())
    # Each is another exception of PyTorch's; a crash of the machine may leave zeros.
    for content in (b"half", bytes(4096), bytes(100)):
        file.write_bytes(content)
        with pytest.raises(TrainingError, match="damaged"):
            train(few, file.parent, recipe=_recipe())


@pytest.mark.parametrize("pooling", ["blocks", "last"])
def test_the_groups_of_layers_hold_every_parameter_once(pooling: str) -> None:
    module = create_backbone(
        "efficientnet-lite0", "none", pooling=pooling, flip=True,  # type: ignore[arg-type]
        preprocessing={"height": 32, "width": 32},
    ).module  # fmt: skip
    grouped = [id(p) for group in layer_groups(module).values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())
