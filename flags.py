"""All flags of a run: the parser, what each flag affects, and checks of flags that depend on each other."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from timm.optim import get_optimizer_info, list_optimizers

import datasets
import models
import models_evit
from augment import PADDING, SMALL_IMAGE
from checkpoints import flags_of, read_checkpoint, split_address
from utils import UserError, escaped, is_utf8, regular_file

MAX_WORDS, MAX_RECIPES = 10_000, 100  # limits of a command line
MAX_RECIPE_BYTES = 2**16  # bytes

# Flags of timm's train.py that have another name here, or that only look like a flag of ours ("").
OF_TIMM = {
    "-b": "--batch-size",
    "-j": "--num-workers",
    "--amp-dtype": "--amp",
    "--aug-repeats": "--repeated-aug",
    "--bn-momentum": "",
    "--checkpoint-hist": "",
    "--crop-pct": "--eval-crop-ratio",
    "--data-dir": "--data-path",
    "--drop-block": "",
    "--experiment": "--output-dir",
    "--img-size": "--input-size",
    "--initial-checkpoint": "--finetune",
    "--kd-distill-type": "--distillation-type",
    "--kd-model-name": "--teacher-model",
    "--kd-temperature": "--distillation-tau",
    "--pretrained-path": "--finetune",
    "--torchcompile": "--compile",
    "--train-crop-mode": "",
    "--vflip": "",
    "--wandb-project": "--log-wandb",
}
# Mutually exclusive flags, a switch and one with a file: a typed flag replaces the other one in a recipe.
ALTERNATIVES = (("--pretrained", "--finetune"), ("--teacher-pretrained", "--teacher-path"))
EXAMPLES = """Train and evaluate data-efficient image transformers.

train        python main.py --model deit_tiny_patch16_224 --data-set CIFAR
4 GPUs       torchrun --nproc-per-node 4 main.py --data-path /path/to/imagenet
your photos  python main.py @recipes/finetune_photos.args --data-path photos
resume       python main.py FLAGS --resume auto
evaluate     python main.py --eval --resume output/best.pth
"""


class _Help(argparse.HelpFormatter):
    """Help formatter that keeps line breaks in descriptions and shows defaults that are informative."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "PATH" if action.type is Path else getattr(action.type, "metavar", "NAME")

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is True:
            return f"{text}; default: on"
        if (
            "default" in text
            or default in ("", {}, [])
            or any(default is none for none in (None, False, argparse.SUPPRESS))
        ):
            return text
        values = default if isinstance(default, list) else [default]
        return f"{text}; default: {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, underscores as an alternative spelling of flags, and @recipes with comments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = self._expanded(sys.argv[1:] if args is None else args)
        return super().parse_known_args(words, namespace)

    def _expanded(self, words: Sequence[str]) -> list[str]:
        """Hyphenate flags and replace each `@file` by the words in that file, recursively."""
        typed = {_hyphenated(word).partition("=")[0] for word in words}
        pairs = [*ALTERNATIVES, *((new, old) for old, new in ALTERNATIVES)]
        replaced = {old for old, new in pairs if new in typed and old not in typed}
        with_file = {flag for _, flag in ALTERNATIVES}
        found: list[str] = []
        recipes = 0
        pending = [(word, ()) for word in reversed(words)]  # (word, recipes that contain it)
        while pending:
            word, within = pending.pop()
            if not word.startswith("@"):
                flag, equals, _ = (word := _hyphenated(word)).partition("=")
                if not (within and flag in replaced):
                    found.append(word)
                elif flag in with_file and not equals and pending and not pending[-1][0].startswith("-"):
                    pending.pop()  # the file
                continue
            path, recipes = os.path.realpath(word[1:]), recipes + 1
            if path in within:
                self.error(f"{word}: includes itself; drop the line")
            pending += [(each, (*within, path)) for each in reversed(self._words_of(word[1:]))]
            if recipes > MAX_RECIPES or len(pending) + len(found) > MAX_WORDS:
                self.error(f"{word}: above {MAX_RECIPES} recipes or {MAX_WORDS} words; the recipes are in recipes/")
        return found

    def _words_of(self, path: str) -> list[str]:
        """Return the words of a recipe, line by line."""
        words: list[str] = []
        try:
            if regular_file(path).stat().st_size > MAX_RECIPE_BYTES:
                self.error(f"@{path}: a recipe has at most {MAX_RECIPE_BYTES} bytes; the recipes are in recipes/")
            with open(path, encoding="utf-8") as file:
                lines = file.read().splitlines()
            for line in lines:
                if "\0" in line:
                    raise UnicodeError
                words += _split_line(line)
        except OSError as error:
            self.error(f"@{path[:200]}: {error.strerror}; the recipes are in recipes/")
        except UnicodeError:
            self.error(f"@{path}: is not text; the recipes are in recipes/")
        except ValueError as error:
            self.error(f"line {line.strip()!r} of @{path}: {error}; close the quotation")
        return words

    def error(self, message: str) -> NoReturn:
        hints = [self._meant(word) for word in message.partition("unrecognized arguments: ")[2].split()]
        message += "".join(f"; did you mean {hint}?" for hint in hints if hint)
        self.exit(2, f"{self.prog}: error: {escaped(message)}; --help lists the flags\n")

    def _meant(self, word: str) -> str:
        """Return the flag that an unknown word stands for, or several flags written without spaces; '' if unclear."""
        known = self._option_string_actions.keys() - {"--overwrite", "--no-overwrite"}  # a typo must not delete a run
        flag = word.partition("=")[0]
        joined = flag.replace("--", " --").split()
        if len(joined) > 1 and known.issuperset(joined):
            return " ".join(joined)
        if flag in OF_TIMM:
            return OF_TIMM[flag] if OF_TIMM[flag] in known else ""
        return next(iter(difflib.get_close_matches(flag, known, n=1, cutoff=0.8)), "")


def _split_line(line: str) -> list[str]:
    """Split a recipe's line like a shell: `#` begins a comment at the start of a word only (shlex: anywhere)."""
    lexer, words = shlex.shlex(line, posix=True), []
    lexer.whitespace_split, lexer.commenters = True, ""
    while (rest := line[lexer.instream.tell() :].lstrip(lexer.whitespace)) and not rest.startswith("#"):
        words.append(lexer.get_token())
    return words


