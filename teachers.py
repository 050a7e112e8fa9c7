"""Teachers: building and freezing them, and the cache of their predictions for every view of a run.

The views of a run are a function of its flags, Mixup and CutMix included, so a prediction that was computed once stays
valid. Each rank writes its own files only. A finished file has its checksum in its name:

    fingerprint.json                          what shaped the views and the predictions
    epoch_0007_rank1of4.part.npy              being written; rows whose bits are all ones are still missing
    epoch_0007_rank1of4.crc1a2b3c4d.npy       complete
"""

from __future__ import annotations

import errno
import fcntl
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import models
from augment import Normalization
from checkpoints import Classes, compare_classes, flags_of, read_checkpoint, trained_size, weights_of
from samplers import Batch
from utils import RunError, UserError, World, check_space, logger, map_array, read_json, regular_file, write_first

FLAG = "--teacher-cache"


# -- a live teacher ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherOptions:
    """The teacher and the cache of its predictions. The fields are flags of main.py."""

    teacher_model: str = "regnety_160"  # any model name of timm
    teacher_model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    teacher_path: str = ""  # its checkpoint
    teacher_pretrained: bool = False  # or timm's weights
    teacher_cache: str = ""  # folder of the cached predictions
    teacher_cache_topk: int = 50  # probabilities to cache per view, for soft distillation
    distillation_type: str = "none"  # "hard" or "soft"
    input_size: tuple[int, int] = (224, 224)  # height and width in pixels of the student's views
    teacher_input_size: tuple[int, int] | None = None  # to which they are resized for the teacher
    compile: bool = False  # compile the model

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of what the teacher sees."""
        return self.teacher_input_size or self.input_size


def build_teacher(
    options: TeacherOptions, num_classes: int, student_normalization: Normalization, device: torch.device
) -> FrozenTeacher:
    """The frozen teacher on the device, for batches of this (mean, std).

    Raises:
        UserError: see `load_teacher`.
    """
    model = models.place(load_teacher(options, num_classes), device)
    if options.compile:
        model.compile()
    return FrozenTeacher(model, models.normalization(model), student_normalization, options.size)


def load_teacher(options: TeacherOptions, num_classes: int) -> nn.Module:
    """Build a teacher with its weights.

    Raises:
        UserError: unknown model, no weights, or weights that do not fit the model or have another number of classes.
    """
    name, path, pretrained = options.teacher_model, options.teacher_path, options.teacher_pretrained
    if not path and not pretrained:
        raise UserError(
            "--distillation-type: the teacher has no weights; add --teacher-path FILE or --teacher-pretrained"
        )
    if path:
        checkpoint = read_checkpoint(path, "--teacher-path")
    teacher = models.create_model(
        name,
        flag="--teacher-model",
        num_classes=None if pretrained else num_classes,
        input_size=options.size,
        pretrained=pretrained,
        **options.teacher_model_kwargs,
    )
    if path:
        _check_teacher_model(flags_of(checkpoint), options)
        weights, size = weights_of(checkpoint, "--teacher-path", path), trained_size(checkpoint)
        models.load_weights(teacher, weights, "--teacher-path", path, models.COMPLETE, size)
    elif teacher.num_classes != num_classes:
        raise UserError(
            f"--teacher-pretrained: {name} has {teacher.num_classes} classes, the data have {num_classes}; train a "
            f"teacher on this data set first and pass it as --teacher-path"
        )
    models.try_out(teacher, f"--teacher-model {name}", options.size, "--teacher-input-size")
    return teacher


def _check_teacher_model(trained: Mapping[str, Any], options: TeacherOptions) -> None:
    """Refuse a model whose settings are not those of the run that wrote the checkpoint."""
    if "model" not in trained:
        return
    also = ("patch_size", "drop_loc", "fuse_token")  # flags of their own there, keyword arguments here
    kwargs = trained.get("model_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise UserError(
            f"--teacher-path {options.teacher_path}: its model_kwargs are not a dictionary; give another file"
        )
    kwargs |= {name: trained[name] for name in also if trained.get(name) is not None}
    here = {key: value for key, value in options.teacher_model_kwargs.items() if key not in ("keep_rate", "img_size")}
    there = {"model": trained["model"], "model_kwargs": kwargs}
    here = {"model": options.teacher_model, "model_kwargs": here}
    models.refuse_another_model(here, there, f"--teacher-path {options.teacher_path}", "--teacher-")


class FrozenTeacher:
    """Logits of a frozen model for the images that the student sees.

    Args:
        model: takes images [B, 3, H, W] in its own normalization, gives logits [B, C].
        normalization, student_normalization: (mean, std) per channel, of the model and of the batches.
        size: (H, W) to which batches of another size are resized, bicubic like the views; None leaves them as they are.
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
        # ((x · student_std + student_mean) - mean) / std as one multiplication and one addition
        self.scale, self.shift = student_std / std, (student_mean - mean) / std

    @torch.no_grad()
    def __call__(self, batch: Batch) -> torch.Tensor:
        images = batch.images * self.scale + self.shift
        if self.size and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images).float()


