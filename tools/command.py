"""What the tools share: one-line errors, and loading the trained model that `--resume` names."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS

import datasets
import flags
from checkpoints import changes, class_names_of, compare_classes, ema_of, read_checkpoint, trained_size, weights_of
from models import EVALUATION, ModelOptions, build_model, create_model, load_weights, place, try_out
from sources import Data, check_held_out, with_classes
from utils import RunError, UserError, World, escaped, init_distributed, known_cause, logger, set_up_logging

# Flags of main.py that a tool may read.
OF_MODEL = frozenset((*flags.SHAPES["model"], *flags.SHAPES["adjustable"], "eval_crop_ratio", "pretrained", "finetune"))
OF_PHOTOS = OF_MODEL | {"device", "amp", "batch_size", "num_workers"}
OF_DATA = OF_MODEL | {*flags.SHAPES["evaluation"], "nb_classes", "device"}
OF_EVALUATION = OF_PHOTOS | OF_DATA | {"pin_mem", "augment", "compile_augment", "ram_cache", "allow_class_mismatch"}
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


class _Refused(argparse.Action):
    """argparse action for a flag of main.py that the tool does not read."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        means_output = option_string == "--output-dir" and "--output" in parser._option_string_actions
        remedy = "did you mean --output?" if means_output else "drop it"
        parser.error(f"{option_string}: is a flag of main.py that this tool does not read; {remedy}")


def at_keep_rate(run: argparse.Namespace, rate: float | Sequence[float]) -> argparse.Namespace:
    """Return the flags of a run with an EViT's keep rate changed, whichever flag had set it."""
    changed = argparse.Namespace(**vars(run))
    changed.model_kwargs = {**run.model_kwargs, "keep_rate": rate}  # takes precedence over --base-keep-rate
    return changed


