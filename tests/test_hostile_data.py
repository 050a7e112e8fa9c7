"""Hostile data files: nothing that is read can run a program, hang, use up memory or end in a traceback.

Each attack is a small file that the test makes. An alarm ends a test that hangs.
"""

import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import types
import zlib

import fuzz_files
import numpy as np
import pytest
import tiny
import torch
from PIL import EpsImagePlugin, Image
from scipy.io import savemat
from test_datasets import encoded, picture, pixels_of, read, write_parquet, write_stream, write_tree
from test_packs import TARGETS, change_about, write
from torchvision.datasets.folder import IMG_EXTENSIONS

import augment
import checkpoints
import datasets
import flags
import main
import packs
import sources
import utils
from teachers import Labels, LogProbabilities, TeacherCache, check_fingerprint
from tools import pack_dataset, summarize
from tools.runs import read_run
from tools.visualize_tokens import find_images
from utils import RunError, UserError

SECONDS = 20  # of a test, at most
DEEP = "[" * 100_000
NAMELESS = types.SimpleNamespace(class_names=(), class_samples=())  # data that do not name their classes


@pytest.fixture(autouse=True)
def alarm():
    """Ends a test that waits for something."""

    def ring(*_):
        raise TimeoutError("it hangs")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def device(path):
    """A link to a device that never ends."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    return path


def unix_socket(path):
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)
    return path


SPECIAL = {"a FIFO": fifo, "a device": device, "a socket": unix_socket}
special_files = pytest.mark.parametrize("kind", SPECIAL)


# -- images ------------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """Install a fake Ghostscript that creates the returned file when it is started."""
    program, marker = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None, raising=False)  # older Pillow has none
    return marker


def test_pillow_alone_would_start_ghostscript(ghostscript):
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        Image.open(io.BytesIO(EPS)).convert("RGB")
    assert ghostscript.exists()


def eps_data(name, root):
    """Write data whose images are all EPS files, for each reader."""
    if name == "wds/":
        return write_stream(root, files=lambda number, _: {"png": EPS, "cls": str(number % 3).encode()})
    if name == "hfds/":
        for part in ("train", "validation"):
            write_parquet(root / "set", part, [EPS, EPS], [0, 1] if part == "train" else [1, 0])
        return root / "cache"
    if name == "PACKED":
        write(root, kind="jpeg", quality=90)
        content = b"".join([EPS] * 3)
        for split, count in (("train", 3), ("val", 3)):
            rows = np.zeros(count, packs.INDEX)
            rows["offset"], rows["length"] = np.arange(count) * len(EPS), len(EPS)
            rows["height"] = rows["width"] = 8
            rows["crc32"] = zlib.crc32(EPS)
            np.save(root / f"{split}_index.npy", rows)
            (root / f"{split}_00000.bin").write_bytes(content)
            about = json.loads((root / "pack.json").read_text())
            shard = {"name": f"{split}_00000.bin", "bytes": len(content), "crc32": zlib.crc32(content)}
            about["splits"][split] = {"images": count, "index_crc32": zlib.crc32(rows), "shards": [shard]}
            (root / "pack.json").write_text(json.dumps(about))
        return root
    parts = ("train", "validation") if name == "hfids/" else ("train", "val", "validation")
    for path in itertools.chain(*write_tree(root / "tree", parts).values()):
        path.write_bytes(EPS)
    return root / "tree"


@pytest.mark.parametrize("name", ["IMNET", "CIFAR10", "torch/image_folder", "hfds/", "PACKED"])
def test_an_eps_named_png_does_not_reach_ghostscript(name, ghostscript, tmp_path):
    (root := tmp_path / "data").mkdir()
    path = eps_data(name, root)
    train, _ = read(name + str(root / "set") if name == "hfds/" else name, path)
    with pytest.raises(RunError, match="cannot read image .*not a JPEG, PNG"):
        train[0]
    assert not ghostscript.exists()


@pytest.mark.parametrize("name", ["wds/", "hfids/"])
def test_an_eps_in_a_stream_does_not_reach_ghostscript(name, ghostscript, tmp_path):
    (root := tmp_path / "data").mkdir()
    path = eps_data(name, root)
    _, val = read(f"{name}{path}" if name == "hfids/" else name, path, num_classes=3)
    val.transform = np.asarray
    if name == "wds/":  # timm skips what it cannot read
        assert list(val) == []
    else:
        with pytest.raises(RunError, match="cannot read image number 0 .*not a JPEG, PNG"):
            list(val)
    assert not ghostscript.exists()


def test_tools_show_no_eps(ghostscript, tmp_path):
    (tmp_path / "photo.png").write_bytes(EPS)
    with pytest.raises(RunError, match="photo.png .not a JPEG, PNG"):
        find_images([str(tmp_path / "photo.png")])[0]
    assert not ghostscript.exists()


def test_formats_are_those_of_the_extensions():
    Image.init()
    extensions = {*IMG_EXTENSIONS, *(f".{suffix}" for suffix in datasets.WDS_IMAGES.split(";"))}
    known = {kind for extension, kind in Image.registered_extensions().items() if extension in extensions}
    assert known <= set(augment.FORMATS) and set(augment.FORMATS) - known <= {"AVIF"}  # which an old Pillow lacks


def test_one_function_opens_images():
    found = [
        path.relative_to(tiny.REPOSITORY).as_posix()
        for path in (*tiny.REPOSITORY.glob("*.py"), *tiny.REPOSITORY.glob("[at]*/*.py"))
        if not path.is_relative_to(tiny.REPOSITORY / "tests") and re.search(r"\bImage\.open\(", path.read_text())
    ]
    assert found == ["augment/rgb.py"]


@special_files
def test_an_image_that_is_no_regular_file_is_an_error_with_its_name(tmp_path, kind):
    parts = write_tree(tmp_path)
    SPECIAL[kind](parts["train"][0])  # the first of its class: its checksum is taken when the folder is read
    train, val = read("IMNET", tmp_path)
    with pytest.raises(RunError, match=rf"cannot read image {parts['train'][0]} \(.*is {kind}, not a regular file"):
        train[0]
    assert train[1][0].size == (10, 12) and len(val) == 4


def test_a_link_to_a_regular_image_is_followed(tmp_path):
    parts = write_tree(tmp_path / "data")
    target = parts["train"][0].rename(tmp_path / "elsewhere.png")
    parts["train"][0].symlink_to(target)
    np.testing.assert_array_equal(pixels_of(read("IMNET", tmp_path / "data")[0])[0], np.asarray(picture(0)))


def test_a_path_in_hugging_face_data_must_lead_to_a_regular_file(tmp_path):
    from pyarrow import parquet, table

    (tmp_path / "set").mkdir()
    trap = fifo(tmp_path / "trap.png")
    for split, labels in (("train", [0, 1]), ("validation", [1, 0])):
        images = [{"bytes": None, "path": str(trap)}, {"bytes": encoded(picture(1)), "path": None}]
        file = tmp_path / "set" / f"{split}-00000-of-00001.parquet"
        parquet.write_table(table({"image": images, "label": labels}), file)
    train, _ = read(f"hfds/{tmp_path / 'set'}", tmp_path / "cache")
    with pytest.raises(RunError, match="is a FIFO, not a regular file"):
        train[0]
    np.testing.assert_array_equal(np.asarray(train[1][0]), np.asarray(picture(1)))


@pytest.mark.parametrize("name", ["set-train-0000.tar", "set-validation-0001.tar", "_info.json"])
def test_a_shard_of_a_stream_must_be_a_regular_file(tmp_path, name):
    path = write_stream(tmp_path)
    fifo(tmp_path / name)
    with tiny.user_error("--data-set wds/", name, "is a FIFO, not a regular file"):
        read("wds/", path, num_classes=3)


# -- packs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pack(tmp_path):
    """Write a valid pack with three classes and several shards, for later corruption."""
    write(tmp_path / "pack", shard_bytes=2000)
    return tmp_path / "pack"


def change_split(folder, split="train", **changes):
    about = json.loads((folder / "pack.json").read_text())
    about["splits"][split] |= changes
    (folder / "pack.json").write_text(json.dumps(about))


def change_shard(folder, **changes):
    about = json.loads((folder / "pack.json").read_text())
    about["splits"]["train"]["shards"][0] |= changes
    (folder / "pack.json").write_text(json.dumps(about))


def change_index(folder, row=0, **changes):
    """Change a row of the training index, and its checksum in pack.json so that it fits."""
    rows = np.load(folder / "train_index.npy")
    for name, value in changes.items():
        rows[name][row] = value
    np.save(folder / "train_index.npy", rows)
    change_split(folder, index_crc32=zlib.crc32(rows))


def lying_header(folder, shape):
    """An index whose header states a shape that its content has not."""
    with (folder / "train_index.npy").open("r+b") as file:
        file.write(np.lib.format.magic(1, 0))
        header = str({"descr": packs.INDEX.descr, "fortran_order": False, "shape": shape})
        file.write(len(header).to_bytes(2, "little") + header.encode())


def rename_shard(folder, name, target):
    """State another name for the first shard, and put its content there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "train_00000.bin", target)
    change_shard(folder, name=name)


