"""Data sets: finding and reading them as sources, and the transforms on the host."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import http.client
import io
import itertools
import json
import os
import re
import sys
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from timm.data import create_dataset, create_transform
from timm.data.readers.reader_wds import ReaderWds
from timm.data.readers.reader_wds import wds as webdataset
from timm.data.readers.targets import get_field, has_field
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import IterableDataset
from torchvision import transforms
from torchvision.datasets.folder import is_image_file

from augment import PADDING, SMALL_IMAGE, Normalization, ViewOptions, check_policy
from packs import SPLITS, PackImages
from sources import (
    BrokenImages,
    Data,
    DatasetImages,
    HostView,
    MemoryImages,
    PathImages,
    Source,
    StreamingImages,
    as_tensors,
    class_index,
    from_tensors,
    hold_out,
    keep_in_memory,
    take_fraction,
    whole_source,
)
from utils import (
    Progress,
    RunError,
    UserError,
    logger,
    main_process_first,
    once_per_machine,
    read_json,
    reason,
    regular_file,
)

DIGITS_FILE = Path(__file__).parent / "assets" / "digits.npz"
NAMES = ("CIFAR", "CIFAR10", "CIFAR100", "IMNET", "INAT", "INAT19", "FLOWERS", "CARS", "DIGITS", "PACKED")
SCHEMES = ("hfds/", "hfids/", "wds/", "torch/", "tfds/")
CSV = "csv/"
KNOWN_NAMES = f"{', '.join(NAMES)}, {CSV}FILE, or a timm name that starts with {', '.join(SCHEMES)}"
TORCH_SPLITS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "eval", "evaluation", "test")}
TRAIN_OR_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")  # timm: all but "train" is test
WDS_IMAGES = "jpg;png;webp;jpeg;jfif;bmp;tif;tiff;gif;ppm;pgm;avif"  # timm's three first
CSV_COLUMNS = {
    "--image-column": ("path", "image", "image_path", "file", "filepath", "file_path", "filename", "file_name"),
    "--label-column": ("label", "class", "class_name", "target", "category"),
}
SLICE = re.compile(r"(\w+(?:\.\w+)*)(\[(?:(-?\d[\d_]*)(%)?)?:(?:(-?\d[\d_]*)(%)?)?\])?(?:\([^)]*\))?")
LONGEST_SHOWN = 120  # characters of a path that is not one, such as an image in base64
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


# -- reading the data sets ---------------------------------------------------------------------------------------------


TrainAndVal = tuple[Data, Data]


@dataclass(frozen=True)
class DataOptions:
    """Options of the data. The fields are flags of main.py."""

    data_set: str = "IMNET"  # one of `NAMES`, or timm's name with a scheme such as `hfds/`
    data_path: str | None = None  # CIFAR, FLOWERS and `torch/` default to ./data
    inat_category: str = "name"  # the level of iNaturalist's taxonomy to classify
    inat_numbering: str = "id"  # order of its classes: category "id", or "original": first appearance in train
    train_split: str = "train"  # of a CSV file with a column "split", or a timm data set; or a folder of class folders
    val_split: str = "validation"  # likewise
    image_column: str | None = None  # of a CSV file or timm's data sets other than `torch/`; None: the usual names
    label_column: str | None = None  # likewise
    num_classes: int | None = None  # number of classes, if the data do not state it
    nb_classes: int | None = None  # required number of classes; None: any
    upright: bool = False  # rotate photos in folders and CSV files by their EXIF orientation
    val_fraction: float = 0.0  # fraction of each class to hold out, for folders and CSV files without a validation part
    train_fraction: float = 1.0  # fraction of the training images of each class to use
    ram_cache: float = 1024  # MiB; smaller data sets are decoded once and kept in memory
    skip_broken_images: int = 0  # unreadable training images to tolerate


def build_sources(options: DataOptions, local_rank: int = 0, eval_only: bool = False) -> TrainAndVal:
    """Read the training and validation data; reduce them to `train_fraction` and keep small ones in memory.

    With `eval_only`, the training part may be empty. The first process of a machine downloads while the others wait.

    Raises:
        UserError: see `read_sources`; also if the number of classes is not `nb_classes`, if there is one class only to
            train on, or if the data do not support a flag.
    """
    train, val = (_upright(part, options) for part in read_sources(options, local_rank, eval_only))
    if options.nb_classes not in (None, val.num_classes):
        name = " ".join(filter(None, (options.data_set, options.data_path)))
        raise UserError(f"--nb-classes {options.nb_classes}: {name} has {val.num_classes} classes; drop the flag")
    if not eval_only and val.num_classes == 1:
        name = " ".join(filter(None, (options.data_set, options.data_path)))
        class_name = f", {val.class_names[0]}" if val.class_names else ""
        raise UserError(
            f"--data-set {name}: has one class only{class_name}, so any model is always right; it needs two or more "
            f"(name the folder that holds the class folders)"
        )
    if isinstance(train, Source):
        broken = BrokenImages(train.images, options.skip_broken_images) if options.skip_broken_images else None
        train = replace(train, broken=broken, is_training=True)
    elif options.skip_broken_images:
        raise UserError("--skip-broken-images: a stream skips them by itself; drop the flag")
    if not eval_only:
        train = keep_in_memory(take_fraction(train, options.train_fraction), options.ram_cache)
    return train, keep_in_memory(val, options.ram_cache)


def read_sources(options: DataOptions, local_rank: int = 0, eval_only: bool = False) -> TrainAndVal:
    """Find the training and validation part of a data set; download it if possible.

    Raises:
        UserError: unknown name, missing or badly laid-out folder, failed download.
    """
    name = options.data_set
    _check_options(options)
    if name.startswith(SCHEMES):
        train, val = _timm_sources(options, local_rank, eval_only)
        if not eval_only and _share_images(train, val, options):
            raise UserError(
                f"--train-split {options.train_split}, --val-split {options.val_split}: both read the same images of "
                f"{name}; name two splits without common images"
            )
        return train, val
    if name == "DIGITS":
        return _digits()
    if name.startswith(CSV):
        return _listed_once(partial(_csv, options, eval_only), local_rank)
    root = _folder_of(name, options.data_path)
    if name.startswith("CIFAR"):
        return _cifar(root, options, local_rank, eval_only)
    if name == "FLOWERS":
        return _flowers(root, local_rank)
    if name == "PACKED":
        return _packed(root)
    readers = {
        "IMNET": partial(_image_folders, root, options, eval_only),
        "CARS": partial(_cars, root),
        "INAT": partial(_inaturalist, root, 2018, options),
        "INAT19": partial(_inaturalist, root, 2019, options),
    }
    return _listed_once(readers[name], local_rank)


def _check_options(options: DataOptions) -> None:
    """Check that the data set is known and has what the other options name.

    Raises:
        UserError: naming the first option that does not fit.
    """
    name = options.data_set
    if not name.startswith((*SCHEMES, CSV)) and name not in NAMES:
        raise UserError(f"--data-set {name}: unknown; use one of {KNOWN_NAMES}")
    for flag, column in (("--image-column", options.image_column), ("--label-column", options.label_column)):
        if column is not None and (name in NAMES or name.startswith("torch/")):
            raise UserError(f"{flag} {column}: {name} has no columns; drop the flag")
    for flag, split, default in _changed_splits(options):
        if name in NAMES and name != "IMNET" and not name.startswith("CIFAR"):
            raise UserError(f"{flag} {split}: {name} has no named splits; drop the flag, or pass {flag} {default}")
    if options.val_fraction and name != "IMNET" and not name.startswith(CSV):
        raise UserError(f"--val-fraction {options.val_fraction:g}: {name} has a validation part; drop the flag")
    if options.num_classes is not None and not name.startswith(SCHEMES):
        raise UserError(f"--num-classes {options.num_classes}: {name} says how many classes it has; drop the flag")


def _changed_splits(options: DataOptions) -> list[tuple[str, str, str]]:
    """Return flag, value and default of --train-split and --val-split if they are not the default."""
    flags = {"--train-split": "train_split", "--val-split": "val_split"}
    values = [(flag, getattr(options, name), getattr(DataOptions, name)) for flag, name in flags.items()]
    return [(flag, value, default) for flag, value, default in values if value != default]


def _listed_once(read: Callable[[], tuple[Source, Source]], local_rank: int) -> tuple[Source, Source]:
    """Find image files on the first process of each machine; the others map its list of them."""
    train, val = from_tensors(once_per_machine(lambda: as_tensors(read()), local_rank))
    return train, val


def _upright(part: Data, options: DataOptions) -> Data:
    """Return the same images, rotated by their EXIF orientation if `upright` is set.

    Raises:
        UserError: if the images are not files.
    """
    if not options.upright:
        return part
    if not (isinstance(part, Source) and isinstance(part.images, PathImages)):
        raise UserError(f"--upright: {options.data_set} is not read from image files; add --no-upright")
    return replace(part, images=PathImages(part.images.paths, upright=True))


def _folder_of(name: str, data_path: str | None) -> Path:
    """Return the folder of the data, which may still have to be downloaded."""
    if data_path is None:
        if name in ("IMNET", "INAT", "INAT19", "CARS", "PACKED"):
            raise UserError(f"--data-path: {name} is not downloaded; name its folder, or try --data-set DIGITS")
        return Path("data")
    if not Path(data_path).is_dir():
        raise UserError(f"--data-path {data_path}: no such folder; check the path, or try --data-set DIGITS")
    return Path(data_path)


def _digits() -> tuple[Source, Source]:
    """Read the bundled 8×8 digits; every fifth image of each class is held out."""
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    gray = (images.astype(np.uint16) * 255 // 16).astype(np.uint8)  # ink 0 to 16
    source = whole_source(MemoryImages([np.repeat(image[:, :, None], 3, axis=2) for image in gray]), labels, range(10))
    number_in_class = np.empty(len(labels), dtype=np.int64)
    for label in range(10):
        number_in_class[labels == label] = np.arange((labels == label).sum())
    held_out = number_in_class % 5 == 4
    return replace(source, order=np.flatnonzero(~held_out)), replace(source, order=np.flatnonzero(held_out))


def image_files(
    folder: str | Path, seen: set[Any], skipped: Counter[str], progress: Progress | None = None
) -> list[str]:
    """List the image files under a folder, sorted by folder and name; skip hidden files and leftovers of archives.

    Args:
        seen: folders that must not be entered (again), since links may lead back to them; updated.
        skipped: counts other files by suffix; updated.
        progress: counts the files of each folder.

    Raises:
        OSError: if a folder cannot be read.
    """
    _is_new(folder, seen)  # a link may lead back to it
    found, links, pending = {}, [], [os.fspath(folder)]
    while pending:
        root, folders = pending.pop(), []
        with os.scandir(root) as entries:
            visible = sorted((entry for entry in entries if _is_visible(entry.name)), key=lambda entry: entry.name)
        found[root] = []
        for entry in visible:
            if _is_folder(entry):
                folders.append(entry.path)
            elif is_image_file(entry.name):
                found[root].append(entry.path)
                links += [entry.path] if entry.is_symlink() else []  # needs no system call
            else:
                skipped[Path(entry.name).suffix.lower() or "no suffix"] += 1
        pending += reversed([path for path in folders if _is_new(path, seen)])
        if progress:
            progress.advance(len(visible) - len(folders))
    paths = [path for root in sorted(found) for path in found[root]]
    return _without_repeats(paths, set(links), skipped) if links else paths


def _without_repeats(paths: Sequence[str], links: set[str], skipped: Counter[str]) -> list[str]:
    """Drop links to files that are listed, too: the same image must not be in two parts of the data."""
    seen: set[Any] = set()
    for path in paths:
        if path not in links:
            _is_new(path, seen)
    repeated = {path for path in paths if path in links and os.path.exists(path) and not _is_new(path, seen)}
    if repeated:
        skipped["links to images that are read"] += len(repeated)
    return [path for path in paths if path not in repeated]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder or a link to one; a link that leads nowhere counts as a file."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in ("__MACOSX", "@eaDir")


def _identity(path: str | Path) -> tuple[int, int] | str:
    """Return what identifies the real file or folder behind a path."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _is_new(path: str | Path, seen: set[Any]) -> bool:
    """Return True if the real file or folder behind a path is new; add it to `seen`."""
    identity = _identity(path)
    known = identity in seen
    seen.add(identity)
    return not known


