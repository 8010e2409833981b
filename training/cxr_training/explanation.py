"""Heat maps from inside the exported graph: where the features that speak for a class come from.

Features are spatial statistics of feature maps, so what a head makes of them can be led back to
places. Two ways, both without a gradient:

`class-activation`, for heads whose margins are linear in the features. A mean is a sum over places,
and a deviation is one too, since it is the variance by the deviation: with a map x of channel means
m, deviations s and n places, and weights v of the means and u of the deviations,

    sum over channels of v m + u s
        = sum over places of the sum over channels of (v x + u (x - m)**2 / s) / n.

The inner sum is the evidence of a place, which is exact: with what no place brings, the bias, it
adds up to the margin. For means alone it is the class activation map of Zhou et al., Learning deep
features for discriminative localization, CVPR 2016. An average over image and mirror image is a sum
as well, and so are several networks.

`ablation`, for the others. The features are pooled once more without each cell of a coarse grid,
and the evidence of a cell is how much probability the class loses so: Ablation-CAM (Desai and
Ramaswamy, WACV 2020) with places in the part of channels. A cell is left out of the pooling and not
out of the image, so that the network itself runs once.

The nodes stand in the branch of an `If` whose condition is an optional input, false by default:
ONNX Runtime computes all outputs of a graph, whichever are asked for, and would otherwise make the
map for every image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cxr_training.backbones import FeatureMap
from cxr_training.heads import Head
from cxr_training.heads.base import Float64Array
from cxr_training.heads.graph import GraphBuilder

EXPLAIN, EVIDENCE = "explain", "evidence"
# Rows and columns of the evidence; of the cells that ablation leaves out.
GRID = 32
CELLS = 7
_TINY = 1e-30


@dataclass(frozen=True)
class NamedMap:
    """A feature map of the graph.

    Attributes:
        name: of the float32 value `[N, channels, rows, columns]`.
        pooling: how it becomes features.
    """

    name: str
    pooling: FeatureMap


def method(head: Head, feature_count: int) -> Literal["class-activation", "ablation"]:
    """How the maps of a head are made."""
    return "ablation" if head.margins(feature_count) is None else "class-activation"


def grid(head: Head, feature_count: int) -> int:
    """Rows and columns of the evidence."""
    return CELLS if head.margins(feature_count) is None else GRID


def add_evidence(
    graph: onnx.GraphProto,
    maps: Sequence[NamedMap],
    head: Head,
    *,
    features: str,
    feature_count: int,
    probabilities: str,
) -> None:
    """Add the optional input `explain` and the output `evidence` to a whole model.

    Args:
        graph: the model's graph, changed in place.
        maps: what its features are pooled from.
        head: its head.
        features: name of its float32 `[N, features]` value.
        feature_count: length of one feature vector.
        probabilities: name of its float32 `[N, classes]` value.
    """
    builder = GraphBuilder("evidence")
    margins = head.margins(feature_count)
    if margins is None:
        result = _ablated(builder, maps, head, features, probabilities)
    else:
        result = _activated(builder, maps, margins[0])
    _share_constants(builder, graph)
    size = grid(head, feature_count)
    shape: list[str | int | None] = ["batch", len(head.labels), size, size]
    chosen = helper.make_graph(
        builder.nodes,
        "explained",
        [],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        builder.constants,
    )
    nothing = numpy_helper.from_array(
        np.zeros((0, len(head.labels), size, size), np.float32), "nothing"
    )
    other = helper.make_graph(
        [helper.make_node("Constant", [], ["nothing"], name="evidence_none", value=nothing)],
        "unexplained",
        [],
        [helper.make_tensor_value_info("nothing", TensorProto.FLOAT, None)],
    )
    graph.node.append(
        helper.make_node(
            "If", [EXPLAIN], [EVIDENCE], name=EVIDENCE, then_branch=chosen, else_branch=other
        )
    )
    graph.initializer.append(numpy_helper.from_array(np.asarray(False), EXPLAIN))
    graph.input.append(helper.make_tensor_value_info(EXPLAIN, TensorProto.BOOL, []))
    graph.output.append(helper.make_tensor_value_info(EVIDENCE, TensorProto.FLOAT, shape))


def _share_constants(builder: GraphBuilder, graph: onnx.GraphProto) -> None:
    """Have the branch use the graph's own arrays where they are equal: a head can be large."""

    def content(array: TensorProto) -> tuple[int, tuple[int, ...], bytes]:
        return array.data_type, tuple(array.dims), array.raw_data

    outside = {content(array): array.name for array in graph.initializer if array.raw_data}
    shared = {array.name: outside.get(content(array)) for array in builder.constants}
    for node in builder.nodes:
        node.input[:] = [shared.get(name) or name for name in node.input]
    builder.constants = [array for array in builder.constants if not shared[array.name]]


def spreading(source: int, target: int) -> Float64Array:
    """How each of `source` places in a row is spread over `target` places: `[target, source]`.

    A place becomes a tent about its centre, as wide as two places of the coarser grid; columns sum
    to 1, so that sums over places stay what they are.
    """
    centres = (np.arange(source) + 0.5) / source
    places = (np.arange(target) + 0.5) / target
    distance = np.abs(places[:, None] - centres[None, :]) * min(source, target)
    tent = np.maximum(1 - distance, 0)
    return np.asarray(tent / tent.sum(axis=0))


