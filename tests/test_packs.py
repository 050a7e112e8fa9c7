"""Packed data sets: records equal Pillow's result, damage is reported, and the tool works."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import zlib
from collections import Counter, namedtuple

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import main
import packs
from augment import ViewOptions
from datasets import (
    DataOptions,
    build_train_transform,
    read_sources,
)
from loaders import KeyedImages, LoaderOptions, MixupOptions, build_train_loader, build_val_loader
from packs import PackImages, verify
from samplers import KeyedSampler
from sources import (
    MemoryImages,
    Source,
    keep_in_memory,
    take_fraction,
)
from tools import pack_dataset
from tools.pack_dataset import Record, encode, files_of, holds_pack, write_pack
from utils import RunError, World

SIZE = 16
# width and height of an image -> those in a pack of size 16: short side 16, long side at most 24, never enlarged
SIZES = {
    (40, 32): (20, 16),
    (32, 40): (16, 20),
    (64, 64): (16, 16),
    (90, 30): (24, 8),
    (10, 12): (10, 12),
    (16, 24): (16, 24),
    (20, 14): (20, 14),
    (400, 2): (24, 1),
}
ABOUT = {"kind": "uint8", "size": SIZE, "quality": None, "num_classes": 3}
AGAIN = "pack it again with python -m tools.pack_dataset"
NORMALIZATION = (0.5,) * 3, (0.5,) * 3
ALONE = World.alone(torch.device("cpu"))


def picture(seed, size=(40, 32)):
    """Smooth colors, which a JPEG keeps, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR)


IMAGES = [picture(number, size) for number, size in enumerate(SIZES)]
TARGETS = [number % 3 for number in range(len(IMAGES))]


def write(folder, images=IMAGES, **changes):
    """A pack of these images as train, and of the first two as val."""
    about = {**ABOUT, **changes}
    shape = {name: about[name] for name in ("kind", "size", "quality")}
    records = [encode(image, target, **shape) for image, target in zip(images, TARGETS, strict=False)]
    return write_pack(folder, {"train": iter(records), "val": iter(records[:2])}, **about)


@pytest.fixture
def pack(tmp_path):
    """Write a valid pack with several shards."""
    write(tmp_path / "pack", shard_bytes=2000)
    return tmp_path / "pack"


def expected(image):
    """Resize an image for a pack with Pillow."""
    return np.asarray(image.resize(SIZES[image.size], Image.Resampling.BICUBIC))


def sources_in(folder):
    return read_sources(DataOptions("PACKED", str(folder)))


def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def change_about(folder, **changes):
    about = json.loads((folder / "pack.json").read_text())
    (folder / "pack.json").write_text(json.dumps(about | changes))


# -- writing and reading -----------------------------------------------------------------------------------------------


def test_pixels_are_those_of_pillows_own_resize_and_labels_stay(pack):
    train, val = sources_in(pack)
    assert (len(train), len(val), train.num_classes, val.num_classes) == (len(IMAGES), 2, 3, 3)
    for source in (train, val):
        for index, (image, target) in enumerate(zip(IMAGES[: len(source)], TARGETS, strict=False)):
            found, label = source[index]
            assert label == target and found.mode == "RGB" and found.size == SIZES[image.size]
            np.testing.assert_array_equal(np.asarray(found), expected(image))
            np.testing.assert_array_equal(source.images.array(index), expected(image))
            assert tuple(source.images.shapes[index]) == expected(image).shape
    assert train.targets.dtype == np.int64 and train.images.shapes.shape == (len(IMAGES), 3)


def test_jpeg_is_pillows_and_near_the_pixels(tmp_path):
    write(tmp_path, kind="jpeg", quality=90)
    images = PackImages(tmp_path, "train")
    for index, image in enumerate(IMAGES):
        image.resize(SIZES[image.size], Image.Resampling.BICUBIC).save(tmp_path / "one.jpg", quality=90)
        found = np.asarray(images[index])
        np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / "one.jpg")))
        np.testing.assert_array_equal(images.array(index), found)
        assert np.abs(found.astype(int) - expected(image)).mean() < 10  # strong colors, at half the resolution
        assert found.shape == tuple(images.shapes[index])
    assert verify(tmp_path) == []