@contextlib.contextmanager
def _readable(root: Path) -> Iterator[None]:
    """Turn errors in reading files below `root` into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--data-path {root}: {error.filename} cannot be read ({error.strerror})") from None


def _tree_folders(root: Path, options: DataOptions, val: str = "val") -> tuple[Path, Path]:
    """Return the folders of the training and validation part: those that flags name, or else train/ and `val`.

    A folder validation/, the default of --val-split, stands for a missing `val`.

    Raises:
        UserError: if a folder that a flag names does not exist. The others may be missing.
    """
    default = DataOptions.val_split
    if options.val_split == default and (root / default).is_dir():
        if (root / val).is_dir():
            logger.warning("--data-path %s: has %s/ and %s/; the second is not read", root, val, default)
        else:
            val = default
    folders = {"--train-split": root / "train", "--val-split": root / val}
    for flag, name, _ in _changed_splits(options):
        folders[flag] = root / name
        if name in ("", ".", "..") or os.sep in name or not os.path.isdir(folders[flag]):
            with _readable(root):
                found = sorted(each.name for each in root.iterdir() if each.is_dir() and _is_visible(each.name))
            raise UserError(f"{flag} {name[:80]}: {root} has no such folder; it has {', '.join(found[:12]) or 'none'}")
    return folders["--train-split"], folders["--val-split"]


def _folder_tree(train: Path, val: Path, eval_only: bool) -> tuple[Source, Source]:
    """Read `train/CLASS/image` and `val/CLASS/image`.

    An evaluation reads val/ only. The classes are the folders in train/ if it exists; some may have no images in val/.
    """
    root = train.parent
    with _readable(root):
        train_folders = {} if eval_only and not train.is_dir() else _class_folders(train)
        val_folders = _class_folders(val)
        if not eval_only:
            _check_folders_differ([train, *_all_paths(train_folders)], [val, *_all_paths(val_folders)])
        class_names = sorted(train_folders or val_folders)
        _warn_of_text_order(root, class_names)
        part = None if eval_only else _folder_part(train, train_folders, class_names)
        odd = sorted(val_folders.keys() - set(class_names) if eval_only else val_folders.keys() ^ class_names)
        if odd:
            raise UserError(
                f"--data-path {root}: class folder {odd[0]} is in only one of {train.name}/ and {val.name}/; both need "
                f"the same classes"
            )
        held_out = _folder_part(val, val_folders, class_names, allow_empty=eval_only)
    if part is None:
        return replace(held_out, order=held_out.order[:0]), held_out
    if part.class_samples == held_out.class_samples and len(set(part.class_samples)) > 1:
        raise UserError(
            f"--data-path {root}: the first image of every class is the same in {train.name}/ and {val.name}/; put "
            f"other images into {val.name}/"
        )
    return part, held_out


def _all_paths(folders: dict[str, list[Path]]) -> list[Path]:
    return list(itertools.chain(*folders.values()))


def _check_folders_differ(train: Sequence[Path], val: Sequence[Path]) -> None:
    """Check that no validation folder is a training folder; links may lead there.

    Raises:
        UserError: naming the first such folder.
    """
    trained = set(map(_identity, train))
    same = next((path for path in val if _identity(path) in trained), None)
    if same is not None:
        raise UserError(
            f"--data-path {val[0].parent}: {same} is a folder of {train[0].name}/ as well, so training images would be "
            f"evaluated; put other images there"
        )


def _image_folders(root: Path, options: DataOptions, eval_only: bool) -> tuple[Source, Source]:
    """Read `train/CLASS/image` and `val/CLASS/image`; or split `train/CLASS/image` or `CLASS/image` alone.

    An evaluation without these parts and without `val_fraction` reads all of `CLASS/image`.
    """
    train, val = _tree_folders(root, options)
    has_train, fraction = train.is_dir(), options.val_fraction
    if val.is_dir():
        if fraction:
            logger.info("--val-fraction has no effect: %s has a folder %s/", root, val.name)
        return _folder_tree(train, val, eval_only)
    if not fraction and (has_train or not eval_only):
        raise UserError(
            f"--data-path {root}: has no folder {'val' if has_train else 'train'}/; it needs train/CLASS/ and "
            f"val/CLASS/, or add --val-fraction 0.2 to hold out a part of {'train/' if has_train else ''}CLASS/"
        )
    folder = train if has_train else root
    with _readable(root):
        others = [each.name for each in root.iterdir() if each.is_dir() and each != folder and _is_visible(each.name)]
        if has_train and others:
            unread = ", ".join(sorted(others)[:12])
            logger.warning(
                "--data-path %s: only %s/ is read, not %s; name a validation part val/, or pass --val-split",
                root,
                train.name,
                unread,
            )
        folders = _class_folders(folder)
        _warn_of_text_order(root, list(folders))
        whole = _folder_part(folder, folders, list(folders), allow_empty=not fraction)
    if not fraction:
        logger.info("%s: has no val/ and no train/, so all its %d images are evaluated", root, len(whole))
        return replace(whole, order=whole.order[:0]), whole
    return _held_out(whole, fraction, folder)


def _held_out(whole: Source, fraction: float, path: Path) -> tuple[Source, Source]:
    train, val = hold_out(whole, fraction)
    logger.info("%s: %d images to train, %d held out (--val-fraction %g)", path, len(train), len(val), fraction)
    return train, val


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """Return the folders of each class, sorted; names are compared in NFC, since some systems decompose accents."""
    if not folder.is_dir():
        raise UserError(
            f"--data-path {folder.parent}: has no folder {folder.name}/; it needs train/CLASS/ and val/CLASS/"
        )
    found: dict[str, list[Path]] = {}
    for path in sorted(filter(Path.is_dir, folder.iterdir())):
        if _is_visible(path.name):
            found.setdefault(unicodedata.normalize("NFC", path.name), []).append(path)
    found = dict(sorted(found.items()))
    if not found:
        raise UserError(
            f"--data-path {folder.parent}: {folder.name}/ has no class folders; sort its images into "
            f"{folder.name}/CLASS/"
        )
    return found


def _warn_of_text_order(root: Path, class_names: Sequence[str]) -> None:
    """Warn that class names that are numbers are sorted as text."""
    if all(map(str.isdecimal, class_names)) and sorted(class_names, key=int) != class_names:
        order = ", ".join(class_names[:12]) + (", ..." if len(class_names) > 12 else "")
        logger.warning("--data-path %s: the class folders are sorted as text, not as numbers: %s", root, order)


def _folder_part(
    folder: Path, folders: dict[str, list[Path]], class_names: Sequence[str], allow_empty: bool = False
) -> Source:
    """Read the images of `folder` by class."""
    root, seen = folder.parent, set()
    for path in (folder.resolve(), *folder.resolve().parents, *_all_paths(folders)):
        if not _is_new(path, seen):
            raise UserError(f"--data-path {root}: {path} is a link to a folder that is already read; remove it")
    loose = sum(_is_visible(path.name) and path.is_file() for path in folder.iterdir())
    skipped = Counter({"outside of class folders": loose} if loose else {})
    counts, first = np.zeros(len(class_names), dtype=np.int64), []
    progress = Progress(f"listing {folder}", None, "file")

    def files() -> Iterator[str]:
        for label, name in enumerate(class_names):
            found = [file for path in folders.get(name, ()) for file in image_files(path, seen, skipped, progress)]
            if not found and not allow_empty:
                others = _others(folders.get(name, ()))
                raise UserError(
                    f"--data-path {root}: no images in {folder.name}/ for class {name}{others}; fill or remove the "
                    f"folder"
                )
            counts[label] = len(found)
            first.extend(found[:1])  # in the folder of its class, unless all images are in folders within it
            yield from found

    with contextlib.closing(progress):
        images = PathImages(files())
    if not len(images):
        raise UserError(f"--data-path {root}: no images in {folder.name}/; it needs {folder.name}/CLASS/IMAGE")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        logger.warning("--data-path %s: %d files in %s/ are not read: %s", root, skipped.total(), folder.name, kinds)
    if {os.path.dirname(file) for file in first}.isdisjoint(map(str, _all_paths(folders))):
        names = ", ".join(class_names[:12]) + (", ..." if len(class_names) > 12 else "")
        nested = "--data-path %s: all images of the classes %s are in folders within theirs, such as %s"
        logger.warning(f"{nested}; if those are the classes, name the folder above them", root, names, first[0])
    return _with_class_samples(whole_source(images, np.repeat(np.arange(len(class_names)), counts), class_names))


def _others(folders: Sequence[Path]) -> str:
    """Describe files that are not read in folders without images: " (3 .heic are not read; convert them)"."""
    skipped: Counter[str] = Counter()
    for folder in folders:
        image_files(folder, set(), skipped)
    kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
    return f" ({kinds} are not read; convert them)" if kinds else ""


def _with_class_samples(source: Source) -> Source:
    """Add the CRC-32 of the first image file of each class, -1 for a class without a readable one."""
    samples = np.full(source.num_classes, -1, dtype=np.int64)
    labels, first = np.unique(source.targets[source.order], return_index=True)

    def checksum(index: int) -> int:
        try:
            return zlib.crc32(regular_file(source.images.describe(index)).read_bytes())
        except (OSError, ValueError):  # a name with a NUL is a ValueError
            return -1

    with ThreadPoolExecutor(16) as pool:  # a network file system serves many requests at once
        samples[labels] = list(pool.map(checksum, source.order[first]))
    return replace(source, class_samples=tuple(samples.tolist()))


def _csv(options: DataOptions, eval_only: bool) -> tuple[Source, Source]:
    """Read image files and classes from a CSV file, split by its column "split" or by `val_fraction`.

    An evaluation reads the rows of the validation split only, or all rows if there is no split. The classes are those
    of the training rows, too.
    """
    file = Path(options.data_set.removeprefix(CSV))
    what, folder = f"--data-set {CSV}{file}", Path(options.data_path or file.parent)
    try:
        rows = _csv_rows(file)
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}; check the path") from None
    except (csv.Error, ValueError) as error:
        raise UserError(f"{what}: is not a CSV file ({reason(error)}); it needs a header and UTF-8 text") from None
    named = {"--image-column": options.image_column, "--label-column": options.label_column}
    image, label = (_csv_column(rows, flag, column, what) for flag, column in named.items())
    # An accent may be one character or two.
    labels = [unicodedata.normalize("NFC", row[label].strip()) for row in rows]
    split = _column_of(rows, ["split"])
    parts = ["all"] * len(rows)
    if split is not None:
        parts = _csv_parts([row[split].strip() for row in rows], labels, options, eval_only, what)
    elif not (options.val_fraction or eval_only):
        raise UserError(f'{what}: has no column "split"; add it, or hold a part out with --val-fraction 0.2')
    elif changed := _changed_splits(options):
        raise UserError(f'{changed[0][0]} {changed[0][1]}: {what} has no column "split"; add it, or drop the flag')
    used = [number for number, part in enumerate(parts) if part]
    incomplete = next((number for number in used if not (rows[number][image] and labels[number])), None)
    if incomplete is not None:
        raise UserError(f"{what}: row {incomplete + 1} has no {image} or no {label}; fill or remove it")
    names = _sorted_classes({labels[number] for number in used})
    read = [number for number in used if not eval_only or parts[number] != "train"]
    listed = {number: (folder / rows[number][image], labels[number]) for number in read}
    files = _check_rows(listed, folder, what)
    first = {(file, parts[number]): number for file, number in zip(reversed(files), reversed(read), strict=True)}
    if len(first) < len(read):
        logger.warning("%s: %d rows repeat an image and are not read", what, len(read) - len(first))
        kept = set(first.values())
        files = [file for file, number in zip(files, read, strict=True) if number in kept]
        read = [number for number in read if number in kept]
        listed = {number: listed[number] for number in read}
    index = {name: position for position, name in enumerate(names)}
    images, targets = PathImages(path for path, _ in listed.values()), [index[name] for _, name in listed.values()]
    source = whole_source(images, targets, names)
    train, val = _csv_sources(source, np.array([parts[number] for number in read]), options, file)
    both = {files[index] for index in train.order} & {files[index] for index in val.order}
    if both and not eval_only:
        path = min(path for (path, _), key in zip(listed.values(), files, strict=True) if key in both)
        raise UserError(f"{what}: {path} is in the training and in the validation part; drop its other rows")
    return train, val


def _sorted_classes(labels: set[str]) -> list[str]:
    """Sort class names: numbers by their value, other names as text."""
    is_number = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in labels)
    return sorted(labels, key=lambda name: (float(name), name) if is_number else name)


def _csv_sources(source: Source, parts: np.ndarray, options: DataOptions, file: Path) -> tuple[Source, Source]:
    """Divide the images of a CSV file by the part of their rows: "train", "val", or "all" without splits."""
    if "all" not in parts:
        orders = [np.flatnonzero(parts == part) for part in ("train", "val")]
        train, val = (_with_class_samples(replace(source, order=order)) for order in orders)
        return train, val
    source = _with_class_samples(source)
    if options.val_fraction:
        return _held_out(source, options.val_fraction, file)
    logger.info('%s: has no column "split", so all its %d images are evaluated', file, len(source))
    return replace(source, order=source.order[:0]), source


def _file_identity(path: Path) -> tuple[int, int] | str | None:
    """Return what identifies the real file behind a path; None if it is not a regular file."""
    try:
        return _identity(regular_file(path))
    except (OSError, ValueError):  # such as a name that is too long, or one with a NUL
        return None


def _check_rows(listed: dict[int, tuple[Path, str]], folder: Path, what: str) -> list[tuple[int, int] | str]:
    """Check that all images exist and have one class; return what identifies each file, whatever path leads to it.

    Args:
        listed: path and label by row, counted from 0.

    Raises:
        UserError: naming the first image or row that is wrong.
    """
    paths = [path for path, _ in listed.values()]
    with ThreadPoolExecutor(16) as pool:  # a network file system serves many requests at once
        files = list(pool.map(_file_identity, paths))
    if None in files:
        first = str(paths[files.index(None)])
        first = first if len(first) <= LONGEST_SHOWN else f"{first[:LONGEST_SHOWN]}..."
        raise UserError(
            f"{what}: {files.count(None)} of {len(paths)} images are not in {folder}, first {first}; "
            f"name their folder with --data-path"
        )
    label_of: dict[Any, str] = {}
    for file, (number, (path, label)) in zip(files, listed.items(), strict=True):
        if label_of.setdefault(file, label) != label:
            raise UserError(
                f"{what}: row {number + 1} lists {path} as {label}, an earlier row as {label_of[file]}; drop one"
            )
    return files


def _csv_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file by column name; separators are commas, semicolons or tabs.

    Raises:
        OSError, UnicodeError, csv.Error: if it cannot be read.
    """
    text = regular_file(file).read_text(encoding="utf-8-sig")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=separator, strict=True, restval="", skipinitialspace=True)
    reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
    repeated = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if repeated:
        raise csv.Error(f"two columns are named {repeated}")
    rows = list(reader)
    if not rows or any(None in row for row in rows):
        raise csv.Error("a row has more fields than the header" if rows else "no rows")
    return rows


