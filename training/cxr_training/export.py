"""Run folder to bundle: one ONNX graph and the configuration that serving reads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pandas as pd
import torch
from onnx import TensorProto, helper
from torch import Tensor

from cxr.config import (
    Architecture,
    Calibration,
    ExplanationOutput,
    Graph,
    ModelConfig,
    TensorSpec,
    file_sha256,
)
from cxr.config import Guards as GuardConfig
from cxr.engine import Engine
from cxr.errors import BadImageError, Rejection
from cxr.mar import CARD_FILE
from cxr_training.backbones import Backbone, Pooled
from cxr_training.card import (
    CardFacts,
    card_facts,
    intended_use,
    limitations,
    model_card,
    parted_groups,
    unknown_patients,
)
from cxr_training.drift import with_reference, write_config
from cxr_training.errors import TrainingError
from cxr_training.explanation import EVIDENCE, EXPLAIN, NamedMap, add_evidence, grid, method
from cxr_training.features import extract_features
from cxr_training.guards import Guards
from cxr_training.guards.fit import SCORES
from cxr_training.heads import Head, describe
from cxr_training.heads.graph import (
    FEATURES,
    ML_OPSET,
    OPSET,
    PROBABILITIES,
    GraphBuilder,
    nodes_of,
)
from cxr_training.runs import Run, load_run, staged
from cxr_training.thresholds import THRESHOLD_RULE
from cxr_training.torch_export import IMAGE, exported

GRAPH_FILE = "model.onnx"
PARITY_TOLERANCE = 1e-4
# Of a head that makes steps: share of images that must agree, and how far the others may differ.
STEP_SHARE = 0.9
STEP_TOLERANCE = 0.05
PARITY_IMAGES = 64

QUALITY = "quality"
_BATCH = 8
_PACKAGES = ("onnx", "skl2onnx")


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
    facts = card_facts(run) if isinstance(run, Path) else CardFacts()
    run = load_run(run) if isinstance(run, Path) else run
    facts = replace(facts, parted=parted_groups(run.frame), unknown=unknown_patients(run.frame))
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; a bundle is written to a folder.")
    if run.record.settings.tabular:
        raise TrainingError(
            "This run has age, sex and view as inputs, which serving does not get; it is for "
            "measuring only and cannot be exported."
        )
    backbone = run.backbone()
    frame = _parity_rows(run)
    with staged(out) as folder:
        graph = folder / GRAPH_FILE
        graph.write_bytes(
            build_graph(backbone, run.head, run.guards).SerializeToString(deterministic=True)
        )
        config = _configuration(run, backbone, file_sha256(graph))
        write_config(config, folder)
        engine = Engine(folder, threads=torch.get_num_threads())
        differences = _differences(backbone, run.head, engine, frame)
        _check_parity(differences, smooth=run.head.smooth)
        config = with_reference(config, engine, run.rows("validation"))
        write_config(config, folder)
        (folder / CARD_FILE).write_text(model_card(config, facts), encoding="utf-8")
    difference = float(differences.max())
    return ExportReport(config=config, parity_images=len(frame), max_difference=difference)


def _parity_rows(run: Run) -> pd.DataFrame:
    test = run.rows("test")
    return test.sample(n=min(PARITY_IMAGES, len(test)), random_state=run.record.settings.seed)


def build_graph(backbone: Backbone, head: Head, guards: Guards | None = None) -> onnx.ModelProto:
    """The whole model as one ONNX graph, from preprocessed image to probabilities.

    Args:
        backbone: the feature extractor.
        head: a head on its features.
        guards: on its features too.
    """
    model, maps = _features_graph(backbone)
    graph = model.graph
    builder = GraphBuilder()
    probabilities = head.add_to(builder, FEATURES)
    graph.node.extend(builder.nodes)
    graph.node.append(helper.make_node("Identity", [probabilities], [PROBABILITIES]))
    graph.initializer.extend(builder.constants)
    del graph.output[:]
    shape: list[str | int | None] = ["batch", len(head.labels)]
    graph.output.append(helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, shape))
    if guards is not None:
        _add_scores(graph, guards)
    add_evidence(
        graph,
        maps,
        head,
        features=FEATURES,
        feature_count=backbone.feature_count,
        probabilities=PROBABILITIES,
    )
    model.producer_name = "cxr-serve"
    # A domain that no node uses would be one more thing that a runtime must know.
    domains = {node.domain for node in nodes_of(graph)}
    versions = {"": OPSET} | ({"ai.onnx.ml": ML_OPSET} if "ai.onnx.ml" in domains else {})
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*pair) for pair in sorted(versions.items()))
    onnx.checker.check_model(model, full_check=True)
    return model


def _add_scores(graph: onnx.GraphProto, guards: Guards) -> None:
    builder = GraphBuilder("guards")
    scores = guards.add_to(builder, FEATURES)
    graph.node.extend(builder.nodes)
    graph.node.append(helper.make_node("Identity", [scores], [QUALITY]))
    graph.initializer.extend(builder.constants)
    shape: list[str | int | None] = ["batch", len(SCORES)]
    graph.output.append(helper.make_tensor_value_info(QUALITY, TensorProto.FLOAT, shape))


class _Maps(torch.nn.Module):
    """A feature extractor that gives its feature maps too."""

    def __init__(self, module: Pooled) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features, maps = self.module.pooled(image)
        return features, *(x for x, _ in maps)


def _features_graph(backbone: Backbone) -> tuple[onnx.ModelProto, list[NamedMap]]:
    maps = [NamedMap(f"map_{number}", pooling) for number, pooling in enumerate(backbone.maps)]
    model = exported(
        _Maps(backbone.module).eval(),
        backbone.preprocessing.item_shape,
        [FEATURES, *(item.name for item in maps)],
    )
    return model, maps


def _differences(
    backbone: Backbone, head: Head, engine: Engine, frame: pd.DataFrame
) -> npt.NDArray[np.float64]:
    """Each image's largest difference between PyTorch and the whole bundle, from encoded bytes."""
    expected = _torch_probabilities(backbone, head, frame)
    return np.asarray(np.abs(expected - _engine_probabilities(engine, frame)).max(axis=1))