def test_pixels_are_bytes_of_the_file_that_nobody_can_change(pack):
    images = PackImages(pack, "train")
    array = images.array(3)
    number, offset, length, *_ = images.index[3].item()
    assert array.tobytes() == (pack / f"train_{number:05d}.bin").read_bytes()[offset : offset + length]
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 0


def test_a_record_is_read_in_one_request(pack, monkeypatch):
    # a page fault would be a request of its own, of a millisecond on a network file system
    requests, pread = [], os.pread
    monkeypatch.setattr(
        os, "pread", lambda file, length, offset: (requests.append(length), pread(file, length, offset))[1]
    )
    images = PackImages(pack, "train")
    assert [images.array(index).size for index in range(len(images))] == requests


def test_a_shard_that_becomes_shorter_is_a_one_line_error(pack):
    train = sources_in(pack)[0]
    last = len(train) - 1
    train[last]
    path = pack / f"train_{train.images.index['shard'][last]:05d}.bin"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RunError, match=rf"cannot read image number {last} of train in .*bytes are there.*; fix or"):
        train[last]
    with pytest.raises(RunError, match="bytes are there"):
        train.array(last)


def test_shards_are_no_longer_than_asked_and_hold_everything(tmp_path):
    lengths = [int(np.prod(expected(image).shape)) for image in IMAGES]
    for limit in (1, 1000, 2000, 10**9):  # of one byte: a shard for each record
        about = write(tmp_path / str(limit), shard_bytes=limit)
        shards = about["splits"]["train"]["shards"]
        assert all(shard["bytes"] <= max(limit, max(lengths)) for shard in shards)
        assert [shard["name"] for shard in shards] == [f"train_{number:05d}.bin" for number in range(len(shards))]
        contents = [(tmp_path / str(limit) / shard["name"]).read_bytes() for shard in shards]
        assert b"".join(contents) == b"".join(expected(image).tobytes() for image in IMAGES)
        assert [zlib.crc32(content) for content in contents] == [shard["crc32"] for shard in shards]
        count = len(shards)
        assert (count == len(IMAGES)) if limit == 1 else (count == 1) if limit == 10**9 else 1 < count < len(IMAGES)
        images = PackImages(tmp_path / str(limit), "train")
        assert all((images.array(index) == expected(image)).all() for index, image in enumerate(IMAGES))


def test_names_are_those_of_the_content_in_order(pack, tmp_path):
    source = sources_in(pack)[0]
    checksums = [zlib.crc32(expected(image).tobytes()) for image in IMAGES]
    assert source.file_names() == np.array(checksums, "<u4").tobytes()
    write(tmp_path / "moved", shard_bytes=10**9)  # neither the folder nor its division matters
    moved = PackImages(tmp_path / "moved", "train")
    assert moved.file_names(np.array([2, 0])) == np.array([checksums[2], checksums[0]], "<u4").tobytes()


def test_views_from_a_pack_are_those_of_the_same_images_in_memory(pack):
    transform = build_train_transform(ViewOptions((96, 96)), NORMALIZATION)
    memory = Source(MemoryImages([expected(image) for image in IMAGES]), np.array(TARGETS), 3, np.arange(len(IMAGES)))
    for epoch in range(2):
        sampler = KeyedSampler(len(IMAGES), seed=5)
        sampler.set_epoch(epoch)
        for sample in sampler:
            ours = KeyedImages(sources_in(pack)[0], transform)[sample]
            theirs = KeyedImages(memory, transform)[sample]
            assert torch.equal(ours.images, theirs.images) and ours[1:] == theirs[1:]


