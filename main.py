"""Train and evaluate data-efficient image transformers: `python main.py --help`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shlex
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from timm.utils import ModelEmaV3, ParseKwargs
from torch.nn.parallel import DistributedDataParallel

import augment
import datasets
import engine
import losses
import models
import models_evit
import teacher_cache
import utils
from samplers import random_key, seed_generators
from utils import Preempted, RunError, UserError, World, logger

# -- flags -------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, underscored spellings of every flag, and comments in @recipes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **options,
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        try:
            return super().parse_known_args([_hyphenated(word) for word in words], namespace)
        except UnicodeDecodeError:
            self.error("the @file is not text; the recipes are in recipes/")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return [_hyphenated(word) for word in shlex.split(arg_line, comments=True)]
        except ValueError as error:
            self.error(f"line {arg_line.strip()!r} of the @file: {error}; close the quotation")

    def error(self, message: str) -> NoReturn:
        for word in message.partition("unrecognized arguments: ")[2].split():
            near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        if message.startswith("[Errno"):  # of an @file that cannot be read
            message += "; the recipes are in recipes/"
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


def _hyphenated(word: str) -> str:
    """`--data_path=a_b` -> `--data-path=a_b`."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number from `low` (itself excluded if `open_low`) to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            if value in (float("inf"), float("-inf")):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        if not (low < value if open_low else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if open_low else 'at least'} {low:g}"
                + (f" and at most {high:g}" if high < float("inf") else "")
            )
        return value

    return parse


class _ModelKwargs(ParseKwargs):
    """`embed_dim=96 depth=6` -> {"embed_dim": 96, "depth": 6}; values are Python literals, never evaluated."""

    TAKEN = frozenset(("name", "flag", "input_size", "num_classes", "pretrained", "checkpoint_path"))

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        wrong = next((value for value in values if "=" not in value), None)
        if wrong is not None:
            raise argparse.ArgumentError(self, f"{wrong!r} is not of the form key=value")
        super().__call__(parser, namespace, values, option_string)
        taken = self.TAKEN & getattr(namespace, self.dest).keys()
        if taken:
            raise argparse.ArgumentError(self, f"{min(taken)!r} is the affair of other flags; drop it")


_COUNT, _NATURAL = number(int, 1), number(int, 0)
_RATE, _SHARE, _NON_NEGATIVE = number(float, 0, 1), number(float, 0, 1, open_low=True), number(float, 0)
_POSITIVE = number(float, 0, open_low=True)
_SWITCH = argparse.BooleanOptionalAction


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output-dir", default="output", help="folder of log.txt, checkpoints and TensorBoard files; '' for none")
    add("--overwrite", action=_SWITCH, default=False, help="write over an earlier run in --output-dir")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--seed", type=_NATURAL, default=0, help="every random draw of the run follows from it")
    add("--resume", default="", help="checkpoint (file or https address) to go on from, or to evaluate with --eval; "
        "auto: the newest in --output-dir if there is one, else start as without it")  # fmt: skip
    add("--checkpoint-minutes", type=_NON_NEGATIVE, metavar="M", help="save within an epoch too, every so many "
        "minutes; default: after each epoch, and when the run is stopped")  # fmt: skip
    add("--max-skipped-steps", type=_NATURAL, default=0, metavar="N", help="leave out up to so many updates of an "
        "epoch whose loss or gradient is not finite (looking at each costs a wait for the device)")  # fmt: skip
    add("--eval", action=_SWITCH, default=False, help="evaluate only")
    add("--eval-interval", type=_COUNT, default=1, help="epochs between two evaluations; the last is always evaluated")
    add("--log-interval", type=_COUNT, default=50, help="steps between two log lines and checks for a non-finite loss")
    add("--num-workers", type=_NATURAL, help="loader processes per rank; default: the CPUs available "
        "to it, at most 10 (images that live on the device need none)")  # fmt: skip
    add("--pin-mem", action=_SWITCH, default=True, help="page-locked batches, for faster copies to a GPU")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision; auto: bf16 where the "
        "hardware has it, else fp16 on CUDA, else off")  # fmt: skip
    add("--compile", action=_SWITCH, default=False, help="torch.compile the model, a teacher, and on a "
        "GPU the augmentation")  # fmt: skip
    add(
        "--deterministic",
        action=_SWITCH,
        default=False,
        help="bit-identical CUDA kernels (slower); the CPU's always are",
    )
    for name in ("--dist-eval", "--distributed"):
        add(name, action="store_true", help="accepted for published command lines; always the case")
    for name in ("--world-size", "--dist-url"):
        add(name, help="accepted for published command lines; the launcher's environment decides")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="deit_base_patch16_224", help="any model of timm's")
    add("--input-size", type=_COUNT, nargs="+", default=[224], metavar="PIXELS", help="height, and width if it differs")
    add("--patch-size", type=_COUNT, help="patch edge in pixels, in place of the model's own")
    add(
        "--model-kwargs",
        nargs="+",
        action=_ModelKwargs,
        default={},
        metavar="K=V",
        help="further arguments of timm's model",
    )
    add("--drop", type=number(float, 0, 0.999), default=0.0, help="dropout rate")
    add("--drop-path", type=number(float, 0, 0.999), default=0.1, help="stochastic-depth rate")
    add("--grad-checkpointing", action=_SWITCH, default=False, help="recompute activations: less memory, more time")
    add("--pretrained", action=_SWITCH, default=False, help="start from timm's published weights (a download)")
    add("--finetune", default="", help="start from the weights of this checkpoint (file or https address)")
    add("--train-scope", choices=("all", "head", "attn"), default="all", help="what to train; the rest is frozen")
    add("--cache-features", action=_SWITCH, default=False, help="with --train-scope head: run the frozen part once, "
        "over the images as they are evaluated, and train the head on what it gives")  # fmt: skip
    add("--attn-only", dest="train_scope", action="store_const", const="attn", help="the published spelling of "
        "--train-scope attn")  # fmt: skip
    add("--model-ema", action=_SWITCH, default=True, help="keep, evaluate and save an average of the weights")
    add("--model-ema-decay", type=_RATE, default=0.99996, help="its decay per update")
    add("--model-ema-warmup", action=_SWITCH, default=False, help="raise the decay from 0, for runs of few updates")
    add("--model-ema-force-cpu", action=_SWITCH, default=False, help="keep it in CPU memory (and evaluate it there)")


