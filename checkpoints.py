"""Checkpoint files: writing, finding them for `--resume auto`, checking, reading and downloading."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import numpy as np
import torch
from timm.models import clean_state_dict, get_pretrained_cfg, is_model, list_pretrained, model_entrypoint

from models_evit import KEEP_RATE, default_rate
from utils import (
    RunError,
    UserError,
    agree,
    is_utf8,
    logger,
    open_log,
    read_json,
    read_log,
    reason,
    regular_file,
    remove_temporary,
    temporary_name,
    whole_file,
    write_whole,
)

LATEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_previous.pth", "best.pth"


def _remove_temporary_files(folder: Path) -> None:
    """Remove the half-written files that killed processes left behind."""
    for name in (LATEST, PREVIOUS, BEST, "log.txt", "config.json"):
        remove_temporary(folder / name)


def on_host(value: Any) -> Any:
    """Copy tensors in nested dictionaries and lists to host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the attributes of a state_dict
        copied.update((key, on_host(each)) for key, each in value.items())
        return copied
    return type(value)(map(on_host, value)) if isinstance(value, (list, tuple)) else value


def save_checkpoint(checkpoint: Mapping[str, Any], folder: Path, is_best: bool) -> None:
    """Write `checkpoint.pth`, rename the earlier one to `checkpoint_previous.pth`, and update `best.pth` if `is_best`.

    Raises:
        RunError: if the disk is full or cannot be written. The earlier files stay intact.
    """
    latest = folder / LATEST
    try:
        with whole_file(latest, lambda stream: torch.save(dict(checkpoint), stream)) as new:
            # best.pth comes first. A run that is killed after it wrote `latest` never evaluates this epoch again.
            if is_best:
                _link(new, folder / BEST)
            if latest.exists():
                _link(latest, folder / PREVIOUS)
    except (OSError, RuntimeError) as error:
        why: BaseException | None = error  # torch.save turns a full disk into a RuntimeError of its zip writer
        while why is not None and not isinstance(why, OSError):
            why = why.__context__
        raise RunError(f"cannot write a checkpoint to {folder}: {reason(why or error)}") from error


def _link(source: Path, target: Path) -> None:
    """Give the file a second name; `target` is never half written."""
    temporary = temporary_name(target)
    # A killed process with the same pid may have left this hard link to `source`. Remove it: never write through it.
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:  # a file system without hard links
        write_whole(target, source.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)  # still there if `target` already was `source`


def is_whole(path: Path, checksums: bool = True) -> bool:
    """Check that a file in torch's zip format is complete and that its checksums match (torch ignores them).

    Compressed or overlapping records are refused: a small compressed record may expand to terabytes.
    """
    if not path.is_file():  # opening a FIFO would block
        return False
    try:
        with zipfile.ZipFile(path) as file:
            records = sorted(file.infolist(), key=lambda record: record.header_offset)
            ends = [*(record.header_offset for record in records[1:]), path.stat().st_size]
            stored = all(
                record.compress_type == zipfile.ZIP_STORED
                and record.header_offset + record.file_size <= end
                and record.compress_size == record.file_size
                for record, end in zip(records, ends, strict=True)
            )
            return stored and not (checksums and file.testzip())
    except Exception:  # a damaged zip directory can raise anything
        return False


def holds_checkpoint(folder: Path) -> bool:
    """Return True if `--resume auto` finds a run in this folder."""
    return any((folder / name).exists() for name in (LATEST, PREVIOUS))


def check_folder(folder: Path, resume: str, overwrite: bool) -> None:
    """Check that a run may write into an output folder.

    Args:
        resume: the checkpoint that is resumed, or ''.

    Raises:
        UserError: if the folder holds another run, later epochs or files of another program, which would be lost.
    """
    if overwrite:
        return
    if _is_in(resume, folder):
        return _check_newest(folder, resume)
    if not (holds_checkpoint(folder) or (folder / BEST).exists()):
        # A run that was killed after its first epoch may have a line and no checkpoint yet.
        if _count_logged(folder) > 1:
            raise UserError(
                f"--output-dir {folder}: holds the log.txt of an earlier run without checkpoints; name another folder, "
                "move the file, or add --overwrite"
            )
        if foreign := _foreign_file(folder):
            what = f"holds a {foreign} that is not of a run"
            raise UserError(f"--output-dir {folder}: {what}; name another folder, or add --overwrite")
        return
    of = f"another run than --resume {resume}" if resume else "an earlier run"
    remedy = "resume it with --resume auto, " if holds_checkpoint(folder) and not resume else ""
    raise UserError(f"--output-dir {folder}: holds {of}; {remedy}name another folder, or add --overwrite")


def _check_newest(folder: Path, resume: str) -> None:
    """Check that the newest checkpoint of a folder is not later than the one to resume."""
    resumed, newest = (_epoch_and_step(path) for path in (Path(resume), folder / LATEST))
    if resumed and newest and newest > resumed:
        raise UserError(
            f"--resume {resume}: is older than {folder / LATEST}, whose epochs would be lost; use --resume auto, "
            f"another --output-dir, or add --overwrite"
        )