@pytest.mark.parametrize("kind", ["uint8", "jpeg"])
def test_a_part_of_a_pack_can_be_kept_in_memory(tmp_path, kind):
    write(tmp_path, kind=kind, quality=90)
    part = take_fraction(sources_in(tmp_path)[0], 0.4)
    assert Counter(part.targets[part.order].tolist()) == {0: 1, 1: 1, 2: 1}
    kept = keep_in_memory(part, 1)
    assert isinstance(kept.images, MemoryImages) and kept.file_names() == part.file_names()
    assert keep_in_memory(part, 1e-6) is part  # which is too little
    for index in range(len(part)):
        np.testing.assert_array_equal(np.asarray(kept[index][0]), np.asarray(part[index][0]))
        assert kept[index][1] == part[index][1]


def test_data_loader_workers_read_the_same(pack):
    def read(workers):
        source = sources_in(pack)[0]
        source.images.array(0)  # a shard that is mapped before the processes part
        options = LoaderOptions(batch_size=2, num_workers=workers)
        batches = build_val_loader(source, ViewOptions((8, 8)), NORMALIZATION, options, ALONE)
        return [torch.cat(parts) for parts in zip(*((b.images, b.targets) for b in batches), strict=True)]

    alone, together = read(0), read(2)
    assert torch.equal(alone[0], together[0]) and together[1].tolist() == TARGETS


@pytest.mark.parametrize("workers", [0, 2])
def test_views_made_on_the_device_are_those_of_the_same_images_in_memory(pack, workers):
    def views(source):
        options = LoaderOptions(batch_size=2, repeated_aug=False, num_workers=workers, augment="device")
        mixup = MixupOptions(mixup=0, cutmix=0)
        loader = build_train_loader(source, ViewOptions((32, 32)), NORMALIZATION, mixup, options, ALONE)
        loader.set_epoch(1)
        return [(batch.images, batch.targets, batch.positions) for batch in loader]

    source = sources_in(pack)[0]
    for packed, kept in zip(views(source), views(keep_in_memory(source, 100)), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(packed, kept, strict=True))


def test_a_pickle_is_small_and_reads_the_same(tmp_path):
    record = encode(IMAGES[0], 0, kind="uint8", size=SIZE, quality=None)
    write_pack(tmp_path, {split: [record] * 1000 for split in packs.SPLITS}, **ABOUT)
    images = PackImages(tmp_path, "val")
    images.array(0)
    pickled = pickle.dumps(images)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert len(again) == 1000 and again.split == "val"
    np.testing.assert_array_equal(again.array(999), images.array(999))


# -- damage ------------------------------------------------------------------------------------------------------------


def shorten(path):
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)


