"""PyTorch modules as ONNX graphs."""

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import nn

from cxr_training.heads.graph import IR_VERSION, OPSET

IMAGE = "image"


def exported(
    module: nn.Module, item_shape: tuple[int, int, int], outputs: Sequence[str]
) -> onnx.ModelProto:
    """A module that takes images as an ONNX graph with the input :data:`IMAGE`.

    Args:
        module: float32 `[N, *item_shape]` to one tensor for each output; moved to the CPU.
        item_shape: shape of one image.
        outputs: names of the outputs, whose first axis is the batch.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "module.onnx"
        # The exporter that PyTorch prefers needs a further package and gains this graph nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        # It also tells that it leaves the padding to ONNX Runtime to simplify.
        warnings.filterwarnings("ignore", message="Constant folding")
        torch.onnx.export(
            module.cpu(),
            (torch.zeros(1, *item_shape),),
            file,
            input_names=[IMAGE],
            output_names=list(outputs),
            dynamic_axes={name: {0: "batch"} for name in (IMAGE, *outputs)},
            opset_version=OPSET,
            dynamo=False,
        )
        model = onnx.load(file)
    for node in model.graph.node:
        node.ClearField("doc_string")  # may quote source files of this machine
    model.ir_version = IR_VERSION
    return model
