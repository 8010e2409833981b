"""Fitted heads; each knows its probabilities, its ONNX nodes and its arrays on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from scipy.special import softmax
from sklearn.metrics.pairwise import rbf_kernel

from cxr.engine import CPU
from cxr_training.calibration import SMALLEST_PROBABILITY, apply_temperature
from cxr_training.heads.base import Features, Float64Array, Head, State
from cxr_training.heads.graph import FEATURES, PROBABILITIES, GraphBuilder

Margins = tuple[Float64Array, Float64Array] | None

_KERNEL_ARRAYS = ("mean", "scale", "vectors", "weight", "bias")


@dataclass(frozen=True, eq=False)
class LinearHead:
    """One linear layer and a softmax, on features that are not standardised.

    Attributes:
        labels: class names, in the order of the rows of `weight`.
        weight: float64 `[classes, features]`.
        bias: float64 `[classes]`.
    """

    labels: tuple[str, ...]
    weight: Float64Array
    bias: Float64Array
    smooth = True

    def predict_proba(self, features: Features) -> Float64Array:
        """Probabilities of :class:`Head`."""
        logits = np.asarray(features, dtype=np.float64) @ self.weight.T + self.bias
        return np.asarray(softmax(logits, axis=1))

    def add_to(self, graph: GraphBuilder, features: str) -> str:
        """Nodes of :class:`Head`."""
        weight, bias = graph.constant(self.weight), graph.constant(self.bias)
        logits = graph.node("Gemm", [features, weight, bias], transB=1)
        return graph.node("Softmax", [logits], axis=1)

    def margins(self, feature_count: int) -> Margins:  # noqa: ARG002 - the weights know it
        """Margins of :class:`Head`."""
        count = len(self.labels)
        weight, bias = (
            (array - array.mean(axis=0)) * count / (count - 1) for array in (self.weight, self.bias)
        )
        return weight, bias

    def state(self) -> State:
        """Arrays of :class:`Head`."""
        return _state("linear", self.labels, weight=self.weight, bias=self.bias)


@dataclass(frozen=True, eq=False)
class KernelHead:
    """One linear layer and a softmax, on the likeness of an image to images of the training.

    The likeness is `exp(-|u - v|^2)`, where `u` are the image's features and `v` the other's, both
    standardised and divided by the root of their number.

    Attributes:
        labels: class names, in the order of the rows of `weight`.
        mean: what is taken off the features, float64 `[features]`.
        scale: what they are then divided by, float64 `[features]`, above 0.
        vectors: the support vectors, so transformed, float64 `[vectors, features]`.
        weight: float64 `[classes, vectors]`.
        bias: float64 `[classes]`.
    """

    labels: tuple[str, ...]
    mean: Float64Array
    scale: Float64Array
    vectors: Float64Array
    weight: Float64Array
    bias: Float64Array
    smooth = True

    def predict_proba(self, features: Features) -> Float64Array:
        """Probabilities of :class:`Head`."""
        own = (np.asarray(features, dtype=np.float64) - self.mean) / self.scale
        likeness = rbf_kernel(own, self.vectors, gamma=1.0)
        return np.asarray(softmax(likeness @ self.weight.T + self.bias, axis=1))

    def add_to(self, graph: GraphBuilder, features: str) -> str:
        """Nodes of :class:`Head`."""
        centred = graph.node("Sub", [features, graph.constant(self.mean)])
        own = graph.node("Div", [centred, graph.constant(self.scale)])
        # -|u - v|^2 = 2uv - |v|^2 - |u|^2
        lengths = graph.constant(-np.square(self.vectors).sum(axis=1))
        product = graph.node(
            "Gemm", [own, graph.constant(self.vectors), lengths], alpha=2.0, transB=1
        )
        length = graph.node("ReduceSumSquare", [own], axes=[1], keepdims=1)
        likeness = graph.node("Exp", [graph.node("Sub", [product, length])])
        weight, bias = graph.constant(self.weight), graph.constant(self.bias)
        logits = graph.node("Gemm", [likeness, weight, bias], transB=1)
        return graph.node("Softmax", [logits], axis=1)

    def margins(self, feature_count: int) -> Margins:  # noqa: ARG002 - there is none
        """Margins of :class:`Head`."""
        return None

    def state(self) -> State:
        """Arrays of :class:`Head`."""
        arrays = {name: getattr(self, name) for name in _KERNEL_ARRAYS}
        return _state("kernel", self.labels, **arrays)


@dataclass(frozen=True, eq=False)
class TreeHead:
    """Trees, as the ONNX model that scikit-learn's were converted to.

    Attributes:
        labels: class names, in the order of the probabilities.
        model: the serialised model, from `features` to `probabilities`.
    """

    labels: tuple[str, ...]
    model: bytes
    smooth = False

    @cached_property
    def _session(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        return ort.InferenceSession(self.model, options, providers=[CPU])

    def predict_proba(self, features: Features) -> Float64Array:
        """Probabilities of :class:`Head`."""
        rows = np.ascontiguousarray(features, dtype=np.float32)
        found = np.asarray(self._session.run([PROBABILITIES], {FEATURES: rows})[0], np.float64)
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def add_to(self, graph: GraphBuilder, features: str) -> str:
        """Nodes of :class:`Head`."""
        return graph.include(onnx.load_from_string(self.model), features, PROBABILITIES)

    def margins(self, feature_count: int) -> Margins:  # noqa: ARG002 - there is none
        """Margins of :class:`Head`."""
        return None

    def state(self) -> State:
        """Arrays of :class:`Head`."""
        return _state("tree", self.labels, model=np.frombuffer(self.model, dtype=np.uint8))


@dataclass(frozen=True, eq=False)
class CalibratedHead:
    """Another head, its logits divided by a temperature.

    Attributes:
        head: the head.
        temperature: above 0.
    """

    head: Head
    temperature: float

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of the head."""
        return self.head.labels

    @property
    def smooth(self) -> bool:
        """Whether the head is."""
        return self.head.smooth

    def predict_proba(self, features: Features) -> Float64Array:
        """Probabilities of :class:`Head`."""
        return apply_temperature(self.head.predict_proba(features), self.temperature)

    def add_to(self, graph: GraphBuilder, features: str) -> str:
        """Nodes of :class:`Head`."""
        probabilities = self.head.add_to(graph, features)
        return graph.temperature(probabilities, self.temperature, SMALLEST_PROBABILITY)

    def margins(self, feature_count: int) -> Margins:
        """Margins of :class:`Head`."""
        found = self.head.margins(feature_count)
        return found and (found[0] / self.temperature, found[1] / self.temperature)

    def state(self) -> State:
        """Arrays of :class:`Head`."""
        own = _state("calibrated", self.labels, temperature=np.asarray(self.temperature))
        return own | _nested([self.head])


