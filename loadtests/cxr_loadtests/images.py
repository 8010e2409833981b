"""The images that are sent: phantoms, or a folder's, in the sizes and formats of the profile."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.profile import ImageFormat, ImageKind

_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
# Standard deviation of the noise that an enlarged phantom gets, in grey levels of 255: without it,
# its files would be far smaller than a radiograph's.
_NOISE = 2.5
_DICOM_BITS = 12


@dataclass(frozen=True)
class Sample:
    """One encoded image.

    Attributes:
        kind: place in the profile's list of kinds.
        format: its encoding.
        data: the file.
    """

    kind: int
    format: ImageFormat
    data: bytes


def make_samples(kinds: Sequence[ImageKind], folder: Path | None, seed: int) -> list[Sample]:
    """The images of a run.

    Args:
        kinds: what the profile asks for.
        folder: images to make them of, of any size; without it, phantoms are drawn, which needs
            the extra `training`.
        seed: of the noise and the phantoms.

    Raises:
        LoadTestError: no image in the folder, or phantoms cannot be drawn.
    """
    with tempfile.TemporaryDirectory() as drawn:
        sources = _files(folder or _draw(Path(drawn) / "phantoms", seed))
        samples: list[Sample] = []
        random = np.random.default_rng(seed)
        for number, kind in enumerate(kinds):
            for _ in range(kind.count):
                pixels = _resized(sources[len(samples) % len(sources)], kind.height)
                noisy = pixels + random.normal(0, _NOISE, pixels.shape)
                samples.append(Sample(number, kind.format, _encoded(noisy.clip(0, 255), kind)))
    return samples


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise LoadTestError(f"There are no PNG, JPEG or TIFF files in {folder}.")
    return found


def _draw(folder: Path, seed: int) -> Path:
    """Phantoms, drawn by the command that draws those of the demo."""
    command = [sys.executable, "-c", "from cxr.cli import main; main()", "data", "phantoms"]
    options = ["--patients-per-class", "2", "--seed", str(seed)]
    done = subprocess.run(
        [*command, str(folder), *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LoadTestError(
            "Phantoms cannot be drawn; name a folder of images with --images, or install "
            'cxr-serve[training]. "cxr data phantoms" said: '
            f"{(done.stderr.strip().splitlines() or ['nothing'])[-1]}"
        )
    return folder


def _resized(path: Path, height: int) -> npt.NDArray[np.float64]:
    """Grey levels of 0 to 255, `[height, width]`."""
    try:
        with Image.open(path) as image:
            width = max(1, round(image.width * height / image.height))
            grey = image.convert("L").resize((width, height), Image.Resampling.BICUBIC)
    except (OSError, Image.DecompressionBombError) as error:
        raise LoadTestError(f"Cannot read {path.name} in the folder of images.") from error
    return np.asarray(grey, dtype=np.float64)


def _encoded(pixels: npt.NDArray[np.float64], kind: ImageKind) -> bytes:
    if kind.format == "dicom":
        return _dicom(pixels)
    buffer = BytesIO()
    image = Image.fromarray(pixels.round().astype(np.uint8))
    if kind.format == "jpeg":
        image.save(buffer, "JPEG", quality=kind.quality)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _dicom(pixels: npt.NDArray[np.float64]) -> bytes:
    """A file as a computed radiography unit writes it: 12 bits in 16, uncompressed, of nobody."""
    from pydicom.dataset import Dataset, FileMetaDataset  # noqa: PLC0415 - only where it is needed
    from pydicom.uid import (  # noqa: PLC0415
        ComputedRadiographyImageStorage,
        ExplicitVRLittleEndian,
        generate_uid,
    )

    stored = (pixels / 255 * (2**_DICOM_BITS - 1)).round().astype("<u2")
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality = "CR"
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = "PA"
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.SamplesPerPixel = 1
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated = 16
    dataset.BitsStored = _DICOM_BITS
    dataset.HighBit = _DICOM_BITS - 1
    dataset.PixelRepresentation = 0
    dataset.WindowCenter = 2 ** (_DICOM_BITS - 1)
    dataset.WindowWidth = 2**_DICOM_BITS
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
