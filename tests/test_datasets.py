"""Data sets on tiny fabricated files, views, transforms, loaders and Mixup, through the functions that `main` calls."""

import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
import traceback
import urllib.error

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.io
import sklearn.datasets
import tiny
import torch
import torchvision
from PIL import Image

import datasets
from augment import EvalTransform, TrainAugmentation
from datasets import (
    DIGITS_FILE,
    MemoryImages,
    PathImages,
    Source,
    StreamingImages,
    build_eval_transform,
    build_sources,
    build_train_transform,
    keep_in_memory,
    take_fraction,
)
from loaders import (
    DeviceImages,
    FramedImages,
    KeyedImages,
    build_eval_loader,
    build_mixup,
    build_prepare,
    build_train_loader,
    fits_frames,
    frame_of,
)
from samplers import Batch, KeyedSampler, seed_generators
from utils import RunError, World, last_line

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNSCALED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
NO_AUGMENTATION = {"hflip": 0.0, "color_jitter": 0.0, "auto_augment": "none", "re_prob": 0.0}


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
    """`PART/CLASS/N.png`, all images different; their paths by part, in the order of the data set."""
    paths = {part: [root / part / name / f"{n}.png" for name in classes for n in range(each)] for part in parts}
    for number, path in enumerate(path for part in parts for path in paths[part]):
        save(picture(number, **size), path)
    return paths


def pixels_of(source):
    return [np.asarray(source[index][0]) for index in range(len(source))]


def targets_of(source):
    return [source[index][1] for index in range(len(source))]


def world(rank=0, size=1):
    return World(rank, size, rank, size, CPU)


def train_loader(source, transform, batch_size=2, num_workers=0, rank=0, size=1, accum_steps=1, repeats=1, seed=3):
    return build_train_loader(
        source,
        transform,
        batch_size=batch_size,
        accum_steps=accum_steps,
        repeats=repeats,
        seed=seed,
        num_workers=num_workers,
        pin_memory=False,
        world=world(rank, size),
    )


def eval_loader(source, transform, batch_size=2, num_workers=0, rank=0, size=1):
    return build_eval_loader(
        source, transform, batch_size=batch_size, num_workers=num_workers, pin_memory=False, world=world(rank, size)
    )


def unscaled_eval(size=(8, 8)):
    return build_eval_transform(size, **UNSCALED, interpolation="bilinear", crop_ratio=1.0)


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*_args, **_options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


# -- the bundled digits ------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_with_every_fifth_of_a_class_held_out():
    theirs = sklearn.datasets.load_digits()
    train, val = build_sources("DIGITS", None)
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
    (train, val), (again, _) = build_sources("DIGITS", None), build_sources("DIGITS", "ignored")
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
    train, val = build_sources(name, str(tmp_path))
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
    grey = Image.linear_gradient("L").resize((32, 24)) if mode != "1" else Image.new("L", (32, 24), "white")
    save(grey.convert(mode), tmp_path / "train" / "cat" / file)
    save(grey, tmp_path / "val" / "cat" / "1.png")
    found = build_sources("IMNET", str(tmp_path))[0][0][0]
    assert found.mode == "RGB" and found.size == (32, 24)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(grey).astype(int)[:, :, None])
    assert difference.max() <= (6 if file.lower().endswith(("jpg", "jpeg", "webp")) else 0)


def test_folder_without_val_is_a_user_error(tmp_path):
    write_tree(tmp_path, parts=("train",))
    with tiny.user_error("--data-path", tmp_path, "val/"):
        build_sources("IMNET", str(tmp_path))


def test_val_without_class_folders_is_a_user_error(tmp_path):
    write_tree(tmp_path, parts=("train",))
    save(picture(0), tmp_path / "val" / "1.png")
    with tiny.user_error("--data-path", tmp_path, "val/ has no class folders"):
        build_sources("IMNET", str(tmp_path))


@pytest.mark.parametrize("part", ["train", "val"])
def test_class_in_one_part_only_is_a_user_error(tmp_path, part):
    write_tree(tmp_path)
    save(picture(0), tmp_path / part / "eel" / "1.png")
    with tiny.user_error("--data-path", "eel", "train/", "val/"):
        build_sources("IMNET", str(tmp_path))


@pytest.mark.parametrize("name", ["eel", "eel v1.5"])
def test_empty_class_is_a_user_error(tmp_path, name):
    write_tree(tmp_path)
    (tmp_path / "train" / name).mkdir()
    (tmp_path / "train" / name / "notes.txt").write_text("no image")
    with tiny.user_error("--data-path", f"class {name};", "train/"):
        build_sources("IMNET", str(tmp_path))


@pytest.mark.parametrize("name", ["IMNET", "INAT", "INAT19", "CARS"])
def test_data_that_are_not_downloaded_need_a_path(name):
    with tiny.user_error("--data-path", name, "DIGITS"):
        build_sources(name, None)


@pytest.mark.parametrize("name", ["IMNET", "CIFAR10", "FLOWERS"])
def test_missing_folder_is_a_user_error(tmp_path, name):
    with tiny.user_error("--data-path", tmp_path / "typo"):
        build_sources(name, str(tmp_path / "typo"))