def _layers(text: str) -> list[int]:
    """`3,6,9` or `(3, 6, 9)` -> [3, 6, 9]."""
    return [_NATURAL(layer) for layer in text.strip("()[] ").split(",") if layer.strip()]


def keep_rates(text: str) -> float | list[float]:
    """`0.7` -> 0.7, `0.7,0.7,0.5` -> [0.7, 0.7, 0.5]."""
    rates = [_SHARE(rate) for rate in text.strip("()[] ").split(",") if rate.strip()]
    return rates[0] if len(rates) == 1 else rates


def _add_token_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("token reorganisation (evit_* models)").add_argument
    add("--base-keep-rate", type=keep_rates, metavar="RATE", help="share of the patches kept in a reducing layer, or "
        "one share per layer: 0.7,0.7,0.5; default: the paper's 0.7")  # fmt: skip
    add("--drop-loc", type=_layers, metavar="LAYERS", help="reducing layers from 0 on; default: the paper's 3,6,9")
    add("--fuse-token", action=_SWITCH, default=None, help="fuse the dropped patches into one token; default: yes")
    add("--shrink-start-epoch", type=_NATURAL, help="first epoch that reduces; default 10, which the paper uses from "
        "scratch (for fine-tuning it uses 0)")  # fmt: skip
    add("--shrink-epochs", type=_NATURAL, help="epochs in which the keep rate falls from 1 on a cosine; default 0, "
        "which the paper uses for fine-tuning (from scratch it uses 100)")  # fmt: skip


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data-set", default="IMNET", help=f"{', '.join(datasets.NAMES)}, or timm's name starting with "
        f"{', '.join(datasets.SCHEMES)}")  # fmt: skip
    add("--data-path", help="folder of the data; CIFAR and FLOWERS are downloaded to ./data")
    add("--inat-category", choices=datasets.INAT_CATEGORIES, default="name", help="level of iNaturalist's taxonomy")
    add("--train-split", default="train", help="name of the split, for data sets of timm's")
    add("--val-split", default="validation", help="name of the split, for data sets of timm's")
    add("--num-classes", type=_COUNT, help="number of classes, where the data do not say")
    add("--train-fraction", type=_SHARE, default=1.0, help="fixed class-balanced part of the training data to use")
    add("--ram-cache", type=_NON_NEGATIVE, default=1024, metavar="MIB", help="decode a data set once and keep it in "
        "memory, or on the device that augments it, if it takes at most this much")  # fmt: skip
    add("--skip-broken-images", type=_NATURAL, default=0, metavar="N", help="let the next image take the place of one "
        "that cannot be read, for up to so many training images")  # fmt: skip
    add(
        "--eval-crop-ratio",
        type=_SHARE,
        default=0.875,
        help="side of the evaluated centre crop above 64 px; 1 for the whole image",
    )


def _add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--augment", choices=("auto", "host", "device"), default="auto", help="where views are made: by timm's PIL "
        "code in loader processes, or by the same operations in batches on the device; auto: the device if it is a "
        "GPU and the images are in memory or packed")  # fmt: skip
    add("--color-jitter", type=_NON_NEGATIVE, default=0.3, help="strength; AutoAugment policies replace it")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy in timm's notation; none for none")
    add("--ThreeAugment", dest="aa", action="store_const", const="3a", help="DeiT III's: grey, solarised or blurred, "
        "then --color-jitter; the same as --aa 3a")  # fmt: skip
    add("--hflip", type=_RATE, default=0.5, help="probability of a horizontal flip")
    add("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic", help="of resized crops")
    add("--repeated-aug", action=_SWITCH, default=True, help="three views of each of a third of the images per epoch")
    add("--reprob", type=_RATE, default=0.25, help="random erasing probability")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="random erasing filling")
    add("--recount", type=_COUNT, default=1, help="random erasing regions")
    add("--mixup", type=_NON_NEGATIVE, default=0.8, help="Mixup α; 0 for none")
    add("--cutmix", type=_NON_NEGATIVE, default=1.0, help="CutMix α; 0 for none")
    add("--cutmix-minmax", type=_RATE, nargs=2, metavar=("MIN", "MAX"), help="CutMix region, in place of α")
    add("--mixup-prob", type=_RATE, default=1.0, help="probability that a batch is mixed")
    add("--mixup-switch-prob", type=_RATE, default=0.5, help="probability of CutMix when both are on")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch", help="what shares one λ")
    add("--augmentation-epochs", type=_COUNT, metavar="K", help="show the same views again every K epochs; default: "
        "new views in every epoch")  # fmt: skip
    add("--smoothing", type=_RATE, default=0.1, help="label smoothing")
    add("--bce-loss", action=_SWITCH, default=False, help="binary cross-entropy, every mixed-in class a positive")


