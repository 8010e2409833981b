"""Feature extraction over a manifest, with a cache on disk."""

import hashlib
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from tqdm import tqdm

from cxr.errors import BadImageError
from cxr.preprocess import Preprocessing, load_tensor
from cxr_training.backbones import Backbone
from cxr_training.errors import TrainingError

_DECODERS = 2
_AHEAD = 16
# Larger batches are slower on CPU: their activations exceed what the allocator keeps, and every
# layer's memory is fetched from the system anew.
_BATCH = 2


def load_image(path: Path, sha256: str, spec: Preprocessing) -> npt.NDArray[np.float32]:
    """Read one image of a manifest as the model's input tensor.

    Args:
        path: a JPEG or PNG file.
        sha256: its SHA-256 in the manifest, hexadecimal.
        spec: the backbone's preprocessing.

    Returns:
        float32, shape `spec.item_shape`.

    Raises:
        TrainingError: the file is missing, unusable, or no longer the one in the manifest.
    """
    try:
        data = path.read_bytes()
        tensor = load_tensor(data, spec)
    except OSError as error:
        raise TrainingError(f"Cannot read {path}: {error.strerror}.") from error
    except BadImageError as error:
        raise TrainingError(f"{path} cannot be used: {error}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise TrainingError(f"{path} has changed since its manifest was written; build it again.")
    return tensor


def image_batches(
    frame: pd.DataFrame, spec: Preprocessing, batch_size: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Input batches over a manifest, in its order; decoding runs ahead in a few threads.

    Args:
        frame: a manifest.
        spec: the backbone's preprocessing.
        batch_size: images in one batch; the last may be smaller.

    Yields:
        float32 `[N, *spec.item_shape]`.

    Raises:
        TrainingError: an image cannot be used.
    """
    tensors = _tensors(frame, spec)
    while batch := list(islice(tensors, batch_size)):
        yield np.stack(batch)


def _tensors(frame: pd.DataFrame, spec: Preprocessing) -> Iterator[npt.NDArray[np.float32]]:
    waiting: deque[Future[npt.NDArray[np.float32]]] = deque()
    with ThreadPoolExecutor(_DECODERS) as pool:
        try:
            for path, sha256 in zip(frame["path"], frame["sha256"], strict=True):
                waiting.append(pool.submit(load_image, Path(path), sha256, spec))
                if len(waiting) > _AHEAD:
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
) -> npt.NDArray[np.float32]:
    """Feature vectors of a manifest's images, in its order.

    Args:
        frame: a manifest.
        backbone: the frozen feature extractor.
        cache: folder that keeps each image's vector under the hash of its content and the
            backbone's fingerprint; `None` keeps nothing.
        batch_size: images in one forward pass.

    Returns:
        float32 `[images, backbone.feature_count]`.

    Raises:
        TrainingError: an image cannot be used.
    """
    found: dict[str, npt.NDArray[np.float32]] = {}
    if cache is not None:
        cache = cache / backbone.fingerprint
        found = _cached(cache, frame["sha256"], backbone.feature_count)
    # Copies of one image share one row here.
    missing = frame.drop_duplicates("sha256").loc[lambda rows: ~rows["sha256"].isin(found.keys())]
    for sha256, vector in zip(
        missing["sha256"], _computed(missing, backbone, batch_size), strict=True
    ):
        found[sha256] = vector
        if cache is not None:
            _store(_cache_file(cache, sha256), vector)
    if frame.empty:
        return np.empty((0, backbone.feature_count), dtype=np.float32)
    return np.stack([found[sha256] for sha256 in frame["sha256"]])


def _computed(
    frame: pd.DataFrame, backbone: Backbone, batch_size: int
) -> Iterator[npt.NDArray[np.float32]]:
    batches = image_batches(frame, backbone.preprocessing, batch_size)
    hidden = frame.empty or not sys.stderr.isatty()
    with tqdm(total=len(frame), desc="features", unit="image", disable=hidden) as progress:
        for batch in batches:
            with torch.inference_mode():
                images = torch.from_numpy(batch).contiguous(memory_format=torch.channels_last)
                vectors = backbone.module(images).numpy()
            progress.update(len(vectors))
            yield from vectors


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
