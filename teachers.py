"""Teachers: building frozen teachers, and caching their predictions for all views of a run.

The views of a run, including Mixup and CutMix, depend only on its flags, so cached predictions stay valid. Each rank
writes its own files. The name of a finished file contains its checksum:

    fingerprint.json                          what the views and predictions depend on
    epoch_0007_rank1of4.part.npy              unfinished; a row whose bits are all ones is missing
    epoch_0007_rank1of4.crc1a2b3c4d.npy       finished
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import models
import models_evit
from augment import Normalization
from checkpoints import (
    Classes,
    as_json,
    changed_samples,
    compare_classes,
    flags_of,
    read_checkpoint,
    trained_size,
    weights_of,
)
from samplers import Batch
from sources import Source
from utils import (
    RunError,
    UserError,
    World,
    check_space,
    logger,
    map_array,
    read_json,
    regular_file,
    remove_temporary,
    whole_file,
    write_first,
)

FLAG = "--teacher-cache"


# -- a live teacher ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherOptions:
    """Options of the teacher and of the cache of its predictions. The fields are flags of main.py."""

    teacher_model: str = "regnety_160"  # any timm model name
    teacher_model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    teacher_path: str = ""  # its checkpoint
    teacher_pretrained: bool = False  # or timm's weights
    teacher_cache: str = ""  # folder of the cached predictions
    teacher_cache_topk: int = 50  # probabilities to cache per view, for soft distillation
    distillation_type: str = "none"  # "hard" or "soft"
    input_size: tuple[int, int] = (224, 224)  # height and width of the student's views in pixels
    teacher_input_size: tuple[int, int] | None = None  # size to resize them to for the teacher
    compile: bool = False  # compile the model

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the teacher's input in pixels."""
        return self.teacher_input_size or self.input_size


def build_teacher(
    options: TeacherOptions, num_classes: int, student_normalization: Normalization, device: torch.device
) -> FrozenTeacher:
    """Build the frozen teacher on the device, for batches in the student's normalization.

    Raises:
        UserError: see `load_teacher`.
    """
    model = models.place(load_teacher(options, num_classes), device)
    if options.compile:
        model.compile(dynamic=False)
    return FrozenTeacher(model, models.normalization(model), student_normalization, options.size)


def load_teacher(options: TeacherOptions, num_classes: int) -> nn.Module:
    """Build a teacher with its weights, on the CPU.

    Raises:
        UserError: for an unknown model, missing weights, or weights of another model or number of classes.
    """
    name, path, pretrained = options.teacher_model, options.teacher_path, options.teacher_pretrained
    if not path and not pretrained:
        raise UserError(
            "--distillation-type: the teacher has no weights; add --teacher-path FILE or --teacher-pretrained"
        )
    models.refuse_unknown_name(name, "--teacher-model")
    kwargs = dict(options.teacher_model_kwargs)
    if path:
        checkpoint = read_checkpoint(path, "--teacher-path")
        _check_teacher_model(flags_of(checkpoint), options)
        kwargs |= _trained_rate(checkpoint, options)
    teacher = models.create_model(
        name,
        flag="--teacher-model",
        num_classes=None if pretrained else num_classes,
        input_size=options.size,
        pretrained=pretrained,
        **kwargs,
    )
    if path:
        weights, size = weights_of(checkpoint, "--teacher-path", path), trained_size(checkpoint)
        models.load_weights(teacher, weights, "--teacher-path", path, models.COMPLETE, size)
    elif teacher.num_classes != num_classes:
        raise UserError(
            f"--teacher-pretrained: {name} has {teacher.num_classes} classes, the data have {num_classes}; train a "
            f"teacher on this data set first and pass it as --teacher-path"
        )
    may_cut = models_evit.is_published(name)
    models.try_out(teacher, f"--teacher-model {name}", options.size, "--teacher-input-size", may_cut)
    return teacher