def _add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=_COUNT, default=64, help="images per process and forward pass")
    add("--accum-steps", type=_COUNT, default=1, help="forward passes per update")
    add("--epochs", type=_COUNT, default=300, help="passes over the training data")
    add("--opt", default="adamw", help="timm's name of the optimiser")
    add("--opt-eps", type=_POSITIVE, default=1e-8, help="its ε")
    add("--opt-betas", type=_RATE, nargs="+", help="its β")
    add("--momentum", type=_RATE, default=0.9, help="for optimisers that have it")
    add("--weight-decay", type=_NON_NEGATIVE, default=0.05, help="not applied to biases and norms")
    add("--clip-grad", type=_POSITIVE, help="largest gradient norm; default: no clipping")
    add("--lr", type=_POSITIVE, default=5e-4, help="peak learning rate, before scaling")
    add("--lr-scaling", choices=("linear", "sqrt", "none"), default="linear", help="multiply --lr by (effective "
        "batch / 512), its root, or 1")  # fmt: skip
    add("--unscale-lr", dest="lr_scaling", action="store_const", const="none", help="the published spelling of "
        "--lr-scaling none")  # fmt: skip
    add("--sched", default="cosine", help="timm's name of the schedule")
    add("--warmup-epochs", type=_NATURAL, default=5, help="epochs of linear warm-up")
    add("--warmup-lr", type=_NON_NEGATIVE, default=1e-6, help="where warm-up starts")
    add("--min-lr", type=_NON_NEGATIVE, default=1e-5, help="where the schedule ends")
    add("--decay-epochs", type=_POSITIVE, default=30, help="interval of --sched step")
    add("--decay-rate", type=_POSITIVE, default=0.1, help="factor of --sched step")
    add(
        "--cooldown-epochs", type=_NATURAL, default=10, help="epochs at --min-lr after a cycle, in schedules that cycle"
    )
    add("--patience-epochs", type=_NATURAL, default=10, help="accepted for published command lines; without effect")
    add("--lr-noise", type=_RATE, nargs="+", help="part of the schedule, from (to), in which the rate is noisy")
    add("--lr-noise-pct", type=_NON_NEGATIVE, default=0.67, help="limit of the noise")
    add("--lr-noise-std", type=_NON_NEGATIVE, default=1.0, help="its standard deviation")


def _add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    add("--distillation-type", choices=("none", "soft", "hard"), default="none", help="how the teacher is followed")
    add("--distillation-alpha", type=_RATE, default=0.5, help="weight α of the distillation loss")
    add("--distillation-tau", type=_POSITIVE, default=1.0, help="temperature τ of soft distillation")
    add("--distillation-scale", choices=("batchmean", "legacy"), default="batchmean", help="soft distillation "
        "divided by the batch or, as in the published code, by batch times classes")  # fmt: skip
    add("--distill-on-class-token", action=_SWITCH, default=False, help="let the one head follow labels and teacher, "
        "for models without a distillation token")  # fmt: skip
    add("--teacher-model", default="regnety_160", help="any model of timm's")
    add("--teacher-path", default="", help="its checkpoint (file or https address)")
    add("--teacher-pretrained", action=_SWITCH, default=False, help="timm's published weights (a download)")
    add(
        "--teacher-model-kwargs",
        nargs="+",
        action=_ModelKwargs,
        default={},
        metavar="K=V",
        help="further arguments of it",
    )
    add("--teacher-cache", default="", metavar="FOLDER", help="store of the teacher's answers to every view of a run; "
        "what is missing is computed and added")  # fmt: skip
    add("--teacher-cache-topk", type=_COUNT, default=50, metavar="K", help="soft distillation stores so many of the "
        "largest probabilities of a view; as many as there are classes for all")  # fmt: skip
    add("--precompute-teacher", action=_SWITCH, default=False, help="fill --teacher-cache and train nothing")
    add("--precompute-batch-size", type=_COUNT, help="images to show the teacher at once; default: --batch-size, with "
        "which its answers are to the bit those it gives during training")  # fmt: skip
    add("--precompute-epochs", type=_epoch_range, metavar="FROM:TO", help="of these epochs only, TO left out, to share "
        "them out among machines")  # fmt: skip


def _epoch_range(text: str) -> range:
    """`0:30` -> range(0, 30)."""
    first, _, end = text.partition(":")
    epochs = range(_NATURAL(first), _NATURAL(end))
    if not epochs:
        raise argparse.ArgumentTypeError(f"{text} holds no epochs")
    return epochs