HOSTILE_PACKS = {
    "nested pack.json": lambda folder: (folder / "pack.json").write_text(DEEP),
    "binary pack.json": lambda folder: (folder / "pack.json").write_bytes(b"\xff\xfe\x80"),
    "null pack.json": lambda folder: (folder / "pack.json").write_text("null"),
    "version true": lambda folder: change_about(folder, version=True),
    "version a list": lambda folder: change_about(folder, version=["1\n2"]),
    "kind a list": lambda folder: change_about(folder, kind=["uint8"]),
    "negative classes": lambda folder: change_about(folder, num_classes=-3),
    "no classes": lambda folder: change_about(folder, num_classes=0),
    "classes true": lambda folder: change_about(folder, num_classes=True),
    "classes a fraction": lambda folder: change_about(folder, num_classes=3.5),
    "classes not a number": lambda folder: change_about(folder, num_classes=float("nan")),
    "classes a word": lambda folder: change_about(folder, num_classes="3"),
    "too many classes": lambda folder: change_about(folder, num_classes=10**31),
    "fewer classes than labels": lambda folder: change_about(folder, num_classes=2),
    "class names a word": lambda folder: change_about(folder, class_names="abc"),
    "class names a number": lambda folder: change_about(folder, class_names=3),
    "class names a dictionary": lambda folder: change_about(folder, class_names={"a": 0, "b": 1, "c": 2}),
    "class names numbers": lambda folder: change_about(folder, class_names=[0, 1, 2]),
    "too few class names": lambda folder: change_about(folder, class_names=["a"]),
    "splits a list": lambda folder: change_about(folder, splits=["train", "val"]),
    "split a number": lambda folder: change_about(folder, splits={"train": 1, "val": 1}),
    "no shards": lambda folder: change_split(folder, shards=[]),
    "shards a number": lambda folder: change_split(folder, shards=7),
    "shards of words": lambda folder: change_split(folder, shards=["train_00000.bin"]),
    "images negative": lambda folder: change_split(folder, images=-1),
    "images true": lambda folder: change_split(folder, images=True),
    "images without end": lambda folder: change_split(folder, images=10**31),
    "index checksum a word": lambda folder: change_split(folder, index_crc32="0"),
    "shard checksum missing": lambda folder: change_shard(folder, crc32=None),
    "shard bytes a fraction": lambda folder: change_shard(
        folder, bytes=float((folder / "train_00000.bin").stat().st_size)
    ),
    "shard name a number": lambda folder: change_shard(folder, name=1),
    "shard name above": lambda folder: rename_shard(folder, "../other.bin", folder.parent / "other.bin"),
    "shard name absolute": lambda folder: rename_shard(
        folder, str(folder.parent / "other.bin"), folder.parent / "other.bin"
    ),
    "shard name below": lambda folder: rename_shard(folder, "below/other.bin", folder / "below" / "other.bin"),
    "shard name with zero byte": lambda folder: change_shard(folder, name="train\0.bin"),
    "shard name of an escape": lambda folder: change_shard(folder, name="\x1b[31m\nmain.py: all is well"),
    "label above classes": lambda folder: change_index(folder, target=3),
    "shard number above": lambda folder: change_index(folder, shard=2**32 - 1),
    "offset beyond": lambda folder: change_index(folder, offset=2**64 - 1),
    "length beyond": lambda folder: change_index(folder, length=2**32 - 1),
    "height zero": lambda folder: change_index(folder, height=0, length=0),
    "sides that overflow": lambda folder: change_index(folder, height=2**32 - 1, width=2**32 - 1),
    "another shape": lambda folder: change_index(folder, height=15),
    "index shape 10^31": lambda folder: lying_header(folder, (10**31,)),
    "index shape negative": lambda folder: lying_header(folder, (-1,)),
    "index of nested lists": lambda folder: lying_header(folder, "[" * 60000),
    "index an archive": lambda folder: np.savez((folder / "train_index.npy").open("wb"), np.zeros(3, packs.INDEX)),
    "index of objects": lambda folder: np.save(folder / "train_index.npy", np.array([{}]), allow_pickle=True),
}


