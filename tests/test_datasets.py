"""Data sets on tiny fabricated files, parts of them, images in memory, and the transforms of the host."""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import sys
import tarfile
import threading
import time
import unicodedata
import urllib.error
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.io
import sklearn.datasets
import tiny
import torch
import torchvision
from PIL import ExifTags, Image, ImageFilter, ImageOps
from timm.data.transforms import RandomResizedCropAndInterpolation

import datasets
import main
import sources
from augment import ViewOptions
from datasets import (
    DIGITS_FILE,
    DataOptions,
    build_eval_transform,
    build_sources,
    build_train_transform,
    read_sources,
)
from samplers import seed_generators
from sources import (
    BrokenImages,
    MemoryImages,
    PathImages,
    Source,
    StreamingImages,
    keep_in_memory,
    take_fraction,
    whole_source,
)
from tools import pack_dataset
from utils import RunError

NORMALIZATION = MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNSCALED = (0.0,) * 3, (1.0,) * 3
NO_AUGMENTATION = {"hflip": 0.0, "color_jitter": 0.0, "aa": "none", "reprob": 0.0}


def picture(seed, height=12, width=10, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="png"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_tree(root, parts=("train", "val"), classes=("cat", "dog"), each=2, **size):
    """Write `PART/CLASS/N.png`, all different; return the paths by part, in the order of the data set."""
    paths = {part: [root / part / name / f"{n}.png" for name in classes for n in range(each)] for part in parts}
    for number, path in enumerate(path for part in parts for path in paths[part]):
        save(picture(number, **size), path)
    return paths


def read(name, path=None, **options):
    """Training and validation part of a data set."""
    return read_sources(DataOptions(name, None if path is None else str(path), **options))


def pixels_of(source):
    return [np.asarray(source[index][0]) for index in range(len(source))]


def targets_of(source):
    return [source[index][1] for index in range(len(source))]


def host_view(size, normalization=NORMALIZATION, **options):
    return build_train_transform(ViewOptions(size, **options), normalization)


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*_args, **_options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


# -- the bundled digits ------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_with_every_fifth_of_a_class_held_out():
    theirs = sklearn.datasets.load_digits()
    train, val = read("DIGITS")
    assert len(train) + len(val) == 1797 and train.num_classes == val.num_classes == 10
    seen = [0] * 10
    parts = {True: iter(range(len(val))), False: iter(range(len(train)))}
    for image, label in zip(theirs.images, theirs.target, strict=True):
        seen[label] += 1
        held_out = seen[label] % 5 == 0
        ours, target = (val if held_out else train)[next(parts[held_out])]
        assert target == label
        np.testing.assert_array_equal(np.asarray(ours), np.repeat((image * 255 // 16)[:, :, None], 3, axis=2))


def test_digits_split_is_fixed_and_balanced():
    (train, val), (again, _) = read("DIGITS"), read("DIGITS", "ignored")
    np.testing.assert_array_equal(train.order, again.order)
    assert not set(train.order) & set(val.order)
    counts = np.bincount(targets_of(val), minlength=10)
    assert counts.max() - counts.min() <= 2
    np.testing.assert_allclose(counts / np.bincount(targets_of(train)), 1 / 4, atol=0.01)


def test_digits_file_is_small_and_says_where_it_is_from():
    assert DIGITS_FILE.stat().st_size < 100_000
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        assert "UCI" in str(file["source"]) and "CC BY 4.0" in str(file["licence"])


# -- folder trees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "held_out"),
    [("IMNET", "val"), ("CIFAR", "val"), ("CIFAR", "test"), ("CIFAR10", "test"), ("CIFAR100", "test")],
)
def test_folder_tree_is_read_in_alphabetical_order_of_its_classes(tmp_path, name, held_out):
    paths = write_tree(tmp_path, parts=("train", held_out), classes=("b", "a", "c"))
    train, val = read(name, tmp_path)
    for source, part in ((train, "train"), (val, held_out)):
        assert targets_of(source) == [0, 0, 1, 1, 2, 2] and source.num_classes == 3
        for found, path in zip(pixels_of(source), sorted(paths[part]), strict=True):
            np.testing.assert_array_equal(found, np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("file", "mode"),
    [(file, mode) for file in ("x.png", "grün 1.PNG", "x.webp", "x.tif") for mode in ("RGB", "L", "P", "RGBA", "LA")]
    + [(file, mode) for file in ("x.jpg", "x.JPEG") for mode in ("RGB", "L", "CMYK")]
    + [("x.png", "1"), ("x.bmp", "P")],
)
def test_images_of_every_mode_become_rgb(tmp_path, file, mode):
    gray = Image.linear_gradient("L").resize((32, 24)) if mode != "1" else Image.new("L", (32, 24), "white")
    save(gray.convert(mode), tmp_path / "train" / "cat" / file)
    save(gray, tmp_path / "val" / "cat" / "1.png")
    found = read("IMNET", tmp_path)[0][0][0]
    assert found.mode == "RGB" and found.size == (32, 24)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(gray).astype(int)[:, :, None])
    assert difference.max() <= (6 if file.lower().endswith(("jpg", "jpeg", "webp")) else 0)


def test_folder_without_val_is_a_user_error(tmp_path):
    write_tree(tmp_path, parts=("train",))
    with tiny.user_error("--data-path", tmp_path, "val/"):
        read("IMNET", tmp_path)


@pytest.mark.parametrize("name", ["IMNET", "CIFAR10"])
@pytest.mark.parametrize("eval_only", [False, True])
def test_folder_validation_is_the_validation_part(tmp_path, caplog, name, eval_only):
    paths = write_tree(tmp_path, parts=("train", "validation", "other"))
    for split in (DataOptions.val_split, "validation"):
        _, val = read_sources(DataOptions(name, str(tmp_path), val_split=split), eval_only=eval_only)
        assert [Path(path) for path in paths_of(val)] == paths["validation"]
    os.rename(tmp_path / "other", tmp_path / "val")
    _, val = read_sources(DataOptions(name, str(tmp_path)), eval_only=eval_only)
    assert {Path(path).parts[-3] for path in paths_of(val)} == {"val"}
    assert "has val/ and validation/; the second is not read" in caplog.text


@pytest.mark.parametrize(("name", "count"), [("CIFAR", 10), ("CIFAR10", 10), ("CIFAR100", 100)])
def test_only_trees_with_the_classes_of_cifar_are_read_by_default(tmp_path, monkeypatch, caplog, name, count):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "data", parts=("train", "test"), classes=[f"{number:02}" for number in range(count)], each=1)
    assert len(read_sources(DataOptions(name))[0]) == count
    write_tree(tmp_path / "data", parts=("train", "test"), classes=["other"], each=1)
    monkeypatch.setattr(datasets, "_downloaded", lambda *_: pytest.fail("original files"))
    with pytest.raises(pytest.fail.Exception, match="original files"):
        read_sources(DataOptions(name))
    assert f"data has {count + 1} classes, so it is not read as {name}" in caplog.text
    caplog.clear()
    assert read_sources(DataOptions(name, "data"))[0].num_classes == count + 1
    assert f"has {count + 1} classes, not {count}; is it another data set?" in caplog.text


@pytest.mark.parametrize("name", ["IMNET", "CIFAR10"])
@pytest.mark.parametrize("eval_only", [False, True])
def test_split_flags_name_the_folders_of_a_tree(tmp_path, name, eval_only):
    paths = write_tree(tmp_path, parts=("train", "val", "test", "extra"))
    for flags, parts in (
        ({}, ["train", "val"]),
        ({"val_split": "test"}, ["train", "test"]),
        ({"train_split": "extra", "val_split": "val"}, ["extra", "val"]),
    ):
        train, val = read_sources(DataOptions(name, str(tmp_path), **flags), eval_only=eval_only)
        assert [Path(path) for path in paths_of(val)] == paths[parts[1]]
        assert [Path(path) for path in paths_of(train)] == ([] if eval_only else paths[parts[0]])


@pytest.mark.parametrize("name", ["IMNET", "CIFAR10"])
@pytest.mark.parametrize("split", ["dev", "", ".", "..", "train/cat", "x" * 300])
def test_a_split_without_a_folder_is_a_user_error(tmp_path, name, split):
    write_tree(tmp_path)
    for flag in ("train_split", "val_split"):
        for eval_only in (False, True):
            with tiny.user_error(f"--{flag.replace('_', '-')} {split[:80]}", "it has train, val"):
                read_sources(DataOptions(name, str(tmp_path), **{flag: split}), eval_only=eval_only)


def test_the_validation_folder_of_a_flag_replaces_the_fraction(tmp_path):
    paths = write_tree(tmp_path, parts=("train", "test"))
    train, val = read("IMNET", tmp_path, val_fraction=0.5, val_split="test")
    assert [list(map(Path, paths_of(part))) for part in (train, val)] == [paths["train"], paths["test"]]


@pytest.mark.parametrize("name", ["DIGITS", "FLOWERS", "CARS", "INAT", "INAT19", "PACKED"])
@pytest.mark.parametrize("flag, default", [("train_split", "train"), ("val_split", "validation")])
def test_data_without_named_splits_refuse_the_flags(tmp_path, name, flag, default):
    spelled = f"--{flag.replace('_', '-')}"
    for eval_only in (False, True):
        with tiny.user_error(f"{spelled} dev: {name} has no named splits", f"pass {spelled} {default}"):
            build_sources(DataOptions(name, str(tmp_path), **{flag: "dev"}), eval_only=eval_only)


def test_an_evaluation_reads_all_of_class_folders_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    paths = write_tree(tmp_path, parts=(".",), each=3)["."]
    train, val = read_sources(DataOptions("IMNET", str(tmp_path)), eval_only=True)
    assert (len(train), list(map(Path, paths_of(val)))) == (0, paths) and val.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert "all its 6 images are evaluated" in caplog.text
    write_tree(tmp_path / "other", parts=("train",))
    with tiny.user_error("has no folder val/", "--val-fraction 0.2"):
        build_sources(DataOptions("IMNET", str(tmp_path / "other")), eval_only=True)


@pytest.mark.parametrize("how", ["part", "class", "copy", "split"])
@pytest.mark.parametrize("name", ["IMNET", "CIFAR10", "torch/image_folder"])
def test_a_validation_part_that_is_the_training_part_is_refused(tmp_path, name, how):
    write_tree(tmp_path, parts=("train", "val"))
    options = DataOptions(name, str(tmp_path), val_split="train" if how == "split" else "validation")
    if how in ("part", "copy"):
        shutil.rmtree(tmp_path / "val")
    if how == "part":
        (tmp_path / "val").symlink_to("train")
    elif how == "copy":
        shutil.copytree(tmp_path / "train", tmp_path / "val")
    elif how == "class":
        shutil.rmtree(tmp_path / "val" / "dog")
        (tmp_path / "val" / "dog").symlink_to("../train/dog")
    words = {"copy": "first image of every class is the same", "class": "val/dog is a folder of train/"}
    with tiny.user_error(f"--data-path {tmp_path}", words.get(how, "is a folder of train/")):
        read_sources(options)
    _, val = read_sources(options, eval_only=True)  # an accuracy on training images may be wanted
    assert len(val) == 4


def test_links_to_images_that_are_listed_are_skipped(tmp_path, caplog):
    paths = write_tree(tmp_path / "data", parts=(".",), each=10)["."]
    outside = save(picture(99), tmp_path / "outside.png")
    cat = tmp_path / "data" / "cat"
    for number in range(5):
        (cat / f"copy{number}.png").symlink_to(f"{number}.png")
        (cat / f"00{number}.png").symlink_to(f"../cat/{number}.png")  # sorted before its target
    (cat / "inner").mkdir()
    for name in ("once.png", "twice.png"):
        (cat / "inner" / name).symlink_to(outside)
    (cat / "loop.png").symlink_to("loop.png")
    train, val = read("IMNET", tmp_path / "data", val_fraction=0.3)
    found = sorted([*ordered_paths(train), *ordered_paths(val)])
    assert found == sorted(map(str, [*paths, cat / "inner" / "once.png", cat / "loop.png"]))
    assert "11 links to images that are read" in caplog.text


def test_a_class_of_files_that_are_not_read_names_their_kind(tmp_path):
    write_tree(tmp_path)
    for path in (tmp_path / "train" / "cat").iterdir():
        path.rename(path.with_suffix(".HEIC"))
    with tiny.user_error("class cat (2 .heic are not read; convert them); fill or remove"):
        read("IMNET", tmp_path)


def test_the_message_about_missing_folders_offers_to_hold_out(tmp_path):
    write_tree(tmp_path, parts=(".",))
    with tiny.user_error("has no folder train/", "--val-fraction 0.2"):
        read("IMNET", tmp_path)


@pytest.mark.parametrize("part", ["", "train"])
def test_a_part_of_each_class_is_held_out(tmp_path, part):
    write_tree(tmp_path / "a" / part, parts=(".",), classes=("cat", "dog", "eel"), each=10)
    train, val = read("IMNET", tmp_path / "a", val_fraction=0.3)
    assert train.class_names == val.class_names == ("cat", "dog", "eel")
    assert np.bincount(targets_of(train)).tolist() == [7, 7, 7] and np.bincount(targets_of(val)).tolist() == [3, 3, 3]
    for source in (train, val):
        assert [Path(path).parent.name for path in ordered_paths(source)] == [
            source.class_names[target] for target in targets_of(source)
        ]
    assert {*ordered_paths(train), *ordered_paths(val)} == set(map(str, (tmp_path / "a").rglob("*.png")))
    shutil.move(tmp_path / "a", tmp_path / "b")  # neither the folder's name nor the order of its files matters
    again = ordered_paths(read("IMNET", tmp_path / "b", val_fraction=0.3)[1])
    assert [path.replace("/b/", "/a/") for path in again] == ordered_paths(val)
    for number in range(100, 110):
        save(picture(number), tmp_path / "b" / part / "cat" / f"{number}.png")
    more = ordered_paths(read("IMNET", tmp_path / "b", val_fraction=0.3)[1])
    assert len(more) == 12 and set(again[3:]) == set(more[6:])  # dogs and eels are the same


def test_of_each_class_one_image_at_least_is_in_either_part(tmp_path):
    write_tree(tmp_path, parts=(".",), each=2)
    for fraction in (0.01, 0.9):
        assert [targets_of(part) for part in read("IMNET", tmp_path, val_fraction=fraction)] == [[0, 1], [0, 1]]
    (tmp_path / "dog" / "1.png").unlink()
    with tiny.user_error("--val-fraction 0.5", "class dog has 1 images"):
        read("IMNET", tmp_path, val_fraction=0.5)


def test_a_validation_folder_is_used_whatever_the_fraction(tmp_path):
    paths = write_tree(tmp_path)
    sources = read("IMNET", tmp_path, val_fraction=0.5)
    assert [[Path(path) for path in paths_of(source)] for source in sources] == [paths["train"], paths["val"]]
    with tiny.user_error("--val-fraction 0.5", "DIGITS has a validation part"):
        read("DIGITS", val_fraction=0.5)


@pytest.mark.parametrize("name", ["IMNET", "CIFAR10", "torch/image_folder", "CSV"])
def test_photos_are_turned_upright_wherever_they_are_files(tmp_path, name):
    paths = write_tree(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in (*paths["train"], *paths["val"]):
        with Image.open(path) as image:
            image.load()
        image.save(path, exif=exif)
    if name == "CSV":
        rows = [f"{path},{path.parent.name},{part}" for part in ("train", "val") for path in paths[part]]
        (tmp_path / "x.csv").write_text("\n".join(["path,label,split", *rows]))
        name = f"csv/{tmp_path}/x.csv"
    for is_upright, size in ((False, (10, 12)), (True, (12, 10))):
        options = DataOptions(name, str(tmp_path), upright=is_upright, ram_cache=0)
        assert [part[0][0].size for part in datasets.build_sources(options)] == [size, size]


@pytest.mark.parametrize("name", ["DIGITS", "PACKED"])
def test_data_that_are_no_files_cannot_be_turned_upright(tmp_path, name):
    if name == "PACKED":
        pack_dataset.main(["--data-set", "DIGITS", "--output", str(tmp_path / "pack")])
    path = {"PACKED": str(tmp_path / "pack")}.get(name)
    with tiny.user_error("--upright", f"{name} is not read from image files"):
        datasets.build_sources(DataOptions(name, path, upright=True))


def ordered_paths(source):
    return [source.images.describe(index) for index in source.order]


# -- CSV files ---------------------------------------------------------------------------------------------------------


def write_csv(folder, text, encoding="utf-8"):
    for number in range(8):
        save(picture(number), folder / "images" / f"{number}.png")
    (folder / "list.csv").write_bytes(text.encode(encoding))
    return f"csv/{folder / 'list.csv'}"


def csv_rows(labels, columns="path,label", splits=None, separator=","):
    rows = [columns.replace(",", separator)]
    for number, label in enumerate(labels):
        rows.append(separator.join([f"images/{number}.png", str(label), *([splits[number]] if splits else [])]))
    return "\n".join(rows) + "\n"


def test_named_split_of_a_csv_file_must_exist(tmp_path, caplog):
    caplog.set_level("INFO")
    splits = ["train", "train", "val", "val", "extra", "", "extra", "train"]
    name = write_csv(tmp_path, csv_rows("abababab", "path,label,split", splits))
    assert [len(part) for part in read_sources(DataOptions(name))] == [3, 2]
    assert "rows of other splits are not used: 2 of extra, 1 of no split" in caplog.text
    for flags in ({"val_split": "test"}, {"train_split": "training"}):
        with tiny.user_error(*flags.values(), "has no such split"):
            read_sources(DataOptions(name, **flags))
    with tiny.user_error("--val-split test", "has no such split"):
        read_sources(DataOptions(name, val_split="test"), eval_only=True)


@pytest.mark.parametrize("val_fraction", [0.0, 0.5])
def test_repeated_rows_of_a_csv_file_count_once(tmp_path, caplog, val_fraction):
    rows = "".join(
        f"images/{number}.png,{'ab'[number % 2]},{'train' if number < 4 else 'val'}\n" for number in range(8)
    )
    again = "images/5.png,b,val\n./images/5.png,b,val\nlink.png,a,train\n"
    header = "path,label,split\n" if not val_fraction else "path,label,part\n"
    (tmp_path / "link.png").symlink_to("images/0.png")
    options = DataOptions(write_csv(tmp_path, header + rows + again), val_fraction=val_fraction)
    train, val = read_sources(options)
    names = [[Path(path).name for path in paths_of(part)] for part in (train, val)]
    assert sorted(names[0] + names[1]) == [f"{number}.png" for number in range(8)]
    assert "3 rows repeat an image and are not read" in caplog.text


def test_decimal_classes_of_a_csv_file_are_sorted_by_value(tmp_path):
    name = write_csv(tmp_path, csv_rows(["0.0", "10.0", "2.0", "-1"], "path,label,split", ["train"] * 3 + ["val"]))
    with tiny.user_error("no such row of class -1"):
        read_sources(DataOptions(name))
    name = write_csv(tmp_path, csv_rows(["0.0", "10.0", "2.0"] * 2, "path,label,split", ["train"] * 3 + ["val"] * 3))
    assert read_sources(DataOptions(name))[0].class_names == ("0.0", "2.0", "10.0")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv_file_with_splits(tmp_path, separator, encoding):
    splits = ["train", "val"] * 3 + ["Train", "unused"]
    text = csv_rows(["dög", "cat, big", "cat, big", "dög"] * 2, "path,label,split", splits, separator)
    text = text.replace("cat, big", '"cat, big"')
    train, val = read(write_csv(tmp_path, text, encoding))
    assert train.class_names == ("cat, big", "dög")
    assert [Path(path).stem for path in ordered_paths(train)] == ["0", "2", "4", "6"]
    assert (targets_of(train), targets_of(val)) == ([1, 0, 1, 0], [0, 1, 0])
    assert np.array_equal(pixels_of(val)[2], np.asarray(picture(5)))


@pytest.mark.parametrize(
    ("splits", "named", "images"),
    [
        (["val", "test"], "validation", ["2", "4", "6"]),  # the default
        (["val", "test"], "val", ["2", "4", "6"]),
        (["val", "test"], "test", ["3", "5", "7"]),
        (["Val", "TEST"], "Test", ["3", "5", "7"]),
        (["eval", "test"], "validation", ["2", "4", "6"]),
        (["fold1", "test"], "validation", ["3", "5", "7"]),
        (["fold1", "test"], "fold1", ["2", "4", "6"]),
    ],
)
def test_a_split_of_a_csv_file_is_one_name(tmp_path, splits, named, images):
    """A test part is not evaluated with the validation part."""
    text = csv_rows(list("ab" * 4), "path,label,split", ["train", "train", *splits * 3])
    _, val = read(write_csv(tmp_path, text), val_split=named)
    assert [Path(path).stem for path in ordered_paths(val)] == images


def test_rows_of_other_splits_are_not_used(tmp_path):
    rows = ["path,label,split", "images/0.png,a,train", "images/1.png,b,train", "images/2.png,b,val"]
    rows += ["images/3.png,c,later", "gone.png,a,later", "images/0.png,b,later", ",,later"]
    train, val = read(write_csv(tmp_path, "\n".join(rows)))
    assert train.class_names == val.class_names == ("a", "b")
    assert [[Path(path).stem for path in ordered_paths(part)] for part in (train, val)] == [["0", "1"], ["2"]]


def test_an_evaluation_reads_the_validation_rows_of_a_csv_file(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = ["path,label,split", "gone.png,a,train", "images/1.png,c,test", "images/2.png,b,test", "x.png,d,unused"]
    for number, names in ((1, ("a", "b", "c")), (2, ("b", "c"))):  # with and without training rows
        text = "\n".join([rows[0], *rows[number:]])
        train, val = read_sources(DataOptions(write_csv(tmp_path, text)), eval_only=True)
        assert (len(train), val.class_names, [val.class_names[n] for n in targets_of(val)]) == (0, names, ["c", "b"])
    _, val = read_sources(DataOptions(write_csv(tmp_path, csv_rows("abab"))), eval_only=True)
    assert targets_of(val) == [0, 1, 0, 1] and "all its 4 images are evaluated" in caplog.text
    train, val = read_sources(DataOptions(write_csv(tmp_path, csv_rows("abab")), val_fraction=0.5), eval_only=True)
    assert len(train) == len(val) == 2
    with tiny.user_error("--val-split fold1", 'no column "split"'):
        read_sources(DataOptions(write_csv(tmp_path, csv_rows("abab")), val_split="fold1"), eval_only=True)


def test_numbers_of_a_csv_file_that_are_equal_have_a_fixed_order(tmp_path):
    train, _ = read(write_csv(tmp_path, csv_rows(["1", "01", "001", "2"] * 2)), val_fraction=0.5)
    assert train.class_names == ("001", "01", "1", "2")


@pytest.mark.parametrize("flag", ["train_split", "val_split"])
def test_a_split_of_a_csv_file_without_splits_is_refused(tmp_path, flag):
    name = write_csv(tmp_path, csv_rows(list("aabbaabb")))
    with tiny.user_error(f"--{flag.replace('_', '-')} fold1", 'no column "split"'):
        read(name, val_fraction=0.25, **{flag: "fold1"})


def test_a_csv_file_is_split_by_class(tmp_path):
    train, val = read(write_csv(tmp_path, csv_rows(list("aabbaabb"))), val_fraction=0.25)
    assert (targets_of(train), targets_of(val)) == ([0, 0, 0, 1, 1, 1], [0, 1]) or (
        sorted(targets_of(train)) == [0, 0, 0, 1, 1, 1] and sorted(targets_of(val)) == [0, 1]
    )


def test_numbers_in_a_csv_file_are_classes_in_numeric_order(tmp_path):
    train, _ = read(write_csv(tmp_path, csv_rows([10, 10, 9, 9, 2, 2, 10, 9])), val_fraction=0.5)
    assert train.class_names == ("2", "9", "10")
    by_file = {Path(path).stem: target for path, target in zip(ordered_paths(train), targets_of(train), strict=True)}
    assert all(target == {"0": 2, "1": 2, "6": 2, "4": 0, "5": 0}.get(stem, 1) for stem, target in by_file.items())


def test_columns_and_folder_of_a_csv_file_are_flags(tmp_path):
    name = write_csv(tmp_path, csv_rows(list("abababab"), "picture,kind").replace("images/", ""))
    options = {"image_column": "picture", "label_column": "kind", "val_fraction": 0.5}
    train, _ = read(name, tmp_path / "images", **options)
    assert sorted(targets_of(train)) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "text, options, words",
    [
        ("path,label\n", {}, ["no rows"]),
        ("", {}, ["no rows"]),
        ("path,label\nimages/0.png,a,b\n", {}, ["more fields than the header"]),
        ("path,label\nimages/0.png\n", {"val_fraction": 0.5}, ["row 1 has no path or no label"]),
        (
            "path,label\nimages/0.png,a\nimages/9.png,b\n",
            {"val_fraction": 0.5},
            ["1 of 2 images", "9.png", "--data-path"],
        ),
        (
            f"path,label\nimages/0.png,a\n{'aB+/' * 3000},b\n",
            {"val_fraction": 0.5},
            ["1 of 2 images are not in", "...; name"],
        ),
        ("path,label\nimages/0.png,a\nimages/0.png\0,b\n", {"val_fraction": 0.5}, ["list.csv"]),
        (csv_rows("aa", "path,label,split", ["val", "val"]), {"train_split": "val"}, ["name two splits that differ"]),
        ("file_,label\nimages/0.png,a\n", {}, ["--image-column path", "it has file_, label"]),
        ("path,label\nimages/0.png,a\n", {"label_column": "x"}, ["--label-column x", "it has path, label"]),
        (csv_rows("ab"), {}, ['no column "split"', "--val-fraction 0.2"]),
        (csv_rows("ab", "path,label,split", ["train", "train"]), {}, ["--val-split validation", "it has train"]),
        (csv_rows("ab", "path,label,split", ["train", "val"]), {}, ["--train-split train", "class b"]),
        (csv_rows("ab"), {"val_fraction": 0.5}, ["class a has 1 images"]),
    ],
)
def test_a_wrong_csv_file_is_a_user_error(tmp_path, text, options, words):
    with tiny.user_error("list.csv" if "class a" not in words[0] else "--val-fraction", *words):
        read(write_csv(tmp_path, text), **options)


@pytest.mark.parametrize("label", ["a\nb", "a\u2028b", "a\x85b", "a\x0cb"])
def test_lines_of_a_csv_file_end_as_in_pythons_reader(tmp_path, label):
    text = csv_rows([f'"{label}"', "ab"] * 4, "path,label,split", ["train"] * 4 + ["val"] * 4)
    name = write_csv(tmp_path, text)
    with open(tmp_path / "list.csv", encoding="utf-8", newline="") as file:
        expected = [row["label"] for row in csv.DictReader(file)]
    train, val = read(name)
    assert [part.class_names[target] for part in (train, val) for target in targets_of(part)] == expected
    assert set(train.class_names) == {label, "ab"} and len(expected) == 8


def test_spaces_case_and_accents_in_a_csv_file_make_no_classes(tmp_path):
    rows = ["path, Label ,SPLIT", *(f"images/{number}.png, caf\u00e9, train" for number in range(2))]
    rows += [f"images/{number}.png,cafe\u0301 , Train " for number in range(2, 4)]
    rows += ["images/4.png,tea,train", "images/5.png, tea,val ", 'images/6.png, "café",val']
    train, val = read(write_csv(tmp_path, "\n".join(rows)), val_fraction=0.5)
    assert train.class_names == val.class_names == ("caf\u00e9", "tea")
    assert (targets_of(train), targets_of(val)) == ([0, 0, 0, 0, 1], [1, 0])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["0.png,a,train", "1.png,b,train", "./0.png,b,val"], ["row 3 lists", "0.png as b, an earlier row as a"]),
        (["0.png,a,train", "1.png,b,train", "0.png,a,val"], ["0.png is in the training and in the validation"]),
        (["0.png,a,train", "1.png,b,train", "../images/0.png,a,val"], ["0.png is in the training and in the"]),
        (["0.png,a,train", "1.png,b,train", "link.png,a,val"], ["png is in the training and in the validation"]),
        (["0.png,a,train", "1.png,b,train", "link.png,b,val"], ["row 3 lists", "link.png as b"]),
    ],
)
def test_an_image_of_a_csv_file_has_one_class_and_one_part(tmp_path, rows, words):
    name = write_csv(tmp_path, "\n".join(["path,label,split", *rows]))
    (tmp_path / "images" / "link.png").symlink_to("0.png")
    with tiny.user_error("list.csv", *words):
        read(name, tmp_path / "images")
    if "row 3 lists" not in words:  # an evaluation reads one part only
        datasets.read_sources(DataOptions(name, str(tmp_path / "images")), eval_only=True)


