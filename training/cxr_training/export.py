"""Run folder to bundle: one ONNX graph and the configuration that serving reads."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pandas as pd
import torch
from torch import Tensor, nn

from cxr.config import Architecture, Graph, ModelConfig, TensorSpec, file_sha256
from cxr.engine import CONFIG_FILE, Engine
from cxr.errors import BadImageError
from cxr_training.backbones import Backbone
from cxr_training.errors import TrainingError
from cxr_training.features import image_batches
from cxr_training.head import Head
from cxr_training.runs import Run, load_run, staged

GRAPH_FILE = "model.onnx"
OPSET = 17
PARITY_TOLERANCE = 1e-4
PARITY_IMAGES = 64

_INPUT, _OUTPUT = "image", "probabilities"
_BATCH = 8
_PACKAGES = ("onnx", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export has made and checked.

    Attributes:
        config: the configuration in the bundle.
        parity_images: test images that were compared.
        max_difference: largest difference of any class probability between PyTorch and the
            bundle in ONNX Runtime, 0 to 1.
    """

    config: ModelConfig
    parity_images: int
    max_difference: float


class Classifier(nn.Module):
    """Backbone, linear head and softmax: what the graph computes."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.features = backbone.module
        self.head = nn.Linear(*reversed(head.weight.shape))
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(head.weight))
            self.head.bias.copy_(torch.from_numpy(head.bias))
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """Classify an image batch.

        Args:
            image: float32 `[N, 3, height, width]`, preprocessed.

        Returns:
            float32 `[N, classes]`, rows sum to 1.
        """
        return torch.softmax(self.head(self.features(image)), dim=1)


def export(run: Run | Path, out: Path) -> ExportReport:
    """Write a run's model as a bundle, checked against PyTorch on images of the test split.

    Equal runs give equal bytes.

    Args:
        run: a run or its folder.
        out: the bundle folder; it is written only if every check passes.

    Raises:
        TrainingError: the run is not usable, or the bundle does not answer as PyTorch does.
        ModelLoadError: the bundle cannot be loaded.
        OSError: the bundle cannot be written.
    """
    run = load_run(run) if isinstance(run, Path) else run
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; a bundle is written to a folder.")
    backbone = run.backbone()
    classifier = Classifier(backbone, run.head)
    frame = _parity_rows(run)
    with staged(out) as folder:
        graph = folder / GRAPH_FILE
        _write_graph(classifier, backbone, graph)
        config = _configuration(run, backbone, file_sha256(graph))
        (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        difference = _max_difference(classifier, backbone, folder, frame)
        if not difference <= PARITY_TOLERANCE:  # also catches NaN
            raise TrainingError(
                f"ONNX Runtime differs from PyTorch by up to {difference:.1e} in probability on "
                f"{len(frame)} test images; at most {PARITY_TOLERANCE:g} is accepted. "
                "No bundle was written."
            )
    return ExportReport(config=config, parity_images=len(frame), max_difference=difference)


def _parity_rows(run: Run) -> pd.DataFrame:
    test = run.rows("test")
    return test.sample(n=min(PARITY_IMAGES, len(test)), random_state=run.record.settings.seed)


def _write_graph(classifier: Classifier, backbone: Backbone, path: Path) -> None:
    with warnings.catch_warnings():
        # The exporter that PyTorch prefers needs a further package and gains this graph nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        # It also tells that it leaves the padding to ONNX Runtime to simplify.
        warnings.filterwarnings("ignore", message="Constant folding")
        torch.onnx.export(
            classifier,
            (torch.zeros(1, *backbone.preprocessing.item_shape),),
            path,
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_axes={_INPUT: {0: "batch"}, _OUTPUT: {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(path)
    for node in model.graph.node:
        node.ClearField("doc_string")  # may quote source files of this machine
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _max_difference(
    classifier: Classifier, backbone: Backbone, bundle: Path, frame: pd.DataFrame
) -> float:
    """Compare PyTorch with the whole bundle, from encoded bytes to probabilities."""
    engine = Engine(bundle, threads=torch.get_num_threads())
    expected = _torch_probabilities(classifier, backbone, frame)
    actual = _engine_probabilities(engine, frame)
    return float(np.abs(expected - actual).max())


def _torch_probabilities(
    classifier: Classifier, backbone: Backbone, frame: pd.DataFrame
) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return np.concatenate(
            [
                classifier(torch.from_numpy(batch)).numpy()
                for batch in image_batches(frame, backbone.preprocessing, _BATCH)
            ]
        )


def _engine_probabilities(engine: Engine, frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    rows = []
    for start in range(0, len(frame), _BATCH):
        paths = frame["path"].iloc[start : start + _BATCH]
        for answer in engine.predict([Path(path).read_bytes() for path in paths]):
            if isinstance(answer, BadImageError):
                raise TrainingError(f"The bundle refuses a test image: {answer}")
            rows.append([answer.probabilities[label] for label in engine.labels])
    return np.asarray(rows)


def _configuration(run: Run, backbone: Backbone, graph_sha256: str) -> ModelConfig:
    record = run.record
    labels = record.labels
    synthetic = record.training_data.synthetic
    return ModelConfig(
        name=record.settings.name,
        version=record.settings.version,
        description=_description(labels, backbone.name, synthetic=synthetic),
        architecture=Architecture(
            backbone=backbone.name,
            weights=backbone.weights,
            features=backbone.features,
            head=f"standardised multinomial logistic regression, C = {record.head.c:.3g}, "
            "classes weighted equally, folded into one linear layer",
        ),
        labels=labels,
        preprocessing=record.preprocessing,
        thresholds=run.thresholds,
        graph=Graph(
            file=GRAPH_FILE,
            sha256=graph_sha256,
            opset=OPSET,
            input=TensorSpec(
                name=_INPUT, dtype="float32", shape=(-1, *record.preprocessing.item_shape)
            ),
            output=TensorSpec(name=_OUTPUT, dtype="float32", shape=(-1, len(labels))),
        ),
        intended_use=_intended_use(synthetic=synthetic),
        limitations=_limitations(run),
        training_data=record.training_data,
        metrics=run.metrics,
        versions=_versions(record.versions),
    )


def _versions(training: Mapping[str, str]) -> dict[str, str]:
    return dict(training) | {package: installed(package) for package in _PACKAGES}


def _description(labels: tuple[str, ...], backbone: str, *, synthetic: bool) -> str:
    images = "synthetic chest phantoms" if synthetic else "frontal chest radiographs"
    return (
        f"Classifies {images} as {', '.join(labels[:-1])} or {labels[-1]}: {backbone}, frozen, "
        "with a linear head."
    )


def _intended_use(*, synthetic: bool) -> str:
    if synthetic:
        return (
            "Trying and testing the serving platform. The model was trained on synthetic phantoms "
            "and knows nothing of real radiographs: its answer to one is meaningless. Not a "
            "medical device."
        )
    return (
        "Research on, and comparison of, classifiers of frontal (PA or AP) chest radiographs of "
        "adults. Research use only: not a medical device, and not for diagnosis, triage or any "
        "decision about a patient."
    )


def _limitations(run: Run) -> tuple[str, ...]:
    if run.record.training_data.synthetic:
        return (
            "Trained on synthetic phantoms: no answer about a real radiograph means anything.",
            "The metrics describe phantoms, which are far easier to tell apart than patients.",
        )
    return (
        "Research use only; not a medical device; not validated in any clinic.",
        "Made for frontal radiographs of adults: lateral views, children, CT slices and images "
        "of anything else get an answer too, and it means nothing.",
        *_confounding(run.frame),
        "Public labels are noisy; those of the NIH collection were mined from reports and not "
        "read again from the images.",
        "Metrics come from held-out patients of the same sources; expect worse at another "
        "hospital, and look at the metrics per source.",
        "Thresholds were chosen at the class frequencies of the training data, not of any clinic; "
        "probabilities are not calibrated risks.",
    )


def _confounding(frame: pd.DataFrame) -> tuple[str, ...]:
    """Name what the table of labels by source shows, on top of what no table shows."""
    table = pd.crosstab(frame["source"], frame["label"])
    single = [str(source) for source, row in table.iterrows() if (row > 0).sum() == 1]
    general = (
        "Source and class are confounded in public collections: the model may partly read scanner, "
        "hospital or file history where it should read the lung."
    )
    if not single:
        return (general,)
    return (
        general,
        f"All images of these sources have one and the same label: {', '.join(single)}.",
    )
