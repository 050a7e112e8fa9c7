"""Models: building them by timm's names, loading and fine-tuning weights, freezing parts."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models_evit
from checkpoints import as_json, flags_of, read_checkpoint, trained_size, translated, unwrapped, weights_of
from samplers import random_key, seed_generators
from utils import UserError, logger, reason


def create_model(
    name: str,
    *,
    flag: str,
    num_classes: int | None,
    input_size: tuple[int, int],
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a timm model, with one-line errors for unknown names, wrong options and a missing network.

    Args:
        name: any timm model name.
        flag: the flag that named the model, for error messages.
        num_classes: None for the number of classes of timm's weights.
        input_size: (height, width) in pixels; used by models that are built for a fixed size.
        pretrained: download timm's weights.
        options: keyword arguments of the model; those that are None are skipped.

    Raises:
        UserError: if timm has no such model, cannot build it with these options, or cannot load its weights.
    """
    refuse_unknown_name(name, flag)
    try:
        takes_size = _takes_size(name)
        if takes_size:
            options = {"img_size": input_size} | options
        if pretrained:
            _check_published(name, flag, {key: value for key, value in options.items() if value is not None})
        create = functools.partial(timm.create_model, name, pretrained=pretrained, num_classes=num_classes)
        return _create_sized(create, input_size, options) if takes_size is None else create(**options)
    except UserError:
        raise
    except Exception as error:  # a config.json (local-dir:) can contain anything
        why = reason(error)
        if pretrained and not isinstance(error, (TypeError, AssertionError)):  # those are errors of the options
            raise UserError(
                f"{flag} {name}: pretrained weights cannot be loaded ({why}); check the network, or pass a local file"
            ) from error
        given = " ".join(_as_flag(key, value, flag) for key, value in options.items() if value is not None)
        remedy = "add --drop-path 0" if "drop_path_rate" in why else "change or drop that"
        raise UserError(f"{flag} {name}: cannot be built with {given or 'defaults'} ({why}); {remedy}") from error


def refuse_unknown_name(name: str, flag: str) -> None:
    """Refuse a name that timm does not know, and suggest similar ones."""
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        near = _near(name.split(".")[0], timm.list_models())
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them all"
        raise UserError(f"{flag} {name}: timm has no such model; {hint}")


def _near(name: str, names: Sequence[str]) -> list[str]:
    """Suggest up to three names for a wrong one: names that start with it, else names spelled similarly."""
    longer = [each for each in names if each.startswith(name) and name]
    longer.sort(key=lambda each: (not timm.is_model_pretrained(each), len(each)))
    return longer[:3] or difflib.get_close_matches(name, names, n=3)


def _takes_size(name: str) -> bool | None:
    """Return True if a model is built for a fixed image size; None if unknown, because its config is not timm's."""
    config, architecture = timm.get_pretrained_cfg(name), name.split(".")[0]
    if config is not None and config.fixed_input_size:
        return True
    is_timms = config is not None and timm.model_entrypoint(architecture).__module__.startswith("timm.")
    return False if is_timms else None


def _create_sized(
    create: Callable[..., nn.Module], input_size: tuple[int, int], options: Mapping[str, Any]
) -> nn.Module:
    """Build a model for this image size, or without a size if the model takes none."""
    try:
        return create(**{"img_size": input_size} | dict(options))
    except TypeError as error:
        if "img_size" in options or "img_size" not in str(error):
            raise
        return create(**options)


def _check_published(name: str, flag: str, options: Mapping[str, Any]) -> None:
    """Refuse pretrained weights for a model that has none, and for options that change its tensors.

    Otherwise timm would silently load only part of the weights.
    """
    if ":" not in name and timm.get_pretrained_cfg(name) is None:
        raise UserError(f"{flag} {name}: has no pretrained weights; drop {flag.replace('model', 'pretrained')}")
    changed = [key for key in options if key not in ("img_size", "patch_size", "drop_rate", "drop_path_rate")]
    if not changed:
        return
    with torch.random.fork_rng(devices=[]):
        published, built = (set(timm.create_model(name, **given).state_dict()) for given in ({}, options))
    if published != built:
        given = " ".join(_as_flag(key, options[key], flag) for key in changed)
        names = _listed(sorted(published ^ built), 3)
        raise UserError(f"{flag} {name}: the pretrained weights do not fit {given} ({names}); drop these options")


