"""Fitting guards on a model's frozen features, and writing them as nodes of its graph.

Four detectors are logistic regressions on the features: radiographs against what is none, whole
chests against parts, upright against turned, and as they are against inverted. The distance is
Mahalanobis' under a normal distribution with a few free directions and one variance for all others
(probabilistic principal components; Tipping and Bishop, J. R. Stat. Soc. B 1999;61:611-622), of
features standardised and bounded, by the root of their number: near 1 for the training images.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from scipy.special import expit
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from cxr.decode import DEFAULT_LIMITS, decode
from cxr.errors import BadImageError, Rejection
from cxr.preprocess import Preprocessing, preprocess
from cxr.quality import REASONS, pixel_scores
from cxr_training.backbones import Backbone
from cxr_training.errors import TrainingError
from cxr_training.features import Network, feature_network
from cxr_training.guards import copies
from cxr_training.heads.base import Features, Float64Array, State
from cxr_training.heads.graph import GraphBuilder
from cxr_training.heads.linear import fit_logistic, moments

DETECTORS = (
    Rejection.NOT_RADIOGRAPH,
    Rejection.NOT_FRONTAL_CHEST,
    Rejection.ROTATED,
    Rejection.INVERTED,
)
SCORES = (*DETECTORS, Rejection.OUT_OF_DISTRIBUTION)
# Of the validation images, the share that each check passes.
PASS_RATE = 0.995
_DIRECTIONS = 32
_BOUND = 10.0
_ROUNDING = 1e-5
_STRENGTH = 1e-3
# The distance of another hospital's images is not known; what is known is stretched by this.
_ALLOWANCE = 1.1
# Whatever the validation images are like, this much is let pass: an even chance, less where other
# pictures are of more kinds than those that could be fitted on (`bench/guards.py`); half the
# input's side; a third of the range of grey values; four fifths of the picture.
_LEAST = {
    **dict.fromkeys(DETECTORS, 0.5),
    Rejection.NOT_RADIOGRAPH: 0.3,
    Rejection.TOO_SMALL: 2.0,
    Rejection.TOO_DARK: 0.67,
    Rejection.CLIPPED: 0.8,
}
_VALIDATION = 300
_FOLDS = 5

Change = Callable[[Image.Image, np.random.Generator], Image.Image]
_CHANGES: dict[str, Change] = {
    "plain": lambda image, _: image,
    "varied": copies.varied,
    "filmed": copies.filmed,
    "rotated": copies.rotated,
    "inverted": copies.inverted,
    "part": copies.part,
}
_GOOD = ("plain", "varied", "filmed")
_NONE = "none"
# What each detector is to find.
_FOUND = {
    Rejection.NOT_RADIOGRAPH: _NONE,
    Rejection.NOT_FRONTAL_CHEST: "part",
    Rejection.ROTATED: "rotated",
    Rejection.INVERTED: "inverted",
}


@dataclass(frozen=True, eq=False)
class Distance:
    """A distance from the training images, in the features.

    Attributes:
        mean: float64 `[features]`.
        scale: float64 `[features]`, above 0.
        basis: float64 `[features, directions]`, orthonormal.
        gain: float64 `[directions]`, how much more or less than the rest a direction counts.
        rest: variance of the standardised features in all other directions.
    """

    mean: Float64Array
    scale: Float64Array
    basis: Float64Array
    gain: Float64Array
    rest: float

    @classmethod
    def fitted(cls, features: Float64Array) -> "Distance":
        """Fit on features of good images, `[images, features]`."""
        mean, scale = moments(features, rounding=_ROUNDING, constant=np.inf)
        standardised = (features - mean) / scale
        images, count = standardised.shape
        directions = max(1, min(_DIRECTIONS, images // 4, count // 2))
        _, values, rows = randomized_svd(standardised, n_components=directions, random_state=0)
        variances = values**2 / images
        total = float((standardised**2).sum()) / images
        rest = max((total - float(variances.sum())) / (count - directions), 1e-6)
        return cls(mean, scale, rows.T, 1 / np.maximum(variances, rest) - 1 / rest, rest)

    def of(self, features: Features) -> Float64Array:
        """The distance of each image: float64 `[images]`."""
        bounded = np.clip((features - self.mean) / self.scale, -_BOUND, _BOUND)
        squares = ((bounded @ self.basis) ** 2) @ self.gain + (bounded**2).sum(axis=1) / self.rest
        return np.asarray(np.sqrt(np.maximum(squares, 0) / bounded.shape[1]))


@dataclass(frozen=True, eq=False)
class Guards:
    """Fitted guards.

    Attributes:
        weight: float64 `[detectors, features]`, of the detectors' logits.
        bias: float64 `[detectors]`.
        distance: from the training images.
        limits: by reason, the score above which it is one.
        passed: share of the validation images that pass all checks.
        detected: by reason, the share found among copies of validation images made for it.
    """

    weight: Float64Array
    bias: Float64Array
    distance: Distance
    limits: Mapping[str, float]
    passed: float
    detected: Mapping[str, float]

    def scores(self, features: Features) -> Float64Array:
        """The columns of :data:`SCORES`: float64 `[images, 5]`."""
        values = np.asarray(features, dtype=np.float64)
        detectors = expit(values @ self.weight.T + self.bias)
        return np.column_stack([detectors, self.distance.of(values)])

    def add_to(self, graph: GraphBuilder, features: str) -> str:
        """Write the scores as nodes.

        Args:
            graph: what the nodes are added to.
            features: name of a float32 `[N, features]` value there.

        Returns:
            Name of the float32 `[N, 5]` value that holds the columns of :data:`SCORES`.
        """
        own = self.distance
        logits = graph.node(
            "Gemm", [features, graph.constant(self.weight), graph.constant(self.bias)], transB=1
        )
        found = graph.node("Sigmoid", [logits])
        centred = graph.node("Sub", [features, graph.constant(own.mean)])
        scaled = graph.node("Mul", [centred, graph.constant(1 / own.scale)])
        ends = [graph.constant(-_BOUND), graph.constant(_BOUND)]
        bounded = graph.node("Clip", [scaled, *ends])
        amounts = graph.node("MatMul", [bounded, graph.constant(own.basis)])
        squares = graph.node("Mul", [amounts, amounts])
        special = graph.node("MatMul", [squares, graph.constant(own.gain[:, None])])
        axis = graph.constant([1], np.int64)
        whole = graph.node("Mul", [bounded, bounded])
        whole = graph.node("ReduceSum", [whole, axis], keepdims=1)
        whole = graph.node("Mul", [whole, graph.constant(1 / own.rest)])
        total = graph.node("Add", [special, whole])
        mean = graph.node("Mul", [total, graph.constant(1 / len(own.mean))])
        mean = graph.node("Max", [mean, graph.constant(0.0)])
        return graph.node("Concat", [found, graph.node("Sqrt", [mean])], axis=1)

    def state(self) -> State:
        """Arrays that :func:`guards_from_state` makes the guards from again."""
        own = self.distance
        state = {
            "weight": self.weight,
            "bias": self.bias,
            "mean": own.mean,
            "scale": own.scale,
            "basis": own.basis,
            "gain": own.gain,
            "rest": np.asarray(own.rest),
            "passed": np.asarray(self.passed),
        }
        for name, values in (("limits", self.limits), ("detected", self.detected)):
            state[f"{name}/names"] = np.asarray(list(values))
            state[name] = np.asarray(list(values.values()))
        return state


def guards_from_state(state: Mapping[str, npt.NDArray[np.generic]]) -> Guards:
    """Make guards from what `state` gave.

    Raises:
        KeyError: an array is missing.
    """
    arrays = {name: np.asarray(state[name], dtype=np.float64) for name in state if "/" not in name}

    def named(name: str) -> dict[str, float]:
        names = [str(reason) for reason in state[f"{name}/names"]]
        return dict(zip(names, arrays[name].tolist(), strict=True))

    return Guards(
        weight=arrays["weight"],
        bias=arrays["bias"],
        distance=Distance(
            arrays["mean"],
            arrays["scale"],
            arrays["basis"],
            arrays["gain"],
            float(arrays["rest"]),
        ),
        limits=named("limits"),
        passed=float(arrays["passed"]),
        detected=named("detected"),
    )


def fit_guards(
    training: pd.DataFrame,
    validation: pd.DataFrame,
    backbone: Backbone,
    *,
    images: int,
    seed: int,
) -> Guards:
    """Fit guards on the training split, and their limits on the validation split.

    Args:
        training: rows of a manifest.
        validation: rows of a manifest.
        backbone: the model's.
        images: of the training split, at most, from each source alike; of each, copies are made.
        seed: of the choice of images and of the copies.

    Raises:
        TrainingError: an image cannot be used.
    """
    rng = np.random.default_rng(seed)
    fit_rows = _sample(training, images, rng)
    check_rows = _sample(validation, max(images // 3, 8), rng)
    more = _sample(validation, _VALIDATION, rng)
    kinds = len(_CHANGES) + 1
    network = feature_network(backbone, (len(fit_rows) + len(check_rows)) * kinds + len(more))
    spec = backbone.preprocessing
    fit, check = (_made(part, network, spec, rng) for part in (fit_rows, check_rows))
    pixels = []

    def measured() -> Iterator[Image.Image]:
        for image in _images(more, spec):
            pixels.append(pixel_scores(image, spec))
            yield image

    plain = _features(measured(), network, spec)
    with threadpool_limits(1):
        weight, bias = _detectors(fit)
        distance = Distance.fitted(_joined(fit, _GOOD))
        known = [distance.of(plain), distance.of(_joined(check, _GOOD))]
        known += _left_out(fit, fit_rows["source"].to_numpy(dtype=str), ("plain",))
        folds = pd.factorize(fit_rows["group"])[0] % _FOLDS
        known.append(np.concatenate(_left_out(fit, folds, _GOOD) or [np.zeros(1)]))
    guards = Guards(weight, bias, distance, {}, 0.0, {})
    scores = {reason: guards.scores(plain)[:, n] for n, reason in enumerate(SCORES)}
    scores |= {reason: np.asarray([values[reason] for values in pixels]) for reason in pixels[0]}
    limits = {
        reason: max(_LEAST.get(reason, 0.0), float(np.quantile(scores[reason], PASS_RATE)))
        for reason in REASONS
    }
    limits[Rejection.OUT_OF_DISTRIBUTION] = _ALLOWANCE * max(
        float(np.quantile(values, PASS_RATE)) for values in known
    )
    bad = np.any([scores[reason] > limits[reason] for reason in REASONS], axis=0)
    detected = {
        reason.value: float((guards.scores(check[kind])[:, n] > limits[reason]).mean())
        for n, (reason, kind) in enumerate(_FOUND.items())
    }
    return Guards(
        weight,
        bias,
        distance,
        {reason.value: limit for reason, limit in limits.items()},
        float(1 - bad.mean()),
        detected,
    )


def _sample(frame: pd.DataFrame, count: int, rng: np.random.Generator) -> pd.DataFrame:
    """So many rows at most, from each source alike as far as it has them."""
    order = frame.iloc[rng.permutation(len(frame))]
    turn = order.groupby("source").cumcount()
    return order.loc[turn.sort_values(kind="stable").index[:count]]


def _images(frame: pd.DataFrame, spec: Preprocessing) -> Iterator[Image.Image]:
    """As serving decodes them."""
    for path in frame["path"]:
        try:
            yield decode(Path(path).read_bytes(), DEFAULT_LIMITS, spec.draft)
        except OSError as error:
            raise TrainingError(f"Cannot read {path}: {error.strerror}.") from error
        except BadImageError as error:
            raise TrainingError(f"{path} cannot be used: {error}") from error


def _features(images: Iterable[Image.Image], network: Network, spec: Preprocessing) -> Float64Array:
    """float64 `[images, features]`; the next images are made while the network is at work."""
    vectors = network.each(preprocess(image, spec)[None] for image in images)
    return np.concatenate(list(vectors)).astype(np.float64)


def _made(
    frame: pd.DataFrame, network: Network, spec: Preprocessing, rng: np.random.Generator
) -> dict[str, Float64Array]:
    """Features of some images, of all kinds of copies of them, and of as many that are none."""
    kinds = (*_CHANGES, _NONE)

    def copied() -> Iterator[Image.Image]:
        for image in _images(frame, spec):
            for change in _CHANGES.values():
                yield change(image, rng)
            yield copies.no_radiograph(rng)

    found = _features(copied(), network, spec)
    return {kind: found[number :: len(kinds)] for number, kind in enumerate(kinds)}


def _detectors(made: Mapping[str, Float64Array]) -> tuple[Float64Array, Float64Array]:
    rows, offsets = [], []
    for reason in DETECTORS:
        wanted = _FOUND[reason]
        # What is no radiograph at all says nothing about how a radiograph lies.
        others = [kind for kind in made if kind not in (wanted, _NONE)]
        if wanted in ("rotated", "inverted"):
            others.remove("part")
        features = [made[wanted], _joined(made, others)]
        labels = np.repeat(["1", "0"], [len(part) for part in features])
        weights = np.concatenate([np.full(len(part), 1 / len(part)) for part in features])
        head = fit_logistic(np.concatenate(features), labels, weights * len(labels) / 2)(_STRENGTH)
        rows.append(head.weight[1] - head.weight[0])
        offsets.append(head.bias[1] - head.bias[0])
    return np.stack(rows), np.asarray(offsets)


def _left_out(
    made: Mapping[str, Float64Array], parts: npt.NDArray[Any], kinds: Sequence[str]
) -> list[Float64Array]:
    """Distances of each part's images from all others', where there are several parts."""
    found = []
    for part in np.unique(parts):
        out = parts == part
        if out.all():
            continue
        others = Distance.fitted(np.concatenate([made[kind][~out] for kind in _GOOD]))
        found.append(others.of(np.concatenate([made[kind][out] for kind in kinds])))
    return found


def _joined(made: Mapping[str, Float64Array], kinds: list[str] | tuple[str, ...]) -> Float64Array:
    return np.concatenate([made[kind] for kind in kinds])