def test_unknown_name_is_a_user_error_that_lists_the_known_ones():
    with tiny.user_error("--data-set IMAGENET", "IMNET", "DIGITS", "hfds/"):
        build_sources("IMAGENET", None)


# -- CIFAR, Flowers and Cars through torchvision -----------------------------------------------------------------------


def write_cifar(root, monkeypatch, kind):
    """Files of the official layout, whose checksums torchvision is told to want; images and labels of both parts."""
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
    for source, (images, labels) in zip(build_sources(name, str(tmp_path)), parts, strict=True):
        assert source.num_classes == classes and targets_of(source) == labels
        np.testing.assert_array_equal(np.stack(pixels_of(source)), images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", ["CIFAR", "CIFAR10", "CIFAR100", "FLOWERS"])
def test_failed_download_says_what_was_tried_and_offers_the_digits(tmp_path, no_network, name):
    with tiny.user_error(f"--data-set {name}:", tmp_path, "no route to host", "--data-path", "DIGITS"):
        build_sources(name, str(tmp_path))


def test_failed_download_without_a_path_names_the_default_folder(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    with tiny.user_error(tmp_path / "data"):
        build_sources("CIFAR10", None)
    with tiny.user_error("torch/cifar10", "no route to host"):
        build_sources("torch/cifar10", None)
    assert (tmp_path / "data").is_dir()


def test_error_without_a_message_is_still_one_line(tmp_path, monkeypatch):
    def urlopen(*_args, **_options):
        raise TimeoutError

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with tiny.user_error("TimeoutError"):
        build_sources("CIFAR10", str(tmp_path))


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
    train, test = build_sources("FLOWERS", str(tmp_path))
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
    train, test = build_sources("CARS", str(cars))
    assert targets_of(train) == [2, 0] and targets_of(test) == [1, 2, 0]
    assert train.num_classes == test.num_classes == 3
    assert train[0][0].size == (10, 12)


@pytest.mark.parametrize("missing", ["devkit/cars_meta.mat", "cars_test_annos_withlabels.mat"])
def test_incomplete_cars_are_a_user_error(cars, missing):
    (cars / "stanford_cars" / missing).unlink()
    with tiny.user_error("--data-path", cars, "stanford_cars/"):
        build_sources("CARS", str(cars))


@pytest.mark.parametrize(
    ("name", "words"),
    [("CARS", "Scipy is not found"), ("FLOWERS", "--data-set FLOWERS: needs scipy; pip install scipy")],
)
def test_missing_scipy_is_named(cars, monkeypatch, name, words):
    write_flowers(cars, monkeypatch)
    monkeypatch.delitem(sys.modules, "scipy.io")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with tiny.user_error(words):
        build_sources(name, str(cars))


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


@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize(
    ("category", "train_targets", "val_targets"), [("name", [2, 0, 1, 0], [1, 2]), ("kingdom", [1, 0, 1, 0], [1, 1])]
)
def test_inaturalist_numbers_classes_by_ascending_id(
    tmp_path, name, year, with_file, category, train_targets, val_targets
):
    write_inaturalist(tmp_path, year, with_file)
    train, val = build_sources(name, str(tmp_path), inat_category=category)
    assert targets_of(train) == train_targets and targets_of(val) == val_targets
    assert train.num_classes == val.num_classes == max(train_targets) + 1
    assert train.images.describe(2) == str(tmp_path / f"train_val{year}" / "3" / "train2.jpg")


def test_categories_without_ids_are_numbered_from_zero(tmp_path):
    names = [{"name": name} for name in ("a", "b", "c", "d", "e", "f", "g", "h")]
    write_inaturalist(tmp_path, 2018, True, categories=names)
    assert targets_of(build_sources("INAT", str(tmp_path))[0]) == [7, 2, 3, 2]


def test_level_that_the_taxonomy_has_not_is_a_user_error_that_lists_those_it_has(tmp_path):
    write_inaturalist(tmp_path, 2018, False)
    with tiny.user_error("--inat-category genus", "use one of kingdom, name"):
        build_sources("INAT", str(tmp_path), inat_category="genus")


@pytest.mark.parametrize(("content", "word"), [(None, "has no val2019.json"), ("{", "val2019.json is not valid JSON")])
def test_missing_or_broken_annotations_are_a_user_error(tmp_path, content, word):
    write_inaturalist(tmp_path, 2019, True)
    (tmp_path / "val2019.json").unlink()
    if content is not None:
        (tmp_path / "val2019.json").write_text(content)
    with tiny.user_error("--data-path", tmp_path, word):
        build_sources("INAT19", str(tmp_path))


# -- data sets of timm's -----------------------------------------------------------------------------------------------


def test_torch_scheme_reads_torchvisions_cifar(tmp_path, monkeypatch):
    parts = write_cifar(tmp_path, monkeypatch, torchvision.datasets.CIFAR10)
    for source, (images, labels) in zip(build_sources("torch/cifar10", str(tmp_path)), parts, strict=True):
        assert source.num_classes == 10 and targets_of(source) == labels
        np.testing.assert_array_equal(np.stack(pixels_of(source)), images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("scheme", ["torch/image_folder", "hfds/"])
def test_schemes_read_class_folders(tmp_path, scheme):
    paths = write_tree(tmp_path / "pets", parts=("train", "validation"))
    name, path = (scheme + str(tmp_path / "pets"), "cache") if scheme == "hfds/" else (scheme, "pets")
    train, val = build_sources(name, str(tmp_path / path))
    for source, part in ((train, "train"), (val, "validation")):
        assert targets_of(source) == [0, 0, 1, 1] and source.num_classes == 2
        for found, file in zip(pixels_of(source), paths[part], strict=True):
            np.testing.assert_array_equal(found, np.asarray(Image.open(file)))
    batches = list(eval_loader(val, unscaled_eval(), batch_size=3, num_workers=2))
    assert [batch.targets.tolist() for batch in batches] == [[0, 0, 1], [1]]


def test_hugging_face_package_does_not_take_the_place_of_this_repositorys_module(tmp_path):
    write_tree(tmp_path / "pets", parts=("train", "validation"))
    path = sys.path[:]
    for _ in range(2):
        build_sources(f"hfds/{tmp_path / 'pets'}", str(tmp_path / "cache"))
        assert sys.modules["datasets"] is datasets and sys.path == path


def write_parquet(folder, split, images, labels):
    folder.mkdir(exist_ok=True)
    columns = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}-00000-of-00001.parquet")


def test_hugging_face_parquet_without_class_names(tmp_path):
    images = [picture(n) for n in range(3)]
    write_parquet(tmp_path / "set", "train", map(encoded, images), [2, 0, 1])
    write_parquet(tmp_path / "set", "validation", map(encoded, images[:2]), [1, 0])
    train, val = build_sources(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"))
    assert targets_of(train) == [2, 0, 1] and targets_of(val) == [1, 0] and train.num_classes == val.num_classes == 3
    np.testing.assert_array_equal(pixels_of(train)[1], np.asarray(images[1]))


@pytest.mark.parametrize(("val_label", "num_classes"), [(-1, None), (3, None), (2, 2)])
def test_labels_outside_the_classes_are_a_user_error(tmp_path, val_label, num_classes):
    images = [encoded(picture(n)) for n in range(3)]
    write_parquet(tmp_path / "set", "train", images, [0, 1, 2])
    write_parquet(tmp_path / "set", "validation", images[:1], [val_label])  # -1 is how a test part hides its labels
    with tiny.user_error("--data-set hfds/", "labels from", "--num-classes", "--val-split"):
        build_sources(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), num_classes=num_classes)


def test_unknown_split_is_a_user_error_that_names_it(tmp_path):
    write_tree(tmp_path / "pets", parts=("train", "test"))
    with tiny.user_error("'validation' cannot be read", "--val-split"):
        build_sources(f"hfds/{tmp_path / 'pets'}", str(tmp_path / "cache"))
    assert len(build_sources(f"hfds/{tmp_path / 'pets'}", str(tmp_path / "cache"), val_split="test")[1]) == 4


def test_parts_with_different_classes_are_a_user_error(tmp_path):
    write_tree(tmp_path, parts=("train",))  # without a validation part, timm reads the folder above
    with tiny.user_error("torch/image_folder", "different classes", "--val-split"):
        build_sources("torch/image_folder", str(tmp_path))


def test_tfds_without_tensorflow_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with tiny.user_error("--data-set tfds/mnist", "tensorflow"):
        build_sources("tfds/mnist", str(tmp_path))


def write_shards(root, split, counts, contrast=10):
    """WebDataset shards of one-colour images: the n-th of a split has brightness `contrast` · n and class n % 3."""
    files, number = [f"set-{split}-{shard:04d}.tar" for shard in range(len(counts))], 0
    for file, count in zip(files, counts, strict=True):
        with tarfile.open(root / file, "w") as tar:
            for _ in range(count):
                image = encoded(Image.new("RGB", (8, 8), (contrast * number,) * 3))
                for extension, content in (("png", image), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    return {"name": split, "num_samples": number, "filenames": files, "shard_lengths": counts}


def write_stream(root, counts=(6, 6), **options):
    """A WebDataset with training shards of these sizes and seven validation images in two shards."""
    splits = {"train": list(counts), "validation": [4, 3]}
    info = {split: write_shards(root, split, sizes, **options) for split, sizes in splits.items()}
    (root / "_info.json").write_text(json.dumps({"splits": info}))
    return str(root)


@pytest.fixture
def shards(tmp_path):
    return write_stream(tmp_path)


def pretend_rank(monkeypatch, rank, size):
    """What a data set sees of a process group, without one."""
    answers = {"is_initialized": size > 1, "get_rank": rank, "get_world_size": size, "barrier": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)


def numbers_in(batches):
    """Which images of `write_shards` they hold, after a check that each came with its class."""
    numbers = []
    for batch in batches:
        found = (batch.images[:, 0, 0, 0] * 255 / 10).round().long()
        assert (batch.targets == found % 3).all()
        numbers += found.tolist()
    return numbers


@pytest.mark.parametrize("num_workers", [0, 2, 3])  # three for two shards: one of them would have nothing to do
@pytest.mark.parametrize("size", [1, 2])
def test_stream_trains_on_whole_batches_in_every_epoch(shards, monkeypatch, num_workers, size):
    epochs = {0: [], 1: []}
    for rank in range(size):
        pretend_rank(monkeypatch, rank, size)
        train, _ = build_sources("wds/", shards, num_classes=3)
        loader = train_loader(train, unscaled_eval(), num_workers=num_workers, rank=rank, size=size)
        assert len(train) == 12 and len(loader) == 6 // size
        for epoch, numbers in epochs.items():
            loader.set_epoch(epoch)
            batches = list(loader)
            assert [len(batch.images) for batch in batches] == [2] * (6 // size)
            assert len({int(p) for batch in batches for p in batch.positions}) == 12 // size
            numbers += numbers_in(batches)
    # Two shards of the same size divide evenly among one or two processes: nothing is left out or repeated.
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))


def test_stream_trains_on_whole_batches_of_uneven_shards(tmp_path):
    train, _ = build_sources("wds/", write_stream(tmp_path, [5, 5]), num_classes=3)
    loader = train_loader(train, unscaled_eval(), num_workers=2)
    loader.set_epoch(0)
    assert [len(batch.images) for batch in loader] == [2] * 5


def test_order_of_a_stream_follows_from_seed_and_epoch(tmp_path):
    path = write_stream(tmp_path, [1] * 12)

    def order(seed, epoch):
        train, _ = build_sources("wds/", path, num_classes=3)
        loader = train_loader(train, unscaled_eval(), seed=seed)
        loader.set_epoch(epoch)
        return tuple(numbers_in(loader))

    assert order(1, 0) == order(1, 0)
    assert len({order(1, 0), order(1, 1), order(5, 0)}) == 3


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_is_evaluated_exactly(shards, monkeypatch, num_workers, size):
    numbers, positions = [], []
    for rank in range(size):
        pretend_rank(monkeypatch, rank, size)
        _, val = build_sources("wds/", shards, num_classes=3)
        loader = eval_loader(val, unscaled_eval(), num_workers=num_workers, rank=rank, size=size)
        batches = list(loader)
        assert numbers_in(batches) == numbers_in(loader)  # each time
        numbers += numbers_in(batches)
        positions += [int(p) for batch in batches for p in batch.positions]
    assert sorted(numbers) == sorted(positions) == list(range(7))


def test_stream_needs_the_number_of_classes(shards):
    with tiny.user_error("--num-classes"):
        build_sources("wds/", shards)


def test_stream_with_fewer_shards_than_processes_is_a_user_error(shards):
    train, _ = build_sources("wds/", shards, num_classes=3)
    with tiny.user_error("2 training shards", "3 processes"):
        train_loader(train, unscaled_eval(), rank=0, size=3)


def test_stream_has_no_fraction_and_stays_on_disk(shards):
    train, _ = build_sources("wds/", shards, num_classes=3)
    assert isinstance(train, StreamingImages)
    assert take_fraction(train, 1.0) is keep_in_memory(train, 100) is train
    with tiny.user_error("--train-fraction"):
        take_fraction(train, 0.5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_views_follow_from_epoch_and_position(tmp_path, num_workers):
    path = write_stream(tmp_path, contrast=0)  # all images are alike, so only views can differ
    transform = build_train_transform((8, 8), **UNSCALED, re_prob=1.0)

    def views_of(*epochs):
        train, _ = build_sources("wds/", path, num_classes=3)
        loader = train_loader(train, transform, num_workers=num_workers)
        return torch.cat([batch.images for epoch in epochs for batch in loader.set_epoch(epoch) or loader])

    both = views_of(1, 2)
    assert len({view.numpy().tobytes() for view in both}) == 24
    assert torch.equal(both[12:], views_of(2))  # as after --resume


@pytest.mark.parametrize("num_workers", [0, 2])
def test_hugging_face_stream(tmp_path, num_workers):
    write_tree(tmp_path / "pets", parts=("train", "validation"), each=4)
    train, val = build_sources(f"hfids/{tmp_path / 'pets'}", str(tmp_path / "cache"))
    assert train.num_classes == 2 and len(train) == 8
    loader = train_loader(train, unscaled_eval(), num_workers=num_workers)
    loader.set_epoch(0)
    batches = list(loader)
    assert len(loader) == len(batches) == 4
    assert sorted(t for batch in batches for t in batch.targets.tolist()) == [0] * 4 + [1] * 4
    targets = [batch.targets.tolist() for batch in eval_loader(val, unscaled_eval(), batch_size=8, num_workers=2)]
    assert targets == [[0] * 4 + [1] * 4]


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


def test_larger_fraction_contains_the_smaller_one():
    source, smaller = source_of([60, 9, 2]), set()
    for fraction in (0.01, 0.1, 0.25, 0.5, 0.51, 0.99, 1.0):
        part = set(take_fraction(source, fraction).order)
        assert smaller <= part
        smaller = part
    assert len(smaller) == 71


def test_fraction_does_not_depend_on_the_generators_and_is_not_just_the_first_images():
    parts = []
    for seed in (0, 1):
        seed_generators(seed)
        parts.append(take_fraction(source_of([80, 20]), 0.25).order)
    np.testing.assert_array_equal(*parts)
    first_of_each = [np.flatnonzero(source_of([80, 20]).targets == label)[:n] for label, n in ((0, 20), (1, 5))]
    assert set(parts[0]) != set(np.concatenate(first_of_each))


def test_fraction_of_a_part():
    train, val = build_sources("DIGITS", None)
    part = take_fraction(train, 0.1)
    assert set(part.order) < set(train.order) and not set(part.order) & set(val.order)
    for index in (0, len(part) - 1):
        assert part[index][1] == train.targets[part.order[index]]


def test_memory_holds_the_same_pixels_of_images_of_any_size(tmp_path):
    write_tree(tmp_path)
    save(picture(9, height=5, width=31), tmp_path / "train" / "cat" / "wide.png")
    save(picture(8, mode="L"), tmp_path / "train" / "dog" / "grey.png")
    source = take_fraction(build_sources("IMNET", str(tmp_path))[0], 0.9)
    kept = keep_in_memory(source, 1)
    assert isinstance(kept.images, MemoryImages) and targets_of(kept) == targets_of(source)
    for found, expected in zip(pixels_of(kept), pixels_of(source), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("limit_mb", "fits"), [(0, False), (0.021, False), (0.0223, True), (1, True)])
def test_memory_limit_is_respected(tmp_path, limit_mb, fits):
    write_tree(tmp_path, each=5, height=24, width=32)  # 10 images, 23,040 bytes: 0.02197 MiB
    source = build_sources("IMNET", str(tmp_path))[0]
    kept = keep_in_memory(source, limit_mb)
    assert isinstance(kept.images, MemoryImages) == fits
    assert fits or kept is source


def test_what_is_in_memory_already_is_left_alone():
    train, _ = build_sources("DIGITS", None)
    assert keep_in_memory(train, 1000) is train


# -- broken images -----------------------------------------------------------------------------------------------------


def break_image(path, how):
    data = path.read_bytes()
    content = {"truncated": data[: len(data) // 2], "garbage": b"not an image", "empty": b""}
    path.write_bytes(content[how]) if how in content else path.unlink()


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty", "gone"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_image_is_named_in_one_line(tmp_path, how, num_workers):
    write_tree(tmp_path, each=3)
    path = save(picture(0, 40, 40), tmp_path / "val" / "dog" / "0.jpg")
    source = build_sources("IMNET", str(tmp_path))[1]
    break_image(path, how)
    with pytest.raises(RunError) as info:
        list(eval_loader(source, unscaled_eval(), num_workers=num_workers))
    traceback.clear_frames(info.tb)  # torch waits long for loader processes that are left to the garbage collector
    line = last_line(info.value)
    assert "\n" not in line and line.startswith("cannot read image") and str(path) in line


def test_image_of_impossible_size_is_named(tmp_path, monkeypatch):
    path = save(picture(0), tmp_path / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow refuses twice this many
    with pytest.raises(RunError, match="0.png"):
        Source(PathImages([path]), np.array([0]), 1, np.array([0]))[0]


def test_broken_image_stops_the_copy_to_memory(tmp_path):
    paths = write_tree(tmp_path, each=20)["val"]
    source = build_sources("IMNET", str(tmp_path))[1]
    break_image(paths[3], "garbage")  # not one of the 16 by which the size is judged
    with pytest.raises(RunError, match=paths[3].name):
        keep_in_memory(source, 1)


def test_broken_image_of_a_hugging_face_set_is_named_by_its_number(tmp_path):
    for split in ("train", "validation"):
        write_parquet(tmp_path / "set", split, [encoded(picture(0)), b"not an image"], [0, 1])
    _, val = build_sources(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"))
    with pytest.raises(RunError, match="number 1 of hfds/"):
        list(eval_loader(val, unscaled_eval()))


# -- views -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """28 images in 4 classes."""
    write_tree(tmp_path, classes="abcd", each=7, height=40, width=48)
    return build_sources("IMNET", str(tmp_path))[0]


def views(source, transform, num_workers=0, batch_size=4, size=1, epoch=2, repeats=1):
    """{position: (class, image)} over all ranks."""
    found = {}
    for rank in range(size):
        loader = train_loader(source, transform, batch_size, num_workers, rank, size, repeats=repeats)
        loader.set_epoch(epoch)
        for batch in loader:
            assert len(batch.images) == batch_size
            for position, target, image in zip(batch.positions.tolist(), batch.targets, batch.images, strict=True):
                assert position not in found
                found[position] = (int(target), image)
    return found


def assert_same_views(found, expected):
    assert set(found) <= set(expected)
    for position, (target, image) in found.items():
        assert target == expected[position][0] and torch.equal(image, expected[position][1])


@pytest.mark.parametrize("input_size", [(32, 32), (72, 96)])
def test_views_do_not_depend_on_workers_batch_size_world_size_or_storage(images, input_size):
    transform = build_train_transform(input_size, MEAN, STD)
    expected = views(images, transform)
    assert set(expected) == set(range(28))
    for num_workers, batch_size, size in ((0, 7, 1), (2, 4, 1), (2, 7, 1), (0, 4, 2), (0, 7, 2), (2, 4, 2), (2, 7, 2)):
        found = views(images, transform, num_workers, batch_size, size)
        assert len(found) == 28 // (batch_size * size) * batch_size * size
        assert_same_views(found, expected)
    assert_same_views(views(keep_in_memory(images, 100), transform), expected)


def test_views_do_not_depend_on_the_order_of_reading(images):
    transform = build_train_transform((32, 32), MEAN, STD)
    expected = views(images, transform)
    sampler = KeyedSampler(len(images), seed=3)
    sampler.set_epoch(2)
    samples, dataset = list(sampler), KeyedImages(images, transform)
    for number in (5, 0, 27, 5):
        seed_generators(number)  # what other code draws must not matter
        image, target, position, _ = dataset[samples[number]]
        assert_same_views({position: (target, image)}, expected)


def test_views_differ_between_epochs(images):
    transform = build_train_transform((32, 32), MEAN, STD)
    source = Source(images.images, images.targets, 4, np.zeros(28, dtype=int))  # one image, so only views can differ
    first, second = (views(source, transform, epoch=epoch) for epoch in (0, 1))
    assert all(not torch.equal(first[position][1], second[position][1]) for position in range(28))


def test_repeats_are_different_views_of_one_image_side_by_side(images):
    cropped = views(images, build_train_transform((32, 32), MEAN, STD), repeats=3)
    whole = views(images, build_eval_transform((32, 32), MEAN, STD, interpolation="bicubic", crop_ratio=1), repeats=3)
    for position in range(0, 27, 3):
        assert all(torch.equal(whole[position][1], whole[position + n][1]) for n in (1, 2))
        assert len({cropped[position + n][1].numpy().tobytes() for n in range(3)}) == 3
    assert len({image.numpy().tobytes() for _, image in whole.values()}) == 10  # ceil(28 / 3)


# -- on the device -----------------------------------------------------------------------------------------------------


def on_device(source, size=(32, 32)):
    return TrainAugmentation(frame_of(source), size, MEAN, STD)


@pytest.mark.parametrize("input_size", [(32, 32), (72, 96)])
def test_views_made_on_the_device_depend_on_their_key_alone(images, input_size):
    memory = keep_in_memory(images, 1)
    view = on_device(memory, input_size)
    expected = views(memory, view)
    assert len(expected) == 28
    assert_same_views(views(memory, view, num_workers=2, batch_size=7), expected)
    assert_same_views(views(memory, view, batch_size=2, size=3), expected)
    other = views(memory, view, epoch=3)
    assert not any(torch.equal(other[place][1], image) for place, (_, image) in expected.items())


def test_images_in_memory_need_no_loader_processes_and_are_picked_on_the_device(images):
    memory = keep_in_memory(images, 1)
    loader = train_loader(memory, on_device(memory), num_workers=2).loader
    assert loader.num_workers == 0 and isinstance(loader.dataset, DeviceImages)
    assert loader.dataset.images.shape[0] == 28 and loader.dataset.images.dtype == torch.uint8
    assert loader.dataset.images.device == CPU


@pytest.mark.parametrize("size", [1, 3])
def test_each_image_is_evaluated_once_on_the_device(images, size):
    memory = keep_in_memory(images, 1)
    host = build_eval_transform((32, 32), MEAN, STD, interpolation="bicubic", crop_ratio=1)
    expected = {}
    for batch in eval_loader(memory, host, 4):
        expected |= dict(zip(batch.positions.tolist(), zip(batch.images, batch.targets, strict=True), strict=True))
    found = []
    for rank in range(size):
        for batch in eval_loader(memory, EvalTransform(frame_of(memory), (32, 32), MEAN, STD), 4, 0, rank, size):
            for position, image, target in zip(batch.positions.tolist(), batch.images, batch.targets, strict=True):
                assert target == expected[position][1]
                assert (image - expected[position][0]).abs().mean() < 0.5 / 255 / min(STD)  # half a grey level
                found.append(position)
    assert sorted(found) == list(range(28))


def test_images_of_all_sizes_share_a_frame(tmp_path):
    for number, size in enumerate([(9, 14), (12, 7), (5, 5)]):
        save(picture(number).resize(size), tmp_path / "train" / "cat" / f"{number}.png")
        save(picture(number).resize(size), tmp_path / "val" / "cat" / f"{number}.png")
    memory = keep_in_memory(build_sources("IMNET", str(tmp_path))[0], 1)
    assert frame_of(memory) == (14, 12)
    batch = FramedImages(memory).__getitems__([(2, 7, 0), (0, 8, 0), (1, 9, 0)])
    assert batch.sizes.tolist() == [[5, 5], [14, 9], [7, 12]] and batch.positions.tolist() == [7, 8, 9]
    for image, (height, width), place in zip(batch.images, batch.sizes.tolist(), (2, 0, 1), strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        assert np.array_equal(pixels[:height, :width], memory.array(place)[0])
        assert not pixels[height:].any() and not pixels[:, width:].any()


@pytest.mark.parametrize(("longest", "expected"), [(20, True), (400, False)])
def test_one_very_large_image_does_not_blow_up_all_frames(longest, expected):
    arrays = [np.zeros((10, 10, 3), np.uint8)] * 9 + [np.zeros((10, longest, 3), np.uint8)]
    source = Source(MemoryImages(arrays), np.zeros(10, np.int64), 1, np.arange(10))
    assert frame_of(source) == (10, longest)
    assert fits_frames(source) == expected


# -- transforms --------------------------------------------------------------------------------------------------------


def normalised(pixels, mean=MEAN, std=STD):
    """[H, W, 3] bytes -> [3, H, W] by hand, in float64."""
    scaled = (np.asarray(pixels) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(scaled.transpose(2, 0, 1))


def assert_is(found, expected):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (8, 8)])
def test_small_images_are_padded_and_cropped(height, width):
    image = picture(0, height, width)
    transform = build_train_transform((height, width), MEAN, STD, **NO_AUGMENTATION)
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
    transform = build_train_transform((16, 24), **UNSCALED, **NO_AUGMENTATION)
    view = transform(Image.new("RGB", (100, 50), "white"))
    assert view.shape == (3, 16, 24)
    assert set(view.unique().tolist()) <= {0.0, 1.0} and view[0].sum() >= (16 - 4) * (24 - 4)  # white but for padding


def test_flip_is_certain_at_probability_one():
    image = picture(0, 32, 32)
    transforms = [
        build_train_transform((32, 32), MEAN, STD, **NO_AUGMENTATION | {"hflip": hflip}) for hflip in (0.0, 1.0)
    ]
    plain, flipped = (seed_generators(3) or transform(image) for transform in transforms)
    assert torch.equal(plain.flip(2), flipped)


@pytest.mark.parametrize("input_size", [(65, 65), (72, 96), (32, 48)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("auto_augment", ["rand-m9-mstd0.5-inc1", "3a", "none", ""])
def test_views_have_the_input_size(input_size, interpolation, auto_augment):
    transform = build_train_transform(input_size, MEAN, STD, interpolation=interpolation, auto_augment=auto_augment)
    view = transform(picture(0, 90, 70))
    assert view.shape == (3, *input_size) and view.dtype == torch.float32


@pytest.mark.parametrize("input_size", [(72, 72), (96, 72)])
def test_large_images_are_cropped_without_padding_and_normalised_for_the_model(input_size):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    transform = build_train_transform(input_size, mean, std, **NO_AUGMENTATION)
    colour = Image.new("RGB", (100, 80), (10, 100, 200))
    assert_is(transform(colour), normalised(np.full((*input_size, 3), (10, 100, 200)), mean, std))
    seed_generators(0)
    crops = [transform(picture(0, 100, 80)) for _ in range(2)]
    assert not torch.equal(*crops)


@pytest.mark.parametrize(("re_mode", "erased"), [("const", 0.0), ("pixel", None)])
def test_erasing_fills_as_asked(re_mode, erased):
    options = NO_AUGMENTATION | {"re_prob": 1.0, "re_mode": re_mode}
    transform = build_train_transform((96, 96), MEAN, STD, **options)
    seed_generators(1)
    view = transform(Image.new("RGB", (96, 96), "white"))
    hole = view[0] != view[0].max() if erased is not None else (view[0] - (1 - MEAN[0]) / STD[0]).abs() > 1e-5
    assert 0.01 < hole.float().mean() < 0.4
    assert erased is None or (view[:, hole] == erased).all()


@pytest.mark.parametrize("policy", ["nonsense", "rand-m9-q3"])
def test_unknown_policy_is_a_user_error(policy):
    with tiny.user_error(f"--aa {policy}"):
        build_train_transform((32, 32), MEAN, STD, auto_augment=policy)


def centre_crop_by_hand(image, input_size, crop_ratio, mode):
    """Scale both sides alike so that the image covers the target over `crop_ratio`, then cut out the centre."""
    (height, width), (tall, wide) = input_size, (int(side / crop_ratio) for side in input_size)
    scale = max(tall / image.height, wide / image.width)
    # One side fits exactly; torchvision rounds the other down when the target is square, timm to the nearest.
    whole = int if tall == wide else round
    new_height = tall if scale == tall / image.height else whole(image.height * scale)
    new_width = wide if scale == wide / image.width else whole(image.width * scale)
    pixels = np.asarray(image.resize((new_width, new_height), mode))
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize("image_size", [(300, 200), (150, 310), (256, 256)])
@pytest.mark.parametrize(
    ("input_size", "crop_ratio"), [((224, 224), 0.875), ((224, 224), 1.0), ((96, 96), 0.9), ((160, 224), 0.875)]
)
@pytest.mark.parametrize(("interpolation", "mode"), [("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)])
def test_large_images_are_evaluated_at_their_centre(image_size, input_size, crop_ratio, interpolation, mode):
    image = picture(0, *image_size)
    transform = build_eval_transform(input_size, MEAN, STD, interpolation=interpolation, crop_ratio=crop_ratio)
    assert_is(transform(image), normalised(centre_crop_by_hand(image, input_size, crop_ratio, mode)))


@pytest.mark.parametrize("input_size", [(32, 32), (64, 48)])
@pytest.mark.parametrize("image_size", [(32, 32), (64, 48), (50, 20)])
def test_small_images_are_evaluated_whole(input_size, image_size):
    image, mean, std = picture(0, *image_size), (0.5, 0.5, 0.4), (0.5, 0.25, 1.0)
    transform = build_eval_transform(input_size, mean, std, interpolation="bicubic", crop_ratio=0.875)
    resized = image if image_size == input_size else image.resize(input_size[::-1], Image.BICUBIC)
    assert_is(transform(image), normalised(resized, mean, std))


# -- loaders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "accum_steps", "size", "updates"), [(4, 1, 1, 7), (4, 3, 1, 2), (4, 3, 2, 1)])
def test_training_takes_whole_updates(images, batch_size, accum_steps, size, updates):
    positions = []
    for rank in range(size):
        loader = train_loader(images, unscaled_eval(), batch_size, 0, rank, size, accum_steps)
        loader.set_epoch(0)
        batches = list(loader)
        assert len(batches) == len(loader) == updates * accum_steps
        assert all(len(batch.images) == batch_size for batch in batches)
        positions += [int(p) for batch in batches for p in batch.positions]
    assert sorted(positions) == list(range(updates * accum_steps * batch_size * size))


@pytest.mark.parametrize(("batch_size", "accum_steps", "size"), [(29, 1, 1), (10, 3, 1), (15, 1, 2)])
def test_update_larger_than_the_data_is_a_user_error(images, batch_size, accum_steps, size):
    with tiny.user_error(f"--batch-size {batch_size}", batch_size * accum_steps * size, "hold 28"):
        train_loader(images, unscaled_eval(), batch_size, accum_steps=accum_steps, size=size)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 4), (2, 5), (0, 100)])
def test_each_image_is_evaluated_once(images, size, num_workers, batch_size):
    found = {}
    for rank in range(size):
        batches = list(eval_loader(images, unscaled_eval(), batch_size, num_workers, rank, size))
        ranks = torch.cat([batch.positions for batch in batches]).tolist()
        assert ranks == list(range(rank, 28, size))
        found |= dict(zip(ranks, torch.cat([batch.targets for batch in batches]).tolist(), strict=True))
    assert [found[position] for position in range(28)] == targets_of(images)


def test_loader_processes_live_on_between_epochs(images):
    loader = train_loader(images, process_number, batch_size=4, num_workers=1)
    processes = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        processes += [int(number) for batch in loader for number in batch.images]
    assert len(set(processes)) == 1 and processes[0] != os.getpid()


def process_number(_image):
    return torch.tensor(os.getpid())


# -- Mixup and the way to the device -----------------------------------------------------------------------------------


def mixup_with(**changes):
    options = {"mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None, "prob": 1.0, "switch_prob": 0.5, "mode": "batch"}
    return build_mixup(**options | {"num_classes": 5, "batch_size": 6} | changes)


def batch_of_six():
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.rand(6, 3, 16, 16, generator=generator), torch.tensor([0, 4, 2, 2, 1, 3]), torch.arange(6) + 10)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(("mixup", "cutmix", "minmax"), [(0.8, 0, None), (0, 1.0, None), (0.8, 1.0, None),
                                                         (0, 0, (0.2, 0.6))])  # fmt: skip
def test_mixed_targets_are_probabilities_of_the_two_classes(mode, mixup, cutmix, minmax):
    prepare = build_prepare(CPU, mixup_with(mixup=mixup, cutmix=cutmix, cutmix_minmax=minmax, mode=mode))
    for seed in range(5):
        seed_generators(seed)
        before, after = batch_of_six(), prepare(batch_of_six())
        assert after.images.shape == before.images.shape and torch.equal(after.positions, before.positions)
        torch.testing.assert_close(after.targets.sum(1), torch.ones(6))
        for row, own, other in zip(after.targets, before.targets, before.targets.flip(0), strict=True):
            assert set(row.nonzero().flatten().tolist()) <= {int(own), int(other)}  # and none for smoothing


def test_mixup_alone_blends_with_the_weight_of_the_target():
    seed_generators(0)
    before, after = batch_of_six(), build_prepare(CPU, mixup_with(cutmix=0))(batch_of_six())
    weight = after.targets[0, 0]  # the first image's own class, which its partner has not
    assert 0 < weight < 1
    torch.testing.assert_close(after.images, weight * before.images + (1 - weight) * before.images.flip(0))


@pytest.mark.parametrize("options", [{"mixup": 0}, {"mixup": 0, "cutmix": 0, "cutmix_minmax": (0.3, 0.7)}])
def test_cutmix_alone_pastes_a_region_of_the_area_in_the_target(options):
    seed_generators(2)
    before, after = batch_of_six(), build_prepare(CPU, mixup_with(**options))(batch_of_six())
    own, other = after.images == before.images, after.images == before.images.flip(0)
    assert (own | other).all()
    torch.testing.assert_close(own.float().mean((1, 2, 3))[0], after.targets[0, 0])
    assert 0 < after.targets[0, 0] < 1


def test_probability_zero_mixes_nothing():
    before, after = batch_of_six(), build_prepare(CPU, mixup_with(prob=0.0))(batch_of_six())
    assert torch.equal(after.images, before.images) and after.targets.argmax(1).tolist() == before.targets.tolist()


def test_mixup_that_is_off_leaves_class_indices_even_for_odd_batches():
    mixup = mixup_with(mixup=0, cutmix=0, batch_size=7)
    assert mixup is None
    before, after = batch_of_six(), build_prepare(CPU, mixup)(batch_of_six())
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))


def test_odd_batch_is_a_user_error():
    with tiny.user_error("--batch-size 7", "--mixup 0"):
        mixup_with(batch_size=7)


def test_images_and_targets_go_to_the_device_and_positions_stay():
    batch = build_prepare(torch.device("meta"), None)(batch_of_six())
    assert isinstance(batch, Batch) and [tensor.device.type for tensor in batch[:3]] == ["meta", "meta", "cpu"]
