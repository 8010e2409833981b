"""Every backbone with every head, from preprocessed image to probabilities in ONNX Runtime."""

import dataclasses

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from pydantic import TypeAdapter

from cxr_training.backbones import Backbone, Pooling, backbone_names, combine, create_backbone
from cxr_training.explanation import CELLS, GRID, covering
from cxr_training.export import build_graph
from cxr_training.heads import AverageHead, CalibratedHead, Head, HeadSettings, fit_head

HEADS: dict[str, dict[str, object]] = {
    "logistic": {"kind": "logistic", "c": [1e-3]},
    "svm": {"kind": "svm", "c": [1e-4]},
    "rbf": {"kind": "rbf", "c": [1.0]},
    "softmax": {"kind": "softmax", "epochs": [3]},
    "tree": {"kind": "tree", "leaf": [3]},
    "forest": {"kind": "forest", "boosts": 2, "trees": 5, "depth": 3},
}
SIZE = 80  # InceptionV3 takes no less than 75
Images = npt.NDArray[np.float32]
Features = npt.NDArray[np.floating]


def _images(backbone: Backbone) -> Images:
    noise = np.random.default_rng(0).normal(size=(12, *backbone.preprocessing.item_shape))
    return (noise * np.linspace(0.2, 2, 12).reshape(-1, 1, 1, 1)).astype(np.float32)


def _features(backbone: Backbone, images: Images) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(backbone.module(torch.from_numpy(images)).numpy())


def _heads(features: npt.NDArray[np.float32]) -> dict[str, Head]:
    labels = np.asarray(["a"] * 6 + ["b"] * 6)
    groups = np.asarray([f"p{number}" for number in range(12)])
    adapter: TypeAdapter[HeadSettings] = TypeAdapter(HeadSettings)
    return {
        kind: fit_head(
            features, labels, groups, settings=adapter.validate_python(document), seed=0
        )[0]
        for kind, document in HEADS.items()
    }


def _session(backbone: Backbone, head: Head) -> ort.InferenceSession:
    return ort.InferenceSession(build_graph(backbone, head).SerializeToString())


def _answers(
    session: ort.InferenceSession, images: Images, *, explain: bool = False
) -> list[npt.NDArray[np.float32]]:
    """Probabilities and evidence."""
    inputs = {"image": images} | ({"explain": np.asarray(True)} if explain else {})
    return list(session.run(["probabilities", "evidence"], inputs))


def _add_up(backbone: Backbone, head: Head, features: Features, evidence: Images) -> None:
    """The evidence of all places and the bias are the margin, for a head that has one."""
    margins = head.margins(backbone.feature_count)
    assert margins is not None
    weight, bias = margins
    expected = features @ weight.T + bias
    found = evidence.sum(axis=(2, 3), dtype=np.float64) + bias
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def _without(backbone: Backbone, image: Images, row: int, column: int) -> Features:
    """Features of one image, pooled without one of the cells that ablation leaves out."""
    with torch.inference_mode():
        maps = backbone.module.pooled(torch.from_numpy(image[None]))[1]
    features = np.zeros(backbone.feature_count)
    for values, pooling in maps:
        x = values[0].double().numpy()
        weight = np.outer(covering(x.shape[1], CELLS)[row], covering(x.shape[2], CELLS)[column])
        if pooling.mirrored:
            weight = weight[:, ::-1]
        left = 1 / weight.size - weight / CELLS**2
        left /= left.sum()
        mean = (x * left).sum(axis=(1, 2))
        features[pooling.means :][: len(x)] += pooling.share * mean
        if pooling.deviations is not None:
            variance = ((x - mean[:, None, None]) ** 2 * left).sum(axis=(1, 2))
            features[pooling.deviations :][: len(x)] += pooling.share * np.sqrt(variance)
    return features[None]