@pytest.mark.parametrize("attack", HOSTILE_PACKS)
def test_a_hostile_pack_is_refused_with_a_one_line_error_when_opened(pack, attack):
    assert [len(source) for source in read("PACKED", pack)] == [len(TARGETS), 2]
    HOSTILE_PACKS[attack](pack)
    with tiny.user_error("--data-path", pack, "pack it again") as error:
        read("PACKED", pack)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@special_files
@pytest.mark.parametrize("name", ["pack.json", "train_index.npy", "train_00001.bin"])
def test_a_file_of_a_pack_must_be_regular(pack, name, kind):
    SPECIAL[kind](pack / name)
    with tiny.user_error("--data-path", pack, name, f"is {kind}, not a regular file"):
        read("PACKED", pack)


def test_links_to_the_files_of_a_pack_are_followed(pack, tmp_path):
    (linked := tmp_path / "linked").mkdir()
    for path in pack.iterdir():
        (linked / path.name).symlink_to(path)
    for ours, theirs in zip(read("PACKED", linked), read("PACKED", pack), strict=True):
        assert [found.tobytes() for found in pixels_of(ours)] == [found.tobytes() for found in pixels_of(theirs)]


def test_a_jpeg_of_another_size_than_its_index_says_is_a_broken_image(tmp_path):
    write(tmp_path, kind="jpeg", quality=90)
    change_index(tmp_path, row=1, height=8, width=24)
    train, _ = read("PACKED", tmp_path)
    assert train[0][0].size == (20, 16)
    with pytest.raises(RunError, match="cannot read image number 1 of train .*is 16 by 20 pixels, not 24 by 8"):
        train[1]