def _check_teacher_model(trained: Mapping[str, Any], options: TeacherOptions) -> None:
    """Refuse a teacher model whose settings differ from those of the checkpoint's run."""
    if "model" not in trained:
        return
    also = ("patch_size", "drop_loc", "fuse_token")  # flags of main.py, but keyword arguments of a teacher
    kwargs = trained.get("model_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise UserError(
            f"--teacher-path {options.teacher_path}: its model_kwargs are not a dictionary; give another file"
        )
    kwargs |= {name: trained[name] for name in also if trained.get(name) is not None}
    there = {"model": trained["model"], "model_kwargs": kwargs}
    here = {"model": options.teacher_model, "model_kwargs": options.teacher_model_kwargs}
    models.refuse_another_model(here, there, f"--teacher-path {options.teacher_path}", "--teacher-")


def _trained_rate(checkpoint: Mapping[str, Any], options: TeacherOptions) -> dict[str, Any]:
    """Return the keep rate that an EViT teacher was trained with, unless the options set one; log what differs."""
    trained, size = flags_of(checkpoint), trained_size(checkpoint)
    rate = models.trained_keep_rate(trained) if models_evit.may_be_evit(options.teacher_model) else None
    here = {"model": options.teacher_model, "input size": options.size}
    here["keep rate"] = options.teacher_model_kwargs.get("keep_rate", rate)
    there = {"model": trained.get("model"), "input size": size, "keep rate": rate}
    changed = [
        f"its {name} was {there[name]}, is {value}"
        for name, value in here.items()
        if there[name] is not None and as_json(there[name]) != as_json(value)
    ]
    if changed:
        logger.info("--teacher-path %s: differs from its training: %s", options.teacher_path, "; ".join(changed))
    return {} if here["keep rate"] is None else {"keep_rate": here["keep rate"]}


class FrozenTeacher:
    """A frozen model that computes logits [B, C] for the student's batches.

    Args:
        model: maps images [B, 3, H, W] in its own normalization to logits [B, C].
        normalization, student_normalization: per-channel (mean, std) of the model and of the batches.
        size: (H, W) to resize batches to, bicubically like the views; None to leave them as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        normalization: Normalization,
        student_normalization: Normalization,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.size = model.eval().requires_grad_(False), size
        device = next(model.parameters()).device
        mean, std, student_mean, student_std = (
            torch.tensor(list(values), dtype=torch.float32, device=device).view(1, -1, 1, 1)
            for values in (*normalization, *student_normalization)
        )
        # ((x · student_std + student_mean) - mean) / std as one multiply and one add
        self.scale, self.shift = student_std / std, (student_mean - mean) / std

    @torch.no_grad()
    def __call__(self, batch: Batch) -> torch.Tensor:
        images = batch.images * self.scale + self.shift
        if self.size and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        if torch.is_autocast_enabled(device := images.device.type):
            models.select_attention(self.model, torch.get_autocast_dtype(device))
        return self.model(images).float()


# -- what is cached ----------------------------------------------------------------------------------------------------


def _sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy to the device without a sync, on a GPU from pinned memory."""
    tensor = torch.from_numpy(values)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Labels:
    """Codec of arg-max classes for hard distillation, two bytes per view."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.dtype = np.dtype([("label", "<u2")])

    def encode(self, logits: torch.Tensor) -> np.ndarray:
        """Convert logits [B, C] to records [B]."""
        rows = np.empty(len(logits), self.dtype)
        rows["label"] = logits.argmax(dim=1).cpu().numpy()
        return rows

    def decode(self, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """Convert records [B] to one-hot logits [B, C], which have the same arg-max."""
        labels = _sent(rows["label"].astype(np.int64), device)
        return F.one_hot(labels, self.num_classes).float()

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Return which records were never written, bool [B]."""
        return rows["label"] == 0xFFFF

    def impossible(self, rows: np.ndarray) -> np.ndarray:
        """Return which records `encode` can never produce, bool [B]; missing records are excluded."""
        return (rows["label"] >= self.num_classes) & ~self.missing(rows)


