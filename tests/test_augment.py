"""The batched augmentation against the functions of timm, torchvision and PIL, on photographs."""

import itertools
import math
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_image
from timm.data import auto_augment, random_erasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil

import augment
import samplers
from augment import EvalTransform, TrainAugmentation, ViewOptions, image_ops
from augment.image_ops import Affine, Resampler, paint
from augment.policy import (
    GEOMETRIC,
    KINDS,
    OPERATIONS,
    Draws,
    Policy,
    Step,
    as_affine,
    jitter,
    parse_policy,
    recolor,
    splitmix64,
)
from augment.views import random_resized_crop
from datasets import (
    DataOptions,
    build_eval_transform,
    build_train_transform,
    read_sources,
)
from tools import pack_dataset, pictures, show_augmentation

# Differences from PIL in gray levels: their mean, their 99th percentile, the largest 4 pixels or more from an edge.
TOLERANCES = {
    "exact": (0, 0, 0),
    "table": (0.01, 1, 1),  # autocontrast: whole numbers here, floating point there
    "blur": (0.6, 4, 4),  # a Gaussian; PIL takes three box filters
    "resize": (
        0.25,
        3,
        8,
    ),  # PIL skips what is beyond an edge, here the edge is repeated; and it rounds in between
    "bilinear": (0.45, 1, 1),  # one direction
    "bilinear rotation": (1.0, 12, 40),  # both: PIL takes the four nearest pixels, here two passes
    "bicubic": (1.0, 10, 25),  # one direction: PIL's kernel for affine maps has a = -1, here -1/2 as in resizing
    "bicubic rotation": (1.8, 20, 80),
    "moved": (1.0, 20, 100),  # bilinear as above, with operations of color, which enlarge or cut off
    "moved twice": (2.0, 20, 150),  # PIL interpolates twice, and so blurs
}
NORMALIZATION = MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = tuple(round(255 * value) for value in MEAN)
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
PLAIN = {"hflip": 0.0, "color_jitter": 0.0, "aa": "none", "reprob": 0.0}
PHOTOGRAPHS = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


def photos(height, width, number=4):
    """Return different crops of two photographs."""
    images = []
    for position, share in enumerate(np.linspace(0, 1, number)):
        top, left = int((427 - height) * share), int((640 - width) * share)
        images.append(PHOTOGRAPHS[position % 2].crop((left, top, left + width, top + height)))
    return images