def test_the_index_of_a_jpeg_states_no_size_that_pillow_would_refuse(tmp_path):
    write(tmp_path, kind="jpeg", quality=90)
    change_index(tmp_path, height=65535, width=65535)  # a buffer of 12 GiB
    with tiny.user_error("--data-path", "train_index.npy is damaged"):
        read("PACKED", tmp_path)


def test_the_tool_refuses_a_hostile_pack(pack, capsys):
    change_about(pack, num_classes=-3)
    with pytest.raises(SystemExit) as end:
        pack_dataset.main(["--output", str(pack), "--verify"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# -- annotations -------------------------------------------------------------------------------------------------------


def annotations(root, **changes):
    root.mkdir(exist_ok=True)
    for number in range(2):
        picture(number).save(root / f"{number}.png")
    part = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(2)],
        "annotations": [{"image_id": number, "category_id": number} for number in range(2)],
        "categories": [{"id": number, "name": f"species {number}"} for number in range(2)],
    }
    (root / "val2018.json").write_text(json.dumps(part))
    (root / "train2018.json").write_text(json.dumps(part | changes))
    return root


@special_files
@pytest.mark.parametrize("name", ["train2018.json", "categories.json"])
def test_annotations_must_be_regular_files(tmp_path, name, kind):
    SPECIAL[kind](annotations(tmp_path / "data") / name)
    with tiny.user_error("--data-path", name, f"is {kind}, not a regular file"):
        read("INAT", tmp_path / "data")


@pytest.mark.parametrize(
    "changes",
    [
        {"images": [{"id": 0, "file_name": "\ud800.png"}], "annotations": [{"image_id": 0, "category_id": 0}]},
        {"images": [{"id": [0], "file_name": "0.png"}]},
        {"images": [{"id": 0, "file_name": 0}]},
        {"images": 5},
        {"categories": "name"},
        {"categories": [["name"]]},
        {"categories": [{"id": 0, "name": []}]},
    ],
)
def test_annotations_that_lie_are_a_one_line_error(tmp_path, changes):
    with tiny.user_error("--data-path", "fetch them again"):
        read("INAT", annotations(tmp_path / "data", **changes))


def test_nested_annotations_are_a_one_line_error(tmp_path):
    (annotations(tmp_path / "data") / "train2018.json").write_text(DEEP)
    with tiny.user_error("--data-path", "train2018.json", "fetch it again"):
        read("INAT", tmp_path / "data")


def stanford_cars(root, label=2):
    """Two cars of two classes; the files of their labels by name."""
    folder = root / "stanford_cars"
    for name in ("devkit", "cars_train", "cars_test"):
        (folder / name).mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["a", "b"], object)})
    labels = np.array([("0.jpg", 1), ("1.jpg", label)], [("fname", object), ("class", object)])
    for name in ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
        savemat(folder / name, {"annotations": labels})
    return folder


@pytest.mark.parametrize("name", ["cars_meta.mat", "cars_train_annos.mat", "cars_test_annos_withlabels.mat"])
@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file" + bytes(105) + b"\x00\x01IM" + b"\xff" * 64, None])
def test_hostile_car_labels_are_a_one_line_error(tmp_path, name, content):
    (path,) = stanford_cars(tmp_path).rglob(name)
    assert [len(part) for part in read("CARS", tmp_path)] == [2, 2]
    if content is None:
        fifo(path)
    else:
        path.write_bytes(content)
    with tiny.user_error("--data-path", "not Stanford Cars"):
        read("CARS", tmp_path)