def get_parser(**options: Any) -> Parser:
    """The flags of a run; `options` go to `argparse.ArgumentParser`."""
    parser = Parser(description="Train and evaluate data-efficient image transformers.", **options)
    _add_run_arguments(parser)
    _add_model_arguments(parser)
    _add_token_arguments(parser)
    _add_data_arguments(parser)
    _add_augmentation_arguments(parser)
    _add_optimization_arguments(parser)
    _add_distillation_arguments(parser)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UserError
    """
    automatic = args.resume == "auto"  # which starts from other weights if there is nothing to go on with
    if automatic and (args.eval or args.overwrite):
        raise UserError(f"--resume auto: goes on with a run; {'--eval' if args.eval else '--overwrite'} does not fit")
    if args.checkpoint_minutes is not None and not args.output_dir:
        raise UserError("--checkpoint-minutes: there is no place for a checkpoint; add --output-dir FOLDER")
    starts = [flag for flag in ("resume", "finetune", "pretrained") if getattr(args, flag)][automatic:]
    if len(starts) > 1:
        raise UserError(f"--{starts[0]} and --{starts[1]} both say where the weights come from; pass one of them")
    if args.eval and not starts:
        raise UserError("--eval: there are no weights to evaluate; add --resume FILE, --finetune FILE or --pretrained")
    if args.distillation_type == "none" and (args.teacher_path or args.teacher_pretrained):
        raise UserError("--teacher-path: no distillation is asked for; add --distillation-type hard, or drop it")
    if args.teacher_path and args.teacher_pretrained:
        raise UserError(
            "--teacher-path and --teacher-pretrained both say where the teacher's weights come from; pass one"
        )
    if args.distillation_type == "none" and (args.teacher_cache or args.distill_on_class_token):
        flag = "--teacher-cache" if args.teacher_cache else "--distill-on-class-token"
        raise UserError(f"{flag}: no distillation is asked for; add --distillation-type hard, or drop it")
    if not args.teacher_cache and (args.precompute_teacher or args.precompute_epochs):
        raise UserError("--precompute-teacher: there is no place for the answers; add --teacher-cache FOLDER")
    if args.cache_features:
        _check_features(args)
    if not args.precompute_teacher and (args.precompute_epochs or args.precompute_batch_size):
        raise UserError(
            "--precompute-epochs, --precompute-batch-size: nothing is precomputed; add --precompute-teacher"
        )
    different = min(args.epochs, args.augmentation_epochs or args.epochs)
    if args.precompute_epochs and args.precompute_epochs.stop > different:
        raise UserError(f"--precompute-epochs: the run has views for {different} epochs; end with :{different}")
    evit_flags = ("base_keep_rate", "drop_loc", "fuse_token", "shrink_start_epoch", "shrink_epochs")
    given = next((flag.replace("_", "-") for flag in evit_flags if getattr(args, flag) is not None), None)
    if given and not models_evit.is_evit(args.model):
        raise UserError(f"--{given}: {args.model} has no EViT blocks; use a model such as evit_small_patch16_224")
    if len(args.input_size) > 2:
        raise UserError(f"--input-size {' '.join(map(str, args.input_size))}: give one number, or height and width")
    if args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1]:
        raise UserError("--cutmix-minmax: the minimum is above the maximum; swap them")


def _check_features(args: argparse.Namespace) -> None:
    """`--cache-features` leaves no room for what changes the images or the frozen part."""
    if args.train_scope != "head" or args.distillation_type != "none":
        raise UserError("--cache-features: needs --train-scope head, and no distillation, whose teacher wants images")
    off = {"aa": "none", "color_jitter": 0, "hflip": 0, "reprob": 0, "mixup": 0, "cutmix": 0, "drop": 0, "drop_path": 0}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in off.items() if getattr(args, name) != value]
    flags += ["--no-repeated-aug"] if args.repeated_aug else []
    if flags or args.cutmix_minmax:
        raise UserError(f"--cache-features: every image has one view; add {' '.join(flags) or 'no --cutmix-minmax'}")


# -- wiring ------------------------------------------------------------------------------------------------------------


def settle_resume(args: argparse.Namespace, world: World) -> argparse.Namespace:
    """The flags with the file that `--resume` means: what `auto` finds, or the one before a damaged one."""
    if not args.resume or args.eval:
        return args
    path = utils.find_checkpoint(args.resume, args.output_dir, world.is_main)
    replaced = {"finetune": "", "pretrained": False} if path else {}
    return argparse.Namespace(**{**vars(args), **replaced, "resume": path})


def build_sources(args: argparse.Namespace, world: World) -> tuple[Any, Any]:
    """Training and validation data, cut to `--train-fraction` and kept in memory if they are small."""
    train, val = datasets.build_sources(
        args.data_set,
        args.data_path,
        inat_category=args.inat_category,
        train_split=args.train_split,
        val_split=args.val_split,
        num_classes=args.num_classes,
        local_rank=world.local_rank,
    )
    if args.skip_broken_images:
        if not isinstance(train, datasets.Source):
            raise UserError(f"--skip-broken-images: {args.data_set} is a stream, which skips them by itself; drop it")
        train = dataclasses.replace(train, broken=datasets.BrokenImages(train.images, args.skip_broken_images))
    if not args.eval:
        train = datasets.keep_in_memory(datasets.take_fraction(train, args.train_fraction), args.ram_cache)
    return train, datasets.keep_in_memory(val, args.ram_cache)


def build_model(args: argparse.Namespace, num_classes: int, device: torch.device) -> torch.nn.Module:
    """The model with its first weights, on the device."""
    seed_generators(random_key(args.seed, "weights"))
    tokens = {"keep_rate": args.base_keep_rate, "drop_loc": args.drop_loc, "fuse_token": args.fuse_token}
    model = models.build_model(
        args.model,
        num_classes=num_classes,
        input_size=_size(args),
        pretrained=args.pretrained,
        drop=args.drop,
        drop_path=args.drop_path,
        patch_size=args.patch_size,
        model_kwargs={key: value for key, value in tokens.items() if value is not None} | args.model_kwargs,
        distilled=args.distillation_type != "none" and not args.distill_on_class_token,
        grad_checkpointing=args.grad_checkpointing,
    )
    if args.finetune:
        models.load_finetune_weights(model, args.finetune)
    models.freeze(model, args.train_scope)
    return _place(model, device)


def _place(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    # Convolutions with weights in channels-last order run several times faster on CPUs and on GPUs in mixed precision.
    return model.to(device, memory_format=torch.channels_last)


def _size(args: argparse.Namespace) -> tuple[int, int]:
    return args.input_size[0], args.input_size[-1]


def _loader_options(args: argparse.Namespace, world: World) -> dict[str, Any]:
    workers = min(10, max(1, utils.available_cpus() // world.local_size))
    return {
        "batch_size": args.batch_size,
        "num_workers": workers if args.num_workers is None else args.num_workers,
        "pin_memory": args.pin_mem and world.device.type == "cuda",
        "world": world,
    }


def _augments_on_device(args: argparse.Namespace, source: Any, device: torch.device) -> bool:
    """Whether this source's images become views in batches on the device.

    Raises:
        UserError: if they are to, and cannot.
    """
    if args.augment == "auto":
        return device.type == "cuda" and datasets.fits_frames(source) and augment.is_supported(args.aa)
    if args.augment == "device" and not datasets.fits_frames(source):
        raise UserError(
            "--augment device: the images are neither in memory nor packed, or of too different sizes; raise "
            "--ram-cache, pack them with python -m tools.pack_dataset, or drop the flag"
        )
    return args.augment == "device"


def _compiled(args: argparse.Namespace, view: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    if args.compile and device.type == "cuda":  # a CPU is faster without: it leaves out what a sample does not need
        view.compile()
    return view


def build_eval_transform(args: argparse.Namespace, model: torch.nn.Module) -> Callable[[Any], torch.Tensor]:
    """How the model is shown an image that it is asked about."""
    return datasets.build_eval_transform(
        _size(args), *models.normalization(model), interpolation="bicubic", crop_ratio=args.eval_crop_ratio
    )


def build_val_loader(args: argparse.Namespace, source: Any, model: torch.nn.Module, world: World) -> Any:
    """Every process's share of the images, as the model is shown images that it is asked about."""
    view = build_eval_transform(args, model)
    if _augments_on_device(args, source, world.device):
        frame, size = datasets.frame_of(source), _size(args)
        view = augment.EvalTransform(frame, size, *models.normalization(model), crop_ratio=args.eval_crop_ratio)
        view = _compiled(args, view, world.device)
    return datasets.build_eval_loader(source, view, **_loader_options(args, world))