def _column_of(rows: list[dict[str, str]], names: Sequence[str]) -> str | None:
    """Return the first existing column of these names, in this spelling or another case; None if there is none."""
    columns = {column.lower(): column for column in rows[0]} | {column: column for column in rows[0]}
    return next((columns[name] for name in names if name in columns), None)


def _csv_column(rows: list[dict[str, str]], flag: str, column: str | None, what: str) -> str:
    """Return the column that a flag names, or the first existing one of the usual names.

    Raises:
        UserError: if there is none.
    """
    found = _column_of(rows, [column] if column else CSV_COLUMNS[flag])
    if found is None:
        raise UserError(
            f"{flag} {column or CSV_COLUMNS[flag][0]}: {what} has no such column; it has {', '.join(rows[0])}"
        )
    return found


def _split_names(flag: str, name: str, options: DataOptions) -> tuple[str, ...]:
    """Return the names under which a split is searched: a default has timm's other names, too."""
    if flag in (changed[0] for changed in _changed_splits(options)):
        return (name,)
    return (name, *next((names for names in TORCH_SPLITS.values() if name in names), ()))


def _csv_parts(
    splits: Sequence[str], labels: Sequence[str], options: DataOptions, eval_only: bool, what: str
) -> list[str]:
    """Return the part of each row: "train", "val", or "" for rows of other splits, which are not used.

    Raises:
        UserError: if a split has no rows, or not all classes in a training.
    """
    if options.val_fraction:
        logger.info('--val-fraction has no effect: %s has a column "split"', what)
    lowered, found = [split.lower() for split in splits], {}
    for part, flag, name in (
        ("train", "--train-split", options.train_split),
        ("val", "--val-split", options.val_split),
    ):
        found[part] = next((each for each in _split_names(flag, name.lower(), options) if each in lowered), None)
        if found[part] is None and not (eval_only and part == "train"):
            raise UserError(f"{flag} {name}: {what} has no such split; it has {', '.join(sorted(set(splits)))}")
    if not eval_only and found["train"] == found["val"]:
        raise UserError(
            f"--train-split {options.train_split}, --val-split {options.val_split}: both are the same rows of {what}; "
            f"name two splits that differ"
        )
    parts = ["val" if split == found["val"] else "train" if split == found["train"] else "" for split in lowered]
    if unused := Counter(split for split, part in zip(splits, parts, strict=True) if not part):
        kinds = ", ".join(f"{count} of {split or 'no split'}" for split, count in unused.most_common(12))
        logger.info("%s: rows of other splits are not used: %s", what, kinds)
    trained, evaluated = ({labels[n] for n, each in enumerate(parts) if each == part} for part in ("train", "val"))
    if not eval_only and evaluated - trained:
        name = min(evaluated - trained)
        raise UserError(f"--train-split {options.train_split}: {what} has no such row of class {name}; add some")
    return parts


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Wait until no other process or machine downloads into this folder, where it can be written and locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((root / ".download.lock").open("a")), fcntl.LOCK_EX)
        yield


