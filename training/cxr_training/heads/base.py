"""What a head is, and what its fit leaves behind."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cxr_training.heads.graph import GraphBuilder

Float64Array = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating]
Labels = npt.NDArray[np.str_]
State = dict[str, npt.NDArray[np.generic]]


class Head(Protocol):
    """A fitted head.

    Attributes:
        labels: class names, in the order of the probabilities.
        smooth: whether a tiny change of the features always makes a tiny change of the
            probabilities; trees make steps.
    """

    @property
    def labels(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def smooth(self) -> bool: ...  # noqa: D102

    def predict_proba(self, features: Features) -> Float64Array:
        """Class probabilities.

        Args:
            features: `[images, features]`, not standardised.

        Returns:
            float64 `[images, classes]`, rows sum to 1.
        """
        ...

    def add_to(self, graph: GraphBuilder, features: str) -> str:
        """Write the head as nodes.

        Args:
            graph: what the nodes are added to.
            features: name of a float32 `[N, features]` value there.

        Returns:
            Name of the float32 `[N, classes]` value that holds the probabilities.
        """
        ...

    def margins(self, feature_count: int) -> tuple[Float64Array, Float64Array] | None:
        """Each class's margin as a linear layer on the features, if the head has one.

        The margin of a class is its logit less the mean of the other classes' logits; of several
        heads, the mean of their margins.

        Args:
            feature_count: length of one feature vector.

        Returns:
            Weight, float64 `[classes, features]`, and bias, float64 `[classes]`; `None` for trees.
        """
        ...

    def state(self) -> State:
        """Arrays that :func:`cxr_training.heads.head_from_state` makes the head from again."""
        ...


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How a head's free parameters were chosen, by cross-validation on the training images.

    Attributes:
        folds: number of folds; no group is in two of them.
        parameters: what was chosen, by name.
        log_loss: with the chosen parameters, the mean over the folds, images weighted as in the
            fit.
        accuracy: with the chosen parameters, the mean over the folds.
        out_of_fold: probabilities of each training image from a head that had not seen its group;
            float64 `[images, classes]`.
        losses: per value that was tried, its log loss; empty where nothing was chosen.
    """

    folds: int
    parameters: Mapping[str, float]
    log_loss: float
    accuracy: float
    out_of_fold: Float64Array
    losses: Mapping[float, float] = field(default_factory=dict)
