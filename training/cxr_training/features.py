"""Feature extraction over a manifest, with a cache on disk."""

import hashlib
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pandas as pd
import PIL
import torch
from tqdm import tqdm

from cxr.decode import DEFAULT_LIMITS, decode
from cxr.engine import CPU
from cxr.errors import BadImageError
from cxr.preprocess import REVISION, Preprocessing, load_tensor, preprocess
from cxr_training.augment import Augmentation, augment
from cxr_training.backbones import Backbone
from cxr_training.errors import TrainingError
from cxr_training.torch_export import IMAGE, exported

_DECODERS = 2
_AHEAD = 16
# Larger batches are slower on CPU: their activations exceed what the allocator keeps, and every
# layer's memory is fetched from the system anew.
_BATCH = 2
# Through ONNX Runtime an image takes a third of the time that it takes PyTorch's CPU kernels; but
# making its graph takes as long as some forty images.
_WORTH_A_GRAPH = 100
# What decodes and resizes; the backbone's fingerprint holds the settings alone.
_MADE_BY = f"preprocessing-{REVISION}-pillow-{PIL.__version__}"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Network:
    """What computes features.

    Attributes:
        run: of a batch float32 `[N, *item_shape]`, its vectors float32 `[N, features]`.
        at_once: batches that it computes at the same time, each on a thread of its own.
    """

    run: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    at_once: int = 1

    def each(self, batches: Iterable[npt.NDArray[np.float32]]) -> Iterator[npt.NDArray[np.float32]]:
        """The vectors of each batch, in order."""
        return _ahead(self.run, batches, threads=self.at_once, ahead=self.at_once)


@dataclass(frozen=True)
class Variation:
    """One random change of every image.

    Attributes:
        settings: the largest changes.
        draw: which one; with the image's content it fixes what is drawn.
    """

    settings: Augmentation
    draw: tuple[int, ...]

    @property
    def key(self) -> str:
        """Names the variation in the cache: equal keys give equal images."""
        return hashlib.sha256(f"{asdict(self.settings)}{self.draw}".encode()).hexdigest()


def load_image(
    path: Path, sha256: str, spec: Preprocessing, variation: Variation | None = None
) -> npt.NDArray[np.float32]:
    """Read one image of a manifest as the model's input tensor.

    Args:
        path: a JPEG or PNG file.
        sha256: its SHA-256 in the manifest, hexadecimal.
        spec: the backbone's preprocessing.
        variation: a random change of the decoded image; `None` leaves it as it is.

    Returns:
        float32, shape `spec.item_shape`.

    Raises:
        TrainingError: the file is missing, unusable, or no longer the one in the manifest.
    """
    try:
        data = path.read_bytes()
        if variation is None:
            tensor = load_tensor(data, spec)
        else:
            generator = np.random.default_rng([int(sha256, 16), *variation.draw])
            image = augment(decode(data, DEFAULT_LIMITS, spec.draft), variation.settings, generator)
            tensor = preprocess(image, spec)
    except OSError as error:
        raise TrainingError(f"Cannot read {path}: {error.strerror}.") from error
    except BadImageError as error:
        raise TrainingError(f"{path} cannot be used: {error}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise TrainingError(f"{path} has changed since its manifest was written; build it again.")
    return tensor


def image_batches(
    frame: pd.DataFrame,
    spec: Preprocessing,
    batch_size: int,
    variation: Variation | None = None,
) -> Iterator[npt.NDArray[np.float32]]:
    """Input batches over a manifest, in its order; decoding runs ahead in a few threads.

    Args:
        frame: a manifest.
        spec: the backbone's preprocessing.
        batch_size: images in one batch; the last may be smaller.
        variation: a random change of each image.

    Yields:
        float32 `[N, *spec.item_shape]`.

    Raises:
        TrainingError: an image cannot be used.
    """
    tensors = image_tensors(frame, spec, variation)
    while batch := list(islice(tensors, batch_size)):
        yield np.stack(batch)


def image_tensors(
    frame: pd.DataFrame, spec: Preprocessing, variation: Variation | None = None
) -> Iterator[npt.NDArray[np.float32]]:
    """Input tensors of a manifest's images, one by one; see :func:`image_batches`."""

    def load(row: tuple[str, str]) -> npt.NDArray[np.float32]:
        return load_image(Path(row[0]), row[1], spec, variation)

    rows = zip(frame["path"], frame["sha256"], strict=True)
    return _ahead(load, rows, threads=_DECODERS, ahead=_AHEAD)


def _ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int, ahead: int
) -> Iterator[_Result]:
    """What a function makes of each item, in order; threads work on so many of the next ones."""
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def extract_features(
    frame: pd.DataFrame,
    backbone: Backbone,
    *,
    cache: Path | None = None,
    batch_size: int = _BATCH,
    variation: Variation | None = None,
    torch_only: bool = False,
) -> npt.NDArray[np.float32]:
    """Feature vectors of a manifest's images, in its order.

    Args:
        frame: a manifest.
        backbone: the frozen feature extractor; of several, each one's features are kept.
        cache: folder that keeps each image's vector under the hash of its content, the backbone's
            fingerprint, the revision of preprocessing, Pillow's version and the variation; `None`
            keeps nothing.
        batch_size: images in one forward pass.
        variation: a random change of each image before its features are taken.
        torch_only: leave all of it to PyTorch. Otherwise, without a GPU, ONNX Runtime computes
            what is worth making its graph; the two differ by some 1e-6 of a feature.

    Returns:
        float32 `[images, backbone.feature_count]`.

    Raises:
        TrainingError: an image cannot be used.
    """
    if backbone.members:
        return np.concatenate(
            [
                extract_features(
                    frame,
                    member,
                    cache=cache,
                    batch_size=batch_size,
                    variation=variation,
                    torch_only=torch_only,
                )
                for member in backbone.members
            ],
            axis=1,
        )
    found: dict[str, npt.NDArray[np.float32]] = {}
    if cache is not None:
        cache = cache / backbone.fingerprint / _MADE_BY / (variation.key if variation else "")
        found = _cached(cache, frame["sha256"], backbone.feature_count)
    # Copies of one image share one row here.
    distinct = frame.drop_duplicates("sha256")
    missing = distinct[~distinct["sha256"].isin(found.keys())]
    if not missing.empty:
        # By all images, so that what a cache already holds does not change who computes the rest.
        network = (
            _torch_network(backbone) if torch_only else feature_network(backbone, len(distinct))
        )
        vectors = _computed(missing, backbone.preprocessing, network, batch_size, variation)
        for sha256, vector in zip(missing["sha256"], vectors, strict=True):
            found[sha256] = vector
            if cache is not None:
                _store(_cache_file(cache, sha256), vector)
    if frame.empty:
        return np.empty((0, backbone.feature_count), dtype=np.float32)
    return np.stack([found[sha256] for sha256 in frame["sha256"]])


