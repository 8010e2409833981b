"""The study's recipes, from images to an answer of their archive."""

from http import HTTPStatus
from pathlib import Path

import pytest
import urllib3

from cxr_archive.packager import pack
from cxr_training.data import build_manifest, generate_phantoms
from cxr_training.export import export
from cxr_training.recipes import load_recipe
from cxr_training.train import train
from support.servers import serving


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_phantoms(
        tmp_path_factory.mktemp("phantoms"), patients_per_class=4, seed=3, images_per_patient=(1, 1)
    )


@pytest.mark.parametrize(
    "name", ["paper-resnet50-sgd", "paper-resnet50-adam", "paper-inceptionv3-adam"]
)
def test_the_archive_of_each_recipe_answers_a_request(
    phantoms: Path, tmp_path: Path, name: str
) -> None:
    recipe = load_recipe(name)
    assert recipe.finetune is not None
    short = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"epochs": 1})})
    frame = build_manifest([phantoms], progress=False).frame
    train(frame, tmp_path / "run", recipe=short, weights="none")
    bundle, archive = tmp_path / "bundle", tmp_path / "cxr.mar"
    assert name in export(tmp_path / "run", bundle).config.description
    pack(bundle, archive)
    with serving(archive, "--runtime", "inprocess", "--workers", "1") as server:
        answer = urllib3.request(
            "POST",
            f"{server.rest}/v1/models/cxr:predict",
            body=Path(frame["path"].iloc[0]).read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
        )
    assert answer.status == HTTPStatus.OK
    (prediction,) = answer.json()["predictions"]
    assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-4)
