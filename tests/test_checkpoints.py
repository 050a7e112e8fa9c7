"""Checkpoint files that survive accidents and never run code."""

import argparse
import errno
import hashlib
import os
import pickle
import resource
import tracemalloc
import types
import zipfile
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

import checkpoints
from checkpoints import compare_classes, file_hash, read_checkpoint, save_checkpoint
from utils import RunError, UserError

# -- the output folder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "is_free"),
    [
        ("config.json", '{"architecture": "deit_tiny_patch16_224", "exporter": "tools.export"}', False),
        ("config.json", "[1]", False),
        ("config.json", "# mine", False),
        ("config.json", '{"model": "deit_tiny_patch16_224", "data_set": "IMNET"}', True),
        ("log.txt", "my notes\n", False),
        ("log.txt", "", True),
        ("log.txt", '{"epoch": 0, "train_loss": 1.0}\n', True),  # of a run that was killed before its first checkpoint
        ("notes.txt", "my notes\n", True),
    ],
)
def test_a_run_leaves_files_of_other_programs_alone(tmp_path, name, text, is_free):
    (tmp_path / name).write_text(text)
    for resume in ("", str(tmp_path / "elsewhere" / "checkpoint.pth")):
        if is_free:
            checkpoints.check_folder(tmp_path, resume, overwrite=False)
        else:
            with tiny.user_error("--output-dir", tmp_path, name, "--overwrite"):
                checkpoints.check_folder(tmp_path, resume, overwrite=False)
    checkpoints.check_folder(tmp_path, "", overwrite=True)


# -- writing checkpoints -----------------------------------------------------------------------------------------------


def checkpoint_of(epoch, size=10):
    return {
        "model": {"weight": torch.full((size,), float(epoch))},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "model_ema": None,
        "epoch": epoch,
        "best_acc1": 12.5,
        "args": {"model": "deit_tiny_patch16_224", "lr_noise": None, "opt_betas": [0.9, 0.99]},
    }


def epoch_in(path):
    return torch.load(path, weights_only=True)["epoch"]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_read_back_without_trusting_it(tmp_path):
    save_checkpoint(checkpoint_of(3), tmp_path, is_best=False)
    read = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert torch.equal(read["model"].pop("weight"), torch.full((10,), 3.0))
    assert read == checkpoint_of(3) | {"model": {}}
    assert read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")["args"] == checkpoint_of(3)["args"]


def test_the_checkpoint_before_and_the_best_are_kept(tmp_path):
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=True)
    assert names_in(tmp_path) == ["best.pth", "checkpoint.pth"]
    save_checkpoint(checkpoint_of(1), tmp_path, is_best=True)
    save_checkpoint(checkpoint_of(2), tmp_path, is_best=False)
    save_checkpoint(checkpoint_of(3), tmp_path, is_best=False)
    assert names_in(tmp_path) == ["best.pth", "checkpoint.pth", "checkpoint_previous.pth"]
    assert epoch_in(tmp_path / "checkpoint.pth") == 3
    assert epoch_in(tmp_path / "checkpoint_previous.pth") == 2
    assert epoch_in(tmp_path / "best.pth") == 1


def test_files_are_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=True)
    save_checkpoint(checkpoint_of(1), tmp_path, is_best=False)
    assert names_in(tmp_path) == ["best.pth", "checkpoint.pth", "checkpoint_previous.pth"]
    assert [epoch_in(tmp_path / name) for name in names_in(tmp_path)] == [0, 1, 0]


def dying(error):
    def save(_, stream):
        stream.write(b"half of a checkp")
        raise error

    return save


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunError),
        (RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos\nframe #0: ..."), RunError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_save_that_dies_leaves_every_earlier_file_whole(tmp_path, monkeypatch, error, expected):
    for epoch in range(3):
        save_checkpoint(checkpoint_of(epoch), tmp_path, is_best=epoch == 0)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dying(error))
        with pytest.raises(expected):
            save_checkpoint(checkpoint_of(3), tmp_path, is_best=True)
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)} == before
    # ... and the run that resumes from there leaves nothing behind either
    save_checkpoint(checkpoint_of(3), tmp_path, is_best=True)
    assert names_in(tmp_path) == sorted(before)
    assert [epoch_in(tmp_path / name) for name in names_in(tmp_path)] == [3, 3, 2]