def test_columns_of_the_same_name_are_a_user_error(tmp_path):
    with tiny.user_error("list.csv", "two columns are named label"):
        read(write_csv(tmp_path, "path,label,label\nimages/0.png,a,b\n"), val_fraction=0.5)
    rows = ["path,label,,", *(f"images/{number}.png,{'ab'[number % 2]},," for number in range(8))]
    assert read(write_csv(tmp_path, "\n".join(rows)), val_fraction=0.5)[0].num_classes == 2


def test_a_csv_file_that_is_none_is_a_user_error(tmp_path):
    with tiny.user_error("csv/", "No such file"):
        read(f"csv/{tmp_path}/gone.csv")
    with tiny.user_error("csv/", "is not a CSV file"):
        read(write_csv(tmp_path, "path,label\nimages/ä.png,a\n", "latin-1"))


def test_val_without_class_folders_is_a_user_error(tmp_path):
    write_tree(tmp_path, parts=("train",))
    save(picture(0), tmp_path / "val" / "1.png")
    with tiny.user_error("--data-path", tmp_path, "val/ has no class folders"):
        read("IMNET", tmp_path)


@pytest.mark.parametrize("part", ["train", "val"])
def test_class_in_one_part_only_is_a_user_error(tmp_path, part):
    write_tree(tmp_path)
    save(picture(0), tmp_path / part / "eel" / "1.png")
    with tiny.user_error("--data-path", "eel", "train/", "val/"):
        read("IMNET", tmp_path)