def _hyphenated(word: str) -> str:
    """Spell a flag with hyphens: `--data_path=a_b` -> `--data-path=a_b`."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def in_range(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], Any]:
    """Return an argparse type for numbers from `low` (excluded if `open_low`) to `high`."""

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

    parse.metavar = "N" if kind is int else "X"
    return parse


def path_name(text: str) -> str:
    """Check a path argument (an argparse type): it can be looked up, and file names fit below it. URLs pass."""
    try:
        if "://" not in text:
            os.stat(os.path.join(text, "x" * 64))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long, a loop of links, a folder without permission
        raise argparse.ArgumentTypeError(f"{text[:80]}: {error.strerror}; name another path") from None
    return text


path_name.metavar = "PATH"


class _ModelKwargs(argparse.Action):
    """Parser of `embed_dim=96 depth=6` into {"embed_dim": 96, "depth": 6}; values are Python literals or text."""

    TAKEN = frozenset(("name", "flag", "input_size", "num_classes", "pretrained", "checkpoint_path"))
    MAX_LENGTH = 2000  # maximum characters of a value

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        wrong = next((value for value in values if "=" not in value), None)
        if wrong is not None:
            raise argparse.ArgumentError(self, f"{wrong[:80]!r} is not of the form key=value")
        found = {key: self._literal(key, text) for key, _, text in (value.partition("=") for value in values)}
        taken = self.TAKEN & found.keys()
        if taken:
            raise argparse.ArgumentError(self, f"{min(taken)!r} is set by another flag; drop it")
        setattr(namespace, self.dest, found)

    def _literal(self, key: str, text: str) -> Any:
        if len(text) > self.MAX_LENGTH:  # Python's parser has crashed on much longer values
            raise argparse.ArgumentError(self, f"the value of {key[:80]!r} is longer than {self.MAX_LENGTH} characters")
        try:
            return ast.literal_eval(text)
        except (RecursionError, MemoryError):
            raise argparse.ArgumentError(self, f"the value of {key[:80]!r} is nested too deeply") from None
        except (ValueError, SyntaxError):
            return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# What each flag affects. A flag may be in several rows; tests/test_flags.py checks that each is in at least one.
SHAPES = {
    # the function that the model computes with a checkpoint's weights
    "model": _names("model patch_size model_kwargs drop_loc fuse_token"),
    # likewise, but an evaluation may change them on purpose
    "adjustable": _names("input_size base_keep_rate"),
    # which tokens an EViT drops, and when
    "tokens": _names("base_keep_rate drop_loc fuse_token shrink_start_epoch shrink_epochs"),
    # the evaluation data
    "evaluation": _names("""
        data_set data_path inat_category inat_numbering train_split val_split val_fraction upright image_column
        label_column num_classes eval_crop_ratio
    """),
    # the training views; the batch size with Mixup only
    "views": _names("""
        data_set image_column train_fraction val_fraction upright class_balanced seed input_size repeated_aug hflip
        color_jitter aa src train_interpolation
        reprob remode recount mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode batch_size
    """),
    # the teacher's predictions for these views, as they are cached
    "teacher": _names("distillation_type teacher_model teacher_model_kwargs teacher_input_size teacher_cache_topk"),
    # the updates: loss, optimizer, schedules, trained parameters
    "updates": _names("""
        batch_size accum_steps epochs opt opt_eps opt_betas momentum weight_decay clip_grad lr lr_scaling
        sched sched_on_epochs warmup_epochs warmup_lr min_lr decay_epochs decay_milestones decay_rate poly_power
        lr_noise lr_noise_pct lr_noise_std smoothing bce_loss distillation_alpha distillation_tau distillation_scale
        distill_on_class_token cosub layer_decay drop drop_path train_scope cache_features grad_checkpointing model_ema
        model_ema_decay model_ema_warmup model_ema_force_cpu augmentation_epochs skip_broken_images
        max_skipped_steps compile compile_augment deterministic train_mode
    """),
    # free to change on resume (a resumed run checks by itself what matters)
    "nothing": _names("""
        output_dir overwrite resume finetune pretrained head_init_scale early_stop dry_run log_wandb eval
        eval_interval log_interval num_workers pin_mem device amp augment checkpoint_minutes data_path ram_cache
        teacher_cache teacher_path teacher_pretrained precompute_batch_size precompute_teacher precompute_epochs
        allow_class_mismatch stop_timeout start_epoch nb_classes
    """),
    # from original command lines: no effect, or an error that names the tool to use
    "original": _names("""
        dist_eval distributed world_size dist_url local_rank cooldown_epochs patience_epochs resplit n_visualization
        test_speed only_test_speed visualize_mask
    """),
}
FREE_ON_RESUME = {*SHAPES["nothing"], *SHAPES["original"]}
TRAINED = (*SHAPES["model"], *SHAPES["adjustable"], *SHAPES["evaluation"])  # what an evaluation takes from a checkpoint
# With these values, each training image needs one forward pass, on its evaluation view.
ONE_VIEW = {
    "aa": "none",
    "color_jitter": 0,
    "hflip": 0,
    "reprob": 0,
    "mixup": 0,
    "cutmix": 0,
    "cutmix_minmax": None,
    "repeated_aug": False,
    "src": False,
    "cosub": False,
    "drop": 0,
    "drop_path": 0,
}

# timm schedules that can step per update, and the flags that affect each
SCHEDULES = {
    "cosine": ("min_lr",),
    "step": ("decay_epochs", "decay_rate"),
    "multistep": ("decay_milestones", "decay_rate"),
    "tanh": ("min_lr",),
    "poly": ("min_lr", "poly_power"),
    "wsd": ("min_lr", "decay_epochs"),
    "rsqrt": ("min_lr", "decay_epochs"),
    "constant": (),
}


def _cuts(args: argparse.Namespace) -> bool:
    return args.cutmix > 0 or args.cutmix_minmax is not None


def _is_large(args: argparse.Namespace) -> bool:
    return max(args.input_size) > SMALL_IMAGE


def _crops(args: argparse.Namespace) -> bool:
    return _is_large(args) and not args.src


def _trains_blocks(args: argparse.Namespace) -> bool:
    return args.train_mode and args.train_scope != "head"


def _distills(*kinds: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: args.distillation_type in kinds


def _scheduled(name: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: name in SCHEDULES[args.sched]


def _optimizer_has(option: str) -> Callable[[argparse.Namespace], bool]:
    def has(args: argparse.Namespace) -> bool:
        base = args.opt.lower().rpartition("_")[2]  # adamw, of lookahead_adamw
        return base not in list_optimizers() or getattr(get_optimizer_info(base), f"has_{option}")

    return has


# Flags that have an effect in some runs only: (flags, condition, what they need).
ACTS_IF: list[tuple[str, Callable[[argparse.Namespace], bool], str]] = [
    ("mixup_prob mixup_mode", lambda args: args.mixup > 0 or _cuts(args), "--mixup or --cutmix"),
    ("mixup_switch_prob", lambda args: args.mixup > 0 and _cuts(args), "both --mixup and --cutmix"),
    ("cutmix", lambda args: args.cutmix_minmax is None, "a run without --cutmix-minmax, which replaces it"),
    ("remode recount", lambda args: args.reprob > 0, "--reprob"),
    ("color_jitter", lambda args: args.aa in ("", "none") or "3a" in args.aa, "--aa none or 3a; policies replace it"),
    ("train_interpolation", lambda args: args.train_interpolation != "random" or _crops(args), "resized crops"),
    ("cosub", lambda args: args.drop_path > 0, "--drop-path; without, both submodels are the whole model"),
    ("cosub", _trains_blocks, "blocks in training mode"),
    ("drop_path", lambda args: args.drop_path == 0 or _trains_blocks(args), "blocks in training mode"),
    ("drop", lambda args: args.drop == 0 or args.train_mode, "--train-mode"),
    ("eval_crop_ratio", _is_large, f"images above {SMALL_IMAGE} px"),
    ("data_path", lambda args: args.data_set != "DIGITS", "another --data-set; DIGITS are bundled"),
    ("inat_category inat_numbering", lambda args: args.data_set.startswith("INAT"), "--data-set INAT or INAT19"),
    ("model_ema_decay model_ema_warmup model_ema_force_cpu", lambda args: args.model_ema, "--model-ema"),
    *((name, _scheduled(name), "another --sched") for name in ("min_lr", "decay_epochs", "decay_rate", "poly_power")),
    ("start_epoch", lambda args: not args.resume, "a run that does not resume a checkpoint"),
    ("layer_decay", lambda args: args.train_scope != "head", "layers below the head to train; see --train-scope"),
    ("warmup_lr", lambda args: args.warmup_epochs > 0, "--warmup-epochs"),
    ("lr_noise_pct lr_noise_std", lambda args: bool(args.lr_noise), "--lr-noise"),
    ("momentum", _optimizer_has("momentum"), "another --opt"),
    ("opt_betas", _optimizer_has("betas"), "another --opt"),
    ("opt_eps", _optimizer_has("eps"), "another --opt"),
    (
        "teacher_model teacher_model_kwargs teacher_input_size distillation_alpha",
        _distills("soft", "hard"),
        "--distillation-type",
    ),
    ("distillation_tau distillation_scale", _distills("soft"), "--distillation-type soft"),
    (
        "teacher_cache_topk",
        lambda args: args.distillation_type == "soft" and bool(args.teacher_cache),
        "--distillation-type soft and --teacher-cache",
    ),
]

# Flags that take one number, or height and width.
_SIZES = ("input_size", "teacher_input_size")

# Arguments of timm models that download or read files.
_FETCHING = _ModelKwargs.TAKEN | {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}

COUNT, _NATURAL = in_range(int, 1), in_range(int, 0)
_RATE, _FRACTION, _NON_NEGATIVE = in_range(float, 0, 1), in_range(float, 0, 1, open_low=True), in_range(float, 0)
_POSITIVE = in_range(float, 0, open_low=True)
_SWITCH = argparse.BooleanOptionalAction


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    folder = "folder of log.txt, checkpoints and TensorBoard files; '' for none"
    add("--output-dir", type=path_name, default="output", help=folder)
    add("--overwrite", action=_SWITCH, default=False, help="overwrite an earlier run in --output-dir")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--seed", type=_NATURAL, default=0, help="seed of every random draw of the run")
    add(
        "--resume",
        type=path_name,
        default="",
        help="checkpoint to resume or evaluate (file or https URL); auto: the newest in --output-dir",
    )
    start = "first epoch of a run without a checkpoint, counted from 0; no effect with --resume"
    add("--start-epoch", type=_NATURAL, default=0, metavar="N", help=start)
    add("--checkpoint-minutes", type=_NON_NEGATIVE, metavar="M", help="save within an epoch too, every M minutes")
    overdue = "after a stop signal, exit if the current update takes longer than S seconds; save first if possible"
    add("--stop-timeout", type=_NON_NEGATIVE, default=60.0, metavar="S", help=overdue)
    add(
        "--max-skipped-steps",
        type=_NATURAL,
        default=0,
        metavar="N",
        help="skip up to N updates per epoch with a non-finite loss or gradient; above 0: syncs the GPU every update",
    )
    dry = "make two updates, evaluate one batch, log the expected time and memory of the run, and save nothing"
    add("--dry-run", action=_SWITCH, default=False, help=dry)
    add("--log-wandb", metavar="PROJECT", default="", help="also log to this Weights & Biases project")
    add("--eval", action=_SWITCH, default=False, help="evaluate the weights of --resume, --finetune or --pretrained")
    add("--eval-interval", type=COUNT, default=1, help="epochs between evaluations; the last epoch is always evaluated")
    early = "stop after N epochs without a better top-1; default: train all --epochs"
    add("--early-stop", type=COUNT, metavar="N", help=early)
    add("--log-interval", type=COUNT, default=50, help="steps between log lines and checks for a non-finite loss")
    workers = "data-loader workers per rank; default: one per CPU of the rank, at most 10 if --augment uses the device"
    add("--num-workers", type=_NATURAL, help=workers)
    add("--pin-mem", action=_SWITCH, default=True, help="use pinned memory for faster copies to a GPU")
    add(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="mixed precision; auto: bf16 if the hardware has it, fp16 on other GPUs, else off",
    )
    add("--compile", action=_SWITCH, default=False, help="compile model and teacher with torch.compile")
    add("--compile-augment", action=_SWITCH, default=True, help="compile the augmentation on a CUDA GPU")
    add("--deterministic", action=_SWITCH, default=False, help="use bitwise reproducible CUDA kernels (slower)")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    extra = {"nargs": "+", "action": _ModelKwargs, "default": {}, "metavar": "K=V"}
    add("--model", default="deit_base_patch16_224", help="any timm model name")
    add(
        "--input-size",
        type=COUNT,
        nargs="+",
        default=[224],
        metavar="PIXELS",
        help="image height, and width if it differs; default: 224",
    )
    add("--patch-size", type=COUNT, help="patch edge in pixels; default: the model's own")
    add("--model-kwargs", **extra, help="more keyword arguments of the timm model, instead of those of a recipe")
    add("--drop", type=in_range(float, 0, 0.999), default=0.0, help="dropout rate before the head")
    add("--drop-path", type=in_range(float, 0, 0.999), default=0.1, help="stochastic-depth rate")
    mode = "train in model.train() mode; --no-train-mode: in model.eval() mode (no dropout, no stochastic depth, fixed "
    mode += "batch statistics), as the original DeiT and EViT fine-tune"
    add("--train-mode", action=_SWITCH, default=True, help=mode)
    add("--grad-checkpointing", action=_SWITCH, default=False, help="recompute activations to save memory (slower)")
    add("--pretrained", action=_SWITCH, default=False, help="start from timm's pretrained weights (downloaded)")
    finetune = "start from the weights of this checkpoint (file or https URL)"
    add("--finetune", type=path_name, default="", help=finetune)
    add("--head-init-scale", type=_POSITIVE, metavar="S", help="multiply the weights of a new head by S; default: 1")
    scope = "parameters to train: all; head; attn: attention, position embedding and head"
    add("--train-scope", choices=("all", "head", "attn"), default="all", help=scope)
    add(
        "--cache-features",
        action=_SWITCH,
        default=False,
        help="run the frozen part of the model once per image; needs --train-scope head",
    )
    add("--model-ema", action=_SWITCH, default=True, help="keep, evaluate and save EMA weights")
    add("--model-ema-decay", type=_RATE, default=0.99996, help="decay of the EMA weights per update")
    add("--model-ema-warmup", action=_SWITCH, default=False, help="increase the decay from 0, for short runs")
    add("--model-ema-force-cpu", action=_SWITCH, default=False, help="keep and evaluate the EMA weights on the CPU")


def _layers(text: str) -> list[int]:
    """Parse `3,6,9` or `(3, 6, 9)` into [3, 6, 9]."""
    return [_NATURAL(layer) for layer in text.strip("()[] ").split(",") if layer.strip()]


def keep_rates(text: str) -> float | list[float]:
    """Parse `0.7` into 0.7, and `0.7,0.7,0.5` into [0.7, 0.7, 0.5]."""
    rates = [_FRACTION(rate) for rate in text.strip("()[] ").split(",") if rate.strip()]
    return rates[0] if len(rates) == 1 else rates


def _add_token_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("token reorganization (evit_* models)").add_argument
    rates = "fraction of patches to keep, or one per layer: 0.7,0.7,0.5; default: 0.7 (*_shrinkNN models: 0.NN)"
    add("--base-keep-rate", type=keep_rates, metavar="RATE", help=rates)
    add("--drop-loc", type=_layers, metavar="LAYERS", help="layers that drop patches, counted from 0; default: 3,6,9")
    fuse = "fuse the dropped patches into one token; default: on, as in EViT's training scripts"
    add("--fuse-token", action=_SWITCH, default=None, help=fuse)
    start = "first epoch that drops patches; default: 10 (in the paper: 10 from scratch, 0 for fine-tuning)"
    add("--shrink-start-epoch", type=_NATURAL, help=start)
    epochs = "epochs over which the keep rate falls; default: 0 (in the paper: 100 from scratch, 0 for fine-tuning)"
    add("--shrink-epochs", type=_NATURAL, help=epochs)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `datasets.DataOptions`, and --eval-crop-ratio."""
    add = parser.add_argument_group("data").add_argument
    add("--data-set", default="IMNET", help=f"{datasets.KNOWN_NAMES}; IMNET: class folders")
    add("--data-path", type=path_name, help="folder of the data; CIFAR and FLOWERS are downloaded to ./data by default")
    levels = f"level of iNaturalist's taxonomy: {', '.join(datasets.INAT_CATEGORIES)}"
    add("--inat-category", choices=datasets.INAT_CATEGORIES, default="name", metavar="LEVEL", help=levels)
    order = "order of iNaturalist's classes: category id, or (original) first appearance in the training annotations"
    add("--inat-numbering", choices=("id", "original"), default="id", help=order)
    splits = "name of the {} split (CSV files, timm's data sets), or of the folder {}/ (IMNET, CIFAR folders)"
    add("--train-split", default="train", help=splits.format("training", "train"))
    add("--val-split", default="validation", help=splits.format("validation", "val"))
    column = "column of the {} in csv/, hfds/, hfids/ and tfds/; for wds/, {}; default: the usual names"
    image, label = column.format("images", "their file suffix"), column.format("classes", "a field of the json files")
    add("--image-column", metavar="NAME", help=image)
    add("--label-column", metavar="NAME", help=label)
    add("--num-classes", type=COUNT, help="number of classes, if the data do not state it")
    add("--nb-classes", type=COUNT, metavar="N", help="exit with an error if the data do not have N classes")
    held_out = "fraction of each class to hold out for validation, if there is no val/ folder or split column; an "
    held_out += "evaluation takes it from the checkpoint, unless --data-path is another"
    add("--val-fraction", type=in_range(float, 0, 0.9), default=0.0, metavar="F", help=held_out)
    upright = "rotate photos in folders and CSV files by their EXIF orientation"
    add("--upright", action=_SWITCH, default=False, help=upright)
    add("--train-fraction", type=_FRACTION, default=1.0, help="fraction of the training images of each class to use")
    cache = "keep decoded data of up to MIB mebibytes in memory; 0: keep none"
    add("--ram-cache", type=_NON_NEGATIVE, default=1024, metavar="MIB", help=cache)
    broken = "replace up to N unreadable training images with the next image"
    add("--skip-broken-images", type=_NATURAL, default=0, metavar="N", help=broken)
    mismatch = "only warn if class names of a checkpoint, teacher or cache differ from those of the data"
    add("--allow-class-mismatch", action=_SWITCH, default=False, help=mismatch)
    crop = "crop size / resized size in evaluation (timm's crop_pct); no effect up to 64 px"
    add("--eval-crop-ratio", type=_FRACTION, default=0.875, help=crop)