@dataclass(frozen=True, eq=False)
class SlicedHead:
    """Another head, on some of the features.

    Attributes:
        head: the head.
        start: its first feature.
        stop: the one after its last.
    """

    head: Head
    start: int
    stop: int

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of the head."""
        return self.head.labels

    @property
    def smooth(self) -> bool:
        """Whether the head is."""
        return self.head.smooth

    def predict_proba(self, features: Features) -> Float64Array:
        """Probabilities of :class:`Head`."""
        return self.head.predict_proba(features[:, self.start : self.stop])

    def add_to(self, graph: GraphBuilder, features: str) -> str:
        """Nodes of :class:`Head`."""
        ends = [graph.constant([value], np.int64) for value in (self.start, self.stop, 1)]
        return self.head.add_to(graph, graph.node("Slice", [features, *ends]))

    def margins(self, feature_count: int) -> Margins:
        """Margins of :class:`Head`."""
        found = self.head.margins(self.stop - self.start)
        if found is None:
            return None
        weight = np.zeros((len(self.labels), feature_count))
        weight[:, self.start : self.stop] = found[0]
        return weight, found[1]

    def state(self) -> State:
        """Arrays of :class:`Head`."""
        own = _state("sliced", self.labels, ends=np.asarray([self.start, self.stop]))
        return own | _nested([self.head])


@dataclass(frozen=True, eq=False)
class AverageHead:
    """The mean of several heads' probabilities.

    Attributes:
        members: heads of the same labels.
    """

    members: tuple[Head, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of the members."""
        return self.members[0].labels

    @property
    def smooth(self) -> bool:
        """Whether all members are."""
        return all(member.smooth for member in self.members)

    def predict_proba(self, features: Features) -> Float64Array:
        """Probabilities of :class:`Head`."""
        return np.asarray(
            np.mean([member.predict_proba(features) for member in self.members], axis=0)
        )

    def add_to(self, graph: GraphBuilder, features: str) -> str:
        """Nodes of :class:`Head`."""
        return graph.node("Mean", [member.add_to(graph, features) for member in self.members])

    def margins(self, feature_count: int) -> Margins:
        """Margins of :class:`Head`."""
        found = [member.margins(feature_count) for member in self.members]
        linear = [pair for pair in found if pair is not None]
        if len(linear) < len(found):
            return None
        weight, bias = (np.asarray(np.mean(part, axis=0)) for part in zip(*linear, strict=True))
        return weight, bias

    def state(self) -> State:
        """Arrays of :class:`Head`."""
        return _state("average", self.labels) | _nested(self.members)


def head_from_state(state: Mapping[str, npt.NDArray[np.generic]]) -> Head:
    """Make a head from what its `state` gave.

    Raises:
        KeyError: an array is missing.
        ValueError: an array is not what it should be.
    """
    kind, labels = str(state["kind"]), tuple(str(name) for name in state["labels"])
    inner = [head_from_state(part) for part in _parts(state)]
    if kind == "linear":
        return LinearHead(labels, np.asarray(state["weight"]), np.asarray(state["bias"]))
    if kind == "kernel":
        return KernelHead(labels, *(np.asarray(state[name]) for name in _KERNEL_ARRAYS))
    if kind == "tree":
        return TreeHead(labels, np.asarray(state["model"]).tobytes())
    if kind == "calibrated":
        return CalibratedHead(inner[0], float(np.asarray(state["temperature"])))
    if kind == "sliced":
        start, stop = np.asarray(state["ends"]).tolist()
        return SlicedHead(inner[0], start, stop)
    if kind == "average":
        return AverageHead(tuple(inner))
    raise ValueError(f"There is no head {kind!r}.")


def _state(kind: str, labels: tuple[str, ...], **arrays: npt.NDArray[np.generic]) -> State:
    return {"kind": np.asarray(kind), "labels": np.asarray(labels), **arrays}


def _nested(members: Sequence[Head]) -> State:
    return {
        f"{number}/{name}": array
        for number, member in enumerate(members)
        for name, array in member.state().items()
    }


def _parts(state: Mapping[str, npt.NDArray[np.generic]]) -> list[State]:
    parts: dict[int, State] = {}
    for key, array in state.items():
        number, slash, name = key.partition("/")
        if slash:
            parts.setdefault(int(number), {})[name] = array
    return [parts[number] for number in sorted(parts)]