def _downloaded(name: str, root: Path, make: Callable[[], Any]) -> Any:
    """Call a torchvision data set that may download, one process at a time; turn its errors into one line."""
    try:
        with _alone(root):
            return make()
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise UserError(f"--data-set {name}: needs {package}; pip install {package}") from None
    except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
        # no network, no space, a wrong checksum, or a damaged archive
        raise UserError(
            f"--data-set {name}: not found under {root.resolve()} and cannot be downloaded there ({reason(error)}); "
            f"put it there, name its folder with --data-path, or use the bundled --data-set DIGITS"
        ) from None


def _cifar(root: Path, options: DataOptions, local_rank: int, eval_only: bool) -> tuple[Source, Source]:
    """Read a folder tree of images if there is one, else the original files."""
    name = options.data_set
    if name == "CIFAR":
        logger.info("--data-set CIFAR is CIFAR-10; write CIFAR10 or CIFAR100 to be explicit")
    train, val = _tree_folders(root, options, "val" if (root / "val").is_dir() else "test")
    kind = torchvision.datasets.CIFAR100 if name == "CIFAR100" else torchvision.datasets.CIFAR10
    is_tree = train.is_dir() or (eval_only and not (root / kind.base_folder).is_dir())
    if _changed_splits(options) or (val.is_dir() and is_tree):
        expected, found = 100 if name == "CIFAR100" else 10, len(_class_folders(val))
        if found == expected or options.data_path is not None:
            if found != expected:
                logger.warning(
                    "--data-set %s: %s has %d classes, not %d; is it another data set?", name, root, found, expected
                )
            return _listed_once(partial(_folder_tree, train, val, eval_only), local_rank)
        logger.info("%s has %d classes, so it is not read as %s; pass --data-path to read it", root, found, name)
    with main_process_first(local_rank):
        parts = [
            _downloaded(name, root, partial(kind, str(root), train=train, download=True)) for train in (True, False)
        ]
    train, val = (whole_source(MemoryImages(part.data), part.targets, part.classes) for part in parts)
    return train, val