def test_a_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    # or a power cut could leave an empty file under the good name
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a real write that really fails
    try:
        with pytest.raises(RunError) as caught:
            save_checkpoint(checkpoint_of(1, size=100_000), tmp_path, is_best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert names_in(tmp_path) == ["checkpoint.pth"] and epoch_in(tmp_path / "checkpoint.pth") == 0


def test_a_missing_folder_is_an_error_of_the_run(tmp_path):
    with pytest.raises(RunError, match="cannot write a checkpoint"):
        save_checkpoint(checkpoint_of(0), tmp_path / "gone", is_best=False)


def test_a_kill_between_link_and_rename_does_not_cost_the_checkpoint(tmp_path, monkeypatch):
    # What such a kill leaves is a second name of checkpoint.pth. In a container the next process often has the same
    # number, and so the same temporary name: it must not write through it.
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    os.link(tmp_path / "checkpoint.pth", tmp_path / f".checkpoint_previous.pth.{os.getpid()}.tmp")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dying(RuntimeError("killed again")))
        with pytest.raises(RunError):
            save_checkpoint(checkpoint_of(1), tmp_path, is_best=False)
    assert epoch_in(tmp_path / "checkpoint.pth") == 0
    save_checkpoint(checkpoint_of(1), tmp_path, is_best=False)
    assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_previous.pth"]
    assert [epoch_in(tmp_path / name) for name in names_in(tmp_path)] == [1, 0]


def test_a_kill_between_keeping_and_replacing_leaves_no_stray_name(tmp_path):
    # then both names are one file, and renaming a third name of it onto one of them would do nothing
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    os.link(tmp_path / "checkpoint.pth", tmp_path / "checkpoint_previous.pth")
    for epoch in (1, 2):
        save_checkpoint(checkpoint_of(epoch), tmp_path, is_best=False)
        assert names_in(tmp_path) == ["checkpoint.pth", "checkpoint_previous.pth"]
        assert [epoch_in(tmp_path / name) for name in names_in(tmp_path)] == [epoch, epoch - 1]


# -- reading checkpoints -----------------------------------------------------------------------------------------------


class Malicious:
    """Unpickling one of these creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("write", ["pickle", "torch", "torch, legacy"])
@pytest.mark.parametrize("name", ["checkpoint.pth", "model.safetensors", "model.pkl"])
def test_a_malicious_file_is_refused_and_never_executed(tmp_path, name, write):
    path, marker = tmp_path / name, tmp_path / "marker"
    content = {"model": {"weight": torch.zeros(1)}, "args": Malicious(marker)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(UserError, match="--finetune .*never run"):
        read_checkpoint(str(path), "--finetune")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists(), "this file would have been dangerous"


def test_a_truncated_file_is_refused(tmp_path):
    save_checkpoint(checkpoint_of(0), tmp_path, is_best=False)
    path = tmp_path / "checkpoint.pth"
    for share in (0.9, 0.5, 0):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(UserError, match="--resume .*truncated"):
            read_checkpoint(str(path), "--resume")


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path, what in ((tmp_path / "nowhere.pth", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=f"--teacher-path {path}: {what}"):
            read_checkpoint(str(path), "--teacher-path")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor"):
        read_checkpoint(str(tmp_path / "tensor.pth"), "--resume")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(str(tmp_path / "text.pth"), "--resume")


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(UserError, match="plain tensors"):
        read_checkpoint(str(tmp_path / "model.pth"), "--finetune")


def test_a_safetensors_file_is_read(tmp_path):
    weights = {"head.weight": torch.randn(2, 3), "head.bias": torch.randn(2)}
    save_file(weights, tmp_path / "model.safetensors")
    read = read_checkpoint(str(tmp_path / "model.safetensors"), "--finetune")
    assert set(read) == {"model"} and all(torch.equal(read["model"][name], weights[name]) for name in weights)


def test_a_checkpoint_with_its_flags_in_a_namespace_is_read(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(model="x")}, tmp_path / "original.pth")
    checkpoint = read_checkpoint(str(tmp_path / "original.pth"), "--finetune")
    assert torch.equal(checkpoint["model"]["w"], torch.ones(2))


def rename_globals(path, old, new):
    """Rename classes in a checkpoint's pickle to their names in another version or system."""
    with zipfile.ZipFile(path) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    assert any(old in content for name, content in contents.items() if name.endswith("data.pkl"))
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"pathlib", b"pathlib"),
        (b"pathlib\n", b"pathlib._local\n"),  # Python 3.13
        (b"pathlib\nPosixPath", b"pathlib\nPurePosixPath"),
        (b"pathlib\nPureWindowsPath", b"pathlib\nWindowsPath"),
    ],
)
@pytest.mark.parametrize("nested", [dict, lambda values: argparse.Namespace(**values)])
def test_paths_of_any_system_are_read_as_strings(tmp_path, old, new, nested):
    args = {"output_dir": Path("/data/run"), "relative": Path("a/b"), "data": PureWindowsPath("C:\\data\\x")}
    torch.save({"model": {"w": torch.ones(2)}, "args": nested(args)}, tmp_path / "x.pth")
    rename_globals(tmp_path / "x.pth", old, new)
    read = read_checkpoint(str(tmp_path / "x.pth"), "--resume")["args"]
    assert nested({"output_dir": "/data/run", "relative": "a/b", "data": "C:\\data\\x"}) == read