def _add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    where = "where to augment images; auto: on a GPU if the images are in memory or packed, else on the host"
    add("--augment", choices=("auto", "host", "device"), default="auto", help=where)
    jitter = "strength of color jitter; only with --aa none or 3a"
    add("--color-jitter", type=_NON_NEGATIVE, default=0.3, help=jitter)
    policy = "AutoAugment policy in timm's notation, 3a (DeiT III), or none"
    add("--aa", metavar="POLICY", default="rand-m9-mstd0.5-inc1", help=policy)
    crop = "simple random crop: resize the short side, pad 4 px by reflection, crop; instead of random resized crops"
    add("--src", action=_SWITCH, default=False, help=crop)
    add("--hflip", type=_RATE, default=0.5, help="probability of a horizontal flip")
    add(
        "--train-interpolation",
        choices=("random", "bilinear", "bicubic"),
        default="bicubic",
        help="interpolation of training images; random: one of the two per random resized crop",
    )
    repeated = "repeated augmentation: each epoch draws a third of the images and augments each three times"
    add("--repeated-aug", action=_SWITCH, default=True, help=repeated)
    balanced = "draw all classes equally often; images of small classes repeat within an epoch"
    add("--class-balanced", action=_SWITCH, default=False, help=balanced)
    add("--reprob", type=_RATE, default=0.25, help="probability of random erasing")
    add(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="fill of erased regions: zeros, a random color, or noise",
    )
    add("--recount", type=COUNT, default=1, help="maximum number of erased regions")
    add("--mixup", type=_NON_NEGATIVE, default=0.8, help="alpha of Mixup; 0 turns it off")
    add("--cutmix", type=_NON_NEGATIVE, default=1.0, help="alpha of CutMix; 0 turns it off")
    add(
        "--cutmix-minmax",
        type=_RATE,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="range of the CutMix region's side relative to the image; replaces --cutmix",
    )
    add("--mixup-prob", type=_RATE, default=1.0, help="probability that a batch is mixed")
    add("--mixup-switch-prob", type=_RATE, default=0.5, help="probability of CutMix when both are on")
    add(
        "--mixup-mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="draw a mixing ratio per batch, pair or image (elem); pair and elem sync the GPU in every step",
    )
    again = "repeat the augmented views every K epochs; default: never"
    add("--augmentation-epochs", type=COUNT, metavar="K", help=again)
    add("--smoothing", type=_RATE, default=0.1, help="label smoothing")
    add(
        "--bce-loss",
        action=_SWITCH,
        default=False,
        help="use binary cross-entropy; all classes of a mixed image are positives",
    )
    cosub = "co-train two submodels that differ by stochastic depth (needs --drop-path; twice the cost)"
    add("--cosub", action=_SWITCH, default=False, help=cosub)


