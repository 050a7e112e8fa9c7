"""Any image as RGB: integer modes against NumPy, the others against Pillow, damaged files, EXIF, every reader."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, TiffImagePlugin
from test_datasets import encoded, picture, pixels_of, read, save, write_parquet, write_stream
from torchvision.datasets.folder import IMG_EXTENSIONS

import sources
from augment import ImageError, as_rgb, open_rgb
from tools import pack_dataset
from tools.visualize_tokens import find_images
from utils import RunError

SIXTEEN = np.linspace(0, 65535, 12 * 10).round().astype(np.uint16).reshape(12, 10)  # gray, [H, W]


def scaled(values, top):
    """uint8 [H, W, 3]: values of 0 ... top as 0 ... 255, by whole numbers, of which Python has all."""
    gray = [(2 * 255 * int(value) + top) // (2 * top) for value in np.ravel(values)]
    return np.repeat(np.array(gray, np.uint8).reshape(*np.shape(values), 1), 3, axis=2)


def tiff(values, bits, sample_format=1, photometric=1, order="<"):
    """An uncompressed gray TIFF of one strip, written by hand; values of 12 bits are packed."""
    height, width = values.shape
    if bits == 12:
        bit_rows = "".join("".join(f"{value:012b}" for value in row) for row in values.tolist())
        content = int(bit_rows, 2).to_bytes(len(bit_rows) // 8, "big")
    else:
        content = values.astype(f"{order}{'if'[sample_format == 3]}{bits // 8}").tobytes()
    fields = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(content)),
        (339, 3, sample_format),
    ]
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(f"{order}I" if kind == 4 else f"{order}HH", *value)
        for tag, kind, number in fields
        for value in [(number,) if kind == 4 else (number, 0)]
    )
    directory = struct.pack(f"{order}H", len(fields)) + entries + struct.pack(f"{order}I", 0)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(content))
    return head + content + directory


def pixels(content, **options):
    return np.asarray(open_rgb(io.BytesIO(content), **options))


# -- integers and floats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_files_are_scaled_to_8_bits(kind):
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(SIXTEEN), kind)), scaled(SIXTEEN, 65535))


@pytest.mark.parametrize("top", [65535, 1023])
def test_16_bit_pgm_is_scaled_by_its_own_maximum(top):
    values = SIXTEEN if top == 65535 else SIXTEEN // 64
    content = f"P5\n10 12\n{top}\n".encode() + values.astype(">u2").tobytes()
    found = pixels(content).astype(int)
    assert np.abs(found - scaled(values, top)).max() <= (top != 65535)  # Pillow rounds to 16 bits first


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")])
def test_all_16_bit_modes_are_scaled(mode, dtype):
    try:
        image = Image.frombytes(mode, (10, 12), SIXTEEN.astype(dtype).tobytes())
    except ValueError:
        pytest.skip(f"this Pillow has no mode {mode}")
    np.testing.assert_array_equal(np.asarray(as_rgb(image)), scaled(SIXTEEN, 65535))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "top, bits, sample_format",
    [(4095, 12, 1), (65535, 16, 1), (32767, 16, 2), (2**31 - 1, 32, 2), (2**32 - 1, 32, 1), (65535, 32, 1)],
)
def test_integer_tiff_is_scaled_by_its_range(top, bits, sample_format, order):
    if order == ">" and (bits, sample_format) in ((12, 1), (32, 1)):
        pytest.skip("Pillow opens no such file")
    values = np.linspace(0, top, 120).round().astype(np.int64).reshape(12, 10)
    # 65535 in 32 bits: 16-bit data that a program has widened
    np.testing.assert_array_equal(pixels(tiff(values, bits, sample_format, order=order)), scaled(values, top))


def test_16_bit_tiff_with_white_as_zero_is_inverted():
    np.testing.assert_array_equal(pixels(tiff(SIXTEEN, 16, photometric=0)), scaled(65535 - SIXTEEN, 65535))


def test_32_bit_images_in_memory_are_scaled():
    image = Image.fromarray(SIXTEEN.astype(np.int32))
    assert image.mode == "I"
    np.testing.assert_array_equal(np.asarray(as_rgb(image)), scaled(SIXTEEN, 65535))


def test_pixels_without_a_range_are_refused(tmp_path):
    floats, negative = tmp_path / "float.tif", tmp_path / "negative.tif"
    floats.write_bytes(tiff(SIXTEEN / 65535, 32, sample_format=3))
    negative.write_bytes(tiff(SIXTEEN.astype(np.int64) // 4 - 9000, 16, sample_format=2))
    for path, word in ((floats, "float pixels"), (negative, "negative pixels (down to -9000)")):
        source = sources.Source(sources.PathImages([path]), np.zeros(1, np.int64), 1, np.arange(1))
        with pytest.raises(RunError) as caught:
            source[0]
        assert str(path) in str(caught.value) and word in str(caught.value) and "8 or 16 bits" in str(caught.value)


# -- every other mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_pillows(mode):
    image = picture(3).convert(mode) if mode != "PA" else picture(3).convert("P").convert("PA")
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(as_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"])
def test_transparent_palettes_are_pillows(transparency):
    content = io.BytesIO()
    picture(3).quantize(8).save(content, "PNG", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow would rather keep the transparency
        with Image.open(io.BytesIO(content.getvalue())) as image:
            assert image.mode == "P" and "transparency" in image.info
            expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(pixels(content.getvalue()), expected)


def test_a_neutral_lab_image_is_gray():
    (color,) = set(map(tuple, pixels(encoded(Image.new("LAB", (4, 3), (128, 128, 128)), "TIFF")).reshape(-1, 3)))
    assert len(set(color)) == 1 and 110 < color[0] < 130


def test_48_bit_color_keeps_its_high_bytes():
    # PNG by hand: Pillow writes none
    rows = np.stack([SIXTEEN, SIXTEEN[::-1], SIXTEEN[:, ::-1]], axis=2)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 10, 12, 16, 2, 0, 0, 0)
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(raw), b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    np.testing.assert_array_equal(pixels(content), rows >> 8)


# -- damaged files -----------------------------------------------------------------------------------------------------


def writable_kinds():
    """Formats of the suffixes of image files, as far as this Pillow writes them."""
    Image.init()
    kinds = {Image.registered_extensions()[suffix] for suffix in (*IMG_EXTENSIONS, ".gif")}
    return sorted((kinds | {"AVIF"}) & set(Image.SAVE))


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (3001, 3)])
def test_extremely_long_images_are_refused(tmp_path, size):
    """PNGs of a few hundred bytes; timm's evaluation transform would resize the first to 15360000 x 256 px."""
    Image.new("L", size).save(tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size < 1000
    with pytest.raises(ImageError, match=f"^{size[0]} x {size[1]} px, over 1000 times"):
        open_rgb(tmp_path / "long.png")


def test_long_images_are_read():
    assert as_rgb(Image.new("L", (3000, 3))).size == (3000, 3)


@pytest.mark.parametrize("kind", writable_kinds())
def test_damaged_files_raise_one_type_of_error(kind):
    try:
        whole = encoded(Image.linear_gradient("L").resize((20, 24)).convert("RGB"), kind)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"this Pillow writes no {kind}: {error}")
    generator = np.random.default_rng(0)
    for number in range(100):
        damaged = bytearray(whole)
        if number % 2:
            del damaged[generator.integers(len(whole)) :]
        else:
            for position in generator.integers(len(whole), size=3):
                damaged[position] ^= 1 << int(generator.integers(8))
        try:
            assert open_rgb(io.BytesIO(damaged)).mode == "RGB"
        except ImageError as error:
            assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("codec"), struct.error("short"), IndexError(), EOFError(), MemoryError(), KeyError("x")]
)
def test_whatever_a_decoder_raises_is_a_broken_image(tmp_path, monkeypatch, error):
    for name in ("0.png", "1.png"):
        save(picture(0), tmp_path / name)

    def convert(image, *_):
        if image.filename.endswith("0.png"):
            raise error
        return picture(0)

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.convert", convert)
    images = sources.PathImages([tmp_path / "0.png", tmp_path / "1.png"])
    source = sources.Source(images, np.array([0, 1]), 2, np.arange(2))
    with pytest.raises(RunError, match=r"^cannot read image .*0\.png \(.+\); fix or remove it[^\n]*$"):
        source[0]
    tolerant = sources.Source(images, np.array([0, 1]), 2, np.arange(2), sources.BrokenImages(images, 1))
    assert tolerant[0][1] == 1 and tolerant.broken.all_found() == [0]