@pytest.mark.parametrize("label", [0, 3])
def test_a_car_of_no_class_is_a_one_line_error(tmp_path, label):
    stanford_cars(tmp_path, label)
    with tiny.user_error("--data-path", "not Stanford Cars", "not one of its 2 classes"):
        read("CARS", tmp_path)


# -- cached teacher predictions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["null", "[]", '["seed"]', '"seed"', "0", "true", "NaN", DEEP, "", "\xff"])
def test_a_fingerprint_that_is_none_is_refused_and_kept(tmp_path, text):
    (tmp_path / "fingerprint.json").write_text(text, encoding="latin-1")
    with tiny.user_error("--teacher-cache", tmp_path, "fingerprint.json", "name another folder"):
        check_fingerprint(tmp_path, {"seed": 0}, NAMELESS)
    assert (tmp_path / "fingerprint.json").read_text(encoding="latin-1") == text


@pytest.mark.parametrize("names", [5, "ab", {"a": 0}, [0, 1], [["a"]], True])
def test_class_names_of_a_fingerprint_must_be_names(tmp_path, names):
    (tmp_path / "fingerprint.json").write_text(json.dumps({"seed": 0, "class_names": names}))
    with tiny.user_error("--teacher-cache", tmp_path, "fingerprint.json", "name another folder"):
        check_fingerprint(tmp_path, {"seed": 0}, types.SimpleNamespace(class_names=("a", "b"), class_samples=()))


@pytest.mark.parametrize("value", ["\x1b[31m\nmain.py: all is well", float("nan"), [[[[[[[[1]]]]]]]], "x" * 10000])
def test_a_value_of_a_fingerprint_is_said_in_one_printable_line(tmp_path, value):
    (tmp_path / "fingerprint.json").write_text(json.dumps({"seed": value}))
    with tiny.user_error("--teacher-cache", "seed") as error:
        check_fingerprint(tmp_path, {"seed": 0}, NAMELESS)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def adopt(folder, barrier, results, seed):
    """Store this seed as the cache's fingerprint, concurrently with other processes."""
    barrier.wait()
    try:
        check_fingerprint(folder, {"seed": seed, "padding": list(range(200))}, NAMELESS)
        results.put((seed, "adopted"))
    except UserError as error:
        results.put((seed, "refused" if "was computed with other flags or data: seed" in str(error) else str(error)))
    except BaseException as error:
        results.put((seed, repr(error)))
        raise


@pytest.mark.parametrize("locks", [True, False])
def test_one_of_many_processes_makes_the_fingerprint(tmp_path, monkeypatch, locks):
    if not locks:  # as on some network file systems
        monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    context = multiprocessing.get_context("fork")
    for attempt in range(2):
        folder, barrier, results = tmp_path / str(attempt) / "cache", context.Barrier(6), context.SimpleQueue()
        processes = [context.Process(target=adopt, args=(folder, barrier, results, seed)) for seed in range(6)]
        for process in processes:
            process.start()
        found = dict(results.get() for _ in processes)
        for process in processes:
            process.join()
        winner = json.loads((folder / "fingerprint.json").read_text())["seed"]
        assert found == {seed: "adopted" if seed == winner else "refused" for seed in range(6)}
        assert not list(folder.glob(".*"))  # nothing half written


def test_a_fingerprint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: order.append((tmp_path / "fingerprint.json").exists()) or fsync(fd))
    check_fingerprint(tmp_path, {"seed": 0}, NAMELESS)
    assert order == [False, False, True]  # the file and its temporary name, then the folder that names it


@special_files
@pytest.mark.parametrize("name", ["fingerprint.json", "fingerprint.lock"])
def test_the_fingerprint_must_be_a_regular_file(tmp_path, name, kind):
    SPECIAL[kind](tmp_path / name)
    with tiny.user_error("--teacher-cache", f"is {kind}, not a regular file"):
        check_fingerprint(tmp_path, {"seed": 0}, NAMELESS)


def cached(folder, rows, name="epoch_0000_rank0of1.crc{:08x}.npy"):
    np.save(path := folder / name.format(zlib.crc32(rows)), rows)
    return path


def hostile_rows(codec, **values):
    rows = codec.encode(torch.zeros(12, codec.num_classes))
    for name, value in values.items():
        rows[name][3] = value
    return rows


