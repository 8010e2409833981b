"""Which files count as an image, and what comes out of them."""

import random
import resource
import struct
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from cxr.decode import DEFAULT_LIMITS, DecodeLimits, decode, to_array
from cxr.errors import BadImageError, Rejection
from support.bundles import encoded_image
from support.dicoms import as_jpeg, dicom_bytes, dicom_dataset, dicom_file

GREY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
EXIF_ORIENTATION = 0x0112


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(
    width: int,
    height: int,
    rows: bytes,
    *chunks: tuple[bytes, bytes],
    colour: int = 0,
    bits: int = 8,
) -> bytes:
    """A PNG written by hand; its header may promise more than it holds."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


# Colour types of PNG by the number of channels.
PNG_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}


def deep_png(row: list[list[int]], transparent: list[int] | None = None) -> bytes:
    """A PNG of one row, 16 bits a channel, and maybe of one transparent colour."""
    pixels = np.array(row, dtype=">u2")
    key = () if transparent is None else ((b"tRNS", np.array(transparent, ">u2").tobytes()),)
    colour = PNG_COLOURS[pixels.shape[1]]
    return png(len(row), 1, b"\0" + pixels.tobytes(), *key, colour=colour, bits=16)


def deep_tiff(row: list[list[int]], planes: bool = False, deflate: bool = False) -> bytes:
    """A TIFF of one row, RGB, 16 bits a channel, in pixels or in planes of one colour."""
    pixels = np.array(row, dtype="<u2")
    strips = [plane.tobytes() for plane in (pixels.T if planes else [pixels])]
    if deflate:
        strips = [zlib.compress(strip) for strip in strips]
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[TiffImagePlugin.IMAGEWIDTH] = len(row)
    tags[TiffImagePlugin.IMAGELENGTH] = tags[TiffImagePlugin.ROWSPERSTRIP] = 1
    tags[TiffImagePlugin.BITSPERSAMPLE] = (16, 16, 16)
    tags[TiffImagePlugin.SAMPLESPERPIXEL] = 3
    tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 2
    tags[TiffImagePlugin.PLANAR_CONFIGURATION] = 2 if planes else 1
    tags[TiffImagePlugin.COMPRESSION] = 8 if deflate else 1
    sizes = [len(strip) for strip in strips]
    tags[TiffImagePlugin.STRIPBYTECOUNTS] = tuple(sizes)
    tags[TiffImagePlugin.STRIPOFFSETS] = tuple(sum(sizes[:number]) for number in range(len(sizes)))
    buffer = BytesIO()
    tags.save(buffer)
    buffer.write(b"".join(strips))
    return buffer.getvalue()


def refused(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> BadImageError:
    with pytest.raises(BadImageError) as caught:
        decode(data, limits)
    return caught.value


class TestAccepted:
    def test_grey_png_keeps_its_pixels(self) -> None:
        image = decode(encode(Image.fromarray(GREY)))
        assert image.mode == "L"
        np.testing.assert_array_equal(to_array(image), GREY)

    def test_colour_png_keeps_its_pixels(self) -> None:
        image = decode(encode(Image.fromarray(COLOUR)))
        assert image.mode == "RGB"
        np.testing.assert_array_equal(to_array(image), COLOUR)

    @pytest.mark.parametrize(("pixels", "mode"), [(GREY, "L"), (COLOUR, "RGB")])
    def test_jpeg_is_close_to_its_source(self, pixels: np.ndarray, mode: str) -> None:
        image = decode(encode(Image.fromarray(pixels), "JPEG", quality=95, subsampling=0))
        assert image.mode == mode
        assert np.abs(to_array(image).astype(int) - pixels).mean() < 4

    @pytest.mark.parametrize("view", [bytearray, memoryview])
    def test_any_buffer_will_do(self, view: type) -> None:
        np.testing.assert_array_equal(to_array(decode(view(encode(Image.fromarray(GREY))))), GREY)

    def test_sixteen_bits_are_reduced_by_their_high_byte(self) -> None:
        deep = GREY.astype(np.uint16) * 256 + 255
        image = decode(encode(Image.fromarray(deep)))
        assert image.mode == "L"
        np.testing.assert_array_equal(to_array(image), GREY)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    @pytest.mark.parametrize("bits", [10, 12, 14, 16])
    def test_fewer_bits_in_sixteen_are_no_dark_image(self, kind: str, bits: int) -> None:
        ramp = np.linspace(0, 2**bits - 1, 240).astype(np.uint16).reshape(12, 20)
        image = decode(encode(Image.fromarray(ramp), kind))
        assert image.mode == "L"
        np.testing.assert_array_equal(to_array(image), ramp >> (bits - 8))

    @pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
    @pytest.mark.parametrize(("pixels", "mode"), [(GREY, "L"), (COLOUR, "RGB")])
    def test_tiff_keeps_its_pixels(
        self, pixels: np.ndarray, mode: str, options: dict[str, str]
    ) -> None:
        image = decode(encode(Image.fromarray(pixels), "TIFF", **options))
        assert image.mode == mode
        np.testing.assert_array_equal(to_array(image), pixels)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_tiff_whose_white_is_zero_is_inverted(self, dtype: type) -> None:
        ramp = np.linspace(0, np.iinfo(dtype).max, 240).astype(dtype).reshape(12, 20)
        data = bytearray(encode(Image.fromarray(ramp), "TIFF"))
        # The entry of PhotometricInterpretation: tag 262, a short, one value: 1, black is zero.
        entry = struct.pack("<HHIH", 262, 3, 1, 1)
        assert data.count(entry) == 1
        data[data.index(entry) + 8] = 0
        high_byte = ramp >> (8 * ramp.itemsize - 8)
        np.testing.assert_array_equal(to_array(decode(bytes(data))), 255 - high_byte)

    def test_palette_becomes_colour(self) -> None:
        image = Image.new("P", (4, 3), 1)
        image.putpalette([0, 0, 0, 10, 200, 30])
        decoded = decode(encode(image))
        assert decoded.mode == "RGB"
        assert (to_array(decoded) == (10, 200, 30)).all()

    def test_one_bit_becomes_black_and_white(self) -> None:
        decoded = decode(encode(Image.fromarray(GREY > 100)))
        assert decoded.mode == "L"
        np.testing.assert_array_equal(to_array(decoded), np.where(GREY > 100, 255, 0))

    def test_cmyk_jpeg_becomes_colour(self) -> None:
        decoded = decode(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"))
        assert decoded.mode == "RGB"
        red, green, blue = decoded.getpixel((8, 8))
        assert red < 10
        assert min(green, blue) > 245

    @pytest.mark.parametrize(
        ("mode", "clear", "half"),
        [("RGBA", (200, 200, 200, 0), (200, 200, 200, 128)), ("LA", (200, 0), (200, 128))],
    )
    def test_transparent_pixels_lie_on_black(self, mode: str, clear: object, half: object) -> None:
        for pixel, value in ((clear, 0), (half, 100)):
            decoded = to_array(decode(encode(Image.new(mode, (3, 3), pixel))))
            np.testing.assert_allclose(decoded, value, atol=1)

    def test_transparent_palette_entry_lies_on_black(self) -> None:
        image = Image.new("P", (2, 2), 1)
        image.putpalette([0, 0, 0, 200, 200, 200])
        assert not to_array(decode(encode(image, transparency=1))).any()

    @pytest.mark.parametrize(("colour", "depth"), [(0, 1), (2, 3)])
    def test_transparent_colour_lies_on_black(self, colour: int, depth: int) -> None:
        rows = b"\0" + b"\xc8" * depth + b"\x64" * depth
        key = struct.pack(f">{depth}H", *[200] * depth)
        decoded = decode(png(2, 1, rows, (b"tRNS", key), colour=colour))
        assert to_array(decoded.convert("L")).tolist() == [[0, 100]]

    def test_transparent_grey_of_sixteen_bits_lies_on_black(self) -> None:
        data = deep_png([[40000], [40001], [20000]], transparent=[40000])
        assert to_array(decode(data)).tolist() == [[0, 40001 >> 8, 20000 >> 8]]

    def test_transparent_pixels_do_not_count_as_the_brightest(self) -> None:
        data = deep_png([[65535], [4000], [2000]], transparent=[65535])
        assert to_array(decode(data)).tolist() == [[0, 4000 >> 4, 2000 >> 4]]

    @pytest.mark.parametrize(
        "data",
        [
            deep_png([[65535, 40000, 256], [20000, 255, 0]]),
            deep_tiff([[65535, 40000, 256], [20000, 255, 0]]),
            deep_tiff([[65535, 40000, 256], [20000, 255, 0]], deflate=True),
            deep_tiff([[65535, 40000, 256], [20000, 255, 0]], planes=True, deflate=True),
        ],
        ids=["png", "tiff", "deflated-tiff", "deflated-planes"],
    )
    def test_colour_of_sixteen_bits_is_reduced_by_its_high_byte(self, data: bytes) -> None:
        assert to_array(decode(data)).tolist() == [[[255, 156, 1], [78, 0, 0]]]

    @pytest.mark.parametrize("grey", [1, 3])
    def test_alpha_of_sixteen_bits_lies_on_black(self, grey: int) -> None:
        data = deep_png([[40000] * grey + [65535], [20000] * grey + [0]])
        assert to_array(decode(data).convert("L")).tolist() == [[156, 0]]

    @pytest.mark.parametrize(
        ("orientation", "upright"),
        [
            (1, GREY),
            (2, np.fliplr(GREY)),
            (3, np.rot90(GREY, 2)),
            (4, np.flipud(GREY)),
            (5, GREY.T),
            (6, np.rot90(GREY, -1)),
            (7, np.rot90(GREY, 2).T),
            (8, np.rot90(GREY)),
        ],
    )
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
    def test_exif_orientation_is_applied(
        self, orientation: int, upright: np.ndarray, kind: str
    ) -> None:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        decoded = to_array(decode(encode(Image.fromarray(GREY), kind, exif=exif)))
        assert decoded.shape == upright.shape
        assert np.abs(decoded.astype(int) - upright).mean() < 6


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", Rejection.EMPTY),
            (b"patient name: none", Rejection.NOT_AN_IMAGE),
            (b'{"instances": []}', Rejection.NOT_AN_IMAGE),
            (bytes(5000), Rejection.NOT_AN_IMAGE),
            (b"\xff\xd8", Rejection.DAMAGED),
            (b"\x89PNG\r\n\x1a\n", Rejection.DAMAGED),
            (b"MM\x00*" + bytes(200), Rejection.DAMAGED),
            (png(20, 12, b""), Rejection.DAMAGED),
            (png(0, 12, b""), Rejection.DAMAGED),
        ],
    )
    def test_not_a_whole_image(self, data: bytes, reason: Rejection) -> None:
        error = refused(data)
        assert error.reason is reason
        assert "JPEG, PNG, TIFF or DICOM" in str(error)

    def test_tiff_of_several_pages(self) -> None:
        page = Image.fromarray(GREY)
        error = refused(encode(page, "TIFF", save_all=True, append_images=[page]))
        assert error.reason is Rejection.MULTIPLE_FRAMES
        assert error.reason.http_status == 422
        assert str(error) == "The TIFF file holds several pages; send one image a file."

    @pytest.mark.parametrize("pixels", [GREY / np.float32(255), GREY.astype(np.int32) << 16])
    def test_tiff_of_more_than_sixteen_bits(self, pixels: np.ndarray) -> None:
        error = refused(encode(Image.fromarray(pixels), "TIFF"))
        assert error.reason is Rejection.UNSUPPORTED_FORMAT
        assert str(error) == "Images of more than 16 bits a channel are not accepted."

    @pytest.mark.parametrize(
        "data",
        [
            deep_png([[4000, 4000, 4000], [2000, 2000, 2000]]),
            deep_png([[16383, 0, 0]]),
            deep_png([[4000, 65535], [2000, 65535]]),
            deep_png([[4000, 4095], [2000, 4095]]),
            deep_png([[4000, 65535], [65535, 0]]),
            deep_png([[4000, 4000, 4000, 65535]]),
            deep_tiff([[4000, 4000, 4000], [2000, 2000, 2000]]),
            deep_tiff([[4000, 4000, 4000], [2000, 2000, 2000]], deflate=True),
        ],
        ids=["rgb", "14-bits", "la", "alpha-too", "hidden-white", "rgba", "tiff", "deflated-tiff"],
    )
    def test_fewer_bits_in_sixteen_with_colour_or_alpha(self, data: bytes) -> None:
        error = refused(data)
        assert error.reason is Rejection.UNSUPPORTED_FORMAT
        assert str(error) == (
            "The image has colour or transparency and uses 14 or fewer of its 16 bits a channel; "
            "send 8 bits a channel, or grey without transparency."
        )

    @pytest.mark.parametrize(
        "data",
        [
            deep_png([[40000, 40000, 40000], [20000, 20000, 20000]], transparent=[40000] * 3),
            png(2, 1, b"\0\x84", (b"tRNS", struct.pack(">H", 8)), bits=4),
            png(2, 1, b"\0\x90", (b"tRNS", struct.pack(">H", 2)), bits=2),
            deep_tiff([[40000, 40000, 40000], [20000, 20000, 20000]], planes=True),
        ],
        ids=["transparent-colour", "transparent-4-bits", "transparent-2-bits", "planes"],
    )
    def test_what_would_be_misread(self, data: bytes) -> None:
        error = refused(data)
        assert error.reason is Rejection.UNSUPPORTED_FORMAT
        assert str(error) == (
            "The file's bits a channel are not accepted together with its colours or its "
            "transparency; send 8 bits a channel, or grey without transparency."
        )

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
    def test_truncated(self, kind: str, kept: float) -> None:
        data = encoded_image(kind=kind)
        assert refused(data[: int(len(data) * kept)]).reason is Rejection.DAMAGED

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("GIF", encode(Image.fromarray(GREY), "GIF")),
            ("BMP", encode(Image.fromarray(GREY), "BMP")),
            ("PDF", b"%PDF-1.7\n" + bytes(200)),
            ("WebP", b"RIFF\x00\x00\x00\x00WEBP" + bytes(200)),
        ],
    )
    def test_another_format_is_named(self, name: str, data: bytes) -> None:
        error = refused(data)
        assert error.reason is Rejection.UNSUPPORTED_FORMAT
        assert str(error) == f"{name} files are not accepted; send JPEG, PNG, TIFF or DICOM."
        assert error.reason.http_status == 415

    def test_too_many_bytes(self) -> None:
        data = encoded_image()
        assert decode(data, DecodeLimits(max_bytes=len(data)))
        error = refused(data, DecodeLimits(max_bytes=len(data) - 1))
        assert error.reason is Rejection.TOO_MANY_BYTES
        assert error.reason.http_status == 413

    def test_the_byte_limit_is_named_in_mebibytes(self) -> None:
        error = refused(bytes(2**20 + 1), DecodeLimits(max_bytes=2**20))
        assert str(error) == "The image is larger than 1 MiB, the limit for one image."

    def test_too_many_pixels(self) -> None:
        data = encoded_image(size=(40, 30))
        assert decode(data, DecodeLimits(max_pixels=1200))
        error = refused(data, DecodeLimits(max_pixels=1199))
        assert error.reason is Rejection.TOO_MANY_PIXELS
        assert error.reason.http_status == 413
        assert "0.001199 megapixels, the limit for one image" in str(error)

    def test_a_decompression_bomb_is_refused_before_it_unfolds(self) -> None:
        bomb = png(50_000, 50_000, bytes(1000))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        assert refused(bomb).reason is Rejection.TOO_MANY_PIXELS
        assert time.process_time() - start < 0.5
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 50_000, "kilobytes; the pixels would take 2.5 GB"

    @pytest.mark.parametrize(
        "data",
        [
            b"SECRET-NAME, born 1950" * 10,
            b"\xff\xd8SECRET-NAME" * 10,
            png(9, 9, b"", (b"tEXt", b"Title\0SECRET-NAME")),
            b"GIF89a SECRET-NAME",
        ],
    )
    def test_the_sentence_holds_no_content(self, data: bytes) -> None:
        message = str(refused(data))
        assert "SECRET" not in message
        assert "BytesIO" not in message
        assert message.endswith(".")

    @pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_pixels": -1}])
    def test_limits_must_be_positive(self, limits: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="positive"):
            DecodeLimits(**limits)

    def test_a_limit_above_that_of_pillow_is_refused(self) -> None:
        with pytest.raises(ValueError, match="max_pixels can be at most"):
            DecodeLimits(max_pixels=10**9)


@pytest.mark.parametrize(
    "original",
    [
        encoded_image(kind="PNG"),
        encoded_image(kind="JPEG"),
        encode(Image.new("LA", (30, 30), (90, 10))),
        encode(Image.new("P", (30, 30))),
        encode(Image.new("CMYK", (30, 30)), "JPEG"),
        encode(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
        dicom_bytes(GREY, WindowCenter=100, WindowWidth=90),
        dicom_file(as_jpeg(dicom_dataset(GREY), GREY)),
    ],
    ids=[
        "png",
        "jpeg",
        "transparent-png",
        "palette-png",
        "cmyk-jpeg",
        "tiff",
        "dicom",
        "jpeg-dicom",
    ],
)
def test_mutated_files_give_an_image_or_a_rejection(original: bytes) -> None:
    randomness = random.Random(0)  # noqa: S311 - not for secrets
    decoded = rejected = 0
    for _ in range(500):
        data = bytearray(original)
        # Half of the mutations hit the header, where formats keep their structure.
        reach = randomness.choice((60, len(data)))
        for _ in range(randomness.randint(1, 6)):
            data[randomness.randrange(reach)] = randomness.randrange(256)
        if randomness.random() < 0.2:
            del data[randomness.randrange(len(data)) :]
        try:
            assert decode(data).mode in ("L", "RGB")
            decoded += 1
        except BadImageError:
            rejected += 1
    assert decoded
    assert rejected
