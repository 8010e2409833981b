"""Linear heads, each one linear layer on features not standardised, and machines with a kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

from cxr_training.head_settings import SoftmaxSettings
from cxr_training.heads.base import Float64Array, Labels
from cxr_training.heads.fitted import KernelHead, LinearHead

_MAX_ITERATIONS = 5000
_RANK_TOLERANCE = 1e-10
_SHIFT_PENALTY = 1e-3
_MOMENTUM = 0.9


def moments(
    features: Float64Array, *, rounding: float, constant: float
) -> tuple[Float64Array, Float64Array]:
    """What features are standardised by.

    Args:
        features: float64 `[images, features]`.
        rounding: part of its mean below which a feature's deviation is rounding alone, which says
            nothing.
        constant: scale of such a feature.

    Returns:
        Mean and scale, float64 `[features]` each.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale <= rounding * np.abs(mean)] = constant
    scale[scale == 0] = constant
    return mean, scale


@dataclass(frozen=True)
class _Standardised:
    """Features with mean 0 and deviation 1 over the training images.

    Attributes:
        values: float64 `[images, features]`.
        mean: float64 `[features]`.
        scale: float64 `[features]`; 1 where a feature is constant.
    """

    values: Float64Array
    mean: Float64Array
    scale: Float64Array

    @classmethod
    def of(cls, features: Float64Array) -> "_Standardised":
        mean, scale = moments(features, rounding=1e-12, constant=1.0)
        return cls((features - mean) / scale, mean, scale)

    def head(self, labels: Labels, weight: Float64Array, bias: Float64Array) -> LinearHead:
        """Fold the standardisation into a linear layer on standardised features."""
        folded = weight / self.scale
        return LinearHead(tuple(str(name) for name in labels), folded, bias - folded @ self.mean)


def fit_logistic(
    features: Float64Array, labels: Labels, weights: Float64Array
) -> Callable[[float], LinearHead]:
    """Logistic regressions, for an inverse L2 strength.

    Args:
        features: `[images, features]`.
        labels: class name per image.
        weights: weight per image.
    """
    standardised = _Standardised.of(features)
    # An L2-penalised linear model has its weights in the span of the training images, so that
    # rotating onto that span changes nothing but the time: there are fewer images than features.
    rotation = _rotation(standardised.values)
    rotated = standardised.values @ rotation

    def fitted(c: float) -> LinearHead:
        model = LogisticRegression(C=c, max_iter=_MAX_ITERATIONS)
        model.fit(rotated, labels, sample_weight=weights)
        coefficients, intercept = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # noqa: PLR2004
            # scikit-learn keeps one row for two classes: the sigmoid's logit. Softmax wants two.
            coefficients = np.vstack([np.zeros_like(coefficients), coefficients])
            intercept = np.concatenate([np.zeros_like(intercept), intercept])
        return standardised.head(model.classes_, coefficients @ rotation.T, intercept)

    return fitted


def _rotation(standardised: Float64Array) -> Float64Array:
    """Orthonormal columns that span the rows: `[features, rank]`."""
    images, features = standardised.shape
    if images >= features:
        return np.eye(features)
    values, vectors = eigh(standardised @ standardised.T)
    kept = values > _RANK_TOLERANCE * values.max()
    return np.asarray(standardised.T @ (vectors[:, kept] / np.sqrt(values[kept])))


def fit_svm(
    features: Float64Array, labels: Labels, weights: Float64Array
) -> Callable[[float], LinearHead]:
    """Linear support vector machines, one class against the rest, for a cost of an error.

    The logits are distances from the separating planes; they are not yet calibrated.

    Args:
        features: `[images, features]`.
        labels: class name per image.
        weights: weight per image.
    """
    standardised = _Standardised.of(features)
    kernel = standardised.values @ standardised.values.T
    classes = np.unique(labels)

    def fitted(c: float) -> LinearHead:
        rows, offsets = [], []
        for name in classes:
            model = SVC(kernel="precomputed", C=c)
            model.fit(kernel, labels == name, sample_weight=weights)
            rows.append(model.dual_coef_[0] @ standardised.values[model.support_])
            offsets.append(model.intercept_[0])
        return standardised.head(classes, np.stack(rows), np.asarray(offsets))

    return fitted


