"""A faster graph for the same model, accepted only if it answers as well.

Candidates are made from the bundle's graph, run on the validation split beside it, image by image
in turn, and the fastest that passes the gate takes its place.
"""

import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pandas as pd
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from cxr.config import Candidate, Compilation, Guards, ModelConfig, file_sha256, load_config
from cxr.engine import CPU, CUDA, TENSORRT, Engine, new_session, usable_providers
from cxr.errors import Rejection
from cxr.mar import CARD_FILE, verify
from cxr_archive.packager import pack
from cxr_training.data import manifest_digest, read_manifest
from cxr_training.drift import with_reference, write_config
from cxr_training.errors import TrainingError
from cxr_training.features import image_tensors
from cxr_training.runs import staged

Float32Array = npt.NDArray[np.float32]

ORIGINAL, OPTIMIZED = "original", "optimized"
# Shares of the convolutions, from the input on, that stay in float32: the first ones see the grey
# values themselves, and every later feature inherits their error.
_FLOAT_SHARES = (0.0, 0.25, 0.5, 0.625, 0.75)
_QUANTIZED = ("Conv", "Clip", "Add")
_CALIBRATION_IMAGES = 48
_WARM_UP_RUNS = 3
_ROUNDING = 1e-9
_ERRORS_ONLY = 3
# A smaller gain is within the noise of its measurement.
_LEAST_SPEEDUP = 1.03


class _Way(NamedTuple):
    """How a graph may run: its file, ONNX Runtime's providers and what they may compute in."""

    graph: Path
    providers: tuple[str, ...] = (CPU,)
    float16: bool = False


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a graph may lose against the original, on the validation split.

    Attributes:
        accuracy: share of images, 0 to 1.
        difference: 95th percentile over the images of the largest change of a class probability.
        flags: share of images of which guards may come to say something else, 0 to 1.
    """

    accuracy: float = 0.005
    difference: float = 0.05
    flags: float = 0.01


def compile_bundle(
    source: Path, manifest: Path, out: Path, *, gate: Gate | None = None, tensorrt: bool = False
) -> Compilation:
    """Choose the fastest graph that passes the gate, and write bundle or archive with it.

    Args:
        source: a bundle folder or a `.mar`.
        manifest: the manifest that the model was trained on, with its splits: `manifest.parquet` of
            the run folder.
        out: the bundle folder to write, or an archive if its name ends in `.mar`.
        gate: what may be lost.
        tensorrt: try TensorRT in float32 and float16 instead, against CUDA; it builds its own
            engine from the original graph, where it serves, too.

    Returns:
        What was tried and chosen, as it stands in the written configuration.

    Raises:
        TrainingError: another manifest, no TensorRT here, or nothing to compile.
        ModelLoadError: the source is damaged or not one of ours.
        OSError: the result cannot be written.
    """
    if tensorrt and TENSORRT not in ort.get_available_providers():
        raise TrainingError(
            "ONNX Runtime has no TensorRT here; compile for it on a machine with a GPU and "
            "onnxruntime-gpu."
        )
    frame = read_manifest(manifest)
    with _as_bundle(source) as bundle, TemporaryDirectory() as temporary:
        config = load_config(bundle)
        if config.compilation is not None:
            raise TrainingError("This model is compiled already; compile the original.")
        _check_manifest(frame, config)
        work = Path(temporary)
        original = bundle / config.graph.file
        ways = _on_gpu(original) if tensorrt else _candidates(original, frame, config, work)
        validation = frame[frame["split"] == "validation"]
        trials = _trials(ways, validation, config)
        compilation = _judged(trials, ways, gate or Gate(), config)
        graph = ways[compilation.chosen].graph
        config = _with_limits(config, trials[compilation.chosen].limits).model_copy(
            update={
                "graph": config.graph.model_copy(update={"sha256": file_sha256(graph)}),
                "compilation": compilation,
            }
        )
        card = bundle / CARD_FILE
        text = card.read_text(encoding="utf-8") if card.is_file() else None
        _write(config, graph, text, validation, out)
    return compilation


@contextmanager
def _as_bundle(source: Path) -> Iterator[Path]:
    """The bundle itself, or the one inside an archive."""
    if source.is_dir():
        yield source
        return
    verify(source)
    with TemporaryDirectory() as folder, zipfile.ZipFile(source) as mar:
        mar.extractall(folder)  # its names and digests have just been checked
        yield Path(folder)


def _check_manifest(frame: pd.DataFrame, config: ModelConfig) -> None:
    data = config.training_data
    same = "split" in frame and manifest_digest(frame) == data.manifest_sha256
    # Other splits of the same images would let the gate judge on those of training.
    if same and data.splits_sha256 is not None:
        same = manifest_digest(frame, splits=True) == data.splits_sha256
    if not same:
        raise TrainingError(
            "This is not the manifest that the model was trained on, with its splits; give "
            "manifest.parquet of its run folder."
        )


def _on_gpu(graph: Path) -> dict[str, _Way]:
    """Ways by name: as it would run without TensorRT first."""
    return {
        ORIGINAL: _Way(graph, (CUDA, CPU)),
        "tensorrt-float32": _Way(graph, (TENSORRT, CUDA, CPU)),
        "tensorrt-float16": _Way(graph, (TENSORRT, CUDA, CPU), float16=True),
    }


def _candidates(
    graph: Path, frame: pd.DataFrame, config: ModelConfig, work: Path
) -> dict[str, _Way]:
    """Ways by name: the original first."""
    optimized = work / "optimized.onnx"
    # The switch of the heat maps is an input with a default, which ONNX Runtime warns of.
    ort.set_default_logger_severity(_ERRORS_ONLY)
    # What only one kind of processor could run is left to the loading.
    quant_pre_process(str(graph), str(optimized), skip_symbolic_shape=True)
    found = {ORIGINAL: _Way(graph), OPTIMIZED: _Way(optimized)}
    nodes = onnx.load(optimized).graph.node
    convolutions = [place for place, node in enumerate(nodes) if node.op_type == "Conv"]
    if not convolutions:
        return found
    training = frame[frame["split"] == "train"]
    training = training.sample(min(_CALIBRATION_IMAGES, len(training)), random_state=0)
    tensors = list(image_tensors(training, config.preprocessing))
    for share in _FLOAT_SHARES:
        first = convolutions[int(share * len(convolutions))]
        name = f"int8-{share:g}"
        found[name] = _Way(work / f"{name}.onnx")
        quantize_static(
            str(optimized),
            str(found[name].graph),
            _Images(config.graph.input.name, tensors),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTIZED),
            nodes_to_exclude=[node.name for node in nodes[:first]],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Without it, processors that lack VNNI add products of eight bits in sixteen, and
            # saturate.
            reduce_range=True,
        )
    return found


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Calibration images, one by one."""

    def __init__(self, name: str, tensors: Sequence[Float32Array]) -> None:
        self._name = name
        self._rest = iter(tensors)

    def get_next(self) -> dict[str, Float32Array] | None:
        """The next input by name; `None` at the end."""
        tensor = next(self._rest, None)
        return None if tensor is None else {self._name: tensor[None]}