def _as_flag(option: str, value: Any, model_flag: str) -> str:
    """Return the user's spelling of `option=value`, for error messages."""
    if option == "img_size":
        return f"{model_flag.replace('model', 'input-size')} {' '.join(map(str, value))}"
    flags = {
        "drop_rate": "--drop",
        "drop_path_rate": "--drop-path",
        "patch_size": "--patch-size",
        "keep_rate": "--base-keep-rate",
        "drop_loc": "--drop-loc",
        "fuse_token": "--fuse-token",
    }
    has_flag = option in flags and model_flag == "--model"
    return f"{flags[option]} {value}" if has_flag else f"{model_flag}-kwargs {option}={value}"


@dataclass(frozen=True)
class ModelOptions:
    """Options of the model and its initial weights. The fields are flags of main.py."""

    model: str = "deit_base_patch16_224"  # any timm model name
    input_size: tuple[int, int] = (224, 224)  # height and width in pixels
    patch_size: int | None = None  # patch edge in pixels, for models that have one
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)  # more keyword arguments of the timm model
    drop: float = 0.0  # dropout rate; 0 is not passed on, since some models have no dropout
    drop_path: float = 0.1  # stochastic-depth rate, likewise
    grad_checkpointing: bool = False
    pretrained: bool = False  # start from timm's weights
    finetune: str = ""  # start from the weights of this checkpoint
    head_init_scale: float | None = None  # factor for the initial weights of a new head
    train_scope: str = "all"  # see `freeze`
    base_keep_rate: float | Sequence[float] | None = None  # this and the next two: see `models_evit.reduce_tokens`
    drop_loc: Sequence[int] | None = None
    fuse_token: bool | None = None
    seed: int = 0  # for the initial weights


def build_model(
    options: ModelOptions, num_classes: int | None, distilled: bool = False, eval_only: bool = False
) -> nn.Module:
    """Build the model on the CPU, with its initial, pretrained or fine-tuning weights.

    Args:
        num_classes: None for the number of classes of timm's weights.
        distilled: in training mode the model returns the pair (class logits, distillation logits).
        eval_only: disable dropout, and refuse weights that leave any tensor, such as the head, untrained.

    Raises:
        UserError: for an unknown model or option, a missing distillation head, or weights of another model.
    """
    seed_generators(random_key(options.seed, "weights"))
    name = options.model
    tokens = {"keep_rate": options.base_keep_rate, "drop_loc": options.drop_loc, "fuse_token": options.fuse_token}
    model = create_model(
        name,
        flag="--model",
        num_classes=num_classes,
        input_size=options.input_size,
        pretrained=options.pretrained,
        drop_rate=None if eval_only else options.drop or None,  # not every model has these options
        drop_path_rate=None if eval_only else options.drop_path or None,
        **{"patch_size": options.patch_size}
        | {key: value for key, value in tokens.items() if value is not None}
        | dict(options.model_kwargs),
    )
    published = pretrained_config(model).get("num_classes")
    comes_with_head = options.pretrained and num_classes in (None, published)
    if eval_only and options.pretrained and not comes_with_head:
        raise UserError(
            f"--eval --pretrained: the weights of {name} have {published} classes, the data have "
            f"{num_classes}; train the head with --pretrained and without --eval first"
        )
    if distilled and hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    if options.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError):
            raise UserError(f"--grad-checkpointing: {name} does not support it; drop the flag") from None
    try_out(model, f"--model {name}", options.input_size, may_cut=models_evit.is_published(name))
    if distilled:
        _check_two_heads(model, name, options.input_size)
    if eval_only and options.pretrained:
        _warn_of_another_size(model, options.input_size)
    heads = () if comes_with_head else classifier_names(model)
    if options.finetune:
        report = load_finetune_weights(model, options, eval_only)
        heads = tuple(name for name in heads if any(belongs_to(key, (name,)) for key in report.missing))
    start_heads(model, heads, options.head_init_scale, replaced=bool(options.pretrained or options.finetune))
    freeze(model, options.train_scope)
    return model