def _flowers(root: Path, local_rank: int) -> tuple[Source, Source]:
    """Read Oxford Flowers-102: train on the official train and val parts (2,040 images), test on test (6,149)."""
    flowers = torchvision.datasets.Flowers102
    with main_process_first(local_rank):
        train, val, test = (
            _downloaded("FLOWERS", root, partial(flowers, str(root), split, download=True))
            for split in ("train", "val", "test")
        )
    paths, labels = train._image_files + val._image_files, train._labels + val._labels
    names = getattr(train, "classes", ())  # torchvision has them since 0.22
    return (
        _with_class_samples(whole_source(PathImages(paths), labels, names, 102)),
        _with_class_samples(whole_source(PathImages(test._image_files), test._labels, names, 102)),
    )


def _cars(root: Path) -> tuple[Source, Source]:
    """Read Stanford Cars from a local copy (its original address is gone)."""
    try:
        for path in (root / "stanford_cars").glob("**/*.mat"):
            regular_file(path)
        parts = []
        for split in ("train", "test"):
            part = torchvision.datasets.StanfordCars(str(root), split, download=False)
            paths, labels = zip(*part._samples, strict=True)
            if not all(0 <= label < len(part.classes) for label in labels):
                raise ValueError(f"a label is not one of its {len(part.classes)} classes")
            parts.append(_with_class_samples(whole_source(PathImages(paths), labels, part.classes)))
    except Exception as error:  # files are missing, there is no SciPy to read them, or it raises anything on damage
        raise UserError(
            f"--data-path {root}: not Stanford Cars ({reason(error)}); it needs stanford_cars/ with devkit/, "
            f"cars_train/, cars_test/ and cars_test_annos_withlabels.mat"
        ) from None
    return parts[0], parts[1]


