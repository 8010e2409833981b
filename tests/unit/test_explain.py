"""Heat maps, from the graph to the image that was sent."""

from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cxr.answer import Explanation, Options, Prediction
from cxr.engine import Engine
from cxr.errors import ModelLoadError
from support.bundles import EXPLANATION, LABELS, SIZE, config_document, graph_bytes, make_bundle

# The brighter, the more the last class: where it is bright is where the model sees it.
BRIGHT = LABELS[2]
GREY, WHITE = 100, 250


def picture(size: tuple[int, int], spot: tuple[int, int, int, int]) -> bytes:
    """A grey image with a white spot."""
    image = Image.new("L", size, GREY)
    image.paste(WHITE, spot)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def explained(engine: Engine, image: bytes, explain: bool | str = True) -> Explanation:
    (answer,) = engine.predict([image], [Options(explain=explain)])
    assert isinstance(answer, Prediction)
    assert answer.explanation is not None
    return answer.explanation


def preprocessing(**changes: object) -> dict[str, object]:
    own = config_document(graph_bytes())["preprocessing"]
    assert isinstance(own, dict)
    return own | changes


def centre(heatmap: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Where the hottest part of a map lies, as shares of the image's width and height."""
    amounts = np.maximum(heatmap - 0.5, 0)
    places = (np.arange(64) + 0.5) / 64
    total = amounts.sum()
    return float(amounts.sum(0) @ places / total), float(amounts.sum(1) @ places / total)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(make_bundle(tmp_path_factory.mktemp("bundle"), explained=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"margin": 0.1},
        {"region": "lungs"},
        {"resize": "longer_side"},
        {"resize": "shorter_side", "crop": "center"},
        {"resize": "shorter_side", "crop": "center", "resolution": 128},
        {"margin": 0.1, "region": "lungs", "intensity": "equalize"},
    ],
)
@pytest.mark.parametrize("size", [(400, 300), (300, 400)])
def test_a_bright_spot_is_hot_where_it_lies_in_the_image(
    tmp_path: Path, size: tuple[int, int], changes: dict[str, object]
) -> None:
    bundle = make_bundle(tmp_path, explained=True, preprocessing=preprocessing(**changes))
    spot = (170, 160, 200, 190)
    heatmap = explained(Engine(bundle), picture(size, spot), BRIGHT).heatmap
    assert heatmap.shape == (64, 64)
    assert heatmap.dtype == np.float32
    assert centre(heatmap) == pytest.approx((185 / size[0], 175 / size[1]), abs=0.03)


def test_what_the_model_does_not_see_is_nought(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, explained=True, preprocessing=preprocessing(margin=0.25))
    heatmap = explained(Engine(bundle), picture((200, 200), (90, 60, 110, 80)), BRIGHT).heatmap
    seen = heatmap != 0
    assert not seen[:16].any()
    assert not seen[48:].any()
    assert not seen[:, :16].any()
    assert seen[20:44, 20:44].all()
    assert float(heatmap.max()) == pytest.approx(1)


@pytest.mark.parametrize("size", [(900, 3), (3, 900), (70, 50), (40, 40)])
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.45])
def test_any_shape_and_any_view_has_a_map(
    tmp_path: Path, size: tuple[int, int], margin: float
) -> None:
    """However few pixels of the overlay the model saw."""
    bundle = make_bundle(tmp_path, explained=True, preprocessing=preprocessing(margin=margin))
    found = explained(Engine(bundle), picture(size, (0, 0, 2, 2)))
    assert np.abs(found.heatmap).max() <= 1
    with Image.open(BytesIO(found.overlay)) as overlay:
        assert max(overlay.size) <= 256


def test_the_class_is_the_predicted_or_the_named_one(engine: Engine) -> None:
    image = picture((100, 100), (10, 10, 30, 30))
    (answer,) = engine.predict([image])
    assert isinstance(answer, Prediction)
    assert answer.explanation is None
    assert explained(engine, image).label == answer.label
    bright, dark = (explained(engine, image, label) for label in (BRIGHT, LABELS[0]))
    assert (bright.label, dark.label) == (BRIGHT, LABELS[0])
    assert bright.heatmap[12, 12] > 0.5 > -0.5 > dark.heatmap[12, 12]


def test_the_overlay_is_a_png_of_the_image_with_the_hot_place_in_red(engine: Engine) -> None:
    found = explained(engine, picture((1024, 512), (100, 100, 300, 300)), BRIGHT)
    with Image.open(BytesIO(found.overlay)) as overlay:
        assert (overlay.format, overlay.mode, overlay.size) == ("PNG", "RGB", (256, 128))
        hot, cold = overlay.getpixel((50, 50)), overlay.getpixel((225, 100))
    assert isinstance(hot, tuple)
    assert isinstance(cold, tuple)
    assert hot[0] > hot[2] + 50
    assert cold[2] > cold[0]


def test_only_what_was_asked_for_is_explained(engine: Engine) -> None:
    image = picture((100, 100), (10, 10, 30, 30))
    options = [Options(), Options(explain=True), Options(), Options(explain=True)]
    answers = engine.predict([image, image, b"no image", b""], options)
    made = [isinstance(a, Prediction) and a.explanation is not None for a in answers]
    assert made == [False, True, False, False]
    assert isinstance(answers[0], Prediction)
    assert isinstance(answers[1], Prediction)
    assert answers[0].probabilities == pytest.approx(answers[1].probabilities)


def test_an_image_of_one_grey_value_has_an_even_map(engine: Engine) -> None:
    heatmap = explained(engine, picture((80, 80), (0, 0, 80, 80))).heatmap
    assert np.isfinite(heatmap).all()


def test_a_model_without_explanations_answers_all_the_same(tmp_path: Path) -> None:
    engine = Engine(make_bundle(tmp_path))
    (answer,) = engine.predict([picture((80, 80), (0, 0, 9, 9))], [Options(explain=True)])
    assert isinstance(answer, Prediction)
    assert answer.explanation is None


def test_a_graph_that_lacks_what_the_configuration_names_is_refused(tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "a", explanation=EXPLANATION)
    with pytest.raises(ModelLoadError, match="no optional input explain"):
        Engine(other)
    shape = [-1, len(LABELS), SIZE, SIZE // 2]
    wrong = EXPLANATION | {"output": EXPLANATION["output"] | {"shape": shape}}  # type: ignore[operator]
    with pytest.raises(ModelLoadError, match="evidence"):
        Engine(make_bundle(tmp_path / "b", explained=True, explanation=wrong))
