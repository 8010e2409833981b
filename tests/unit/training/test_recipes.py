from pathlib import Path

import pytest

from cxr_training.command import DEFAULT_RECIPE
from cxr_training.errors import TrainingError
from cxr_training.recipes import PRESETS, Recipe, adapted, load_recipe, recipe_names

SMALLEST = "name: mine\ndescription: Mine.\nbackbones: [{name: efficientnet-lite0}]\n"


def _written(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_valid_and_bears_its_files_name(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_default_recipe_is_frozen_and_needs_no_download() -> None:
    recipe = load_recipe(DEFAULT_RECIPE)
    assert recipe.finetune is None
    assert all(backbone.name.startswith("efficientnet-lite") for backbone in recipe.backbones)


@pytest.mark.parametrize(
    ("name", "network", "optimizer", "rate"),
    [
        ("paper-resnet50-sgd", "resnet50", "sgd", 1e-3),
        ("paper-resnet50-adam", "resnet50", "adam", 3e-5),
        ("paper-inceptionv3-adam", "inception_v3", "adam", 3e-5),
    ],
)
def test_the_papers_recipes_are_the_studys(
    name: str, network: str, optimizer: str, rate: float
) -> None:
    recipe = load_recipe(name)
    assert [backbone.name for backbone in recipe.backbones] == [network]
    assert recipe.finetune is not None
    assert (recipe.finetune.optimizer, recipe.finetune.learning_rate) == (optimizer, rate)
    assert recipe.finetune.batch_size == 20


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    text = (
        SMALLEST + "copies: {count: 2, augmentation: acquisition}\n"
        "head: {kind: average, members: [{kind: svm}, {kind: forest}]}\n"
        "balance: label-source\npreprocessing: {height: 256, width: 256}\n"
    )
    recipe = load_recipe(_written(tmp_path, text))
    assert recipe.copies is not None
    assert recipe.copies.augmentation == PRESETS["acquisition"]
    assert recipe.head.kind == "average"
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("colour: red\n", "colour"),
        ("head: {kind: magic}\n", "head"),
        ("head: {kind: svm, gamma: 2}\n", "gamma"),
        ("copies: {count: 2, augmentation: wild}\n", "no augmentation 'wild'"),
        ("copies: {count: 2, augmentation: {twist: 1}}\n", "twist"),
        ("copies: {count: 2, augmentation: {flip: 2}}\n", "probability"),
        ("remove: {copies: 3}\n", "needs copies"),
        ("finetune: {batch_size: 0}\n", "batch_size"),
        ("finetune: {}\nhead: {kind: svm}\n", "leave head out"),
        ("finetune: {}\ncopies: {count: 1, augmentation: full}\n", "copies are for frozen"),
        ("sizes: [320, 0]\n", "sizes.1"),
        ("sizes: [320]\npreprocessing: {height: 320}\n", "leave those out"),
        ("sizes: [320, 384]\nfinetune: {}\n", "sizes are for frozen"),
        ("backbones: []\n", "backbones"),
        ("head: [unclosed\n", "not valid YAML"),
    ],
)
def test_a_recipe_that_is_not_valid_is_refused_and_says_where(
    tmp_path: Path, lines: str, message: str
) -> None:
    text = SMALLEST if "backbones" not in lines else SMALLEST.rsplit("backbones", 1)[0]
    with pytest.raises(TrainingError, match=message):
        load_recipe(_written(tmp_path, text + lines))


def test_a_recipe_that_does_not_exist_is_answered_with_the_known_ones() -> None:
    with pytest.raises(TrainingError, match=DEFAULT_RECIPE):
        load_recipe("nowhere")


def test_network_and_weights_can_be_others_than_the_recipes() -> None:
    recipe = adapted(load_recipe(DEFAULT_RECIPE), backbone="resnet50", weights="none")
    assert [backbone.name for backbone in recipe.backbones] == ["resnet50"]
    assert recipe.weights == "none"


def test_one_state_dict_is_not_for_two_networks() -> None:
    two = load_recipe(DEFAULT_RECIPE).model_dump(exclude_unset=True)
    two["backbones"] = [{"name": "efficientnet-lite0"}, {"name": "efficientnet-lite1"}]
    with pytest.raises(TrainingError, match="several"):
        adapted(Recipe.model_validate(two), weights="weights.pt")


def test_no_preset_mirrors_the_chest() -> None:
    assert all(preset.flip == 0 for preset in PRESETS.values())
