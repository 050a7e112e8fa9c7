"""EViT: the transformer block, its keep-rate schedule, and published model names that timm lacks.

EViT (Liang et al. 2022, arXiv 2202.07800) drops the patches that the class token attends to least, in a few layers.
Here it is a block of timm's `VisionTransformer` (`block_fn=EViTBlock`). It adds no parameters, so weights of the plain
model fit. It never drops prefix tokens (class, distillation, registers).

`PUBLISHED` registers the names of the original implementations (DeiT III, parallel blocks, CaiT, ResMLP) for timm's
models.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import deit, is_model, model_entrypoint, register_model
from timm.models.vision_transformer import Attention, Block, ParallelThingsBlock
from torch import nn

KEEP_RATE, DROP_LOC = 0.7, (3, 6, 9)  # defaults of the paper
SHRINK_STEPS = 10  # the paper changes the keep rate at every update; a compiled model would be recompiled each time


def keep_attentive(patches: torch.Tensor, attentiveness: torch.Tensor, num_keep: int, fuse: bool) -> torch.Tensor:
    """Keep the most attended patches; optionally fuse the others into one (EViT section 3.2, equations 4 and 5).

    Args:
        patches: [B, N, D].
        attentiveness: [B, N], attention from the class token to each patch.
        num_keep: n, number of patches to keep.
        fuse: append Σ aᵢ xᵢ over the dropped patches, with unnormalized weights.

    Returns:
        [B, n, D], or [B, n + 1, D] if fused; kept patches are sorted by decreasing attentiveness.
    """
    B, N, D = patches.shape
    kept = attentiveness.topk(num_keep, dim=1).indices  # (B, n)
    rows = kept + N * torch.arange(B, device=kept.device)[:, None]  # (B, n), rows of all images' patches
    # Whole rows are faster than `gather`, which copies single values, and a deterministic backward sorts fewer indices.
    reduced = patches.reshape(B * N, D).index_select(0, rows.flatten()).view(B, num_keep, D)
    if not fuse:
        return reduced
    weights = attentiveness.scatter(1, kept, 0.0)  # (B, N), zero for kept patches, so the others need no index
    fused = (patches * weights[..., None]).sum(dim=1, keepdim=True)  # (B, 1, D)
    return torch.cat([reduced, fused.to(reduced.dtype)], dim=1)


class KeepAttentive(nn.Module):
    """`keep_attentive` as a module, so that a forward hook can record which patches a layer keeps."""

    def forward(self, patches: torch.Tensor, attentiveness: torch.Tensor, num_keep: int, fuse: bool) -> torch.Tensor:
        return keep_attentive(patches, attentiveness, num_keep, fuse)


class EViTAttention(Attention):
    """timm's attention that can also return how much the class tokens attend to each patch."""

    def forward_with_attentiveness(
        self, x: torch.Tensor, num_prefix_tokens: int, num_class_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute attention of x [B, N, D]: output [B, N, D], attentiveness [B, N - num_prefix_tokens].

        Attentiveness is the mean over heads and over the first `num_class_tokens` rows of the attention matrix. With
        fused attention, only these rows are computed; the full N×N matrix is never built.
        """
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, heads, N, head_dim)
        q, k = self.q_norm(q), self.k_norm(k)
        with_rows = q[:, :, :num_class_tokens] if self.fused_attn else q
        rows = ((with_rows * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, class tokens or N, N)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            out = self.attn_drop(rows) @ v
        attentiveness = rows[:, :, :num_class_tokens, num_prefix_tokens:].mean(dim=(1, 2))  # (B, patches)
        out = self.norm(out.transpose(1, 2).reshape(B, N, -1))
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out)), attentiveness


class EViTBlock(Block):
    """A timm block that keeps ceil(keep_rate · N) of its N patches between attention and MLP.

    With keep rate 1 it equals timm's block. A fused token of an earlier layer counts as a patch, as in the original
    implementation. `reduce_tokens` sets the attributes below.
    """

    keep_rate: float = 1.0
    fuse_token: bool = True
    num_prefix_tokens: int = 1
    num_class_tokens: int = 1  # class and distillation token, the first prefix tokens

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"attn_layer": EViTAttention})
        self.keep = KeepAttentive()

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Compute x [B, prefix + N, D] -> [B, prefix + n (+ 1 if fused), D] with n = ceil(keep_rate · N).

        Raises:
            NotImplementedError: for an attention mask, which would not fit the remaining tokens.
        """
        if attn_mask is not None or is_causal:
            raise NotImplementedError("EViT does not support attention masks, because it drops tokens")
        prefix = self.num_prefix_tokens
        num_patches = x.shape[1] - prefix
        num_keep = math.ceil(self.keep_rate * num_patches)
        if num_keep >= num_patches:
            return super().forward(x)
        attended, attentiveness = self.attn.forward_with_attentiveness(self.norm1(x), prefix, self.num_class_tokens)
        x = x + self.drop_path1(self.ls1(attended))
        patches = self.keep(x[:, prefix:], attentiveness, num_keep, self.fuse_token)
        x = torch.cat([x[:, :prefix], patches], dim=1)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def is_evit(name: str) -> bool:
    """Return True if this is the name of an EViT model registered here."""
    return name.partition(".")[0] in PLAIN


def is_published(name: str) -> bool:
    """Return True if this is a name of the original implementations that is registered here, with or without a tag."""
    return name.partition(".")[0] in PUBLISHED


def plain_name(name: str) -> str:
    """Return the name of the plain model whose weights an EViT takes; other names are returned unchanged."""
    return PLAIN.get(name.partition(".")[0], name)


def may_be_evit(name: str) -> bool:
    """Return False for names of models without EViT blocks, True if only the built model can tell."""
    architecture = name.partition(".")[0]
    if ":" in name or is_evit(name):  # local-dir: and hf-hub: models name their architecture in a file
        return True
    return is_model(architecture) and not model_entrypoint(architecture).__module__.startswith(("timm.", __name__))


def default_rate(name: str) -> float | None:
    """Return the default keep rate of an EViT model registered here; None for other names."""
    return DEFAULT_RATES.get(name.partition(".")[0])


def evit_blocks(model: nn.Module) -> list[EViTBlock]:
    """Return the model's EViT blocks in order, including those that keep all patches."""
    return [module for module in model.modules() if isinstance(module, EViTBlock)]


def reduce_tokens(
    model: nn.Module,
    keep_rate: float | Sequence[float] = KEEP_RATE,
    drop_loc: Sequence[int] = DROP_LOC,
    fuse_token: bool = True,
) -> nn.Module:
    """Set where and how much a model of EViT blocks reduces tokens; return the model.

    Args:
        model: any plain timm ViT built with `block_fn=EViTBlock`.
        keep_rate: share of patches to keep, in (0, 1]; one for all layers, or one per layer of `drop_loc`.
        drop_loc: indices of the layers that drop patches, from 0.
        fuse_token: fuse the dropped patches into one token.

    Raises:
        ValueError: if there are no EViT blocks, no class token, no such layers, or the rates do not fit.
    """
    blocks = evit_blocks(model)
    if not blocks:
        raise ValueError("the model has no EViT blocks; build it with block_fn=EViTBlock")
    if getattr(model, "cls_token", None) is None:
        raise ValueError("the model has no class token, which EViT needs")
    if any(not 0 <= layer < len(blocks) for layer in drop_loc):
        raise ValueError(f"drop_loc {list(drop_loc)} names layers outside 0 to {len(blocks) - 1}")
    if len(set(drop_loc)) < len(drop_loc):
        raise ValueError(f"drop_loc {list(drop_loc)} names a layer twice")
    rates = [keep_rate] * len(drop_loc) if isinstance(keep_rate, (int, float)) else list(keep_rate)
    if len(rates) != len(drop_loc):
        raise ValueError(f"{len(rates)} keep rates for {len(drop_loc)} layers; give one, or one for each")
    if any(not 0 < rate <= 1 for rate in rates):
        raise ValueError(f"keep rates {rates} are not in (0, 1]")
    rate_of = dict(zip(drop_loc, rates, strict=True))
    for layer, block in enumerate(blocks):
        block.keep_rate = float(rate_of.get(layer, 1.0))
        block.fuse_token = fuse_token
        block.num_prefix_tokens = model.num_prefix_tokens
        block.num_class_tokens = 1 + (getattr(model, "dist_token", None) is not None)
    return model


class KeepRate:
    """Keep-rate schedule over the number of updates (EViT section 4.1): 1, then a cosine, then the final rate.

    It changes in `steps` equal steps, so that a compiled model sees a limited number of token counts.

    Args:
        models: models of EViT blocks, set to their final rates by `reduce_tokens`; all follow the schedule.
        updates_per_epoch: optimizer updates per epoch.
        start_epoch: epochs at rate 1.
        epochs: epochs of the cosine; 0 to switch to the final rate at once.
        steps: number of steps in the cosine.
    """

    name = "keep_rate"

    def __init__(
        self,
        models: Iterable[nn.Module],
        updates_per_epoch: int,
        start_epoch: int,
        epochs: int,
        steps: int = SHRINK_STEPS,
    ) -> None:
        self.blocks = [(block, block.keep_rate) for model in models for block in evit_blocks(model)]
        self.start, self.length = start_epoch * updates_per_epoch, epochs * updates_per_epoch
        self.steps = steps
        self.last: float | None = None  # current progress of the blocks from rate 1 to the final rate
        self.value = self._lowest()  # lowest rate of any layer

    def shrunk(self, num_updates: int) -> float:
        """Return the progress from rate 1 to the final rate, in [0, 1]."""
        if num_updates >= self.start + self.length:
            return 1.0
        if num_updates < self.start:
            return 0.0
        progress = (num_updates - self.start) / self.length
        return round((1 - math.cos(math.pi * progress)) / 2 * self.steps) / self.steps

    def step_update(self, num_updates: int) -> None:
        shrunk = self.shrunk(num_updates)
        if shrunk == self.last:
            return
        self.last = shrunk
        for block, final in self.blocks:
            block.keep_rate = final if shrunk == 1 else 1 - (1 - final) * shrunk
        self.value = self._lowest()

    def _lowest(self) -> float:
        return min(block.keep_rate for block, _ in self.blocks)

    @property
    def final(self) -> float:
        """Lowest final rate of any layer."""
        return min(rate for _, rate in self.blocks)

    @property
    def is_comparable(self) -> bool:
        """True if every layer has its final rate; at other rates the model computes another function."""
        return all(block.keep_rate == final for block, final in self.blocks)

    def state_dict(self) -> dict[str, Any]:
        return {}


# -- registered models -------------------------------------------------------------------------------------------------

default_cfgs = {}
PLAIN: dict[str, str] = {}  # registered name -> timm's name of the model without EViT blocks
DEFAULT_RATES: dict[str, float] = {}  # registered name -> keep rate


def _register_evit(name: str, base: str, default_rate: float = KEEP_RATE, **defaults: Any) -> None:
    """Register `name` with timm as timm's `base` with EViT blocks; it takes the weights of `base`."""
    default_cfgs[name] = copy.deepcopy(deit.default_cfgs[base])
    if side := defaults.get("img_size"):
        for tag, config in default_cfgs[name].cfgs.items():
            default_cfgs[name].cfgs[tag] = dataclasses.replace(config, input_size=(3, side, side))
    PLAIN[name], DEFAULT_RATES[name] = base, default_rate

    def entry_point(
        pretrained: bool = False,
        keep_rate: float | Sequence[float] = default_rate,
        drop_loc: Sequence[int] = DROP_LOC,
        fuse_token: bool = True,
        **kwargs: Any,
    ) -> nn.Module:
        model = getattr(deit, base)(pretrained=pretrained, block_fn=EViTBlock, **defaults | kwargs)
        return reduce_tokens(model, keep_rate, drop_loc, fuse_token)

    entry_point.__name__ = name
    entry_point.__doc__ = (
        f"`{base}` with EViT blocks: by default, {default_rate} of the patches kept in layers {DROP_LOC}."
    )
    globals()[name] = register_model(entry_point)


def _register_published(name: str, base: str, options: dict[str, Any], has_weights: bool) -> None:
    """Register `name` with timm as timm's `base` with other defaults; `has_weights` means the same pretrained weights.

    Models based on timm's `deit3_*` use one stochastic-depth rate for all blocks, as published (timm's rate increases
    with depth).
    """
    build = model_entrypoint(base)
    configs = sys.modules[build.__module__].default_cfgs[base]
    default_cfgs[name] = copy.deepcopy(configs) if has_weights else configs.default.to_dict(remove_source=True)
    is_constant = base.startswith("deit3")

    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kwargs = options | kwargs
        if is_constant:
            block, rate = kwargs.get("block_fn", Block), kwargs.get("drop_path_rate", 0.0)
            kwargs["block_fn"] = lambda **each: block(**each | {"drop_path": rate})
        if not has_weights:
            kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or default_cfgs[name]
        return build(pretrained=pretrained, **kwargs)

    entry_point.__name__ = name
    entry_point.__doc__ = f"`{base}` by its published name."
    globals()[name] = register_model(entry_point)


for _size in ("tiny", "small", "base"):
    _register_evit(f"evit_{_size}_patch16_224", f"deit_{_size}_patch16_224")
    _register_evit(f"evit_{_size}_distilled_patch16_224", f"deit_{_size}_distilled_patch16_224")
    _register_evit(f"deit_{_size}_patch16_shrink_base", f"deit_{_size}_patch16_224")

# youweiliang/evit evit.py: rest of the name after deit_small_patch16_, image size, keep rate
for _name, _pixels, _rate in (
    ("224_shrink_base", 224, 0.7),
    ("224_shrink", 224, 0.7),
    ("272_shrink", 272, 0.7),
    ("224_shrink05", 224, 0.5),
    ("288_shrink06", 288, 0.6),
    ("304_shrink05", 304, 0.5),
):
    _register_evit(f"deit_small_patch16_{_name}", "deit_small_patch16_224", _rate, img_size=_pixels)

_SCALED = {"init_values": 1e-4}  # LayerScale; 1e-6 in timm
_PLAIN, _PARALLEL = {"init_values": None}, {"block_fn": ParallelThingsBlock}
# facebookresearch/deit models_v2.py, cait_models.py, resmlp_models.py: timm's model with other defaults
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "deit_small_patch16_LS": ("deit3_small_patch16_224", _SCALED),
    "deit_medium_patch16_LS": ("deit3_medium_patch16_224", _SCALED),
    "deit_base_patch16_LS": ("deit3_base_patch16_224", _SCALED),
    "deit_large_patch16_LS": ("deit3_large_patch16_224", _SCALED),
    "deit_huge_patch14_LS": ("deit3_huge_patch14_224", _SCALED),
    "cait_XXS24_224": ("cait_xxs24_224", {}),
    "cait_XXS24": ("cait_xxs24_384", {}),
    "cait_XXS36_224": ("cait_xxs36_224", {}),
    "cait_XXS36": ("cait_xxs36_384", {}),
    "cait_XS24": ("cait_xs24_384", {}),
    "cait_S24_224": ("cait_s24_224", {}),
    "cait_S24": ("cait_s24_384", {}),
    "cait_S36": ("cait_s36_384", {}),
    "cait_M36": ("cait_m36_384", {}),
    "cait_M48": ("cait_m48_448", {}),
    "resmlp_12": ("resmlp_12_224", {}),
    "resmlp_24": ("resmlp_24_224", {}),
    "resmlp_36": ("resmlp_36_224", {}),
    "resmlpB_24": ("resmlp_big_24_224", {}),
}
# likewise, without published weights ("Three things everyone should know about ViTs", Touvron et al. 2022)
UNTRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "deit_tiny_patch16_LS": ("deit3_small_patch16_224", _SCALED | {"embed_dim": 192, "num_heads": 3}),
    "deit_small_patch16_36": ("deit3_small_patch16_224", _PLAIN | {"depth": 36}),
    "deit_small_patch16_36_LS": ("deit3_small_patch16_224", _SCALED | {"depth": 36}),
    "deit_small_patch16_18x2": ("deit3_small_patch16_224", _PLAIN | _PARALLEL | {"depth": 18}),
    "deit_small_patch16_18x2_LS": ("deit3_small_patch16_224", _SCALED | _PARALLEL | {"depth": 18}),
    "deit_base_patch16_36x1": ("deit3_base_patch16_224", _PLAIN | {"depth": 36}),
    "deit_base_patch16_36x1_LS": ("deit3_base_patch16_224", _SCALED | {"depth": 36}),
    "deit_base_patch16_18x2": ("deit3_base_patch16_224", _PLAIN | _PARALLEL | {"depth": 18}),
    "deit_base_patch16_18x2_LS": ("deit3_base_patch16_224", _SCALED | _PARALLEL | {"depth": 18}),
    "deit_huge_patch14_52_LS": ("deit3_huge_patch14_224", _SCALED | {"depth": 52}),
    "deit_huge_patch14_26x2_LS": ("deit3_huge_patch14_224", _SCALED | _PARALLEL | {"depth": 26}),
}
for _name, (_base, _options) in {**PUBLISHED, **UNTRAINED}.items():
    _register_published(_name, _base, _options, has_weights=_name in PUBLISHED)
