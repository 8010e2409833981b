from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from cxr_training.backbones import Backbone, PooledStages, backbone_names, create_backbone
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
