"""A small but real model: its answer depends on how bright the image is."""

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from cxr.config import ModelConfig

LABELS = ("COVID-19", "No finding", "Pneumonia")
SIZE = 64


def graph_bytes(
    classes: int = len(LABELS),
    size: int = SIZE,
    *,
    explained: bool = False,
    guarded: bool = False,
) -> bytes:
    """Mean brightness, a linear layer and a softmax, as ONNX.

    Explained, it also says what each place adds to each class, if its input `explain` is true.
    Guarded, its guards take the bright for no radiograph, and the dark for inverted.
    """
    weights = np.linspace(-2, 2, classes * 3, dtype=np.float32).reshape(classes, 3)
    bias = np.linspace(0.3, -0.3, classes, dtype=np.float32)
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, size, size])]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", classes])]
    constants = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")]
    added = []
    if guarded:
        # Brightness from -1 to 1 as the scores of GUARDS, in their order.
        share = np.zeros((5, 3), np.float32)
        share[[0, 3, 4]] = np.asarray([[1], [-1], [1]]) / 3
        constants.append(numpy_helper.from_array(share, "share"))
        added.append(helper.make_node("Gemm", ["features", "share"], ["quality"], transB=1))
        outputs.append(helper.make_tensor_value_info("quality", TensorProto.FLOAT, ["n", 5]))
    if explained:
        shape = ["n", classes, size, size]
        kernel = numpy_helper.from_array(weights[:, :, None, None] / size**2, "kernel")
        none = numpy_helper.from_array(np.zeros((0, classes, size, size), np.float32))
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ab"]
        conv = helper.make_node("Conv", ["image", "kernel"], ["a"])
        nothing = helper.make_node("Constant", [], ["b"], value=none)
        branches = {
            "then_branch": helper.make_graph([conv], "then", [], value[:1], [kernel]),
            "else_branch": helper.make_graph([nothing], "else", [], value[1:]),
        }
        added.append(helper.make_node("If", ["explain"], ["evidence"], **branches))
        inputs.append(helper.make_tensor_value_info("explain", TensorProto.BOOL, []))
        constants.append(numpy_helper.from_array(np.asarray(False), "explain"))
        outputs.append(helper.make_tensor_value_info("evidence", TensorProto.FLOAT, shape))
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
            helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"], transB=1),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
            *added,
        ],
        "brightness",
        inputs,
        outputs,
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def config_document(graph: bytes, **changes: object) -> dict[str, object]:
    """A valid model configuration, as plain data, with some fields replaced."""
    interval = {"value": 1.0, "low": 0.5, "high": 1.0}
    per_class = {
        "support": 1,
        "sensitivity": interval,
        "specificity": interval,
        "precision": interval,
        "f1": interval,
        "roc_auc": interval,
        "average_precision": interval,
        "at_threshold": None,
    }
    subgroup = {
        "images": 3,
        "groups": 3,
        "labels": dict.fromkeys(LABELS, 1),
        "accuracy": interval,
        "balanced_accuracy": interval,
        "macro_roc_auc": interval,
    }
    document: dict[str, object] = {
        "schema_version": 1,
        "name": "cxr",
        "version": "1.0",
        "description": "Brightness classifier for tests.",
        "architecture": {
            "backbone": "mean",
            "weights": "none",
            "features": "mean brightness",
            "head": "linear",
        },
        "labels": list(LABELS),
        "preprocessing": {
            "color": "grayscale",
            "resize": "stretch",
            "height": SIZE,
            "width": SIZE,
            "interpolation": "bilinear",
            "crop": "none",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "layout": "NCHW",
        },
        "thresholds": dict.fromkeys(LABELS, 0.5),
        "uncertain": None,
        "calibration": None,
        "graph": {
            "file": "model.onnx",
            "sha256": hashlib.sha256(graph).hexdigest(),
            "opset": 17,
            "input": {"name": "image", "dtype": "float32", "shape": [-1, 3, SIZE, SIZE]},
            "output": {"name": "probabilities", "dtype": "float32", "shape": [-1, len(LABELS)]},
        },
        "explanation": None,
        "guards": None,
        "reference": {f"probability of {label}": QUARTERS for label in LABELS},
        "intended_use": "Tests of the serving path.",
        "limitations": ["Knows nothing of radiographs."],
        "training_data": {
            "synthetic": True,
            "manifest_sha256": "0" * 64,
            "splits_sha256": "0" * 64,
            "sources": [{"name": "none", "images": 3}],
            "labels": dict.fromkeys(LABELS, 1),
            "images": 3,
            "groups": 3,
            "splits": {"train": 3},
            "seed": 0,
            "excluded": {},
        },
        "metrics": {
            "split": "test",
            "images": 3,
            "groups": 3,
            "method": "none",
            "accuracy": interval,
            "balanced_accuracy": interval,
            "macro_precision": interval,
            "macro_f1": interval,
            "macro_roc_auc": interval,
            "macro_average_precision": interval,
            "expected_calibration_error": interval,
            "brier_score": interval,
            "log_loss": interval,
            "per_class": dict.fromkeys(LABELS, per_class),
            "per_source": {"none": subgroup},
            "per_sex": {},
            "per_age": {},
            "per_view": {},
            "confusion": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        },
        "versions": {"python": "3.11"},
    }
    return document | changes


# Of each number, as if a quarter of the validation images had been in each bin.
QUARTERS = {"edges": [0.2, 0.35, 0.5], "shares": [0.25] * 4, "images": 4}


EXPLANATION = {
    "switch": "explain",
    "output": {
        "name": "evidence",
        "dtype": "float32",
        "shape": [-1, len(LABELS), SIZE, SIZE],
    },
    "method": "class-activation",
}


GUARDS = {
    "output": {"name": "quality", "dtype": "float32", "shape": [-1, 5]},
    "scores": [
        "not_radiograph",
        "not_frontal_chest",
        "rotated",
        "inverted",
        "out_of_distribution",
    ],
    "limits": {
        "not_radiograph": 0.7,
        "not_frontal_chest": 0.5,
        "rotated": 0.5,
        "inverted": 0.5,
        "out_of_distribution": 0.8,
        "too_small": 2.0,
        "too_dark": 0.8,
        "clipped": 0.8,
    },
    "passed": 1.0,
    "detected": {"not_radiograph": 1.0},
}


def make_bundle(
    folder: Path, *, explained: bool = False, guarded: bool = False, **changes: object
) -> Path:
    """Write the small model as a bundle, with some fields of its configuration replaced."""
    graph = graph_bytes(explained=explained, guarded=guarded)
    if guarded:
        names = (*(f"probability of {label}" for label in LABELS), "out_of_distribution")
        changes = {"guards": GUARDS, "reference": dict.fromkeys(names, QUARTERS)} | changes
    if explained:
        changes = {"explanation": EXPLANATION} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(graph)
    config = ModelConfig.model_validate(config_document(graph, **changes))
    (folder / "cxr-model.json").write_text(config.to_json(), encoding="utf-8")
    return folder


def encoded_image(
    brightness: int = 128, size: tuple[int, int] = (96, 80), kind: str = "PNG", seed: int = 0
) -> bytes:
    """A noisy grey image of about that brightness, encoded."""
    noise = np.random.default_rng(seed).normal(brightness, 12, size[::-1])
    buffer = BytesIO()
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()
