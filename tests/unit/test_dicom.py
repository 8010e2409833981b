"""DICOM: what a radiograph looks like, and which files are refused."""

import json
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    MPEG4HP41,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    RLELossless,
)

import cxr.dicom
from cxr.decode import DEFAULT_LIMITS, DecodeLimits, decode, to_array
from cxr.errors import BadImageError, Rejection
from support.dicoms import as_jpeg, dicom_bytes, dicom_dataset, dicom_file

# Twelve bits of sixteen, as detectors give: 0 to 4095 in steps of 65.
DEEP = (np.arange(64, dtype=np.uint16) * 65).reshape(8, 8)
TWELVE = {"BitsStored": 12, "HighBit": 11}
SAMPLES = Path(pydicom.__file__).parent / "data"


def shown(data: bytes) -> np.ndarray:
    return to_array(decode(data)).astype(int)


def refused(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> BadImageError:
    with pytest.raises(BadImageError) as caught:
        decode(data, limits)
    return caught.value


def lut(values: list[int], first: int = 0, bits: int = 16) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "US", values)
    return item


def packed(values: list[int], first: int = 0, order: str = "<") -> Dataset:
    """A LUT of 8 bits with two entries a word, the first of them in its low byte."""
    words = np.frombuffer(bytes(values) + bytes(len(values) % 2), "<u2").astype(f"{order}u2")
    item = lut(values, first, bits=8)
    item.add_new("LUTData", "OW", words.tobytes())
    return item


def ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255).astype(int)


def gdcm_compressed(folder: Path, data: bytes, syntax: str) -> bytes:
    """The same file in another transfer syntax, named as GDCM names it."""
    plain, compressed = folder / "plain.dcm", folder / "compressed.dcm"
    plain.write_bytes(data)
    reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(compressed))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return compressed.read_bytes()


