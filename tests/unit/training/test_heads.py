import io

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from pydantic import TypeAdapter, ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_training.calibration import expected_calibration_error
from cxr_training.errors import TrainingError
from cxr_training.heads import (
    HEAD_KINDS,
    Head,
    HeadSettings,
    LinearHead,
    Selection,
    fit_head,
    head_from_state,
)
from cxr_training.heads.graph import FEATURES, IR_VERSION, ML_OPSET, OPSET, GraphBuilder

Data = tuple[npt.NDArray[np.float64], npt.NDArray[np.str_], npt.NDArray[np.str_]]


def _data(classes: int, images: int = 90, features: int = 120) -> Data:
    """Overlapping classes of unequal size, in features of very different scales."""
    random = np.random.default_rng(classes)
    labels = np.minimum(np.arange(images) % (classes + 1), classes - 1)
    centres = random.normal(size=(classes, features)) * 0.3
    scales = np.logspace(-3, 3, features)
    values = (centres[labels] + random.normal(size=(images, features))) * scales + 5
    groups = np.asarray([f"p{index // 2}" for index in range(images)])
    return values, np.asarray(["abcdef"[label] for label in labels]), groups


@pytest.mark.parametrize("classes", [2, 3])
def test_folding_keeps_the_standardised_regression(classes: int) -> None:
    features, labels, groups = _data(classes)
    head, chosen = fit_head(features, labels, groups, seed=0)
    assert isinstance(head, LinearHead)
    plain = make_pipeline(
        StandardScaler(),
        LogisticRegression(
            C=chosen.parameters["c"], class_weight="balanced", max_iter=5000, tol=1e-6
        ),
    ).fit(features, labels)
    assert head.labels == tuple(plain.classes_)
    np.testing.assert_allclose(
        head.predict_proba(features), plain.predict_proba(features), atol=1e-3
    )


def test_chooses_the_strength_of_lowest_loss_in_folds_of_whole_groups() -> None:
    features, labels, groups = _data(3)
    _, chosen = fit_head(features, labels, groups, seed=0)
    assert chosen.folds == 5
    assert chosen.log_loss == chosen.losses[chosen.parameters["c"]] == min(chosen.losses.values())


def test_copies_of_a_patient_do_not_pass_for_evidence() -> None:
    # Noise, each image five times over: only a split that parts the copies can look accurate.
    random = np.random.default_rng(0)
    features = np.repeat(random.normal(size=(30, 40)), 5, axis=0)
    labels = np.repeat(np.asarray(["a", "b"] * 15), 5)
    groups = np.repeat(np.asarray([f"p{index}" for index in range(30)]), 5)
    _, chosen = fit_head(features, labels, groups, seed=0)
    assert chosen.accuracy < 0.75


def test_the_same_seed_gives_the_same_head() -> None:
    first, second = (fit_head(*_data(3), seed=4)[0].state() for _ in range(2))
    np.testing.assert_array_equal(first["weight"], second["weight"])
    np.testing.assert_array_equal(first["bias"], second["bias"])


def test_one_class_is_not_enough() -> None:
    features, labels, groups = _data(2)
    with pytest.raises(TrainingError, match="at least two classes"):
        fit_head(features, np.full_like(labels, "a"), groups, seed=0)


def test_a_class_of_one_patient_is_not_enough() -> None:
    features, labels, groups = _data(2)
    groups[labels == "b"] = "p0"
    with pytest.raises(TrainingError, match="at least two groups"):
        fit_head(features, labels, groups, seed=0)


QUICK: dict[str, dict[str, object]] = {
    "logistic": {"kind": "logistic", "c": [1e-3, 1e-2]},
    "svm": {"kind": "svm", "c": [1e-4, 1e-3]},
    "rbf": {"kind": "rbf", "c": [1, 10]},
    "softmax": {"kind": "softmax", "epochs": [2, 8], "learning_rate": 1e-3},
    "tree": {"kind": "tree", "leaf": [5, 10]},
    "forest": {"kind": "forest", "boosts": 2, "trees": 10, "depth": 3},
    "average": {
        "kind": "average",
        "members": [{"kind": "logistic", "c": [1e-3]}, {"kind": "tree", "leaf": [5]}],
    },
}


def _settings(document: dict[str, object]) -> HeadSettings:
    return TypeAdapter(HeadSettings).validate_python(document)


def _fitted(kind: str, classes: int = 3) -> tuple[Head, Selection, Data]:
    data = _data(classes)
    return *fit_head(*data, settings=_settings(QUICK[kind]), seed=0), data


def _in_onnx_runtime(head: Head, features: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    builder = GraphBuilder()
    result = head.add_to(builder, FEATURES)
    sizes = {FEATURES: features.shape[1], result: len(head.labels)}
    given, made = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in sizes.items()
    )
    graph = onnx.helper.make_graph(builder.nodes, "head", [given], [made], builder.constants)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString())
    found = session.run([result], {FEATURES: features.astype(np.float32)})[0]
    return np.asarray(found)