def _schedule(text: str) -> str:
    """Check that a name is in `SCHEDULES` (an argparse type)."""
    if text == "plateau":  # the original implementation fails after the warm-up, because it passes no metric
        raise argparse.ArgumentTypeError("plateau follows a metric; use --sched step, or --early-stop N to end a run")
    if text not in SCHEDULES:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is unknown; use one of {', '.join(SCHEDULES)}")
    return text


def _add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=COUNT, default=64, help="images per process and forward pass")
    add("--accum-steps", type=COUNT, default=1, help="forward passes per update")
    add("--epochs", type=COUNT, default=300, help="passes over the training data")
    add("--opt", default="adamw", help="timm's name of the optimizer")
    add("--opt-eps", type=_POSITIVE, default=1e-8, help="epsilon of the optimizer")
    add("--opt-betas", type=_RATE, nargs="+", help="betas of the optimizer; default: timm's")
    add("--momentum", type=_RATE, default=0.9, help="momentum of optimizers that have it")
    add(
        "--weight-decay",
        type=_NON_NEGATIVE,
        default=0.05,
        help="weight decay; none on biases, norms, tokens and position embedding",
    )
    add("--clip-grad", type=_POSITIVE, help="maximum gradient norm; default: no clipping")
    add("--lr", type=_POSITIVE, default=5e-4, help="peak learning rate, before --lr-scaling")
    scaling = "multiply --lr by r = effective batch size / 512 (linear), sqrt(r) (sqrt), or 1 (none)"
    add("--lr-scaling", choices=("linear", "sqrt", "none"), default="linear", help=scaling)
    layers = "multiply the learning rate by D for each layer below the head; default: the same rate for all layers"
    add("--layer-decay", type=_FRACTION, metavar="D", help=layers)
    names = ", ".join(SCHEDULES)
    add("--sched", type=_schedule, default="cosine", metavar="NAME", help=f"learning-rate schedule: {names}")
    clock = "update the learning rate every epoch, like the original implementation; default: every update"
    add("--sched-on-epochs", action=_SWITCH, default=False, help=clock)
    add("--warmup-epochs", type=_NATURAL, default=5, help="epochs of linear warm-up")
    add("--warmup-lr", type=_NON_NEGATIVE, default=1e-6, help="learning rate at the start of the warm-up")
    floor = "learning rate at the end of the schedule; no effect on step, multistep and constant"
    add("--min-lr", type=_NON_NEGATIVE, default=1e-5, help=floor)
    length = "epochs between decays of --sched step; decay length of wsd and rsqrt"
    share = "below 1: fraction of the epochs after the warm-up"
    add("--decay-epochs", type=_POSITIVE, default=30, help=f"{length} (of these two, {share})")
    add("--decay-milestones", type=COUNT, nargs="+", metavar="EPOCH", help="epochs of the decays of --sched multistep")
    add("--decay-rate", type=_POSITIVE, default=0.1, help="factor of each decay of --sched step and multistep")
    add("--poly-power", type=_POSITIVE, default=1.0, help="power of --sched poly; 1 is linear")
    add(
        "--lr-noise",
        type=_RATE,
        nargs="+",
        help="add noise to the learning rate from this fraction of the epochs on, up to a second fraction",
    )
    add("--lr-noise-pct", type=_FRACTION, default=0.67, help="maximum noise relative to the learning rate")
    add("--lr-noise-std", type=_NON_NEGATIVE, default=1.0, help="standard deviation of the noise")


