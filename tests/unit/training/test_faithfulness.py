"""Heat maps point at what the model looks at: the deletion test, on a model of phantoms."""

from pathlib import Path

import numpy as np
import pytest

from cxr.engine import Engine
from cxr_training.data import build_manifest, generate_phantoms
from cxr_training.errors import TrainingError
from cxr_training.export import export
from cxr_training.faithfulness import deletion_drops, hottest
from cxr_training.recipes import Recipe
from cxr_training.train import train
from support.bundles import encoded_image, make_bundle

SIDE = 160


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, list[bytes]]:
    """A model that knows phantoms, and images that it has not seen."""
    folder = tmp_path_factory.mktemp("faithfulness")
    size = (SIDE, SIDE + 32)
    generate_phantoms(
        folder / "phantoms",
        patients_per_class=16,
        seed=5,
        images_per_patient=(1, 1),
        size_range=size,
    )
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "description": "Small.",
            "backbones": [{"name": "efficientnet-lite0"}],
            "preprocessing": {"height": SIDE, "width": SIDE},
            "head": {"kind": "logistic", "c": [1e-3]},
        }
    )
    frame = build_manifest([folder / "phantoms"], progress=False).frame
    run = train(frame, folder / "run", recipe=recipe)
    export(run, folder / "bundle")
    images = [Path(path).read_bytes() for path in run.rows("test")["path"]]
    return Engine(folder / "bundle"), images


def test_hiding_the_hottest_fifth_costs_more_than_hiding_another(
    trained: tuple[Engine, list[bytes]],
) -> None:
    engine, images = trained
    drops = deletion_drops(engine, images, seed=0)
    assert len(drops) == len(images) >= 8
    hot, other = (np.mean([getattr(d, name) for d in drops]) for name in ("hottest", "elsewhere"))
    assert hot > 1.5 * max(other, 0)
    assert hot > 0.05


def test_the_hottest_fifth_is_of_what_the_model_sees() -> None:
    heatmap = np.zeros((64, 64), dtype=np.float32)
    heatmap[16:48, 16:48] = np.random.default_rng(0).normal(size=(32, 32))
    mask = hottest(heatmap)
    assert mask.sum() == pytest.approx(0.2 * 32 * 32, abs=1)
    assert heatmap[mask].min() > np.median(heatmap[16:48, 16:48])


def test_a_model_or_an_image_that_cannot_be_tested_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has no explanation"):
        deletion_drops(Engine(make_bundle(tmp_path / "a")), [encoded_image()], seed=0)
    with pytest.raises(TrainingError, match="cannot be used"):
        explained = make_bundle(tmp_path / "b", explained=True)
        deletion_drops(Engine(explained), [b"no image"], seed=0)
