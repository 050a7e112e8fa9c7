"""Any image file or PIL image as 8-bit RGB."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from utils import reason, regular_file

# What the suffixes of image files promise. Pillow takes other formats by their content, whatever the name, and runs
# programs for some: Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags


class ImageError(OSError):
    """An image that cannot be read or has no meaning as RGB; the message does not name it."""


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Raise an `ImageError` instead of any other exception: decoders raise everything on damaged files."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        expected = isinstance(error, OSError | SyntaxError | ValueError | Image.DecompressionBombError)
        raise ImageError(reason(error) if expected else repr(error)) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to mode RGB.

    Integer modes are scaled from their range to 0 ... 255 and rounded; Pillow would clip them at 255. Other modes are
    as in Pillow: palettes are looked up, alpha is dropped, CMYK is converted.

    Raises:
        ImageError: damaged, or pixels without a known range (float, negative integers).
    """
    with decoding():
        if image.mode == "F":
            raise ImageError("float pixels, whose range is unknown; convert it to 8 or 16 bits")
        return _from_integers(image) if image.mode.startswith("I") else image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """RGB from mode I or I;16, which may hold 12, 16 or 32 bits.

    Values up to 65535 are 16-bit gray in any mode: Pillow opens 16-bit PNG and PGM in mode I, too.
    """
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    bits, signed = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == 2
    if bits == 32 and not signed:
        values %= 2**32  # mode I is signed
    if values.min() < 0:
        raise ImageError(f"negative pixels (down to {values.min()}); convert it to 8 or 16 bits")
    top = 2 ** (bits - signed) - 1
    if bits > 16 or values.max() > top:
        top = 65535 if values.max() <= 65535 else max(top, 2**31 - 1)
    if tags.get(PHOTOMETRIC) == 0:  # white is 0, which Pillow heeds in 8 bits only
        values = top - values
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8)).convert("RGB")


def open_image(file: Any) -> Image.Image:
    """Open, but do not decode, an image file of one of `FORMATS` (a path or a binary stream).

    Raises:
        ImageError: if it is of another format.
        OSError: if it cannot be read, or is no regular file.
    """
    if isinstance(file, str | Path):
        regular_file(file)
    Image.init()
    try:
        return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except UnidentifiedImageError:
        raise ImageError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or damaged") from None


def open_rgb(file: Any, upright: bool = False) -> Image.Image:
    """Decode a file (a path or a binary stream) as RGB.

    Args:
        upright: turn a photo as its EXIF orientation says. timm does not, so neither do training and evaluation.

    Raises:
        ImageError: see `as_rgb`; or if it is no regular file, or none of `FORMATS`.
    """
    with decoding(), open_image(file) as image:
        rgb = as_rgb(image)
        if upright and image.format != "TIFF":  # Pillow turns those itself
            rgb.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
            rgb = ImageOps.exif_transpose(rgb)
        return rgb