def get_parser(
    tool: str, description: str | None, weights: str | None = "", reads: Collection[str] = OF_EVALUATION
) -> flags.Parser:
    """Build the parser of a tool that takes `--resume`, `--ema` and flags of main.py.

    Args:
        reads: names of the flags of main.py that the tool reads; it refuses the others.
        weights: where weights come from without `--resume`, for its help text; by default `--resume` is required, with
            None it is hidden.
    """
    names = ("data_path", "device", "batch_size", "num_workers", "amp", "model", "base_keep_rate", "input_size")
    shown = ", ".join(flags.spelled(name) for name in names if name in reads)
    source = "Model and data come" if "data_set" in reads else "The model comes"
    epilog = f"{source} from the checkpoint. These flags of main.py work here, too, and override the checkpoint: "
    parser = flags.Parser(
        prog=f"python -m tools.{tool}", description=description, epilog=textwrap.fill(f"{epilog}{shown}, ...", 79)
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
            kind = _PassOn if action.dest in reads else _Refused
            parser.add_argument(
                *action.option_strings, action=kind, nargs=action.nargs, dest="main_flags", help=argparse.SUPPRESS
            )
    return parser


class Trained(NamedTuple):
    """The input of a tool.

    Attributes:
        own: the tool's flags.
        run: flags of main.py; model and data come from the checkpoint unless given.
        weights: the model's weights by name; None for timm's pretrained weights.
        about: other entries of the checkpoint, such as class names.
        changed: what differs from the settings of the training run.
    """

    own: argparse.Namespace
    run: argparse.Namespace
    weights: dict[str, torch.Tensor] | None
    about: Mapping[str, Any]
    changed: Sequence[str] = ()


# Available everywhere, for tools that read no data: the checkpoint's data may be on another machine.
_NO_DATA = ("--data-set=DIGITS", "--data-path=.", "--train-split=train", "--val-split=validation")


def parse(parser: flags.Parser, argv: Sequence[str] | None) -> Trained:
    """Parse the tool's flags and read the checkpoint.

    A tool that has been given photos (its argument `images`) needs no data set. If neither checkpoint nor user set the
    input size, it is then that of timm's weights; with `--pretrained` the crop ratio as well.

    Raises:
        UserError: if flags are wrong, or the checkpoint cannot be read.
    """
    own = parser.parse_args(argv)
    reads_data = not getattr(own, "images", None)
    if not reads_data:
        _refuse_data_flags(own.main_flags)
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
    compared = flags.TRAINED if reads_data else OF_MODEL & set(flags.TRAINED)
    return Trained(own, run, weights, checkpoint, changes(checkpoint, {"args": vars(run), "run": {}}, compared))


def _refuse_data_flags(words: Sequence[str]) -> None:
    """Refuse flags of a data set next to photos."""
    given = {word.partition("=")[0].replace("--no-", "--") for word in words if word.startswith("--")}
    unused = sorted(given & {flags.spelled(name) for name in OF_DATA - OF_PHOTOS})
    if unused:
        raise UserError(f"{unused[0]}: is for images of a data set, but --images names files; drop one of them")


def start(trained: Trained, does: str) -> World:
    """Select the device, set up logging, and log what differs from the training run.

    Args:
        does: what the one process does, for the error message.

    Raises:
        UserError: if a launcher has started several processes, or the device is missing.
    """
    world = init_distributed(trained.run.device)
    if world.size > 1:
        raise UserError(f"WORLD_SIZE={world.size}: one process {does}; start it without a launcher")
    set_up_logging(world)
    log_changes(trained)
    return world


def log_changes(trained: Trained) -> None:
    """Log what differs from the training run, as `main.py --eval` does."""
    for change in trained.changed:
        prefix = f"{trained.own.resume}: " if trained.own.resume else ""
        logger.info("%sevaluated with another setting than in training: %s", prefix, change)


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
        try:
            found = timm.get_pretrained_cfg(run.model)
        except RuntimeError as error:  # an unknown tag
            raise UserError(f"--model {run.model}: {error}; check the name") from None
        if found is None:  # an own model may have no config
            return {}
        config = found.to_dict()
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


def load_at_rates(trained: Trained, rates: Sequence[float | Sequence[float]], device: torch.device) -> list[nn.Module]:
    """Build the trained EViT at each of these keep rates, in evaluation mode.

    Raises:
        UserError: if it cannot be built with one of `--keep-rates`.
    """
    try:
        runs = [at_keep_rate(trained.run, rate) for rate in rates]
        return [load_model(run, trained.weights, trained.own.resume, device) for run in runs]
    except UserError as error:
        raise UserError(str(error).replace("--base-keep-rate", "--keep-rates")) from error


def untrained_model(name: str, flag: str, num_classes: int, side: int, **options: Any) -> nn.Module:
    """Build a model with random weights, because speed does not depend on them, and try it on one square image.

    Raises:
        UserError: if it cannot be built, or takes no images of this side in pixels; `flag` names it there.
    """
    model = create_model(name, flag=flag, num_classes=num_classes, input_size=(side, side), **options)
    try_out(model, f"{flag} {name}", (side, side))
    return model


def checked_data(trained: Trained, model: nn.Module, train: Data, val: Data, val_fraction: float | None = None) -> Data:
    """Return the validation data with the model's class indices; warn of images that it may have been trained on.

    The data may have only some of the model's classes. `val_fraction` is that of the data, by default of the run.

    Raises:
        UserError: if the data have other classes.
    """
    names, what = class_names_of(trained.about), f"--resume {trained.own.resume}"
    fraction = trained.run.val_fraction if val_fraction is None else val_fraction
    check_held_out(train, trained.about, fraction, what)
    renumbered = with_classes(val, names, what)
    if renumbered is not val and len(names) < model.num_classes:  # a name per class, or none
        renumbered = replace(renumbered, num_classes=model.num_classes, class_names=())
    if renumbered.num_classes != model.num_classes:
        raise UserError(
            f"{what}: the model has {model.num_classes} classes, the data have {val.num_classes}; name data of its "
            f"classes with --data-set and --data-path, or another checkpoint"
        )
    compare_classes(trained.about, {"val": renumbered}, what, trained.run.allow_class_mismatch)
    return renumbered


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
