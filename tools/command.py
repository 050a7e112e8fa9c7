"""What the tools have in common: errors of one line, and the trained model that `--resume` names."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

import flags
from checkpoints import ema_of, read_checkpoint, trained_size, weights_of
from models import EVALUATION, ModelOptions, build_model, load_weights, place
from utils import RunError, UserError, escaped

PROBE = 1009  # classes of a model that is built to find its classification layer; the width of no other layer


@contextlib.contextmanager
def errors_in_a_line(tool: str) -> Iterator[None]:
    """Exit with status 2 and a one-line error on a user's mistake, such as a file that cannot be written.

    What is printed may hold file names that are not UTF-8: they are escaped.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does by default
    try:
        yield
    except (UserError, RunError, OSError) as error:
        print(f"{tool}: error: {escaped(str(error))}", file=sys.stderr)
        sys.exit(2)


def get_parser(tool: str, description: str | None) -> flags.Parser:
    """A parser with `--resume` and `--ema`, for a tool that also takes the flags of main.py."""
    parser = flags.Parser(
        prog=f"python -m tools.{tool}",
        description=description,
        epilog="The model and the data are those that the checkpoint names. Flags of main.py may follow and go before "
        "those: --data-path, --device, --batch-size, --num-workers, --amp, --model, --base-keep-rate, ...",
    )
    parser.add_argument("--resume", required=True, help="checkpoint (file or https address), such as output/best.pth")
    parser.add_argument("--ema", action="store_true", help="take its averaged weights")
    return parser


class Trained(NamedTuple):
    """What a tool works on.

    Attributes:
        own: the tool's flags.
        run: the flags of main.py; model and data are those that the checkpoint names, unless given.
        weights: of the model, by name.
        about: what else the checkpoint says, such as its class names.
    """

    own: argparse.Namespace
    run: argparse.Namespace
    weights: dict[str, torch.Tensor]
    about: Mapping[str, Any]


def parse(parser: flags.Parser, argv: Sequence[str] | None) -> Trained:
    """Read the tool's own flags and the checkpoint.

    Raises:
        UserError
    """
    own, rest = parser.parse_known_args(argv)
    checkpoint = read_checkpoint(own.resume, "--resume")
    weights = (ema_of if own.ema else weights_of)(checkpoint, "--resume", own.resume)
    if weights is None:
        raise UserError(f"--ema: {own.resume} has no averaged weights; drop the flag")
    run_parser = flags.get_parser(prog=parser.prog)
    run_parser.set_defaults(model=None, trained_size=trained_size(checkpoint))
    run = flags.parse_trained(run_parser, rest, checkpoint, own.resume)
    if run.model is None:
        raise UserError(f"--resume {own.resume}: the file does not name its model; add --model NAME")
    flags.check_flags(run)
    return Trained(own, run, weights, checkpoint)


def load_model(
    run: argparse.Namespace, weights: Mapping[str, torch.Tensor], path: str, device: torch.device
) -> nn.Module:
    """The trained model, to be evaluated.

    Raises:
        UserError: if the weights are not those of the model that the flags describe, or not finite.
    """
    options = flags.fill(ModelOptions, run)
    model = build_model(options, _num_classes(options, weights), eval_only=True)
    load_weights(model, weights, "--resume", path, EVALUATION, run.trained_size or options.input_size)
    return place(model, device).eval()


def _num_classes(options: ModelOptions, weights: Mapping[str, torch.Tensor]) -> int:
    """Number of classes: the rows of the classification layer, which may be more than there are class names."""
    config = timm.get_pretrained_cfg(options.model)
    heads = config.classifier if config is not None else None
    if heads:
        names = [f"{head}.weight" for head in ([heads] if isinstance(heads, str) else heads)]
    else:  # the model does not say: a layer that has as many rows as classes are asked for
        tensors = build_model(options, PROBE, eval_only=True).state_dict()
        names = [name for name, tensor in tensors.items() if tensor.shape[:1] == (PROBE,)]
    for name in names:
        keys = [key for key in weights if f".{key}".endswith(f".{name}")]  # of a module around the model, perhaps
        keys = [key for key in keys if weights[key].ndim and weights[key].numel()]
        if keys:
            return len(weights[min(keys, key=len)])
    return 1000  # of timm's models