def fit_rbf(
    features: Float64Array, labels: Labels, weights: Float64Array
) -> Callable[[float], KernelHead]:
    """Support vector machines with a Gaussian kernel, one class against the rest, for a cost.

    The logits are the machines' decision values; they are not yet calibrated.

    Args:
        features: `[images, features]`.
        labels: class name per image.
        weights: weight per image.
    """
    standardised = _Standardised.of(features)
    root = np.sqrt(features.shape[1])
    vectors = standardised.values / root
    kernel = rbf_kernel(vectors, gamma=1.0)
    classes = np.unique(labels)

    def fitted(c: float) -> KernelHead:
        weight, bias = np.zeros((len(classes), len(vectors))), np.zeros(len(classes))
        for row, name in enumerate(classes):
            model = SVC(kernel="precomputed", C=c)
            model.fit(kernel, labels == name, sample_weight=weights)
            weight[row, model.support_] = model.dual_coef_[0]
            bias[row] = model.intercept_[0]
        used = weight.any(axis=0)
        return KernelHead(
            tuple(str(name) for name in classes),
            standardised.mean,
            standardised.scale * root,
            vectors[used],
            weight[:, used],
            bias,
        )

    return fitted


def fit_scale_and_shift(
    logits: Float64Array, labels: Labels, weights: Float64Array
) -> tuple[float, Float64Array]:
    """One factor of all logits and a shift for each class that minimise the log loss.

    Args:
        logits: `[images, classes]`, of images that the model was not fitted on.
        labels: class name per image; every class occurs.
        weights: weight per image.
    """
    _, truth = np.unique(labels, return_inverse=True)
    share = weights / weights.sum()
    images, classes = np.arange(len(truth)), logits.shape[1]

    def loss(parameters: Float64Array) -> float:
        scale, shift = np.exp(parameters[0]), parameters[1:]
        found = log_softmax(scale * logits + shift, axis=1)[images, truth]
        return float(-(share * found).sum() + _SHIFT_PENALTY * (shift**2).sum())

    best = minimize(loss, np.zeros(1 + classes), method="L-BFGS-B").x
    return float(np.exp(best[0])), np.asarray(best[1:])


def fit_softmax(
    features: Float64Array,
    labels: Labels,
    weights: Float64Array,
    *,
    settings: SoftmaxSettings,
    seed: int,
) -> Callable[[float], LinearHead]:
    """Linear layers trained by gradient descent on the cross-entropy, for a number of epochs.

    Args:
        features: `[images, features]`.
        labels: class name per image.
        weights: weight per image.
        settings: step size and the like.
        seed: of the order of the images.
    """
    standardised = _Standardised.of(features)
    classes, truth = np.unique(labels, return_inverse=True)
    inputs = torch.from_numpy(standardised.values).float()
    targets, share = torch.from_numpy(truth), torch.from_numpy(weights).float()

    def fitted(epochs: float) -> LinearHead:
        layer = torch.nn.Linear(inputs.shape[1], len(classes))
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        rate, decay = settings.learning_rate, settings.weight_decay
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                layer.parameters(), lr=rate, momentum=_MOMENTUM, weight_decay=decay
            )
        else:
            optimizer = torch.optim.Adam(layer.parameters(), lr=rate, weight_decay=decay)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(int(epochs)):
            order = torch.randperm(len(inputs), generator=generator)
            for rows in torch.split(order, settings.batch_size):
                losses = torch.nn.functional.cross_entropy(
                    layer(inputs[rows]), targets[rows], reduction="none"
                )
                optimizer.zero_grad()
                (losses * share[rows]).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
        return standardised.head(classes, weight, bias)

    return fitted