def _packed(root: Path) -> tuple[Source, Source]:
    """Read a folder that `tools/pack_dataset.py` has written."""
    train, val = (PackImages(root, split) for split in SPLITS)
    return (
        whole_source(train, train.targets, train.class_names, train.num_classes),
        whole_source(val, val.targets, val.class_names, val.num_classes),
    )


def _inaturalist(root: Path, year: int, options: DataOptions) -> tuple[Source, Source]:
    """Read iNaturalist 2018 or 2019 from its official files: `{train,val}YEAR.json`, `categories.json` and images."""
    train, val = (_read_json(root, f"{part}{year}.json") for part in ("train", "val"))
    try:
        has_taxonomy = (root / "categories.json").exists()
        categories = _read_json(root, "categories.json") if has_taxonomy else train["categories"]
        first = train["annotations"] if options.inat_numbering == "original" else ()
        order = list(dict.fromkeys(note["category_id"] for note in first))
        class_of, names = _classes_of_categories(root, categories, options.inat_category, order)
        parts = _annotated(root, train, class_of, names), _annotated(root, val, class_of, names)
        files, val_files = ({image["file_name"] for image in part["images"]} for part in (train, val))
        if files & val_files:
            raise UserError(
                f"--data-path {root}: {min(files & val_files)} is in train{year}.json and in val{year}.json; fetch the "
                f"official files again"
            )
        return parts
    except (LookupError, TypeError, AttributeError, UnicodeError) as error:
        raise UserError(
            f"--data-path {root}: its annotation files do not belong together or are damaged ({error!r}); fetch them "
            f"again"
        ) from None


def _read_json(root: Path, name: str) -> Any:
    try:
        return read_json(root / name)
    except FileNotFoundError:
        raise UserError(f"--data-path {root}: has no {name}; put the official annotation files there") from None
    except OSError as error:
        raise UserError(f"--data-path {root}: {name} {error.strerror}; fetch it again") from None
    except ValueError:
        raise UserError(f"--data-path {root}: {name} is not valid JSON; fetch it again") from None


def _classes_of_categories(
    root: Path, categories: list[dict[str, Any]], level: str, order: Sequence[int]
) -> tuple[dict[int, int], Sequence[str]]:
    """Map category ids to classes and return the class names; classes are sorted by first use in `order`, or by id."""
    if not all(isinstance(entry, dict) for entry in categories):
        raise TypeError("categories that are not dictionaries")
    if any(level not in entry for entry in categories):
        known = ", ".join(name for name in INAT_CATEGORIES if name in categories[0])
        raise UserError(
            f"--inat-category {level}: {root} does not have this level; use one of {known}, or add the official "
            f"categories.json"
        )
    named = {entry.get("id", number): entry[level] for number, entry in enumerate(categories)}
    class_index: dict[str, int] = {}
    class_of = {number: class_index.setdefault(named[number], len(class_index)) for number in order or sorted(named)}
    return class_of, list(class_index)


def _annotated(root: Path, part: dict[str, Any], class_of: dict[int, int], class_names: Sequence[str]) -> Source:
    """Read one part of iNaturalist from its annotations."""
    file_of = {image["id"]: root / image["file_name"] for image in part["images"]}
    paths = [file_of[note["image_id"]] for note in part["annotations"]]
    if not paths:
        raise LookupError("no annotations")
    labels = [class_of[note["category_id"]] for note in part["annotations"]]
    return _with_class_samples(whole_source(PathImages(paths), labels, class_names))


