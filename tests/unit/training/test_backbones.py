from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torchvision.models import resnet50

from cxr_training.backbones import (
    Backbone,
    PooledStages,
    backbone_names,
    combine,
    create_backbone,
)
from cxr_training.errors import TrainingError

NAME = "efficientnet-lite0"


def test_pools_every_stage_to_its_means_then_its_deviations() -> None:
    pooling = PooledStages(nn.Identity(), [nn.Identity(), nn.MaxPool2d(2)])
    image = torch.rand(2, 3, 4, 4)
    once, twice = image.numpy(), nn.MaxPool2d(2)(image).numpy()
    expected = np.concatenate(
        [pool(x, axis=(2, 3)) for x in (once, twice) for pool in (np.mean, np.std)], axis=1
    )
    np.testing.assert_allclose(pooling(image).numpy(), expected, rtol=1e-5)


def test_gives_one_finite_vector_for_each_image(backbone: Backbone) -> None:
    images = torch.rand(2, *backbone.preprocessing.item_shape)
    with torch.inference_mode():
        features = backbone.module(images)
    assert features.shape == (2, backbone.feature_count)
    assert torch.isfinite(features).all()


def test_random_weights_are_always_the_same_and_leave_the_global_generator_alone(
    backbone: Backbone,
) -> None:
    torch.manual_seed(5)
    again = create_backbone(NAME, "none")
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn == torch.rand(1)
    assert again.fingerprint == backbone.fingerprint


def test_imagenet_weights_are_others_and_load_silently(
    backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = create_backbone(NAME)
    assert trained.fingerprint != backbone.fingerprint
    assert "ImageNet" in trained.weights
    assert capsys.readouterr().out == ""


def test_a_state_dict_replaces_the_weights_whatever_its_classifier(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    network = EfficientNet.from_name(NAME, image_size=320, num_classes=7)
    torch.save(network.state_dict(), file)
    loaded = create_backbone(NAME, str(file))
    stem = loaded.module.get_parameter("stem.0.weight")
    assert torch.equal(stem, network.state_dict()["_conv_stem.weight"])
    assert str(tmp_path) not in loaded.weights


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(TrainingError, match=backbone_names()[0]):
        create_backbone("resnet9000")


def test_weights_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nothing\.pt: No such file"):
        create_backbone(NAME, str(tmp_path / "nothing.pt"))


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    with pytest.raises(TrainingError, match="not a state dict"):
        create_backbone(NAME, str(file))


@pytest.mark.parametrize("state", [{"other": torch.zeros(1)}, [1, 2], {}])
def test_weights_of_another_network_are_refused(tmp_path: Path, state: object) -> None:
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    with pytest.raises(TrainingError, match="not a state dict"):
        create_backbone(NAME, str(file))


SMALL = {"height": 64, "width": 64}


def _features(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return backbone.module(images)


def test_the_default_gives_the_features_that_it_always_gave(backbone: Backbone) -> None:
    # Runs and caches of earlier releases name this value.
    assert backbone.fingerprint.startswith("9276ba79c3fb7a86")


def test_each_network_has_its_own_input(backbone: Backbone) -> None:
    lite = backbone.preprocessing
    resnet = create_backbone("resnet50", "none").preprocessing
    assert (lite.height, lite.color) == (320, "grayscale")
    assert (resnet.height, resnet.color, resnet.mean) == (224, "rgb", (0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("name", "counts"),
    [("efficientnet-lite2", (4912, 1280)), ("resnet50", (7680, 2048))],
)
def test_pools_all_blocks_or_the_last_layer(name: str, counts: tuple[int, int]) -> None:
    poolings = [
        create_backbone(name, "none", pooling=pooling, preprocessing=SMALL)
        for pooling in ("blocks", "last")
    ]
    assert tuple(backbone.feature_count for backbone in poolings) == counts
    assert poolings[0].fingerprint != poolings[1].fingerprint


def test_an_image_and_its_mirror_image_have_the_same_averaged_features() -> None:
    plain = create_backbone(NAME, "none", preprocessing=SMALL)
    averaged = create_backbone(NAME, "none", preprocessing=SMALL, flip=True)
    image = torch.rand(1, 3, 64, 64)
    both = _features(averaged, torch.cat([image, image.flip(3)]))
    torch.testing.assert_close(both[0], both[1])
    expected = (_features(plain, image) + _features(plain, image.flip(3)))[0] / 2
    torch.testing.assert_close(both[0], expected)
    assert averaged.fingerprint != plain.fingerprint


def test_combined_backbones_each_see_the_input_that_they_want() -> None:
    spec = SMALL | {"color": "grayscale"}
    members = [
        create_backbone(name, "none", pooling="last", preprocessing=spec)
        for name in ("resnet50", NAME)
    ]
    combined = combine(members)
    pixels = torch.rand(2, 3, 64, 64)
    shape = (1, 3, 1, 1)
    inputs = [
        (pixels - torch.tensor(b.preprocessing.mean).reshape(shape))
        / torch.tensor(b.preprocessing.std).reshape(shape)
        for b in members
    ]
    expected = [_features(b, x.float()) for b, x in zip(members, inputs, strict=True)]
    torch.testing.assert_close(_features(combined, inputs[0].float()), torch.cat(expected, dim=1))
    assert combined.preprocessing == members[0].preprocessing


def test_backbones_of_different_input_are_not_combined(backbone: Backbone) -> None:
    with pytest.raises(TrainingError, match="want different input"):
        combine([create_backbone(NAME, "none", preprocessing=SMALL), backbone])


@pytest.mark.parametrize("setting", [{"height": -1}, {"hight": 64}, {"resize": "squeeze"}])
def test_a_preprocessing_that_is_not_valid_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match="preprocessing"):
        create_backbone(NAME, "none", preprocessing=setting)


def test_an_image_too_small_for_inception_is_refused() -> None:
    with pytest.raises(TrainingError, match="at least 75 pixels"):
        create_backbone("inception_v3", "none", preprocessing=SMALL)


def test_imagenet_weights_that_cannot_be_downloaded_are_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(TrainingError, match=r"resnet50 cannot be downloaded .*; give --weights"):
        create_backbone("resnet50", "imagenet")


def test_a_torchvision_state_dict_is_checked_for_its_shapes(tmp_path: Path) -> None:
    file = tmp_path / "resnet.pt"
    state = _resnet_state()
    torch.save(state, file)
    loaded = create_backbone("resnet50", str(file), preprocessing=SMALL)
    assert torch.equal(loaded.module.get_parameter("stem.0.weight"), state["conv1.weight"])
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, file)
    with pytest.raises(TrainingError, match="not a state dict"):
        create_backbone("resnet50", str(file))


def _resnet_state() -> dict[str, torch.Tensor]:
    return resnet50(weights=None, num_classes=3).state_dict()
