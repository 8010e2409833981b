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


def graph_bytes(classes: int = len(LABELS), size: int = SIZE) -> bytes:
    """Mean brightness, a linear layer and a softmax, as ONNX."""
    weights = np.linspace(-2, 2, classes * 3, dtype=np.float32).reshape(classes, 3)
    bias = np.linspace(0.3, -0.3, classes, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
            helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"], transB=1),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "brightness",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", classes])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def config_document(graph: bytes, **changes: object) -> dict[str, object]:
    """A valid model configuration, as plain data, with some fields replaced."""
    per_class = {
        "support": 1,
        "sensitivity": 1.0,
        "specificity": 1.0,
        "precision": 1.0,
        "f1": 1.0,
        "roc_auc": 1.0,
    }
    interval = {"value": 1.0, "low": 0.5, "high": 1.0}
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
        "graph": {
            "file": "model.onnx",
            "sha256": hashlib.sha256(graph).hexdigest(),
            "opset": 17,
            "input": {"name": "image", "dtype": "float32", "shape": [-1, 3, SIZE, SIZE]},
            "output": {"name": "probabilities", "dtype": "float32", "shape": [-1, len(LABELS)]},
        },
        "intended_use": "Tests of the serving path.",
        "limitations": ["Knows nothing of radiographs."],
        "training_data": {
            "synthetic": True,
            "manifest_sha256": "0" * 64,
            "sources": [{"name": "none", "images": 3}],
            "labels": dict.fromkeys(LABELS, 1),
            "images": 3,
            "groups": 3,
            "splits": {"train": 3},
            "seed": 0,
        },
        "metrics": {
            "split": "test",
            "images": 3,
            "groups": 3,
            "method": "none",
            "accuracy": interval,
            "balanced_accuracy": interval,
            "per_class": dict.fromkeys(LABELS, per_class),
            "per_source": {"none": interval},
            "confusion": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        },
        "versions": {"python": "3.11"},
    }
    return document | changes


def make_bundle(folder: Path, **changes: object) -> Path:
    """Write the small model as a bundle, with some fields of its configuration replaced."""
    graph = graph_bytes()
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