class LogProbabilities:
    """Codec of the k largest log-probabilities in float16; the other classes share the remaining mass evenly.

    Args:
        num_classes: C.
        topk: k; with k = C, all are stored in class order, without class indices.
    """

    def __init__(self, num_classes: int, topk: int) -> None:
        self.num_classes, self.topk = num_classes, min(topk, num_classes)
        fields = [] if self.topk == num_classes else [("classes", "<u2", (self.topk,))]
        self.dtype = np.dtype([*fields, ("values", "<f2", (self.topk,))])

    def encode(self, logits: torch.Tensor) -> np.ndarray:
        """Convert logits [B, C] to records [B]."""
        values = F.log_softmax(logits.float(), dim=1).clamp(min=-60000)  # the lowest float16 is -65504
        rows = np.empty(len(logits), self.dtype)
        if self.topk < self.num_classes:
            values, classes = values.topk(self.topk, dim=1)
            rows["classes"] = classes.cpu().numpy()
        rows["values"] = values.cpu().numpy()
        return rows

    def decode(self, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """Convert records [B] to log-probabilities [B, C], which serve as logits at any temperature."""
        values = _sent(rows["values"].astype(np.float32), device)
        if self.topk == self.num_classes:
            return values
        rest = (1 - values.exp().sum(dim=1, keepdim=True)).clamp(min=1e-8) / (self.num_classes - self.topk)
        classes = _sent(rows["classes"].astype(np.int64), device)
        return rest.log().repeat(1, self.num_classes).scatter(1, classes, values)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Return which records were not fully written, bool [B]."""
        unwritten = np.isnan(rows["values"]).any(axis=1)
        return unwritten | (rows["classes"] == 0xFFFF).any(axis=1) if "classes" in rows.dtype.names else unwritten

    def impossible(self, rows: np.ndarray) -> np.ndarray:
        """Return which records `encode` can never produce, bool [B]; missing records are excluded."""
        wrong = (rows["values"] > 0).any(axis=1) | (rows["values"] == -np.inf).any(axis=1)
        if "classes" in rows.dtype.names:
            wrong |= (rows["classes"] >= self.num_classes).any(axis=1)
        return wrong & ~self.missing(rows)


# -- the files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors in writing a file of the cache into one line."""
    try:
        yield
    except BlockingIOError:
        raise RunError(f"{FLAG}: another run is adding to {path}; wait for it, or split the epochs") from None
    except OSError as error:
        why = error.strerror or "the disk or a quota is full"  # NumPy only counts what it could not write
        raise RunError(f"{FLAG}: {path} cannot be written ({why}); fix that and repeat the command") from None


def _lock(path: Path, flags: int) -> TextIO:
    """Open a file, creating it if needed, and lock it until it is closed, if the file system supports locks.

    Raises:
        BlockingIOError: with LOCK_NB, if another process holds the lock.
        OSError: if the file cannot be written, or is not a regular file.
    """
    if path.exists():
        regular_file(path)
    stream = path.open("a")
    try:
        fcntl.flock(stream, flags)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            stream.close()
            raise
    return stream


class TeacherCache:
    """Cache files of one rank: predictions by (epoch, position), for positions rank, rank + world_size, ...

    Args:
        codec: `Labels` or `LogProbabilities`.
        num_positions: N, views per epoch over all ranks.
        rank, world_size: this process among all.
    """

    def __init__(
        self, folder: Path, codec: Labels | LogProbabilities, num_positions: int, rank: int, world_size: int
    ) -> None:
        self.folder, self.codec = folder, codec
        self.num_positions, self.rank, self.world_size = num_positions, rank, world_size
        self.epoch = -1  # the open epoch
        self.files: dict[int, np.ndarray] = {}  # records of the open epoch, by the rank that wrote them
        self.writers = world_size  # number of ranks that wrote them
        self.left = 0  # views of this rank without a prediction
        self.lock: Any = None

    @property
    def views_of_rank(self) -> int:
        """This rank's views per epoch."""
        return len(range(self.rank, self.num_positions, self.world_size))

    def is_whole(self, epoch: int) -> bool:
        """Return True if the files of all ranks (of this or another run) are finished for this epoch."""
        return bool(self._finished(epoch))

    def check_space(self, epochs: int) -> int:
        """Return the bytes that this many more epochs need, over all ranks.

        Raises:
            UserError: if the disk has less free space.
        """
        needed = epochs * self.num_positions * self.codec.dtype.itemsize
        remedy = "lower --teacher-cache-topk, or set --augmentation-epochs"
        check_space(self.folder, needed, f"{FLAG} {self.folder}: {epochs} epochs", remedy)
        return needed

    def _finished(self, epoch: int) -> list[Path]:
        """Return the finished files of an epoch in order of rank, or [] if those of a rank are missing."""
        found: dict[int, dict[int, Path]] = {}
        for path in sorted(self.folder.glob(f"epoch_{epoch:04d}_rank*of*.crc*.npy")):
            numbers = re.search(r"_rank(\d+)of(\d+)\.crc", path.name)
            rank, writers = map(int, numbers.groups()) if numbers else (0, 0)
            if rank < writers:
                found.setdefault(writers, {})[rank] = path
        complete = [writers for writers, files in found.items() if len(files) == writers]
        writers = self.world_size if self.world_size in complete else min(complete, default=0)
        return [found[writers][rank] for rank in range(writers)]

    def open(self, epoch: int) -> None:
        """Switch to an epoch: for reading if it is finished, else for adding predictions.

        Raises:
            RunError: if a file is damaged, the disk is full, or another run is writing this epoch.
        """
        if epoch == self.epoch:
            return
        self.close()
        finished = self._finished(epoch)
        if finished:
            self.writers = len(finished)
            self.files = {rank: self._read(path, rank) for rank, path in enumerate(finished)}
        else:
            self.writers = self.world_size
            own = list(self.folder.glob(f"{self._stem(epoch)}.crc*.npy"))
            self.files = {self.rank: self._read(own[0], self.rank) if own else self._resume(epoch)}
        self.epoch = epoch

    def close(self) -> None:
        """Close the open epoch."""
        self.epoch, self.files, self.left = -1, {}, 0
        if self.lock is not None:
            with contextlib.suppress(OSError):  # closing alone would leave it to workers that were forked meanwhile
                fcntl.flock(self.lock, fcntl.LOCK_UN)
            self.lock.close()
            self.lock = None

    def _stem(self, epoch: int) -> str:
        return f"epoch_{epoch:04d}_rank{self.rank}of{self.world_size}"

    def _read(self, path: Path, rank: int) -> np.ndarray:
        rows = self._load(path, rank, "r")
        if f".crc{zlib.crc32(rows):08x}." not in path.name or self.codec.missing(rows).any():
            raise RunError(f"{FLAG}: {path} is damaged (wrong checksum); delete it and precompute its epoch again")
        return rows

    def _load(self, path: Path, rank: int, mode: str) -> np.ndarray:
        length = len(range(rank, self.num_positions, self.writers))
        try:
            rows = map_array(path, self.codec.dtype, length, mode)
            wrong = self.codec.impossible(rows)
            if wrong.any():
                raise ValueError(f"record {wrong.argmax()} is not a valid prediction")
            return rows
        except OSError as error:
            raise RunError(
                f"{FLAG}: {path} cannot be read ({error.strerror}); fix that and repeat the command"
            ) from None
        except ValueError as error:
            raise RunError(f"{FLAG}: {path} is damaged ({error}); delete it and precompute its epoch again") from None

    def _resume(self, epoch: int) -> np.ndarray:
        """Open this rank's unfinished file, creating it if needed; lock it while it is open."""
        path = self.folder / f"{self._stem(epoch)}.part.npy"
        with _writing(path):
            self.lock = _lock(path.with_suffix(".lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists():
                # Written in full: writing to a sparse memory-mapped file kills the process when the disk is full.
                rows = np.empty(self.views_of_rank, self.codec.dtype)
                rows.view(np.uint8)[:] = 0xFF
                remove_temporary(path)
                with whole_file(path, lambda stream: np.save(stream, rows)):
                    pass
        rows = self._load(path, self.rank, "r+")
        self.left = int(self.codec.missing(rows).sum())
        return rows

    def next_missing(self) -> int:
        """Return how many of this rank's views precede the first one without a prediction in the open epoch."""
        if not self.left:
            return self.views_of_rank
        return int(self.codec.missing(self.files[self.rank]).argmax())

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Return the records [B] at positions [B] of the open epoch."""
        rows = np.empty(len(positions), self.codec.dtype)
        for writer in np.unique(positions % self.writers):
            chosen = positions % self.writers == writer
            rows[chosen] = self.files[writer][positions[chosen] // self.writers]
        return rows

    def write(self, positions: np.ndarray, rows: np.ndarray) -> None:
        """Store records [B] at this rank's positions [B]; finish the file once no view is missing.

        Raises:
            RunError: if the finished file cannot be written.
        """
        own, indices = self.files[self.rank], positions // self.world_size
        self.left -= int(self.codec.missing(own[indices]).sum())
        own[indices] = rows
        if not self.left:
            path = self.folder / f"{self._stem(self.epoch)}.part.npy"
            with _writing(path):
                own.flush()
                path.replace(self.folder / f"{self._stem(self.epoch)}.crc{zlib.crc32(own):08x}.npy")
                path.with_suffix(".lock").unlink(missing_ok=True)


class CachedTeacher:
    """Cached predictions; missing ones are computed by the live teacher and added.

    Args:
        cache: the cache files.
        epoch: returns the epoch of the current views.
        live: the teacher, or None if no prediction is missing.
    """

    def __init__(
        self, cache: TeacherCache, epoch: Callable[[], int], live: Callable[[Batch], torch.Tensor] | None
    ) -> None:
        self.cache, self.epoch, self.live = cache, epoch, live

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return logits [B, C] with the teacher's arg-max (hard) or probabilities (soft).

        Raises:
            RunError: if a prediction is missing and there is no teacher, a prediction is NaN, or a file is damaged.
        """
        self.cache.open(self.epoch())
        positions, codec = batch.positions.numpy(), self.cache.codec
        rows = self.cache.read(positions)
        if codec.missing(rows).any():
            if self.live is None:
                raise RunError(
                    f"{FLAG}: predictions of epoch {self.epoch()} are missing; add --precompute-teacher first"
                )
            logits = self.live(batch)
            rows = codec.encode(logits)
            # In a file, NaN (which infinite logits lead to as well) would look like a missing prediction.
            if logits.isnan().any() or codec.missing(rows).any():
                raise RunError(f"the teacher's logits in epoch {self.epoch()} are not finite; try --amp off")
            self.cache.write(positions, rows)
        return codec.decode(rows, batch.images.device)


# -- the run that a cache belongs to -----------------------------------------------------------------------------------


class ViewStream(Protocol):
    """The properties of a training loader that a cache depends on."""

    epoch: int
    num_positions: int  # views in an epoch, over all ranks
    augmentation: Mapping[str, str]  # where views are made, and by which package versions


def build_cached_teacher(
    options: TeacherOptions,
    num_classes: int,
    views: ViewStream,
    epochs: range,
    student_normalization: Normalization,
    world: World,
) -> CachedTeacher:
    """Build the cached teacher for these epochs; load the live teacher only if predictions are missing.

    Raises:
        UserError: if the disk is too small, or if predictions are missing and there is no teacher.
    """
    if num_classes >= 2**16:
        raise UserError(f"{FLAG}: supports fewer than {2**16} classes, the data have {num_classes}; drop the flag")
    folder = Path(options.teacher_cache)
    hard = options.distillation_type == "hard"
    codec = Labels(num_classes) if hard else LogProbabilities(num_classes, options.teacher_cache_topk)
    cache = TeacherCache(folder, codec, views.num_positions, world.rank, world.size)
    missing = [epoch for epoch in epochs if not cache.is_whole(epoch)]
    live = None
    if missing:
        if not options.teacher_path and not options.teacher_pretrained:
            raise UserError(
                f"{FLAG} {folder}: has no predictions for {len(missing)} epochs, the first is {missing[0]}; add "
                f"--teacher-path FILE or --teacher-pretrained to compute them"
            )
        needed = cache.check_space(len(missing))
        logger.info("%s: predictions of %d epochs are missing, %.1f MiB", folder, len(missing), needed / 2**20)
        live = build_teacher(options, num_classes, student_normalization, world.device)
    return CachedTeacher(cache, lambda: views.epoch, live)


def fingerprint(
    flags: Mapping[str, Any],
    data: Source,
    views: ViewStream,
    student_normalization: Normalization,
    teacher_hash: str | None,
    precision: torch.dtype | None,
    world: World,
) -> dict[str, Any]:
    """Return everything that a run's views and the teacher's predictions depend on; None for unknown values.

    Args:
        flags: the flags among it, by name.
        teacher_hash: SHA-256 of the teacher's file, or "timm" for timm's weights.
    """
    flags = dict(flags)
    topk, batch_size = flags.pop("teacher_cache_topk"), flags.pop("batch_size")
    mixes = bool(flags["mixup"] or flags["cutmix"] or flags["cutmix_minmax"])
    return flags | {
        "views": views.num_positions,
        "labels": data.label_checksum(),
        "files": zlib.crc32(data.file_names()),
        "samples": list(data.class_samples) or None,  # of the content of these files
        "normalization": student_normalization,
        "batch_size": batch_size if mixes else 0,  # with Mixup, these two decide which images are mixed
        "processes": world.size if mixes else 0,
        "teacher_weights": teacher_hash,
        "precision": str(precision),
        "augmentation": views.augmentation,
        "topk": None if flags["distillation_type"] == "hard" else topk,
    }


# Parts of a fingerprint: without a teacher its weights are not known, caches of earlier versions have no files or
# samples, and hard predictions no top k.
MAY_BE_UNKNOWN = ("teacher_weights", "files", "samples", "topk")


def _shared_fingerprint(folder: Path, own: bytes) -> dict[str, Any]:
    """Return a cache's stored fingerprint; if there is none, store `own` (one of many processes does).

    Raises:
        UserError: if the file cannot be read or written, or is not a fingerprint.
    """
    path = folder / "fingerprint.json"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # `write_first` needs hard links, a lock does not. A file system may lack either one.
            with _lock(folder / "fingerprint.lock", fcntl.LOCK_EX):
                write_first(path, own)
        found = read_json(path)
        names = found["class_names"] if isinstance(found, dict) and "class_names" in found else []
        if not isinstance(found, dict) or not isinstance(names, list) or not all(type(n) is str for n in names):
            raise ValueError("not what a run has written")
    except OSError as error:
        where = Path(error.filename or path).name
        raise UserError(f"{FLAG} {folder}: {where} {error.strerror}; name another folder") from None
    except ValueError as error:
        raise UserError(f"{FLAG} {folder}: {path.name} cannot be read ({error}); name another folder") from None
    return found


def check_fingerprint(
    folder: Path, fingerprint: Mapping[str, Any], classes: Classes, allow_mismatch: bool = False, writes: bool = True
) -> None:
    """Check that a cache belongs to these views and this teacher; a new cache stores the fingerprint.

    `MAY_BE_UNKNOWN` are only compared if both sides know them.

    Args:
        classes: class names of the data.
        allow_mismatch: warn instead of raising if class names differ.
        writes: without, a new cache stores nothing.

    Raises:
        UserError: naming the fields that differ, or the first class whose name differs.
    """
    if not writes and not (folder / "fingerprint.json").exists():
        return
    content = {**fingerprint, "class_names": list(classes.class_names)}
    found = _shared_fingerprint(folder, (json.dumps(content, indent=1) + "\n").encode())
    known = {"class_names": found.pop("class_names", [])}
    compare_classes(known, {"train": classes}, f"{FLAG} {folder}", allow_mismatch)
    ours = json.loads(json.dumps(fingerprint))  # converts tuples to lists, as in the file
    if not changed_samples(found.get("samples"), ours.get("samples")):
        found = found | {"samples": None}  # the same, as far as both know
    differing = [
        f"{name} ({reprlib.repr(found.get(name))} there, {reprlib.repr(ours.get(name))} here)"
        for name in {**found, **ours}
        # Flags newer than the cache are missing there. They had no effect.
        if (found.get(name) or None) != (ours.get(name) or None)
        and not (name in MAY_BE_UNKNOWN and None in (found.get(name), ours.get(name)))
    ]
    if differing:
        raise UserError(
            f"{FLAG} {folder}: was computed with other flags or data: {', '.join(differing)}; pass the same ones, or "
            f"another folder"
        )
