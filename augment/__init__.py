"""The augmentation as batched tensor code: stored uint8 images in, normalized views out, on any device.

It follows timm's PIL pipeline operation by operation. The differences:
  - crop, flip and geometric operations are one affine map and one interpolation, where PIL interpolates each time, so
    a color operation that comes before a geometric one sees the image already moved;
  - the random numbers of a view are hashed from its key, not taken from generators.
Views do not depend on the batch; CPU and GPU differ by the rounding of float32.

`rgb` turns any image file into RGB, before all that.
"""

from augment.policy import Policy, is_supported
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
    "decoding",
    "is_supported",
    "open_image",
    "open_rgb",
]
