"""Building ONNX nodes, such as those of a head: features in, probabilities out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

OPSET = 17
ML_OPSET = 1
IR_VERSION = 8
FEATURES, PROBABILITIES = "features", "probabilities"


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the branches within."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


@dataclass
class GraphBuilder:
    """Nodes and constants under names that never clash.

    Attributes:
        prefix: what the names begin with; builders of one graph need different ones.
        nodes: the nodes.
        constants: the arrays.
    """

    prefix: str = "head"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def constant(self, value: npt.ArrayLike, dtype: type[np.generic] = np.float32) -> str:
        """Add an array, and return its name."""
        name = f"{self.prefix}_constant_{len(self.constants)}"
        array = np.ascontiguousarray(value, dtype=dtype)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output, and return the output's name."""
        name = f"{self.prefix}_{len(self.nodes)}_{operator.lower()}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def include(self, model: onnx.ModelProto, source: str, output: str) -> str:
        """Add the nodes of a whole model of one input.

        Args:
            model: the model; its opsets must be those of this module.
            source: name of the value here that becomes the model's input.
            output: which of its outputs is wanted.

        Returns:
            The name of that output here.
        """
        prefix = f"{self.prefix}_{len(self.nodes)}_"
        graph = compose.add_prefix(model, prefix).graph
        given = graph.input[0].name
        for node in graph.node:
            renamed = [source if name == given else name for name in node.input]
            node.ClearField("input")
            node.input.extend(renamed)
        self.nodes.extend(graph.node)
        self.constants.extend(graph.initializer)
        return prefix + output

    def temperature(self, probabilities: str, temperature: float, smallest: float) -> str:
        """Divide the logits behind probabilities, as `calibration.apply_temperature` does."""
        bounded = self.node("Max", [probabilities, self.constant(smallest)])
        logits = self.node("Div", [self.node("Log", [bounded]), self.constant(temperature)])
        return self.node("Softmax", [logits], axis=1)