@pytest.mark.parametrize("name", backbone_names())
def test_every_backbone_answers_in_onnx_as_in_pytorch_with_all_heads(name: str) -> None:
    # With random weights, what reaches the last layer of EfficientNet-Lite is too small for trees.
    pooling: Pooling = "blocks" if name.startswith("efficientnet") else "last"
    spec = {"height": SIZE, "width": SIZE}
    backbone = create_backbone(name, "none", pooling=pooling, preprocessing=spec, flip=True)
    images = _images(backbone)
    features = _features(backbone, images)
    heads = _heads(features)
    # All heads in one graph: it is the backbone that takes the time.
    smooth = AverageHead(tuple(head for head in heads.values() if head.smooth))
    head = CalibratedHead(AverageHead((smooth, heads["tree"], heads["forest"])), 1.5)
    session = _session(backbone, head)
    answers, nothing = _answers(session, images)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers, head.predict_proba(features), atol=1e-4)
    assert nothing.shape[0] == 0
    explained, evidence = _answers(session, images[:1], explain=True)
    np.testing.assert_allclose(explained, answers[:1], atol=1e-6)
    assert evidence.shape == (1, 2, CELLS, CELLS)


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_answers_in_onnx_on_all_blocks(kind: str, small: Backbone) -> None:
    images = _images(small)
    features = _features(small, images)
    head = _heads(features)[kind]
    answers, evidence = _answers(_session(small, head), images, explain=True)
    np.testing.assert_allclose(answers, head.predict_proba(features), atol=1e-4)
    if kind in ("rbf", "tree", "forest"):
        assert evidence.shape == (12, 2, CELLS, CELLS)
    else:
        assert evidence.shape == (12, 2, GRID, GRID)
        _add_up(small, head, features, evidence)


def test_an_explanation_stores_no_array_of_the_head_again(small: Backbone) -> None:
    features = _features(small, _images(small))
    head = _heads(features)["rbf"]
    graph = build_graph(small, head).graph
    vectors = max(head.state().values(), key=lambda array: array.size)
    branches = [a.g for node in graph.node for a in node.attribute if a.name == "then_branch"]
    stored = [array for part in (graph, *branches) for array in part.initializer]
    assert branches
    assert sum(vectors.size == np.prod(array.dims) for array in stored) == 1


def test_ablation_is_the_probability_lost_without_a_place(small: Backbone) -> None:
    images = _images(small)[:2]
    linear = _heads(_features(small, _images(small)))["logistic"]
    # A head that is said to have no margin, but is smooth, so that rounding does not matter.
    head = _Nonlinear((linear, CalibratedHead(linear, 2.0)))
    backbone = create_backbone(
        "efficientnet-lite0", "none", preprocessing={"height": SIZE, "width": SIZE}, flip=True
    )
    answers, evidence = _answers(_session(backbone, head), images, explain=True)
    for row, column in ((0, 0), (2, 5), (6, 3)):
        without = head.predict_proba(_without(backbone, images[1], row, column))
        lost = answers[1] - without[0]
        np.testing.assert_allclose(evidence[1, :, row, column], lost, atol=1e-5)


class _Nonlinear(AverageHead):
    def margins(self, feature_count: int) -> None:  # noqa: ARG002
        return None


def test_several_backbones_become_one_graph(small: Backbone) -> None:
    own = dataclasses.asdict(small.preprocessing)
    spec = {name: own[name] for name in ("height", "width", "color")}
    other = create_backbone("resnet50", "none", pooling="last", preprocessing=spec)
    both = combine([small, other])
    images = _images(both)
    head = _heads(_features(both, images))["logistic"]
    features = _features(both, images)
    answers, evidence = _answers(_session(both, head), images, explain=True)
    np.testing.assert_allclose(answers, head.predict_proba(features), atol=1e-4)
    _add_up(both, head, features, evidence)


def test_equal_models_give_equal_graphs(small: Backbone) -> None:
    features = _features(small, _images(small))
    first, second = (
        build_graph(small, _heads(features)["forest"]).SerializeToString(deterministic=True)
        for _ in range(2)
    )
    assert first == second


@pytest.fixture(scope="module")
def small() -> Backbone:
    return create_backbone(
        "efficientnet-lite0", "none", preprocessing={"height": SIZE, "width": SIZE}
    )