def batch(images):
    """uint8 [B, 3, H, W] of PIL images."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def whole_images(sizes):
    """Return the box [top, left, height, width] of each whole image."""
    return 0 * sizes[:, 0].float(), 0 * sizes[:, 0].float(), *sizes.float().unbind(1)


def sizes_of(images):
    return torch.tensor([image.size[::-1] for image in images])


def in_padded_buffer(images, height, width, seed=0):
    """Images at the top left of a padded buffer that is otherwise full of noise."""
    buffer = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (len(images), 3, height, width), np.uint8))
    for padded, image in zip(buffer, images, strict=True):
        padded[:, : image.height, : image.width] = batch([image])[0]
    return buffer


def full(value, number=4):
    return torch.full((number,), float(value))


def step_of(kind, argument=0.0, number=4):
    return Step(torch.full((number,), KINDS.index(kind)), full(argument, number))


def keys_of(number, seed=0):
    return torch.from_numpy(samplers.random_keys(seed, "view", np.arange(number)).view(np.int64))


def train_view(stored_size, size, **options):
    return TrainAugmentation(stored_size, ViewOptions(size, **options), NORMALIZATION)


def eval_view(stored_size, size, **options):
    return EvalTransform(stored_size, ViewOptions(size, **options), NORMALIZATION)


def host_view(size, **options):
    return build_train_transform(ViewOptions(size, **options), NORMALIZATION)


def gray_levels(views, mean=MEAN, std=STD):
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return ((views.float() * std + mean) * 255).round()


def assert_close(ours, theirs, name, inside=None):
    """Check TOLERANCES; the last one applies where `inside` is True, by default away from the edges."""
    mean, most, highest = TOLERANCES[name]
    difference = (ours.float() - theirs.float()).abs()
    inside = difference[..., 4:-4, 4:-4] if inside is None else difference[inside.expand_as(difference)]
    measured = difference.mean().item(), np.quantile(difference.numpy(), 0.99), inside.max().item()
    assert measured[0] <= mean and measured[1] <= most and measured[2] <= highest, measured


def assert_alike(ours, theirs, limit=4.5):
    """Check that two samples have the same mean and spread, within standard errors."""
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (ours, theirs))
    center = np.concatenate([ours, theirs]).mean()
    for power in (1, 2):
        a, b = (ours - center) ** power, (theirs - center) ** power
        error = math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) <= limit * error + 1e-6, (power, a.mean(), b.mean(), error)


def assert_counts_alike(ours, theirs, limit=4.5):
    """Check that two counts have the same shares, within standard errors."""
    total = sum(ours.values())
    assert total == sum(theirs.values())
    for key in ours.keys() | theirs.keys():
        a, b = ours[key] / total, theirs[key] / total
        share = (a + b) / 2
        assert abs(a - b) <= limit * math.sqrt(2 * share * (1 - share) / total), (key, a, b)


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_arguments_are_timms(name, monkeypatch):
    magnitudes = [*range(11), 0.3, 2.49, 4.99, 7.51, 9.7]
    for magnitude, uniform in itertools.product(magnitudes, (0.1, 0.9)):
        monkeypatch.setattr(random, "random", lambda uniform=uniform: uniform)
        level = torch.tensor(magnitude, dtype=torch.float32) / 10
        ours = OPERATIONS[name][1](level, torch.tensor(-1.0 if uniform > 0.5 else 1.0)).item()
        level_fn = auto_augment.LEVEL_TO_ARG[name]
        if level_fn is None or name == "GaussianBlurRand":
            continue
        (theirs,) = level_fn(magnitude, {"translate_const": 1})
        if name == "Desaturate":
            theirs = 1 - theirs  # the share of color that is left
        assert ours == pytest.approx(theirs, abs=1e-5), magnitude


@pytest.mark.parametrize("uniform", [0.0, 0.4, 1.0])
def test_random_blur_has_timms_radius(uniform, monkeypatch):
    radii = []
    monkeypatch.setattr(random, "uniform", lambda low, high: low + uniform * (high - low))
    monkeypatch.setattr(auto_augment.ImageFilter, "GaussianBlur", lambda radius: radii.append(radius) or filter_)
    filter_ = ImageFilter.BoxBlur(1)
    auto_augment.AugmentOp("GaussianBlurRand", prob=1.0, magnitude=10)(photos(8, 8, 1)[0])
    ours = OPERATIONS["GaussianBlurRand"][1](torch.tensor(uniform), torch.tensor(1.0))
    assert ours.item() == pytest.approx(radii[0])


COLORS = {
    "autocontrast": (lambda image, *_, **__: auto_augment.auto_contrast(image), "table", [0]),
    "equalize": (lambda image, *_, **__: auto_augment.equalize(image), "exact", [0]),
    "invert": (lambda image, *_, **__: auto_augment.invert(image), "exact", [0]),
    "posterize": (auto_augment.posterize, "exact", [0, 1, 3, 4, 8]),
    "solarize": (auto_augment.solarize, "exact", [0, 26, 128, 256]),
    "solarize_add": (auto_augment.solarize_add, "exact", [0, 99, 128]),
    "brightness": (auto_augment.brightness, "exact", [0.1, 0.6, 1.0, 1.9]),
    "contrast": (auto_augment.contrast, "exact", [0.1, 0.6, 1.0, 1.9]),
    "color": (auto_augment.color, "exact", [0.0, 0.1, 0.6, 1.0, 1.9]),
    "sharpness": (auto_augment.sharpness, "exact", [0.1, 0.6, 1.0, 1.9]),
    "blur": (auto_augment.gaussian_blur, "blur", [0.1, 0.5, 1.0, 2.0]),
}


def with_odd_images(images):
    """Append images with one, two and few distinct values, the limit cases of the tables."""
    size, noise = images[0].size, np.random.default_rng(0).integers(0, 2, (*images[0].size[::-1], 3), np.uint8)
    odd = [Image.new("RGB", size, (7, 200, 255)), Image.new("RGB", size), Image.fromarray(noise * 90 + 40)]
    odd[1].putpixel((0, 0), (3, 255, 0))
    return [*images, *odd]


@pytest.mark.parametrize("size", [(32, 32), (40, 57), (96, 96)])
@pytest.mark.parametrize("kind", COLORS)
def test_colors_are_pils(kind, size):
    function, tolerance, arguments = COLORS[kind]
    images = photos(*size) if kind == "blur" else with_odd_images(photos(*size))
    for argument in arguments:
        theirs = batch([function(image, argument) for image in images])
        ours = recolor(batch(images), step_of(kind, argument, len(images)), frozenset(KINDS))
        assert_close(ours, theirs, tolerance)


def test_every_operation_has_been_compared():
    assert {kind for kind, _ in OPERATIONS.values()} == {*COLORS, *GEOMETRIC}
    names = {*auto_augment._RAND_TRANSFORMS, *auto_augment._RAND_INCREASING_TRANSFORMS, *auto_augment._RAND_3A}
    assert names <= OPERATIONS.keys()


def test_other_samples_keep_their_colors():
    images = batch(photos(32, 32))
    step = Step(torch.tensor([KINDS.index(kind) for kind in ("invert", "none", "rotate", "blur")]), full(1.5))
    views = recolor(images.clone(), step, frozenset(KINDS))
    assert [torch.equal(view, image) for view, image in zip(views, images, strict=True)] == [False, True, True, False]


GEOMETRY = {
    "rotate": (auto_augment.rotate, (27.0, -30.0, 3.0)),
    "shear_x": (auto_augment.shear_x, (0.27, -0.1)),
    "shear_y": (auto_augment.shear_y, (0.1, -0.27)),
    "translate_x": (auto_augment.translate_x_rel, (0.4, -0.13)),
    "translate_y": (auto_augment.translate_y_rel, (0.13, -0.4)),
}


def moved_by(images, step, interpolation, fill):
    """Apply one of our geometric steps to whole images."""
    height, width = images.shape[2:]
    map = as_affine(step, height, width)
    box = full(0), full(0), full(height), full(width)
    views = Resampler((height, width), (height, width), interpolation)(images, box, map)
    outside = map.outside(height, width)
    return paint(views, outside, torch.tensor(fill, dtype=torch.uint8).view(1, 3, 1, 1)), outside


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("kind", "size"), [*itertools.product(GEOMETRY, ((32, 32), (64, 96))), ("rotate", (224, 224))])
def test_geometry_is_pils(kind, interpolation, size):
    function, arguments = GEOMETRY[kind]
    images = photos(*size)
    everywhere = Image.new("L", size[::-1], 255)
    inner = Image.new("L", size[::-1])
    inner.paste(255, (4, 4, size[1] - 4, size[0] - 4))
    for argument in arguments:
        theirs = [function(image, argument, resample=PILLOW[interpolation], fillcolor=FILL) for image in images]
        ours, outside = moved_by(batch(images), step_of(kind, argument), interpolation, FILL)
        masks = [function(mask, argument, resample=PILLOW["bilinear"], fillcolor=0) for mask in (everywhere, inner)]
        filled, inside = np.array(masks[0]) == 0, torch.from_numpy(np.array(masks[1]) == 255)
        assert filled.any()
        assert (outside[0, 0].numpy() != filled).sum() <= 2  # float32 against double at the very edge
        tolerance = f"{interpolation} rotation" if kind == "rotate" else interpolation
        assert_close(ours, batch(theirs), tolerance, inside)


# -- resampling --------------------------------------------------------------------------------------------------------

RESIZES = {  # stored_size, box (top, left, height, width), size
    "up 9": ((32, 32), (5, 3, 24, 20), (224, 224)),
    "up, not square": ((32, 32), (5, 3, 24, 20), (48, 32)),
    "as it is": ((32, 32), (0, 0, 32, 32), (32, 32)),
    "down 1.14": ((256, 256), (0, 0, 256, 256), (224, 224)),
    "down 2.3": ((220, 220), (0, 0, 220, 220), (96, 96)),
    "down 2.3, not square": ((110, 150), (3, 10, 100, 133), (43, 58)),
    "down 4": ((128, 128), (0, 0, 128, 128), (32, 32)),
    "down in one way, up in the other": ((96, 96), (10, 7, 80, 20), (32, 64)),
}


def resized(images, box, size, interpolation, bilinear=None):
    top, left, height, width = box = [full(value) for value in box]
    map = Affine.scaling(height / size[0], width / size[1], top, left)
    return Resampler(images.shape[2:], size, interpolation)(images, box, map, bilinear)


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("name", RESIZES)
def test_resizing_is_pils(name, interpolation):
    stored_size, box, size = RESIZES[name]
    images = photos(*stored_size)
    theirs = [pil.resized_crop(image, *box, size, InterpolationMode(interpolation)) for image in images]
    assert_close(resized(batch(images), box, size, interpolation), batch(theirs), "resize")


def test_as_it_is_nothing_changes():
    images = batch(photos(32, 32))
    assert torch.equal(resized(images, (0, 0, 32, 32), (32, 32), "bicubic"), images)


@pytest.mark.parametrize("name", ["up, not square", "down 2.3, not square"])
def test_random_interpolation_is_either(name):
    stored_size, box, size = RESIZES[name]
    images, bilinear = batch(photos(*stored_size)), torch.tensor([True, False, False, True])
    one, other = (resized(images, box, size, interpolation) for interpolation in ("bilinear", "bicubic"))
    assert not torch.equal(one, other)
    views = resized(images, box, size, "random", bilinear)
    assert torch.equal(views, torch.where(bilinear[:, None, None, None], one, other))


@pytest.mark.parametrize("name", RESIZES)
def test_gathering_and_products_agree(name, monkeypatch):
    """What a GPU computes is what a CPU computes."""
    stored_size, box, size = RESIZES[name]
    images = batch(photos(*stored_size))
    straight = resized(images, box, size, "bicubic")
    monkeypatch.setattr(image_ops, "can_select_samples", lambda values: False)
    difference = (resized(images, box, size, "bicubic").int() - straight.int()).abs().float()
    assert difference.max() <= 1 and difference.mean() <= 0.1


@pytest.mark.parametrize("size, policy", [(32, "rand-m9-mstd0.5-inc1"), (96, "rand-m9-mstd0.5-inc1"), (96, "3a")])
def test_views_do_not_depend_on_how_they_are_computed(size, policy, monkeypatch):
    images = photos(120, 90, 32)
    views = train_view((120, 90), (size, size), aa=policy, train_interpolation="random")
    arguments = batch(images), sizes_of(images), keys_of(32)
    alone = gray_levels(views(*arguments))
    monkeypatch.setattr(image_ops, "can_select_samples", lambda values: False)
    difference = (gray_levels(views(*arguments)) - alone).abs()
    # Where two differ by more, a value lies at a threshold: of solarize, of posterize, of a histogram.
    assert difference.mean() < 0.1 and (difference > 1).float().mean() < 3e-3


def views_of(kind, stored_size, size):
    if kind == "eval":
        view = eval_view(stored_size, size)
        return lambda images, sizes, keys: view(images, sizes)
    return train_view(stored_size, size, train_interpolation="random", reprob=0.5)


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("size", [(96, 96), (48, 40)])
def test_what_is_outside_an_image_is_never_seen(kind, size):
    images = [photos(height, width, 1)[0] for height, width in ((100, 60), (60, 100), (37, 45), (110, 110))] * 4
    arguments = sizes_of(images), keys_of(16)
    view = views_of(kind, (120, 130), size)
    some, others = (view(in_padded_buffer(images, 120, 130, seed), *arguments) for seed in (0, 1))
    assert torch.equal(some, others)


@pytest.mark.parametrize("ratio", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("size", [(224, 224), (96, 96), (32, 32), (224, 160), (96, 128), (48, 64)])
def test_evaluation_is_pils(size, ratio):
    images = [photos(height, width, 1)[0] for height, width in ((256, 256), (200, 300), (299, 181), (120, 133))]
    transform = build_eval_transform(ViewOptions(size, eval_crop_ratio=ratio), NORMALIZATION)
    views = eval_view((300, 320), size, eval_crop_ratio=ratio)(in_padded_buffer(images, 300, 320), sizes_of(images))
    theirs = torch.stack([transform(image) for image in images])
    assert views.shape == theirs.shape
    difference = (gray_levels(views) - gray_levels(theirs)).abs()
    for each in difference:
        assert (each <= 2).float().mean() >= 0.98 and each.mean() < 0.25
        assert (each[:, 4:-4, 4:-4] <= 2).float().mean() >= 0.995  # away from the edges


# -- keys --------------------------------------------------------------------------------------------------------------


def test_hash_is_the_samplers():
    random_values = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    values = np.concatenate([np.array([0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1], np.uint64), random_values])
    ours = splitmix64(torch.from_numpy(values.view(np.int64))).numpy().view(np.uint64)
    # Of the counters that follow this key, the samplers hash `values`.
    counters = values ^ np.uint64(samplers.random_key(0, "view"))
    assert (ours == samplers.random_keys(0, "view", counters)).all()


def test_draws_are_uniform_and_run_out():
    draws = Draws(keys_of(4000), 4)
    numbers = draws(2).numpy()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(800, abs=130)
    assert abs(np.corrcoef(numbers)[0, 1]) < 0.06
    normal = draws.normal()
    assert abs(normal.mean()) < 0.07 and normal.std() == pytest.approx(1, abs=0.05)
    with pytest.raises(IndexError, match="4 numbers"):
        draws()


@pytest.mark.parametrize("size, policy", [(32, "rand-m9-mstd0.5-inc1"), (80, "rand-m9-mstd0.5-inc1"), (80, "3a")])
def test_a_view_is_its_keys(size, policy):
    images = photos(90, 70, 9)
    view = train_view((90, 70), (size, size), aa=policy, reprob=0.5)
    images, sizes, keys = batch(images), sizes_of(images), keys_of(9)
    stored = images.clone()
    views = view(images, sizes, keys)
    assert torch.equal(images, stored)  # which may be used again
    assert torch.equal(view(images, sizes, keys), views)
    shuffled = torch.tensor([3, 8, 1, 6, 0, 2, 5, 4, 7])
    assert torch.equal(view(images[shuffled], sizes[shuffled], keys[shuffled]), views[shuffled])
    alone = [view(images[i : i + 1], sizes[i : i + 1], keys[i : i + 1]) for i in range(9)]
    assert torch.equal(torch.cat(alone), views)
    others = view(images, sizes, keys_of(9, seed=1))
    assert all(not torch.equal(one, other) for one, other in zip(views, others, strict=True))


# -- distributions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(96, 96), (60, 150), (20, 300), (300, 20)])  # the last two often have no fit
def test_crops_are_drawn_as_timms(height, width):
    number = 3000
    sizes = torch.tensor([[height, width]]).expand(number, 2)
    box, _, _ = random_resized_crop(Draws(keys_of(number), 32), sizes, (32, 32))
    image = Image.new("RGB", (width, height))
    random.seed(0)
    drawn = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(number)]
    ours, theirs = torch.stack(box).double().numpy(), np.array(drawn, dtype=np.float64).T
    assert (ours[:2] >= 0).all() and (ours[0] + ours[2] <= height).all() and (ours[1] + ours[3] <= width).all()
    measures = {
        "area": lambda top, left, h, w: h * w / (height * width),
        "aspect": lambda top, left, h, w: np.log(w / h),
        "top": lambda top, left, h, w: top,
        "left": lambda top, left, h, w: left,
        "at the bottom": lambda top, left, h, w: top + h == height,
        "whole height": lambda top, left, h, w: h == height,
    }
    for measure in measures.values():
        assert_alike(measure(*ours), measure(*theirs))


def timm_draws(name, number):
    """Draw timm's policy for many images; return (our kind, our argument) per operation, in order."""
    policy, drawn = parse_policy(name), []
    ops = policy.ops if isinstance(policy, auto_augment.RandAugment) else [op for row in policy.policy for op in row]

    def record(op):
        def note(image, argument=0.0, **_):
            changed = {
                "Desaturate": lambda: 1 - argument,
                "GaussianBlurRand": lambda: random.uniform(0.1, 2 * argument),
            }
            drawn[-1].append((OPERATIONS[op.name][0], changed.get(op.name, lambda: argument)()))
            return image

        op.aug_fn = note

    for op in ops:
        record(op)
    random.seed(0)
    np.random.seed(0)
    for _ in range(number):
        drawn.append([])
        policy(None)
    return drawn


