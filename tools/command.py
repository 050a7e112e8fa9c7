"""What the tools share: one-line errors, and loading the trained model that `--resume` names."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS

import datasets
import flags
from checkpoints import class_names_of, compare_classes, ema_of, read_checkpoint, trained_size, weights_of
from models import EVALUATION, ModelOptions, build_model, load_weights, place
from sources import Data, check_held_out, with_classes
from utils import RunError, UserError, escaped, known_cause, logger

PROBE = 1009  # number of classes for finding the classification layer by its size; no other layer is so wide


@contextlib.contextmanager
def one_line_errors(tool: str) -> Iterator[None]:
    """Exit with status 2 and a one-line error on a mistake of the user, such as an unwritable file.

    File names that are not UTF-8 are escaped when printed.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # like standard error
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
        sys.exit(1)
    except (UserError, RunError, OSError) as error:
        print(f"{tool}: error: {escaped(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not (why := known_cause(error)):  # e.g. a data-loader worker was killed
            raise
        print(f"{tool}: {escaped(why)}", file=sys.stderr)
        sys.exit(1)


class _PassOn(argparse.Action):
    """argparse action that keeps a flag of main.py and its values as words, for the parser of main.py."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words = [option_string, *values] if isinstance(values, list) else [f"{option_string}={values}"]
        namespace.main_flags = [*namespace.main_flags, *words]


def at_keep_rate(run: argparse.Namespace, rate: float | Sequence[float]) -> argparse.Namespace:
    """Return the flags of a run with an EViT's keep rate changed, whichever flag had set it."""
    changed = argparse.Namespace(**vars(run))
    changed.model_kwargs = {**run.model_kwargs, "keep_rate": rate}  # takes precedence over --base-keep-rate
    return changed


def get_parser(tool: str, description: str | None, weights: str | None = "") -> flags.Parser:
    """Build the parser of a tool that takes `--resume`, `--ema` and the flags of main.py.

    Args:
        weights: where weights come from without `--resume`, for its help text; by default `--resume` is required, with
            None it is hidden.
    """
    parser = flags.Parser(
        prog=f"python -m tools.{tool}",
        description=description,
        epilog="Model and data come from the checkpoint. Flags of main.py work here, too, and\noverride the "
        "checkpoint: --data-path, --device, --batch-size, --num-workers,\n--amp, --model, --base-keep-rate, ...",
    )
    # Set before the flags are added, so that they are hidden from the help, which mentions them in words.
    parser.set_defaults(resume="", main_flags=[])
    resume = "checkpoint (file or https URL), such as output/best.pth" + (f"; default: {weights}" if weights else "")
    resume = argparse.SUPPRESS if weights is None else resume
    parser.add_argument("--resume", required=weights == "", default=argparse.SUPPRESS, metavar="PATH", help=resume)
    parser.add_argument("--ema", action="store_true", help="use the EMA weights of the checkpoint")
    # This parser must know these flags, or it would take their values for arguments of the tool.
    for action in flags.get_parser()._actions:
        if action.dest not in ("help", "resume"):
            parser.add_argument(
                *action.option_strings, action=_PassOn, nargs=action.nargs, dest="main_flags", help=argparse.SUPPRESS
            )
    return parser


class Trained(NamedTuple):
    """The input of a tool.

    Attributes:
        own: the tool's flags.
        run: flags of main.py; model and data come from the checkpoint unless given.
        weights: the model's weights by name; None for timm's pretrained weights.
        about: other entries of the checkpoint, such as class names.
    """

    own: argparse.Namespace
    run: argparse.Namespace
    weights: dict[str, torch.Tensor] | None
    about: Mapping[str, Any]


# Available everywhere, for tools that read no data: the checkpoint's data may be on another machine.
_NO_DATA = ("--data-set=DIGITS", "--data-path=.", "--train-split=train", "--val-split=validation")


def parse(parser: flags.Parser, argv: Sequence[str] | None, reads_data: bool = True) -> Trained:
    """Parse the tool's flags and read the checkpoint.

    Args:
        reads_data: False for tools that take photos. They need no data set. If neither checkpoint nor user set the
            input size, it is that of timm's weights; with `--pretrained` the crop ratio as well.

    Raises:
        UserError: if flags are wrong, or the checkpoint cannot be read.
    """
    own = parser.parse_args(argv)
    words = own.main_flags if reads_data else [*_NO_DATA, *own.main_flags]
    checkpoint = read_checkpoint(own.resume, "--resume") if own.resume else {}
    weights = _weights_of(own, checkpoint)
    run_parser = flags.get_parser(prog=parser.prog)
    # Stochastic depth is for training only, and not every model has it.
    run_parser.set_defaults(model=None, drop_path=0.0, trained_size=trained_size(checkpoint))
    run = flags.parse_trained(run_parser, words, checkpoint, own.resume)
    _check_start(own, run)
    if not reads_data and run.trained_size is None:
        run_parser.set_defaults(**_preprocessing(run))
        run = flags.parse_trained(run_parser, words, checkpoint, own.resume)
    flags.check_flags(run)
    return Trained(own, run, weights, checkpoint)


def _weights_of(own: argparse.Namespace, checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    if not own.resume:
        return None
    weights = (ema_of if own.ema else weights_of)(checkpoint, "--resume", own.resume)
    if weights is None:
        raise UserError(f"--ema: {own.resume} has no EMA weights; drop the flag")
    return weights


def _check_start(own: argparse.Namespace, run: argparse.Namespace) -> None:
    """Check that flags and checkpoint determine the model and its weights."""
    if run.finetune:
        raise UserError(f"--finetune {run.finetune}: starts a training; pass the file as --resume {run.finetune}")
    if own.resume and run.pretrained:
        raise UserError("--resume and --pretrained both say where the weights come from; pass one of them")
    if not own.resume and (not run.pretrained or run.model is None):
        raise UserError("--resume: there are no weights; add --resume FILE, or --model NAME --pretrained")
    if not own.resume and own.ema:
        raise UserError("--ema: timm's pretrained weights come without EMA weights; drop the flag")
    if run.model is None:
        raise UserError(f"--resume {own.resume}: the file does not name its model; add --model NAME")


def _preprocessing(run: argparse.Namespace) -> dict[str, Any]:
    """Return flags for the preprocessing of timm's weights, as far as they are not set otherwise."""
    if timm.is_model(run.model.split(".")[0]):
        config = timm.get_pretrained_cfg(run.model).to_dict()
    else:
        try:
            config = timm.create_model(run.model).pretrained_cfg  # reads config.json of local-dir: and hf-hub: models
        except Exception:  # building the model will report it
            return {}
    _, height, width = config["input_size"]
    return {"input_size": [height, width]} | ({"eval_crop_ratio": config["crop_pct"]} if run.pretrained else {})


def load_model(
    run: argparse.Namespace, weights: Mapping[str, torch.Tensor] | None, path: str, device: torch.device
) -> nn.Module:
    """Build the trained model in evaluation mode.

    Args:
        weights, path: the weights and their file; None and '' for timm's pretrained weights.

    Raises:
        UserError: if the weights do not fit the model that the flags describe, or are not finite.
    """
    options = flags.fill(ModelOptions, run)
    model = build_model(options, None if weights is None else _num_classes(options, weights), eval_only=True)
    if weights is not None:
        load_weights(model, weights, "--resume", path, EVALUATION, run.trained_size or options.input_size)
    if not getattr(model, "num_classes", 1):
        raise UserError(f"--model {run.model}: has no classification layer; use a model that has one")
    return place(model, device).eval()


def checked_data(trained: Trained, train: Data, val: Data) -> Data:
    """Return the validation data, with classes numbered as in the checkpoint; warn of images it may have trained on.

    Raises:
        UserError: if a class index means another class than in the checkpoint.
    """
    what = f"--resume {trained.own.resume}"
    check_held_out(train, trained.about, trained.run.val_fraction, what)
    val = with_classes(val, class_names_of(trained.about), what)
    compare_classes(trained.about, {"val": val}, what, trained.run.allow_class_mismatch)
    return val


def find_files(paths: Sequence[str], flag: str) -> list[str]:
    """List image files: files as given, folders searched recursively.

    Args:
        flag: the argument that named the paths, for messages.

    Raises:
        UserError: if a path does not exist, or a folder holds no images.
    """
    files: list[str] = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{flag} {path}: no such file or folder; check the path")
        skipped: Counter[str] = Counter()
        found = datasets.image_files(path, set(), skipped) if os.path.isdir(path) else [path]
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        if not found:
            hint = "; name its --data-set" if flag == "--data-path" else f"; convert its {kinds}" if kinds else ""
            raise UserError(f"{flag} {path}: holds no images ({', '.join(IMG_EXTENSIONS)}){hint}")
        if skipped:
            # Escape it here, because not every tool has set up its log yet.
            logger.warning("%s", escaped(f"{flag} {path}: {skipped.total()} files are not read: {kinds}"))
        files += found
    return files


def _num_classes(options: ModelOptions, weights: Mapping[str, torch.Tensor]) -> int:
    """Return the number of classes: rows of the classification layer, which may exceed the number of class names."""
    config = timm.get_pretrained_cfg(options.model)
    heads = config.classifier if config is not None else None
    if heads:
        names = [f"{head}.weight" for head in ([heads] if isinstance(heads, str) else heads)]
    else:  # unknown name: find a layer with --num-classes rows
        tensors = build_model(options, PROBE, eval_only=True).state_dict()
        names = [name for name, tensor in tensors.items() if tensor.shape[:1] == (PROBE,)]
    for name in names:
        keys = [key for key in weights if f".{key}".endswith(f".{name}")]  # a wrapper module may add a prefix
        keys = [key for key in keys if weights[key].ndim and weights[key].numel()]
        if keys:
            return len(weights[min(keys, key=len)])
    return 1000  # as timm's models
