"""Recipes: what to train and how, as YAML files that are checked before anything runs.

The files beside this module are those that `cxr recipes` lists.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cxr_training.augment import Augmentation
from cxr_training.errors import TrainingError
from cxr_training.head_settings import HeadSettings, LogisticSettings

Balance = Literal["none", "class", "label-source"]
Rate = Annotated[float, Field(ge=0)]

# What an image can meet on its way: a patient who lies a little askew, and another machine,
# exposure and file. A mirrored radiograph shows a heart on the wrong side, which no hospital sends;
# so no preset mirrors.
_GEOMETRY = Augmentation(rotation=5.0, shift=0.04, scale=0.08)
_ACQUISITION = Augmentation(
    contrast=0.2, gamma=0.4, blur=0.003, resolution=0.5, noise=5.0, quality=50, probability=0.7
)
PRESETS = {
    "geometry": _GEOMETRY,
    "acquisition": _ACQUISITION,
    "full": replace(
        _ACQUISITION,
        rotation=_GEOMETRY.rotation,
        shift=_GEOMETRY.shift,
        scale=_GEOMETRY.scale,
    ),
}

_NAME = re.compile(r"[a-z0-9-]+")


def _augmentation(value: object) -> object:
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"there is no augmentation {value!r}; known: {', '.join(PRESETS)}")
        return PRESETS[value]
    if isinstance(value, Mapping):
        try:
            return Augmentation(**value)
        except TypeError as error:  # a field that it does not have
            raise ValueError(str(error)) from error
    return value


# In a document: a preset's name, or the numbers themselves.
AugmentationChoice = Annotated[Augmentation, BeforeValidator(_augmentation)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneSettings(_Settings):
    """One network.

    Attributes:
        name: as :func:`cxr_training.backbones.create_backbone` knows it.
        pooling: `blocks`, mean and deviation of every stage's channels; `last`, the mean of the
            last layer's.
    """

    name: str
    pooling: Literal["blocks", "last"] = "blocks"


class Copies(_Settings):
    """Augmented copies of the training images, for a head on frozen features.

    Attributes:
        count: copies of each image, beside the image itself.
        augmentation: how they differ from it; a preset's name or its own numbers.
    """

    count: Annotated[int, Field(ge=1, le=50)]
    augmentation: AugmentationChoice


class Removal(_Settings):
    """What a linear head on frozen features must not see.

    Attributes:
        sources: differences between the means of the sources within a label.
        copies: number of the strongest differences between the images and their copies.
    """

    sources: bool = False
    copies: Annotated[int, Field(ge=0)] = 0


class GuardSettings(_Settings):
    """What tells later that an image is not one that the model can judge.

    Attributes:
        images: of the training split that the guards are fitted on, at most.
    """

    images: Annotated[int, Field(ge=1)] = 150


class LearningRates(_Settings):
    """Step size of each group of layers; 0 leaves it as it is.

    Attributes:
        stem: before the first stage.
        early: the first half of the stages.
        late: the other half, and what follows them.
        head: the linear layer.
    """

    stem: Rate
    early: Rate
    late: Rate
    head: Annotated[float, Field(gt=0)]


class Finetuning(_Settings):
    """Training of the network itself.

    Attributes:
        epochs: passes over the training split, at most.
        batch_size: images in one step, over all processes together.
        optimizer: `sgd`, `adam` or `adamw`.
        learning_rate: one step size for all layers, or one for each group.
        momentum: of `sgd`.
        weight_decay: strength of the L2 penalty.
        schedule: `constant`, or `cosine` from the step size to 0.
        warmup: share of all steps over which the step size grows from 0.
        freeze_batch_norm: keep the means and deviations of the normalisation layers, as they come
            with the weights.
        augmentation: random changes of each training image; a preset's name or its own numbers.
        patience: epochs without a lower validation loss until training stops.
        head: `zero`, or `frozen`: start from a logistic regression on the frozen features.
        precision: `auto` is bfloat16 or float16 where there is a GPU, `float32` elsewhere.
        checkpoint_steps: steps between two checkpoints within an epoch.
    """

    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 20
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Rate | LearningRates = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Rate = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    freeze_batch_norm: bool = True
    augmentation: AugmentationChoice | None = None
    patience: Annotated[int, Field(ge=1)] = 5
    head: Literal["zero", "frozen"] = "zero"
    precision: Literal["auto", "float32"] = "auto"
    checkpoint_steps: Annotated[int, Field(ge=1)] = 50


class Recipe(_Settings):
    """What to train and how.

    Attributes:
        name: the recipe's name.
        description: what it is for, in a sentence or two.
        backbones: networks, whose features are put side by side.
        weights: `imagenet`, `none`, or the path of a state dict (of one network).
        preprocessing: fields of :class:`cxr.preprocess.Preprocessing` that differ from the first
            network's own.
        sizes: pixels on a side of a square input, to choose from by the head's log loss in folds
            of the training images; empty leaves the size to `preprocessing`.
        flip: average the features of an image and its mirror image.
        copies: augmented copies of the training images, for frozen features.
        remove: what the head must not see.
        head: the head on the frozen features.
        head_per_backbone: fit a head on each network's features and average their probabilities,
            rather than one on all.
        balance: what counts equally in training: `none`, each image; `class`, each class;
            `label-source`, each class and, within it, each source.
        calibration: `temperature`, fitted on the validation split, or `none`.
        guards: how guards are fitted; `None` fits none.
        finetune: train the network; its head is then a linear layer and `head` plays no part.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    description: str
    backbones: Annotated[tuple[BackboneSettings, ...], Field(min_length=1)]
    weights: str = "imagenet"
    preprocessing: dict[str, Any] = {}
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    flip: bool = False
    copies: Copies | None = None
    remove: Removal = Removal()
    head: HeadSettings = LogisticSettings()
    head_per_backbone: bool = False
    balance: Balance = "class"
    calibration: Literal["temperature", "none"] = "temperature"
    guards: GuardSettings | None = GuardSettings()
    finetune: Finetuning | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.backbones) > 1 and self.weights not in ("imagenet", "none"):
            raise ValueError("a state dict is for one network; this recipe has several")
        if self.finetune is not None and self.copies is not None:
            raise ValueError("copies are for frozen features; finetune.augmentation draws anew")
        if self.remove.copies and self.copies is None:
            raise ValueError("remove.copies needs copies")
        if self.sizes and not {"height", "width"}.isdisjoint(self.preprocessing):
            raise ValueError("sizes replace the height and width of preprocessing; leave those out")
        if self.finetune is not None and self.sizes:
            raise ValueError("sizes are for frozen features; a network is trained at one")
        if self.finetune is not None and self.remove != Removal():
            raise ValueError("remove is for frozen features; leave it out")
        if self.finetune is not None and self.head != LogisticSettings():
            raise ValueError("a fine-tuned network has a linear head; leave head out")
        return self


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, in alphabetical order."""
    files = (Path(entry.name) for entry in resources.files(__name__).iterdir())
    return tuple(sorted(file.stem for file in files if file.suffix == ".yaml"))


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        recipe: a name of :func:`recipe_names`, or the path of a YAML file.

    Raises:
        TrainingError: there is none, or it is not valid.
    """
    name = str(recipe)
    if _NAME.fullmatch(name) and name in recipe_names():
        text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(
                f"There is no recipe {name!r}, by name or as a file; known recipes: "
                f"{', '.join(recipe_names())}."
            ) from error
    try:
        return Recipe.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise TrainingError(f"The recipe {name} is not valid YAML.") from error
    except ValidationError as error:
        raise TrainingError(f"The recipe {name} is not valid: {first_error(error)}.") from error