@pytest.mark.parametrize(
    ("codec", "values"),
    [
        (Labels(10), {"label": 10}),
        (Labels(10), {"label": 0xFFFE}),
        (LogProbabilities(10, 3), {"classes": [0, 1, 10]}),
        (LogProbabilities(10, 3), {"values": [0, 1, 2]}),
        (LogProbabilities(10, 10), {"values": np.inf}),
        (LogProbabilities(10, 10), {"values": -np.inf}),
    ],
)
@pytest.mark.parametrize("name", ["epoch_0000_rank0of1.crc{:08x}.npy", "epoch_0000_rank0of1.part.npy"])
def test_predictions_that_no_teacher_makes_are_damage(tmp_path, codec, values, name):
    path = cached(tmp_path, hostile_rows(codec, **values), name)
    with pytest.raises(RunError, match=f"{path.name} is damaged"):
        TeacherCache(tmp_path, codec, 12, 0, 1).open(0)


def test_predictions_at_the_limits_are_sound(tmp_path):
    for epoch, codec in enumerate((Labels(10), LogProbabilities(10, 3), LogProbabilities(10, 10))):
        logits = torch.full((12, 10), -1e5)
        logits[:, 9] = 1e5
        cached(tmp_path, codec.encode(logits), f"epoch_000{epoch}_rank0of1.crc{{:08x}}.npy")
        cache = TeacherCache(tmp_path, codec, 12, 0, 1)
        cache.open(epoch)
        assert cache.next_missing() == 12


@pytest.mark.parametrize(
    "name",
    [
        "epoch_0000_rank5of1.crc00000000.npy",
        "epoch_0000_rankof.crc00000000.npy",
        "epoch_0000_rank0of0.crc00000000.npy",
        "epoch_0000_rank0of99999999999.crc00000000.npy",
    ],
)
def test_names_of_files_that_no_run_writes_are_ignored(tmp_path, name):
    (tmp_path / name).touch()
    cache = TeacherCache(tmp_path, Labels(10), 12, 0, 1)
    assert not cache.is_whole(0)
    cache.open(0)
    assert cache.next_missing() == 0


@special_files
@pytest.mark.parametrize("name", ["epoch_0000_rank0of1.crc00000000.npy", "part.npy", "part.lock"])
def test_files_of_the_cache_must_be_regular(tmp_path, name, kind):
    path = tmp_path / (name if name.startswith("epoch") else f"epoch_0000_rank0of1.{name}")
    SPECIAL[kind](path)
    with pytest.raises(RunError, match=rf"--teacher-cache: .*is {kind}, not a regular file"):
        TeacherCache(tmp_path, Labels(10), 12, 0, 1).open(0)


@pytest.mark.parametrize("name", ["epoch_0000_rank0of1.crc00000000.npy", "epoch_0000_rank0of1.part.npy"])
@pytest.mark.parametrize("shape", [(10**31,), (10**11,), (12, 1), "[" * 60000])
def test_a_header_of_the_cache_that_lies_is_damage(tmp_path, name, shape):
    codec = Labels(10)
    header = str({"descr": codec.dtype.descr, "fortran_order": False, "shape": shape})
    content = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header.encode() + bytes(24)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name} is damaged"):
        TeacherCache(tmp_path, codec, 12, 0, 1).open(0)
    assert (tmp_path / name).stat().st_size == len(content)  # not made as long as it says


# -- logs --------------------------------------------------------------------------------------------------------------

RECORDS = [{"train_loss": 2.5, "epoch": epoch} for epoch in range(3)]


def log_with(folder, *extra, newline=True):
    text = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
    (folder / "log.txt").write_bytes(text + b"".join(extra) if newline else text[:-1])


def test_a_log_without_a_final_newline_is_continued_on_a_new_line(tmp_path):
    log_with(tmp_path, newline=False)
    utils.open_log(tmp_path, 3)
    utils.append_log(tmp_path, {"epoch": 3})
    assert tiny.log_of(tmp_path) == [*RECORDS, {"epoch": 3}]


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff\xfe\x80\n",
        b"\0\0",
        DEEP.encode() + b"\n",
        b'{"epoch": "0"}\n',
        b'{"epoch": NaN}\n',
        b"[0]\n",
        b"9" * 9999,
    ],
)
def test_other_bytes_in_a_log_are_dropped(tmp_path, junk):
    log_with(tmp_path, junk)
    utils.open_log(tmp_path, 2)
    assert tiny.log_of(tmp_path) == RECORDS[:2]


@special_files
def test_a_log_must_be_a_regular_file(tmp_path, kind):
    SPECIAL[kind](tmp_path / "log.txt")
    with pytest.raises(OSError, match=f"is {kind}, not a regular file"):
        utils.open_log(tmp_path, 1)