DAMAGE = {
    "no pack.json": (lambda folder: (folder / "pack.json").unlink(), "has no pack.json"),
    "half a pack.json": (lambda folder: shorten(folder / "pack.json") or shorten(folder / "pack.json"), "is damaged"),
    "empty pack.json": (lambda folder: (folder / "pack.json").write_text("[]"), "pack.json is damaged"),
    "other version": (lambda folder: change_about(folder, version=2), "format version 2, and this program reads 1"),
    "unknown kind": (lambda folder: change_about(folder, kind="png"), "pack.json is damaged"),
    "no splits": (lambda folder: change_about(folder, splits={}), "pack.json is damaged"),
    "no shard": (lambda folder: (folder / "train_00001.bin").unlink(), "train_00001.bin cannot be read"),
    "short shard": (lambda folder: shorten(folder / "train_00001.bin"), "train_00001.bin has"),
    "no index": (lambda folder: (folder / "train_index.npy").unlink(), "train_index.npy cannot be read"),
    "short index": (lambda folder: shorten(folder / "train_index.npy"), "train_index.npy is damaged"),
    "empty index": (lambda folder: (folder / "train_index.npy").write_bytes(b""), "train_index.npy is damaged"),
    "changed index": (lambda folder: flip_byte(folder / "train_index.npy", -1), "train_index.npy is damaged"),
    "other index": (lambda folder: np.save(folder / "val_index.npy", np.arange(2)), "val_index.npy is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_pack_is_refused_with_a_one_line_error(pack, kind):
    damage, words = DAMAGE[kind]
    sources_in(pack)
    damage(pack)
    with tiny.user_error("--data-path", pack, words, AGAIN):
        sources_in(pack)


def test_a_pack_needs_its_folder(tmp_path):
    with tiny.user_error("--data-path", "PACKED"):
        read_sources(DataOptions("PACKED"))
    with tiny.user_error("--data-path", tmp_path / "typo", "no such folder"):
        sources_in(tmp_path / "typo")


def test_a_flipped_byte_is_found_and_its_record_named(pack):
    assert verify(pack) == []
    images = PackImages(pack, "train")
    number, offset, length, *_ = images.index[4].item()
    flip_byte(pack / f"train_{number:05d}.bin", offset + length - 1)
    (found,) = verify(pack)
    assert found == images.describe(4) and f"number 4 of train in {pack}" in found and str(offset) in found
    flip_byte(pack / "val_00000.bin", 0)
    assert verify(pack) == [found, PackImages(pack, "val").describe(0)] and verify(pack, most=1) == [found]


def test_a_wrong_checksum_of_a_shard_alone_names_the_shard(pack):
    about = json.loads((pack / "pack.json").read_text())
    about["splits"]["val"]["shards"][0]["crc32"] ^= 1
    change_about(pack, **about)
    assert verify(pack) == ["val_00000.bin"]


@pytest.mark.parametrize(
    "position", [0, 0.7]
)  # the first bytes of the file, which Pillow misses; colors, which it takes
def test_a_damaged_jpeg_ends_a_run_with_a_one_line_error(tmp_path, position):
    write(tmp_path, kind="jpeg", quality=90)
    train = sources_in(tmp_path)[0]
    _, offset, length, *_ = train.images.index[1].item()
    flip_byte(tmp_path / "train_00000.bin", offset + int(position * length))
    np.testing.assert_array_equal(np.asarray(train[0][0]).shape, expected(IMAGES[0]).shape)
    with pytest.raises(RunError, match=r"cannot read image number 1 of train in .*wrong checksum.*; fix or remove it"):
        train[1]
    assert len(verify(tmp_path)) == 1


# -- writing goes wrong ------------------------------------------------------------------------------------------------


def records_and_then(act, number=3):
    for image, target in zip(IMAGES[:number], TARGETS, strict=False):
        yield encode(image, target, kind="uint8", size=SIZE, quality=None)
    act()


def test_killed_half_way_leaves_no_pack_and_the_next_one_is_whole(pack, tmp_path):
    records = records_and_then(lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(
        target=write_pack, args=(pack, {"train": records, "val": []}), kwargs=ABOUT | {"shard_bytes": 1}
    )
    process.start()  # over a pack that was whole
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not holds_pack(pack) and len(files_of(pack)) >= 2
    with tiny.user_error("--data-path", pack, "missing or unfinished", AGAIN):
        sources_in(pack)
    (pack / ".pack.json.123.tmp").touch()  # what else such a process may leave
    write(pack), write(tmp_path / "fresh")
    assert {path.name: path.read_bytes() for path in pack.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()
    }


def test_a_full_disk_is_a_one_line_error_and_leaves_no_pack(tmp_path, monkeypatch):
    def no_space(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunError, match=r"^cannot write to .* \(No space left on device\); no pack was written$"):
        write(tmp_path)
    assert not holds_pack(tmp_path)


def test_a_split_without_images_is_a_user_error(tmp_path):
    with tiny.user_error("no images for val"):
        write_pack(tmp_path, {"train": [Record(b"abc", 1, 1, 0)], "val": []}, **ABOUT)
    assert not holds_pack(tmp_path)


# -- the tool ----------------------------------------------------------------------------------------------------------

TREE = {
    "train/cat/0.png": ((40, 32), "RGB"),
    "train/cat/1.png": ((90, 30), "L"),
    "train/cat/2.png": ((10, 12), "P"),
    "train/dog/0.png": ((32, 40), "RGBA"),
    "train/dog/1.png": ((400, 2), "RGB"),
    "train/dog/2.png": ((64, 64), "1"),
    "val/cat/0.png": ((16, 24), "L"),
    "val/dog/0.png": ((20, 14), "RGB"),
}


@pytest.fixture
def tree(tmp_path):
    """A class-folder tree of images of odd shapes and modes."""
    for number, (name, (size, mode)) in enumerate(TREE.items()):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, size).convert(mode).save(path)
    return tmp_path / "tree"


def pack_tool(output, *flags, data=None):
    named = ["--data-set", "IMNET", "--data-path", data] if data else []
    size = [] if "--verify" in flags and not data else ["--size", SIZE]
    pack_dataset.main([str(flag) for flag in (*named, "--output", output, *size, *flags)])


def line_of(capsys, *arguments, **options):
    """The one line with which the tool refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        pack_tool(*arguments, **options)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.count("\n") == 1, error
    assert error.startswith("pack_dataset: error: ")
    return error


def test_the_tool_packs_a_tree_for_training(tree, tmp_path, capsys):
    output = tmp_path / "pack"
    pack_tool(output, "--shard-mib", "0.001", "--verify", data=tree)
    said = capsys.readouterr().err
    assert "packed 8 images into 6 files" in said and "0 skipped" in said and f"{output} is intact" in said
    for ours, theirs in zip(sources_in(output), read_sources(DataOptions("IMNET", str(tree))), strict=True):
        assert len(ours) == len(theirs) and ours.num_classes == theirs.num_classes == 2
        for index in range(len(ours)):
            (image, target), (original, label) = ours[index], theirs[index]
            assert target == label
            np.testing.assert_array_equal(np.asarray(image), expected(original))


def test_the_tool_names_flags_that_do_not_act(tree, tmp_path, capsys):
    pack_tool(tmp_path / "pack", "--inat-category", "genus", "--ram-cache", "1", "--val-fraction", "0.2", data=tree)
    said = capsys.readouterr().err
    words = ["--inat-category has no effect: it needs", "--ram-cache has no effect on a pack", "--val-fraction has no"]
    assert all(word in said for word in words)
    pack_tool(tmp_path / "pack", "--overwrite", "--val-split", "val", data=tree)
    assert "has no effect" not in capsys.readouterr().err
    assert "--val-split dev" in line_of(capsys, tmp_path / "other", "--val-split", "dev", data=tree)


def test_the_tool_writes_jpegs_of_a_quality(tree, tmp_path):
    lengths = []
    for quality in ("30", "95"):
        pack_tool(tmp_path / quality, "--format", "jpeg", "--quality", quality, data=tree)
        about = json.loads((tmp_path / quality / "pack.json").read_text())
        assert (about["kind"], about["quality"], about["size"]) == ("jpeg", int(quality), SIZE)
        lengths.append(about["splits"]["train"]["shards"][0]["bytes"])
    assert lengths[0] < lengths[1]
    image = PackImages(tmp_path / "95", "train")[0]
    reference = expected(Image.open(tree / "train/cat/0.png"))
    assert np.abs(np.asarray(image).astype(int) - reference).mean() < 10


def test_a_pack_names_its_classes(tree, tmp_path):
    pack_tool(tmp_path / "pack", data=tree)
    assert all(source.class_names == ("cat", "dog") for source in sources_in(tmp_path / "pack"))
    change_about(tmp_path / "pack", class_names=["cat"])
    with tiny.user_error("pack.json is damaged"):
        PackImages(tmp_path / "pack", "train")
    about = json.loads((tmp_path / "pack" / "pack.json").read_text())
    del about["class_names"]  # as in packs of earlier versions
    (tmp_path / "pack" / "pack.json").write_text(json.dumps(about))
    assert PackImages(tmp_path / "pack", "train").class_names == ()


def test_a_run_trains_from_a_pack(tree, tmp_path):
    pack_tool(tmp_path / "pack", data=tree)
    flags = [*tiny.TINY, "--data-set", "PACKED", "--data-path", str(tmp_path / "pack"), "--ram-cache", "0"]
    main.cli([*flags, "--batch-size", "2", "--output-dir", str(tmp_path / "run")])
    (line,) = tiny.log_of(tmp_path / "run")
    assert np.isfinite(line["train_loss"]) and 0 <= line["test_acc1"] <= 100


def test_a_broken_image_ends_the_tool_and_names_its_file(tree, tmp_path, capsys):
    (tree / "train/dog/1.png").write_bytes((tree / "train/dog/1.png").read_bytes()[:60])
    error = line_of(capsys, tmp_path / "pack", data=tree)
    assert str(tree / "train/dog/1.png") in error and "--skip-broken-images" in error and "--resume" not in error
    assert not holds_pack(tmp_path / "pack")


def test_broken_images_are_skipped_up_to_a_number(tree, tmp_path, capsys):
    broken = [tree / name for name in ("train/cat/0.png", "train/dog/1.png")]
    for path in broken:
        path.write_bytes(b"no image")
    with pytest.raises(SystemExit):
        pack_tool(tmp_path / "pack", "--skip-broken-images", "1", data=tree)
    error = capsys.readouterr().err
    assert f"skipped: {broken[0]}" in error
    assert f"cannot read image {broken[1]}" in error.splitlines()[-1]
    assert not files_of(tmp_path / "pack")
    pack_tool(tmp_path / "pack", "--skip-broken-images", "2", data=tree)
    said = capsys.readouterr().err
    assert all(f"skipped: {path}" in said for path in broken)
    assert "packed 6 images" in said and "2 skipped" in said
    train, val = sources_in(tmp_path / "pack")
    assert train.targets.tolist() == [0, 0, 1, 1] and val.targets.tolist() == [0, 1]
    np.testing.assert_array_equal(train.images.array(3), expected(Image.open(tree / "train/dog/2.png").convert("RGB")))


def test_a_broken_validation_image_is_never_skipped(tree, tmp_path, capsys):
    (tree / "val/cat/0.png").write_bytes(b"no image")
    error = line_of(capsys, tmp_path / "pack", "--skip-broken-images", "5", data=tree)
    assert f"cannot read validation image {tree / 'val/cat/0.png'}" in error and "fix or remove it" in error
    assert not holds_pack(tmp_path / "pack")


@pytest.mark.parametrize(
    ("photo", "packed"),
    [((500, 375), (341, 256)), ((1500, 1000), (384, 256)), ((1920, 1080), (384, 216)), ((3000, 1000), (384, 128))],
)
def test_packed_sizes_are_those_of_the_documentation(photo, packed):
    assert pack_dataset.reduced(Image.new("L", photo), 256).size == packed
    assert f"| {photo[0]}×{photo[1]}" in (text := (tiny.REPOSITORY / "docs" / "data.md").read_text())
    assert f"| {packed[0]}×{packed[1]} |" in text


def test_only_a_fraction_of_the_training_images_is_packed_if_asked(tree, tmp_path):
    pack_tool(tmp_path / "pack", "--train-fraction", "0.3", data=tree)
    train, val = sources_in(tmp_path / "pack")
    assert train.targets.tolist() == [0, 1] and len(val) == 2


def test_a_pack_is_replaced_only_on_demand(tree, tmp_path, capsys):
    pack_tool(tmp_path, data=tree)
    before = (tmp_path / "pack.json").read_bytes()
    assert "holds a pack" in (error := line_of(capsys, tmp_path, data=tree)) and "--overwrite" in error
    assert (tmp_path / "pack.json").read_bytes() == before
    pack_tool(tmp_path, "--format", "jpeg", "--overwrite", data=tree)
    assert PackImages(tmp_path, "train").kind == "jpeg" and verify(tmp_path) == []
    # what it would read while it writes
    error = line_of(capsys, tmp_path, "--overwrite", "--data-set", "PACKED", "--data-path", tmp_path)
    assert "is the folder of the data" in error and holds_pack(tmp_path)


def test_files_named_like_those_of_a_pack_are_kept_unless_overwritten(tree, tmp_path, capsys):
    (tmp_path / "train_00000.bin").write_text("tokens of another program")
    assert "holds train_00000.bin" in (error := line_of(capsys, tmp_path, data=tree)) and "--overwrite" in error
    assert sorted(os.listdir(tmp_path)) == ["train_00000.bin", "tree"]
    assert (tmp_path / "train_00000.bin").read_text() == "tokens of another program"
    pack_tool(tmp_path, "--overwrite", data=tree)
    assert verify(tmp_path) == []


def test_a_pack_can_be_packed_again_in_another_format(pack, tmp_path):
    pack_tool(tmp_path / "again", "--data-set", "PACKED", "--data-path", pack)
    for split in packs.SPLITS:
        ours, theirs = PackImages(tmp_path / "again", split), PackImages(pack, split)
        order = np.arange(len(ours))
        assert ours.file_names(order) == theirs.file_names(order)  # what has been reduced stays as it is


def test_too_small_a_disk_is_said_before_anything_is_written(tree, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    # 8 images of 16 by 20 pixels and fewer, and their rows of the index: between 3 and 8 KiB
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage(0, 0, 3 * 2**10))
    assert "--output" in (error := line_of(capsys, tmp_path / "pack", data=tree)) and "lower --size" in error
    assert not (tmp_path / "pack").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage(0, 0, 8 * 2**10))
    pack_tool(tmp_path / "pack", data=tree)
    assert holds_pack(tmp_path / "pack")


def test_a_pack_is_checked_without_the_data(pack, capsys):
    pack_tool(pack, "--verify")
    assert "is intact" in capsys.readouterr().err
    for flag in ("--size=16", "--format=jpeg", "--num-classes=3", "--no-overwrite"):
        line = line_of(capsys, pack, "--verify", flag)
        assert f"{flag.partition('=')[0].replace('--no-', '--')}: --verify without --data-set" in line
    flip_byte(pack / "train_00000.bin", 5)
    error = line_of(capsys, pack, "--verify")
    assert f"number 0 of train in {pack}" in error and AGAIN in error
    shorten(pack / "train_00000.bin")
    assert "--output" in (error := line_of(capsys, pack, "--verify")) and "train_00000.bin has" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--data-set: name the data to pack"),
        (["--data-set", "IMNET"], "--data-path: IMNET is not downloaded"),
        (["--data-set", "DIGITS", "--quality", "80"], "--quality: has no effect on --format uint8"),
        (["--data-set", "DIGITS", "--quality", "101"], "--quality"),
        (["--data-set", "DIGITS", "--formats", "jpeg"], "did you mean --format?"),
    ],
)
def test_flags_that_make_no_sense_are_a_one_line_error(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as exit_info:
        pack_tool(tmp_path / "pack", *flags)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.count("\n") == 1 and words in error
    assert not (tmp_path / "pack").exists()


def test_an_output_that_is_a_file_is_a_one_line_error(tree, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "is a file" in line_of(capsys, tmp_path / "file", data=tree)
    assert "cannot write to" in line_of(capsys, tmp_path / "file" / "below", data=tree)