@dataclass(frozen=True)
class _Trial:
    """One graph on the validation split.

    Attributes:
        right: per image, whether its most probable class is the true one.
        labels: per image, number of the most probable class.
        differences: per image, the largest change of a probability against the original.
        seconds: processor time of each image.
        limits: of the scores that the graph gives its guards, moved as these scores are; empty
            where there are no guards.
        flags: per image and score, whether it lies above its limit.
    """

    right: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    differences: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]
    limits: Mapping[Rejection, float]
    flags: npt.NDArray[np.bool_]


def _trials(
    ways: Mapping[str, _Way], validation: pd.DataFrame, config: ModelConfig
) -> dict[str, _Trial]:
    """Every graph on every image, in turn, so that a slow spell of the machine meets all."""
    sessions = {name: _session(way) for name, way in ways.items()}
    # ONNX Runtime offers it wherever it was built with it, and goes on without what it cannot load.
    for name, way in ways.items():
        if way.providers[0] not in sessions[name].get_providers():
            raise TrainingError(
                "ONNX Runtime cannot use TensorRT here; it needs a GPU, its driver and the "
                "libraries of CUDA and of the version of TensorRT that it was built with."
            )
    expected = {output.name for output in sessions[ORIGINAL].get_outputs()}
    for name, session in sessions.items():
        if {output.name for output in session.get_outputs()} != expected:
            raise TrainingError(f"The graph {name} lost an output of the original.")
    # On the CPU the calling thread does all the work, and its own time is free of the decoders'.
    on_cpu = all(way.providers == (CPU,) for way in ways.values())
    clock = time.thread_time if on_cpu else time.perf_counter
    outputs = [config.graph.output.name]
    if config.guards is not None:
        outputs.append(config.guards.output.name)
    probabilities: dict[str, list[Float32Array]] = {name: [] for name in ways}
    scores: dict[str, list[Float32Array]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index, tensor in enumerate(image_tensors(validation, config.preprocessing)):
        fed = {config.graph.input.name: tensor[None]}
        for name, session in sessions.items():
            if index == 0:
                _warm_up(name, session, fed)
            start = clock()
            row, *judged = session.run(outputs, fed)
            seconds[name].append(clock() - start)
            probabilities[name].append(np.asarray(row[0]))
            scores[name] += [np.asarray(found[0]) for found in judged]
    truth = np.asarray([config.labels.index(label) for label in validation["label"]])
    original = np.asarray(probabilities[ORIGINAL], dtype=np.float64)
    trials = {}
    for name, rows in probabilities.items():
        found = np.asarray(rows, dtype=np.float64)
        labels = found.argmax(axis=1)
        trials[name] = _Trial(
            labels == truth,
            labels,
            np.abs(found - original).max(axis=1),
            np.asarray(seconds[name]),
            *_guarded(scores[name], scores[ORIGINAL], config.guards),
        )
    return trials


def _warm_up(name: str, session: ort.InferenceSession, fed: Mapping[str, Float32Array]) -> None:
    """Run a graph for the first time, when TensorRT builds its engine."""
    try:
        for _ in range(_WARM_UP_RUNS):
            session.run(None, fed)
    except Exception as error:  # ONNX Runtime's exception types are not public
        raise TrainingError(f"ONNX Runtime cannot run {name} here: {error}") from error


def _guarded(
    scores: Sequence[Float32Array], original: Sequence[Float32Array], guards: Guards | None
) -> tuple[Mapping[Rejection, float], npt.NDArray[np.bool_]]:
    """A graph's limits, moved by the median change of each score, and what lies above them.

    Coarser arithmetic takes all images alike a little away from the training images, so that the
    limits of the original would flag too many.
    """
    if guards is None:
        return {}, np.zeros((len(scores), 0), dtype=np.bool_)
    found = np.asarray(scores, dtype=np.float64)
    moves = np.median(found - np.asarray(original, dtype=np.float64), axis=0)
    limits = np.asarray([guards.limits[reason] for reason in guards.scores]) + moves
    return dict(zip(guards.scores, limits.tolist(), strict=True)), found > limits


def _session(way: _Way) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    providers = usable_providers(way.providers, float16=way.float16)
    return new_session(str(way.graph), options, providers)


def _judged(
    trials: Mapping[str, _Trial], ways: Mapping[str, _Way], gate: Gate, config: ModelConfig
) -> Compilation:
    original = trials[ORIGINAL]
    candidates = tuple(_figures(name, trial, original, gate) for name, trial in trials.items())
    faster = [one for one in candidates if one.passed and one.speedup >= _LEAST_SPEEDUP]
    best = max(faster, key=lambda one: one.speedup, default=candidates[0])
    way = ways[best.name]
    return Compilation(
        chosen=best.name,
        source_sha256=config.graph.sha256,
        images=len(original.right),
        accuracy_limit=gate.accuracy,
        difference_limit=gate.difference,
        flags_limit=None if config.guards is None else gate.flags,
        candidates=candidates,
        execution_provider=TENSORRT if way.providers[0] == TENSORRT else None,
        precision="float16" if way.float16 else None,
        onnxruntime=ort.__version__,
    )


def _figures(name: str, trial: _Trial, original: _Trial, gate: Gate) -> Candidate:
    lost = float(original.right.mean() - trial.right.mean())
    # A probability that is no number is as far off as one can be, and is refused by any gate; so is
    # a score, whose median has moved its limit.
    sound = np.isfinite([*trial.differences, *trial.limits.values()]).all()
    differences = np.nan_to_num(trial.differences, nan=1.0, posinf=1.0)
    difference = float(np.quantile(differences, 0.95))
    flags = (trial.flags != original.flags).any(axis=1)
    return Candidate(
        name=name,
        accuracy=float(trial.right.mean()),
        labels_changed=int((trial.labels != original.labels).sum()),
        difference_p95=difference,
        difference_max=float(differences.max()),
        milliseconds=float(np.median(trial.seconds)) * 1e3,
        speedup=float(np.median(original.seconds) / np.median(trial.seconds)),
        flags_changed=int(flags.sum()) if trial.limits else None,
        passed=bool(
            sound
            and lost <= gate.accuracy + _ROUNDING
            and difference <= gate.difference
            and flags.mean() <= gate.flags + _ROUNDING
        ),
    )


def _with_limits(config: ModelConfig, limits: Mapping[Rejection, float]) -> ModelConfig:
    if config.guards is None:
        return config
    guards = config.guards.model_copy(update={"limits": {**config.guards.limits, **limits}})
    return config.model_copy(update={"guards": guards})


def _write(
    config: ModelConfig, graph: Path, card: str | None, validation: pd.DataFrame, out: Path
) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bundle"
        target = folder if out.suffix == ".mar" else out
        if target is out and out.exists() and not out.is_dir():
            raise TrainingError(f"{out} is a file; a bundle is written to a folder.")
        with staged(target, optional=(CARD_FILE,)) as files:
            shutil.copyfile(graph, files / config.graph.file)
            if card is not None and config.compilation is not None:
                text = card + _card_section(config.compilation)
                (files / CARD_FILE).write_text(text, encoding="utf-8")
            write_config(config, files)
            if config.reference is not None:
                write_config(with_reference(config, Engine(files), validation), files)
        if out.suffix == ".mar":
            pack(folder, out)


def _card_section(compilation: Compilation) -> str:
    chosen = compilation.choice
    return (
        f"\n## Compilation\n\nThe graph was compiled (`{chosen.name}`). The figures above are the "
        f"original's. On {compilation.images} images of the validation split, its accuracy is "
        f"{chosen.accuracy:.3f} (original {compilation.candidates[0].accuracy:.3f}); "
        f"{chosen.labels_changed} labels changed, and probabilities by up to "
        f"{chosen.difference_max:.3f} (95th percentile {chosen.difference_p95:.3f})."
        + (
            ""
            if chosen.flags_changed is None
            else f" Of {chosen.flags_changed} images guards say something else, with limits that "
            "were moved as their scores are."
        )
        + "\n"
    )
