"""TorchServe's own image classifier, told the model's input size, normalisation and classes."""

import json
import os
from pathlib import Path

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier

_CONFIG = json.loads((Path(os.environ["CXR_BENCH_MODEL"]) / "cxr-model.json").read_bytes())
_INPUT = _CONFIG["preprocessing"]


class StockHandler(ImageClassifier):
    """What its documentation says to change for another network: these two attributes."""

    topk = len(_CONFIG["labels"])
    image_processing = transforms.Compose(
        [
            transforms.Grayscale(3),
            transforms.Resize((_INPUT["height"], _INPUT["width"])),
            transforms.ToTensor(),
            transforms.Normalize(_INPUT["mean"], _INPUT["std"]),
        ]
    )