def test_an_error_of_a_reader_names_the_image():
    class Reader:
        def __getitem__(self, index):
            return {}["image"], 0

    source = sources.Source(sources.DatasetImages(Reader(), "hfds/x"), np.zeros(2, np.int64), 1, np.arange(2))
    with pytest.raises(RunError, match="cannot read image number 1 of hfds/x .KeyError"):
        source[1]


# -- every reader ------------------------------------------------------------------------------------------------------

GRAY = {"a": SIXTEEN, "b": SIXTEEN[::-1].copy()}  # a class each
OTHER = {name: values.T.copy() for name, values in GRAY.items()}  # validation images must be others


@pytest.fixture
def gray_tree(tmp_path):
    for part in ("train", "val", "validation"):
        for name, values in (GRAY if part == "train" else OTHER).items():
            save(Image.fromarray(values), tmp_path / "tree" / part / name / "0.png")
    return tmp_path / "tree"


@pytest.mark.parametrize("name", ["IMNET", "CIFAR10", "torch/image_folder", "hfds/"])
def test_readers_of_files_scale_16_bit_images(gray_tree, tmp_path, name):
    path = tmp_path / "cache" if name == "hfds/" else gray_tree
    if name == "hfds/":
        for part, images in (("train", GRAY), ("validation", OTHER)):
            write_parquet(tmp_path / "set", part, [encoded(Image.fromarray(v)) for v in images.values()], [0, 1])
        name += str(tmp_path / "set")
    for source, images in zip(read(name, path), (GRAY, OTHER), strict=True):
        for found, values in zip(pixels_of(source), images.values(), strict=True):
            np.testing.assert_array_equal(found, scaled(values, 65535))


