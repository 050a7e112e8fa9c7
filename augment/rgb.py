"""Conversion of image files and PIL images to 8-bit RGB."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from utils import reason, regular_file

# Formats to accept. By default, Pillow detects the format from the content, whatever the file name, and may run
# programs for it, such as Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF")
MAX_ASPECT = 1000  # maximum long side, relative to the short side
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags


class ImageError(OSError):
    """An image that cannot be read or converted to RGB; the message does not include its name."""


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Turn all exceptions of the block into an `ImageError`; decoders may raise anything on damaged files."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        expected = isinstance(error, OSError | SyntaxError | ValueError | Image.DecompressionBombError)
        raise ImageError(reason(error) if expected else repr(error)) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image to mode RGB.

    Integer modes are scaled from their range to [0, 255] and rounded (Pillow would clip them at 255). Other modes are
    converted by Pillow: palettes are looked up, alpha is dropped, CMYK is converted.

    Raises:
        ImageError: if the image is damaged or extremely long, or its pixels have no known range (float, negative
            integers).
    """
    with decoding():
        if max(image.size) > MAX_ASPECT * min(image.size):
            # Resizing the short side of 60000 x 1 px to 256 px would take 12 GB.
            raise ImageError(f"{image.width} x {image.height} px, over {MAX_ASPECT} times its short side; crop it")
        if image.mode == "F":
            raise ImageError("float pixels, whose range is unknown; convert it to 8 or 16 bits")
        return _from_integers(image) if image.mode.startswith("I") else image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """Convert mode I or I;16, which may hold 12, 16 or 32 bits, to RGB.

    Values up to 65535 are 16-bit gray in any of these modes: Pillow opens 16-bit PNG and PGM files in mode I, too.
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
    if tags.get(PHOTOMETRIC) == 0:  # white is 0; Pillow handles this in 8 bits only
        values = top - values
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8)).convert("RGB")


def open_image(file: Any) -> Image.Image:
    """Open an image file (path or binary stream) of one of `FORMATS` without decoding it.

    Raises:
        ImageError: if it has another format.
        OSError: if it cannot be read or is not a regular file.
    """
    if isinstance(file, str | Path):
        regular_file(file)
    Image.init()
    try:
        return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except UnidentifiedImageError:
        raise ImageError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or damaged") from None


def open_rgb(file: Any, upright: bool = False) -> Image.Image:
    """Decode an image file (path or binary stream) to RGB.

    Args:
        upright: rotate photos by their EXIF orientation; timm does not, nor do training and evaluation by default.

    Raises:
        ImageError: if it is damaged, not a regular file, or not one of `FORMATS`; see also `as_rgb`.
    """
    with decoding(), open_image(file) as image:
        rgb = as_rgb(image)
        if upright and image.format != "TIFF":  # Pillow itself rotates TIFF files
            orientation, rgb.info = _orientation(image), {}  # its copy of the EXIF data may be damaged
            rgb.getexif()[ExifTags.Base.Orientation] = orientation
            rgb = ImageOps.exif_transpose(rgb)
        return rgb


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image; 1 (upright) if there is none, or if the EXIF data are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser may raise anything on damaged data
        return 1