NUMBERS = {
    "lr": np.float64(0.1),
    "half": np.float16(0.5),
    "step": np.int64(-7),
    "level": np.uint8(200),
    "done": np.bool_(True),
    "root": np.complex64(1 + 2j),
    "name": np.str_("größer"),
    "big": np.array(1.5, dtype=">f4")[()],
}


@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_scalars_are_read_as_python_values(tmp_path, core, legacy):
    torch.save({"args": NUMBERS}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    here = np.float64.__reduce__(np.float64(1))[0].__module__.encode()
    if legacy:
        (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes().replace(here, core))
    else:
        rename_globals(tmp_path / "x.pth", here, core)
    read = read_checkpoint(str(tmp_path / "x.pth"), "--resume")["args"]
    assert read == {name: value.item() for name, value in NUMBERS.items()}
    assert {type(value) for value in read.values()} == {float, int, bool, complex, str}


class Smuggler:
    """Pickles as a NumPy scalar of a chosen dtype that contains any value."""

    def __init__(self, code, value):
        self.code, self.value = code, value

    def __reduce__(self):
        return np.float64(1).__reduce__()[0], (np.dtype(self.code), self.value)


@pytest.mark.parametrize("code", ["O", "f8,O", "M8[s]", "V8", "f8"])
def test_numpy_scalars_smuggle_nothing(tmp_path, code):
    for value in (Malicious(tmp_path / "marker"), b"too short", [1], b""):
        torch.save({"args": Smuggler(code, value)}, tmp_path / "x.pth")
        with pytest.raises(UserError, match="--resume .*never run"):
            read_checkpoint(str(tmp_path / "x.pth"), "--resume")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("cls", [argparse.Namespace, Path, np.float64])
def test_values_in_a_file_do_not_let_code_in_with_them(tmp_path, cls):
    value = cls(1) if cls is np.float64 else cls()
    torch.save({"args": [value, Malicious(tmp_path / "marker")]}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="--resume .*never run"):
        read_checkpoint(str(tmp_path / "x.pth"), "--resume")
    assert not (tmp_path / "marker").exists()
    torch.save({"args": value}, tmp_path / "x.pth")
    read_checkpoint(str(tmp_path / "x.pth"), "--resume")
    with pytest.raises(pickle.UnpicklingError):  # and afterwards torch knows no more than before
        torch.load(tmp_path / "x.pth", weights_only=True)


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


def saved(folder, epoch):
    folder.mkdir(exist_ok=True)
    save_checkpoint(checkpoint_of(epoch), folder, is_best=False)
    return (folder / "checkpoint.pth").read_bytes()


def test_files_of_one_name_at_two_addresses_are_two_files(tmp_path, web):
    address, files = web
    addresses = []
    for run in (1, 2):
        files[f"/run{run}/best.pth"] = content = saved(tmp_path / f"run{run}", run)
        addresses.append(f"{address}/run{run}/best.pth#sha256={hash_of(content)}")
    assert [read_checkpoint(each, "--finetune")["epoch"] for each in addresses] == [1, 2]


def test_a_hash_in_the_file_s_name_is_taken_at_its_word(tmp_path, web):
    address, files = web
    content = saved(tmp_path / "run", 5)
    good, bad = f"deit-{hash_of(content)[:16]}.pth", "deit-0a1b2c3d4e5f6a7b.pth"
    files |= {f"/{good}": content, f"/{bad}": content}
    assert read_checkpoint(f"{address}/{good}", "--finetune")["epoch"] == 5
    for _ in range(2):  # nothing is left to be believed the second time
        with pytest.raises(UserError, match=f"--finetune .*its SHA-256 is {hash_of(content)[:16]}, not 0a1b2c3d"):
            read_checkpoint(f"{address}/{bad}", "--finetune")
    assert len(names_in(tmp_path / "cache" / "hub" / "checkpoints")) == 1


@pytest.mark.parametrize(
    "change",
    [("https", "http"), ("#sha256=", "#md5="), ("#sha256=1234567890123456", ""), ("https", "ftp"), ("https", "file")],
)
def test_a_download_without_encryption_or_hash_is_refused(change, monkeypatch):
    monkeypatch.setattr(checkpoints, "_fetch_file", lambda *_: pytest.fail("it was downloaded"))
    with pytest.raises(UserError, match="--resume .*: a download needs https and at least 16 digits of its SHA-256"):
        read_checkpoint("https://example.org/best.pth#sha256=1234567890123456".replace(*change), "--resume")


def test_a_malicious_download_is_never_executed(tmp_path, web):
    address, files = web
    torch.save({"model": Malicious(tmp_path / "marker")}, tmp_path / "best.pth")
    files["/best.pth"] = content = (tmp_path / "best.pth").read_bytes()
    with pytest.raises(UserError, match="--finetune .*never run"):
        read_checkpoint(f"{address}/best.pth#sha256={hash_of(content)}", "--finetune")
    assert not (tmp_path / "marker").exists()


def test_an_address_without_a_file_is_refused(web):
    with pytest.raises(UserError, match="--finetune .*cannot be downloaded .*404"):
        read_checkpoint(f"{web[0]}/nothing-0a1b2c3d4e5f6a7b.pth", "--finetune")


def test_the_hash_of_a_download_is_that_of_the_file(tmp_path, web):
    web[1]["/best.pth"] = content = saved(tmp_path / "run", 5)
    assert file_hash(f"{web[0]}/best.pth#sha256={hash_of(content)[:16]}", "--teacher-path") == hash_of(content)


def test_the_hash_of_a_large_file_takes_little_memory(tmp_path):
    content, expected = os.urandom(2**20), hashlib.sha256()
    with open(tmp_path / "large.pth", "wb") as stream:
        for _ in range(64):
            stream.write(content)
            expected.update(content)
    tracemalloc.start()
    try:
        found = file_hash(str(tmp_path / "large.pth"), "--teacher-path")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == expected.hexdigest() and peak < 2 * 2**20


# -- what a class index means ------------------------------------------------------------------------------------------


def classes(names, samples=()):
    return types.SimpleNamespace(class_names=tuple(names), class_samples=tuple(samples))


@pytest.mark.parametrize(
    ("names", "samples"),
    [
        ("abc", (1, 2, 3)),
        ("abc", (1, 9, 3)),  # another image came first: it shows nothing
        ("abc", (1, -1, 3)),  # a class without images in this part
        ("abc", ()),
        ("", ()),
        ("abcd", (1, 2, 3, 4)),  # another number of classes is another error
    ],
)
def test_classes_that_may_be_the_same_are_accepted(names, samples):
    checkpoint = {"class_names": list("abc"), "class_samples": {"val": [1, 2, 3]}}
    compare_classes(checkpoint, {"val": classes(names, samples)}, "--resume x")
    compare_classes({}, {"val": classes(names, samples)}, "--resume x")
    empty = {"class_names": list("abc"), "class_samples": {"val": [1, 2, -1]}}
    compare_classes(empty, {"val": classes("abc", (1, -1, 3))}, "--resume x")


@pytest.mark.parametrize(
    ("names", "samples", "found"),
    [
        ("abd", (), "class 2 is 'c' there and 'd' in the data (1 of 3 classes differ)"),
        (
            "acb",
            (),
            "class 1 is 'b' there and 'c' in the data (2 of 3 classes differ, the same names in another order)",
        ),
        ("abc", (2, 1, 3), "class 'a' of val/ has the images that 'b' had when the file was written"),
    ],
)
def test_classes_that_differ_are_named(names, samples, found):
    checkpoint = {"class_names": list("abc"), "class_samples": {"val": [1, 2, 3]}}
    with tiny.user_error("--resume x: " + found, "--allow-class-mismatch"):
        compare_classes(checkpoint, {"val": classes(names, samples)}, "--resume x")
    compare_classes(checkpoint, {"val": classes(names, samples)}, "--resume x", allow_mismatch=True)