@pytest.mark.parametrize("content", [b"\xff\n", DEEP.encode(), b"[1]\n", b'{"epoch": 0, "test_acc1": "high"}\n', b"\0"])
def test_a_hostile_log_is_summarized(tmp_path, content):
    (tmp_path / "log.txt").write_bytes(content)
    row = summarize.summarize_run(read_run(tmp_path))
    assert row["epochs"] <= 1 and row["best"] is None and row["test_acc1"] is None
    assert len(summarize.table([row]).splitlines()) == 2


def test_a_log_that_is_no_regular_file_is_a_one_line_error_of_the_tool(tmp_path, capsys):
    fifo(tmp_path / "log.txt")
    with pytest.raises(SystemExit) as end:
        summarize.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "is a FIFO, not a regular file" in error


# -- flags -------------------------------------------------------------------------------------------------------------


def refusal(words, capsys):
    """The one line with which the flags are refused; the status must be 2."""
    with pytest.raises(SystemExit) as end:
        main.cli([str(word) for word in words])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert end.value.code == 2 and len(lines) == 1, error
    assert len(lines[0]) < 5000
    return lines[0]


@special_files
def test_a_recipe_must_be_a_regular_file(tmp_path, capsys, kind):
    path = SPECIAL[kind](tmp_path / "recipe.args")
    assert f"{path}: is {kind}, not a regular file" in refusal([f"@{path}"], capsys)


def test_a_recipe_that_includes_itself_is_refused(tmp_path, capsys):
    one, other = tmp_path / "one.args", tmp_path / "other.args"
    one.write_text(f"--epochs 3\n@{other}\n")
    other.write_text(f"@{one}\n")
    assert "includes itself" in (line := refusal([f"@{one}"], capsys)) and str(one) in line


def test_recipes_that_multiply_are_refused(tmp_path, capsys):
    for number in range(40):
        (tmp_path / f"{number}.args").write_text(f"@{tmp_path / str(number + 1)}.args\n" * 2)
    (tmp_path / "40.args").write_text("--epochs 3\n")
    assert "above 100 recipes" in refusal([f"@{tmp_path}/0.args"], capsys)


def test_a_recipe_may_include_others(tmp_path):
    (base := tmp_path / "base.args").write_text("--epochs 3 --batch_size 7\n")
    (tmp_path / "own.args").write_text(f"--epochs 4\n@{base}  # the base\n--seed 5")
    args = flags.parse_args([f"@{tmp_path / 'own.args'}", "--lr", "0.5"])
    assert (args.epochs, args.batch_size, args.seed, args.lr) == (3, 7, 5, 0.5)


@pytest.mark.parametrize("content", [b"\x80\x81\n", b"--seed 1\0\n", b"\x7fELF\x02\x01\x01" + bytes(64)])
def test_a_binary_recipe_is_refused(tmp_path, capsys, content):
    (tmp_path / "recipe.args").write_bytes(content)
    assert "is not text" in refusal([f"@{tmp_path / 'recipe.args'}"], capsys)


def test_a_large_file_is_no_recipe(tmp_path, capsys):
    with (tmp_path / "recipe.args").open("wb") as file:
        file.truncate(2**40)
    assert "a recipe has at most 65536 bytes" in refusal([f"@{tmp_path / 'recipe.args'}"], capsys)


DEEP_VALUES = ["[" * 150, "[" * 100_000, "-" * 100_000 + "1", "(" * 900 + ")" * 900, "1" + "+1" * 900, "{0:" * 300]


@pytest.mark.parametrize("value", DEEP_VALUES)
def test_deep_model_kwargs_are_refused(capsys, value):
    line = refusal([*tiny.TINY, "--model-kwargs", f"depth={value}"], capsys)
    assert "--model-kwargs" in line or "--model deit_tiny" in line
    assert flags.parse_args(["--teacher-model-kwargs", "depth=3"]).teacher_model_kwargs == {"depth": 3}


def test_model_kwargs_are_literals_or_text():
    words = ["depth=2", "x=a=b", "act_layer=gelu", "sizes=(1, 2)", "norm='quoted'", "odd=a b", "none=None", "open=[1"]
    assert flags.parse_args(["--model-kwargs", *words]).model_kwargs == {
        "depth": 2,
        "x": "a=b",
        "act_layer": "gelu",
        "sizes": (1, 2),
        "norm": "quoted",
        "odd": "a b",
        "none": None,
        "open": "[1",
    }


PATHS = ["--data-path", "--output-dir", "--resume", "--finetune", "--teacher-path", "--teacher-cache"]
LONG = {"one name": "x" * 300, "the whole path": "/".join(["x" * 200] * 30)}