@pytest.mark.parametrize("name", ["eel", "eel v1.5"])
def test_empty_class_is_a_user_error(tmp_path, name):
    write_tree(tmp_path)
    (tmp_path / "train" / name).mkdir()
    (tmp_path / "train" / name / "notes.txt").write_text("no image")
    with tiny.user_error("--data-path", f"class {name} (1 .txt are not read; convert them);", "train/"):
        read("IMNET", tmp_path)


@pytest.mark.parametrize(("others", "warned"), [(["valid", "test", ".cache"], True), ([".cache"], False)])
def test_parts_that_are_not_read_are_a_warning(tmp_path, caplog, others, warned):
    tiny.write_folders(tmp_path, ["cat", "dog"], per_class=4, parts=["train", *others])
    train, val = read("IMNET", tmp_path, val_fraction=0.5)
    assert {Path(path).parents[1].name for part in (train, val) for path in ordered_paths(part)} == {"train"}
    assert [record.getMessage() for record in caplog.records if "is read, not test, valid;" in record.getMessage()] == [
        f"--data-path {tmp_path}: only train/ is read, not test, valid; name a validation part val/, or pass "
        f"--val-split"
    ] * warned
    read("IMNET", tmp_path / "train", val_fraction=0.5)  # its folders are the classes
    assert sum("is read, not" in record.getMessage() for record in caplog.records) == warned


@pytest.mark.parametrize("part", ["", "train"])
def test_one_class_cannot_be_trained(tmp_path, part):
    """An archive that was unpacked into a folder of its own name: photos/photos/CLASS/."""
    tiny.write_folders(tmp_path / part / "photos", ["cat", "dog"], per_class=4, parts=("",))
    with tiny.user_error("--data-set IMNET", tmp_path, "one class only, photos"):
        datasets.build_sources(DataOptions("IMNET", str(tmp_path), val_fraction=0.5))
    train, _ = datasets.build_sources(DataOptions("IMNET", str(tmp_path / part / "photos"), val_fraction=0.5))
    assert train.class_names == ("cat", "dog")


def test_one_class_is_evaluated(tmp_path):
    tiny.write_folders(tmp_path, ["cat"], per_class=2, parts=("val",))
    _, val = datasets.build_sources(DataOptions("IMNET", str(tmp_path)), eval_only=True)
    assert (val.class_names, targets_of(val)) == (("cat",), [0, 0])


