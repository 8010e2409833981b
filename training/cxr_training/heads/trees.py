"""Trees: scikit-learn fits them, ONNX keeps them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import AdaBoostClassifier, RandomForestClassifier
from sklearn.tree import DecisionTreeClassifier

from cxr_training.errors import TrainingError
from cxr_training.head_settings import ForestSettings
from cxr_training.heads.base import Features, Float64Array, Labels
from cxr_training.heads.fitted import TreeHead
from cxr_training.heads.graph import (
    FEATURES,
    IR_VERSION,
    ML_OPSET,
    OPSET,
    PROBABILITIES,
)


@dataclass(frozen=True)
class Trees:
    """Fitted trees of scikit-learn.

    Attributes:
        model: the classifier, on float32 features.
    """

    model: Any

    def predict_proba(self, features: Features) -> Float64Array:
        """Class probabilities `[images, classes]`, classes in alphabetical order."""
        return np.asarray(self.model.predict_proba(np.asarray(features, dtype=np.float32)))

    def converted(self) -> TreeHead:
        """The same as an ONNX model; comparisons are made in float32 in both."""
        count = self.model.n_features_in_
        model = to_onnx(
            self.model,
            initial_types=[(FEATURES, FloatTensorType([None, count]))],
            options={id(self.model): {"zipmap": False}},
            target_opset={"": OPSET, "ai.onnx.ml": 3},
        )
        # The converter names a domain twice.
        del model.opset_import[:]
        model.opset_import.extend(
            [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
        )
        model.ir_version = IR_VERSION
        assert PROBABILITIES in {value.name for value in model.graph.output}  # noqa: S101
        return TreeHead(
            labels=tuple(str(name) for name in self.model.classes_),
            model=model.SerializeToString(deterministic=True),
        )


def fit_tree(
    features: Float64Array, labels: Labels, weights: Float64Array, *, seed: int
) -> Callable[[float], Trees]:
    """Decision trees, for a smallest number of images in a leaf."""
    inputs = features.astype(np.float32)

    def tree(leaf: float) -> Trees:
        model = DecisionTreeClassifier(min_samples_leaf=int(leaf), random_state=seed)
        return Trees(model.fit(inputs, labels, sample_weight=weights))

    return tree


def fit_forest(
    features: Float64Array,
    labels: Labels,
    weights: Float64Array,
    *,
    settings: ForestSettings,
    seed: int,
) -> Callable[[float], Trees]:
    """AdaBoost of random forests, for a largest depth of the trees."""
    inputs = features.astype(np.float32)

    def boosted(depth: float) -> Trees:
        forest = RandomForestClassifier(settings.trees, max_depth=int(depth))
        model = AdaBoostClassifier(forest, n_estimators=settings.boosts, random_state=seed)
        try:
            return Trees(model.fit(inputs, labels, sample_weight=weights))
        except ValueError as error:
            raise TrainingError(
                "A random forest is no better than chance on these features, so that it cannot be "
                "boosted."
            ) from error

    return boosted