def build_train_view(
    args: argparse.Namespace, model: torch.nn.Module, source: Any, device: torch.device
) -> datasets.View:
    """How the model is shown an image to learn from."""
    options = {
        "interpolation": args.train_interpolation,
        "hflip": args.hflip,
        "color_jitter": args.color_jitter,
        "auto_augment": args.aa,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
    }
    if not _augments_on_device(args, source, device):
        return datasets.build_train_transform(_size(args), *models.normalization(model), **options)
    logger.info("images are augmented on the device (--augment)")
    frame = datasets.frame_of(source)
    view = augment.TrainAugmentation(frame, _size(args), *models.normalization(model), **options)
    return _compiled(args, view, device)


def cache_features(
    args: argparse.Namespace, model: torch.nn.Module, source: Any, world: World
) -> tuple[datasets.Source, Callable[[torch.Tensor], torch.Tensor], torch.nn.Module]:
    """Features of the training images as a data set, the way they are shown (as they are), and the head they go to.

    Every process computes them all.
    """
    if not isinstance(source, datasets.Source):
        raise UserError(f"--cache-features: {args.data_set} is a stream, whose images have no place; drop the flag")
    head = models.linear_head(model, args.model)
    alone = dataclasses.replace(world, rank=0, size=1)
    loader = build_val_loader(args, source, model, alone)
    amp = engine.autocast(model, engine.select_amp(args.amp, world.device))
    start = time.perf_counter()
    features, targets = engine.features(model, loader, amp)
    logger.info("features of %d images in %.0f s", len(features), time.perf_counter() - start)
    order = np.arange(len(features))
    return datasets.Source(features, targets.numpy(), source.num_classes, order, source.broken), torch.clone, head


def build_train_loader(
    args: argparse.Namespace, source: Any, view: datasets.View, world: World
) -> datasets.EpochLoader:
    return datasets.build_train_loader(
        source,
        view,
        accum_steps=args.accum_steps,
        repeats=3 if args.repeated_aug else 1,
        seed=args.seed,
        **_loader_options(args, world),
    )


def build_prepare(args: argparse.Namespace, num_classes: int, device: torch.device) -> Callable:
    """The way of a training batch to the device, with Mixup and CutMix."""
    mixup = datasets.build_mixup(
        mixup=args.mixup,
        cutmix=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        num_classes=num_classes,
        batch_size=args.batch_size,
    )
    return datasets.build_prepare(device, mixup)


def build_teacher(
    args: argparse.Namespace, student: torch.nn.Module, num_classes: int, device: torch.device
) -> losses.FrozenTeacher:
    """The teacher with its weights, on the device."""
    model = models.build_teacher(
        args.teacher_model,
        path=args.teacher_path,
        pretrained=args.teacher_pretrained,
        num_classes=num_classes,
        input_size=_size(args),
        model_kwargs=args.teacher_model_kwargs,
    )
    _place(model, device)
    if args.compile:
        model.compile()
    return losses.FrozenTeacher(model, *models.normalization(model), *models.normalization(student))


