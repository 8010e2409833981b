"""One small phantom set, one run and one bundle, shared by these tests."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from cxr_training.backbones import Backbone, create_backbone
from cxr_training.data import build_manifest, generate_phantoms
from cxr_training.export import ExportReport, export
from cxr_training.recipes import GuardSettings, Recipe, load_recipe
from cxr_training.runs import Run, load_run
from cxr_training.train import train


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    return generate_phantoms(
        folder, patients_per_class=7, seed=3, images_per_patient=(1, 1), size_range=(96, 128)
    )


@pytest.fixture(scope="session")
def frame(phantoms: Path) -> pd.DataFrame:
    return build_manifest([phantoms], progress=False).frame


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return create_backbone("efficientnet-lite0", "none")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def train_again(cache: Path) -> Callable[..., Run]:
    """`train` with the settings of `run_folder`."""
    return partial(
        train,
        # Guards of a few images: each more costs seven passes.
        recipe=load_recipe("lite0-frozen").model_copy(update={"guards": GuardSettings(images=8)}),
        seed=1,
        weights="none",
        name="phantom",
        version="2.1",
        cache=cache,
    )


@pytest.fixture(scope="session")
def run_folder(
    frame: pd.DataFrame, train_again: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("work") / "run"
    train_again(frame, folder)
    return folder


@pytest.fixture(scope="session")
def run(run_folder: Path) -> Run:
    return load_run(run_folder)


@pytest.fixture(scope="session")
def report(run_folder: Path) -> ExportReport:
    return export(run_folder, run_folder.parent / "bundle")


@pytest.fixture(scope="session")
def bundle(run_folder: Path, report: ExportReport) -> Path:
    return run_folder.parent / "bundle"


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """A small one that trains in a second or two."""
    return Recipe.model_validate(
        {
            "name": "tiny",
            "description": "For tests.",
            "backbones": [{"name": "efficientnet-lite0", "pooling": "last"}],
            "weights": "none",
            "preprocessing": {"height": 32, "width": 32},
            "head": {"kind": "logistic", "c": [0.001, 0.1]},
            "guards": None,
        }
    )