def _add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    extra = {"nargs": "+", "action": _ModelKwargs, "default": {}, "metavar": "K=V"}
    add(
        "--distillation-type",
        choices=("none", "soft", "hard"),
        default="none",
        help="learn the teacher's arg-max class (hard) or its probabilities (soft)",
    )
    add("--distillation-alpha", type=_RATE, default=0.5, help="weight of the distillation loss, from 0 to 1")
    add("--distillation-tau", type=_POSITIVE, default=1.0, help="temperature of soft distillation")
    scale = "divide the soft loss by the batch size; legacy: also by the number of classes, like the original"
    add("--distillation-scale", choices=("batchmean", "legacy"), default="batchmean", help=scale)
    one_head = "apply the distillation loss to the class token; works with any student model"
    add("--distill-on-class-token", action=_SWITCH, default=False, help=one_head)
    teacher = "timm's name of the teacher; the paper's, with --teacher-pretrained, is regnety_160.deit_in1k"
    add("--teacher-model", default="regnety_160", help=teacher)
    add("--teacher-path", type=path_name, default="", help="checkpoint of the teacher (file or https URL)")
    add("--teacher-pretrained", action=_SWITCH, default=False, help="use timm's weights for the teacher (downloaded)")
    add("--teacher-model-kwargs", **extra, help="more keyword arguments of the teacher")
    size = "resize the views to this size for the teacher; default: --input-size"
    add("--teacher-input-size", type=COUNT, nargs="+", metavar="PIXELS", help=size)
    cache = "folder of cached teacher predictions; missing ones are computed and added"
    add("--teacher-cache", type=path_name, default="", metavar="FOLDER", help=cache)
    topk = "number of largest probabilities to cache per view, for soft distillation"
    add("--teacher-cache-topk", type=COUNT, default=50, metavar="K", help=topk)
    add(
        "--precompute-teacher",
        action=_SWITCH,
        default=False,
        help="compute all predictions of --teacher-cache, without training",
    )
    size = "teacher batch size, a multiple of --batch-size; default: --batch-size, bitwise identical to a live teacher"
    add("--precompute-batch-size", type=COUNT, help=size)
    only = "precompute only epochs FROM (inclusive) to TO (exclusive), e.g. to split the work across machines"
    add("--precompute-epochs", type=_epoch_range, metavar="FROM:TO", help=only)