def build_cached_teacher(
    args: argparse.Namespace, student: torch.nn.Module, source: Any, loader: datasets.EpochLoader, world: World
) -> teacher_cache.CachedTeacher:
    """The store of the teacher's answers; the teacher itself only if answers are missing.

    Raises:
        UserError: if the store is of another run, or the disk too small, or answers and teacher are missing.
    """
    if not isinstance(source, datasets.Source):
        raise UserError(f"--teacher-cache: {args.data_set} is a stream, whose views have no place; drop the flag")
    if source.num_classes >= 2**16:
        raise UserError(
            f"--teacher-cache: holds classes below {2**16 - 1}, the data have {source.num_classes}; drop it"
        )
    hard, folder = args.distillation_type == "hard", Path(args.teacher_cache)
    codec = (
        teacher_cache.Labels(source.num_classes)
        if hard
        else teacher_cache.LogProbabilities(source.num_classes, args.teacher_cache_topk)
    )
    num_positions = loader.counter.num_positions
    cache = teacher_cache.TeacherCache(folder, codec, num_positions, world.rank, world.size)
    missing = [epoch for epoch in _view_epochs(args) if not cache.is_whole(epoch)]
    live = None
    if missing:
        if not args.teacher_path and not args.teacher_pretrained:
            raise UserError(
                f"--teacher-cache {folder}: {len(missing)} epochs are missing, the first is {missing[0]}; add "
                f"--teacher-path FILE or --teacher-pretrained, or precompute them"
            )
        needed = teacher_cache.check_space(folder, codec, num_positions, len(missing))
        logger.info("%s: %d epochs are missing and will take %.1f MiB", folder, len(missing), needed / 2**20)
        live = build_teacher(args, student, source.num_classes, world.device)
    with utils.main_process_first(world.local_rank):
        teacher_cache.check_fingerprint(folder, fingerprint(args, student, source, loader, world))
    return teacher_cache.CachedTeacher(cache, lambda: loader.counter.epoch, live)


def _view_epochs(args: argparse.Namespace) -> range:
    """The epochs of different views that a run sees, or precomputes."""
    return args.precompute_epochs or range(min(args.epochs, args.augmentation_epochs or args.epochs))


def fingerprint(
    args: argparse.Namespace, student: torch.nn.Module, source: Any, loader: datasets.EpochLoader, world: World
) -> dict[str, Any]:
    """All that shapes the views of a run and what a teacher says about them; None for what is not known here."""
    flags = ("data_set", "train_fraction", "seed", "input_size", "repeated_aug", "hflip", "color_jitter", "aa")
    flags += ("train_interpolation", "reprob", "remode", "recount", "mixup", "cutmix", "cutmix_minmax", "mixup_prob")
    flags += ("mixup_switch_prob", "mixup_mode", "distillation_type", "teacher_model", "teacher_model_kwargs")
    mixes = bool(args.mixup or args.cutmix or args.cutmix_minmax)
    teacher = utils.file_hash(args.teacher_path) if args.teacher_path else "timm" if args.teacher_pretrained else None
    return {name: getattr(args, name) for name in flags} | {
        "views": loader.counter.num_positions,
        "labels": zlib.crc32(source.targets[source.order].tobytes()),
        "normalization": models.normalization(student),
        "batch_size": args.batch_size if mixes else 0,  # what is mixed with what
        "processes": world.size if mixes else 0,
        "teacher_weights": teacher,
        "precision": str(engine.select_amp(args.amp, world.device)),
        "augmentation": _augmentation(loader),
        "topk": None if args.distillation_type == "hard" else args.teacher_cache_topk,
    }


def _augmentation(loader: datasets.EpochLoader) -> dict[str, str]:
    """Where views are made, and the versions of what makes them."""
    on_device = isinstance(loader.loader, datasets.DeviceLoader)
    code = ("torch", "timm") if on_device else ("timm", "torchvision", "pillow")
    return {"where": "device" if on_device else "host"} | {name: version(name) for name in code}


def build_criterion(
    args: argparse.Namespace, student: torch.nn.Module, source: Any, loader: datasets.EpochLoader, world: World
) -> losses.SupervisedLoss | losses.DistillationLoss:
    """The base criterion, with a teacher if there is one."""
    base = losses.build_base_criterion(args.bce_loss, args.smoothing)
    if args.distillation_type == "none":
        return losses.SupervisedLoss(base)
    if args.teacher_cache:
        teacher = build_cached_teacher(args, student, source, loader, world)
    else:
        teacher = build_teacher(args, student, source.num_classes, world.device)
    return losses.DistillationLoss(
        base,
        teacher,
        args.distillation_type,
        alpha=args.distillation_alpha,
        tau=args.distillation_tau,
        scale=args.distillation_scale,
    )


def build_state(
    args: argparse.Namespace, model: torch.nn.Module, trained: torch.nn.Module, images_per_batch: int, world: World
) -> engine.TrainState:
    """Optimiser, precision, weight average, compilation and DDP around a model, or the part of it that is trained."""
    effective_batch = images_per_batch * args.accum_steps
    lr = args.lr * {"linear": effective_batch / 512, "sqrt": (effective_batch / 512) ** 0.5, "none": 1}[args.lr_scaling]
    logger.info("effective batch %d images, peak learning rate %.3g", effective_batch, lr)
    optimizer = engine.build_optimizer(
        model,
        args.opt,
        lr=lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        eps=args.opt_eps,
        betas=args.opt_betas,
    )
    ema = None
    if args.model_ema:
        device = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)
    if args.compile:
        # An EViT is compiled anew at each step of its keep rate, for training and for evaluation; after 8 times torch
        # would silently compile no more.
        torch._dynamo.config.cache_size_limit = 4 * (models_evit.SHRINK_STEPS + 1)
        model.compile()  # in place, so that parameter names keep no prefix
    wrapped = trained
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        wrapped = DistributedDataParallel(trained, device_ids=devices, gradient_as_bucket_view=True)
        shape = (3, *_size(args)) if trained is model else (trained.in_features,)
        engine.settle_buckets(wrapped, torch.zeros(2, *shape, device=world.device))
    amp_dtype = engine.select_amp(args.amp, world.device)
    return engine.TrainState(
        wrapped,
        model,
        optimizer,
        amp_dtype=amp_dtype,
        accum_steps=args.accum_steps,
        clip_grad=args.clip_grad,
        max_skipped_steps=args.max_skipped_steps,
        ema=ema,
    )