def _timm_sources(options: DataOptions, local_rank: int, eval_only: bool) -> TrainAndVal:
    """Read any data set that timm supports; streams (`wds/`, `tfds/`, `hfids/`) have no index, the others do."""
    name, kind = options.data_set, options.data_set.lower().rpartition("/")[2]
    if name.startswith("torch/") and kind in ("folder", "image_folder"):
        return _listed_once(partial(_torch_folders, options, eval_only), local_rank)
    if name.startswith("torch/") and kind in TRAIN_OR_TEST:
        accepted = [*TORCH_SPLITS["train"], *TORCH_SPLITS["test"]]
        for flag, split in (("--train-split", options.train_split), ("--val-split", options.val_split)):
            if split not in accepted:
                raise UserError(f"{flag} {split}: {name} has no such split; use one of {', '.join(accepted)}")
    dataset = _read_split(options, options.val_split, False, local_rank)
    class_names = _class_names(dataset)
    num_classes = options.num_classes or len(class_names) or None
    if eval_only and (num_classes or isinstance(dataset, IterableDataset)):
        val = _from_timm(dataset, name, False, num_classes)
        return replace(val, order=val.order[:0]) if isinstance(val, Source) else val, val
    train_dataset = _read_split(options, options.train_split, True, local_rank)
    if _class_names(train_dataset) != class_names:
        raise UserError(
            f"--data-set {name}: the splits {options.train_split!r} and {options.val_split!r} have different classes; "
            f"check --data-path, --train-split and --val-split"
        )
    train = _from_timm(train_dataset, name, True, num_classes)
    return train, _from_timm(dataset, name, False, train.num_classes)


def _torch_folders(options: DataOptions, eval_only: bool) -> tuple[Source, Source]:
    """Read `torch/image_folder`: folders with the names of the splits, or timm's other names for them.

    If there is none, timm would read the parent folder for both splits.
    """
    root, parts = Path(options.data_path or "data"), []
    for flag, split in (("--train-split", options.train_split), ("--val-split", options.val_split)):
        found = (root / name for name in _split_names(flag, split, options) if os.path.isdir(root / name))
        parts.append(next(found, root / split))
    train, val = _folder_tree(*parts, eval_only)
    if (options.num_classes or val.num_classes) < val.num_classes:
        raise UserError(f"--num-classes {options.num_classes}: {root} has {val.num_classes} classes; drop the flag")
    if (options.num_classes or val.num_classes) == val.num_classes:
        return train, val
    nameless = {"num_classes": options.num_classes, "class_names": (), "class_samples": ()}  # a name per class, or none
    return replace(train, **nameless), replace(val, **nameless)


def _share_images(train: Data, val: Data, options: DataOptions) -> bool:
    """Return True if the parts have common slices or shards, or are the same images under two names of a split."""
    if isinstance(train, StreamingImages):
        readers = [part.dataset.reader for part in (train, val)]
        if all(isinstance(reader, ReaderWds) for reader in readers):
            return not _shards(readers[0]).isdisjoint(_shards(readers[1]))
        return _overlap(options.train_split, options.val_split, _split_sizes(readers[0].builder.info))
    if options.data_set.startswith("hfds/"):
        sizes = _split_sizes(train.images.dataset.dataset.info)
        if _overlap(options.train_split, options.val_split, sizes):
            return True
    if not np.array_equal(train.targets, val.targets):
        return False

    def pixels(source: Source, position: int) -> np.ndarray:
        with contextlib.suppress(RunError):
            return np.asarray(source[position][0])
        return np.array(np.nan)  # of a broken image, which equals no other

    positions = np.linspace(0, len(train) - 1, 8).astype(int)
    return all(np.array_equal(pixels(train, position), pixels(val, position)) for position in positions)


def _shards(reader: ReaderWds) -> set[str]:
    """Return the shards of a WebDataset: real files, whatever path leads to them, or URLs and commands as they are."""
    paths = [os.path.join(reader.root, file) for file in reader.split_info.filenames]
    return {path if ":" in path else os.path.realpath(path) for path in paths}


def _split_sizes(info: Any) -> dict[str, int | None]:
    """Return the number of images of each split of a Hugging Face or TensorFlow data set, None if unknown."""
    return {str(name): split.num_examples or None for name, split in (info.splits or {}).items()}


@dataclass(frozen=True)
class _Slice:
    """A slice of a split: from `start` to `end` (exclusive) in images or percent ("%"), or all of it."""

    split: str
    unit: str  # "images", "%" or "all"
    start: float = 0
    end: float = float("inf")

    def overlaps(self, other: _Slice) -> bool:
        comparable = self.unit == other.unit or "all" in (self.unit, other.unit)
        return self.split == other.split and comparable and max(self.start, other.start) < min(self.end, other.end)


def _slices(text: str, sizes: Mapping[str, int | None]) -> list[_Slice]:
    """Parse slices as Hugging Face and TensorFlow do: `train[:80%]+test[-100:]`; [] for another notation."""
    slices = []
    for part in text.split("+"):
        match = SLICE.fullmatch(part.strip())
        if match is None:
            return []
        split, brackets, first, first_percent, last, last_percent = match.groups()
        size, in_percent = sizes.get(split), first_percent or last_percent
        total = 100 if in_percent else float("inf") if size is None else size
        bounds = [int(bound) if bound else default for bound, default in ((first, 0), (last, total))]
        start, end = (min(max(bound + total if bound < 0 else bound, 0), total) for bound in bounds)
        if in_percent and size is not None:
            start, end = round(start * size / 100), round(end * size / 100)
        unit = "%" if in_percent and size is None else "images" if brackets or size is not None else "all"
        slices.append(_Slice(split, unit, start, end))
    return slices


def _overlap(train: str, val: str, sizes: Mapping[str, int | None]) -> bool:
    """Return True if two expressions for splits have common images, as far as the slices tell."""
    pairs = itertools.product(_slices(train, sizes), _slices(val, sizes))
    return train == val or any(ours.overlaps(theirs) for ours, theirs in pairs)


