"""Answers and options between a worker and the process in front of it."""

import json

import numpy as np
import pytest

from cxr.answer import (
    Decision,
    Explanation,
    Options,
    Prediction,
    Quality,
    Stage,
    answer_from_json,
    answer_to_json,
    decide,
)
from cxr.errors import BadImageError, Rejection

LABELS = ("a", "b", "c")


def test_a_whole_answer_survives_the_way() -> None:
    heatmap = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    sent = Prediction(
        label="a",
        probabilities={"a": 0.9, "b": 0.1},
        positive=("a",),
        decisions={"a": Decision.POSITIVE, "b": Decision.UNCERTAIN},
        quality=Quality(reasons=(Rejection.EMPTY,), scores={"distance": 1.5}),
        explanation=Explanation(label="b", method="m", heatmap=heatmap, overlay=b"\x89PNG"),
        seconds={Stage.DECODE: 0.25},
    )
    got = answer_from_json(answer_to_json(sent))
    assert isinstance(got, Prediction)
    assert (got.label, got.probabilities, got.positive) == ("a", sent.probabilities, ("a",))
    assert (got.decisions, got.quality) == (sent.decisions, sent.quality)
    assert got.seconds == {Stage.DECODE: 0.25}
    assert got.explanation is not None
    np.testing.assert_array_equal(got.explanation.heatmap, heatmap)
    assert (got.explanation.label, got.explanation.overlay) == ("b", b"\x89PNG")


def test_steps_of_a_later_release_are_left_out() -> None:
    text = '{"label": "a", "probabilities": {"a": 1.0}, "positive": [], "seconds": {"dream": 1}}'
    got = answer_from_json(text)
    assert isinstance(got, Prediction)
    assert got.seconds == {}


def test_a_refusal_survives_the_way() -> None:
    got = answer_from_json(answer_to_json(BadImageError(Rejection.DAMAGED, "It is damaged.")))
    assert isinstance(got, BadImageError)
    assert (got.reason, str(got)) == (Rejection.DAMAGED, "It is damaged.")


def test_the_answer_of_an_older_archive_is_read() -> None:
    got = answer_from_json('{"label": "a", "probabilities": {"a": 1.0}, "positive": []}')
    assert got == Prediction(label="a", probabilities={"a": 1.0}, positive=())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", '{"code": 503, "type": "x", "message": "y"}', '{"reason": "unheard of"}'],
)
def test_what_is_no_answer_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        answer_from_json(text)


@pytest.mark.parametrize("explain", [True, False, "No finding", "Ödem \n"])
def test_options_fit_into_a_header(explain: bool | str) -> None:
    options = Options(explain=explain, quality=False)
    text = options.to_json()
    assert text.isascii()
    assert text.isprintable()
    assert Options.from_json(text) == options


def test_missing_options_have_their_defaults() -> None:
    assert Options.from_json("{}") == Options(explain=False, quality=True)
    with pytest.raises(ValueError, match="another type"):
        Options.from_json(json.dumps({"quality": "yes"}))


def test_decisions_at_the_thresholds_and_within_the_bands() -> None:
    thresholds = dict.fromkeys(LABELS, 0.3)
    sharp = decide((0.5, 0.3, 0.2), LABELS, thresholds)
    assert list(sharp.decisions.values()) == ["positive", "positive", "negative"]
    assert sharp.positive == ("a", "b")
    bands = {"a": (0.2, 0.5), "b": (0.25, 0.5), "c": (0.2, 0.35)}
    banded = decide((0.5, 0.3, 0.2), LABELS, thresholds, bands)
    assert list(banded.decisions.values()) == ["positive", "uncertain", "uncertain"]
    assert banded.positive == sharp.positive
