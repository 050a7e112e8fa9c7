"""Augmentation as batched tensor code: stored uint8 images in, normalized views out, on any device.

It follows timm's PIL pipeline operation by operation, with two differences:
  - Crop, flip and geometric operations are combined into one affine map and one interpolation, while PIL interpolates
    at each step. So a color operation that precedes a geometric one sees the image after the move.
  - The random numbers of a view are hashed from its key instead of taken from generators.
A view does not depend on the rest of its batch. CPU and GPU differ by float32 rounding only.

`rgb` converts image files to RGB before all this.
"""

from augment.policy import Policy, check_policy, is_supported
from augment.rgb import FORMATS, ImageError, as_rgb, decoding, open_image, open_rgb
from augment.views import PADDING, SMALL_IMAGE, EvalTransform, Normalization, TrainAugmentation, ViewOptions

__all__ = [
    "FORMATS",
    "PADDING",
    "SMALL_IMAGE",
    "EvalTransform",
    "ImageError",
    "Normalization",
    "Policy",
    "TrainAugmentation",
    "ViewOptions",
    "as_rgb",
    "check_policy",
    "decoding",
    "is_supported",
    "open_image",
    "open_rgb",
]