def our_draws(name, number):
    steps = Policy(name)(Draws(keys_of(number), 64))
    rows = zip(*(zip(step.kind.tolist(), step.argument.tolist(), strict=True) for step in steps), strict=True)
    return [[(KINDS[kind], argument) for kind, argument in row if kind] for row in rows]


@pytest.mark.parametrize(
    "name",
    ["rand-m9-mstd0.5-inc1", "rand-m5-mstd101-n1-p0.8", "rand-m3-mstd4-mmax6-p1.0-t3a", "v0", "originalr-mstd1", "3a"],
)
def test_operations_are_drawn_as_timms(name):
    number = 4000
    ours, theirs = our_draws(name, number), timm_draws(name, number)
    assert_counts_alike(*(Counter(tuple(kind for kind, _ in row) for row in draws) for draws in (ours, theirs)))
    arguments = []
    for draws in (ours, theirs):
        by_kind = {}
        for kind, argument in itertools.chain.from_iterable(draws):
            by_kind.setdefault(kind, []).append(argument)
        arguments.append(by_kind)
    for kind in arguments[1].keys() - {"autocontrast", "equalize", "invert"}:
        assert_alike(arguments[0][kind], arguments[1][kind])


def test_share_of_flips():
    """A white image whose right half is black, unflipped, has its light on the left."""
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (16, 0, 32, 32))
    number = 1500
    images = batch([image]).expand(number, -1, -1, -1)
    for hflip in (0.0, 0.3, 1.0):
        view = train_view((32, 32), (32, 32), **{**PLAIN, "hflip": hflip})
        views = view(images, torch.full((number, 2), 32), keys_of(number))
        flipped = (views[..., 16:].mean(dim=(1, 2, 3)) > views[..., :16].mean(dim=(1, 2, 3))).float().mean().item()
        assert flipped == pytest.approx(hflip, abs=4.5 * math.sqrt(hflip * (1 - hflip) / number))


