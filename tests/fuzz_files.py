"""Mutate the files that a run reads, and read them: `python tests/fuzz_files.py --mutations 2000 --seed 0`.

Each mutated file must be read or refused in one line. An exception of another kind, a signal, more than 5 seconds or
more than 1 GiB of memory is a finding, which is printed with the number that repeats it (`--only NUMBER`).
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import flags
import main
import packs
import utils
from augment import open_rgb
from datasets import DataOptions, read_sources
from teachers import Labels, LogProbabilities, TeacherCache, check_fingerprint
from tools import summarize
from tools.pack_dataset import encode, write_pack
from tools.runs import read_run

SECONDS, GIB = 5, 2**20  # ru_maxrss is in KiB
AT_ONCE = 50  # mutations that one process reads
NAMES = types.SimpleNamespace(class_names=("a", "b", "c"), class_samples=())
SETTINGS = {
    "seed": 0,
    "input_size": [32, 32],
    "mixup": 0.8,
    "teacher_weights": "abc",
    "augmentation": {"where": "host"},
}
CODECS = {"labels": Labels(3), "probabilities": LogProbabilities(3, 2)}
TINY = (
    "--model deit_tiny_patch16_224 --patch-size 8 --input-size 16 --model-kwargs embed_dim=24 depth=1 num_heads=3 "
    "--data-set DIGITS --num-workers 0 --device cpu --epochs 1 --warmup-epochs 0 --train-fraction 0.05 --batch-size 4"
)


# -- sound files, and how a run reads them -----------------------------------------------------------------------------


def make_checkpoint(folder):
    main.cli([*TINY.split(), "--output-dir", str(folder)])


def read_checkpoint(folder):
    path = str(folder / checkpoints.LATEST)
    checkpoints.find_checkpoint("auto", str(folder), is_main=True)
    args = flags.parse_command(["--eval", "--resume", path])
    checkpoint = checkpoints.read_checkpoint(path, "--resume")
    checkpoints.weights_of(checkpoint, "--resume", path)
    checkpoints.ema_of(checkpoint, "--resume", path)
    checkpoints.trained_size(checkpoint)
    checkpoints.compare_classes(checkpoint, {"train": NAMES}, f"--resume {path}")
    checkpoints.changes(checkpoint, {"args": vars(args), "run": {}}, flags.TRAINED)


def picture(number):
    noise = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((20, 16))


def make_pack(folder, kind):
    about = {"kind": kind, "size": 16, "quality": 90 if kind == "jpeg" else None}
    records = [encode(picture(number), number % 3, **about) for number in range(6)]
    parts = {"train": records, "val": records[:3]}
    write_pack(folder, parts, **about, num_classes=3, class_names=NAMES.class_names, shard_bytes=2000)


def read_pack(folder):
    for source in read_sources(DataOptions("PACKED", str(folder))):
        for position in range(len(source)):
            source[position]


def make_cache(folder):
    check_fingerprint(folder, SETTINGS, NAMES)
    for name, codec in CODECS.items():
        (folder / name).mkdir()
        cache = TeacherCache(folder / name, codec, 12, 0, 1)
        for epoch, count in enumerate((12, 7)):  # a finished file, and one that is begun
            cache.open(epoch)
            cache.write(np.arange(count), codec.encode(torch.eye(3).repeat(4, 1)[:count]))
            cache.close()


def read_fingerprint(folder):
    check_fingerprint(folder, SETTINGS, NAMES)


def read_predictions(folder):
    for name, codec in CODECS.items():
        cache = TeacherCache(folder / name, codec, 12, 0, 1)
        for epoch in range(2):
            cache.open(epoch)
            rows = cache.read(np.arange(12))
            codec.decode(rows[~codec.missing(rows)], torch.device("cpu"))


def make_log(folder):
    for epoch in range(3):
        utils.append_log(folder, {"train_loss": 2.5 / (epoch + 1), "test_acc1": 10.0 * epoch, "epoch": epoch})


def read_log(folder):
    summarize.table([summarize.summarize_run(read_run(folder))])
    utils.open_log(folder, 2)
    assert all(record["epoch"] < 2 for record in utils.read_log(folder))


def make_annotations(folder):
    for part in ("train", "val"):
        about = {
            "images": [{"id": number, "file_name": f"{part}{number}.png"} for number in range(3)],
            "annotations": [{"image_id": number, "category_id": number} for number in range(3)],
            "categories": [{"id": number, "name": name} for number, name in enumerate("abc")],
        }
        (folder / f"{part}2018.json").write_text(json.dumps(about))
        for number in range(3):
            picture(number).save(folder / f"{part}{number}.png")


def read_annotations(folder):
    for source in read_sources(DataOptions("INAT", str(folder))):
        for position in range(len(source)):
            source[position]


def make_images(folder):
    for kind in ("png", "jpg", "ppm", "bmp", "tif", "webp", "gif"):
        picture(0).save(folder / f"0.{kind}")


def read_images(folder):
    for path in folder.iterdir():
        try:
            open_rgb(path)
        except OSError as error:
            assert "\n" not in str(error)


def make_config(folder):
    (folder / "config.json").write_text(json.dumps({**SETTINGS, "class_names": NAMES.class_names}, indent=1))


def read_config(folder):
    with contextlib.suppress(ValueError):
        utils.read_json(folder / "config.json")


def make_recipe(folder):
    (folder / "own.args").write_text("# a comment\n--epochs 3 --batch-size 8\n--output-dir 'a folder'\n--mixup=0.8\n")


def read_recipe(folder):
    flags.parse_args([f"@{folder / 'own.args'}"])


# name: how to make a folder of sound files, which of them is mutated, how it is read
SUBJECTS = {
    "checkpoint.pth": (make_checkpoint, "checkpoint.pth", read_checkpoint),
    "pack.json": (lambda folder: make_pack(folder, "uint8"), "pack.json", read_pack),
    "pack index": (lambda folder: make_pack(folder, "uint8"), "train_index.npy", read_pack),
    "pack index, jpeg": (lambda folder: make_pack(folder, "jpeg"), "train_index.npy", read_pack),
    "pack shard, jpeg": (lambda folder: make_pack(folder, "jpeg"), "train_00000.bin", read_pack),
    "fingerprint.json": (make_cache, "fingerprint.json", read_fingerprint),
    "cached predictions": (make_cache, "*/epoch_*.npy", read_predictions),
    "log.txt": (make_log, "log.txt", read_log),
    "annotations": (make_annotations, "train2018.json", read_annotations),
    "images": (make_images, "0.*", read_images),
    "config.json": (make_config, "config.json", read_config),
    "recipe": (make_recipe, "own.args", read_recipe),
}


# -- mutations ---------------------------------------------------------------------------------------------------------

NUMBERS = [
    "-1",
    "0",
    "1",
    "true",
    "null",
    "NaN",
    "-Infinity",
    "1e400",
    "0.5",
    str(2**31),
    str(2**63),
    "9" * 40,
    "9" * 5000,
]
TOKENS = [
    *NUMBERS,
    '""',
    '"\\u0000"',
    '"\\ud800"',
    '"../x"',
    '"/dev/zero"',
    "[]",
    "{}",
    "[[[[1]]]]",
    "[" * 100_000,
    '"x"' * 3,
]
VALUES = [
    None,
    True,
    -1,
    0,
    10**30,
    float("nan"),
    "",
    "\0",
    "\ud800",
    "../x",
    "x" * 10_000,
    [],
    {},
    [[[]]],
    {1: 2},
    b"\xff",
]


def hostile_tensors():
    yield torch.zeros(0)
    yield torch.zeros(1, dtype=torch.complex64)
    yield torch.zeros(1).expand(10**12, 1)
    yield torch.eye(3).to_sparse()
    yield torch.full((3,), float("nan"))
    yield torch.zeros(3, 5).T
    yield torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    yield torch.zeros(3, device="meta")


def mutated_bytes(content, rng):
    """Change a few positions of a file: bits, bytes, slices, tokens of text."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        position, length = rng.randrange(len(content) + 1), rng.choice((1, 2, 4, 8, 100))
        kind = rng.randrange(7)
        if kind == 0 and position < len(content):
            content[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[position : position + length] = rng.randbytes(min(length, len(content) - position))
        elif kind == 2:
            content[position : position + length] = rng.choice((b"\0", b"\xff")) * min(length, len(content) - position)
        elif kind == 3:
            del content[position : position + length]
        elif kind == 4:
            content[position:position] = content[rng.randrange(len(content) + 1) :][:length]
        elif kind == 5 and rng.random() < 0.3:
            del content[position:]
        else:
            tokens = list(re.finditer(rb"-?\d+(\.\d+)?|\"[^\"]*\"|\[[^\[\]]*\]|\{[^{}]*\}|null|true|false", content))
            if tokens:
                token = rng.choice(tokens)
                content[token.start() : token.end()] = rng.choice(TOKENS).encode()
    return bytes(content)


def mutated_values(value, rng):
    """Copy nested values with one of them replaced, dropped or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: each for name, each in value.items() if name != key}
        if rng.random() < 0.05:
            return {rng.choice([0, None, "x\ny", "x" * 5000]) if name == key else name: value[name] for name in value}
        return value | {key: mutated_values(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        return [*value[:-1], mutated_values(value[-1], rng)]
    return copy.deepcopy(rng.choice([*VALUES, *hostile_tensors()]))


def mutated_checkpoint(content, rng):
    """Mutate the values or the pickle of a checkpoint (with valid checksums), or its bytes."""
    kind = rng.randrange(3)
    stream = io.BytesIO()
    if kind == 0:
        return mutated_bytes(content, rng)
    if kind == 1:
        with contextlib.suppress(Exception):  # not everything can be saved
            torch.save(mutated_values(torch.load(io.BytesIO(content), weights_only=True), rng), stream)
            return stream.getvalue()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, mutated_bytes(part, rng) if name.endswith("data.pkl") else part)
    return stream.getvalue()


def mutated_array(content, rng):
    """Mutate bytes in the header or the records of a `.npy` file."""
    start = 10 + int.from_bytes(content[8:10], "little")
    header, records = content[:start], content[start:]
    if rng.random() < 0.3:
        return mutated_bytes(header, rng) + records
    records = bytearray(records)
    for _ in range(rng.choice((1, 1, 3))):
        position = rng.randrange(len(records))
        value = rng.choice((0, 1, 3, 255, 2**16 - 1, 2**31, 2**32 - 1)).to_bytes(4, "little")[: rng.choice((1, 2, 4))]
        records[position : position + len(value)] = value[: len(records) - position]
    return header + bytes(records)


def fit_checksums(path, folder, rng):
    """Update the checksums of a mutated array in most cases, so that later checks are tested, too."""
    if path.suffix != ".npy" or rng.random() < 0.2:
        return
    with contextlib.suppress(Exception):
        rows = np.load(path)
        if (folder / packs.PACK).exists():
            about = json.loads((folder / packs.PACK).read_text())
            about["splits"]["train"]["index_crc32"] = zlib.crc32(rows)
            (folder / packs.PACK).write_text(json.dumps(about))
        elif ".crc" in path.name:
            path.rename(path.with_name(f"{path.name.partition('.crc')[0]}.crc{zlib.crc32(rows):08x}.npy"))


def mutate(folder, pattern, rng):
    """Mutate one of the files that match the pattern."""
    path = rng.choice(sorted(folder.glob(pattern)))
    kinds = {".pth": mutated_checkpoint, ".npy": mutated_array}
    path.write_bytes(kinds.get(path.suffix, mutated_bytes)(path.read_bytes(), rng))
    fit_checksums(path, folder, rng)


# -- reading -----------------------------------------------------------------------------------------------------------


def outcome(read, folder):
    """Read the files of a folder; return `read`, `refused`, or a description of the wrong behavior."""
    try:
        read(folder)
    except (utils.UserError, utils.RunError) as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error!r}"
    except SystemExit as end:
        return "refused" if end.code == 2 else f"exit status {end.code}"
    except BaseException as error:
        frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        return f"{type(error).__name__}: {str(error)[:200]!r} in {' '.join(frames[-4:])}"
    return "read"


def attempt(subject, number, seed, sound, scratch):
    """Mutate a copy of a subject's sound files and read it."""
    _, pattern, read = SUBJECTS[subject]
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(sound / subject, scratch)
    mutate(scratch, pattern, random.Random(f"{seed} {number}"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = outcome(read, scratch)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return found if grown < GIB else f"{grown // 1024} MiB of memory ({found})"


def read_some(cases, seed, sound, scratch, pipe):
    """Read mutations one by one and report each; more than `SECONDS` for one ends the process with SIGALRM."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for subject, number in cases:
        signal.alarm(SECONDS)
        found = attempt(subject, number, seed, sound, scratch)
        signal.alarm(0)
        os.write(pipe, json.dumps(found).encode() + b"\n")


def fuzz(mutations, seed, folder, only=None, names=tuple(SUBJECTS)):
    """Run the mutations; return the outcomes by subject and the findings as (subject, number, description)."""
    os.environ["OMP_NUM_THREADS"] = "1"  # other threads would be missing in a forked process
    torch.set_num_threads(1)
    sound, scratch = folder / "sound", folder / "scratch"
    for subject in names:
        make, _, read = SUBJECTS[subject]
        (sound / subject).mkdir(parents=True)
        make(sound / subject)
        assert outcome(read, shutil.copytree(sound / subject, folder / "copies" / subject)) == "read", subject
    cases = [(names[number % len(names)], number) for number in range(mutations) if only in (None, number)]
    found = []
    while len(found) < len(cases):
        ours, theirs = os.pipe()
        process = os.fork()
        if not process:
            with contextlib.suppress(BaseException):
                read_some(cases[len(found) :][:AT_ONCE], seed, sound, scratch, theirs)
                os._exit(0)
            os._exit(1)
        os.close(theirs)
        with open(ours) as pipe:
            found += [json.loads(line) for line in pipe]
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status:
            ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            found.append(f"more than {SECONDS} s" if status == -signal.SIGALRM else ended)
    counts = {name: collections.Counter() for name in names}
    for (subject, _), what in zip(cases, found, strict=True):
        counts[subject][what if what in ("read", "refused") else "findings"] += 1
    findings = [(*case, what) for case, what in zip(cases, found, strict=True) if what not in ("read", "refused")]
    return counts, findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one mutation to repeat")
    parser.add_argument(
        "--subjects", nargs="+", choices=SUBJECTS, default=tuple(SUBJECTS), help="what is mutated, one after the other"
    )
    own = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        counts, findings = fuzz(own.mutations, own.seed, Path(temporary), own.only, own.subjects)
    for subject, count in counts.items():
        print(f"{subject:20} {count['read']:5} read {count['refused']:5} refused {count['findings']:5} findings")
    for subject, number, what in findings:
        print(f"{subject}, --only {number}: {what}")
    print(f"{own.mutations} mutations, seed {own.seed}: {len(findings)} findings")
    sys.exit(bool(findings))