def _computed(
    frame: pd.DataFrame,
    spec: Preprocessing,
    network: Network,
    batch_size: int,
    variation: Variation | None,
) -> Iterator[npt.NDArray[np.float32]]:
    batches = image_batches(frame, spec, batch_size, variation)
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(frame), desc="features", unit="image", disable=hidden) as progress:
        for vectors in network.each(batches):
            progress.update(len(vectors))
            yield from vectors


def feature_network(backbone: Backbone, images: int) -> Network:
    """What computes features fastest here.

    Args:
        backbone: the feature extractor.
        images: about how many there will be.
    """
    if torch.cuda.is_available() or images < _WORTH_A_GRAPH:
        return _torch_network(backbone)
    return _onnx_network(backbone)


def _torch_network(backbone: Backbone) -> Network:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = backbone.module.to(device)

    def run(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        # In full float32: by TF32, a GPU's default, features would differ from those in serving.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            images = torch.from_numpy(batch).to(device, memory_format=torch.channels_last)
            return np.asarray(module(images).cpu().numpy())

    return Network(run)


def _onnx_network(backbone: Backbone) -> Network:
    model = exported(backbone.module, backbone.preprocessing.item_shape, ["features"])
    options = ort.SessionOptions()
    # One image on each core, not all cores on one image: that takes half the processors' time.
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    return Network(
        lambda batch: np.asarray(session.run(None, {IMAGE: batch})[0]), torch.get_num_threads()
    )


def _cache_file(cache: Path, sha256: str) -> Path:
    return cache / sha256[:2] / f"{sha256}.npy"


def _cached(
    cache: Path, hashes: "pd.Series[str]", feature_count: int
) -> dict[str, npt.NDArray[np.float32]]:
    found = {}
    for sha256 in hashes:
        try:
            vector = np.load(_cache_file(cache, sha256))
        except (OSError, ValueError):  # absent or damaged: it is computed again
            continue
        if vector.shape == (feature_count,):
            found[sha256] = vector
    return found


def _store(file: Path, vector: npt.NDArray[np.float32]) -> None:
    """Write by rename, so that no reader ever sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
        np.save(temporary, vector)
    Path(temporary.name).replace(file)