@pytest.mark.parametrize("moved, warned", [([], True), (["training"], False), (["testing", "training"], False)])
def test_classes_without_images_of_their_own_are_a_warning(tmp_path, caplog, moved, warned):
    """training/ and testing/ are no names of parts, so they are taken for classes."""
    tiny.write_folders(tmp_path, ["cat", "dog"], per_class=2, parts=("training", "testing"))
    for name in moved:
        (tmp_path / name / "cat" / "0.png").rename(tmp_path / name / "0.png")
    train, _ = read("IMNET", tmp_path, val_fraction=0.5)
    assert train.class_names == ("testing", "training")
    expected = f"the classes testing, training are in folders within theirs, such as {tmp_path}/testing/cat/0.png"
    assert [expected in record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        True
    ] * warned


def paths_of(source):
    return [source.images.describe(index) for index in source.order]


def test_hidden_files_and_folders_and_those_of_archives_are_ignored(tmp_path, caplog):
    write_tree(tmp_path)
    expected = [paths_of(source) for source in read("IMNET", tmp_path)]
    for part in ("train", "val"):
        for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "cat/.ipynb_checkpoints", "dog/@eaDir/x"):
            save(picture(0), tmp_path / part / folder / "1.png")
        for file in ("._0.png", "cat/._0.png", "dog/.DS_Store"):
            (tmp_path / part / file).write_bytes(b"no image")
    assert [paths_of(source) for source in read("IMNET", tmp_path)] == expected
    assert not caplog.records


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog", "inner"])
def test_links_do_not_multiply_images(tmp_path, target):
    write_tree(tmp_path)
    save(picture(7), tmp_path / "train" / "cat" / "inner" / "7.png")
    count = len(read("IMNET", tmp_path)[0])
    (tmp_path / "train" / "cat" / "link").symlink_to(target)
    train, _ = read("IMNET", tmp_path)
    assert len(train) == count and train.targets.tolist() == [0, 0, 0, 1, 1]


def test_linked_folders_are_read(tmp_path):
    paths = write_tree(tmp_path / "real")
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "more").symlink_to(tmp_path / "real" / part / "cat")
        (tmp_path / part / "dog").symlink_to(tmp_path / "real" / part / "dog")
    train, _ = read("IMNET", tmp_path)
    assert [Path(path).resolve() for path in paths_of(train)] == paths["train"]


def test_two_names_for_the_folder_of_one_class_are_a_user_error(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "train" / "hound").symlink_to("dog")
    with tiny.user_error("--data-path", "train/hound is a link"):
        read("IMNET", tmp_path)


def test_samples_are_in_the_order_of_torchvision(tmp_path):
    names = ("a/b/1.png", "a/2.png", "a-b/3.png", "a/B/4.JPG", "5.png", "a/b.c/6.png", "Z/7.png", "é/8.png", "10.png")
    for part, name in itertools.product(("train", "val"), names):
        for label in ("n02", "N01", "n01 x"):
            save(picture(0), tmp_path / part / label / name)
    theirs = torchvision.datasets.ImageFolder(tmp_path / "train")
    train, _ = read("IMNET", tmp_path)
    assert list(zip(paths_of(train), train.targets.tolist(), strict=True)) == theirs.samples


ODD_NAMES = ["x.png", "/x.png", "a//b.png", "./a/x.png", "a b/\n.png", "é/\udce9.png", "-.png", "a/b/c/x" * 40 + ".png"]


def test_paths_in_arrays_are_the_paths_that_were_listed():
    images = PathImages(path for path in [*ODD_NAMES, Path("a/x.png")])
    paths = [*ODD_NAMES, "a/x.png"]
    assert [images.describe(index) for index in range(len(images))] == paths
    for order in ([], [3], [0, 1, 2], [8, 8, 5, 0], range(len(paths))):
        names = [os.fsencode(paths[index]).rpartition(b"/")[2] for index in order]
        assert images.file_names(np.array(order, dtype=np.int64)) == b"\0".join(names)


def test_names_of_many_files_are_joined_in_their_order():
    images, order = (
        PathImages(f"{n % 7}/{n:x}.png" for n in range(70_000)),
        np.random.default_rng(0).permutation(70_000),
    )
    assert images.file_names(order) == b"\0".join(b"%x.png" % n for n in order)


def test_odd_names_are_listed_as_by_os_walk(tmp_path):
    for part, label, name in itertools.product(("train", "val"), ("b", "a \udce9", "a"), ODD_NAMES):
        path = f"{tmp_path}/{part}/{label}/{name[-200:]}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).touch()
    for source, part in zip(read("IMNET", tmp_path), ("train", "val"), strict=True):
        found = sorted((root, name) for root, _, names in os.walk(tmp_path / part) for name in names)
        assert sorted(paths_of(source)) == sorted(os.path.join(*pair) for pair in found)
        samples = torchvision.datasets.ImageFolder(tmp_path / part).samples
        assert list(zip(paths_of(source), source.targets.tolist(), strict=True)) == samples


def test_files_that_are_not_read_are_counted_in_one_warning_per_part(tmp_path, caplog):
    write_tree(tmp_path)
    for file in ("cat/a.gif", "cat/b.GIF", "dog/deep/c.avif", "dog/d.jfif", "cat/README", "loose.png"):
        (tmp_path / "train" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / file).write_bytes(b"x")
    read("IMNET", tmp_path)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "6 files in train/ are not read: 2 .gif, " in record.message
    for words in ("1 .avif", "1 .jfif", "1 no suffix", "1 outside of class folders"):
        assert words in record.message


def test_names_in_nfc_and_nfd_are_the_same_class(tmp_path):
    for part, form in (("train", "NFC"), ("val", "NFD")):
        for number, name in enumerate(("Über", "cat", "Zebra")):
            folder = tmp_path / part / unicodedata.normalize(form, name)
            save(picture(number, height=12 + (part == "val")), folder / "1.png")
    sources = read("IMNET", tmp_path)
    found = [[unicodedata.normalize("NFC", Path(path).parent.name) for path in paths_of(source)] for source in sources]
    assert found == [["Zebra", "cat", "Über"]] * 2
    assert [source.targets.tolist() for source in sources] == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (range(12), "0, 1, 10, 11, 2, 3"),
        (("1", "20", "3"), "1, 20, 3"),
        (range(10), None),
        (("00", "01", "10"), None),
        (("2", "10", "x"), None),
    ],
)
def test_numbers_that_are_sorted_as_text_are_a_warning(tmp_path, caplog, names, order):
    write_tree(tmp_path, classes=sorted(map(str, names)), each=1)
    read("IMNET", tmp_path)
    messages = [record.message for record in caplog.records]
    assert len(messages) == (order is not None)
    assert all("as text, not as numbers" in message and order in message for message in messages)


def test_folder_that_cannot_be_read_is_a_user_error(tmp_path, monkeypatch):
    write_tree(tmp_path)
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=PermissionError(13, "Permission denied", "train/cat")))
    with tiny.user_error("--data-path", "train/cat cannot be read", "Permission denied"):
        read("IMNET", tmp_path)


@pytest.mark.parametrize("name", ["IMNET", "CIFAR10"])
def test_evaluation_needs_no_training_folder(tmp_path, name):
    paths = write_tree(tmp_path, parts=("val",))["val"]
    train, val = build_sources(DataOptions(name, str(tmp_path)), eval_only=True)
    assert len(train) == 0 and train.num_classes == val.num_classes == 2
    assert val.targets.tolist() == [0, 0, 1, 1] and len(val) == len(paths)


def test_training_folders_are_the_classes_of_an_evaluation(tmp_path):
    write_tree(tmp_path, parts=("train",), classes=("cat", "dog", "eel", "fox"), each=1)
    write_tree(tmp_path, parts=("val",), classes=("dog", "fox"), each=1)
    (tmp_path / "val" / "eel").mkdir()
    _, val = build_sources(DataOptions("IMNET", str(tmp_path)), eval_only=True)
    assert val.num_classes == 4 and val.targets.tolist() == [1, 3]
    with tiny.user_error("--data-path", "cat", "train/ and val/"):
        read("IMNET", tmp_path)
    save(picture(0), tmp_path / "val" / "gnu" / "1.png")
    with tiny.user_error("--data-path", "gnu", "only one of train/ and val/"):
        build_sources(DataOptions("IMNET", str(tmp_path)), eval_only=True)


def test_evaluation_without_images_is_a_user_error(tmp_path):
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with tiny.user_error("--data-path", "no images in val/"):
        build_sources(DataOptions("IMNET", str(tmp_path)), eval_only=True)


@pytest.mark.parametrize("name", ["IMNET", "INAT", "INAT19", "CARS"])
def test_data_that_are_not_downloaded_need_a_path(name):
    with tiny.user_error("--data-path", name, "DIGITS"):
        read(name)


@pytest.mark.parametrize("name", ["IMNET", "CIFAR10", "FLOWERS"])
def test_missing_folder_is_a_user_error(tmp_path, name):
    with tiny.user_error("--data-path", tmp_path / "typo"):
        read(name, tmp_path / "typo")


def test_unknown_name_is_a_user_error_that_lists_the_known_ones():
    with tiny.user_error("--data-set IMAGENET", "IMNET", "DIGITS", "hfds/"):
        read("IMAGENET")


# -- CIFAR, Flowers and Cars through torchvision -----------------------------------------------------------------------