def adapted(recipe: Recipe, *, backbone: str | None = None, weights: str | None = None) -> Recipe:
    """The recipe with another network, or with other weights.

    Args:
        recipe: the recipe.
        backbone: name of one network, in place of the recipe's.
        weights: `imagenet`, `none`, or the path of a state dict.

    Raises:
        TrainingError: the result is not valid.
    """
    changes: dict[str, object] = {}
    if weights is not None:
        changes["weights"] = weights
    if backbone is not None:
        changes["backbones"] = ({"name": backbone, "pooling": recipe.backbones[0].pooling},)
    try:
        return Recipe.model_validate(recipe.model_dump(exclude_unset=True) | changes)
    except ValidationError as error:
        raise TrainingError(f"The recipe is not valid so: {first_error(error)}.") from error


def candidates(recipe: Recipe) -> tuple[Recipe, ...]:
    """What a recipe leaves to choose from: one recipe for each of its sizes, or itself."""
    return tuple(
        recipe.model_copy(
            update={
                "preprocessing": recipe.preprocessing | {"height": size, "width": size},
                "sizes": (),
            }
        )
        for size in recipe.sizes
    ) or (recipe,)


def first_error(error: ValidationError) -> str:
    """The first thing that a validation found, in words."""
    first: Mapping[str, Any] = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