class TestBrightness:
    def test_without_a_window_the_range_of_values_is_shown(self) -> None:
        image = decode(dicom_bytes(DEEP // 2 + 100, **TWELVE))
        assert image.mode == "L"
        np.testing.assert_array_equal(to_array(image), ramp(DEEP // 2, 0, 2047))

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16])
    def test_other_depths(self, dtype: type) -> None:
        pixels = np.arange(-30 if dtype is np.int16 else 0, 64 * 2, 2).astype(dtype)[:64]
        expected = ramp(pixels.astype(int), pixels.min(), pixels.max())
        np.testing.assert_array_equal(
            shown(dicom_bytes(pixels.reshape(8, 8))), expected.reshape(8, 8)
        )

    def test_one_value_only_is_black(self) -> None:
        assert not shown(dicom_bytes(np.full((8, 8), 700, dtype=np.uint16))).any()

    def test_monochrome1_is_inverted(self) -> None:
        data = dicom_bytes(DEEP, PhotometricInterpretation="MONOCHROME1", **TWELVE)
        np.testing.assert_array_equal(shown(data), 255 - ramp(DEEP, 0, 4095))

    def test_a_window_is_applied(self) -> None:
        data = dicom_bytes(DEEP, WindowCenter=2000.5, WindowWidth=1001, **TWELVE)
        np.testing.assert_allclose(shown(data), ramp(DEEP, 1500, 2500), atol=1)

    def test_the_first_of_several_windows_is_applied(self) -> None:
        several = dicom_bytes(DEEP, WindowCenter=[2000, 9], WindowWidth=[1000, 9], **TWELVE)
        first = dicom_bytes(DEEP, WindowCenter=2000, WindowWidth=1000, **TWELVE)
        np.testing.assert_array_equal(shown(several), shown(first))

    def test_a_sigmoid_window(self) -> None:
        pixels = shown(
            dicom_bytes(
                DEEP, WindowCenter=2000, WindowWidth=900, VOILUTFunction="SIGMOID", **TWELVE
            )
        )
        expected = 255 / (1 + np.exp(-4 * (DEEP - 2000.0) / 900))
        np.testing.assert_allclose(pixels, expected, atol=1)

    @pytest.mark.parametrize(("center", "width"), [("", ""), (2000, 0)])
    def test_an_impossible_window_is_ignored(self, center: object, width: object) -> None:
        data = dicom_bytes(DEEP, WindowCenter=center, WindowWidth=width, **TWELVE)
        np.testing.assert_array_equal(shown(data), ramp(DEEP, 0, 4095))

    @pytest.mark.parametrize("width", [1001, 0.5])
    def test_an_empty_voi_lut_function_is_none(self, width: float) -> None:
        window = {"WindowCenter": 2000.5, "WindowWidth": width, **TWELVE}
        empty = dicom_bytes(DEEP, VOILUTFunction="", **window)
        np.testing.assert_array_equal(shown(empty), shown(dicom_bytes(DEEP, **window)))

    @pytest.mark.parametrize(("slope", "intercept"), [("", ""), (2, ""), ("", -1000)])
    def test_an_empty_rescale_is_none(self, slope: object, intercept: object) -> None:
        window = {"WindowCenter": 2000.5, "WindowWidth": 1001, **TWELVE}
        empty = dicom_bytes(DEEP, RescaleSlope=slope, RescaleIntercept=intercept, **window)
        np.testing.assert_array_equal(shown(empty), shown(dicom_bytes(DEEP, **window)))

    def test_a_window_counts_in_rescaled_values(self) -> None:
        data = dicom_bytes(
            DEEP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=3000.5, WindowWidth=2001,
            **TWELVE,
        )  # fmt: skip
        np.testing.assert_allclose(shown(data), ramp(2.0 * DEEP - 1000, 2000, 4000), atol=1)

    def test_a_negative_slope_inverts(self) -> None:
        data = dicom_bytes(DEEP, RescaleSlope=-1, RescaleIntercept=4095, **TWELVE)
        np.testing.assert_array_equal(shown(data), ramp(4095 - DEEP.astype(int), 0, 4095))

    def test_a_modality_lut_is_applied(self) -> None:
        table = [4095 - value for value in range(4096)]
        data = dicom_bytes(DEEP, ModalityLUTSequence=[lut(table)], **TWELVE)
        np.testing.assert_array_equal(shown(data), ramp(4095 - DEEP.astype(int), 0, 4095))

    @pytest.mark.parametrize("bits", [8, 12])
    def test_a_voi_lut_goes_before_a_window_and_after_a_rescale(self, bits: int) -> None:
        top = 2**bits - 1
        table = [round(top * (value / 4095) ** 2) for value in range(4096)]
        data = dicom_bytes(
            DEEP, VOILUTSequence=[lut(table, bits=bits)], WindowCenter=1, WindowWidth=2,
            RescaleSlope=1, RescaleIntercept=0, **TWELVE,
        )  # fmt: skip
        np.testing.assert_allclose(shown(data), ramp((DEEP / 4095) ** 2, 0, 1), atol=1)

    @pytest.mark.parametrize("entries", [4096, 4095])
    @pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
    def test_a_lut_of_two_entries_a_word(self, keyword: str, entries: int) -> None:
        table = [255 - value // 16 for value in range(entries)]
        data = dicom_bytes(DEEP, **{keyword: [packed(table)]}, **TWELVE)
        np.testing.assert_array_equal(shown(data), 255 - DEEP // 16)

    @pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
    def test_a_lut_of_two_entries_a_word_in_other_encodings(self, syntax: str) -> None:
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        table = [255 - value // 16 for value in range(4096)]
        dataset = dicom_dataset(DEEP, VOILUTSequence=[packed(table, order=order)], **TWELVE)
        dataset.PixelData = DEEP.astype(f"{order}u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        np.testing.assert_array_equal(shown(dicom_file(dataset)), 255 - DEEP // 16)

    def test_a_lut_of_two_entries_a_word_as_numbers(self) -> None:
        item = packed([255 - value // 16 for value in range(4096)])
        item.add_new("LUTData", "US", np.frombuffer(item.LUTData, "<u2").tolist())
        data = dicom_bytes(DEEP, VOILUTSequence=[item], **TWELVE)
        np.testing.assert_array_equal(shown(data), 255 - DEEP // 16)

    def test_values_beyond_a_voi_lut_take_its_ends(self) -> None:
        data = dicom_bytes(DEEP, VOILUTSequence=[lut([1000, 60000], first=2000)], **TWELVE)
        expected = np.where(DEEP < 2001, 4, 233)
        np.testing.assert_array_equal(shown(data), expected)

    @pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
    def test_padding_is_black_and_does_not_count(self, photometric: str) -> None:
        pixels = np.where(DEEP < 400, 4095, DEEP // 2)
        data = dicom_bytes(
            pixels, PixelPaddingValue=4095, PhotometricInterpretation=photometric, **TWELVE
        )
        valid = pixels != 4095
        expected = ramp(pixels, pixels[valid].min(), pixels[valid].max())
        if photometric == "MONOCHROME1":
            expected = 255 - expected
        np.testing.assert_array_equal(shown(data), np.where(valid, expected, 0))

    def test_a_range_of_padding(self) -> None:
        data = dicom_bytes(DEEP, PixelPaddingValue=0, PixelPaddingRangeLimit=1000, **TWELVE)
        low = DEEP[DEEP > 1000].min()
        np.testing.assert_array_equal(shown(data), np.where(DEEP > 1000, ramp(DEEP, low, 4095), 0))

    def test_nothing_but_padding_is_black(self) -> None:
        assert not shown(dicom_bytes(DEEP * 0 + 7, PixelPaddingValue=7)).any()

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_colour(self, dtype: type) -> None:
        colour = np.stack([DEEP // 16, 255 - DEEP // 16, DEEP // 32], axis=-1)
        data = dicom_bytes((colour * (257 if dtype is np.uint16 else 1)).astype(dtype))
        np.testing.assert_array_equal(shown(data), colour)


class TestTransferSyntaxes:
    @pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
    def test_lossless_compression(self, syntax: str) -> None:
        pixels = np.tile(DEEP, (8, 8))
        dataset = dicom_dataset(pixels, **TWELVE)
        dataset.compress(syntax, generate_instance_uid=False)
        np.testing.assert_array_equal(shown(dicom_file(dataset)), ramp(pixels, 0, 4095))

    def test_jpeg(self) -> None:
        pixels = np.tile((DEEP // 16).astype(np.uint8).repeat(4, 0).repeat(4, 1), (2, 2))
        data = dicom_file(as_jpeg(dicom_dataset(pixels), pixels))
        assert np.abs(shown(data) - pixels).mean() < 3

    @pytest.mark.parametrize(
        ("depth", "dtype", "tags"), [(8, np.uint8, {}), (12, np.uint16, TWELVE)]
    )
    def test_lossy_jpeg_2000(self, depth: int, dtype: type, tags: dict[str, int]) -> None:
        gradient = np.add.outer(np.arange(64), np.arange(64)) * 2 ** (depth - 7)
        dataset = dicom_dataset(gradient.astype(dtype), **tags)
        # A fifth of its size: the pixels that come back are not those that went in.
        dataset.compress(JPEG2000, j2k_cr=[5], generate_instance_uid=False)
        assert len(dataset.PixelData) < gradient.size * np.dtype(dtype).itemsize / 5
        assert np.abs(shown(dicom_file(dataset)) - ramp(gradient, 0, gradient.max())).mean() < 3

    @pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
    def test_other_encodings(self, syntax: str) -> None:
        big = syntax == ExplicitVRBigEndian
        dataset = dicom_dataset(DEEP, PixelPaddingValue=0, **TWELVE)
        dataset.PixelData = DEEP.astype(">u2" if big else "<u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        expected = np.where(DEEP > 0, ramp(DEEP, 65, 4095), 0)
        np.testing.assert_array_equal(shown(dicom_file(dataset)), expected)

    @pytest.mark.parametrize(
        ("compressed", "plain"),
        [
            ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
            ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
            ("MR_small_RLE.dcm", "MR_small.dcm"),
        ],
    )
    def test_files_of_others(self, compressed: str, plain: str) -> None:
        one, other = (
            pydicom.dcmread(SAMPLES / "test_files" / name) for name in (compressed, plain)
        )
        one.Modality = other.Modality = "DX"
        np.testing.assert_array_equal(shown(dicom_file(one)), shown(dicom_file(other)))

    @pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLSLossless"])
    @pytest.mark.parametrize("dtype", [np.uint16, np.int16])
    def test_what_gdcm_decodes(self, name: str, dtype: type, tmp_path: Path) -> None:
        pixels = np.tile(DEEP.astype(dtype) - (2000 if dtype is np.int16 else 0), (4, 4))
        data = gdcm_compressed(tmp_path, dicom_bytes(pixels), name)
        np.testing.assert_array_equal(shown(data), ramp(pixels, pixels.min(), pixels.max()))

    def test_a_stream_without_unused_bits_has_none_below_its_values(self) -> None:
        pixels = np.tile(DEEP, (8, 8))
        dataset = dicom_dataset(pixels, **TWELVE)
        dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
        dataset.HighBit = 15
        np.testing.assert_array_equal(shown(dicom_file(dataset)), ramp(pixels, 0, 4095))

    @pytest.mark.parametrize("high_bit", [None, 10, 11])
    def test_a_high_bit_that_leaves_no_bits_below_the_values(self, high_bit: int | None) -> None:
        data = dicom_bytes(DEEP, BitsStored=12, HighBit=high_bit)
        np.testing.assert_array_equal(shown(data), ramp(DEEP, 0, 4095))

    def test_a_high_bit_beyond_a_full_sample(self) -> None:
        assert decode(dicom_bytes((DEEP // 16).astype(np.uint8), HighBit=15))


class TestRefused:
    @pytest.mark.parametrize(
        ("tags", "reason", "words"),
        [
            ({"Modality": "CT"}, Rejection.WRONG_MODALITY, "holds computed tomography"),
            ({"Modality": "SECRET"}, Rejection.WRONG_MODALITY, "holds another modality"),
            ({"BodyPartExamined": "HAND"}, Rejection.WRONG_BODY_PART, "body part (hand);"),
            ({"BodyPartExamined": "SECRET"}, Rejection.WRONG_BODY_PART, "body part;"),
            ({"ViewPosition": "LL"}, Rejection.NOT_FRONTAL_CHEST, "from the side"),
            ({"ViewPosition": "LATERAL"}, Rejection.NOT_FRONTAL_CHEST, "from the side"),
            ({"NumberOfFrames": 2}, Rejection.MULTIPLE_FRAMES, "several frames"),
            ({"PixelData": b""}, Rejection.NOT_AN_IMAGE, "no image"),
            ({"Rows": None}, Rejection.NOT_AN_IMAGE, "no image"),
            (
                {"PhotometricInterpretation": "PALETTE COLOR"},
                Rejection.UNSUPPORTED_FORMAT,
                "neither grey nor colour",
            ),
            ({"BitsAllocated": 32}, Rejection.UNSUPPORTED_FORMAT, "not of 8 or 16 bits"),
            (
                {"BitsStored": 12, "HighBit": 15},
                Rejection.UNSUPPORTED_FORMAT,
                "whose High Bit is Bits Stored - 1",
            ),
            ({"Rows": 9}, Rejection.DAMAGED, "truncated or damaged"),
            ({"SamplesPerPixel": None}, Rejection.DAMAGED, "truncated or damaged"),
        ],
    )
    def test_by_name(self, tags: dict[str, object], reason: Rejection, words: str) -> None:
        error = refused(dicom_bytes(DEEP, **tags))
        assert error.reason is reason
        assert words in str(error)
        assert "SECRET" not in str(error)

    def test_what_is_no_chest_radiograph_is_unprocessable(self) -> None:
        reasons = (Rejection.WRONG_MODALITY, Rejection.WRONG_BODY_PART, Rejection.MULTIPLE_FRAMES)
        assert {reason.http_status for reason in reasons} == {422}

    @pytest.mark.parametrize("part", ["CHEST", "THORAX", "PORTABLE CHEST", "TORAX", None, ""])
    @pytest.mark.parametrize("modality", ["CR", "DX", "RG", None])
    def test_chest_radiographs_are_accepted(self, part: str | None, modality: str | None) -> None:
        assert decode(dicom_bytes(DEEP, BodyPartExamined=part, Modality=modality))

    @pytest.mark.parametrize("view", ["AP", "PA", "SECRET", None])
    def test_frontal_and_unknown_views_are_accepted(self, view: str | None) -> None:
        assert decode(dicom_bytes(DEEP, ViewPosition=view))

    @pytest.mark.parametrize(("region", "fits"), [("Chest", True), ("Hand", False)])
    def test_the_region_counts_where_no_body_part_is_named(self, region: str, fits: bool) -> None:
        code = Dataset()
        code.CodeMeaning = region
        data = dicom_bytes(DEEP, BodyPartExamined=None, AnatomicRegionSequence=[code])
        if fits:
            assert decode(data)
        else:
            assert refused(data).reason is Rejection.WRONG_BODY_PART

    def test_video(self) -> None:
        dataset = as_jpeg(dicom_dataset(DEEP.astype(np.uint8)), DEEP.astype(np.uint8))
        dataset.file_meta.TransferSyntaxUID = MPEG4HP41
        error = refused(dicom_file(dataset))
        assert error.reason is Rejection.UNSUPPORTED_FORMAT
        assert "compressed in a way that is not supported" in str(error)

    @pytest.mark.parametrize("name", ["RLELossless", "JPEG2000Lossless", "JPEGLosslessProcess14_1"])
    def test_values_with_unused_bits_below_them_compressed(self, name: str, tmp_path: Path) -> None:
        data = gdcm_compressed(tmp_path, dicom_bytes(np.tile(DEEP << 4, (4, 4))), name)
        dataset = pydicom.dcmread(BytesIO(data))
        dataset.BitsStored = 12
        error = refused(dicom_file(dataset))
        assert error.reason is Rejection.UNSUPPORTED_FORMAT
        assert "whose High Bit is Bits Stored - 1" in str(error)

    def test_lossy_jpeg_of_twelve_bits(self) -> None:
        dataset = as_jpeg(dicom_dataset(DEEP, **TWELVE), DEEP.astype(np.uint8))
        dataset.file_meta.TransferSyntaxUID = JPEGExtended12Bit
        assert refused(dicom_file(dataset)).reason is Rejection.UNSUPPORTED_FORMAT

    def test_a_deflated_file_is_not_unfolded(self) -> None:
        dataset = dicom_dataset(DEEP)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        data = dicom_file(dataset)
        head = data[: len(data) - len(zlib.compress(b"")) - 300]
        error = refused(head + zlib.compress(bytes(10**7)))
        assert error.reason is Rejection.UNSUPPORTED_FORMAT

    @pytest.mark.parametrize("kept", [140, 400, -100])
    def test_truncated(self, kept: int) -> None:
        data = dicom_bytes(np.tile(DEEP, (4, 4)))[:kept]
        assert refused(data).reason in (Rejection.DAMAGED, Rejection.NOT_AN_IMAGE)

    def test_pixels_are_counted_before_they_are_decoded(self) -> None:
        data = dicom_bytes(DEEP, Rows=40_000, Columns=40_000)
        assert refused(data).reason is Rejection.TOO_MANY_PIXELS
        assert refused(dicom_bytes(DEEP), DecodeLimits(max_pixels=63)).reason is (
            Rejection.TOO_MANY_PIXELS
        )

    def test_a_stream_that_kills_its_decoder(self, tmp_path: Path) -> None:
        data = gdcm_compressed(tmp_path, dicom_bytes(np.tile(DEEP, (4, 4))), "JPEGLSLossless")
        start, end = data.index(b"\xff\xd8") + 60, len(data) - 8  # the sequence's delimiter
        error = refused(data[:start] + bytes(end - start) + data[end:])
        assert error.reason is Rejection.DAMAGED

    def test_lossless_jpeg_in_colour(self) -> None:
        dataset = pydicom.dcmread(SAMPLES / "test_files" / "SC_rgb_jpeg_gdcm.dcm")
        dataset.Modality = "DX"
        assert refused(dicom_file(dataset)).reason is Rejection.UNSUPPORTED_FORMAT

    @pytest.mark.parametrize("kind", ["jpeg", "jpeg 2000"])
    def test_the_compressed_stream_may_not_be_larger_than_the_header_says(self, kind: str) -> None:
        pixels = np.zeros((300, 200), dtype=np.uint8)
        dataset = dicom_dataset(pixels)
        if kind == "jpeg":
            as_jpeg(dataset, pixels)
        else:
            dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
        dataset.Rows = dataset.Columns = 2
        error = refused(dicom_file(dataset), DecodeLimits(max_pixels=59_999))
        assert error.reason is Rejection.TOO_MANY_PIXELS

    def test_run_lengths_that_unfold_beyond_the_image(self) -> None:
        dataset = dicom_dataset(np.zeros((300, 200), dtype=np.uint8))
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.Rows = dataset.Columns = 2
        assert refused(dicom_file(dataset)).reason is Rejection.DAMAGED

    def test_without_pydicom_a_dicom_file_is_refused_in_clear_words(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cxr.dicom._pydicom.cache_clear()
        monkeypatch.setitem(sys.modules, "pydicom", None)
        error = refused(dicom_bytes(DEEP))
        assert error.reason is Rejection.UNSUPPORTED_FORMAT
        assert "pydicom is not installed" in str(error)


def test_importing_the_core_imports_no_pydicom() -> None:
    check = "import sys, cxr.decode, cxr.engine; sys.exit('pydicom' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# Run in a process of its own, which shows what C libraries print.
_READ_ALL = """
import collections, json, sys
from pathlib import Path
import cxr.dicom
from cxr.decode import decode
from cxr.errors import BadImageError

def outcomes():
    counts = collections.Counter()
    for path in sorted(path for path in Path(sys.argv[1]).rglob("*") if path.is_file()):
        try:
            assert decode(path.read_bytes()).mode in ("L", "RGB")
            counts["answered"] += 1
        except BadImageError as error:
            assert str(error).endswith("."), path
            counts[error.reason.value] += 1
    return counts

first = outcomes()
# Few of the files say that they are a radiograph; take all others for one.
cxr.dicom.check_radiograph = lambda dataset: None
print(json.dumps([first, outcomes()]))
"""


def test_each_sample_file_of_pydicom_is_answered_or_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _READ_ALL, str(SAMPLES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    as_they_are, as_radiographs = json.loads(done.stdout)
    assert set(as_they_are) == {
        "answered", "not_an_image", "unsupported_format", "wrong_body_part", "wrong_modality",
    }  # fmt: skip
    assert as_radiographs["answered"] > 70
    assert as_radiographs["damaged"] > 0
    assert as_radiographs["multiple_frames"] > 0


def in_jp2(box: bytes) -> bytes:
    """A DICOM file whose JPEG 2000 stream lies in a JP2 file, behind this box."""
    pixels = np.arange(4096, dtype=np.uint8).reshape(64, 64)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000")
    before, mark, after = buffer.getvalue().partition(b"jp2c")
    stream = before[:-4] + box + before[-4:] + mark + after
    dataset = dicom_dataset(pixels)
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    return dicom_file(dataset)


def test_a_stream_in_a_jp2_file() -> None:
    """DICOM wants the stream alone (PS3.5, A.4.4); some write the file."""
    free = (12).to_bytes(4, "big") + b"free" + bytes(4)
    for box in (b"", free):
        assert np.array_equal(
            to_array(decode(in_jp2(box))).ravel(), np.arange(4096, dtype=np.uint8)
        )


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "box",
    [
        bytes(4) + b"free",
        (4).to_bytes(4, "big") + b"free",
        200 * ((8).to_bytes(4, "big") + b"free"),
    ],
    ids=["of no length", "shorter than its head", "very many"],
)
def test_boxes_of_a_jp2_file_that_do_not_end(box: bytes) -> None:
    """pydicom would look for the stream for ever."""
    with pytest.raises(BadImageError) as refused:
        decode(in_jp2(box))
    assert refused.value.reason is Rejection.DAMAGED
