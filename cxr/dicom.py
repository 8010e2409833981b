"""One chest radiograph in a DICOM file, to grey pixels.

pydicom is optional and imported on first use: an archive also runs in a TorchServe without it, and
then refuses DICOM files. Of a file only the tags in `_TAGS` are parsed; none of them says who the
patient is.
"""

import logging
import os
import subprocess
import sys
import warnings
from functools import cache
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr.errors import BadImageError, Rejection, too_many_pixels

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

_PREAMBLE = 128
_MAGIC = b"DICM"
_META_GROUP = 0x0002

# Projection radiographs, as files: computed, digital, and digitised film.
RADIOGRAPHS = ("CR", "DX", "RG")
# What else is named in an answer. Other values are not: a field of a file can hold anything.
_MODALITIES = {
    "CT": "computed tomography",
    "IO": "an intra-oral radiograph",
    "MG": "mammography",
    "MR": "magnetic resonance",
    "NM": "nuclear medicine",
    "OT": "another modality (OT)",
    "PT": "positron emission tomography",
    "PX": "a panoramic radiograph",
    "RF": "fluoroscopy",
    "RTDOSE": "a radiotherapy dose",
    "RTIMAGE": "a radiotherapy image",
    "RTPLAN": "a radiotherapy plan",
    "SEG": "a segmentation",
    "SR": "a report",
    "US": "ultrasound",
    "XA": "angiography",
}
# A body part that contains one of these is the chest, in the languages that devices are set to.
_CHEST = ("CHEST", "LUNG", "THORA", "TORAX", "TORAC")
_BODY_PARTS = (
    "ABDOMEN", "ANKLE", "ARM", "BREAST", "CLAVICLE", "CSPINE", "ELBOW", "EXTREMITY", "FEMUR",
    "FINGER", "FOOT", "FOREARM", "HAND", "HEAD", "HIP", "HUMERUS", "JAW", "KNEE", "LEG", "LSPINE",
    "NECK", "PELVIS", "RIB", "SHOULDER", "SKULL", "SPINE", "STERNUM", "TSPINE", "WRIST",
)  # fmt: skip

# Views from the side or aslant, as the standard (PS3.3, View Position) and devices name them.
_NOT_FRONTAL = ("LL", "RL", "LLO", "RLO", "LAT", "LATERAL")

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_BITS_ALLOCATED = (8, 16)
_WHITE = 255
# How a stream of JPEG or JPEG-LS begins; the other streams are JPEG 2000.
_JPEG = b"\xff\xd8"
# The first box of a JP2 file, and the boxes before its stream at most; usually there are two.
_JP2 = b"\x00\x00\x00\x0cjP  "
_MOST_BOXES = 100

# GDCM decodes what no other plugin does, lossless JPEG and JPEG-LS, but ends the process on many
# damaged streams. So it gets a process of its own, which reads the file from its standard input.
_ABORTING = "gdcm"
_APART_SECONDS = 60
_DECODE_APART = """
import sys
import gdcm
reader = gdcm.ImageReader()
reader.SetFileName("/proc/self/fd/0")
if not reader.Read():
    sys.exit(1)
sys.stdout.buffer.write(reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape"))
"""

_TAGS: list[int | str] = [
    "Modality", "BodyPartExamined", "AnatomicRegionSequence", "ViewPosition", "NumberOfFrames",
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData",
]  # fmt: skip


def is_dicom(data: bytes | bytearray | memoryview) -> bool:
    """Whether the data says that it is a DICOM file (PS3.10)."""
    return bytes(data[_PREAMBLE : _PREAMBLE + len(_MAGIC)]) == _MAGIC