def covering(source: int, cells: int) -> Float64Array:
    """Share of each of `source` places in each of `cells` equal cells: `[cells, source]`.

    Rows sum to 1: with it, places become the means of cells.
    """
    edges = np.arange(source + 1) / source
    starts = np.arange(cells)[:, None] / cells
    low = np.maximum(edges[None, :-1], starts)
    high = np.minimum(edges[None, 1:], starts + 1 / cells)
    return np.asarray(np.maximum(high - low, 0) * cells)


def _activated(builder: GraphBuilder, maps: Sequence[NamedMap], weight: Float64Array) -> str:
    """Evidence of places, from linear margins: float32 `[N, classes, GRID, GRID]`."""
    parts = []
    for item in maps:
        pooling = item.pooling
        channels, rows, columns = pooling.shape
        scale = pooling.share / (rows * columns)
        means = weight[:, pooling.means : pooling.means + channels, None, None] * scale
        found = builder.node("Conv", [item.name, builder.constant(means)])
        if pooling.deviations is not None:
            _, squares, deviation = _moments(builder, item.name)
            own = weight[:, pooling.deviations : pooling.deviations + channels] * scale
            # The deviation divides the weights and not the squares, which are many more.
            row = builder.constant([0, 1, channels], np.int64)
            relative = builder.node(
                "Div", [builder.constant(own), builder.node("Reshape", [deviation, row])]
            )
            flat = builder.constant([0, channels, rows * columns], np.int64)
            spread = builder.node("MatMul", [relative, builder.node("Reshape", [squares, flat])])
            shape = builder.constant([0, len(weight), rows, columns], np.int64)
            spread = builder.node("Reshape", [spread, shape])
            found = builder.node("Add", [found, spread])
        down, across = spreading(rows, GRID), spreading(columns, GRID)
        if pooling.mirrored:
            across = across[::-1]
        found = builder.node("MatMul", [builder.constant(down), found])
        parts.append(builder.node("MatMul", [found, builder.constant(across.T)]))
    return builder.node("Sum", parts)


def _moments(builder: GraphBuilder, name: str) -> tuple[str, str, str]:
    """Of a map: what is left without the channels' means, its squares, the deviations."""
    mean = builder.node("ReduceMean", [name], axes=[2, 3], keepdims=1)
    centred = builder.node("Sub", [name, mean])
    squares = builder.node("Mul", [centred, centred])
    variance = builder.node("ReduceMean", [squares], axes=[2, 3], keepdims=1)
    bounded = builder.node("Max", [variance, builder.constant(_TINY)])
    return centred, squares, builder.node("Sqrt", [bounded])


def _ablated(
    builder: GraphBuilder,
    maps: Sequence[NamedMap],
    head: Head,
    features: str,
    probabilities: str,
) -> str:
    """Loss of probability without each cell: float32 `[N, classes, CELLS, CELLS]`."""
    cells, share = CELLS * CELLS, 1 / (CELLS * CELLS)
    parts: dict[int, list[str]] = {}
    for item in maps:
        pooling = item.pooling
        channels, rows, columns = pooling.shape
        down, across = covering(rows, CELLS), covering(columns, CELLS)
        if pooling.mirrored:
            across = across[::-1]
        ends = [builder.constant(down), builder.constant(across.T)]
        flat = builder.constant([0, channels, cells], np.int64)

        def in_cells(value: str, ends: list[str] = ends, flat: str = flat) -> str:
            pooled = builder.node("MatMul", [builder.node("MatMul", [ends[0], value]), ends[1]])
            # Columns of the transposed [N, cells, channels] are what the features have.
            return builder.node(
                "Transpose", [builder.node("Reshape", [pooled, flat])], perm=[0, 2, 1]
            )

        centred, squares, deviation = _moments(builder, item.name)
        without = builder.node("Mul", [in_cells(centred), builder.constant(-share / (1 - share))])
        weight = builder.constant(pooling.share)
        mean = builder.node("ReduceMean", [item.name], axes=[2, 3], keepdims=1)
        row = builder.constant([0, 1, channels], np.int64)
        shifted = builder.node("Add", [builder.node("Reshape", [mean, row]), without])
        parts.setdefault(pooling.means, []).append(builder.node("Mul", [shifted, weight]))
        if pooling.deviations is not None:
            variance = builder.node("Mul", [deviation, deviation])
            variance = builder.node("Reshape", [variance, row])
            taken = builder.node("Mul", [in_cells(squares), builder.constant(share)])
            left = builder.node("Sub", [variance, taken])
            left = builder.node("Mul", [left, builder.constant(1 / (1 - share))])
            left = builder.node("Sub", [left, builder.node("Mul", [without, without])])
            left = builder.node("Sqrt", [builder.node("Max", [left, builder.constant(0.0)])])
            parts.setdefault(pooling.deviations, []).append(builder.node("Mul", [left, weight]))
    whole = builder.node(
        "Concat",
        [
            builder.node("Sum", parts[start]) if len(parts[start]) > 1 else parts[start][0]
            for start in sorted(parts)
        ],
        axis=2,
    )
    count = builder.node("Shape", [features], start=1)
    each = builder.node("Concat", [builder.constant([-1], np.int64), count], axis=0)
    found = head.add_to(builder, builder.node("Reshape", [whole, each]))
    classes = len(head.labels)
    found = builder.node("Reshape", [found, builder.constant([-1, cells, classes], np.int64)])
    before = builder.node("Reshape", [probabilities, builder.constant([-1, 1, classes], np.int64)])
    lost = builder.node("Transpose", [builder.node("Sub", [before, found])], perm=[0, 2, 1])
    return builder.node("Reshape", [lost, builder.constant([-1, classes, CELLS, CELLS], np.int64)])