@torch.no_grad()
def _check_two_heads(model: nn.Module, name: str, input_size: tuple[int, int]) -> None:
    """Check that a model returns two logits in training; some models have the switch for it, but one head.

    Raises:
        UserError: if it returns one.
    """
    set_eval_layers(model)
    outputs = model(torch.zeros(1, 3, *input_size))
    model.train()
    if not isinstance(outputs, tuple):
        raise UserError(
            f"--distillation-type: {name} has no distillation head; use a *_distilled_* model such as "
            f"deit_tiny_distilled_patch16_224, or --distillation-type none"
        )


def _warn_of_another_size(model: nn.Module, input_size: tuple[int, int]) -> None:
    """Warn if timm's weights are evaluated at another size than theirs."""
    config = pretrained_config(model)
    sizes = [tuple(config[name][1:]) for name in ("input_size", "test_input_size") if config.get(name)]
    if sizes and tuple(input_size) not in sizes:
        given, own = (" x ".join(map(str, size)) for size in (input_size, sizes[0]))
        words = "--pretrained: the weights are for %s px, evaluated at %s px; pass --input-size %s"
        logger.warning(words, own, given, " ".join(map(str, dict.fromkeys(sizes[0]))))


def start_heads(model: nn.Module, heads: Sequence[str], scale: float | None, replaced: bool) -> None:
    """Initialize new classification layers.

    Args:
        heads: names of the layers.
        scale: factor for their weights, as timm's --head-init-scale; None for 1.
        replaced: True if the rest of the model is pretrained. Some models initialize heads with large weights, which
            would disturb a short fine-tuning; such a head is initialized as in DeiT.
    """
    if scale is not None and not heads:
        logger.warning("--head-init-scale has no effect: the head comes with the weights")
    for name in heads:
        for parameter in model.get_submodule(name).parameters():
            if replaced and parameter.ndim == 1:
                nn.init.zeros_(parameter)
            elif replaced:
                nn.init.trunc_normal_(parameter, std=0.02)
            if scale is not None:
                parameter.data.mul_(scale)


def is_compiled(model: nn.Module) -> bool:
    """Return True if `compile()` was called on the model or on a part of it."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, in channels-last memory format."""
    # Convolutions run several times faster in this format, on CPUs and on GPUs with mixed precision.
    return model.to(device, memory_format=torch.channels_last)


def select_attention(model: nn.Module, amp_dtype: torch.dtype | None) -> None:
    """Let timm's attention layers use matrix products instead of torch's fused attention on a CPU in bf16.

    There, the fused kernel takes two to five times as long, for 17 to 577 tokens (torch 2.14, AMD EPYC with AVX-512).

    Args:
        model: on its device.
        amp_dtype: autocast dtype, or None.
    """
    if amp_dtype == torch.bfloat16 and next(model.parameters()).device.type == "cpu":
        unfuse_attention(model)


def unfuse_attention(model: nn.Module) -> None:
    """Let timm's attention layers compute the whole attention matrix with matrix products."""
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False


