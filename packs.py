"""Packed data sets: all images in a few large files, reduced once, so that reading one costs next to nothing.

`tools/pack_dataset.py` writes such a folder, `--data-set PACKED` reads it:

    pack.json         format version, kind of record, sizes, checksums; written last: without it there is no pack
    train_index.npy   a row of `INDEX` for each image: where its record is, what it shows, its checksum
    train_00000.bin   the records, one after the other
    val_...           likewise

A record of kind uint8 is the pixels, [height, width, RGB], row by row; one of kind jpeg is a JPEG file.
"""

from __future__ import annotations

import io
import os
import reprlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from augment import ImageError, open_rgb
from utils import UserError, map_array, read_json, regular_file

VERSION = 1
PACK = "pack.json"
KINDS = ("uint8", "jpeg")
SPLITS = ("train", "val")
INDEX = np.dtype(
    [
        (name, "<u8" if name == "offset" else "<u4")
        for name in ("shard", "offset", "length", "height", "width", "target", "crc32")
    ]
)
MOST_CLASSES = 2**20
ROWS = 2**20  # of the index, to check at once
LARGEST_SIDE = 65535  # pixels; a JPEG has no larger one
LARGEST_AREA = 2 * Image.MAX_IMAGE_PIXELS  # Pillow decodes nothing larger


def _broken(flag: str, folder: Path, what: str) -> UserError:
    return UserError(f"{flag} {folder}: {what}; pack it again with python -m tools.pack_dataset")