@pytest.mark.parametrize("flag", PATHS)
@pytest.mark.parametrize("kind", LONG)
def test_an_over_long_path_is_refused(flag, kind, capsys):
    others = ["--distillation-type", "hard"] if flag.startswith("--teacher") else []
    line = refusal([*tiny.TINY, *others, flag, LONG[kind]], capsys)
    assert flag in line and "File name too long" in line


@pytest.mark.parametrize("kind", LONG)
def test_an_over_long_path_of_a_recipe_is_refused(kind, capsys):
    assert "File name too long" in refusal([f"@{LONG[kind]}"], capsys)


def test_a_loop_of_links_is_refused(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in refusal([*tiny.TINY, "--output-dir", tmp_path / "loop"], capsys)


NOT_UTF_8 = os.fsdecode(b"caf\xe9 \xff")


def test_a_run_reads_folders_that_are_not_utf_8(tmp_path):
    folder = tmp_path / NOT_UTF_8
    tiny.write_folders(folder / "data", ["cat", os.fsdecode(b"d\xf6g")], per_class=4)
    words = [*tiny.PLAIN, "--data-set", "IMNET", "--data-path", folder / "data", "--batch-size", "4"]
    main.cli([str(word) for word in (*words, "--output-dir", tmp_path / "run")])
    assert len(tiny.log_of(tmp_path / "run")) == 1
    (tmp_path / "run").rename(folder / "run")
    more = ["--output-dir", tmp_path / "more", "--resume", folder / "run" / "checkpoint.pth", "--epochs", "2"]
    main.cli([str(word) for word in (*words, *more)])
    assert [record["epoch"] for record in tiny.log_of(tmp_path / "more")] == [0, 1]
    main.cli(["--eval", "--resume", str(folder / "run" / "best.pth"), "--num-workers", "0"])


def test_an_output_folder_that_is_not_utf_8_is_refused(tmp_path, capfd):
    line = refusal([*tiny.TINY, "--output-dir", tmp_path / NOT_UTF_8], capfd)
    assert "--output-dir" in line and "not UTF-8" in line and not list(tmp_path.iterdir())


# -- checkpoints -------------------------------------------------------------------------------------------------------


@special_files
@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_a_checkpoint_must_be_a_regular_file(tmp_path, flag, kind, capsys):
    path = SPECIAL[kind](tmp_path / "checkpoint.pth")
    line = refusal([*tiny.TINY, flag, path, "--output-dir", tmp_path], capsys)
    assert f"{flag} {path}: is {kind}, not a regular file" in line


@special_files
def test_auto_resume_does_not_wait_for_a_checkpoint(tmp_path, kind):
    SPECIAL[kind](tmp_path / checkpoints.LATEST)
    SPECIAL[kind](tmp_path / checkpoints.PREVIOUS)
    found = checkpoints.find_checkpoint("auto", str(tmp_path), is_main=True)
    with tiny.user_error("--resume", f"is {kind}, not a regular file"):
        checkpoints.read_checkpoint(found, "--resume")


def test_sources_take_note_of_special_files_like_of_broken_images(tmp_path):
    parts = write_tree(tmp_path)
    fifo(parts["train"][0])
    train, _ = read("IMNET", tmp_path)
    tolerant = sources.replace(train, broken=sources.BrokenImages(train.images, 1))
    assert tolerant[0][0].size == (10, 12) and tolerant.broken.all_found() == [0]


def test_a_decoder_that_uses_up_memory_is_a_broken_image(monkeypatch):
    content = encoded(picture(0).resize((200, 200)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(augment.ImageError, match="decompression bomb"):
        augment.open_rgb(io.BytesIO(content))


# -- mutations ---------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_mutated_files_are_read_or_refused(tmp_path):
    signal.alarm(120)  # each has 5 seconds of its own
    counts, findings = fuzz_files.fuzz(mutations=108, seed=1, folder=tmp_path)
    assert not findings
    assert sum(count["read"] for count in counts.values()) > 20 < sum(count["refused"] for count in counts.values())


def test_the_fuzz_reports_exceptions_and_signals(tmp_path, monkeypatch):
    def read(folder):
        content = (folder / "file").read_bytes()
        if content != b"0123456789" * 9 and len(content) <= 90:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(content) > 90:
            raise LookupError("wrong")

    subject = (lambda folder: (folder / "file").write_bytes(b"0123456789" * 9), "file", read)
    monkeypatch.setitem(fuzz_files.SUBJECTS, "file", subject)
    counts, findings = fuzz_files.fuzz(mutations=20, seed=0, folder=tmp_path, names=["file"])
    assert {what.partition(":")[0] for _, _, what in findings} == {"LookupError", "ended by SIGKILL"}
    assert counts["file"]["findings"] == len(findings) >= 15