def _read_split(options: DataOptions, split: str, training: bool, local_rank: int) -> Any:
    """Open timm's data set of a split, downloading it if possible."""
    name, image = options.data_set, options.image_column
    root = "data" if options.data_path is None and name.startswith("torch/") else options.data_path
    if name.startswith("wds/"):  # timm keeps the decoded image as "jpg", which it wants among the keys
        image = f"{image};jpg" if image else WDS_IMAGES
    try:
        if name.startswith("wds/"):
            _check_files(root, [file for file in ("_info.json", "info.json") if Path(root, file).exists()])
        with main_process_first(local_rank), _hugging_face_importable():
            settings = {"input_key": image, "target_key": options.label_column, "download": True}
            if not name.startswith("tfds/"):  # which needs a mode, and gives uint8
                settings["input_img_mode"] = ""  # timm's conversion to RGB would make 16-bit images white
            dataset = create_dataset(name, root=root, split=split, is_training=training, **settings)
        if not name.startswith("torch/"):
            _check_columns(dataset.reader, options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # each backend has errors of its own
        raise UserError(
            f"--data-set {name}: split {split!r} cannot be read ({reason(error)}); check the name, --data-path, "
            f"--train-split and --val-split"
        ) from error
    return dataset


def _check_files(root: str, names: Sequence[str]) -> None:
    """Check that the files of a local WebDataset are regular files."""
    if "://" not in root:
        for name in names:
            regular_file(os.path.join(root, name))


def _check_columns(reader: Any, options: DataOptions) -> None:
    """Check that the image and label columns exist.

    Raises:
        UserError: naming the existing columns.
    """
    image, label, name = options.image_column or "image", options.label_column or "label", options.data_set
    if isinstance(reader, ReaderWds):
        _check_files(reader.root, reader.split_info.filenames)
        urls = [os.path.join(reader.root, file) for file in reader.split_info.filenames]
        shards = webdataset.DataPipeline(webdataset.SimpleShardList(urls), webdataset.tarfile_to_samples())
        images = {key: value for key, value in next(iter(shards), {}).items() if not key.startswith("__")}
        image = options.image_column or next((key for key in WDS_IMAGES.split(";") if key in images), "jpg")
        field = options.label_column or reader.split_info.alt_label
        label, labels = field or "cls", json.loads(images.get("json", b"{}")) if field else images
    elif hasattr(reader, "builder"):
        images = labels = reader.builder.info.features
    else:
        images = labels = dict(reader.dataset.features)
        if len(reader) and reader.dataset.data.column(image).null_count == len(reader):  # added by timm's cast
            del images[image]
    for flag, column, columns in (("--image-column", image, images), ("--label-column", label, labels)):
        if not has_field(columns, column):
            raise UserError(f"{flag} {column}: {name} has no such column; it has {', '.join(columns) or 'none'}")
    if name.startswith("hfids/") and hasattr(get_field(images, image), "decode"):
        get_field(images, image).decode = False  # Hugging Face would decode any format
    if isinstance(reader, ReaderWds) and class_index(get_field(labels, label)) is None:
        raise UserError(f"--label-column {label}: {name} has the label {get_field(labels, label)!r}, not a number")


_hugging_face: dict[str, Any] = {}


@contextlib.contextmanager
def _hugging_face_importable() -> Iterator[None]:
    """Make timm's `import datasets` find Hugging Face's package, which has the name of this file."""
    ours, path = sys.modules.pop(__name__), sys.path[:]
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != here]
    sys.modules.update(_hugging_face)
    try:
        yield
    finally:
        if __name__ in sys.modules:
            _hugging_face[__name__] = sys.modules[__name__]
        sys.modules[__name__], sys.path[:] = ours, path


def _class_names(dataset: Any) -> list[str]:
    """Return the class names by class index; [] if the data set does not name its classes."""
    index = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return sorted(index, key=index.get) if index else list(getattr(dataset, "classes", None) or ())


def _from_timm(dataset: Any, name: str, training: bool, num_classes: int | None) -> Data:
    reader, names = getattr(dataset, "reader", None), _class_names(dataset)
    if isinstance(dataset, IterableDataset):
        if num_classes is None:
            raise UserError(f"--num-classes: {name} does not say how many classes it has; add the flag")
        named = tuple(names) if len(names) == num_classes else ()
        return StreamingImages(dataset, num_classes, training, name, named)
    labels = getattr(dataset, "targets", getattr(dataset, "labels", getattr(dataset, "_labels", None)))
    if hasattr(reader, "iter_targets"):
        labels = list(reader.iter_targets())
    elif reader is not None or np.ndim(labels) != 1:  # none, or as in QMNIST several of each image
        samples = dataset if reader is None else reader
        labels = [samples[index][1] for index in range(len(samples))]
    found = [class_index(label) for label in labels]
    if None in found:
        position = found.index(None)
        raise UserError(
            f"--label-column: image {position} of {name} has the label {labels[position]!r}, not a class number; name "
            f"another column"
        )
    if not found:
        raise UserError(f"--data-set {name}: has no images; check --data-path, --train-split and --val-split")
    targets = np.array(found, dtype=np.int64)
    num_classes = num_classes or int(targets.max()) + 1
    if targets.min() < 0 or targets.max() >= num_classes:
        raise UserError(
            f"--data-set {name}: has labels from {targets.min()} to {targets.max()} for {num_classes} classes; check "
            f"--num-classes, --train-split and --val-split"
        )
    images = DatasetImages(reader if reader is not None else dataset, name)
    return whole_source(images, targets, names if len(names) == num_classes else (), num_classes)


# -- transforms --------------------------------------------------------------------------------------------------------


def build_train_transform(options: ViewOptions, normalization: Normalization) -> HostView:
    """Build DeiT's training augmentation (paper, section 6 and table 9): PIL image -> normalized float32 [3, H, W].

    Up to 64 px, and with `options.src` (DeiT III), the random resized crop is replaced by 4 px of padding and a random
    crop. `options.src` also resizes the short side first, and pads by reflection.

    Raises:
        UserError: if timm does not know the AutoAugment policy.
    """
    size, (mean, std) = options.input_size, normalization
    policy = None if options.aa in ("", "none") else options.aa
    if policy:
        check_policy(policy)
    transform = create_transform(
        size,
        is_training=True,
        interpolation=options.train_interpolation,
        hflip=options.hflip,
        color_jitter=options.color_jitter,
        auto_augment=policy,
        re_prob=options.reprob,
        re_mode=options.remode,
        re_count=options.recount,
        mean=tuple(mean),
        std=tuple(std),
    )
    if options.src or max(size) <= SMALL_IMAGE:
        # What is drawn at random in "random" is the interpolation of random crops, of which there are none here.
        mode = "bicubic" if options.train_interpolation == "random" else options.train_interpolation
        resize = transforms.Resize(size[0] if options.src else list(size), str_to_interp_mode(mode))
        padding = "reflect" if options.src else "constant"
        transform.transforms[0:1] = [resize, transforms.RandomCrop(size, padding=PADDING, padding_mode=padding)]
    return transform


def build_eval_transform(options: ViewOptions, normalization: Normalization) -> HostView:
    """Build the evaluation transform: PIL image -> normalized float32 [3, H, W].

    It resizes to size / eval_crop_ratio and crops the center; up to 64 px it uses the whole image.
    """
    size, (mean, std) = options.input_size, normalization
    if max(size) > SMALL_IMAGE:
        crop = {"crop_pct": options.eval_crop_ratio, "interpolation": "bicubic"}
        return create_transform(size, mean=tuple(mean), std=tuple(std), **crop)
    resize = transforms.Resize(list(size), str_to_interp_mode("bicubic"))
    return transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(mean, std)])