def _add_original_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags that exist for original command lines only; `_check_original` refuses some of them."""
    add = parser.add_argument_group("flags of the original command lines").add_argument
    same = {"default": argparse.SUPPRESS}  # keep the default of the flag itself
    add("--batch", dest="batch_size", type=COUNT, **same, help="same as --batch-size")
    add("--dr", dest="decay_rate", type=_POSITIVE, **same, help="same as --decay-rate")
    add("--eval-gap", dest="eval_interval", type=COUNT, **same, help="same as --eval-interval")
    constant = {"action": "store_const"} | same
    add("--ThreeAugment", dest="aa", const="3a", **constant, help="same as --aa 3a")
    add("--attn-only", dest="train_scope", const="attn", **constant, help="same as --train-scope attn")
    add("--unscale-lr", dest="lr_scaling", const="none", **constant, help="same as --lr-scaling none")
    add("--dist-eval", action="store_true", help="no effect: all processes evaluate their share")
    add("--distributed", action="store_true", help="no effect: the launcher's environment decides")
    for name in ("--world-size", "--dist-url", "--local-rank"):
        add(name, help="no effect: the launcher's environment decides")
    for name in ("--cooldown-epochs", "--patience-epochs"):
        add(name, type=_NATURAL, default=10, help="no effect, as in the original implementation")
    add("--resplit", action="store_true", help="no effect, as in the original implementation")
    for name in ("--test-speed", "--only-test-speed"):
        add(name, action="store_true", help="refused: python -m tools.speed_test measures the speed")
    add("--visualize-mask", action="store_true", help="refused: python -m tools.visualize_tokens draws the patches")
    add("--n-visualization", type=COUNT, default=128, help="number of images of --visualize-mask")


def _epoch_range(text: str) -> range:
    """Parse `0:30` into range(0, 30)."""
    if not re.fullmatch(r"[0-9]+:[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO, such as 0:30")
    epochs = range(*map(int, text.split(":")))
    if not epochs:
        raise argparse.ArgumentTypeError(f"{text} holds no epochs")
    return epochs


def get_parser(**options: Any) -> Parser:
    """Build the parser of a run's flags; `options` go to `argparse.ArgumentParser`."""
    options = {"prog": "main.py", "usage": "%(prog)s [@RECIPE] [flags]", "description": EXAMPLES} | options
    parser = Parser(**options)
    _add_run_arguments(parser)
    _add_model_arguments(parser)
    _add_token_arguments(parser)
    add_data_arguments(parser)
    _add_augmentation_arguments(parser)
    _add_optimization_arguments(parser)
    _add_distillation_arguments(parser)
    _add_original_arguments(parser)
    return parser


def spelled(name: str) -> str:
    """Spell a name as a flag: `drop_path` -> `--drop-path`."""
    return f"--{name.replace('_', '-')}"


Options = TypeVar("Options")


def fill(kind: type[Options], args: argparse.Namespace) -> Options:
    """Fill an options dataclass, whose fields are named like flags, with the values of the flags.

    A size of one number means a square: `--input-size 224` becomes (224, 224).
    """
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}
    for name in _SIZES:
        if values.get(name):
            values[name] = values[name][0], values[name][-1]
    return kind(**values)


def shaping(args: argparse.Namespace, *rows: str) -> dict[str, Any]:
    """Return the flags in these rows of `SHAPES`, by name."""
    return {name: getattr(args, name) for row in rows for name in SHAPES[row]}


def measured_otherwise(args: argparse.Namespace, trained: Mapping[str, Any]) -> list[str]:
    """Name the flags that make an accuracy of this run incomparable to those of a checkpoint's run.

    The data folder is not among them, because it may be moved.
    """
    if "model" not in trained:
        return []
    names = [name for name in TRAINED if name in trained and name != "data_path"]
    return [spelled(name) for name in names if not models.same_function(name, vars(args), trained)]


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags of a run; by default those of this process."""
    return get_parser().parse_args(words)


def parse_command(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Parse flags; with `--eval --resume FILE`, take model and data from FILE unless `words` set them.

    With `--eval --finetune FILE`, only the keep rate is taken from FILE.

    Raises:
        UserError: if the file cannot be read, or a flag contradicts it.
    """
    parser = parser or get_parser()
    args = parser.parse_args(words)
    if args.eval and args.finetune and not args.resume:
        trained = flags_of(read_checkpoint(args.finetune, "--finetune", mmap=True))
        return _at_trained_rate(parser, sys.argv[1:] if words is None else words, trained, args.finetune)
    if not args.eval or args.resume in ("", "auto"):
        return args
    return parse_trained(parser, words, read_checkpoint(args.resume, "--resume", mmap=True), args.resume)