# -- random erasing ----------------------------------------------------------------------------------------------------


def erased(number, size=(40, 30), seed=0, **options):
    """Return views of white images (value 1) and a mask of their erased pixels."""
    options = {"reprob": 1.0, "remode": "const", **options}
    view = TrainAugmentation(size, ViewOptions(size, **{**PLAIN, **options}), ((0.5,) * 3, (0.5,) * 3))
    view.crop = lambda draws, sizes, size: (
        whole_images(sizes),
        Affine.scaling(*(full(each, len(sizes)) for each in (1, 1, 0, 0))),
        None,
    )
    white = torch.full((number, 3, *size), 255, dtype=torch.uint8)
    views = view(white, torch.tensor([size]).expand(number, 2), keys_of(number, seed))
    return views, (views != 1).any(dim=1)


def boxes_of(masks):
    """Return top, left, height and width of the marked region in each mask."""
    boxes = []
    for mask in np.asarray(masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes.append((rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1))
    return np.array(boxes)


def test_regions_are_drawn_as_timms():
    number, size = 3000, (40, 30)
    _, masks = erased(number, size)
    assert masks.any(dim=(1, 2)).all()
    ours = boxes_of(masks)
    assert (masks.sum(dim=(1, 2)).numpy() == ours[:, 2] * ours[:, 3]).all()  # they are boxes
    eraser = random_erasing.RandomErasing(1.0, device="cpu")
    random.seed(0)
    theirs = boxes_of([(eraser(torch.ones(1, *size)) == 0)[0].numpy() for _ in range(number)])
    for column in range(4):
        assert_alike(ours[:, column], theirs[:, column])
    assert_alike(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_alike(np.log(ours[:, 2] / ours[:, 3]), np.log(theirs[:, 2] / theirs[:, 3]))
    share = ours[:, 2] * ours[:, 3] / (size[0] * size[1])
    assert share.min() > 0.015 and share.max() < 0.36  # 2 % and a third, but for rounding


def test_several_regions_share_the_area():
    number, size = 3000, (40, 30)
    _, masks = erased(number, size, recount=3)
    eraser = random_erasing.RandomErasing(1.0, max_count=3, device="cpu")
    random.seed(0)
    theirs = [(eraser(torch.ones(1, *size)) == 0).sum().item() for _ in range(number)]
    assert_alike(masks.sum(dim=(1, 2)).numpy(), theirs)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_share_of_erased_images(probability):
    _, masks = erased(1200, reprob=probability)
    limit = 4.5 * math.sqrt(probability * (1 - probability) / 1200)
    assert masks.any(dim=(1, 2)).float().mean().item() == pytest.approx(probability, abs=limit)


def test_regions_are_filled():
    views, masks = erased(300, remode="const")
    assert (views.movedim(1, 3)[masks] == 0).all()
    views, masks = erased(300, remode="pixel")
    values = views.movedim(1, 3)[masks]  # [N, 3]
    assert abs(values.mean()) < 0.02 and values.std() == pytest.approx(1, abs=0.02)
    assert np.abs(np.corrcoef(values.T.numpy()) - np.eye(3)).max() < 0.02  # channels have nothing to do with each other
    views, masks = erased(300, remode="rand")
    colors = torch.stack([view[:, mask].mean(dim=1) for view, mask in zip(views, masks, strict=True)])
    spread = torch.stack([view[:, mask].std(dim=1) for view, mask in zip(views, masks, strict=True)])
    assert spread.max() < 1e-5
    assert abs(colors.mean()) < 0.15 and colors.std() == pytest.approx(1, abs=0.12)
    assert (colors[:, 0] != colors[:, 1]).all() and len(torch.unique(colors[:, 0])) > 290


# -- the whole pipeline ------------------------------------------------------------------------------------------------

THEIRS = {kind: function for kind, (function, *_) in {**COLORS, **GEOMETRY}.items()}
PAIRS = {  # kinds and arguments, tolerance
    "fill after color": ([("invert", 0), ("rotate", 27.0)], "moved"),
    "fill before color": ([("rotate", 27.0), ("invert", 0)], "moved"),
    "shear, solarize": ([("shear_x", 0.27), ("solarize", 110)], "moved"),
    "posterize, translate": ([("posterize", 2), ("translate_y", -0.3)], "moved"),
    "shear, contrast": ([("shear_y", 0.2), ("contrast", 1.9)], "moved"),
    "color, brightness": ([("color", 1.8), ("brightness", 0.4)], "resize"),
    "translate twice": ([("translate_x", 0.4), ("translate_x", -0.4)], "moved"),
    "rotate, shear": ([("rotate", 27.0), ("shear_x", -0.27)], "moved twice"),
    "shear, rotate": ([("shear_x", -0.27), ("rotate", 27.0)], "moved twice"),
    "rotate twice": ([("rotate", -27.0), ("rotate", -27.0)], "moved twice"),
}


@pytest.mark.parametrize("flip, stored_size", [(0.0, 96), (1.0, 24)])
@pytest.mark.parametrize("name", PAIRS)
def test_pipeline_is_timms(name, flip, stored_size, monkeypatch):
    """The whole image, flipped or not, as it is or enlarged, and two certain operations in order."""
    pair, tolerance = PAIRS[name]
    options = {"train_interpolation": "bilinear", "hflip": flip, "reprob": 0.0, "aa": "rand-m9-n2-p1.0-inc1"}
    transform = host_view((96, 96), **options)
    crop = transform.transforms[0]
    crop.scale = crop.ratio = (1.0, 1.0)
    [position] = [i for i, part in enumerate(transform.transforms) if isinstance(part, auto_augment.RandAugment)]
    settings = {"resample": PILLOW["bilinear"], "fillcolor": FILL}
    transform.transforms[position : position + 1] = [
        lambda image, kind=kind, argument=argument: THEIRS[kind](image, argument, **settings) for kind, argument in pair
    ]
    monkeypatch.setattr("augment.views.CROP_AREA", (1.0, 1.0))
    monkeypatch.setattr("augment.views.CROP_ASPECT", (1.0, 1.0))
    monkeypatch.setattr(Policy, "forward", lambda policy, draws: [step_of(*each) for each in pair])
    images = photos(stored_size, stored_size)
    view = train_view((stored_size, stored_size), (96, 96), **options)
    views = view(batch(images), sizes_of(images), keys_of(4))
    theirs = torch.stack([transform(image) for image in images])
    assert_close(gray_levels(views), gray_levels(theirs), tolerance)


def test_geometry_fills_with_the_mean_and_colors_change_it(monkeypatch):
    images, moved = photos(96, 96), ("translate_x", 0.4)
    view = train_view((96, 96), (96, 96), hflip=0.0, reprob=0.0)
    for pair, corner in (([("invert", 0), moved], FILL), ([moved, ("invert", 0)], [255 - value for value in FILL])):
        monkeypatch.setattr(Policy, "forward", lambda policy, draws, pair=pair: [step_of(*each) for each in pair])
        views = gray_levels(view(batch(images), sizes_of(images), keys_of(4)))
        assert (views[..., 60:] == torch.tensor(corner)[:, None, None]).all()


def black_rows(view):
    """Return the padding rows at the top minus those at the bottom, in a view of a white image."""
    black = (view == 0).all(dim=-1)[0]
    return int(black[:16].sum() - black[16:].sum())


def test_small_images_are_padded_and_shifted():
    white, digits = torch.full((500, 3, 8, 8), 255, dtype=torch.uint8), read_sources(DataOptions("DIGITS"))[0]
    view = train_view((8, 8), (32, 32), train_interpolation="bilinear", **PLAIN)
    arguments = torch.full((500, 2), 8), keys_of(500)
    levels = gray_levels(view(white, *arguments))
    shifts = [(black_rows(each), black_rows(each.transpose(1, 2))) for each in levels]
    assert set(shifts) == set(itertools.product(range(-4, 5), repeat=2))
    images = [digits[position][0] for position in range(500)]
    views = gray_levels(view(batch(images), *arguments))
    expected = []
    for image, (down, right) in zip(images, shifts, strict=True):
        padded = Image.new("RGB", (40, 40))
        padded.paste(image.resize((32, 32), Image.Resampling.BILINEAR), (4, 4))
        expected.append(padded.crop((4 - right, 4 - down, 36 - right, 36 - down)))
    assert (views - batch(expected)).abs().max() <= 1


def simple_crops(images, size, keys, **options):
    """Return our views, and the same crops made with PIL and NumPy."""
    height, width = np.array([image.size[::-1] for image in images]).max(axis=0).tolist()
    view, boxes = train_view((height, width), (size, size), **{**PLAIN, **options}, src=True), []
    crop = view.crop
    view.crop = lambda *arguments: boxes.append(crop(*arguments)) or boxes[-1]
    views = gray_levels(view(in_padded_buffer(images, height, width), sizes_of(images), keys))
    rows = torch.cat([torch.stack(box, dim=1) for *_, box in boxes]).int().tolist()
    theirs = []
    for image, (top, left, new_height, new_width) in zip(images, rows, strict=True):
        short, long = sorted(image.size)
        assert sorted((new_height, new_width)) == [size, int(size * long / short)]  # as torchvision.transforms.Resize
        resized = np.asarray(image.resize((new_width, new_height), PILLOW["bicubic"]))
        padded = np.pad(resized, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        cut = padded[top + 4 : top + 4 + size, left + 4 : left + 4 + size]
        theirs.append(cut[:, ::-1] if options.get("hflip") else cut)
    return views, batch(theirs), rows


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("size", [96, 32])
def test_simple_random_crops_are_torchvisions(size, hflip):
    shapes = [(120, 120), (100, 180), (200, 96), (60, 70)]
    images = [photos(*shape, 1)[0] for shape in shapes * 3]
    views, theirs, rows = simple_crops(images, size, keys_of(12), hflip=hflip)
    assert any(top < 0 or left < 0 for top, left, *_ in rows)
    for ours, expected in zip(views, theirs, strict=True):
        assert_close(ours, expected, "resize")
    images = photos(size, size, 40)  # nothing to interpolate
    views, theirs, _ = simple_crops(images, size, keys_of(40), hflip=hflip)
    assert torch.equal(views, theirs.float())


def test_simple_random_crops_are_drawn_alike():
    number = 9 * 9 * 13
    images = [photos(16, 16, 1)[0], photos(16, 20, 1)[0]] * number
    _, _, rows = simple_crops(images, 16, keys_of(2 * number))
    square, wide = (Counter((top, left) for top, left, *_ in rows[part::2]) for part in (0, 1))
    for found, columns in ((square, 9), (wide, 13)):
        offsets = list(itertools.product(range(-4, 5), range(-4, columns - 4)))
        assert_counts_alike(found, Counter(dict.fromkeys(offsets, number // len(offsets))))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "v0"])
def test_simple_random_crops_with_moving_policies_are_for_the_host(policy):
    assert augment.is_supported(policy) and not augment.is_supported(policy, src=True)
    with tiny.user_error(f"--src --aa {policy}", "--augment host"):
        train_view((40, 40), (32, 32), aa=policy, src=True)
    for policy in ("3a", "none"):
        assert augment.is_supported(policy, src=True)
        images = photos(40, 50, 2)
        views = train_view((40, 50), (32, 32), aa=policy, src=True)(batch(images), sizes_of(images), keys_of(2))
        assert views.isfinite().all() and views.shape == (2, 3, 32, 32)


def test_half_of_the_random_crops_are_bilinear():
    images = photos(60, 50, 100)
    arguments = batch(images), sizes_of(images), keys_of(100)
    bilinear, bicubic, either = (
        train_view((60, 50), (66, 66), train_interpolation=interpolation, **PLAIN)(*arguments).flatten(1)
        for interpolation in ("bilinear", "bicubic", "random")
    )
    first, second = ((either == one).all(dim=1) for one in (bilinear, bicubic))
    assert (first ^ second).all() and 28 <= first.sum() <= 72  # 4.5 standard errors


def test_small_images_are_never_interpolated_at_random():
    images = photos(20, 24, 8)
    arguments = batch(images), sizes_of(images), keys_of(8)
    one, other = (
        train_view((20, 24), (32, 32), train_interpolation=interpolation)(*arguments)
        for interpolation in ("bicubic", "random")
    )
    assert torch.equal(one, other)


def test_padding_moves_with_the_image(monkeypatch):
    """It is black, as torchvision's; a flip comes after it; what an operation brings in has the mean color."""
    arguments = torch.full((50, 3, 32, 32), 255, dtype=torch.uint8), torch.full((50, 2), 32), keys_of(50)

    def views(**options):
        return gray_levels(train_view((32, 32), (32, 32), **{**PLAIN, **options})(*arguments))

    plain = views()
    assert (plain == 0).any() and torch.equal(views(hflip=1.0), plain.flip(-1))
    monkeypatch.setattr(Policy, "forward", lambda policy, draws: [step_of("translate_x", 0.25, 50)])
    moved = views(aa="rand-m9")
    assert (moved[..., 24:] == torch.tensor(FILL)[:, None, None]).all()
    assert torch.equal(moved[..., :24], plain[..., 8:])


# -- color jitter -----------------------------------------------------------------------------------------------------


def test_jitter_makes_no_tensor_on_the_host(monkeypatch):
    monkeypatch.setattr(torch, "tensor", None)  # a copy from the host, for which a GPU would wait
    assert len(jitter(0.4, Draws(keys_of(0), 8))) == 3


def test_jitter_draws_factors_and_orders():
    number, names = 6000, ("brightness", "contrast", "color")
    for strength, low in ((0.4, 0.6), (1.5, 0.0)):
        steps = jitter(strength, Draws(keys_of(number), 8))
        orders = Counter(zip(*(step.kind.tolist() for step in steps), strict=True))
        kinds = [KINDS.index(name) for name in names]
        assert_counts_alike(orders, Counter(dict.fromkeys(itertools.permutations(kinds), number // 6)))
        expected = np.random.default_rng(0).uniform(low, 1 + strength, number)
        for kind in kinds:
            factors = sum(torch.where(step.kind == kind, step.argument, 0) for step in steps)
            assert factors.min() >= low and factors.max() <= 1 + strength
            assert_alike(factors, expected)


@pytest.mark.parametrize("order", list(itertools.permutations(("brightness", "contrast", "color"))))
def test_jitter_is_pils(order, monkeypatch):
    adjust = {"brightness": pil.adjust_brightness, "contrast": pil.adjust_contrast, "color": pil.adjust_saturation}
    factors = {"brightness": 1.3, "contrast": 0.7, "color": 1.4}
    monkeypatch.setattr(
        "augment.views.jitter", lambda strength, draws: [step_of(kind, factors[kind]) for kind in order]
    )
    view = train_view((48, 48), (48, 48), **{**PLAIN, "color_jitter": 0.4})
    view.crop = lambda draws, sizes, size: (
        whole_images(sizes),
        Affine.scaling(full(1), full(1), *[full(0)] * 2),
        None,
    )
    images = photos(48, 48)
    theirs = images
    for kind in order:
        theirs = [adjust[kind](image, factors[kind]) for image in theirs]
    assert_close(gray_levels(view(batch(images), sizes_of(images), keys_of(4))), batch(theirs), "exact")


@pytest.mark.parametrize("policy, jittered", [("none", True), ("3a", True), ("rand-m9-t3a", True), ("v0", False)])
def test_policies_replace_jitter_as_in_timm(policy, jittered, monkeypatch):
    calls = []
    monkeypatch.setattr("augment.views.jitter", lambda strength, draws: calls.append(strength) or [])
    transform = host_view((96, 96), aa=policy, color_jitter=0.2)
    assert any(type(part).__name__ == "ColorJitter" for part in transform.transforms) == jittered
    images = photos(96, 96, 2)
    view = train_view((96, 96), (96, 96), aa=policy, color_jitter=0.2)
    view(batch(images), sizes_of(images), keys_of(2))
    assert calls == [0.2] * jittered


# -- compiling, and what is not supported ------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize(
    "kind, size, options",
    [
        ("train", 80, {"aa": "rand-m9-mstd0.5-inc1", "train_interpolation": "random"}),
        ("train", 32, {"aa": "3a", "remode": "rand", "recount": 2}),
        ("eval", 80, {}),
    ],
)
def test_views_compile_without_a_break(kind, size, options, monkeypatch):
    images = photos(90, 70, 6)
    stored_size, arguments = (90, 70), (batch(images), sizes_of(images))
    if kind == "eval":
        view = eval_view(stored_size, (size, size))
    else:
        view = train_view(stored_size, (size, size), reprob=0.6, **options)
        arguments += (keys_of(6),)
    torch._dynamo.reset()
    compiled = torch.compile(view, fullgraph=True, backend="eager")(*arguments)  # else raises where the graph breaks
    monkeypatch.setattr(image_ops, "can_select_samples", lambda values: False)
    assert compiled.dtype == torch.float32 and compiled.shape == (6, 3, size, size)
    assert torch.equal(compiled, view(*arguments))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_histograms_are_not_sorted_in_deterministic_mode(compiled, monkeypatch):
    images = batch(photos(90, 70, 3))
    expected, modes = image_ops.equalize_table(images), []

    def scatter_add(self, *arguments):
        modes.append(torch.are_deterministic_algorithms_enabled())
        return original(self, *arguments)

    original = torch.Tensor.scatter_add
    monkeypatch.setattr(torch.Tensor, "scatter_add", scatter_add)
    torch._dynamo.reset()
    table = image_ops.equalize_table
    if compiled:
        table = torch.compile(table, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(table(images), expected)
        assert torch.get_deterministic_debug_mode() == 2  # on, not only warning
    finally:
        torch.use_deterministic_algorithms(False)
    assert modes == [False]


@tiny.NEEDS_FAKE_GPU
@pytest.mark.parametrize(
    "size, policy, remode",
    [
        (32, "rand-m9-mstd0.5-inc1", "pixel"),
        (80, "rand-m9-mstd0.5-inc1", "rand"),
        (80, "original", "const"),
        (32, "3a", "const"),
        (80, "3a", "pixel"),
    ],
)
def test_views_on_a_gpu_are_made_there_without_waiting_for_it(size, policy, remode):
    # Tensors without values need no GPU: to read a number of one, or to mix it with one of the CPU, is an error.
    with FakeTensorMode():
        options = {"aa": policy, "remode": remode, "recount": 2, "train_interpolation": "random"}
        view = train_view((90, 70), (size, size), **options).to("cuda")
        images = torch.empty(6, 3, 90, 70, dtype=torch.uint8, device="cuda")
        sizes, keys = (torch.empty(shape, dtype=torch.int64, device="cuda") for shape in ((6, 2), (6,)))
        views = [view(images, sizes, keys), eval_view((90, 70), (size, size)).to("cuda")(images, sizes)]
        assert [each.device.type for each in views] == ["cuda", "cuda"]
        assert [each.shape for each in views] == [(6, 3, size, size)] * 2
        with pytest.raises(RuntimeError, match="device"):  # each torch words it otherwise
            view(images, sizes.cpu(), keys)
        with pytest.raises(DataDependentOutputException):
            images.max().item()


@pytest.mark.parametrize("policy", ["augmix-m5-w4-d2", "rand-m9-tweights", "rand-m9-n3", "rand-m15-mmax20"])
def test_policies_for_the_host_are_named(policy):
    with tiny.user_error(f"--aa {policy}", "--augment host"):
        train_view((32, 32), (32, 32), aa=policy)
    assert not augment.is_supported(policy)


@pytest.mark.parametrize("policy", ["magic", "rand-x3", "rand-m9.5", "v0-m3"])
def test_unknown_policies_are_refused_as_on_the_host(policy):
    for build in (Policy, lambda aa: train_view((32, 32), (32, 32), aa=aa), lambda aa: host_view((32, 32), aa=aa)):
        with tiny.user_error(f"--aa {policy}", "timm has no such policy"):
            build(policy)
    assert not augment.is_supported(policy)


@pytest.mark.parametrize("policy", ["", "none", "rand-m9-mstd0.5-inc1", "rand-m9-t3a", "v0", "v0r", "original", "3a"])
def test_supported_policies_give_views(policy):
    assert augment.is_supported(policy)
    images = photos(70, 70, 2)
    view = train_view((70, 70), (72, 72), aa=policy)
    assert view(batch(images), sizes_of(images), keys_of(2)).isfinite().all()


# -- tools.show_augmentation -------------------------------------------------------------------------------------------


def picture_of(folder, capsys, *flags):
    """Return the rows and columns of the tool's picture, and its panels [rows, columns, 224, 224, 3]."""
    file = folder / "shown.png"
    show_augmentation.main([*map(str, flags), "--output", str(file)])
    images, rows = map(int, re.search(r"shown.png: (\d+) images, (\d+) rows", capsys.readouterr().out).groups())
    pixels, side = np.asarray(Image.open(file)), 224 + pictures.GAP
    bottom, right = pixels.shape[0] - pictures.MARGIN + pictures.GAP, pixels.shape[1] - pictures.MARGIN + pictures.GAP
    pixels = np.pad(pixels, ((0, pictures.GAP), (0, pictures.GAP), (0, 0)))
    pixels = pixels[bottom - rows * side : bottom, right - 2 * images * side : right]
    panels = pixels.reshape(rows, side, 2 * images, side, 3)[:, :224, :, :224].swapaxes(1, 2)
    return rows, 2 * images, panels.astype(int)


@pytest.mark.parametrize("policy, operations", [("rand-m9-mstd0.5-inc1", 15), ("3a", 3), ("none", 0)])
def test_picture_shows_both_codes(policy, operations, tmp_path, capsys):
    for number, image in enumerate(photos(240, 330)):
        image.save(tmp_path / f"{number}.png")
    flags = ["--images", tmp_path, "--num-images", 2, "--input-size", 224, "--views", 2, "--aa", policy]
    rows, columns, panels = picture_of(tmp_path, capsys, *flags)
    assert (rows, columns) == (1 + operations + 2, 4)
    image, shown = panels[0], panels[1 : 1 + operations]
    assert (image[::2] == image[1::2]).all()
    for row in shown:
        assert np.abs(row[::2] - row[1::2]).mean() < 2  # timm's and ours
        assert (row != image).any()  # and something has been done
    assert all((one != other).any() for one, other in zip(panels[-2], panels[-1], strict=True))


def test_picture_of_a_data_set(tmp_path, capsys):
    rows, columns, _ = picture_of(tmp_path, capsys, "--num-images", 3, "--input-size", 32, "--views", 1, "--aa", "v0")
    names = {(op.name, op.magnitude) for row in parse_policy("v0").policy for op in row}
    assert (rows, columns) == (1 + len(names) + 1, 6)


@pytest.mark.parametrize("layout", ["IMNET", "PACKED", "images", "train only"])
def test_picture_of_a_folder_tells_by_its_content_what_it_is(layout, tmp_path, capsys):
    data = tiny.write_folders(tmp_path / "data", ["a", "b"], per_class=1)  # two training images, then two others
    if layout == "PACKED":
        pack_dataset.main(["--data-set", "IMNET", "--data-path", str(data), "--output", str(tmp_path / "pack")])
        data = tmp_path / "pack"
    elif layout == "images":
        data = data / "train" / "a"
    elif layout == "train only":
        shutil.rmtree(data / "val")
    flags = ["--input-size", 32, "--views", 0, "--aa", "none", "--data-path", data]
    capsys.readouterr()
    _, columns, panels = picture_of(tmp_path, capsys, *flags)
    train = [np.asarray(Image.open(tmp_path / "data" / "train" / name / "0.png")) for name in ("a", "b")]
    expected = train[:1] if layout == "images" else train
    assert columns == 2 * len(expected)
    for panel, image in zip(panels[0, ::2], expected, strict=True):
        assert (panel[::7, ::7] == image).all()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data-path", "{folder}/missing"], "--data-path {folder}/missing: no such file or folder"),
        (["--data-path", "{folder}/empty"], "name its --data-set"),
        (["--data-path", "{folder}", "--data-set", "DIGITS"], "reads no folder"),
        (["--images", "{folder}", "--data-path", "{folder}"], "--data-path has no effect"),
        (["--images", "{folder}", "--data-set", "CIFAR"], "--data-set has no effect"),
        (["--images", "{folder}/broken.jpg"], "broken.jpg"),
        (["--images", "{folder}/missing.jpg"], "check the path"),
        (["--aa", "augmix-m5"], "--aa augmix-m5"),
        (["--output", "{folder}/picture.xyz"], "picture.png"),
    ],
)
def test_what_cannot_be_drawn_is_a_one_line_error(flags, words, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as info:
        show_augmentation.main(["--output", str(tmp_path / "x.png"), *(flag.format(folder=tmp_path) for flag in flags)])
    error = capsys.readouterr().err
    assert info.value.code == 2 and error.count("\n") == 1 and words.format(folder=tmp_path) in error