def build_schedules(
    args: argparse.Namespace, state: engine.TrainState, updates_per_epoch: int
) -> list[engine.Schedule]:
    """Everything that follows the number of updates."""
    learning_rate = engine.build_lr_schedule(
        state.optimizer,
        updates_per_epoch,
        args.epochs,
        args.warmup_epochs,
        sched=args.sched,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
        cooldown_epochs=args.cooldown_epochs,
        noise=args.lr_noise,
        noise_pct=args.lr_noise_pct,
        noise_std=args.lr_noise_std,
        noise_seed=args.seed,
    )
    if not models_evit.is_evit(args.model):
        return [learning_rate]
    return [
        learning_rate,
        models_evit.KeepRate(
            engine.modules_of(state).values(),
            updates_per_epoch,
            start_epoch=10 if args.shrink_start_epoch is None else args.shrink_start_epoch,
            epochs=args.shrink_epochs or 0,
        ),
    ]


# Flags that may change between a run and the one that resumes it without changing a bit of its weights. (What the data
# and the precision are is compared by itself.)
FREE_FLAGS = frozenset(("output_dir", "overwrite", "resume", "finetune", "pretrained", "eval", "eval_interval"))
FREE_FLAGS |= {"log_interval", "num_workers", "pin_mem", "device", "amp", "augment", "checkpoint_minutes", "data_path"}
FREE_FLAGS |= {"ram_cache", "teacher_cache", "teacher_path", "teacher_pretrained", "precompute_batch_size"}
FREE_FLAGS |= {"precompute_teacher", "dist_eval", "distributed", "world_size", "dist_url", "patience_epochs"}


