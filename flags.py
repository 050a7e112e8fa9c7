"""Every flag of a run: the parser, and the checks of how flags go together."""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from timm.utils import ParseKwargs

import datasets
import models_evit
from utils import UserError


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


def in_range(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], Any]:
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


_COUNT, _NATURAL = in_range(int, 1), in_range(int, 0)
_RATE, _SHARE, _NON_NEGATIVE = in_range(float, 0, 1), in_range(float, 0, 1, open_low=True), in_range(float, 0)
_POSITIVE = in_range(float, 0, open_low=True)
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
    add("--drop", type=in_range(float, 0, 0.999), default=0.0, help="dropout rate")
    add("--drop-path", type=in_range(float, 0, 0.999), default=0.1, help="stochastic-depth rate")
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


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
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
    add_data_arguments(parser)
    _add_augmentation_arguments(parser)
    _add_optimization_arguments(parser)
    _add_distillation_arguments(parser)
    return parser


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a run; by default those of this process."""
    return get_parser().parse_args(words)


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