def _epoch_and_step(path: Path) -> tuple[int, int] | None:
    """Return the counters of a checkpoint; None if it is missing or has none."""
    try:
        found = read_checkpoint(str(path), "--resume", mmap=True)
        return int(found["epoch"]), int(found["step"])
    except (UserError, LookupError, TypeError, ValueError):
        return None


def _count_logged(folder: Path) -> int:
    try:
        return len(read_log(folder))
    except OSError:  # there is no log.txt
        return 0


def _foreign_file(folder: Path) -> str:
    """Return the name of a file that a run would replace, but has not written; '' if there is none."""
    config, log = folder / "config.json", folder / "log.txt"
    if os.path.lexists(config):
        return "" if _is_of_a_run(config) else config.name
    # The first line of a run that was killed may be incomplete.
    return log.name if log.is_file() and log.stat().st_size and not _count_logged(folder) else ""


def _is_of_a_run(config: Path) -> bool:
    """Return True if a config.json is that of a run."""
    try:
        flags = read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(flags, dict) and {"model", "data_set"} <= flags.keys()


def _is_in(path: str, folder: Path) -> bool:
    """Return True if a file (not a URL, not '') is directly in a folder."""
    return bool(path) and "://" not in path and Path(path).parent.resolve() == folder.resolve()


def start_folder(folder: Path, resume: str, first_epoch: int, best_acc1: float) -> None:
    """Prepare the output folder of a run: remove files of other runs, keep those of the resumed run.

    If the resumed run wrote to another folder, its log and its `best.pth` are copied.

    Args:
        resume: the checkpoint that is resumed, or ''.
        first_epoch: the first epoch that this run will log.
        best_acc1: best top-1 of the run so far, in percent; below 0 if there is none.
    """
    if _is_in(resume, folder):
        _remove_temporary_files(folder)
        return open_log(folder, first_epoch)
    curves = folder / "tensorboard"  # of the run that is replaced
    old = [*curves.glob("events*"), curves / "wandb_id"] if _is_of_a_run(folder / "config.json") else []
    for path in (*(folder / name for name in (LATEST, PREVIOUS, BEST)), *old):
        path.unlink(missing_ok=True)
    _remove_temporary_files(folder)
    earlier = Path(resume).parent if resume and "://" not in resume else folder
    open_log(folder, first_epoch if resume else 0, earlier)
    if resume and best_acc1 >= 0:
        _bring_best(earlier / BEST, folder, best_acc1)


def _bring_best(best: Path, folder: Path, best_acc1: float) -> None:
    """Link the `best.pth` of the resumed run if its accuracy is `best_acc1`, else warn."""
    if best.is_file() and read_checkpoint(str(best), "--resume", mmap=True).get("best_acc1") == best_acc1:
        _link(best, folder / BEST)
    else:
        logger.warning(
            "the best.pth of the resumed run (%.2f %%) is not next to its checkpoint; %s is written once an epoch is "
            "better",
            best_acc1,
            folder / BEST,
        )


def find_checkpoint(resume: str, output_dir: str, is_main: bool) -> str:
    """Return the file that `--resume` means, the same on all ranks; '' for `auto` without a checkpoint.

    `auto` is the newest checkpoint in `output_dir`. If that file, or the `checkpoint.pth` that `resume` names, is
    damaged, the result is `checkpoint_previous.pth`. A damaged file in `output_dir` is renamed, so that it never
    becomes `checkpoint_previous.pth` itself.
    """
    automatic = resume == "auto"
    latest = Path(output_dir) / LATEST if automatic else Path(resume)
    if latest.name != LATEST or (automatic and not output_dir):
        return "" if automatic else resume
    previous = latest.with_name(PREVIOUS)
    choice = 0.0
    if is_main:
        # `and` stops early: the previous checkpoint is read only if it is needed.
        torn = latest.exists() and previous.exists() and not is_whole(latest) and is_whole(previous)
        lost = automatic and not latest.exists() and previous.exists() and is_whole(previous)
        choice = 2.0 if torn or lost else float(latest.exists())
        if torn:
            logger.warning("%s is damaged; resuming from %s", latest, previous)
            if Path(output_dir).resolve() == latest.parent.resolve():
                with contextlib.suppress(OSError):  # where a file cannot be renamed, the run cannot write either
                    os.replace(latest, latest.with_suffix(".damaged"))
    (choice,) = agree(choice)
    if automatic:
        resume = str(latest) if choice else ""
        logger.info("--resume auto: %s", resume or f"nothing in {output_dir} yet, a fresh start")
    return str(previous) if choice == 2 else resume


class _DType:
    """Stand-in for a pickled NumPy dtype: a code such as `f8`, then a state that starts with version and byte order."""

    def __init__(self, code: str, *_: bool) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _number(dtype: _DType, data: bytes) -> bool | int | float | complex | str | bytes:
    """Convert a pickled NumPy scalar to a Python number or string; refuse object dtypes, which may hold anything."""
    if not re.fullmatch(r"[biufc]\d+|[SU]\d+", dtype.code):
        raise ValueError(f"a NumPy scalar of type {dtype.code}")
    return np.frombuffer(data, np.dtype(dtype.code).newbyteorder(dtype.order)).item()


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