def read_about(folder: Path, flag: str = "--data-path") -> dict[str, Any]:
    """What pack.json says; `flag` is the one that named the folder.

    Raises:
        UserError: if there is no such file, or none that this version reads.
    """
    try:
        about = read_json(folder / PACK)
        version = _count(about, "version")
    except FileNotFoundError:
        raise _broken(flag, folder, f"has no {PACK}, so the pack is missing or unfinished") from None
    except OSError as error:
        raise _broken(flag, folder, f"{PACK} cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(flag, folder, PACK, error) from None
    if version != VERSION:
        raise _broken(flag, folder, f"is a pack of format version {version}, and this program reads {VERSION}")
    return about


def _damaged(flag: str, folder: Path, name: str, error: Exception) -> UserError:
    """The error of a file's content: a KeyError names what is missing, a ValueError says what is wrong."""
    said = f"has no {error}" if isinstance(error, KeyError) else str(error)
    return _broken(flag, folder, f"{name} is damaged ({said})")


def _count(values: Mapping[str, Any], name: str, low: int = 0, high: int = 2**32 - 1) -> int:
    """A whole number in pack.json.

    Raises:
        LookupError, TypeError, ValueError: if it is missing, or none from `low` to `high`.
    """
    value = values[name] if isinstance(values, dict) else None
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {reprlib.repr(value)}")
    return value


def _stated_names(about: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """The names of the classes; () if pack.json has none, as in earlier versions and for data without names.

    Raises:
        ValueError: if they are no names, or not one for each class.
    """
    names = about.get("class_names") or []
    if type(names) is not list or len(names) not in (0, num_classes) or not all(type(name) is str for name in names):
        raise ValueError(f"class_names are no names of {num_classes} classes")
    return tuple(names)


class PackImages:
    """The images of one split of a pack.

    The shards are opened when first read, by each process for itself; a pickle holds only the folder's name, so that
    it is small and other processes open the pack anew. A record is read in one request: page faults of a memory map
    would ask a network file system for a few pages at a time.

    Attributes:
        kind: "uint8" or "jpeg".
        targets: class indices, int64 [N].
        shapes: height, width and 3 of each image, int64 [N, 3].
        num_classes: number of classes.
        class_names: their names, or () if the packed data did not say.
        index: rows of `INDEX`, [N], mapped into memory.

    Raises:
        UserError: if a file is missing, truncated, damaged (as far as that shows without reading the shards) or of
            another version.
    """

    def __init__(self, folder: str | Path, split: str, flag: str = "--data-path") -> None:
        """Args: split: "train" or "val"; flag: the one that named the folder, for error messages."""
        self.folder, self.split = Path(folder), split
        about = read_about(self.folder, flag)
        try:
            part = about["splits"][split]
            self.kind, self.num_classes = about["kind"], _count(about, "num_classes", 1, MOST_CLASSES)
            if self.kind not in KINDS:
                raise ValueError(f"kind is {reprlib.repr(self.kind)}")
            self.class_names = _stated_names(about, self.num_classes)
            length, checksum = _count(part, "images", 1), _count(part, "index_crc32")
            self.shards = self._check_shards(part["shards"], flag)
        except (LookupError, TypeError, ValueError) as error:
            raise _damaged(flag, self.folder, PACK, error) from None
        self.index = self._read_index(length, checksum, flag)
        self.targets = self.index["target"].astype(np.int64)
        self.shapes = np.full((len(self.index), 3), 3, np.int64)
        self.shapes[:, 0], self.shapes[:, 1] = self.index["height"], self.index["width"]
        self._files: dict[int, io.FileIO] = {}

    def _check_shards(self, shards: Any, flag: str) -> list[dict[str, Any]]:
        """The shards that pack.json states, which must be there.

        Raises:
            LookupError, TypeError, ValueError: if it states none, or one of another name than the writer's.
            UserError: if a file is not there, or of another length.
        """
        if type(shards) is not list or not shards:
            raise ValueError("has no shards")
        for number, shard in enumerate(shards):
            name = f"{self.split}_{number:05d}.bin"
            if shard["name"] != name:  # it could lead out of the folder
                raise ValueError(f"shard {number} is named {reprlib.repr(shard['name'])}")
            stated, _ = _count(shard, "bytes", 1, 2**63 - 1), _count(shard, "crc32")
            try:
                length = regular_file(self.folder / name).stat().st_size
            except OSError as error:
                raise _broken(flag, self.folder, f"{name} cannot be read ({error.strerror})") from None
            if length != stated:
                raise _broken(flag, self.folder, f"{name} has {length} bytes instead of {stated}")
        return shards

    def _read_index(self, length: int, checksum: int, flag: str) -> np.ndarray:
        name = f"{self.split}_index.npy"
        try:
            index = map_array(self.folder / name, INDEX, length).view(np.ndarray)
            if zlib.crc32(index) != checksum:
                raise ValueError("wrong checksum")
            for first in range(0, length, ROWS):
                self._check_rows(index[first : first + ROWS], first)
        except OSError as error:
            raise _broken(flag, self.folder, f"{name} cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise _damaged(flag, self.folder, name, error) from None
        return index

    def _check_rows(self, rows: np.ndarray, first: int) -> None:
        """Make sure that these rows of the index, from number `first`, are images within a shard and of a class.

        Raises:
            ValueError: naming the first that is not.
        """
        shard, offset, length, height, width, target, _ = (rows[name].astype(np.uint64) for name in INDEX.names)
        ends = np.array([shard["bytes"] for shard in self.shards], np.uint64)
        end = ends[np.minimum(shard, len(ends) - 1).astype(np.int64)]
        area = np.minimum(height, LARGEST_SIDE) * np.minimum(width, LARGEST_SIDE)
        wrong = {
            "shard": shard >= len(ends),
            "offset": (offset > end) | (length > end - np.minimum(offset, end)),
            "size": (area == 0) | (np.maximum(height, width) > LARGEST_SIDE) | (area > LARGEST_AREA),
            "length": (length != 3 * area) if self.kind == "uint8" else length == 0,
            "class": target >= self.num_classes,
        }
        for what, found in wrong.items():
            if found.any():
                raise ValueError(f"the {what} of image {first + found.argmax()} is impossible")

    def __reduce__(self) -> tuple[Any, ...]:
        return PackImages, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self.index)

    def shard(self, number: int) -> io.FileIO:
        """An open shard."""
        if number not in self._files:
            self._files[number] = open(self.folder / self.shards[number]["name"], "rb", buffering=0)  # noqa: SIM115
        return self._files[number]

    def record(self, index: int) -> np.ndarray:
        """The bytes of an image as they are stored, read-only uint8 [length].

        Raises:
            ImageError: if the file has become shorter.
        """
        number, offset, length, *_ = self.index[index].item()
        content = os.pread(self.shard(number).fileno(), length, offset)
        if len(content) < length:
            raise ImageError(f"{len(content)} of {length} bytes are there")
        return np.frombuffer(content, np.uint8)

    def __getitem__(self, index: int) -> Image.Image:
        """The RGB image.

        Raises:
            ImageError: if the record is not all there, or that of a jpeg is damaged.
        """
        if self.kind == "uint8":
            return Image.fromarray(self.array(index))
        record = self.record(index)
        # Most damage would only change colors; this costs a hundredth of decoding.
        if zlib.crc32(record) != self.index["crc32"][index]:
            raise ImageError("wrong checksum")
        image, (height, width, _) = open_rgb(io.BytesIO(record)), self.shapes[index]
        if image.size != (width, height):
            raise ImageError(f"is {image.width} by {image.height} pixels, not {width} by {height}")
        return image

    def array(self, index: int) -> np.ndarray:
        """The pixels, uint8 [height, width, 3], read-only.

        Raises:
            ImageError: if the record is not all there, or that of a jpeg is damaged. Pixels are not looked at; `verify`
                does.
        """
        if self.kind == "jpeg":
            return np.asarray(self[index])
        return self.record(index).reshape(self.shapes[index])

    def describe(self, index: int) -> str:
        """What to call this image in an error message."""
        number, offset, *_ = self.index[index].item()
        return f"number {index} of {self.split} in {self.folder} (byte {offset} of {self.shards[number]['name']})"

    def file_names(self, order: np.ndarray) -> bytes:
        """What identifies the images in order: checksums of what they show, for a pack has no file names."""
        return self.index["crc32"][order].tobytes()


def _checksum(file: io.FileIO) -> int:
    """CRC-32 of a whole file."""
    file.seek(0)
    checksum = 0
    while content := file.read(2**22):
        checksum = zlib.crc32(content, checksum)
    return checksum


def verify(folder: Path, flag: str = "--data-path", most: int = 10) -> list[str]:
    """Read a whole pack; the names of its first damaged records, at most `most`. An intact pack has none.

    Raises:
        UserError: if it cannot be opened.
    """
    damaged: list[str] = []
    for split in SPLITS:
        images = PackImages(folder, split, flag)
        bar = tqdm(images.shards, split, unit="shard", disable=None)  # None: off unless on a terminal
        for number, shard in enumerate(bar):
            if _checksum(images.shard(number)) == shard["crc32"]:
                continue
            rows = np.flatnonzero(images.index["shard"] == number)
            wrong = [row for row in rows if zlib.crc32(images.record(row)) != images.index["crc32"][row]]
            damaged += [images.describe(row) for row in wrong[:most]] or [shard["name"]]
            if len(damaged) >= most:
                return damaged[:most]
    return damaged