def parse_trained(
    parser: Parser, words: Sequence[str] | None, checkpoint: Mapping[str, Any], path: str
) -> argparse.Namespace:
    """Parse flags, taking model and data from a checkpoint unless `words` set them.

    Raises:
        UserError: if `words` contradict the checkpoint's model, or if the checkpoint names a model to download.
    """
    unset = object()
    given = vars(parser.parse_args(words, argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    saved = {name: value for name, value in flags_of(checkpoint).items() if value is not None}
    _refuse_to_fetch(saved, given, path)
    kept = TRAINED
    if given.get("data_set", saved.get("data_set")) != saved.get("data_set"):  # other data: drop all flags of the old
        kept = [name for name in kept if name not in SHAPES["evaluation"] or name in ("eval_crop_ratio", "upright")]
    elif _moves(given.get("data_path"), saved) and not str(saved.get("data_set")).startswith(datasets.CSV):
        kept = [name for name in kept if name != "val_fraction"]  # which part was held out is known of the old only
    if not models_evit.may_be_evit(str(given.get("model", saved.get("model")))):
        kept = [name for name in kept if name not in SHAPES["tokens"]]  # a plain model of an EViT's weights
    as_words = [word for name in kept if name in saved for word in _words(name, saved[name], path)]
    trained = parser.parse_args(as_words)
    if "model" in saved:
        known = {name: getattr(trained, name) for name in models.MODEL_FLAGS if name in flags_of(checkpoint)}
        models.refuse_another_model({**vars(trained), **given}, known, f"--resume {path}")
    both = [*as_words, *(sys.argv[1:] if words is None else words)]
    return _at_trained_rate(parser, both, flags_of(checkpoint), path)


def _at_trained_rate(parser: Parser, words: Sequence[str], trained: Mapping[str, Any], path: str) -> argparse.Namespace:
    """Parse flags; an EViT without a keep rate among them gets that of the checkpoint's run."""
    args, rate = parser.parse_args(words), models.trained_keep_rate(trained)
    is_set = args.base_keep_rate is not None or "keep_rate" in args.model_kwargs
    if is_set or rate is None or args.model is None or not models_evit.may_be_evit(args.model):
        return args
    if rate == models_evit.default_rate(args.model):
        return args
    return parser.parse_args([*words, *_words("base_keep_rate", rate, path)])


def _moves(data_path: str | None, saved: Mapping[str, Any]) -> bool:
    """Return True if `data_path` is given and not the folder of the checkpoint's data."""
    then = str(saved.get("data_path"))
    return data_path is not None and os.path.realpath(data_path) != os.path.realpath(then.replace("\0", ""))


def _refuse_to_fetch(saved: Mapping[str, Any], given: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint that chooses what is downloaded or, with `wds/`, which command runs; the user must do so."""
    data_set = str(saved.get("data_set"))
    if data_set.startswith(datasets.SCHEMES) and not data_set.startswith("torch/") and "data_set" not in given:
        raise UserError(
            f"--resume {path}: names data to fetch ({data_set}), which a checkpoint may not choose; if you trust it, "
            f"add --data-set {data_set}"
        )
    for name in ("data_path", "train_split", "val_split"):
        if data_set.startswith("wds/") and ":" in str(saved.get(name)) and name not in given:
            raise UserError(
                f"--resume {path}: names data to fetch ({saved[name]}), which a checkpoint may not choose; if you "
                f"trust it, add {spelled(name)} {saved[name]}"
            )


def _words(name: str, value: Any, path: str) -> list[str]:
    """Format a flag with its value in a checkpoint as command-line words."""
    if isinstance(value, bool):
        return [spelled(name) if value else f"--no-{spelled(name)[2:]}"]
    if isinstance(value, Mapping):
        keys = [str(key) for key in value if not str(key).isidentifier() or key in _FETCHING]
        if keys:
            raise UserError(f"--resume {path}: sets {keys[0]!r} in {spelled(name)}; a checkpoint may not choose that")
        return [spelled(name), *(f"{key}={each!r}" for key, each in value.items())] if value else []
    if name == "model_kwargs":
        raise UserError(f"--resume {path}: its --model-kwargs are a {type(value).__name__}; give another file")
    if name == "model" and (":" in str(value) or "/" in str(value)):
        raise UserError(f"--resume {path}: names a model to fetch ({value}), which a checkpoint may not choose")
    if name in _SIZES:  # one number in checkpoints of the original implementation
        sizes = value[-2:] if isinstance(value, (list, tuple)) else [value]  # (C, H, W) in timm
        return [spelled(name), *(str(size) for size in sizes if isinstance(size, int))]
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return [f"{spelled(name)}={text}"]


def check_flags(args: argparse.Namespace) -> None:
    """Check that flags do not contradict each other.

    Raises:
        UserError: naming the first contradiction.
    """
    _check_original(args)
    automatic = args.resume == "auto"
    if automatic and (args.eval or args.overwrite):
        other = "--eval; pass --resume FILE" if args.eval else "--overwrite; drop one of them"
        raise UserError(f"--resume auto: cannot be combined with {other}")
    if not args.output_dir and (automatic or args.checkpoint_minutes is not None or args.log_wandb):
        flag = "--resume auto" if automatic else "--log-wandb" if args.log_wandb else "--checkpoint-minutes"
        raise UserError(f"{flag}: there is no folder for its files; add --output-dir FOLDER")
    if not is_utf8(args.output_dir):
        raise UserError(f"--output-dir {args.output_dir}: is not UTF-8, which TensorBoard needs; name another folder")
    starts = [flag for flag in ("resume", "finetune", "pretrained") if getattr(args, flag)]
    if automatic:  # other weights may be given for a run that has nothing to resume yet
        starts.remove("resume")
    if len(starts) > 1:
        raise UserError(f"--{starts[0]} and --{starts[1]} both say where the weights come from; pass one of them")
    if args.eval and not starts:
        raise UserError("--eval: there are no weights to evaluate; add --resume FILE, --finetune FILE or --pretrained")
    if args.dry_run and (args.eval or args.precompute_teacher):
        raise UserError(f"--dry-run: {'--eval' if args.eval else '--precompute-teacher'} trains nothing; drop one")
    _check_teacher(args)
    if args.cosub and args.distillation_type != "none":
        raise UserError("--cosub: cannot be combined with a teacher; drop it, or --distillation-type")
    if args.cache_features:
        _check_features(args)
    given = next((spelled(name) for name in SHAPES["tokens"] if getattr(args, name) is not None), None)
    if given and not models_evit.may_be_evit(args.model):
        raise UserError(f"{given}: {args.model} has no EViT blocks; use a model such as evit_small_patch16_224")
    owners = {"keep_rate": "base_keep_rate"} | {name: name for name in ("drop_loc", "fuse_token", "patch_size")}
    for name, flag in owners.items():
        if name in args.model_kwargs and getattr(args, flag) is not None:
            raise UserError(f"{spelled(flag)}: --model-kwargs has {name}, too; pass one of them")
    for name, flag in (("drop_rate", "--drop"), ("drop_path_rate", "--drop-path")):
        if name in args.model_kwargs:
            raise UserError(f"--model-kwargs {name}: is set by another flag; pass {flag} {args.model_kwargs[name]}")
    if args.sched == "multistep" and not args.decay_milestones:
        raise UserError("--sched multistep: has no epochs to decay at; add --decay-milestones EPOCH ...")
    if args.sched == "step" and args.decay_epochs < 1:
        raise UserError(f"--decay-epochs {args.decay_epochs:g}: --sched step needs whole epochs; pass 1 or more")
    if args.decay_milestones and args.sched != "multistep":
        raise UserError(f"--decay-milestones: --sched {args.sched} has none; use --sched multistep, or drop them")
    _check_numbers(args)


def _check_teacher(args: argparse.Namespace) -> None:
    """Refuse flags of a teacher, its cache or its precomputation that do not fit together."""
    need_teacher = ("teacher_path", "teacher_pretrained", "teacher_cache", "distill_on_class_token")
    given = next((spelled(name) for name in need_teacher if getattr(args, name)), None)
    if args.distillation_type == "none" and given:
        raise UserError(f"{given}: there is no distillation; add --distillation-type hard, or drop it")
    if args.teacher_path and args.teacher_pretrained:
        raise UserError(
            "--teacher-path and --teacher-pretrained both say where the teacher's weights come from; pass one"
        )
    precomputes = ("precompute_teacher", "precompute_epochs", "precompute_batch_size")
    given = next((spelled(name) for name in precomputes if getattr(args, name)), None)
    if given and not args.teacher_cache:
        raise UserError(f"{given}: there is no folder for the predictions; add --teacher-cache FOLDER")
    if given and not args.precompute_teacher:
        raise UserError(f"{given}: nothing is precomputed; add --precompute-teacher")
    if given and args.eval:
        raise UserError("--precompute-teacher: --eval only evaluates; drop one of them")
    different = min(args.epochs, args.augmentation_epochs or args.epochs)
    if args.precompute_epochs and args.precompute_epochs.stop > different:
        raise UserError(f"--precompute-epochs: the run has views for {different} epochs; end with :{different}")


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that do not fit together or are too many."""
    if args.lr_noise and (len(args.lr_noise) > 2 or args.lr_noise != sorted(args.lr_noise)):
        noise = " ".join(map(str, args.lr_noise))
        raise UserError(f"--lr-noise {noise}: give its start, and its end if that is below 1, as fractions of --epochs")
    if args.lr_noise and args.lr_noise_pct < args.lr_noise_std / 1000:  # timm draws until the noise is below
        least = args.lr_noise_std / 1000
        raise UserError(f"--lr-noise-pct {args.lr_noise_pct:g}: is below a thousandth of --lr-noise-std; use {least:g}")
    if args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1]:
        raise UserError("--cutmix-minmax: the minimum is above the maximum; swap them")
    low, high = args.cutmix_minmax or (0.0, 1.0)
    if any(int(side * low) >= int(side * high) for side in args.input_size):
        given, sizes = f"{low:g} {high:g}", " x ".join(map(str, args.input_size))
        raise UserError(f"--cutmix-minmax {given}: both are the same number of pixels at {sizes} px; widen the range")
    if args.precompute_batch_size and args.precompute_batch_size % args.batch_size:
        multiple = max(1, args.precompute_batch_size // args.batch_size) * args.batch_size
        raise UserError(
            f"--precompute-batch-size {args.precompute_batch_size}: is not a multiple of --batch-size; use {multiple}"
        )
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch}: the run has {args.epochs} epochs; pass a lower number")
    _check_sizes(args)


def _check_sizes(args: argparse.Namespace) -> None:
    """Refuse image sizes and crops that do not fit together."""
    for name in _SIZES:
        size = getattr(args, name) or ()
        if len(size) > 2:
            given = " ".join(map(str, size))
            raise UserError(f"{spelled(name)} {given}: give one number, or height and width")
    height, width = args.input_size[0], args.input_size[-1]
    if args.src and (height != width or height <= 2 * PADDING):
        size = " ".join(map(str, args.input_size))
        raise UserError(f"--input-size {size}: --src crops squares above {2 * PADDING} px; give one such number")


def _check_original(args: argparse.Namespace) -> None:
    """Refuse flags that a tool replaces, and URLs without a hash, before anything is read or submitted."""
    values, defaults = vars(args), vars(parse_args([]))
    if args.test_speed or args.only_test_speed:
        tool = ["speed_test", "--models", args.model, "--input-size", str(args.input_size[0])]
        rates = () if args.base_keep_rate is None else ("--keep-rates", str(args.base_keep_rate))
        _refuse_for_a_tool("--test-speed" if args.test_speed else "--only-test-speed", [*tool, *rates])
    if args.visualize_mask:
        names = ("resume", "model", "base_keep_rate", "fuse_token", "drop_loc", "data_set", "data_path")
        given = [_words(name, values[name], "") for name in names if values[name] != defaults[name]]
        tool = ["visualize_tokens", "--num-images", str(args.n_visualization)]
        _refuse_for_a_tool("--visualize-mask", sum(given, tool))
    for name in ("resume", "finetune", "teacher_path"):
        if "://" in values[name]:
            split_address(values[name], spelled(name))


def _refuse_for_a_tool(flag: str, words: Sequence[str]) -> NoReturn:
    raise UserError(f"{flag}: main.py only trains and evaluates; run python -m tools.{shlex.join(words)}")


def without_effect(args: argparse.Namespace) -> list[str]:
    """Return a sentence for each flag that was changed from its default but has no effect in this run.

    With `--eval`, only flags of the evaluation data are checked.
    """
    defaults = parse_args([])
    return [
        f"{spelled(name)} has no effect: it needs {needed}"
        for names, acts, needed in ACTS_IF
        for name in _names(names)
        if getattr(args, name) != getattr(defaults, name) and not acts(args)
        if not args.eval or name in SHAPES["evaluation"]
    ]


def _check_features(args: argparse.Namespace) -> None:
    """Refuse flags that change images or frozen parts of the model together with `--cache-features`."""
    if args.train_scope != "head" or args.distillation_type != "none":
        raise UserError(
            "--cache-features: needs --train-scope head and no distillation; change those flags, or drop it"
        )
    if models_evit.is_evit(args.model) and (args.shrink_start_epoch != 0 or args.shrink_epochs != 0):
        raise UserError(
            "--cache-features: an EViT's features change with its keep rate; add --shrink-start-epoch 0 "
            "--shrink-epochs 0"
        )
    needed = [_turned_off(name, off) for name, off in ONE_VIEW.items() if getattr(args, name) != off]
    if needed:
        raise UserError(f"--cache-features: every image has one view; add {' '.join(needed)}")


def _turned_off(name: str, value: Any) -> str:
    """Format the flag with the value that turns it off."""
    if value is None:
        return f"no {spelled(name)}"
    return f"--no-{spelled(name)[2:]}" if value is False else f"{spelled(name)} {value}"