def try_out(
    model: nn.Module, flag: str, input_size: tuple[int, int], size_flag: str = "--input-size", may_cut: bool = False
) -> None:
    """Run the model on one image, to find an impossible image size before training starts.

    Args:
        flag, size_flag: flags that name the model and its size, for error messages.
        may_cut: if the size is not a multiple of the patch size, warn instead of raising.
    """
    _check_patches(model, flag, input_size, size_flag, may_cut)
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, *input_size))
    except (RuntimeError, ValueError, AssertionError, TypeError, LookupError) as error:
        height, width = input_size
        why = reason(error)
        raise UserError(
            f"{flag}: cannot take images of {height} x {width} px ({why}); change {size_flag} or the patch size, or "
            f"drop the --*model-kwargs that say otherwise"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise UserError(f"{flag}: does not return one logit per class; drop the --*model-kwargs that change its output")
    model.train()


@torch.no_grad()
def count_macs(model: nn.Module, input_size: tuple[int, int]) -> int | None:
    """Return the multiply-accumulates of one (height, width) image, or None if torch cannot count them."""
    image, training = torch.zeros(1, 3, *input_size, device=next(model.parameters()).device), model.training
    # torch does not count fused attention on a CPU, so use plain matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            model.eval()(image)
        except Exception:  # an operation that torch cannot count; do not end the run
            return None
        finally:
            model.train(training)
    return counter.get_total_flops() // 2  # a multiply-accumulate counts as two operations


def _check_patches(model: nn.Module, flag: str, input_size: tuple[int, int], size_flag: str, may_cut: bool) -> None:
    """Refuse sizes that are not a multiple of the patch size, where timm would ignore the rest of each image."""
    for embed in model.children():
        conv = getattr(embed, "proj", None)
        is_patches = hasattr(embed, "patch_size") and isinstance(conv, nn.Conv2d) and conv.in_channels == 3
        if not is_patches or conv.kernel_size != conv.stride or getattr(embed, "dynamic_img_pad", False):
            continue
        for side, patch in zip(input_size, conv.stride, strict=True):
            near = " or ".join(str(size) for size in (side // patch * patch, -(-side // patch) * patch) if size)
            if side % patch and may_cut:
                logger.warning("%s: the last %d px of %d are not seen, as in the original", flag, side % patch, side)
            elif side % patch:
                size = " ".join(map(str, input_size))
                raise UserError(
                    f"{size_flag} {size}: {side} is not a multiple of the {patch} px patch of {flag}; use {near}"
                )


def pretrained_config(model: nn.Module) -> Mapping[str, Any]:
    """Return timm's config of a model's weights and images; {} if it was built without `build_model_with_cfg`."""
    return getattr(model, "pretrained_cfg", None) or {}


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the per-channel (mean, std) for images scaled to [0, 1]; ImageNet's if the model states none."""
    config = pretrained_config(model)
    return tuple(config.get("mean") or IMAGENET_DEFAULT_MEAN), tuple(config.get("std") or IMAGENET_DEFAULT_STD)


# -- weights -----------------------------------------------------------------------------------------------------------

# Differences to allow between a model and the weights that it loads; the names are fields of `LoadReport`.
EVALUATION = ("resized",)
COMPLETE = ("resized", "dropped")
FINETUNING = ("resized", "dropped", "missing")


@dataclass
class LoadReport:
    """Names of the tensors that were kept, resized, dropped, ... when weights were fitted to a model."""

    kept: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # position embeddings
    dropped: list[str] = field(default_factory=list)  # heads and distillation token that only the file has
    missing: list[str] = field(default_factory=list)  # heads and distillation token that only the model has
    ignored: list[str] = field(default_factory=list)  # no part of a classifier, e.g. a decoder
    misfits: list[str] = field(default_factory=list)  # any other difference, which means another model

    def __str__(self) -> str:
        return (
            f"kept {len(self.kept)} tensors; resized: {_listed(self.resized)}; dropped: {_listed(self.dropped)}; "
            f"missing, left as initialized: {_listed(self.missing)}; ignored: {_listed(self.ignored)}"
        )


def _listed(names: list[str], most: int = 6) -> str:
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classification layers, e.g. `("head", "head_dist")`; () if unknown.

    They come from the pretrained config, else from `get_classifier()` and its submodules.
    """
    names = pretrained_config(model).get("classifier") or ()
    if names:
        return (names,) if isinstance(names, str) else tuple(names)
    heads = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    parts = {part for head in heads if isinstance(head, nn.Module) for part in head.modules()}
    return tuple(name for name, module in model.named_modules() if module in parts)


def belongs_to(key: str, modules: tuple[str, ...]) -> bool:
    return key.rpartition(".")[0] in modules


def load_weights(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    flag: str,
    path: str,
    allowed: Collection[str] = (),
    size: tuple[int, int] | None = None,
) -> LoadReport:
    """Load weights by name, all or none, and log the differences.

    Args:
        weights: result of `weights_of`. If `allowed` is not empty, other layouts that timm can translate work as well.
        flag, path: flag and file of the weights, for messages.
        allowed: differences to accept, such as `FINETUNING`.
        size: (height, width) in pixels of the training images, if known.

    Raises:
        UserError: if there are other differences, or a tensor is not finite.
    """
    source, outside = unwrapped(weights, set(model.state_dict()), flag, path)
    fitted, report = fit_state_dict(source, model, size)
    if report.misfits and allowed:
        renamed = translated(source, model)
        again, second = fit_state_dict(renamed, model, size)
        if len(second.misfits) < len(report.misfits):
            second.resized += [key for key in second.kept if again[key].numel() != source.get(key, again[key]).numel()]
            source, fitted, report = renamed, again, second
    report.ignored += outside
    refused = report.misfits + [key for kind in FINETUNING if kind not in allowed for key in getattr(report, kind)]
    if refused:
        shapes = [{key: list(own[key].shape) for key in own} for own in (source, model.state_dict())]
        words = [f"{key}: {' there, '.join(str(own.get(key, 'nothing')) for own in shapes)} here" for key in refused]
        differences = _listed(list(dict.fromkeys(words)), 3)
        model_flag = "--teacher-model" if flag == "--teacher-path" else "--model"
        remedy = _size_remedy(model_flag, report.misfits, shapes, (size, _built_size(model)))
        remedy = remedy or _remedy(flag, report, allowed)
        raise UserError(f"{flag} {path}: does not fit {model_flag} ({differences}); {remedy}")
    broken = next((key for key, value in fitted.items() if not value.float().isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{flag} {path}: {broken} is not finite (NaN or infinity); give an earlier checkpoint")
    model.load_state_dict(fitted, strict=False)
    if flag == "--finetune" or report.resized + report.dropped + report.missing + report.ignored:
        logger.info("%s %s: %s", flag, path, report)
    return report


def _built_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the (height, width) in pixels that a model was built for, if one of its modules knows it."""
    found = (getattr(module, "img_size", None) for module in model.modules())
    return next((tuple(size) for size in found if isinstance(size, (tuple, list)) and len(size) == 2), None)


def _size_remedy(
    model_flag: str,
    misfits: Sequence[str],
    shapes: Sequence[Mapping[str, Sequence[int]]],
    sizes: tuple[tuple[int, int] | None, tuple[int, int] | None],
) -> str:
    """Return the remedy if the image size alone explains the misfits; '' otherwise.

    The shapes of some weights follow the number of patches, as in ResMLP, MLP-Mixer and PiT.

    Args:
        shapes: shapes by name, of the file and of the model.
        sizes: image sizes in pixels, of the file and of the model; None if unknown.
    """
    there, here = sizes
    areas = [math.prod(size) if size else None for size in sizes]
    for key in misfits:
        theirs, ours = (each.get(key, []) for each in shapes)
        is_position = "pos" in key or "attention_biases" in key
        is_stem = len(ours) == 4 and ours[1] == 3  # the patch embedding: another patch size or width
        pairs = [pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]]
        is_scaled = None in areas or all(old * areas[1] == new * areas[0] for old, new in pairs)
        if len(theirs) != len(ours) or is_stem or not (is_position or is_scaled):
            return ""
    if not misfits or (there and there == here):
        return ""
    size_flag = model_flag.replace("model", "input-size")
    if there is None:
        return f"pass the {size_flag} (or {model_flag}, {model_flag}-kwargs) that these weights are from"
    pixels = " ".join(map(str, there if there[0] != there[1] else there[:1]))
    return f"pass {size_flag} {pixels}, the only size that fits these weights"


def _remedy(flag: str, report: LoadReport, allowed: Collection[str]) -> str:
    """Suggest what to do about weights that differ; suggest `--finetune` only where it accepts them."""
    if flag == "--resume":
        may_finetune = not report.misfits and not allowed
        return "pass the model, data set and input size it is from" + (", or --finetune it" if may_finetune else "")
    if flag == "--teacher-path" and report.dropped and not report.misfits:
        return "train a teacher on this data set first, with python main.py --model NAME"
    if flag == "--teacher-path":
        return "pass the --teacher-model (and --teacher-model-kwargs) that these weights are from"
    if report.misfits:
        return "pass the --model (and --patch-size, --model-kwargs) that these weights are from"
    return "--eval needs a file with these tensors; train them with --finetune and without --eval first"


def fit_state_dict(
    weights: Mapping[str, torch.Tensor], model: nn.Module, size: tuple[int, int] | None = None
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Fit weights to a model by name: resize the position embedding and report differences.

    Args:
        weights: tensors named as in DeiT's official code or timm.
        model: the model that will load them.
        size: (height, width) in pixels of the training images, if known.

    Returns:
        The tensors to load, and the report.
    """
    fitted, report, target = {}, LoadReport(), model.state_dict()
    heads = (*classifier_names(model), "head")

    def may_differ(key: str) -> bool:
        return belongs_to(key, heads) or key == "dist_token" or key.startswith("head_dist.")

    for key, value in weights.items():
        own = target.get(key)
        new = _fit_pos_embed(value, weights, model, size) if key == "pos_embed" and own is not None else value
        if own is not None and new.shape == own.shape and new.is_floating_point() >= own.is_floating_point():
            (report.kept if new is value else report.resized).append(key)
            fitted[key] = new
        elif may_differ(key):
            report.dropped.append(key)
        elif own is None and (key == "mask_token" or key.startswith("decoder_")):  # of a masked autoencoder
            report.ignored.append(key)
        else:
            report.misfits.append(key)
    for key in target:
        if key not in fitted and key not in report.misfits:
            (report.missing if may_differ(key) else report.misfits).append(key)
    return fitted, report


def _fit_pos_embed(
    pos_embed: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    model: nn.Module,
    size: tuple[int, int] | None,
) -> torch.Tensor:
    """Resize a position embedding [1, prefix + h·w, D] to [1, prefix' + h'·w', D], the model's prefix and grid.

    A distillation token that only the model has keeps its initial embedding.
    """
    current = model.pos_embed
    has_grid = hasattr(model, "num_prefix_tokens") and hasattr(getattr(model, "patch_embed", None), "grid_size")
    if not has_grid or pos_embed.ndim != 3 or pos_embed.shape[-1] != current.shape[-1]:
        return pos_embed  # unchanged: it fits as it is, or the caller reports another model
    grid = tuple(model.patch_embed.grid_size)
    embeds_prefix = not getattr(model, "no_embed_class", False)  # nor does CaiT embed a class token
    embeds_prefix &= current.shape[1] == model.num_prefix_tokens + math.prod(grid)
    new_prefix = model.num_prefix_tokens if embeds_prefix else 0
    old_prefix = 0
    if embeds_prefix:
        old_prefix = ("cls_token" in weights) + ("dist_token" in weights)
        old_prefix += weights["reg_token"].numel() // current.shape[-1] if "reg_token" in weights else 0
    if pos_embed.shape[0] != 1 or pos_embed.shape[1] <= old_prefix:
        return pos_embed
    prefix, patches = pos_embed[:, :old_prefix], pos_embed[:, old_prefix:]
    old_grid = _grid_of(patches.shape[1], weights, size) or grid
    if old_grid == grid and old_prefix == new_prefix:
        return pos_embed
    if old_grid != grid:
        patches = resample_abs_pos_embed(patches, list(grid), old_size=list(old_grid), num_prefix_tokens=0)
    fresh = current[:, min(old_prefix, new_prefix) : new_prefix].detach().to(prefix)
    return torch.cat([prefix[:, :new_prefix], fresh, patches], dim=1)


def _grid_of(
    num_patches: int, weights: Mapping[str, torch.Tensor], size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return (rows, columns) of patches: from the image size, else a square if possible, else None."""
    patch = weights.get("patch_embed.proj.weight")
    if size is not None and patch is not None and patch.ndim == 4 and patch.numel():
        grid = size[0] // patch.shape[2], size[1] // patch.shape[3]
        if math.prod(grid) == num_patches:
            return grid
    side = math.isqrt(num_patches)
    return (side, side) if side * side == num_patches else None


def load_finetune_weights(model: nn.Module, options: ModelOptions, eval_only: bool) -> LoadReport:
    """Load `--finetune` weights into a model (see `load_weights`).

    An evaluation needs the function that the weights were trained for. Training may change it; a warning says so.

    Raises:
        UserError: if the weights do not fit, or an evaluation would compute another function.
    """
    path = options.finetune
    checkpoint = read_checkpoint(path, "--finetune")
    trained = flags_of(checkpoint)
    if eval_only and "model" in trained:
        refuse_another_model(vars(options), trained, f"--finetune {path}")
    elif _known_as(str(trained.get("model"))) == _known_as(options.model):
        try:
            refuse_another_model(vars(options), trained, f"--finetune {path}")
        except UserError as difference:
            logger.warning("%s, unless you mean to change it", difference)
    weights = weights_of(checkpoint, "--finetune", path)
    allowed = COMPLETE if eval_only else FINETUNING
    return load_weights(model, weights, "--finetune", path, allowed, trained_size(checkpoint))


MODEL_FLAGS = ("model", "patch_size", "model_kwargs", "drop_loc", "fuse_token")


def trained_keep_rate(trained: Mapping[str, Any]) -> Any:
    """Return the final keep rate of the run that wrote a checkpoint with these flags; None if it was no EViT."""
    kwargs, rate = trained.get("model_kwargs"), trained.get("base_keep_rate")
    if rate is None and isinstance(kwargs, Mapping):
        rate = kwargs.get("keep_rate")
    return models_evit.default_rate(str(trained.get("model"))) if rate is None else rate


def refuse_another_model(flags: Mapping[str, Any], trained: Mapping[str, Any], what: str, prefix: str = "--") -> None:
    """Check that a model computes the function that a checkpoint's weights were trained for.

    Some settings, such as the number of heads, change the function but no tensor shape. Weights of a plain model are
    accepted for the EViT of the same size. Image size and keep rate may differ: each caller says so in the log.

    Args:
        flags: `MODEL_FLAGS` of this run, by name.
        trained: the same flags of the checkpoint's run, as far as known; "model" is required.
        what: flag and file, for the error message.
        prefix: prefix of flag names in the error message.

    Raises:
        UserError: naming the first flag that differs.
    """
    here, there = _known_as(flags["model"]), _known_as(str(trained["model"]))
    is_same = models_evit.plain_name(here[0]) == models_evit.plain_name(there[0]) and here[1] == there[1]
    skipped = {"model"} if is_same else set()
    if is_same and models_evit.is_evit(here[0]) != models_evit.is_evit(there[0]):
        skipped |= {"drop_loc", "fuse_token"}  # only one of them is an EViT
    for name in (name for name in MODEL_FLAGS if name in trained and name not in skipped):
        ours, theirs = (_setting(name, each.get(name), skipped) for each in (flags, trained))
        shown_by_tensors = name == "patch_size" and None in (ours, theirs)
        if ours != theirs and not shown_by_tensors:
            flag = prefix + name.replace("_", "-")
            raise UserError(f"{what}: was trained with {flag} {_shown(theirs)}, not {_shown(ours)}; pass the same")


def same_function(name: str, flags: Mapping[str, Any], trained: Mapping[str, Any]) -> bool:
    """Return True if a flag gives a model the same function in both runs, whatever the spelling.

    Args:
        name: one of `MODEL_FLAGS`, "base_keep_rate", "input_size" or any other flag.
        flags, trained: flags of the two runs by name, with "model".
    """
    both = flags, trained
    if name == "model":
        ours, theirs = (_known_as(str(each["model"])) for each in both)
        is_evit = [models_evit.is_evit(known[0]) for known in (ours, theirs)]
        plain = [(models_evit.plain_name(known[0]), known[1]) for known in (ours, theirs)]
        return is_evit[0] == is_evit[1] and plain[0] == plain[1]
    if name == "base_keep_rate":
        ours, theirs = (as_json(trained_keep_rate(each)) for each in both)
    elif name == "input_size":
        ours, theirs = (trained_size({"args": each}) for each in both)
    else:
        ours, theirs = (_setting(name, each.get(name)) for each in both)
    return ours == theirs or (name == "patch_size" and None in (ours, theirs))


def _known_as(name: str) -> tuple[str, Any]:
    """Return a model's name without the tag of its weights, and the normalization that the tag stands for."""
    architecture = name.partition(".")[0]
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(architecture) else None
    except RuntimeError:  # there is no such tag
        config = None
    return (name, None) if config is None else (architecture, as_json([config.mean, config.std]))


def _setting(name: str, value: Any, skipped: Collection[str] = ()) -> Any:
    """Return a flag's value as JSON, with its default.

    Of model_kwargs without `skipped` keys, keys that matter in training only, and those that may differ.
    """
    if value is None:
        value = {"drop_loc": models_evit.DROP_LOC, "fuse_token": True, "model_kwargs": {}}.get(name)
    if name == "model_kwargs" and isinstance(value, Mapping):
        of_training = {key for key in value if "drop" in str(key) and str(key).endswith("rate")}
        ignored = {"keep_rate", "img_size", *skipped, *of_training}
        value = {key: each for key, each in value.items() if key not in ignored}
    return as_json(value)


def _shown(value: Any) -> str:
    """Format a flag's value as the user would write it."""
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items()) or "(none)"
    if value is None:
        return "(the model's own)"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def linear_head(model: nn.Module, name: str) -> nn.Linear:
    """Return the classification layer, which maps `forward_head(..., pre_logits=True)` to the logits.

    Raises:
        UserError: if the model has no such layer.
    """
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(head, nn.Linear):
        raise UserError(f"--cache-features: {name} does not end in one linear layer; drop the flag")
    return head


# -- partial training --------------------------------------------------------------------------------------------------


def freeze(model: nn.Module, scope: str) -> None:
    """Freeze all parameters outside of `scope`.

    Args:
        scope: "all"; "head": the classification layers; "attn": the attention layers, the position embedding and the
            classification layers (Touvron et al. 2022, "Three things everyone should know about ViTs", section 4).

    Raises:
        UserError: if the model has no such layers, or does not name them.
    """
    if scope == "all":
        return
    heads = classifier_names(model)
    if not any(belongs_to(name, heads) for name, _ in model.named_parameters()):
        raise UserError(
            f"--train-scope {scope}: this model does not name its classification layer; add get_classifier() to "
            f"{type(model).__name__}, or use --train-scope all"
        )
    for name, parameter in model.named_parameters():
        trained = belongs_to(name, heads) or (scope == "attn" and (".attn." in name or name == "pos_embed"))
        parameter.requires_grad_(trained)
    if scope == "attn" and not any(".attn." in name for name, _ in model.named_parameters()):
        raise UserError("--train-scope attn: this model has no attention layers; use --train-scope head or all")


def set_eval_layers(model: nn.Module) -> None:
    """Switch to evaluation mode; what returns both heads of a distilled model keeps its own training flag."""
    model.eval()
    for module in model.modules():  # the model itself, or its head
        module.training = bool(getattr(module, "distilled_training", False))


def set_train_mode(module: nn.Module) -> None:
    """Switch to training mode, except for fully frozen parts, whose batch statistics must not change."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    module.training = True
    for child in module.children():
        set_train_mode(child)