_PATHS = {"PosixPath": _posix_path, "PurePosixPath": _posix_path}
_PATHS |= {"WindowsPath": _windows_path, "PureWindowsPath": _windows_path}
# What other programs store in a checkpoint's `args`, by pickle name. None of these classes runs code. Paths become
# strings, because a Windows path cannot be built on Linux and vice versa.
_VALUES = [
    argparse.Namespace,
    (_DType, "numpy.dtype"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((read, f"pathlib.{name}") for name, read in _PATHS.items()),
    *((read, f"pathlib._local.{name}") for name, read in _PATHS.items()),  # Python 3.13
]


def read_checkpoint(path: str, flag: str, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file or https URL of tensors, numbers and strings, without executing anything in it.

    Args:
        path: a `.pth` file of `save_checkpoint` or of the original implementation, a `.safetensors` file, or an https
            URL of either with its SHA-256: `...#sha256=...`, or `NAME-1a2b3c4d5e6f7a8b.pth`.
        flag: the flag that named the file, for error messages.
        mmap: map tensors instead of reading them, and skip their checksums. Use it to read metadata only, or if another
            process on this machine verifies the checksums.

    Raises:
        UserError: if the file does not exist or is not a valid checkpoint.
    """
    if "://" in path:
        path = _download(path, flag)
    try:
        regular_file(path)
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; check the path") from None
    zipped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format
    if zipped and not is_whole(Path(path), checksums=not mmap):
        raise UserError(
            f"{flag} {path}: is damaged (wrong checksum, or records that overlap or are compressed); give another, "
            f"such as {PREVIOUS}"
        )
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            checkpoint = {"model": load_file(path)}
        else:
            with torch.serialization.safe_globals(_VALUES):
                # mmap bounds a record by the size of the file, whatever the record claims.
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and is_utf8(path))
    except Exception as error:
        raise UserError(
            f"{flag} {path}: not a readable checkpoint (truncated, another format, or it holds code, which is never "
            f"run); give a file of plain tensors such as checkpoint.pth or best.pth"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{flag} {path}: holds a {type(checkpoint).__name__}, not a checkpoint; give a checkpoint.pth")
    found = _odd_value(checkpoint)
    if found:
        raise UserError(f"{flag} {path}: {found}; give a file of plain tensors such as checkpoint.pth or best.pth")
    return checkpoint if mmap else copy.deepcopy(checkpoint)  # the file may be overwritten


_MOST_VALUES, _DEEPEST = 2**19, 50  # limits for one checkpoint
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TYPES += (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _odd_value(checkpoint: Mapping[Any, Any]) -> str:
    """Describe the first unsafe value (a tensor without its own storage, endless nesting), or return ''."""
    count, waiting = 0, [((), checkpoint)]  # (key path from the outside in, value)
    while waiting:
        names, value = waiting.pop()
        count += 1
        if count > _MOST_VALUES or len(names) > _DEEPEST:
            return "its values are nested without end"
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        wrong = ""
        if isinstance(value, torch.Tensor):
            wrong = _odd_tensor(value)
        elif isinstance(value, int) and value.bit_length() > 1000:
            wrong = f"a number of {value.bit_length()} bits"
        elif isinstance(value, Mapping):
            waiting += [((*names, key if isinstance(key, (str, int)) else "?"), each) for key, each in value.items()]
            waiting += [(names, key) for key in value if not isinstance(key, str)]  # popped first, so checked first
        elif isinstance(value, (list, tuple, set)):
            waiting += [((*names, index), each) for index, each in enumerate(value)]
        if wrong:
            return f"{'.'.join(map(str, names))[:200]} is {wrong}"
    return ""


def _odd_tensor(tensor: torch.Tensor) -> str:
    """Describe why a tensor is not a plain dense CPU tensor, or return ''."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
    if tensor.device.type != "cpu":
        return f"a tensor on the device {tensor.device}"
    if tensor.dtype not in _TYPES:
        return f"a tensor of type {tensor.dtype}"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"a tensor of shape {list(tensor.shape)} expanded from fewer values"
    return ""


def weights_of(checkpoint: Mapping[str, Any], flag: str, path: str) -> dict[str, torch.Tensor]:
    """Return the model's weights in a checkpoint: `model` (ours, original), `state_dict` (timm), or the whole file.

    Of DINO's `student` and `teacher`, the `teacher` is used, as in DINO's own evaluation.

    Raises:
        UserError: if the checkpoint holds no weights.
    """
    nested = (checkpoint.get(key) for key in ("model", "state_dict", "teacher"))
    inner = next((value for value in nested if isinstance(value, Mapping)), checkpoint)
    named = all(isinstance(key, str) for key in inner)
    weights = clean_state_dict(inner) if named else {}  # strips "module." and "_orig_mod."
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{flag} {path}: not a checkpoint of a model; give a file such as checkpoint.pth or best.pth")
    return dict(weights)


def ema_of(checkpoint: Mapping[str, Any], flag: str, path: str) -> dict[str, torch.Tensor] | None:
    """Return the EMA weights of a checkpoint: `model_ema` (ours, original) or `state_dict_ema` (timm); None without.

    Raises:
        UserError: if that entry does not hold weights.
    """
    averages = (checkpoint.get(key) for key in ("model_ema", "state_dict_ema"))
    average = next((value for value in averages if value is not None and value != {}), None)
    return None if average is None else weights_of({"model": average}, flag, path)


def unwrapped(
    weights: Mapping[str, torch.Tensor], names: Collection[str], flag: str, path: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Strip the prefix of a wrapper module, such as Lightning's `model.` or DINO's `backbone.`.

    Args:
        names: tensor names of the model that will load the weights.

    Returns:
        The model's tensors, and the names of all other tensors.

    Raises:
        UserError: if several prefixes match the model.
    """
    found = collections.Counter()
    for key in weights:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", key))]
        found.update(key[:start] for start in starts if key[start:] in names)
    prefixes = sorted(prefix for prefix, count in found.items() if count > len(names) / 2)
    if len(prefixes) > 1 and "" not in prefixes:
        raise UserError(f"{flag} {path}: holds several models ({', '.join(prefixes)}); save the one to load by itself")
    prefix = prefixes[0] if prefixes else os.path.commonprefix(list(weights)).rpartition(".")[0] + "."
    if not prefixes and (prefix == "." or any(name.startswith(prefix) for name in names)):
        prefix = ""  # only part of the model, or another model
    inner = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return inner, [key for key in weights if not key.startswith(prefix)]


def translated(weights: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Translate weights to timm's names with the model's `checkpoint_filter_fn`, if that can read them."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or ""
    module = model_entrypoint(name).__module__ if is_model(name) else type(model).__module__
    translate = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if translate is None:
        return dict(weights)
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(translate).parameters else {}
    # `load_weights` resizes this one, because it knows about distillation tokens. DINOv2 embeds the class token too.
    own = {key: weights[key] for key in ("pos_embed",) if key in weights and "mask_token" not in weights}
    try:
        found = translate({key: value for key, value in weights.items() if key not in own}, model, **options) | own
    except Exception:  # an unknown layout can raise anything
        return dict(weights)
    for key in found.keys() & weights.keys():
        if "pos" not in key and found[key].numel() != weights[key].numel():
            found[key] = weights[key]  # timm resizes patch embeddings too; a changed shape means another model
    return found


def trained_size(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the training image size (height, width) from a checkpoint's flags, or None."""
    size = flags_of(checkpoint).get("input_size")
    size = [size] if isinstance(size, int) else size  # an int in the original implementation, (C, H, W) in timm
    if not isinstance(size, (list, tuple)) or not size or not all(isinstance(side, int) and side > 0 for side in size):
        return None
    return size[-2:][0], size[-1]


# -- the state of an optimizer -----------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, checkpoint: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the optimizer state of a checkpoint, checked tensor by tensor (torch checks group sizes only).

    Each tensor is copied into the memory layout that the optimizer would use, which its kernels rely on.

    Raises:
        UserError: if the state does not fit this optimizer and these parameters.
    """
    try:
        _check_counters(checkpoint)
        saved, own = checkpoint["optimizer"], optimizer.state_dict()
        state = {key: dict(each) for key, each in saved["state"].items()}
        groups = [dict(group) for group in saved["param_groups"]]
        _check_groups(groups, own["param_groups"])
        examples = _examples(optimizer)
        unknown = state.keys() - range(len(examples))
        if unknown:
            raise ValueError(f"optimizer.state has {min(map(str, unknown))}, which is not a parameter")
        wanted = [index for index, (_, example) in enumerate(examples) if example]
        missing = [index for index in wanted if not state.get(index)]
        skipped = checkpoint.get("scaler") or any(_skipped(checkpoint))
        if missing and len(missing) == len(wanted) and checkpoint["step"] > 0 and not skipped:
            raise ValueError("optimizer.state is empty")
        if 0 < len(missing) < len(wanted):
            logger.warning("%s: %d of %d parameters have no optimizer state", path, len(missing), len(wanted))
        for index in state.keys() - set(missing):
            parameter, example = examples[index]
            state[index] = _fitted_state(state[index], parameter, example, f"optimizer.state.{index}")
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError, ArithmeticError) as error:
        raise no_training_state(path, error) from None
    return {"state": state, "param_groups": groups}


def no_training_state(path: str, error: Exception) -> UserError:
    """Build the error for a checkpoint whose training state raised `error`."""
    why = f"has no {error}" if isinstance(error, LookupError) else reason(error)
    return UserError(
        f"--resume {path}: has no training state that fits ({why}); start from its weights with --finetune, or pass "
        f"the --opt and --train-scope it was trained with"
    )


def _check_counters(checkpoint: Mapping[str, Any]) -> None:
    """Check that the counters from which a run continues are numbers.

    Raises:
        ValueError: naming the first one that is not.
    """
    progress = checkpoint.get("progress") or {"images": 0, "totals": []}
    numbers = {name: checkpoint[name] for name in ("epoch", "step")} | {"progress.images": progress["images"]}
    wrong = [name for name, value in numbers.items() if not (isinstance(value, int) and 0 <= value < 2**53)]
    more = {"best_acc1": checkpoint["best_acc1"]} | {
        f"scaler.{key}": each for key, each in checkpoint["scaler"].items()
    }
    more |= {f"progress.{key}": each for totals in progress["totals"] for key, each in totals.items()}
    more |= {f"broken_images.{index}": each for index, each in enumerate(checkpoint.get("broken_images") or [])}
    wrong += [name for name, value in more.items() if not _is_number(value)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {(numbers | more)[wrong[0]]}")


def _skipped(checkpoint: Mapping[str, Any]) -> list[float]:
    """Return, per rank, the updates skipped in this epoch because of a non-finite loss or gradient."""
    progress = checkpoint.get("progress") or {"totals": []}
    return [totals.get("skipped", 0) for totals in progress["totals"]]


def _check_groups(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Compare the number of parameters and the option types of each parameter group.

    Raises:
        ValueError: naming the first difference.
    """
    if len(saved) != len(own):
        raise ValueError(f"{len(saved)} groups of parameters, not {len(own)}")
    for number, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        if list(theirs["params"]) != ours["params"]:
            raise ValueError(f"{len(theirs['params'])} parameters in group {number}, not {len(ours['params'])}")
        for name in theirs.keys() & ours.keys() - {"params", "fused", "foreach"}:
            values = [
                group[name] if isinstance(group[name], (list, tuple)) else [group[name]] for group in (theirs, ours)
            ]
            # Switches such as `maximize` cannot be set by a flag of main.py.
            same = len(values[0]) == len(values[1]) and all(
                left == right or right is None or (_is_number(left) and _is_number(right))
                for left, right in zip(*values, strict=True)
            )
            if not same:
                raise ValueError(f"optimizer.param_groups.{number}.{name} is {theirs[name]}, here {ours[name]}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _examples(optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Return, for each parameter, an example tensor of its shape and layout and the optimizer state of that example.

    The states come from one step of a copy of the optimizer. Parameters of the same shape and layout share an example.
    """
    stand_ins: dict[Any, torch.Tensor] = {}
    memo: dict[int, Any] = {}  # deepcopy's memo: tensors that already have a copy
    positions = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            key = number, parameter.shape, parameter.stride(), parameter.dtype
            if key not in stand_ins:
                stand_ins[key] = torch.full_like(parameter.detach(), 0.1).requires_grad_()
                stand_ins[key].grad = torch.full_like(stand_ins[key], 1e-3)
            memo[id(parameter)] = stand_ins[key]
            positions.append(stand_ins[key])
    trial = _copy_for_trial(optimizer, memo)
    for group in trial.param_groups:
        group["params"] = list(dict.fromkeys(group["params"]))
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        trial.step()
    state = getattr(trial, "_base_optimizer", trial).state  # unwraps timm's Lookahead
    return [(stand_in.detach(), dict(state.get(stand_in) or {})) for stand_in in positions]


def _copy_for_trial(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """Copy an optimizer with all attributes, which deepcopy would drop, and one state per stand-in in `memo`.

    A new optimizer has a state only if it makes one before its first step, as Adagrad does in torch 2.11.
    """
    memo[id(optimizer.state)] = states = collections.defaultdict(dict)
    for parameter, state in optimizer.state.items():
        stand_in = memo.get(id(parameter))
        if stand_in is not None and stand_in not in states:
            states[stand_in] = copy.deepcopy(state, memo)
    memo[id(optimizer)] = twin = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        nested = isinstance(value, torch.optim.Optimizer)
        vars(twin)[name] = _copy_for_trial(value, memo) if nested else copy.deepcopy(value, memo)
    return twin


def _fitted_state(
    state: Mapping[str, Any], parameter: torch.Tensor, example: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Check the state of one parameter; extra tensors are allowed if they have the shape of the parameter."""
    missing = example.keys() - state.keys()
    if missing:
        raise ValueError(f"{name} has no {min(missing)}")
    return {key: _fitted(value, example.get(key, parameter), f"{name}.{key}") for key, value in state.items()}


def _fitted(value: Any, example: Any, name: str) -> Any:
    """Convert a stored optimizer value to the type, shape and layout that the optimizer uses.

    Raises:
        ValueError: if kind, shape or dtype differ, or a value is not finite.
    """
    if isinstance(example, (list, tuple)) and isinstance(value, (list, tuple)) and len(value) == len(example):
        pairs = enumerate(zip(value, example, strict=True))
        return type(example)(_fitted(left, right, f"{name}.{index}") for index, (left, right) in pairs)
    if isinstance(value, torch.Tensor) and _is_number(example) and value.numel() == 1:
        value = value.item()  # the step count is a tensor in some torch versions, a number in others
    if isinstance(example, torch.Tensor) and example.numel() == 1 and _is_number(value):
        value = torch.full_like(example, value)
    if isinstance(example, torch.Tensor) and isinstance(value, torch.Tensor):
        if value.shape != example.shape or value.dtype != example.dtype:
            shapes = [f"{list(each.shape)} of {each.dtype}" for each in (value, example)]
            raise ValueError(f"{name} is {shapes[0]}, not {shapes[1]}")
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
        return torch.empty_like(example).copy_(value.detach())
    if (_is_number(value) and _is_number(example)) or (type(value) is type(example) and value == example):
        return value
    raise ValueError(f"{name} is a {type(value).__name__}, not a {type(example).__name__}")


# -- training states of the original implementation --------------------------------------------------------------------


def as_ours(
    checkpoint: dict[str, Any], module: torch.nn.Module, optimizer: torch.optim.Optimizer, path: str, updates: int
) -> dict[str, Any]:
    """Convert a training state of the original DeiT or EViT code to our format; return any other checkpoint unchanged.

    In the original, `epoch` is the last finished epoch, and the optimizer state is keyed by each parameter's index in
    the parameter groups of an older timm.

    Args:
        module, optimizer: model and optimizer of this run.
        updates: optimizer updates per epoch of this run.

    Raises:
        UserError: if the optimizer state does not fit these parameters.
    """
    is_state = {"optimizer", "lr_scheduler", "epoch"} <= checkpoint.keys()
    if not is_state or checkpoint.keys() & {"progress", "run", "step"}:
        return checkpoint
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    own = [[name_of[id(each)] for each in group["params"]] for group in optimizer.param_groups]
    try:
        groups, saved = checkpoint["optimizer"]["param_groups"], checkpoint["optimizer"]["state"]
        epoch, flags = checkpoint["epoch"], flags_of(checkpoint)
        if not (isinstance(epoch, int) and epoch >= 0):
            raise ValueError(f"epoch is {epoch}")
        names = _original_order(list(weights_of(checkpoint, "--resume", path)), groups, module)
        unknown = saved.keys() - range(len(names))
        if unknown:
            raise ValueError(f"optimizer.state has {min(map(str, unknown))}, which is not a parameter")
        state_of = {name: saved[index] for index, name in enumerate(names) if index in saved}
        order = [name for members in own for name in members]
        for name, (_, example) in zip(order, _examples(optimizer), strict=True):
            # Without a teacher the distillation head has no gradient.
            if example and not state_of.get(name) and not name.startswith("head_dist."):
                raise ValueError(f"optimizer.state has nothing of {name}")
        ends = list(itertools.accumulate(map(len, own)))
        groups = [
            dict(groups[max(number - len(own), -len(groups))]) | {"params": list(range(end - len(members), end))}
            for number, (members, end) in enumerate(zip(own, ends, strict=True))
        ]
        state = {index: state_of[name] for index, name in enumerate(order) if name in state_of}
        scaler = dict(checkpoint.get("scaler") or {})
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError, ArithmeticError) as error:
        raise no_training_state(path, error) from None
    logger.warning(
        "%s is of the original implementation: the run continues with epoch %d, but not bitwise as it would there",
        path,
        epoch + 1,
    )
    return checkpoint | {
        "optimizer": {"state": state, "param_groups": groups},
        "scaler": scaler,
        "epoch": epoch + 1,
        "step": (epoch + 1) * updates,
        "progress": None,
        "best_acc1": -1.0,  # the original does not store it
        "args": flags,
        "run": {"processes": flags.get("world_size"), "precision": str(torch.float16)},
    }


def _original_order(weights: Sequence[str], groups: Sequence[Mapping[str, Any]], module: torch.nn.Module) -> list[str]:
    """Return the parameter names in the order of the original implementation's optimizer.

    Args:
        weights: tensor names in the original `state_dict`, whose order is that of the parameters.
        groups: parameter groups of the original optimizer: one group, or two (without and with weight decay).

    Raises:
        ValueError: if the groups do not match these parameters.
    """
    parameters = dict(module.named_parameters())
    trained = [name for name in weights if name in parameters and parameters[name].requires_grad]
    sizes = [len(group["params"]) for group in groups]
    if [index for group in groups for index in group["params"]] != list(range(len(trained))):
        raise ValueError(f"the optimizer has {sum(sizes)} parameters, not {len(trained)}")
    if len(sizes) == 1:
        return trained
    listed = set(module.no_weight_decay()) if hasattr(module, "no_weight_decay") else set()
    for exempt in (listed, listed - {"dist_token"}):  # with timm 0.3.2, DeiT's distillation token has weight decay
        bare = [n for n in trained if parameters[n].ndim == 1 or n.endswith(".bias") or n in exempt]
        if sizes == [len(bare), len(trained) - len(bare)]:
            return bare + [name for name in trained if name not in bare]
    raise ValueError(f"{sizes[0]} parameters without weight decay, not {len(bare)}")


def _our_flags(args: Mapping[str, Any]) -> dict[str, Any]:
    """Rename and convert flags of the original implementation to ours."""
    flags = dict(args)
    if isinstance(flags.get("input_size"), int):
        flags["input_size"] = [flags["input_size"]]
    if "drop_loc" in flags:
        flags["drop_loc"] = [int(layer) for layer in re.findall(r"\d+", str(flags["drop_loc"]))]
    if flags.get("data_set") == "CIFAR":
        flags["data_set"] = "CIFAR100"
    if str(flags.get("data_set")).startswith("INAT"):
        flags["inat_numbering"] = "original"
    if flags.get("ThreeAugment"):
        flags["aa"] = "3a"
    flags["train_scope"] = "attn" if flags.get("attn_only") else "all"
    flags["lr_scaling"] = "none" if flags.get("unscale_lr") else "linear"
    if flags.get("distributed") is False:  # a single process did not use repeated augmentation
        flags["repeated_aug"] = False
    numbers = [flags.get(name) for name in ("lr", "batch_size", "world_size")]
    if flags["lr_scaling"] == "linear" and all(_is_number(each) and 0 < each < 2**53 for each in numbers):
        rate, *images = numbers
        flags["lr"] = float(f"{rate * 512 / math.prod(images):.12g}")  # the checkpoint stores the scaled rate
    # The original passes base_keep_rate to every model, also to those with another default.
    rate = default_rate(str(flags.get("model"))) or KEEP_RATE
    usual = {"base_keep_rate": rate, "drop_loc": [3, 6, 9], "fuse_token": True}
    usual |= {"shrink_start_epoch": 10, "shrink_epochs": 0}
    return flags | {name: None for name, value in usual.items() if flags.get(name) == value}  # our default is None


# -- downloads ---------------------------------------------------------------------------------------------------------


def file_hash(path: str, flag: str) -> str | None:
    """Return the SHA-256 of a file or of a downloaded URL; None if the file does not exist."""
    path = _download(path, flag) if "://" in path else path
    return _sha256(Path(path)) if Path(path).is_file() else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_address(address: str, flag: str) -> tuple[str, str, str]:
    """Split a URL into address without fragment, file name, and SHA-256 (or its first digits).

    Raises:
        UserError: if the URL is not https or states fewer than 16 digits of the hash.
    """
    url, _, fragment = address.partition("#")
    name = url.partition("?")[0].rpartition("/")[2]
    stated = re.fullmatch(r"sha256=([0-9a-fA-F]{16,64})", fragment) or re.search(r"-([0-9a-f]{16,64})\.\w+$", name)
    short = re.search(r"-([0-9a-f]{8,15})\.\w+$", name)
    if url.startswith("https://") and short and not fragment:
        raise UserError(
            f"{flag} {address}: the {len(short[1])} digits in its name are too few to trust a download; download it by "
            f"hand, see that sha256sum {name} starts with {short[1]}, and pass {flag} {name}, or {flag} {url}#sha256="
            f"<the 64 digits>{_same_of_timm(url, flag)}"
        )
    if not url.startswith("https://") or stated is None:
        raise UserError(
            f"{flag} {address}: a download needs https and at least 16 digits of its SHA-256, as ...#sha256=... or in "
            f"its name (NAME-1a2b3c4d5e6f7a8b.pth); or give a local file"
        )
    return url, name, stated[1].lower()


def _same_of_timm(url: str, flag: str) -> str:
    """Suggest the flags that load timm's copy of a published file, as the end of an error; '' if timm has none."""
    names = (name for name in list_pretrained() if getattr(get_pretrained_cfg(name), "url", None) == url)
    name = next(names, None)
    kind = "teacher-" if flag == "--teacher-path" else ""
    return f"; timm has the same weights: --{kind}model {name} --{kind}pretrained" if name else ""


def _download(address: str, flag: str) -> str:
    """Download a file into torch's cache unless it is there with the right hash; return its path."""
    url, name, published = split_address(address, flag)
    # Do not use the name in the URL: it may be a path, or equal the name in another URL.
    key = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()
    name = f"{key}-{re.sub('[^A-Za-z0-9._-]', '_', name)[-64:]}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    try:
        if not path.is_file() or not _sha256(path).startswith(published):
            _fetch_file(url, path, published)
    except Exception as error:
        raise UserError(f"{flag} {address}: cannot be downloaded ({reason(error)}); give a local file") from error
    return str(path)


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Redirect handler that follows redirects to https addresses only."""

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, url: str) -> Any:
        if not url.startswith("https://"):
            raise urllib.error.URLError(f"it redirects to {url}, which is not https")
        return super().redirect_request(request, file, code, message, headers, url)


def _fetch_file(url: str, path: Path, published: str) -> None:
    """Download a file to a temporary name and rename it once its hash matches (`torch.hub` follows any redirect).

    Raises:
        ValueError: if the hash differs.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder, "part")
        with urllib.request.build_opener(_HttpsOnly).open(request, timeout=60) as response, open(part, "wb") as stream:
            shutil.copyfileobj(response, stream, 2**20)
        found = _sha256(part)
        if not found.startswith(published):
            raise ValueError(f"its SHA-256 is {found[: len(published)]}, not {published}")
        os.replace(part, path)


# -- flags and classes stored in a file, and comparing two runs --------------------------------------------------------


def flags_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of the run that wrote a checkpoint, as JSON values; {} if they are unknown.

    Flags of the original implementation are converted to ours.
    """
    args = checkpoint.get("args")
    is_original = isinstance(args, argparse.Namespace) and hasattr(args, "nb_classes")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    flags = as_json(args) if isinstance(args, Mapping) else {}
    return _our_flags(flags) if is_original else flags


def class_names_of(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names of a checkpoint's model by class index; () if they are unknown."""
    names = checkpoint.get("class_names")
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()


class Classes(Protocol):
    """The meaning of each class index in a data set, as far as it is known."""

    class_names: tuple[str, ...]  # by class index; () if unknown
    class_samples: tuple[int, ...]  # CRC-32 of one image per class, by class index; -1 or () if unknown


def compare_classes(
    checkpoint: Mapping[str, Any], parts: Mapping[str, Classes], what: str, allow_mismatch: bool = False
) -> None:
    """Check that each class index means the same class in a file and in the data.

    Unknown names are not compared. Neither are different numbers of classes, which raise another error elsewhere.

    Args:
        checkpoint: holds `class_names` and, for each part of its data, `class_samples`.
        parts: the data, by name of the part ("train", "val").
        what: flag and file, for the error message.
        allow_mismatch: warn instead of raising.

    Raises:
        UserError: naming the first class that differs.
    """
    expected, samples = class_names_of(checkpoint), as_json(checkpoint.get("class_samples"))
    for part, data in parts.items():
        found = _renamed(data.class_names, expected)
        checksums = samples.get(part) if isinstance(samples, dict) else None
        found = found or _exchanged(data, checksums if isinstance(checksums, list) else [], part)
        if found and not allow_mismatch:
            raise UserError(f"{what}: {found}; use the data it was trained on, or add --allow-class-mismatch")
        if found:
            logger.warning("%s: %s", what, found)


def _renamed(names: Sequence[str], expected: Sequence[str]) -> str:
    """Describe the first class whose name differs, or return ''."""
    if len(names) != len(expected):
        return ""
    differing = [index for index, (ours, theirs) in enumerate(zip(names, expected, strict=True)) if ours != theirs]
    if not differing:
        return ""
    first = differing[0]
    order = ", the same names in another order" if sorted(names) == sorted(expected) else ""
    count = f"{len(differing)} of {len(names)} classes differ{order}"
    return f"class {first} is {expected[first]!r} there and {names[first]!r} in the data ({count})"


def _exchanged(data: Classes, expected: Sequence[int], part: str) -> str:
    """Describe a class whose images belonged to another class when the file was written, or return ''."""
    if len(data.class_samples) != len(expected):
        return ""
    for index, sample in enumerate(data.class_samples):
        if sample not in (-1, expected[index]) and expected.count(sample) == 1:
            names = data.class_names[index], data.class_names[expected.index(sample)]
            return f"class {names[0]!r} of {part}/ has the images that {names[1]!r} had when the file was written"
    return ""


def changed_samples(then: Any, now: Any) -> bool:
    """Return True if two lists of `class_samples`, as far as known, differ in the image of a class."""
    if not isinstance(then, list) or not isinstance(now, list) or len(then) != len(now):
        return False
    return any(old != new and -1 not in (old, new) for old, new in zip(then, now, strict=True))


def changed_images(checkpoint: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """Return ["validation images"] if number, classes, names or samples differ from those of a checkpoint's run."""
    samples, known = checkpoint.get("class_samples"), checkpoint.get("validation")  # older files lack the second
    then = samples.get("val") if isinstance(samples, dict) else None
    differ = isinstance(known, Mapping) and dict(known) != about["validation"]
    return ["validation images"] if differ or changed_samples(then, about["class_samples"]["val"]) else []


def changes(checkpoint: Mapping[str, Any], about: Mapping[str, Mapping[str, Any]], flags: Collection[str]) -> list[str]:
    """List what differs from the run that wrote a checkpoint and makes this run no longer bitwise identical to it.

    Args:
        checkpoint: `args` holds its flags, `run` the other settings that results depend on.
        about: the same two entries for this run; None means unknown and is not compared.
        flags: names of the flags to compare.
    """
    run = checkpoint.get("run")
    then = as_json({"args": flags_of(checkpoint), "run": run if isinstance(run, Mapping) else {}})
    now = as_json({"args": about["args"], "run": about["run"]})
    pairs = [
        (f"--{name.replace('_', '-')}", value, now["args"][name])
        for name, value in then["args"].items()
        if name in flags
    ]
    pairs += [
        (name.replace("_", " "), value, now["run"][name])
        for name, value in then["run"].items()
        if now["run"].get(name) is not None
    ]
    return [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]


def as_json(values: Any) -> Any:
    """Convert to what JSON would return: tuples become lists, other types become text."""
    return json.loads(json.dumps(values, default=str, skipkeys=True))