def _check_parity(differences: npt.NDArray[np.float64], *, smooth: bool) -> None:
    """Refuse a bundle that answers otherwise than PyTorch.

    Trees make steps: where a feature lies within rounding of one, the two runtimes may take
    different sides. So for them a few images may differ, and by no more than a few trees' votes.
    """
    near = differences <= PARITY_TOLERANCE  # false for NaN
    stepped = not smooth and near.mean() >= STEP_SHARE and differences.max() <= STEP_TOLERANCE
    if not (near.all() or stepped):
        raise TrainingError(
            f"ONNX Runtime differs from PyTorch by up to {differences.max():.1e} in probability on "
            f"{len(differences)} test images; at most {PARITY_TOLERANCE:g} is accepted. "
            "No bundle was written."
        )


def _torch_probabilities(
    backbone: Backbone, head: Head, frame: pd.DataFrame
) -> npt.NDArray[np.float64]:
    return head.predict_proba(extract_features(frame, backbone, torch_only=True))


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
        description=_description(run, synthetic=synthetic),
        architecture=Architecture(
            backbone=backbone.name,
            weights=backbone.weights,
            features=backbone.features,
            head=_head_in_words(run),
        ),
        labels=labels,
        preprocessing=record.preprocessing,
        thresholds=run.thresholds,
        uncertain=record.uncertain,
        calibration=_calibration(run),
        graph=Graph(
            file=GRAPH_FILE,
            sha256=graph_sha256,
            opset=OPSET,
            input=TensorSpec(
                name=IMAGE, dtype="float32", shape=(-1, *record.preprocessing.item_shape)
            ),
            output=TensorSpec(name=PROBABILITIES, dtype="float32", shape=(-1, len(labels))),
        ),
        explanation=ExplanationOutput(
            switch=EXPLAIN,
            output=TensorSpec(
                name=EVIDENCE,
                dtype="float32",
                shape=(-1, len(labels), *2 * (grid(run.head, backbone.feature_count),)),
            ),
            method=method(run.head, backbone.feature_count),
        ),
        guards=_guards(run.guards),
        intended_use=intended_use(synthetic=synthetic),
        limitations=limitations(run),
        training_data=record.training_data,
        metrics=run.metrics,
        versions=_versions(record.versions),
    )


def _guards(guards: Guards | None) -> GuardConfig | None:
    if guards is None:
        return None
    return GuardConfig(
        output=TensorSpec(name=QUALITY, dtype="float32", shape=(-1, len(SCORES))),
        scores=SCORES,
        limits={Rejection(reason): limit for reason, limit in guards.limits.items()},
        passed=guards.passed,
        detected={Rejection(reason): share for reason, share in guards.detected.items()},
    )


def _calibration(run: Run) -> Calibration | None:
    if run.record.settings.recipe.calibration == "none":
        return None
    head = run.record.head
    return Calibration(
        method="temperature",
        temperature=head.temperature,
        log_loss_before=head.log_loss_before,
        log_loss_after=head.log_loss_after,
        threshold_rule=THRESHOLD_RULE,
    )


def _versions(training: Mapping[str, str]) -> dict[str, str]:
    # Its package may have another name: onnxruntime-gpu.
    engine = {"onnxruntime": ort.__version__}
    return dict(training) | {package: installed(package) for package in _PACKAGES} | engine


def _description(run: Run, *, synthetic: bool) -> str:
    images = "synthetic chest phantoms" if synthetic else "frontal chest radiographs"
    labels, recipe = run.record.labels, run.record.settings.recipe
    networks = " and ".join(backbone.name for backbone in recipe.backbones)
    how = "fine-tuned" if recipe.finetune else "frozen"
    return (
        f"Classifies {images} as {', '.join(labels[:-1])} or {labels[-1]}: {networks}, {how}; "
        f"recipe {recipe.name}."
    )


_COUNTED = {
    "none": "images weighted equally",
    "class": "classes weighted equally",
    "label-source": "classes weighted equally, and within each its sources",
}


def _head_in_words(run: Run) -> str:
    chosen, recipe = run.record.head, run.record.settings.recipe
    parameters = [f"{name} = {value:.3g}" for name, value in chosen.parameters.items()]
    each = ["one for each network, averaged"] if recipe.head_per_backbone else []
    members = getattr(recipe.head, "members", ())
    return ", ".join([describe(chosen.kind, members), *each, *parameters, _COUNTED[recipe.balance]])
