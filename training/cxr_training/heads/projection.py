"""Directions of the features that a head must not use, taken out before it is fitted.

What differs between sources among images of one label, or between an image and its augmented
copies, is acquisition and not disease. Taking those directions out is linear, so that a linear head
folds it into its weights.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import orth
from sklearn.utils.extmath import randomized_svd

from cxr_training.errors import TrainingError
from cxr_training.heads.base import Float64Array, Head, Labels
from cxr_training.heads.fitted import LinearHead

_FEWEST = 2  # images; one alone says nothing about its source


@dataclass(frozen=True)
class Projection:
    """Standardised features without some directions.

    Attributes:
        mean: float64 `[features]`.
        scale: float64 `[features]`, above 0.
        basis: float64 `[features, directions]`, orthonormal; what is taken out of the
            standardised features.
    """

    mean: Float64Array
    scale: Float64Array
    basis: Float64Array

    @classmethod
    def fitted(
        cls, features: Float64Array, labels: Labels, sources: Labels | None, directions: int
    ) -> "Projection":
        """Find the directions on training images.

        Args:
            features: `[(1 + copies) * images, features]`, images first.
            labels: class name per image.
            sources: source per image: differences between their means within a label are taken
                out; `None` keeps them.
            directions: how many of the strongest differences between images and their copies are
                taken out.

        Raises:
            TrainingError: directions are wanted of copies and there are none.
        """
        images = features[: len(labels)]
        mean, scale = images.mean(axis=0), images.std(axis=0)
        scale[scale == 0] = 1.0
        standardised = (features - mean) / scale
        plain, copies = standardised[: len(labels)], standardised[len(labels) :]
        rows = [np.zeros((1, features.shape[1]))]
        if sources is not None:
            rows += _source_differences(plain, labels, sources)
        if directions:
            if not len(copies):
                raise TrainingError("Without copies there is nothing that they differ in.")
            differences = copies - np.tile(plain, (len(copies) // len(plain), 1))
            rows.append(randomized_svd(differences, n_components=directions, random_state=0)[2])
        return cls(mean, scale, np.asarray(orth(np.concatenate(rows).T)))

    def applied(self, features: Float64Array) -> Float64Array:
        """Features without the directions: `[images, features]`."""
        amounts = ((features - self.mean) / self.scale) @ self.basis
        return np.asarray(features - (amounts @ self.basis.T) * self.scale)

    def folded(self, head: object) -> Head:
        """A head on the features as they are, from one on the features without the directions.

        Raises:
            TrainingError: the head is not linear.
        """
        if not isinstance(head, LinearHead):
            raise TrainingError("Directions can be taken out for linear heads only.")
        removed = ((head.weight * self.scale) @ self.basis) @ self.basis.T / self.scale
        return LinearHead(head.labels, head.weight - removed, head.bias + removed @ self.mean)


def _source_differences(
    features: Float64Array, labels: Labels, sources: Labels
) -> list[Float64Array]:
    """Distance of each source's mean from the mean of the sources, within each label."""
    rows = []
    for label in np.unique(labels):
        parts = [(labels == label) & (sources == source) for source in np.unique(sources)]
        means = [features[part].mean(axis=0) for part in parts if part.sum() >= _FEWEST]
        if len(means) > 1:
            rows.append(np.stack(means) - np.mean(means, axis=0))
    return rows