@pytest.mark.parametrize(
    ("kind", "classes"),
    [*((kind, 3) for kind in HEAD_KINDS), ("logistic", 2), ("svm", 2), ("rbf", 2), ("forest", 2)],
)
def test_every_head_is_the_same_on_disk_and_in_onnx(kind: str, classes: int) -> None:
    head, _, (features, labels, _) = _fitted(kind, classes)
    expected = head.predict_proba(features)
    assert head.labels == tuple(np.unique(labels))
    np.testing.assert_allclose(expected.sum(axis=1), 1)
    np.testing.assert_allclose(_in_onnx_runtime(head, features), expected, atol=5e-4)
    file = io.BytesIO()
    np.savez(file, **head.state())
    file.seek(0)
    with np.load(file) as arrays:
        again = head_from_state(dict(arrays))
    np.testing.assert_array_equal(again.predict_proba(features), expected)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_head_learns_and_says_what_it_chose(kind: str) -> None:
    head, selection, (features, labels, _) = _fitted(kind)
    accuracy = (
        np.asarray(head.labels)[head.predict_proba(features).argmax(axis=1)] == labels
    ).mean()
    assert accuracy > 0.6
    assert selection.parameters
    assert selection.out_of_fold.shape == (len(labels), 3)
    np.testing.assert_allclose(selection.out_of_fold.sum(axis=1), 1)
    # Images that a head has not seen are harder than its own.
    assert selection.accuracy < accuracy


def test_a_support_vector_machine_gives_calibrated_probabilities() -> None:
    features, labels, groups = _data(2, images=600, features=20)
    head, selection = fit_head(
        features, labels, groups, settings=_settings(QUICK["svm"]), seed=0, weights=np.ones(600)
    )
    assert isinstance(head, LinearHead)
    assert expected_calibration_error(selection.out_of_fold, labels, head.labels) < 0.06


def test_an_average_is_the_mean_of_its_members() -> None:
    data = _data(3)
    members = [QUICK["logistic"], QUICK["forest"]]
    parts = [fit_head(*data, settings=_settings(member), seed=0)[0] for member in members]
    settings = _settings({"kind": "average", "members": members})
    head, _ = fit_head(*data, settings=settings, seed=0)
    np.testing.assert_allclose(
        head.predict_proba(data[0]),
        np.mean([part.predict_proba(data[0]) for part in parts], axis=0),
    )


def test_a_head_for_each_backbone_sees_its_features_only() -> None:
    features, labels, groups = _data(3)
    settings = _settings(QUICK["logistic"])
    head, _ = fit_head(features, labels, groups, settings=settings, seed=0, parts=(100, 20))
    halves = [
        fit_head(part, labels, groups, settings=settings, seed=0)[0].predict_proba(part)
        for part in (features[:, :100], features[:, 100:])
    ]
    np.testing.assert_allclose(head.predict_proba(features), np.mean(halves, axis=0))
    np.testing.assert_allclose(
        _in_onnx_runtime(head, features), head.predict_proba(features), atol=1e-4
    )


def test_weights_say_which_images_count() -> None:
    features, labels, groups = _data(2)
    few = np.where(labels == "b", 1e-3, 1.0)
    settings = _settings(QUICK["logistic"])
    plain, _ = fit_head(features, labels, groups, settings=settings, seed=0)
    tilted, _ = fit_head(features, labels, groups, settings=settings, seed=0, weights=few)
    assert tilted.predict_proba(features)[:, 0].mean() > plain.predict_proba(features)[:, 0].mean()


@pytest.mark.parametrize(
    "document",
    [{"kind": "magic"}, {"kind": "svm", "gamma": 1}, {"kind": "logistic", "c": []},
     {"kind": "average", "members": [{"kind": "tree"}]}],
)  # fmt: skip
def test_settings_that_are_not_valid_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        _settings(document)


@pytest.mark.parametrize("kind", ["logistic", "svm"])
def test_a_linear_head_does_not_see_what_tells_sources_apart(kind: str) -> None:
    features, labels, groups = _data(2)
    # Four fifths of one class come from one source, and four fifths of the other from the other.
    sources = np.where((labels == "a") ^ (np.arange(len(labels)) % 5 == 0), "x", "y")
    mark = np.zeros(features.shape[1])
    mark[:20] = features.std(axis=0)[:20] * 3
    features = features + np.where(sources == "x", 1, 0)[:, None] * mark
    settings = _settings(QUICK[kind])
    plain, _ = fit_head(features, labels, groups, settings=settings, seed=0)
    blind, _ = fit_head(features, labels, groups, settings=settings, seed=0, sources=sources)

    def change(head: Head) -> float:
        before, after = (head.predict_proba(x) for x in (features, features + mark))
        return float(np.abs(before - after).mean())

    assert change(blind) < change(plain) / 2


def test_a_linear_head_does_not_see_what_copies_differ_in() -> None:
    features, labels, groups = _data(2)
    blur = features.std(axis=0) * np.random.default_rng(1).normal(size=features.shape[1])
    strength = np.random.default_rng(2).uniform(0.5, 1, len(features))[:, None]
    copies = features + strength * blur
    both = np.concatenate([features, copies])
    head, selection = fit_head(
        both, labels, groups, settings=_settings(QUICK["logistic"]), seed=0, directions=1
    )
    np.testing.assert_allclose(head.predict_proba(copies), head.predict_proba(features), atol=1e-6)
    # Copies help to fit and are not tested on.
    assert len(selection.out_of_fold) == len(labels)


def test_nothing_is_taken_out_for_a_tree() -> None:
    features, labels, groups = _data(2)
    with pytest.raises(TrainingError, match="linear heads only"):
        fit_head(
            features, labels, groups, settings=_settings(QUICK["tree"]), seed=0, sources=groups
        )
