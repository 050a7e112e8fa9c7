"""Models as users write them: registered with timm, without a pretrained config."""

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn


class ScaledBlock(Block):
    """timm's block with a learned scale of its output."""

    def __init__(self, dim, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) * self.scale


@register_model
def own_vit(pretrained=False, **kwargs):
    settings = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "block_fn": ScaledBlock}
    return build_model_with_cfg(VisionTransformer, "own_vit", pretrained, **settings | kwargs)


class OwnConvNet(nn.Module):
    """A model without timm's attributes: no `pretrained_cfg`, no `get_classifier`, no `num_classes`."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.out(self.body(images))


@register_model
def own_convnet(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    return OwnConvNet(**kwargs)
