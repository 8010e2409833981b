"""What guards say of an image, and what a policy makes of it."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr.answer import Options, Prediction, Quality
from cxr.engine import Engine
from cxr.errors import ModelLoadError, Rejection
from cxr.preprocess import Preprocessing
from cxr.quality import REASONS, pixel_scores, refusal
from support.bundles import GUARDS, LABELS, encoded_image, make_bundle

SPEC = Preprocessing(
    color="grayscale",
    resize="stretch",
    height=200,
    width=300,
    interpolation="bilinear",
    crop="none",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    layout="NCHW",
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(make_bundle(tmp_path_factory.mktemp("bundle"), guarded=True))


def quality(engine: Engine, image: bytes) -> Quality:
    (answer,) = engine.predict([image])
    assert isinstance(answer, Prediction)
    assert answer.quality is not None
    return answer.quality


def uniform(grey: int, size: tuple[int, int] = (128, 128)) -> bytes:
    buffer = BytesIO()
    Image.new("L", size, grey).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "reasons"),
    [
        (encoded_image(140), []),
        (encoded_image(225), ["not_radiograph"]),
        (uniform(240), ["not_radiograph", "out_of_distribution"]),
        (encoded_image(60), ["inverted"]),
        (encoded_image(15), ["inverted", "too_dark"]),
        (encoded_image(140, size=(300, 31)), ["too_small"]),
        (uniform(255), ["not_radiograph", "out_of_distribution", "clipped"]),
        (uniform(0), ["inverted", "too_dark", "clipped"]),
    ],
)
def test_reasons_are_scores_above_their_limits_worst_first(
    engine: Engine, image: bytes, reasons: list[str]
) -> None:
    found = quality(engine, image)
    assert list(found.reasons) == reasons
    limits = GUARDS["limits"]
    assert isinstance(limits, dict)
    assert {name for name, score in found.scores.items() if score > limits[name]} == set(reasons)
    assert set(found.scores) == {reason.value for reason in REASONS}


def test_scores_of_the_pixels() -> None:
    grey = np.full((400, 250), 100, np.uint8)
    grey[:100] = 255
    scores = pixel_scores(Image.fromarray(grey), SPEC)
    assert scores[Rejection.TOO_SMALL] == pytest.approx(200 / 250)
    assert scores[Rejection.TOO_DARK] == 0
    assert scores[Rejection.CLIPPED] == pytest.approx(0.25, abs=0.01)
    assert pixel_scores(Image.fromarray(grey // 10), SPEC)[Rejection.TOO_DARK] == pytest.approx(
        230 / 255
    )


def test_quality_is_left_out_where_it_is_not_wanted_or_not_known(
    engine: Engine, tmp_path: Path
) -> None:
    for model, options in ((engine, Options(quality=False)), (Engine(make_bundle(tmp_path)), None)):
        (answer,) = model.predict([encoded_image()], options and [options])
        assert isinstance(answer, Prediction)
        assert answer.quality is None


def test_a_refusal_names_all_reasons_and_has_the_worst() -> None:
    error = refusal((Rejection.NOT_RADIOGRAPH, Rejection.ROTATED))
    assert error.reason == Rejection.NOT_RADIOGRAPH
    assert "not look like a radiograph; it seems to lie on its side" in str(error)
    assert error.reason.http_status == 422


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_unprocessable(reason: Rejection) -> None:
    assert reason.http_status == 422


def test_a_graph_without_the_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="quality"):
        Engine(make_bundle(tmp_path, guards=GUARDS))


def test_bands_of_the_configuration_make_decisions_uncertain(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, uncertain=dict.fromkeys(LABELS, (0.0, 1.0)))
    (answer,) = Engine(bundle).predict([encoded_image()])
    assert isinstance(answer, Prediction)
    assert set(answer.decisions.values()) == {"uncertain"}