def read_tags(stream: BinaryIO, tags: list[int | str]) -> "Dataset":
    """Parse some of a DICOM file's tags, named by keyword, and its file meta group.

    Raises:
        BadImageError: pydicom is missing, the file is compressed as a whole, or it is damaged.
    """
    pydicom = _pydicom()
    try:
        stream.seek(_PREAMBLE + len(_MAGIC))
        meta = pydicom.filereader.read_dataset(
            stream, is_implicit_VR=False, is_little_endian=True,
            stop_when=lambda tag, *_: tag.group != _META_GROUP,
        )  # fmt: skip
        deflated = meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian
        if not deflated:
            stream.seek(0)
            dataset: Dataset = pydicom.dcmread(stream, specific_tags=tags)
            return dataset
    except MemoryError:
        raise
    except Exception:  # a hostile file can raise anything; all of it is bad input
        raise _damaged() from None
    # pydicom would inflate it whole before anything about its size is known.
    raise _unsupported("compressed as a whole (deflated)")


def decode_dicom(data: bytes | bytearray | memoryview, max_pixels: int) -> Image.Image:
    """Decode the radiograph in a DICOM file.

    The stored values go through the modality LUT (or rescale slope and intercept) and the first VOI
    LUT or window; MONOCHROME1 is inverted, so that more is brighter. Padding becomes black. A
    file without a window shows the range of values that occurs in it: stored ranges are of no use
    for that, since detectors fill 10 to 16 bits very unevenly.

    Args:
        data: a DICOM file, native or compressed (RLE, JPEG, JPEG-LS, JPEG 2000).
        max_pixels: largest number of pixels that is decoded.

    Returns:
        An image in mode `L` or, where the file holds colour, `RGB`.

    Raises:
        BadImageError: not one radiograph of the chest, too large, or not decodable. What is not
            named in the file (modality, body part, view) is not held against it.
    """
    dataset = read_tags(BytesIO(data), _TAGS)
    try:
        _check_content(dataset)
        _check_pixels(dataset, max_pixels)
        pixels = _stored(dataset, data)
        shown = _grey if dataset.SamplesPerPixel == 1 else _colour
        return Image.fromarray(shown(pixels, dataset))
    except (BadImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise too_many_pixels(max_pixels) from None
    except Exception:  # decoders raise many types for damaged data
        raise _damaged() from None


def check_radiograph(dataset: "Dataset") -> None:
    """Refuse what says that it is no radiograph, or not of the chest from the front or back.

    Args:
        dataset: with the tags `Modality`, `BodyPartExamined`, `AnatomicRegionSequence` and
            `ViewPosition`.

    Raises:
        BadImageError: another modality, body part or view is named.
    """
    modality = _text(dataset.get("Modality"))
    if modality and modality not in RADIOGRAPHS:
        name = _MODALITIES.get(modality, "another modality")
        raise BadImageError(
            Rejection.WRONG_MODALITY,
            f"The DICOM file holds {name}, not a radiograph; send one of modality "
            f"{' or '.join(RADIOGRAPHS)}.",
        )
    part = _body_part(dataset)
    if part and not any(name in part for name in _CHEST):
        name = f" ({part.lower()})" if part in _BODY_PARTS else ""
        raise BadImageError(
            Rejection.WRONG_BODY_PART,
            f"The DICOM file shows another body part{name}; send a radiograph of the chest.",
        )
    if _text(dataset.get("ViewPosition")) in _NOT_FRONTAL:
        raise BadImageError(
            Rejection.NOT_FRONTAL_CHEST,
            "The DICOM file shows the chest from the side; send a frontal radiograph (AP or PA).",
        )


def _check_content(dataset: "Dataset") -> None:
    check_radiograph(dataset)
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise BadImageError(
            Rejection.MULTIPLE_FRAMES,
            "The DICOM file holds several frames; send one radiograph a file.",
        )
    if not (dataset.get("PixelData") and dataset.get("Rows") and dataset.get("Columns")):
        raise BadImageError(
            Rejection.NOT_AN_IMAGE, "The DICOM file holds no image; send one radiograph a file."
        )


def _check_pixels(dataset: "Dataset", max_pixels: int) -> None:
    """Refuse, before anything is decoded, what is too large or cannot be decoded."""
    samples = dataset.SamplesPerPixel
    if dataset.PhotometricInterpretation not in (_GREY if samples == 1 else _COLOUR):
        raise _unsupported("neither grey nor colour")
    if dataset.BitsAllocated not in _BITS_ALLOCATED:
        raise _unsupported("not of 8 or 16 bits")
    syntax = dataset.file_meta.TransferSyntaxUID
    # The lossy JPEG of 12 bits has no decoder, though its syntax has, for 8 bits.
    deep_lossy = syntax == _pydicom().uid.JPEGExtended12Bit and dataset.BitsStored > 8  # noqa: PLR2004
    plugins = _plugins(syntax)
    # What comes back from GDCM's process is not unfolded to colour.
    grey_only = plugins == (_ABORTING,) and samples > 1
    if not plugins or deep_lossy or grey_only:
        raise _unsupported("compressed in a way that is not supported")
    size, precision = (dataset.Columns, dataset.Rows), dataset.BitsAllocated
    if syntax.is_encapsulated:
        stream_size, precision = _stream_format(dataset)
        size = (max(size[0], stream_size[0]), max(size[1], stream_size[1]))
    if size[0] * size[1] > max_pixels:
        raise too_many_pixels(max_pixels)
    if _is_raised(dataset, precision):
        raise BadImageError(
            Rejection.UNSUPPORTED_FORMAT,
            "DICOM images whose values are not in the low bits of each sample are not accepted; "
            "send one whose High Bit is Bits Stored - 1.",
        )


def _is_raised(dataset: "Dataset", precision: int) -> bool:
    """Whether values have unused bits below them, by High Bit (0028,0102; PS3.5 8.1.1).

    pydicom does not know High Bit: it takes the lowest Bits Stored (0028,0101), cutting off the top
    of such values.

    Args:
        dataset: with the tags `BitsStored` and, if it is known, `HighBit`.
        precision: bits of a sample as it lies in the file. Where all of them are stored, as in
            many compressed streams, there is no room below, whatever High Bit says.
    """
    high_bit = dataset.get("HighBit")
    return high_bit is not None and min(high_bit, precision - 1) >= dataset.BitsStored


def _stream_format(dataset: "Dataset") -> tuple[tuple[int, int], int]:
    """Width and height in the compressed stream, and the bits of a sample there.

    Decoders allocate that size, not the header's.
    """
    pydicom = _pydicom()
    # Not public, but the only header reader for JPEG-LS and JPEG of more than 8 bits.
    from pydicom.pixels.utils import _get_jpg_parameters  # noqa: PLC0415

    frame = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == pydicom.uid.RLELossless:
        # Run lengths at their worst add 1/128 to the pixels; more is a bomb or damage.
        raw = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated // 8
        if len(frame) > 2 * raw + 64:
            raise _damaged()
        return (dataset.Columns, dataset.Rows), dataset.BitsAllocated
    if frame.startswith(_JPEG):
        parameters = _get_jpg_parameters(frame)
        return (parameters["width"], parameters["height"]), parameters["precision"]
    _check_boxes(frame)
    precision = pydicom.pixels.utils.get_j2k_parameters(frame)["precision"]
    with Image.open(BytesIO(frame), formats=["JPEG2000"]) as image:
        return image.size, precision


def _check_boxes(frame: bytes) -> None:
    """Refuse a JP2 file, in which a JPEG 2000 stream may lie, that pydicom would read for ever.

    A box begins with its length of 4 bytes, itself included, and its type (ISO/IEC 15444-1, I.4);
    pydicom goes from box to box by these lengths, whatever they are.
    """
    if not frame.startswith(_JP2):
        return
    place = 0
    for _ in range(_MOST_BOXES):
        if place >= len(frame) or frame[place + 4 : place + 8] == b"jp2c":
            return
        length = int.from_bytes(frame[place : place + 4], "big")
        if length < len(_JP2):
            break
        place += length
    raise _damaged()


def _plugins(syntax: "UID") -> tuple[str, ...]:
    """The plugins that decode a transfer syntax here; `""` where nothing is compressed."""
    try:
        decoder = _pydicom().pixels.get_decoder(syntax)
    except NotImplementedError:
        return ()
    return tuple(decoder.available_plugins) if syntax.is_encapsulated else ("",)


def _stored(dataset: "Dataset", data: bytes | bytearray | memoryview) -> npt.NDArray[Any]:
    """Stored values, decompressed; colour is RGB."""
    pixels = _pydicom().pixels
    syntax = dataset.file_meta.TransferSyntaxUID
    # The last of them is the least particular about what other programs write.
    for plugin in reversed(_plugins(syntax)):
        if plugin != _ABORTING:
            values: npt.NDArray[Any] = pixels.pixel_array(dataset, decoding_plugin=plugin)
            return values
    kind = "i" if dataset.PixelRepresentation else "u"
    stored = np.frombuffer(_stored_apart(data), f"<{kind}{dataset.BitsAllocated // 8}")
    return stored.reshape(dataset.Rows, dataset.Columns)


def _stored_apart(data: bytes | bytearray | memoryview) -> bytes:
    """Stored values of a grey image, decoded in a process that may die of a damaged stream."""
    with os.fdopen(os.memfd_create("dicom"), "r+b") as file:
        file.write(data)
        file.seek(0)
        return subprocess.run(
            [sys.executable, "-c", _DECODE_APART],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_APART_SECONDS,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout


def _grey(pixels: npt.NDArray[Any], dataset: "Dataset") -> npt.NDArray[np.uint8]:
    """Stored values `[height, width]` as brightness, uint8.

    Each value that occurs is mapped once, in a table, instead of each pixel.
    """
    low, high = int(pixels.min()), int(pixels.max())
    stored = np.arange(low, high + 1)
    padding = _is_padding(stored, dataset)
    used = np.zeros(len(stored), dtype=bool)
    for row in pixels:
        used[row.astype(np.intp) - low] = True
    table = _brightness(stored, used & ~padding, dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        table = _WHITE - table
    table[padding] = 0
    grey = np.empty(pixels.shape, dtype=np.uint8)
    for row, out in zip(pixels, grey, strict=True):
        out[:] = table[row.astype(np.intp) - low]
    return grey


def _brightness(
    stored: npt.NDArray[np.int_], valid: npt.NDArray[np.bool_], dataset: "Dataset"
) -> npt.NDArray[np.uint8]:
    """Brightness of each stored value, 0 to 255, before MONOCHROME1 is inverted.

    Args:
        stored: all values from the lowest to the highest.
        valid: which of them occur and are no padding.
        dataset: the file's LUTs and window.
    """
    pixels = _pydicom().pixels
    little_endian = dataset.file_meta.TransferSyntaxUID.is_little_endian
    _drop_empty(dataset)
    if dataset.get("ModalityLUTSequence"):
        _unpack_lut(dataset.ModalityLUTSequence[0], little_endian)
    values = pixels.apply_modality_lut(stored, dataset)
    if _has_lut(dataset):
        lut = dataset.VOILUTSequence[0]
        _unpack_lut(lut, little_endian)
        entries, first, bits = lut.LUTDescriptor
        # pydicom looks up by numbers as small as the table's entries, which need not be enough.
        lut.LUTDescriptor = [entries, first, 16]
        last = first + (entries or 2**16) - 1
        shown = pixels.apply_voi(np.rint(values).clip(first, last).astype(np.int64), dataset)
        lowest, highest = 0.0, 2.0**bits - 1
    elif _has_window(dataset):
        shown = pixels.apply_windowing(values, dataset)
        # What the window makes of values below and above it: its full range.
        lowest, highest = pixels.apply_windowing(np.array([-np.inf, np.inf]), dataset)
    else:
        shown = values
        occurring = values[valid] if valid.any() else values
        lowest, highest = float(occurring.min()), float(occurring.max())
    scale = _WHITE / (highest - lowest) if highest != lowest else 0.0
    return _bytes(np.rint(np.clip((shown - lowest) * scale, 0, _WHITE)))


def _drop_empty(dataset: "Dataset") -> None:
    """Take an empty rescale or VOI LUT Function (0028,1056) for none; pydicom does not.

    An empty value of type 3 means just that (PS3.5 7.4.5).
    """
    # Slope (0028,1053) and intercept (0028,1052) have no defaults: one says nothing without the
    # other, and the stored values are then the best there is.
    for keywords in (("RescaleSlope", "RescaleIntercept"), ("VOILUTFunction",)):
        if any(dataset.get(keyword) in (None, "") for keyword in keywords):
            for keyword in keywords:
                dataset.pop(keyword, None)


def _unpack_lut(lut: "Dataset", little_endian: bool) -> None:
    """Give each entry of a LUT of 8 bits a word of its own, where two share one.

    The standard packs them so in LUT Data (0028,3006), the first in the low byte (PS3.3 C.11.1.1.1
    and C.11.2.1.1), but pydicom reads words. Writers differ; the number of words tells.
    """
    entries, _, bits = lut.LUTDescriptor
    if bits != 8:  # noqa: PLR2004
        return
    entries = entries or 2**16
    order = "<" if little_endian else ">"
    # Of VR OW, words are bytes; of US, numbers.
    data = lut.LUTData
    words = np.frombuffer(data, f"{order}u2") if isinstance(data, bytes) else np.ravel(data)
    if len(words) == (entries + 1) // 2:
        # An odd number of entries ends in a byte of padding.
        unpacked = words.astype("<u2").view(np.uint8)[:entries]
        lut.add_new("LUTData", "OW", unpacked.astype(f"{order}u2").tobytes())


def _has_lut(dataset: "Dataset") -> bool:
    return bool(dataset.get("VOILUTSequence")) and "LUTData" in dataset.VOILUTSequence[0]


def _has_window(dataset: "Dataset") -> bool:
    """Whether there is a window that can be applied; an empty or impossible one is ignored."""
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if center in (None, "") or width in (None, ""):
        return False
    linear = dataset.get("VOILUTFunction", "LINEAR") == "LINEAR"
    first = float(width if dataset["WindowWidth"].VM == 1 else width[0])
    return first >= 1 if linear else first > 0


def _is_padding(stored: npt.NDArray[np.int_], dataset: "Dataset") -> npt.NDArray[np.bool_]:
    """Which stored values stand for no measurement (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = sorted((value, value if limit is None else limit))
    padding: npt.NDArray[np.bool_] = (stored >= ends[0]) & (stored <= ends[1])
    return padding


def _colour(pixels: npt.NDArray[Any], dataset: "Dataset") -> npt.NDArray[np.uint8]:
    """Colour `[height, width, 3]` as uint8, by its high bits; pydicom has made RGB of it."""
    return _bytes(pixels >> max(0, dataset.BitsStored - 8))


def _bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return values.astype(np.uint8)


def _body_part(dataset: "Dataset") -> str:
    part = _text(dataset.get("BodyPartExamined"))
    regions = dataset.get("AnatomicRegionSequence")
    return part or (_text(regions[0].get("CodeMeaning")) if regions else "")


def _text(value: object) -> str:
    return str(value or "").strip().upper()


def _damaged() -> BadImageError:
    return BadImageError(
        Rejection.DAMAGED, "The DICOM file is truncated or damaged; send one complete file."
    )


def _unsupported(what: str) -> BadImageError:
    return BadImageError(
        Rejection.UNSUPPORTED_FORMAT,
        f"DICOM images that are {what} are not accepted; send grey or RGB of 8 or 16 bits, "
        "uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000.",
    )


@cache
def _pydicom() -> ModuleType:
    """pydicom, kept from writing what stands in files to logs and terminals."""
    try:
        import pydicom  # noqa: PLC0415
        import pydicom.encaps  # noqa: PLC0415
        import pydicom.filereader  # noqa: PLC0415
        import pydicom.pixels  # noqa: PLC0415
    except ImportError:
        raise BadImageError(
            Rejection.UNSUPPORTED_FORMAT,
            "DICOM files are not accepted here, because pydicom is not installed; "
            "send JPEG, PNG or TIFF.",
        ) from None
    # Its warnings quote values of the file, most of all those about values that do not conform.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").disabled = True
    warnings.filterwarnings("ignore", module=r"pydicom\b")
    return pydicom