# -- what is cached ----------------------------------------------------------------------------------------------------


def _sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, for which nobody waits: of page-locked memory, if it is a GPU."""
    tensor = torch.from_numpy(values)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Labels:
    """The arg-max class, two bytes a view: all that hard distillation asks for."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.dtype = np.dtype([("label", "<u2")])

    def encode(self, logits: torch.Tensor) -> np.ndarray:
        """logits [B, C] -> records [B]."""
        rows = np.empty(len(logits), self.dtype)
        rows["label"] = logits.argmax(dim=1).cpu().numpy()
        return rows

    def decode(self, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """Records [B] -> [B, C] with a one at the class: logits with the same arg-max."""
        labels = _sent(rows["label"].astype(np.int64), device)
        return F.one_hot(labels, self.num_classes).float()

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Which records, bool [B], were never written."""
        return rows["label"] == 0xFFFF

    def impossible(self, rows: np.ndarray) -> np.ndarray:
        """Which records, bool [B], `encode` never makes; missing ones are not among them."""
        return (rows["label"] >= self.num_classes) & ~self.missing(rows)


class LogProbabilities:
    """The k largest log-probabilities as float16; what is left of the mass is spread evenly over the other classes.

    Args:
        num_classes: C.
        topk: k; C stores all of them, in order and without their classes.
    """

    def __init__(self, num_classes: int, topk: int) -> None:
        self.num_classes, self.topk = num_classes, min(topk, num_classes)
        fields = [] if self.topk == num_classes else [("classes", "<u2", (self.topk,))]
        self.dtype = np.dtype([*fields, ("values", "<f2", (self.topk,))])

    def encode(self, logits: torch.Tensor) -> np.ndarray:
        """logits [B, C] -> records [B]."""
        values = F.log_softmax(logits.float(), dim=1).clamp(min=-60000)  # float16 ends at -65504
        rows = np.empty(len(logits), self.dtype)
        if self.topk < self.num_classes:
            values, classes = values.topk(self.topk, dim=1)
            rows["classes"] = classes.cpu().numpy()
        rows["values"] = values.cpu().numpy()
        return rows

    def decode(self, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """Records [B] -> log-probabilities [B, C], which serve as logits at any temperature."""
        values = _sent(rows["values"].astype(np.float32), device)
        if self.topk == self.num_classes:
            return values
        rest = (1 - values.exp().sum(dim=1, keepdim=True)).clamp(min=1e-8) / (self.num_classes - self.topk)
        classes = _sent(rows["classes"].astype(np.int64), device)
        return rest.log().repeat(1, self.num_classes).scatter(1, classes, values)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Which records, bool [B], were not written to the end."""
        unwritten = np.isnan(rows["values"]).any(axis=1)
        return unwritten | (rows["classes"] == 0xFFFF).any(axis=1) if "classes" in rows.dtype.names else unwritten

    def impossible(self, rows: np.ndarray) -> np.ndarray:
        """Which records, bool [B], `encode` never makes; missing ones are not among them."""
        wrong = (rows["values"] > 0).any(axis=1) | (rows["values"] == -np.inf).any(axis=1)
        if "classes" in rows.dtype.names:
            wrong |= (rows["classes"] >= self.num_classes).any(axis=1)
        return wrong & ~self.missing(rows)


# -- the files ---------------------------------------------------------------------------------------------------------


def _lock(path: Path, flags: int) -> TextIO:
    """Open a file, made if there is none, and lock it until it is closed, if its file system has locks.

    Raises:
        BlockingIOError: with LOCK_NB, if another process holds it.
        OSError: if it cannot be written, or is no regular file.
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
    """Predictions by (epoch, position) for one rank, whose positions are rank, rank + world_size, ...

    Args:
        codec: `Labels` or `LogProbabilities`.
        num_positions: N, the views of an epoch over all ranks.
        rank, world_size: this process among all.
    """

    def __init__(
        self, folder: Path, codec: Labels | LogProbabilities, num_positions: int, rank: int, world_size: int
    ) -> None:
        self.folder, self.codec = folder, codec
        self.num_positions, self.rank, self.world_size = num_positions, rank, world_size
        self.epoch = -1  # the one that is open
        self.files: dict[int, np.ndarray] = {}  # its records by the rank that wrote them
        self.writers = world_size  # number of these ranks
        self.left = 0  # views of this rank that are still missing
        self.lock: Any = None

    @property
    def views_of_rank(self) -> int:
        """How many views of an epoch are this rank's."""
        return len(range(self.rank, self.num_positions, self.world_size))

    def is_whole(self, epoch: int) -> bool:
        """Whether all ranks of some run have finished this epoch."""
        return bool(self._finished(epoch))

    def check_space(self, epochs: int) -> int:
        """Bytes that this many more epochs take, over all ranks.

        Raises:
            UserError: if the disk has less.
        """
        needed = epochs * self.num_positions * self.codec.dtype.itemsize
        remedy = "lower --teacher-cache-topk, or set --augmentation-epochs"
        check_space(self.folder, needed, f"{FLAG} {self.folder}: {epochs} epochs", remedy)
        return needed

    def _finished(self, epoch: int) -> list[Path]:
        """The finished files of an epoch by rank, if there is one of each rank."""
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
        """Turn to an epoch: for reading if it is finished, else for adding to it.

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
        """Let go of the open epoch."""
        self.epoch, self.files, self.left = -1, {}, 0
        if self.lock is not None:
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
                raise ValueError(f"record {wrong.argmax()} is no prediction")
            return rows
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            raise RunError(f"{FLAG}: {path} is damaged ({said}); delete it and precompute its epoch again") from None

    def _resume(self, epoch: int) -> np.ndarray:
        """This rank's unfinished file, made if there is none. Its lock is held as long as it is open."""
        path = self.folder / f"{self._stem(epoch)}.part.npy"
        try:
            self.lock = _lock(path.with_suffix(".lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists():
                # Written out in full: a file with holes would end the process when the disk is full.
                rows = np.empty(self.views_of_rank, self.codec.dtype)
                rows.view(np.uint8)[:] = 0xFF
                path.with_suffix(".new.npy").unlink(missing_ok=True)  # of a killed run
                np.save(path.with_suffix(".new.npy"), rows)
                path.with_suffix(".new.npy").replace(path)
        except BlockingIOError:
            raise RunError(f"{FLAG}: another run is adding to {path}; wait for it, or split the epochs") from None
        except OSError as error:
            raise RunError(
                f"{FLAG}: {path} cannot be written ({error.strerror}); fix that and repeat the command"
            ) from None
        rows = self._load(path, self.rank, "r+")
        self.left = int(self.codec.missing(rows).sum())
        return rows

    def next_missing(self) -> int:
        """How many of this rank's views, in its order, come before the first that is missing in the open epoch."""
        if not self.left:
            return self.views_of_rank
        return int(self.codec.missing(self.files[self.rank]).argmax())

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Records [B] at positions [B] of the open epoch."""
        rows = np.empty(len(positions), self.codec.dtype)
        for writer in np.unique(positions % self.writers):
            chosen = positions % self.writers == writer
            rows[chosen] = self.files[writer][positions[chosen] // self.writers]
        return rows

    def write(self, positions: np.ndarray, rows: np.ndarray) -> None:
        """Add records [B] at this rank's positions [B]; the last one that is missing finishes the file."""
        own, indices = self.files[self.rank], positions // self.world_size
        self.left -= int(self.codec.missing(own[indices]).sum())
        own[indices] = rows
        if not self.left:
            own.flush()
            path = self.folder / f"{self._stem(self.epoch)}.part.npy"
            path.replace(self.folder / f"{self._stem(self.epoch)}.crc{zlib.crc32(own):08x}.npy")
            path.with_suffix(".lock").unlink(missing_ok=True)


class CachedTeacher:
    """Cached predictions; missing ones are computed by the live teacher and added.

    Args:
        cache: the files.
        epoch: returns the epoch whose views the batches are.
        live: the teacher, or None if all predictions are there.
    """

    def __init__(
        self, cache: TeacherCache, epoch: Callable[[], int], live: Callable[[Batch], torch.Tensor] | None
    ) -> None:
        self.cache, self.epoch, self.live = cache, epoch, live

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits [B, C] with the arg-max (hard) or the probabilities (soft) of the teacher.

        Raises:
            RunError: if a prediction is missing and there is no teacher, or it is NaN, or a file is damaged.
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
            # In a file, NaN (of infinite logits as well) would look like a missing prediction.
            if logits.isnan().any() or codec.missing(rows).any():
                raise RunError(f"the teacher's logits in epoch {self.epoch()} are not finite; try --amp off")
            self.cache.write(positions, rows)
        return codec.decode(rows, batch.images.device)


# -- the run that a cache belongs to -----------------------------------------------------------------------------------


class ViewStream(Protocol):
    """The training loader, as far as a cache depends on it."""

    epoch: int
    num_positions: int  # views in an epoch, over all ranks
    augmentation: Mapping[str, str]  # where views are made, and by which versions


def build_cached_teacher(
    options: TeacherOptions,
    num_classes: int,
    views: ViewStream,
    epochs: range,
    student_normalization: Normalization,
    world: World,
) -> CachedTeacher:
    """The cached predictions of these epochs; the model itself only if predictions are missing.

    Raises:
        UserError: if the disk is too small, or predictions are missing and there is no teacher.
    """
    if num_classes >= 2**16:
        raise UserError(f"{FLAG}: holds classes below {2**16 - 1}, the data have {num_classes}; drop it")
    folder = Path(options.teacher_cache)
    hard = options.distillation_type == "hard"
    codec = Labels(num_classes) if hard else LogProbabilities(num_classes, options.teacher_cache_topk)
    cache = TeacherCache(folder, codec, views.num_positions, world.rank, world.size)
    missing = [epoch for epoch in epochs if not cache.is_whole(epoch)]
    live = None
    if missing:
        if not options.teacher_path and not options.teacher_pretrained:
            raise UserError(
                f"{FLAG} {folder}: {len(missing)} epochs are missing, the first is {missing[0]}; add "
                f"--teacher-path FILE or --teacher-pretrained, or precompute them"
            )
        needed = cache.check_space(len(missing))
        logger.info("%s: %d epochs are missing and will take %.1f MiB", folder, len(missing), needed / 2**20)
        live = build_teacher(options, num_classes, student_normalization, world.device)
    return CachedTeacher(cache, lambda: views.epoch, live)


def fingerprint(
    flags: Mapping[str, Any],
    label_checksum: int,
    views: ViewStream,
    student_normalization: Normalization,
    teacher_hash: str | None,
    precision: torch.dtype | None,
    world: World,
) -> dict[str, Any]:
    """All that shapes the views of a run and a teacher's predictions for them; None for what is not known here.

    Args:
        flags: those that shape them, by name.
        teacher_hash: of the teacher's file, "timm" for timm's weights.
    """
    flags = dict(flags)
    topk, batch_size = flags.pop("teacher_cache_topk"), flags.pop("batch_size")
    mixes = bool(flags["mixup"] or flags["cutmix"] or flags["cutmix_minmax"])
    return flags | {
        "views": views.num_positions,
        "labels": label_checksum,
        "normalization": student_normalization,
        "batch_size": batch_size if mixes else 0,  # this and the next decide what is mixed with what
        "processes": world.size if mixes else 0,
        "teacher_weights": teacher_hash,
        "precision": str(precision),
        "augmentation": views.augmentation,
        "topk": None if flags["distillation_type"] == "hard" else topk,
    }


def _shared_fingerprint(folder: Path, own: bytes) -> dict[str, Any]:
    """What a cache's fingerprint says. Of many processes that find none, one stores its own for all.

    Raises:
        UserError: if it cannot be read or written, or is none.
    """
    path = folder / "fingerprint.json"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # `write_first` needs hard links, which some file systems lack; others lack locks.
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
    folder: Path, fingerprint: Mapping[str, Any], classes: Classes, allow_mismatch: bool = False
) -> None:
    """Make sure that a cache belongs to these views and this teacher; a new cache stores the fingerprint.

    A value of None is not known, and not compared.

    Args:
        classes: the data.
        allow_mismatch: warn of class names that differ.

    Raises:
        UserError: naming the fields that differ, or the first class whose name does.
    """
    content = {**fingerprint, "class_names": list(classes.class_names)}
    found = _shared_fingerprint(folder, (json.dumps(content, indent=1) + "\n").encode())
    known = {"class_names": found.pop("class_names", [])}
    compare_classes(known, {"train": classes}, f"{FLAG} {folder}", allow_mismatch)
    ours = json.loads(json.dumps(fingerprint))  # tuples become lists, as they did in the file
    differing = [
        f"{name} ({reprlib.repr(found.get(name))} there, {reprlib.repr(ours.get(name))} here)"
        for name in {**found, **ours}
        # flags that are newer than the cache are missing there: they had no effect
        if ours.get(name) is not None and (found.get(name) or None) != (ours.get(name) or None)
    ]
    if differing:
        raise UserError(f"{FLAG} {folder}: is of another run: {', '.join(differing)}; match the flags, or name another")