def test_packs_hold_scaled_16_bit_images(gray_tree, tmp_path):
    pack_dataset.main(["--data-set", "IMNET", "--data-path", str(gray_tree), "--output", str(tmp_path / "pack")])
    for source, images in zip(read("PACKED", tmp_path / "pack"), (GRAY, OTHER), strict=True):
        for found, values in zip(pixels_of(source), images.values(), strict=True):
            np.testing.assert_array_equal(found, scaled(values, 65535))


@pytest.mark.parametrize("scheme", ["wds/", "hfids/"])
def test_streams_scale_16_bit_images(gray_tree, tmp_path, monkeypatch, scheme):
    if scheme == "wds/":
        monkeypatch.setattr("test_datasets.encoded", lambda _: encoded(Image.fromarray(SIXTEEN)))
        train, val = read(scheme, write_stream(tmp_path), num_classes=3)
    else:
        (gray_tree / "val").rename(tmp_path / "val")  # Hugging Face's reader takes it for another validation part
        train, val = read(f"{scheme}{gray_tree}", tmp_path / "cache")
    expected = {scaled(values, 65535).tobytes() for images in (GRAY, OTHER) for values in images.values()}
    for stream in (train, val):
        stream.transform = np.asarray
        batch = next(iter(stream))
        assert batch.images.tobytes() in expected


def test_a_stream_names_an_image_that_cannot_be_rgb(tmp_path, monkeypatch):
    monkeypatch.setattr("test_datasets.encoded", lambda _: tiff(SIXTEEN / 65535, 32, sample_format=3))
    _, val = read("wds/", write_stream(tmp_path), num_classes=3)
    val.transform = np.asarray
    with pytest.raises(RunError, match="cannot read image number 0 .float pixels"):
        next(iter(val))


# -- EXIF --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_only_photos_of_tools_are_turned_upright(tmp_path, orientation):
    image, exif = picture(4), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path := tmp_path / "photo.png", exif=exif)
    stored = np.asarray(image)
    expected = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    np.testing.assert_array_equal(np.asarray(find_images([str(tmp_path)])[0][0]), expected)
    np.testing.assert_array_equal(np.asarray(sources.PathImages([path])[0]), stored)


def test_hugging_face_streams_are_not_turned(tmp_path):
    image, exif = picture(4), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in ("train/a/0.png", "validation/b/0.png"):
        save(image, tmp_path / "tree" / path)
        image.save(tmp_path / "tree" / path, exif=exif)
    _, val = read(f"hfids/{tmp_path / 'tree'}", tmp_path / "cache", num_classes=2)
    val.transform = np.asarray
    np.testing.assert_array_equal(next(iter(val)).images, np.asarray(image))


def test_tiff_orientation_is_applied_once():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[ExifTags.Base.Orientation] = 6
    content = io.BytesIO()
    picture(4).save(content, "TIFF", tiffinfo=tags)
    expected = np.rot90(np.asarray(picture(4)), -1)  # Pillow does it by itself
    np.testing.assert_array_equal(pixels(content.getvalue()), expected)
    np.testing.assert_array_equal(pixels(content.getvalue(), upright=True), expected)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0", b"Exif\0\0damaged, and long enough", b"Exif\0\0II*\0\x08\0\0\0\x09\0"]
)
def test_damaged_exif_does_not_turn_a_sound_photo(tmp_path, kind, exif):
    content = io.BytesIO()
    picture(3).save(content, kind, exif=exif)
    np.testing.assert_array_equal(pixels(content.getvalue(), upright=True), pixels(content.getvalue()))
    (tmp_path / f"x.{kind}").write_bytes(content.getvalue())
    photo, _ = find_images([str(tmp_path)])[0]  # as tools.predict reads it
    np.testing.assert_array_equal(np.asarray(photo), pixels(content.getvalue()))