def write_cifar(root, monkeypatch, kind):
    """Write files in the official layout and patch torchvision's checksums; return images and labels by part."""
    rng = np.random.default_rng(0)
    fine = kind is torchvision.datasets.CIFAR100
    labels_key, names_key, classes = ("fine_labels", "fine_label_names", 100) if fine else ("labels", "label_names", 10)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    parts = []
    for name, files in (("train_list", kind.train_list), ("test_list", kind.test_list)):
        images = rng.integers(0, 256, (len(files), 3, 3, 32, 32), dtype=np.uint8)
        labels = rng.integers(0, classes, (len(files), 3))
        contents = [{"data": i.reshape(3, -1), labels_key: n.tolist()} for i, n in zip(images, labels, strict=True)]
        monkeypatch.setattr(kind, name, [write(f, c) for (f, _), c in zip(files, contents, strict=True)])
        parts.append((images.reshape(-1, 3, 32, 32), labels.ravel().tolist()))
    meta = write(kind.meta["filename"], {names_key: [f"class {n}" for n in range(classes)]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    return parts


@pytest.mark.parametrize(
    ("name", "kind", "classes"), [("CIFAR", "CIFAR10", 10), ("CIFAR10", "CIFAR10", 10), ("CIFAR100", "CIFAR100", 100)]
)
def test_cifar_is_read_from_the_official_files(tmp_path, monkeypatch, name, kind, classes):
    parts = write_cifar(tmp_path, monkeypatch, getattr(torchvision.datasets, kind))
    for source, (images, labels) in zip(read(name, tmp_path), parts, strict=True):
        assert source.num_classes == classes and targets_of(source) == labels
        np.testing.assert_array_equal(np.stack(pixels_of(source)), images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", ["CIFAR", "CIFAR10", "CIFAR100", "FLOWERS"])
def test_failed_download_says_what_was_tried_and_offers_the_digits(tmp_path, no_network, name):
    with tiny.user_error(f"--data-set {name}:", tmp_path, "no route to host", "--data-path", "DIGITS"):
        read(name, tmp_path)


def test_failed_download_without_a_path_names_the_default_folder(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    with tiny.user_error(tmp_path / "data"):
        read("CIFAR10")
    with tiny.user_error("torch/cifar10", "no route to host"):
        read("torch/cifar10")
    assert (tmp_path / "data").is_dir()


def test_error_without_a_message_is_still_one_line(tmp_path, monkeypatch):
    def urlopen(*_args, **_options):
        raise TimeoutError

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with tiny.user_error("TimeoutError"):
        read("CIFAR10", tmp_path)


def write_flowers(root, monkeypatch):
    folder, flowers = root / "flowers-102", torchvision.datasets.Flowers102
    labels = [1, 102, 7, 7, 102, 50]  # of image 1, 2, ...
    for number in range(1, 7):
        save(picture(number), folder / "jpg" / f"image_{number:05d}.jpg")
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    splits = {"trnid": [[5, 1]], "valid": [[3, 4]], "tstid": [[6, 2]]}
    scipy.io.savemat(folder / "setid.mat", {key: np.array(ids, dtype=np.uint16) for key, ids in splits.items()})
    monkeypatch.setattr(flowers, "_file_dict", {key: (file, None) for key, (file, _) in flowers._file_dict.items()})


def test_flowers_train_on_the_train_and_val_parts_with_classes_from_zero(tmp_path, monkeypatch):
    write_flowers(tmp_path, monkeypatch)
    train, test = read("FLOWERS", tmp_path)
    assert targets_of(train) == [101, 0, 6, 6] and targets_of(test) == [49, 101]
    assert train.num_classes == test.num_classes == 102
    assert [train.images.describe(n)[-9:] for n in range(4)] == ["00005.jpg", "00001.jpg", "00003.jpg", "00004.jpg"]


@pytest.fixture
def cars(tmp_path):
    root = tmp_path / "stanford_cars"
    kinds = [("fname", object), ("class", np.uint8)]
    files = {
        root / "devkit" / "cars_train_annos.mat": [("1.jpg", 3), ("2.jpg", 1)],
        root / "cars_test_annos_withlabels.mat": [("1.jpg", 2), ("2.jpg", 3), ("3.jpg", 1)],
    }
    for file, annotations in files.items():
        folder = root / ("cars_train" if "train" in file.name else "cars_test")
        for number, (name, _) in enumerate(annotations):
            save(picture(number), folder / name)
        file.parent.mkdir(exist_ok=True)
        scipy.io.savemat(file, {"annotations": np.array(annotations, dtype=kinds)})
    names = np.array(["Audi", "BMW", "Fiat"], dtype=object)
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    return tmp_path


def test_cars_are_read_from_a_local_copy(cars):
    train, test = read("CARS", cars)
    assert targets_of(train) == [2, 0] and targets_of(test) == [1, 2, 0]
    assert train.num_classes == test.num_classes == 3
    assert train[0][0].size == (10, 12)


def test_annotated_data_tell_which_pixels_their_classes_have(cars, tmp_path, monkeypatch):
    def crc(*names):
        return tuple(zlib.crc32((tmp_path / name).read_bytes()) if name else -1 for name in names)

    train, _ = read("CARS", cars)
    folder = "stanford_cars/cars_train"
    assert train.class_samples == crc(f"{folder}/2.jpg", "", f"{folder}/1.jpg")  # classes 0 and 2
    write_flowers(tmp_path, monkeypatch)
    _, test = read("FLOWERS", tmp_path)
    assert {index for index, sample in enumerate(test.class_samples) if sample >= 0} == {49, 101}
    write_inaturalist(tmp_path, 2018, with_file=True)
    train, _ = read("INAT", tmp_path)
    assert len([sample for sample in train.class_samples if sample >= 0]) == len(set(targets_of(train)))


def test_processes_download_one_after_another(tmp_path):
    """The second one waits, because torchvision writes to the final names. A lock is of an open file, as in threads."""
    busy, seen = [], []

    def make():
        seen.append(len(busy))
        busy.append("one")
        time.sleep(0.2)
        busy.pop()

    threads = [threading.Thread(target=datasets._downloaded, args=("CIFAR", tmp_path / "data", make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [0, 0, 0]


@pytest.mark.parametrize("kind", [tarfile.ReadError, EOFError])
def test_a_damaged_archive_is_a_one_line_error(kind, tmp_path):
    def make():
        raise kind("unexpected end of data")

    with tiny.user_error("--data-set CIFAR10", "unexpected end of data"):
        datasets._downloaded("CIFAR10", tmp_path, make)


@pytest.mark.parametrize("missing", ["devkit/cars_meta.mat", "cars_test_annos_withlabels.mat"])
def test_incomplete_cars_are_a_user_error(cars, missing):
    (cars / "stanford_cars" / missing).unlink()
    with tiny.user_error("--data-path", cars, "stanford_cars/"):
        read("CARS", cars)


@pytest.mark.parametrize(
    ("name", "words"),
    [("CARS", "Scipy is not found"), ("FLOWERS", "--data-set FLOWERS: needs scipy; pip install scipy")],
)
def test_missing_scipy_is_named(cars, monkeypatch, name, words):
    write_flowers(cars, monkeypatch)
    monkeypatch.delitem(sys.modules, "scipy.io")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with tiny.user_error(words):
        read(name, cars)


# -- iNaturalist -------------------------------------------------------------------------------------------------------

TAXONOMY = [  # out of order and with a gap, as nothing forbids
    {"id": 7, "kingdom": "Animalia", "name": "Vulpes vulpes"},
    {"id": 2, "kingdom": "Plantae", "name": "Acer rubrum"},
    {"id": 3, "kingdom": "Animalia", "name": "Lynx lynx"},
]


def write_inaturalist(root, year, with_file, categories=TAXONOMY):
    labels = {"train": [7, 2, 3, 2], "val": [3, 7]}
    for part, ids in labels.items():
        names = [f"train_val{year}/{label}/{part}{n}.jpg" for n, label in enumerate(ids)]
        for number, name in enumerate(names):
            save(picture(number), root / name)
        images = [{"id": 100 + n, "file_name": name} for n, name in enumerate(names)]
        notes = [{"image_id": 100 + n, "category_id": label} for n, label in enumerate(ids)]
        content = {"images": images[::-1], "annotations": notes, "categories": categories if not with_file else []}
        (root / f"{part}{year}.json").write_text(json.dumps(content))
    if with_file:
        (root / "categories.json").write_text(json.dumps(categories))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers", "cars", "inat18", "inat19"])
def test_transfer_recipes_train_on_tiny_copies_of_their_data(name, tmp_path, monkeypatch, request):
    if name.startswith("cifar"):
        write_cifar(tmp_path, monkeypatch, getattr(torchvision.datasets, name.upper()))
    elif name == "flowers":
        write_flowers(tmp_path, monkeypatch)
    elif name == "cars":
        request.getfixturevalue("cars")
    else:
        write_inaturalist(tmp_path, 2000 + int(name[-2:]), with_file=True)
    smaller = "--no-pretrained --input-size 32 --model-kwargs embed_dim=48 depth=1 num_heads=3 --batch-size 2"
    smaller += " --epochs 1 --warmup-epochs 0 --device cpu --num-workers 0"
    recipe = tiny.REPOSITORY / "recipes" / f"finetune_{name}.args"
    output = tmp_path / "output"
    main.cli([f"@{recipe}", *smaller.split(), "--data-path", str(tmp_path), "--output-dir", str(output)])
    assert len(tiny.log_of(output)) == 1 and (output / "best.pth").is_file()


@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize(
    ("category", "train_targets", "val_targets"), [("name", [2, 0, 1, 0], [1, 2]), ("kingdom", [1, 0, 1, 0], [1, 1])]
)
def test_inaturalist_numbers_classes_by_ascending_id(
    tmp_path, name, year, with_file, category, train_targets, val_targets
):
    write_inaturalist(tmp_path, year, with_file)
    train, val = read(name, tmp_path, inat_category=category)
    assert targets_of(train) == train_targets and targets_of(val) == val_targets
    assert train.num_classes == val.num_classes == max(train_targets) + 1
    assert train.images.describe(2) == str(tmp_path / f"train_val{year}" / "3" / "train2.jpg")


@pytest.mark.parametrize(
    ("category", "train_targets", "val_targets", "names"),
    [
        ("name", [0, 1, 2, 1], [2, 0], ("Vulpes vulpes", "Acer rubrum", "Lynx lynx")),
        ("kingdom", [0, 1, 0, 1], [0, 0], ("Animalia", "Plantae")),
    ],
)
def test_inaturalist_has_the_numbers_of_the_original(tmp_path, category, train_targets, val_targets, names):
    write_inaturalist(tmp_path, 2018, True)
    train, val = read("INAT", tmp_path, inat_category=category, inat_numbering="original")
    assert targets_of(train) == train_targets and targets_of(val) == val_targets
    assert train.class_names == val.class_names == names


def test_inaturalist_with_common_images_is_a_user_error(tmp_path):
    write_inaturalist(tmp_path, 2019, with_file=True)
    shutil.copy(tmp_path / "train2019.json", tmp_path / "val2019.json")
    with tiny.user_error(f"--data-path {tmp_path}", "2/train1.jpg is in train2019.json and in val2019.json"):
        read("INAT19", tmp_path)


def test_categories_without_ids_are_numbered_from_zero(tmp_path):
    names = [{"name": name} for name in ("a", "b", "c", "d", "e", "f", "g", "h")]
    write_inaturalist(tmp_path, 2018, True, categories=names)
    assert targets_of(read("INAT", tmp_path)[0]) == [7, 2, 3, 2]


def test_unknown_taxonomy_level_is_a_user_error_that_lists_the_levels(tmp_path):
    write_inaturalist(tmp_path, 2018, False)
    with tiny.user_error("--inat-category genus", "use one of kingdom, name"):
        read("INAT", tmp_path, inat_category="genus")


@pytest.mark.parametrize(("content", "word"), [(None, "has no val2019.json"), ("{", "val2019.json is not valid JSON")])
def test_missing_or_broken_annotations_are_a_user_error(tmp_path, content, word):
    write_inaturalist(tmp_path, 2019, True)
    (tmp_path / "val2019.json").unlink()
    if content is not None:
        (tmp_path / "val2019.json").write_text(content)
    with tiny.user_error("--data-path", tmp_path, word):
        read("INAT19", tmp_path)


# -- data sets of timm's -----------------------------------------------------------------------------------------------


def test_torch_scheme_reads_torchvisions_cifar(tmp_path, monkeypatch):
    parts = write_cifar(tmp_path, monkeypatch, torchvision.datasets.CIFAR10)
    for source, (images, labels) in zip(read("torch/cifar10", tmp_path), parts, strict=True):
        assert source.num_classes == 10 and targets_of(source) == labels
        np.testing.assert_array_equal(np.stack(pixels_of(source)), images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("scheme", ["torch/image_folder", "hfds/"])
def test_schemes_read_class_folders(tmp_path, scheme):
    paths = write_tree(tmp_path / "pets", parts=("train", "validation"))
    name, path = (scheme + str(tmp_path / "pets"), "cache") if scheme == "hfds/" else (scheme, "pets")
    train, val = read(name, tmp_path / path)
    for source, part in ((train, "train"), (val, "validation")):
        assert targets_of(source) == [0, 0, 1, 1] and source.num_classes == 2
        for found, file in zip(pixels_of(source), paths[part], strict=True):
            np.testing.assert_array_equal(found, np.asarray(Image.open(file)))


def test_the_hugging_face_package_does_not_shadow_datasets_py(tmp_path):
    write_tree(tmp_path / "pets", parts=("train", "validation"))
    path = sys.path[:]
    for _ in range(2):
        read(f"hfds/{tmp_path / 'pets'}", tmp_path / "cache")
        assert sys.modules["datasets"] is datasets and sys.path == path


def write_parquet(folder, split, images, labels, image="image", label="label"):
    folder.mkdir(exist_ok=True)
    columns = {image: [{"bytes": content, "path": None} for content in images], label: labels}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}-00000-of-00001.parquet")


def test_hugging_face_parquet_without_class_names(tmp_path):
    images = [picture(n) for n in range(3)]
    write_parquet(tmp_path / "set", "train", map(encoded, images), [2, 0, 1])
    write_parquet(tmp_path / "set", "validation", map(encoded, images[:2]), [1, 0])
    train, val = read(f"hfds/{tmp_path / 'set'}", tmp_path / "cache")
    assert targets_of(train) == [2, 0, 1] and targets_of(val) == [1, 0] and train.num_classes == val.num_classes == 3
    np.testing.assert_array_equal(pixels_of(train)[1], np.asarray(images[1]))


@pytest.mark.parametrize(("val_label", "num_classes"), [(-1, None), (3, None), (2, 2)])
def test_labels_outside_the_classes_are_a_user_error(tmp_path, val_label, num_classes):
    images = [encoded(picture(n)) for n in range(3)]
    write_parquet(tmp_path / "set", "train", images, [0, 1, 2])
    write_parquet(tmp_path / "set", "validation", images[:1], [val_label])  # -1 is how a test part hides its labels
    with tiny.user_error("--data-set hfds/", "labels from", "--num-classes", "--val-split"):
        read(f"hfds/{tmp_path / 'set'}", tmp_path / "cache", num_classes=num_classes)


def test_unknown_split_is_a_user_error_that_names_it(tmp_path):
    write_tree(tmp_path / "pets", parts=("train", "test"))
    with tiny.user_error("'validation' cannot be read", "--val-split"):
        read(f"hfds/{tmp_path / 'pets'}", tmp_path / "cache")
    assert len(read(f"hfds/{tmp_path / 'pets'}", tmp_path / "cache", val_split="test")[1]) == 4


def test_parts_with_different_classes_are_a_user_error(tmp_path):
    for split, classes in (("train", ("cat", "dog")), ("validation", ("cat", "eel"))):
        write_tree(tmp_path / "pets", parts=(split,), classes=classes)
    with tiny.user_error("only one of train/ and validation/"):
        read("torch/image_folder", tmp_path / "pets")


@pytest.mark.parametrize("name", ["torch/image_folder", "torch/folder"])
def test_class_folders_without_splits_are_a_user_error(tmp_path, name):
    write_tree(tmp_path, parts=(".",))  # where timm would read the same folders for both splits
    with tiny.user_error("--data-path", "has no folder train/"):
        read(name, tmp_path)
    write_tree(tmp_path, parts=("train",))
    with tiny.user_error("--data-path", "has no folder validation/"):
        read(name, tmp_path)


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("training", "evaluation"), ("train", "validation")])
def test_torch_folders_may_have_the_names_that_timm_takes(tmp_path, train, val):
    paths = write_tree(tmp_path, parts=(train, val))
    sources = read("torch/image_folder", tmp_path)
    assert [[Path(path) for path in paths_of(source)] for source in sources] == [paths[train], paths[val]]


def test_torch_folders_ignore_hidden_ones_and_take_more_classes(tmp_path):
    write_tree(tmp_path)
    for part in ("train", "val"):
        save(picture(0), tmp_path / part / ".ipynb_checkpoints" / "1.png")
    assert [source.num_classes for source in read("torch/image_folder", tmp_path)] == [2, 2]
    assert [source.num_classes for source in read("torch/image_folder", tmp_path, num_classes=5)] == [5, 5]
    assert [source.class_names for source in read("torch/image_folder", tmp_path, num_classes=5)] == [(), ()]
    with tiny.user_error("--num-classes 1"):
        read("torch/image_folder", tmp_path, num_classes=1)


def write_mnist(root, name):
    """Six training and four test images in the official files, all different."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(file, array, code):
        header = np.array([code * 256 + array.ndim, *array.shape], ">i4").tobytes()
        (raw / file).write_bytes(header + array.tobytes())

    for part, count in (("train", 6), ("t10k" if name != "QMNIST" else "test", 4)):
        prefix = f"qmnist-{part}" if name == "QMNIST" else part
        labels = np.arange(count, dtype=np.uint8) % 3
        write(f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), 8)
        if name == "QMNIST":
            write(f"{prefix}-labels-idx2-int", np.repeat(labels[:, None], 8, axis=1).astype(">i4"), 12)
        else:
            write(f"{prefix}-labels-idx1-ubyte", labels, 8)


@pytest.mark.parametrize("name", ["MNIST", "QMNIST"])
def test_torch_splits_have_known_names(tmp_path, name):
    write_mnist(tmp_path, name)
    data_set = f"torch/{name.lower()}"
    for train, val in (("train", "validation"), ("training", "test")):
        sources = read(data_set, tmp_path, train_split=train, val_split=val)
        assert [source.targets.tolist() for source in sources] == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0]]
    for flag, splits in (
        ("--train-split trainval", {"train_split": "trainval"}),
        ("--val-split nist", {"val_split": "nist"}),
    ):
        with tiny.user_error(flag, data_set, "no such split", "use one of train, training, val"):
            read(data_set, tmp_path, **splits)
    with tiny.user_error("--train-split test, --val-split eval", "same images"):
        read(data_set, tmp_path, train_split="test", val_split="eval")


def test_parts_with_the_same_images_are_a_user_error(tmp_path):
    for split in ("train", "validation", "test"):
        other = split == "test"  # the same labels, one other image
        images = [encoded(picture(n + 10 * (other and n == 2))) for n in range(3)]
        write_parquet(tmp_path / "set", split, images, [0, 1, 2])
    name, cache = f"hfds/{tmp_path / 'set'}", tmp_path / "cache"
    for splits in ({}, {"val_split": "train"}):
        with tiny.user_error("--train-split train", "same images"):
            read(name, cache, **splits)
    assert len(read(name, cache, val_split="test")[1]) == 3
    _, val = build_sources(DataOptions(name, str(cache), val_split="train"), eval_only=True)
    assert len(val) == 3


# The first two of each are read by Hugging Face, too.
OVERLAPPING = [("train[:-2]", "train[-3:]"), ("train[-20%:]", "validation+train[90%:]"), ("train", "train[80%:]")]
OVERLAPPING += [("train[:80%]", "train[50%:]"), ("train[:5]", "train[4:]"), ("train", "train")]
OVERLAPPING += [("train[:50%]", "train[4:]"), ("validation+train[:1]", "train[:10%]")]
DISJOINT = [("train[:-20%]", "train[-20%:]"), ("train[2:4]", "train[:2]+train[4:]"), ("train[:80%]", "train[80%:]")]
DISJOINT += [("train[:-2]", "train[-2:]"), ("train[:50%]", "train[5:]"), ("train", "validation")]


@pytest.mark.parametrize("train, val", OVERLAPPING[:2])
def test_slices_with_common_images_are_a_user_error(tmp_path, train, val):
    for split in ("train", "validation"):
        images = [encoded(picture(n + 10 * (split == "train"))) for n in range(10)]
        write_parquet(tmp_path / "set", split, images, [0, 1] * 5)
    with tiny.user_error(f"--train-split {train}, --val-split {val}", "same images", "without common images"):
        read(f"hfds/{tmp_path / 'set'}", tmp_path / "cache", train_split=train, val_split=val)


@pytest.mark.parametrize("train, val", DISJOINT[:2])
def test_slices_without_common_images_are_read(tmp_path, train, val):
    for split in ("train", "validation"):
        images = [encoded(picture(n + 10 * (split == "train"))) for n in range(10)]
        write_parquet(tmp_path / "set", split, images, [0, 1] * 5)
    parts = read(f"hfds/{tmp_path / 'set'}", tmp_path / "cache", train_split=train, val_split=val)
    first, second = ({image.tobytes() for image in pixels_of(part)} for part in parts)
    assert first and second and not first & second


def test_slices_of_a_known_size_are_compared():
    for train, val in OVERLAPPING + DISJOINT:
        for pair in ((train, val), (val, train)):
            assert datasets._overlap(*pair, {"train": 10, "validation": 10}) is ((train, val) in OVERLAPPING), pair


def test_slices_of_an_unknown_size_are_compared_in_their_unit():
    need_the_size = {("train[:50%]", "train[4:]"), ("train[:-2]", "train[-3:]")}
    need_the_size.add(("validation+train[:1]", "train[:10%]"))
    expected = {pair: pair not in need_the_size for pair in OVERLAPPING}
    for (train, val), found in {**expected, **dict.fromkeys(DISJOINT, False)}.items():
        assert datasets._overlap(train, val, {}) is found, (train, val)
        assert datasets._overlap(val, train, {"train": None}) is found


@pytest.mark.parametrize("scheme", ["hfids/", "wds/"])
def test_streams_of_the_same_images_are_a_user_error(tmp_path, scheme):
    if scheme == "wds/":
        name, path = scheme, write_stream(tmp_path)
    else:
        write_tree(tmp_path / "pets", parts=("train", "validation"))
        name, path = scheme + str(tmp_path / "pets"), tmp_path / "cache"
    with tiny.user_error("--train-split train, --val-split train", "same images"):
        read(name, path, val_split="train", num_classes=3)
    if scheme == "wds/":
        shard = "./set-train-0001.tar|6"
        with tiny.user_error(f"--train-split train, --val-split {shard}", "same images"):
            read(name, path, val_split=shard, num_classes=3)


@pytest.mark.parametrize("scheme", ["hfds/", "hfids/"])
def test_columns_have_the_names_of_the_flags(tmp_path, scheme):
    images = [encoded(picture(n)) for n in range(5)]
    for split, chosen in (("train", slice(3)), ("validation", slice(3, 5))):
        labels = [2, 0, 1][: len(images[chosen])]
        write_parquet(tmp_path / "set", split, images[chosen], labels, image="img", label="fine_label")
    name, cache = scheme + str(tmp_path / "set"), tmp_path / "cache"
    for columns, flag in (({}, "--image-column image"), ({"image_column": "img"}, "--label-column label")):
        with tiny.user_error(flag, "no such column; it has ", "img", "fine_label"):
            read(name, cache, num_classes=3, **columns)
    train, val = read(name, cache, num_classes=3, image_column="img", label_column="fine_label")
    assert len(train) == 3 and len(val) == 2
    if scheme == "hfds/":
        assert targets_of(train) == [2, 0, 1] and targets_of(val) == [2, 0]


@pytest.mark.parametrize("column", ["image_column", "label_column"])
@pytest.mark.parametrize("name", ["DIGITS", "IMNET", "torch/cifar10"])
def test_other_data_sets_have_no_columns(tmp_path, name, column):
    with tiny.user_error(f"--{column.replace('_', '-')} x: {name} has no columns"):
        read(name, tmp_path, **{column: "x"})


@pytest.mark.parametrize("labels", [[0, None, 1], ["cat", "dog", "cat"], [[0], [1], [1]], [0.0, 0.5, 1.0]])
def test_labels_that_are_no_class_numbers_are_a_user_error(tmp_path, labels):
    images = [encoded(picture(n)) for n in range(5)]
    write_parquet(tmp_path / "set", "train", images[:3], labels)
    write_parquet(tmp_path / "set", "validation", images[3:], labels[:2])
    with tiny.user_error("--label-column", "hfds/", repr(next(n for n in labels if n not in (0, 1)))):
        read(f"hfds/{tmp_path / 'set'}", tmp_path / "cache", num_classes=2)


def test_whole_numbers_of_any_type_are_class_numbers(tmp_path):
    for split, labels in (("train", [0.0, 2.0, 1.0]), ("validation", [1.0, 0.0])):
        write_parquet(tmp_path / "set", split, [encoded(picture(n)) for n in range(len(labels))], labels)
    assert read(f"hfds/{tmp_path / 'set'}", tmp_path / "cache")[0].targets.tolist() == [0, 2, 1]


def test_evaluation_needs_no_training_split(tmp_path):
    images = [encoded(picture(n)) for n in range(2)]
    write_parquet(tmp_path / "set", "validation", images, [1, 0])
    write_tree(tmp_path / "pets", parts=("val",))
    parquet = DataOptions(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), num_classes=3)
    folders = DataOptions("torch/folder", str(tmp_path / "pets"))
    for options, expected in ((parquet, [1, 0]), (folders, [0, 0, 1, 1])):
        train, val = build_sources(options, eval_only=True)
        assert val.targets.tolist() == expected and len(train) == 0 and train.num_classes == val.num_classes


def test_tfds_without_tensorflow_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with tiny.user_error("--data-set tfds/mnist", "tensorflow"):
        read("tfds/mnist", tmp_path)


def write_shards(root, split, counts, contrast=10, files=None):
    """WebDataset shards of one-color images: the n-th of a split has brightness `contrast` · n and class n % 3.

    `files(number, image)` gives the files of a sample by suffix.
    """
    files = files or (lambda number, image: {"png": encoded(image), "cls": str(number % 3).encode()})
    names, number = [f"set-{split}-{shard:04d}.tar" for shard in range(len(counts))], 0
    for name, count in zip(names, counts, strict=True):
        with tarfile.open(root / name, "w") as tar:
            for _ in range(count):
                for suffix, content in files(number, Image.new("RGB", (8, 8), (contrast * number,) * 3)).items():
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    return {"name": split, "num_samples": number, "filenames": names, "shard_lengths": counts}


def write_stream(root, counts=(6, 6), **options):
    """A WebDataset with training shards of these sizes and seven validation images in two shards."""
    splits = {"train": list(counts), "validation": [4, 3]}
    info = {split: write_shards(root, split, sizes, **options) for split, sizes in splits.items()}
    (root / "_info.json").write_text(json.dumps({"splits": info}))
    return str(root)


@pytest.fixture
def shards(tmp_path):
    return write_stream(tmp_path)


def test_stream_needs_the_number_of_classes(shards):
    with tiny.user_error("--num-classes"):
        read("wds/", shards)


@pytest.mark.parametrize("suffix", ["jpeg", "JPEG", "bmp", "webp", "tif"])
def test_stream_reads_images_of_any_common_suffix(tmp_path, suffix):
    kind = {"tif": "tiff"}.get(suffix, suffix)
    path = write_stream(tmp_path, files=lambda n, image: {suffix: encoded(image, kind), "cls": str(n % 3).encode()})
    _, val = read("wds/", path, num_classes=3)
    assert [target for _, target in val.dataset] == [0, 1, 2, 0, 1, 2, 0]


def test_stream_reads_the_columns_of_the_flags(tmp_path):
    def files(number, image):
        about = {"fine": number % 3, "coarse": "animal", "none": None}
        red = encoded(Image.new("RGB", (8, 8), "red"))
        return {"jpg": encoded(image, "jpeg"), "mask.png": red, "json": json.dumps(about).encode()}

    path = write_stream(tmp_path, files=files)
    _, val = read("wds/", path, num_classes=3, image_column="mask.png", label_column="fine")
    samples = list(val.dataset)
    assert [target for _, target in samples] == [0, 1, 2, 0, 1, 2, 0]
    assert all(image.getpixel((0, 0)) == (255, 0, 0) for image, _ in samples)
    for columns, words in (
        ({}, ("--label-column cls", "it has jpg, mask.png, json")),
        ({"label_column": "medium"}, ("--label-column medium", "it has fine, coarse, none")),
        ({"label_column": "coarse"}, ("--label-column coarse", "'animal'")),
        ({"label_column": "none"}, ("--label-column none", "None")),
        ({"label_column": "fine", "image_column": "png"}, ("--image-column png", "it has jpg, mask.png, json")),
    ):
        with tiny.user_error(*words):
            read("wds/", path, num_classes=3, **columns)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"heic": b"x", "cls": b"0"}, ("--image-column", "it has heic, cls")),
        ({"jpg": b"x", "cls": b"cat"}, ("--label-column cls", "b'cat'")),
        ({"jpg": b"x", "json": b"{"}, ("--label-column cls", "it has jpg, json")),
        ({}, ("--image-column", "it has none")),
    ],
)
def test_stream_without_images_or_labels_is_a_user_error(tmp_path, sample, words):
    path = write_stream(tmp_path, files=lambda number, image: sample)
    with tiny.user_error("wds/", *words):
        read("wds/", path, num_classes=3)


def test_stream_whose_shards_are_gone_is_a_user_error(shards, tmp_path):
    (tmp_path / "set-validation-0000.tar").unlink()
    with tiny.user_error("--data-set wds/", "'validation' cannot be read"):
        read("wds/", shards, num_classes=3)


def test_stream_has_no_fraction_and_stays_on_disk(shards):
    train, _ = read("wds/", shards, num_classes=3)
    assert isinstance(train, StreamingImages)
    assert take_fraction(train, 1.0) is keep_in_memory(train, 100) is train
    with tiny.user_error("--train-fraction"):
        take_fraction(train, 0.5)


# -- parts of a data set, and images in memory -------------------------------------------------------------------------


def source_of(counts):
    targets = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(0).shuffle(targets)
    images = MemoryImages([np.full((1, 1, 3), n % 256, dtype=np.uint8) for n in range(len(targets))])
    return Source(images, targets, len(counts), np.arange(len(targets)))


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.33, 0.5, 0.9])
def test_fraction_is_taken_of_each_class(fraction):
    counts = [100, 41, 3, 1]
    part = take_fraction(source_of(counts), fraction)
    expected = [max(1, round(fraction * count)) for count in counts]
    assert np.bincount(targets_of(part), minlength=4).tolist() == expected
    assert len(set(part.order)) == len(part) and part.num_classes == 4


def test_images_are_grouped_by_class_in_their_order():
    source = dataclasses.replace(source_of([30, 0, 12, 1, 0]), order=np.random.default_rng(1).permutation(43)[:40])
    groups = sources._by_class(source)
    naive = [[n for n, index in enumerate(source.order) if source.targets[index] == label] for label in range(5)]
    assert [group.tolist() for group in groups] == naive


def test_classes_in_another_order_are_renumbered():
    source = dataclasses.replace(source_of([2, 1, 3]), class_names=("a", "b", "c"))
    found = sources.with_classes(source, ("c", "a", "b"), "x")
    assert found.class_names == ("c", "a", "b") and found.targets.tolist() == [(t + 1) % 3 for t in source.targets]
    found = sources.with_classes(source, ("z", "c", "b", "a"), "x")
    assert found.num_classes == 4 and found.targets.tolist() == [3 - t for t in source.targets]
    for names in (("a", "b", "c"), ("a", "b"), ("a", "b", "x"), ("c", "b", "a", "a"), ()):
        assert sources.with_classes(source, names, "x") is source


@pytest.mark.parametrize("train_fraction", [1.0, 0.5])
def test_other_training_files_than_those_of_a_checkpoint_are_a_warning(tmp_path, caplog, train_fraction):
    write_tree(tmp_path, parts=(".",), each=10)
    options = DataOptions("IMNET", str(tmp_path), val_fraction=0.3)
    train, _ = build_sources(dataclasses.replace(options, train_fraction=train_fraction))
    flags = {"train_fraction": train_fraction, "val_fraction": 0.3}
    checkpoint = {"args": flags, "run": {"file_names": zlib.crc32(train.file_names())}}

    def warnings(fraction=0.3, about=checkpoint):
        caplog.clear()
        part, _ = build_sources(dataclasses.replace(options, val_fraction=fraction), eval_only=True)
        sources.check_held_out(part, about, fraction, "--resume x")
        return [record.getMessage() for record in caplog.records]

    assert warnings() == warnings(0.5, {}) == []
    (warning,) = warnings(0.5)
    assert "--val-fraction 0.5" in warning and "trained on some of the evaluated images" in warning
    assert "--val-fraction 0.3 of its training is not applied" in warnings(0.0)[0]
    save(picture(99), tmp_path / "cat" / "99.png")
    assert len(warnings()) == 1


def test_larger_fraction_contains_the_smaller_one():
    source, smaller = source_of([60, 9, 2]), set()
    for fraction in (0.01, 0.1, 0.25, 0.5, 0.51, 0.99, 1.0):
        part = set(take_fraction(source, fraction).order)
        assert smaller <= part
        smaller = part
    assert len(smaller) == 71


def test_fraction_ignores_the_generators_and_is_not_just_the_first_images():
    parts = []
    for seed in (0, 1):
        seed_generators(seed)
        parts.append(take_fraction(source_of([80, 20]), 0.25).order)
    np.testing.assert_array_equal(*parts)
    first_of_each = [np.flatnonzero(source_of([80, 20]).targets == label)[:n] for label, n in ((0, 20), (1, 5))]
    assert set(parts[0]) != set(np.concatenate(first_of_each))


def test_fraction_of_a_part():
    train, val = read("DIGITS")
    part = take_fraction(train, 0.1)
    assert set(part.order) < set(train.order) and not set(part.order) & set(val.order)
    for index in (0, len(part) - 1):
        assert part[index][1] == train.targets[part.order[index]]


def test_memory_holds_the_same_pixels_of_images_of_any_size(tmp_path):
    write_tree(tmp_path)
    save(picture(9, height=5, width=31), tmp_path / "train" / "cat" / "wide.png")
    save(picture(8, mode="L"), tmp_path / "train" / "dog" / "gray.png")
    source = take_fraction(read("IMNET", tmp_path)[0], 0.9)
    kept = keep_in_memory(source, 1)
    assert isinstance(kept.images, MemoryImages) and targets_of(kept) == targets_of(source)
    for found, expected in zip(pixels_of(kept), pixels_of(source), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("limit_mb", "fits"), [(0, False), (0.021, False), (0.0223, True), (1, True)])
def test_memory_limit_is_respected(tmp_path, limit_mb, fits):
    write_tree(tmp_path, each=5, height=24, width=32)  # 10 images, 23,040 bytes: 0.02197 MiB
    source = read("IMNET", tmp_path)[0]
    kept = keep_in_memory(source, limit_mb)
    assert isinstance(kept.images, MemoryImages) == fits
    assert fits or kept is source


def test_what_is_in_memory_already_is_left_alone():
    train, _ = read("DIGITS")
    assert keep_in_memory(train, 1000) is train


# -- broken images -----------------------------------------------------------------------------------------------------


def break_image(path, how):
    data = path.read_bytes()
    content = {"truncated": data[: len(data) // 2], "garbage": b"not an image", "empty": b""}
    path.write_bytes(content[how]) if how in content else path.unlink()


def test_image_of_impossible_size_is_named(tmp_path, monkeypatch):
    path = save(picture(0), tmp_path / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow refuses twice this many
    with pytest.raises(RunError, match="0.png"):
        Source(PathImages([path]), np.array([0]), 1, np.array([0]))[0]


def test_thousands_of_broken_images_in_a_row_are_replaced(tmp_path):
    """As when a class folder was not copied."""
    (tmp_path / "broken.png").write_bytes(b"")
    save(picture(0), tmp_path / "good.png")
    images = PathImages([tmp_path / "broken.png"] * 1500 + [tmp_path / "good.png"])
    source = whole_source(images, [0] * 1500 + [1], ["a", "b"])
    tolerant = dataclasses.replace(source, broken=BrokenImages(images, 1500))
    assert tolerant[0][1] == 1 and len(tolerant.broken.found_here()) == 1500
    hopeless = dataclasses.replace(source, order=source.order[:1500], broken=BrokenImages(images, 1500))
    with pytest.raises(RunError, match="none of the 1500 images"):
        hopeless[0]


def test_broken_image_stops_the_copy_to_memory(tmp_path):
    paths = write_tree(tmp_path, each=20)["val"]
    source = read("IMNET", tmp_path)[1]
    break_image(paths[3], "garbage")  # not one of the 16 by which the size is judged
    with pytest.raises(RunError, match=paths[3].name):
        keep_in_memory(source, 1)


# -- transforms --------------------------------------------------------------------------------------------------------


def normalized(pixels, mean=MEAN, std=STD):
    """Normalize [H, W, 3] bytes to [3, H, W] by hand, in float64."""
    scaled = (np.asarray(pixels) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(scaled.transpose(2, 0, 1))


def assert_is(found, expected):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (8, 8)])
def test_small_images_are_padded_and_cropped(height, width):
    image = picture(0, height, width)
    transform = host_view((height, width), **NO_AUGMENTATION)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    crops = {
        padded[top : top + height, left : left + width].tobytes(): (top, left) for top in range(9) for left in range(9)
    }
    met = []
    for seed in range(100):
        seed_generators(seed)
        pixels = (transform(image).permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)) * 255
        met.append(crops[pixels.round().to(torch.uint8).numpy().tobytes()])
    assert all(set(shifts) == set(range(9)) for shifts in zip(*met, strict=True))


def test_small_images_of_another_size_are_resized_first():
    transform = host_view((16, 24), UNSCALED, **NO_AUGMENTATION)
    view = transform(Image.new("RGB", (100, 50), "white"))
    assert view.shape == (3, 16, 24)
    assert set(view.unique().tolist()) <= {0.0, 1.0} and view[0].sum() >= (16 - 4) * (24 - 4)  # white but for padding


def test_flip_is_certain_at_probability_one():
    image = picture(0, 32, 32)
    transforms = [host_view((32, 32), **NO_AUGMENTATION | {"hflip": hflip}) for hflip in (0.0, 1.0)]
    plain, flipped = (seed_generators(3) or transform(image) for transform in transforms)
    assert torch.equal(plain.flip(2), flipped)


@pytest.mark.parametrize("input_size", [(65, 65), (72, 96), (32, 48)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "3a", "none", ""])
def test_views_have_the_input_size(input_size, interpolation, aa):
    transform = host_view(input_size, train_interpolation=interpolation, aa=aa)
    view = transform(picture(0, 90, 70))
    assert view.shape == (3, *input_size) and view.dtype == torch.float32


@pytest.mark.parametrize("input_size", [(72, 72), (96, 72)])
def test_large_images_are_cropped_unpadded_and_normalized_for_the_model(input_size):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    transform = host_view(input_size, (mean, std), **NO_AUGMENTATION)
    color = Image.new("RGB", (100, 80), (10, 100, 200))
    assert_is(transform(color), normalized(np.full((*input_size, 3), (10, 100, 200)), mean, std))
    seed_generators(0)
    crops = [transform(picture(0, 100, 80)) for _ in range(2)]
    assert not torch.equal(*crops)


@pytest.mark.parametrize(("remode", "erased"), [("const", 0.0), ("pixel", None)])
def test_erasing_fills_as_asked(remode, erased):
    transform = host_view((96, 96), **NO_AUGMENTATION | {"reprob": 1.0, "remode": remode})
    seed_generators(1)
    view = transform(Image.new("RGB", (96, 96), "white"))
    hole = view[0] != view[0].max() if erased is not None else (view[0] - (1 - MEAN[0]) / STD[0]).abs() > 1e-5
    assert 0.01 < hole.float().mean() < 0.4
    assert erased is None or (view[:, hole] == erased).all()


ODD_POLICIES = ["rand-m9-mstd0.5-inc", "rand-foo", "rand-m", "rand-m9-tfoo", "rand-m9-inc1-x", "v0-foo", "3a-x"]
ODD_POLICIES += ["original-mstd", "rand-", "rand--m9", "random", "augmix-m", "augmix-x3", "rand-m٣", "none-m9", " "]


@pytest.mark.parametrize("policy", ["nonsense", "rand-m9-q3", *ODD_POLICIES])
def test_unknown_policy_is_a_user_error(policy):
    with tiny.user_error(f"--aa {policy}"):
        host_view((32, 32), aa=policy)


# facebookresearch/deit augment.py: what becomes of the colors, one of the three with equal probability
COLORS = [
    lambda image: ImageOps.solarize(image),
    torchvision.transforms.Grayscale(3),
    lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))),
]


def published_three_augment(size, src, color):
    """Apply the original 3-Augment (torchvision, timm, PIL) with a given color operation."""
    parts = torchvision.transforms
    crop = [RandomResizedCropAndInterpolation(size, scale=(0.08, 1.0), interpolation="bicubic")]
    if src:
        bicubic = parts.InterpolationMode.BICUBIC
        crop = [parts.Resize(size, bicubic), parts.RandomCrop(size, padding=4, padding_mode="reflect")]
    jitter = parts.ColorJitter(0.3, 0.3, 0.3)
    end = [parts.ToTensor(), parts.Normalize(MEAN, STD)]
    return parts.Compose([*crop, parts.RandomHorizontalFlip(), color, jitter, *end])


@pytest.mark.parametrize("size, src", [(72, False), (72, True), (32, True)])
@pytest.mark.parametrize("number", range(3))
def test_three_augment_without_erasing_is_the_published_one(number, src, size, monkeypatch):
    ours = host_view((size, size), aa="3a", reprob=0.0, src=src)
    theirs = published_three_augment(size, src, COLORS[number])
    choices = []

    def choose(policies):  # the only draw that the two make in different ways
        choices.append(len(policies))
        return policies[number]

    for seed in range(6):
        image = picture(seed, *[(100, 80), (60, 90), (32, 32)][seed % 3])
        seed_generators(seed)
        expected = theirs(image)
        seed_generators(seed)
        with monkeypatch.context() as patch:
            patch.setattr("timm.data.auto_augment.random.choice", choose)
            assert torch.equal(ours(image), expected)
    assert choices == [3] * 6  # of which each is drawn with the same probability


def test_simple_random_crops_shift_and_reflect_as_numpy_does():
    transform = host_view((16, 16), UNSCALED, **NO_AUGMENTATION, src=True)
    image = picture(0, 40, 32)  # the short side becomes 16, the long one 20
    padded = np.pad(np.asarray(image.resize((16, 20), Image.BICUBIC)), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {padded[y : y + 16, x : x + 16].tobytes() for y in range(13) for x in range(9)}
    seed_generators(0)
    views = [(transform(image) * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for _ in range(1000)]
    assert set(views) == crops


def center_crop_by_hand(image, input_size, crop_ratio):
    """Scale both sides alike so that the image covers the target over `crop_ratio`, then cut out the center."""
    (height, width), (tall, wide) = input_size, (int(side / crop_ratio) for side in input_size)
    scale = max(tall / image.height, wide / image.width)
    # One side fits exactly; torchvision rounds the other down when the target is square, timm to the nearest.
    whole = int if tall == wide else round
    new_height = tall if scale == tall / image.height else whole(image.height * scale)
    new_width = wide if scale == wide / image.width else whole(image.width * scale)
    pixels = np.asarray(image.resize((new_width, new_height), Image.BICUBIC))
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize("image_size", [(300, 200), (150, 310), (256, 256)])
@pytest.mark.parametrize(
    ("input_size", "crop_ratio"), [((224, 224), 0.875), ((224, 224), 1.0), ((96, 96), 0.9), ((160, 224), 0.875)]
)
def test_large_images_are_evaluated_at_their_center(image_size, input_size, crop_ratio):
    image = picture(0, *image_size)
    transform = build_eval_transform(ViewOptions(input_size, eval_crop_ratio=crop_ratio), NORMALIZATION)
    assert_is(transform(image), normalized(center_crop_by_hand(image, input_size, crop_ratio)))


@pytest.mark.parametrize("input_size", [(32, 32), (64, 48)])
@pytest.mark.parametrize("image_size", [(32, 32), (64, 48), (50, 20)])
def test_small_images_are_evaluated_whole(input_size, image_size):
    image, mean, std = picture(0, *image_size), (0.5, 0.5, 0.4), (0.5, 0.25, 1.0)
    transform = build_eval_transform(ViewOptions(input_size), (mean, std))
    resized = image if image_size == input_size else image.resize(input_size[::-1], Image.BICUBIC)
    assert_is(transform(image), normalized(resized, mean, std))