def describe_run(
    args: argparse.Namespace, source: Any, loader: datasets.EpochLoader, state: engine.TrainState, world: World
) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of its run: the flags, and what else its bits depend on."""
    indexed, cuda = isinstance(source, datasets.Source), world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"{world.device.type} ({torch.get_num_threads()})"
    return {
        "args": vars(args),
        "run": {
            "images": len(source),
            "labels": zlib.crc32(source.targets[source.order].tobytes()) if indexed else None,
            "file_names": zlib.crc32(source.file_names()) if indexed else None,
            "processes": world.size,
            "augmentation": _augmentation(loader)["where"],
            "device (threads)": device,
            "precision": str(state.amp_dtype),
            "teacher": utils.file_hash(args.teacher_path) if args.teacher_path else None,
            "versions": {name: version(name) for name in ("torch", "timm", "torchvision", "pillow")},
        },
    }


def resume(
    args: argparse.Namespace, state: engine.TrainState, loader: datasets.EpochLoader, about: dict[str, dict[str, Any]]
) -> None:
    """Go on where `--resume` was written, and say what keeps the run from being the same to the bit.

    Args:
        about: what `describe_run` says of this run.

    Raises:
        UserError: if the checkpoint is for another model or another optimiser, or holds weights only.
    """
    checkpoint = utils.read_checkpoint(args.resume, "--resume")
    changes = _changes(checkpoint, about)
    if checkpoint.get("progress") and isinstance(loader.counter, datasets.StreamingImages):
        changes.append("a stream has no places, so the epoch begins again")
        checkpoint["progress"] = None
    state.resume(checkpoint, args.resume, loader.updates_per_epoch, loader.images_per_update)
    if loader.broken is not None:
        loader.broken.restore(checkpoint.get("broken_images") or [])
    if changes:
        logger.warning("%s: the run goes on, but not to the bit as it would have: %s", args.resume, "; ".join(changes))
    done = state.num_updates - state.epoch * loader.updates_per_epoch
    logger.info("going on with epoch %d after %d of its %d updates", state.epoch, done, loader.updates_per_epoch)
    furthest, least = utils.agree(state.num_updates, -state.num_updates)
    if furthest != -least:
        raise UserError(f"--resume {args.resume}: the processes read different files; name one that all of them see")


def _changes(checkpoint: dict[str, Any], now: dict[str, dict[str, Any]]) -> list[str]:
    """What differs from the run that wrote the checkpoint, and shows in every further bit; None is not known."""
    flags = checkpoint.get("args") or {}
    then = {"args": vars(flags) if isinstance(flags, argparse.Namespace) else flags, "run": checkpoint.get("run") or {}}
    then, now = (json.loads(json.dumps(each, default=str)) for each in (then, now))  # no difference of list and tuple
    flags = vars(get_parser().parse_args([])).keys() - FREE_FLAGS  # those of a job are in args as well
    changes = [
        (f"--{name.replace('_', '-')}", value, now["args"][name])
        for name, value in then["args"].items()
        if name in flags
    ]
    changes += [
        (name.replace("_", " "), value, now["run"][name])
        for name, value in then["run"].items()
        if now["run"].get(name) is not None
    ]
    return [f"{name} was {old}, is {new}" for name, old, new in changes if old != new]


def open_output(
    args: argparse.Namespace, state: engine.TrainState, world: World
) -> tuple[Path | None, utils.TensorBoard | None]:
    """Output folder and, on rank 0, a TensorBoard writer.

    Raises:
        UserError: if the folder cannot be written, or holds an earlier run that would be lost.
    """
    if not args.output_dir:
        return None, None
    folder = Path(args.output_dir)
    if utils.holds_checkpoint(folder) and not args.resume and not args.overwrite:
        raise UserError(
            f"--output-dir {folder}: holds an earlier run; go on with --resume auto, name another folder, or add "
            f"--overwrite"
        )
    utils.barrier()  # all have looked before anyone writes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not world.is_main:
            return folder, None
        utils.remove_temporary_files(folder)
        utils.write_whole(folder / "config.json", (json.dumps(vars(args), indent=1, default=str) + "\n").encode())
        utils.open_log(folder, state.epoch)
        step = state.num_updates * state.accum_steps
        return folder, utils.TensorBoard(folder / "tensorboard", step, state.epoch)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror}); name another folder") from None


def evaluate_only(args: argparse.Namespace, model: torch.nn.Module, val_loader: Any, world: World) -> None:
    """`--eval`: the weights, and their average if the checkpoint has one."""
    weights = {"test": None}
    if args.resume:
        checkpoint = utils.read_checkpoint(args.resume, "--resume")
        weights = {"test": models.weights_of(checkpoint, "--resume", args.resume)}
        if checkpoint.get("model_ema"):
            weights["test_ema"] = checkpoint["model_ema"]
    for prefix, state_dict in weights.items():
        if state_dict is not None:
            models.load_exactly(model, state_dict, args.resume)
        stats = engine.evaluate(model, val_loader, engine.autocast(model, engine.select_amp(args.amp, world.device)))
        logger.info(engine.describe({f"{prefix}_{name}": value for name, value in stats.items()}))


def precompute_only(
    args: argparse.Namespace,
    student: torch.nn.Module,
    teacher: teacher_cache.CachedTeacher,
    loader: datasets.EpochLoader,
    prepare: Callable,
    world: World,
) -> None:
    """`--precompute-teacher`: the store of answers, and no student."""
    engine.precompute(
        teacher,
        loader,
        prepare,
        _view_epochs(args),
        engine.autocast(student, engine.select_amp(args.amp, world.device)),
        seed=args.seed,
        world=world,
        group=max(1, (args.precompute_batch_size or 0) // args.batch_size),
        log_interval=args.log_interval,
    )


def main(args: argparse.Namespace) -> None:
    """One run, from flags to the last checkpoint. Flags are read, never changed.

    Raises:
        UserError: before training starts, if the flags or files are wrong.
        RunError: during training, on all ranks.
    """
    check_flags(args)
    world = utils.init_distributed(args.device)
    utils.set_up_logging(world)
    utils.set_up_kernels(args.deterministic)
    args = settle_resume(args, world)
    train, val = build_sources(args, world)
    model = build_model(args, train.num_classes, world.device)
    val_loader = build_val_loader(args, val, model, world)
    if args.eval:
        evaluate_only(args, model, val_loader, world)
        return utils.shut_down_distributed()
    view, trained = build_train_view(args, model, train, world.device), model
    if args.cache_features:
        train, view, trained = cache_features(args, model, train, world)
    train_loader = build_train_loader(args, train, view, world)
    prepare = build_prepare(args, train.num_classes, world.device)
    criterion = build_criterion(args, model, train, train_loader, world)
    if args.precompute_teacher:
        precompute_only(args, model, criterion.teacher, train_loader, prepare, world)
        return utils.shut_down_distributed()
    state = build_state(args, model, trained, train_loader.images_per_batch, world)
    schedules = build_schedules(args, state, train_loader.updates_per_epoch)
    about = describe_run(args, train, train_loader, state, world)
    if args.resume:
        resume(args, state, train_loader, about)
    output_dir, writer = open_output(args, state, world)
    engine.fit(
        state,
        train_loader,
        val_loader,
        criterion,
        prepare,
        schedules,
        epochs=args.epochs,
        world=world,
        about=about,
        output_dir=output_dir,
        writer=writer,
        seed=args.seed,
        log_interval=args.log_interval,
        eval_interval=args.eval_interval,
        augmentation_epochs=args.augmentation_epochs,
        checkpoint_minutes=args.checkpoint_minutes,
    )
    if writer is not None:
        writer.close()
    utils.shut_down_distributed()


def cli(argv: Sequence[str] | None = None) -> None:
    """`main` with a command's exit statuses.

    0 done, 1 a fault during the run, 2 a mistake in the flags or files, 75 stopped by a signal and saved.
    """
    args = get_parser().parse_args(argv)
    try:
        main(args)
    except Exception as error:
        rank = f"rank {os.environ.get('RANK', '')}: " if utils.is_distributed() else ""
        if isinstance(error, UserError):
            _end(f"main.py: error: {error}", 2)
        if isinstance(error, Preempted):
            _end(f"main.py: {rank}{error}", 75)
        if isinstance(error, RunError):
            _end(f"main.py: {rank}run ended: {utils.last_line(error)}", 1)
        if utils.is_lost_loader(error):
            _end(
                f"main.py: {rank}run ended: a loader process is gone ({utils.last_line(error)}); if memory ran out, "
                f"lower --num-workers or --ram-cache; the last checkpoint is intact",
                1,
            )
        if not utils.is_distributed():
            raise
        if utils.is_lost_peer(error):
            _end(
                f"main.py: {rank}run ended: another process is gone (its own message says why); the last checkpoint "
                f"is intact",
                1,
            )
        _end(f"{traceback.format_exc()}main.py: {rank}run ended: {type(error).__name__}: {utils.last_line(error)}", 1)


def _end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    # A rank that fails must not wait at exit for the others, nor they for it.
    if utils.is_distributed():
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    cli()
