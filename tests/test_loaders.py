"""Loaders on tiny data sets: views on the host and on the device, streams, whole updates, Mixup."""

import contextlib
import functools
import os
import tempfile
import traceback

import numpy as np
import pytest
import tiny
import torch
from test_datasets import break_image, encoded, picture, read, save, targets_of, write_parquet, write_stream, write_tree

import engine
import loaders
from augment import TrainAugmentation, ViewOptions
from datasets import build_eval_transform, build_train_transform
from flags import fill, parse_args
from loaders import (
    DeviceImages,
    EpochLoader,
    KeyedImages,
    LoaderOptions,
    MixupOptions,
    PaddedImages,
    build_epoch_loader,
    build_mixup,
    build_train_loader,
    build_val_loader,
    can_pad,
    padded_size,
)
from samplers import Batch, KeyedSampler, seed_generators, signed
from sources import (
    MemoryImages,
    Source,
    keep_in_memory,
)
from utils import VARIES, RunError, World, last_line

CPU = torch.device("cpu")
NORMALIZATION = MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNSCALED = (0.0,) * 3, (1.0,) * 3
SMALL_VIEWS = ViewOptions((8, 8))
NO_MIXUP = MixupOptions(mixup=0, cutmix=0)


def world(rank=0, size=1):
    return World(rank, size, rank, 1, CPU)


def train_loader(source, view, rank=0, size=1, **options):
    """Batches of any views, two at a time if `options` say nothing else."""
    plain = {"batch_size": 2, "num_workers": 0, "repeated_aug": False, "seed": 3}
    return build_epoch_loader(source, view, NO_MIXUP, LoaderOptions(**plain | options), world(rank, size))


def val_loader(source, rank=0, size=1, views=SMALL_VIEWS, normalization=UNSCALED, **options):
    """Small unscaled views, if the arguments say nothing else."""
    options = LoaderOptions(**{"batch_size": 2, "num_workers": 0} | options)
    return build_val_loader(source, views, normalization, options, world(rank, size))


def host_view(size, normalization=NORMALIZATION, **options):
    return build_train_transform(ViewOptions(size, **options), normalization)


def whole_image(size=(8, 8), normalization=UNSCALED):
    """The evaluation transform, which training can use too."""
    return build_eval_transform(ViewOptions(size), normalization)


def device_view(source, size=(32, 32)):
    return TrainAugmentation(padded_size(source), ViewOptions(size), NORMALIZATION)


@pytest.fixture
def images(tmp_path):
    """28 images in 4 classes."""
    write_tree(tmp_path, classes="abcd", each=7, height=40, width=48)
    return read("IMNET", tmp_path)[0]


# -- views -------------------------------------------------------------------------------------------------------------


def views(source, view, size=1, epoch=2, batch_size=4, **options):
    """{position: (class, image)} over all ranks."""
    found = {}
    for rank in range(size):
        loader = train_loader(source, view, rank, size, batch_size=batch_size, **options)
        loader.set_epoch(epoch)
        for batch in loader:
            assert len(batch.images) == batch_size
            for position, target, image in zip(batch.positions.tolist(), batch.targets, batch.images, strict=True):
                assert position not in found
                found[position] = (int(target), image)
    return found


def assert_same_views(found, expected):
    assert set(found) <= set(expected)
    for position, (target, image) in found.items():
        assert target == expected[position][0] and torch.equal(image, expected[position][1])


@pytest.mark.parametrize("input_size", [(32, 32), (72, 96)])
def test_views_do_not_depend_on_workers_batches_ranks_or_storage(images, input_size):
    transform = host_view(input_size)
    expected = views(images, transform)
    assert set(expected) == set(range(28))
    for num_workers, batch_size, size in ((2, 7, 1), (0, 4, 2), (2, 7, 2)):
        found = views(images, transform, size, num_workers=num_workers, batch_size=batch_size)
        assert len(found) == 28 // (batch_size * size) * batch_size * size
        assert_same_views(found, expected)
    assert_same_views(views(keep_in_memory(images, 100), transform), expected)


def test_views_do_not_depend_on_the_order_of_reading(images):
    transform = host_view((32, 32))
    expected = views(images, transform)
    sampler = KeyedSampler(len(images), seed=3)
    sampler.set_epoch(2)
    samples, dataset = list(sampler), KeyedImages(images, transform)
    for number in (5, 0, 27, 5):
        seed_generators(number)  # what other code draws must not matter
        sample = dataset[samples[number]]
        assert_same_views({sample.positions: (sample.targets, sample.images)}, expected)


@pytest.mark.parametrize("where", ["host", "device"])
def test_keys_travel_with_the_views(images, where):
    memory = keep_in_memory(images, 1)
    loader = train_loader(memory, host_view((32, 32)) if where == "host" else device_view(memory), batch_size=4)
    loader.set_epoch(2)
    sampler = KeyedSampler(len(images), seed=3)
    sampler.set_epoch(2)
    expected = [signed(key) for _, _, key in sampler]
    keys = torch.cat([batch.keys for batch in loader])
    assert keys.tolist() == expected and keys.dtype == torch.int64


@pytest.mark.parametrize("where", ["host", "device"])
def test_an_epoch_can_begin_with_a_later_step(images, where):
    memory = keep_in_memory(images, 1)
    loader = train_loader(memory, host_view((32, 32)) if where == "host" else device_view(memory), batch_size=4)
    loader.set_epoch(2)
    whole = list(loader)
    loader.set_epoch(2, first_step=5)
    rest = list(loader)
    assert len(whole) == len(loader) == 7 and len(rest) == 2
    for found, expected in zip(rest, whole[5:], strict=True):
        assert all(torch.equal(found[field], expected[field]) for field in (0, 1, 2, 4))
        assert found.sizes is expected.sizes is None
    loader.set_epoch(2)
    assert len(list(loader)) == 7


def test_views_differ_between_epochs(images):
    transform = host_view((32, 32))
    source = Source(images.images, images.targets, 4, np.zeros(28, dtype=int))  # one image, so only views can differ
    first, second = (views(source, transform, epoch=epoch) for epoch in (0, 1))
    assert all(not torch.equal(first[position][1], second[position][1]) for position in range(28))


def test_repeats_are_different_views_of_one_image_side_by_side(images):
    cropped = views(images, host_view((32, 32)), repeated_aug=True)
    whole = views(images, whole_image((32, 32), NORMALIZATION), repeated_aug=True)
    for position in range(0, 27, 3):
        assert all(torch.equal(whole[position][1], whole[position + n][1]) for n in (1, 2))
        assert len({cropped[position + n][1].numpy().tobytes() for n in range(3)}) == 3
    assert len({image.numpy().tobytes() for _, image in whole.values()}) == 10  # ceil(28 / 3)


# -- on the device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_size", [(32, 32), (72, 96)])
def test_views_made_on_the_device_depend_on_their_key_alone(images, input_size):
    memory = keep_in_memory(images, 1)
    view = device_view(memory, input_size)
    expected = views(memory, view)
    assert len(expected) == 28
    assert_same_views(views(memory, view, num_workers=2, batch_size=7), expected)
    assert_same_views(views(memory, view, batch_size=2, size=3), expected)
    other = views(memory, view, epoch=3)
    assert not any(torch.equal(other[position][1], image) for position, (_, image) in expected.items())


def test_images_in_memory_are_picked_on_the_device_without_workers(images):
    memory = keep_in_memory(images, 1)
    loader = train_loader(memory, device_view(memory), num_workers=2).loader
    assert loader.num_workers == 0 and isinstance(loader.dataset, DeviceImages)
    assert loader.dataset.images.shape[0] == 28 and loader.dataset.images.dtype == torch.uint8
    assert loader.dataset.images.device == CPU


@pytest.mark.parametrize(
    "device, flags, is_compiled",
    [("cuda", [], True), ("cuda", ["--no-compile-augment"], False), ("cuda", ["--compile"], True), ("cpu", [], False)],
)
def test_views_are_compiled_on_a_gpu_unless_told_otherwise(device, flags, is_compiled, monkeypatch):
    compiled, view = [], torch.nn.Identity()
    monkeypatch.setattr(loaders, "why_not_compiled", lambda device: "")
    monkeypatch.setattr(view, "compile", lambda **_: compiled.append(view))
    monkeypatch.setattr(view, "to", lambda _: view)
    options = fill(LoaderOptions, parse_args(flags))
    assert loaders._on_device(view, options, World.alone(torch.device(device))) is view
    assert bool(compiled) == is_compiled
    assert loaders._on_device(lambda image: image, options, World.alone(torch.device(device))) is None


def test_a_compiled_view_runs_the_same_graphs_in_every_epoch(monkeypatch):
    ran = []

    def backend(graph, inputs):
        return lambda *arguments: ran.append(graph) or graph(*arguments)

    class View(torch.nn.Module):  # torch 2.6 does not compile a module of its own
        def forward(self, images):
            return images / 255

    view = View()
    compile_by = functools.partial(view.compile, backend=backend)
    for name, value in (("compile", compile_by), ("to", lambda _: view)):
        monkeypatch.setattr(view, name, value)
    monkeypatch.setattr(loaders, "why_not_compiled", lambda device: "")
    loaders._on_device(view, LoaderOptions(), World.alone(torch.device("cuda")))
    for images in (4, 4, 3, 4, 4, 3):  # of two evaluations
        view(torch.zeros(images, 3, 2, 2))
    assert len(ran) == 6 and ran[:3] == ran[3:]


def test_where_views_are_made_tells_compiled_ones():
    view = torch.nn.Identity()
    loader = loaders.DeviceLoader([], CPU, view=view)
    assert [loaders.DeviceLoader([], CPU).augmentation["where"], loader.augmentation["where"]] == ["host", "device"]
    view.compile()
    assert loader.augmentation["where"] == "device, compiled"


def test_views_are_not_compiled_where_that_would_fail(monkeypatch, caplog):
    def compiled(function, **_):
        def fail(values):
            raise RuntimeError("first line\nPython.h: No such file or directory")

        return fail

    view = torch.nn.Identity()
    monkeypatch.setattr(view, "compile", lambda **_: pytest.fail("compiled"))
    monkeypatch.setattr(view, "to", lambda _: view)
    monkeypatch.setattr(torch, "compile", compiled)
    assert "(Python.h: No such file or directory)" in loaders.why_not_compiled(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(loaders, "varies_if_compiled", lambda: True)
        assert loaders.why_not_compiled(CPU) == f"--deterministic: {VARIES}"
    monkeypatch.setattr(loaders.logger, "propagate", True)
    monkeypatch.setattr(loaders, "why_not_compiled", lambda device: f"no compiler for {device}")
    assert loaders._on_device(view, LoaderOptions(), World.alone(torch.device("cuda"))) is view
    assert "not compiled, which makes it slower: no compiler for cuda" in caplog.text


@pytest.mark.compile
def test_a_working_compiler_is_recognized():
    assert loaders.why_not_compiled(CPU) == ""


def test_keys_of_batches_have_all_64_bits(images):
    samples = [(3, 7, 0), (0, 2**40, 2**63), (9, 0, 2**64 - 1)]
    stored = PaddedImages(keep_in_memory(images, 1))
    for batch in (stored.__getitems__(samples), DeviceImages(stored, CPU).__getitems__(samples)):
        assert batch.positions.tolist() == [7, 2**40, 0] and batch.positions.dtype == torch.int64
        assert batch.keys.tolist() == [0, -(2**63), -1] and batch.keys.dtype == torch.int64


@pytest.mark.parametrize("size", [1, 3])
def test_each_image_is_evaluated_once_on_the_device(images, size):
    memory = keep_in_memory(images, 1)
    options = {"views": ViewOptions((32, 32)), "normalization": NORMALIZATION, "batch_size": 4}
    expected = {}
    for batch in val_loader(memory, augment="host", **options):
        expected |= dict(zip(batch.positions.tolist(), zip(batch.images, batch.targets, strict=True), strict=True))
    found = []
    for rank in range(size):
        for batch in val_loader(memory, rank, size, augment="device", **options):
            for position, image, target in zip(batch.positions.tolist(), batch.images, batch.targets, strict=True):
                assert target == expected[position][1]
                assert (image - expected[position][0]).abs().mean() < 0.5 / 255 / min(STD)  # half a gray level
                found.append(position)
    assert sorted(found) == list(range(28))


def test_images_of_all_sizes_are_padded_to_the_largest(tmp_path):
    for number, size in enumerate([(9, 14), (12, 7), (5, 5)]):
        save(picture(number).resize(size), tmp_path / "train" / "cat" / f"{number}.png")
        save(picture(number).resize(size), tmp_path / "val" / "cat" / f"{number}.png")
    memory = keep_in_memory(read("IMNET", tmp_path)[0], 1)
    assert padded_size(memory) == (14, 12)
    batch = PaddedImages(memory).__getitems__([(2, 7, 0), (0, 8, 0), (1, 9, 0)])
    assert batch.sizes.tolist() == [[5, 5], [14, 9], [7, 12]] and batch.positions.tolist() == [7, 8, 9]
    for image, (height, width), position in zip(batch.images, batch.sizes.tolist(), (2, 0, 1), strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        assert np.array_equal(pixels[:height, :width], memory.array(position)[0])
        assert not pixels[height:].any() and not pixels[:, width:].any()


def test_a_worker_builds_its_batches_in_shared_memory(images, monkeypatch):
    stored, samples = PaddedImages(keep_in_memory(images, 1)), [(2, 7, 0), (0, 8, 0), (1, 9, 0)]
    alone = stored.__getitems__(samples)
    monkeypatch.setattr(loaders, "get_worker_info", object)
    shared = stored.__getitems__(samples)
    assert shared.images.is_shared() and not alone.images.is_shared()
    assert torch.equal(alone.images, shared.images) and alone.images.stride() == shared.images.stride()
    assert loaders.collate(shared) is shared


@pytest.mark.parametrize(("longest", "expected"), [(20, True), (400, False)])
def test_one_very_large_image_does_not_blow_up_all_buffers(longest, expected):
    arrays = [np.zeros((10, 10, 3), np.uint8)] * 9 + [np.zeros((10, longest, 3), np.uint8)]
    source = Source(MemoryImages(arrays), np.zeros(10, np.int64), 1, np.arange(10))
    assert padded_size(source) == (10, longest)
    assert can_pad(source) == expected


def test_a_temporary_folder_that_workers_cannot_use_is_refused(monkeypatch):
    for length, is_refused in ((75, False), (76, True)):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * (length - 1))
        source = Source([picture(0)] * 4, np.zeros(4, dtype=np.int64), 1, np.arange(4))
        with tiny.user_error("TMPDIR /ttt", "--num-workers 0") if is_refused else contextlib.nullcontext():
            train_loader(source, torch.clone, num_workers=1)
        train_loader(source, torch.clone, num_workers=0)


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    return write_stream(tmp_path)


def pretend_rank(monkeypatch, rank, size):
    """What a data set sees of a process group, without one."""
    values = {"is_initialized": size > 1, "get_rank": rank, "get_world_size": size, "barrier": None}
    for name, value in values.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)


def numbers_in(batches):
    """Which images of `write_shards` they hold, after a check that each came with its class."""
    numbers = []
    for batch in batches:
        found = (batch.images[:, 0, 0, 0] * 255 / 10).round().long()
        assert (batch.targets == found % 3).all()
        numbers += found.tolist()
    return numbers


# three workers for two shards: one of them would have nothing to do
@pytest.mark.parametrize("num_workers, size", [(0, 1), (2, 2), (3, 1)])
def test_stream_trains_on_whole_batches_in_every_epoch(shards, monkeypatch, num_workers, size):
    epochs = {0: [], 1: []}
    for rank in range(size):
        pretend_rank(monkeypatch, rank, size)
        train, _ = read("wds/", shards, num_classes=3)
        loader = train_loader(train, whole_image(), num_workers=num_workers, rank=rank, size=size)
        assert len(train) == 12 and len(loader) == 6 // size
        for epoch, numbers in epochs.items():
            loader.set_epoch(epoch)
            batches = list(loader)
            assert [len(batch.images) for batch in batches] == [2] * (6 // size)
            assert len({int(p) for batch in batches for p in batch.positions}) == 12 // size
            numbers += numbers_in(batches)
    # Two shards of the same size divide evenly among one or two processes: nothing is skipped or repeated.
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))


def test_stream_trains_on_whole_batches_of_uneven_shards(tmp_path):
    train, _ = read("wds/", write_stream(tmp_path, [5, 5]), num_classes=3)
    loader = train_loader(train, whole_image(), num_workers=2)
    loader.set_epoch(0)
    assert [len(batch.images) for batch in loader] == [2] * 5


def test_order_of_a_stream_follows_from_seed_and_epoch(tmp_path):
    path = write_stream(tmp_path, [1] * 12)

    def order(seed, epoch):
        train, _ = read("wds/", path, num_classes=3)
        loader = train_loader(train, whole_image(), seed=seed)
        loader.set_epoch(epoch)
        return tuple(numbers_in(loader))

    assert order(1, 0) == order(1, 0)
    assert len({order(1, 0), order(1, 1), order(5, 0)}) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_of_a_shard_are_shuffled_by_seed_and_epoch(tmp_path, num_workers):
    path = write_stream(tmp_path, [12, 12] if num_workers else [24])

    def orders(seed, *epochs):
        train, _ = read("wds/", path, num_classes=3)
        loader = train_loader(train, whole_image(), seed=seed, num_workers=num_workers)
        return [tuple(numbers_in(loader)) for epoch in epochs if loader.set_epoch(epoch) is None]

    first = orders(1, 0, 1, 2)
    assert len({*first, *orders(2, 0, 1)}) == 5 and all(sorted(order) == list(range(24)) for order in first)
    assert orders(1, 1) == first[1:2] and orders(1, 2, 0) == [first[2], first[0]]  # whatever came before


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_is_evaluated_exactly(shards, monkeypatch, num_workers, size):
    numbers, positions = [], []
    for rank in range(size):
        pretend_rank(monkeypatch, rank, size)
        _, val = read("wds/", shards, num_classes=3)
        loader = val_loader(val, num_workers=num_workers, rank=rank, size=size)
        batches = list(loader)
        assert numbers_in(batches) == numbers_in(loader)  # each time
        numbers += numbers_in(batches)
        positions += [int(p) for batch in batches for p in batch.positions]
    assert sorted(numbers) == sorted(positions) == list(range(7))


def test_stream_with_fewer_shards_than_processes_is_a_user_error(shards):
    train, _ = read("wds/", shards, num_classes=3)
    with tiny.user_error("2 training shards", "3 processes"):
        train_loader(train, whole_image(), rank=0, size=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_views_follow_from_epoch_and_position(tmp_path, num_workers):
    path = write_stream(tmp_path, contrast=0)  # all images are alike, so only views can differ
    transform = host_view((8, 8), UNSCALED, reprob=1.0)

    def views_of(*epochs):
        train, _ = read("wds/", path, num_classes=3)
        loader = train_loader(train, transform, num_workers=num_workers)
        return torch.cat([batch.images for epoch in epochs for batch in loader.set_epoch(epoch) or loader])

    both = views_of(1, 2)
    assert len({view.numpy().tobytes() for view in both}) == 24
    assert torch.equal(both[12:], views_of(2))  # as after --resume


@pytest.mark.parametrize("num_workers", [0, 2])
def test_hugging_face_stream(tmp_path, num_workers):
    write_tree(tmp_path / "pets", parts=("train", "validation"), each=4)
    train, val = read(f"hfids/{tmp_path / 'pets'}", tmp_path / "cache")
    assert train.num_classes == 2 and len(train) == 8
    loader = train_loader(train, whole_image(), num_workers=num_workers)
    loader.set_epoch(0)
    batches = list(loader)
    assert len(loader) == len(batches) == 4
    assert sorted(t for batch in batches for t in batch.targets.tolist()) == [0] * 4 + [1] * 4
    targets = [batch.targets.tolist() for batch in val_loader(val, batch_size=8, num_workers=2)]
    assert targets == [[0] * 4 + [1] * 4]


def some_broken(*broken):
    """Files of a sample, some of whose images are no images."""
    return lambda number, image: {
        "png": b"broken" if number in broken else encoded(image),
        "cls": str(number % 3).encode(),
    }


def evaluated(loader):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3))
    return engine.evaluate(model, loader, contextlib.nullcontext())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_that_ends_early_ends_the_run(tmp_path, num_workers):
    path = write_stream(tmp_path, files=some_broken(*range(12)))
    loader = train_loader(read("wds/", path, num_classes=3)[0], whole_image(), num_workers=num_workers)
    loader.set_epoch(0)
    with pytest.raises(RunError, match="after 0 of 6 batches"):
        list(loader)


def test_stream_with_fewer_validation_images_than_promised_ends_the_run(tmp_path):
    _, val = read("wds/", write_stream(tmp_path, files=some_broken(1, 5)), num_classes=3)
    with pytest.raises(RunError, match="only 5 of 7 validation images"):
        evaluated(val_loader(val))


def test_stream_without_validation_images_ends_the_run(tmp_path):
    path = write_stream(tmp_path, files=some_broken(*range(7)))
    split = "set-validation-{0000..0001}.tar"  # which does not say how many there are
    _, val = read("wds/", path, num_classes=3, val_split=split)
    val.dataset.reader.num_samples = 0
    with pytest.raises(RunError, match="only 0 of the validation images"):
        evaluated(val_loader(val))


def test_stream_with_more_validation_images_than_stated_is_evaluated_whole(shards, caplog):
    _, val = read("wds/", shards, num_classes=3)
    val.dataset.reader.num_samples = 5
    assert evaluated(val_loader(val))["images"] == 7
    assert "state 5 images but have 7" in caplog.text


def test_images_evaluated_are_logged_and_may_be_fewer_after_a_signal(shards, caplog):
    caplog.set_level("INFO", "deit")
    loader = val_loader(read("wds/", shards, num_classes=3)[1])
    assert evaluated(loader)["images"] == 7 and "evaluated 7 images" in caplog.text
    calls = iter([0, 0])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3))
    stats = list(engine.evaluate_all([("", model)], loader, None, lambda: next(calls, 15)))
    assert [each["images"] for each in stats] == [4]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("part", [0, 1])
def test_label_outside_the_classes_of_a_stream_ends_the_run(shards, part, num_workers):
    source = read("wds/", shards, num_classes=2)[part]
    loader = (train_loader(source, whole_image(), num_workers=num_workers), val_loader(source))[part]
    if part == 0:
        loader.set_epoch(0)
    with pytest.raises(RunError) as info:
        list(loader)
    traceback.clear_frames(info.tb)
    line = last_line(info.value)
    assert line.startswith("--data-set wds/: has the label 2,") and "--num-classes" in line


@pytest.mark.parametrize("labels", [[0, None, 1], ["cat", "dog", "cat"], [[0], [1], [1]]])
def test_labels_of_a_hugging_face_stream_must_be_numbers(tmp_path, labels):
    for split, count in (("train", 3), ("validation", 3)):
        write_parquet(tmp_path / "set", split, [encoded(picture(n)) for n in range(count)], labels)
    _, val = read(f"hfids/{tmp_path / 'set'}", tmp_path / "cache", num_classes=2)
    with pytest.raises(RunError, match="--data-set hfids/"):
        list(val_loader(val))


# -- batches and workers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "accum_steps", "size", "updates"), [(4, 1, 1, 7), (4, 3, 1, 2), (4, 3, 2, 1)])
def test_training_takes_whole_updates(images, batch_size, accum_steps, size, updates):
    positions = []
    for rank in range(size):
        loader = train_loader(images, whole_image(), rank, size, batch_size=batch_size, accum_steps=accum_steps)
        loader.set_epoch(0)
        batches = list(loader)
        assert len(batches) == len(loader) == updates * accum_steps
        assert all(len(batch.images) == batch_size for batch in batches)
        positions += [int(p) for batch in batches for p in batch.positions]
    assert sorted(positions) == list(range(updates * accum_steps * batch_size * size))


@pytest.mark.parametrize(("batch_size", "accum_steps", "size"), [(29, 1, 1), (10, 3, 1), (15, 1, 2)])
def test_update_larger_than_the_data_is_a_user_error(images, batch_size, accum_steps, size):
    with tiny.user_error(f"--batch-size {batch_size}", batch_size * accum_steps * size, "hold 28"):
        train_loader(images, whole_image(), size=size, batch_size=batch_size, accum_steps=accum_steps)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 4), (2, 5), (0, 100)])
def test_each_image_is_evaluated_once(images, size, num_workers, batch_size):
    found = {}
    for rank in range(size):
        batches = list(val_loader(images, rank, size, batch_size=batch_size, num_workers=num_workers))
        ranks = torch.cat([batch.positions for batch in batches]).tolist()
        assert ranks == list(range(rank, 28, size))
        found |= dict(zip(ranks, torch.cat([batch.targets for batch in batches]).tolist(), strict=True))
    assert [found[position] for position in range(28)] == targets_of(images)


def test_workers_live_on_between_epochs(images):
    loader = train_loader(images, process_number, batch_size=4, num_workers=1)
    processes = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        processes += [int(number) for batch in loader for number in batch.images]
    assert len(set(processes)) == 1 and processes[0] != os.getpid()


def process_number(_image):
    return torch.tensor(os.getpid())


def test_closing_ends_the_workers(images):
    loader = train_loader(images, process_number, batch_size=4, num_workers=1)
    loader.set_epoch(0)
    with contextlib.closing(loader):
        process = int(next(iter(loader)).images[0])
        os.kill(process, 0)  # asks whether it lives
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize("scheme", ["torch/image_folder", "hfds/"])
def test_workers_read_data_sets_of_timm(tmp_path, scheme):
    write_tree(tmp_path / "pets", parts=("train", "validation"))
    name, path = (scheme + str(tmp_path / "pets"), "cache") if scheme == "hfds/" else (scheme, "pets")
    _, val = read(name, tmp_path / path)
    batches = list(val_loader(val, batch_size=3, num_workers=2))
    assert [batch.targets.tolist() for batch in batches] == [[0, 0, 1], [1]]


# -- broken images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, num_workers", [("truncated", 0), ("garbage", 0), ("empty", 0), ("gone", 0), ("truncated", 2)]
)
def test_broken_image_is_named_in_one_line(tmp_path, how, num_workers):
    write_tree(tmp_path, each=3)
    path = save(picture(0, 40, 40), tmp_path / "val" / "dog" / "0.jpg")
    source = read("IMNET", tmp_path)[1]
    break_image(path, how)
    with pytest.raises(RunError) as info:
        list(val_loader(source, num_workers=num_workers))
    traceback.clear_frames(info.tb)  # torch waits long for workers that are left to the garbage collector
    line = last_line(info.value)
    assert "\n" not in line and line.startswith("cannot read image") and str(path) in line


def test_broken_image_of_a_hugging_face_set_is_named_by_its_number(tmp_path):
    for number, split in enumerate(("train", "validation")):
        write_parquet(tmp_path / "set", split, [encoded(picture(number)), b"not an image"], [0, 1])
    _, val = read(f"hfds/{tmp_path / 'set'}", tmp_path / "cache")
    with pytest.raises(RunError, match="number 1 of hfds/"):
        list(val_loader(val))


# -- Mixup and the way to the device -----------------------------------------------------------------------------------


def mixup_with(batch_size=6, **options):
    return build_mixup(MixupOptions(**options), num_classes=5, batch_size=batch_size)


def batch_of_six():
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(6, 3, 16, 16, generator=generator), torch.tensor([0, 4, 2, 2, 1, 3])
    return Batch(images, targets, torch.arange(6) + 10, keys=torch.arange(6) + 20)


def mixed(mixup_fn, seed=0, device=CPU):
    """What a loader makes of `batch_of_six`."""
    counts = {"num_batches": 1, "images_per_batch": 6, "updates_per_epoch": 1}
    loader = EpochLoader(loader=[batch_of_six()], device=device, counter=None, **counts, mixup_fn=mixup_fn, seed=seed)
    loader.set_epoch(0)
    (batch,) = loader
    return batch


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    ("mixup", "cutmix", "minmax"), [(0.8, 0, None), (0, 1.0, None), (0.8, 1.0, None), (0, 0, (0.2, 0.6))]
)
def test_mixed_targets_are_probabilities_of_the_two_classes(mode, mixup, cutmix, minmax):
    mixup_fn = mixup_with(mixup=mixup, cutmix=cutmix, cutmix_minmax=minmax, mixup_mode=mode)
    for seed in range(5):
        before, after = batch_of_six(), mixed(mixup_fn, seed)
        assert after.images.shape == before.images.shape and torch.equal(after.positions, before.positions)
        torch.testing.assert_close(after.targets.sum(1), torch.ones(6))
        for row, own, other in zip(after.targets, before.targets, before.targets.flip(0), strict=True):
            assert set(row.nonzero().flatten().tolist()) <= {int(own), int(other)}  # and none for smoothing


def test_mixup_alone_blends_with_the_weight_of_the_target():
    before, after = batch_of_six(), mixed(mixup_with(cutmix=0))
    weight = after.targets[0, 0]  # the first image's own class, which its partner has not
    assert 0 < weight < 1
    torch.testing.assert_close(after.images, weight * before.images + (1 - weight) * before.images.flip(0))


@pytest.mark.parametrize("options", [{"mixup": 0}, {"mixup": 0, "cutmix": 0, "cutmix_minmax": (0.3, 0.7)}])
def test_cutmix_alone_pastes_a_region_of_the_area_in_the_target(options):
    before, after = batch_of_six(), mixed(mixup_with(**options), seed=2)
    own, other = after.images == before.images, after.images == before.images.flip(0)
    assert (own | other).all()
    torch.testing.assert_close(own.float().mean((1, 2, 3))[0], after.targets[0, 0])
    assert 0 < after.targets[0, 0] < 1


def test_probability_zero_mixes_nothing():
    before, after = batch_of_six(), mixed(mixup_with(mixup_prob=0.0))
    assert torch.equal(after.images, before.images) and after.targets.argmax(1).tolist() == before.targets.tolist()


def test_mixup_that_is_off_leaves_class_indices_even_for_odd_batches():
    mixup_fn = mixup_with(mixup=0, cutmix=0, batch_size=7)
    assert mixup_fn is None
    before, after = batch_of_six(), mixed(mixup_fn)
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))


@pytest.mark.parametrize("where", ["host", "device"])
def test_training_batches_are_augmented_and_mixed(images, where):
    memory = keep_in_memory(images, 1)
    options = LoaderOptions(batch_size=4, num_workers=0, augment=where)
    loader = build_train_loader(memory, ViewOptions((32, 32)), NORMALIZATION, MixupOptions(), options, world())
    loader.set_epoch(0)
    batches = list(loader)
    assert loader.augmentation["where"] == where and len(batches) == 7
    for batch in batches:
        assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.float32
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(4))
    assert any((batch.targets.amax(1) < 1).any() for batch in batches)


def test_odd_batch_is_a_user_error():
    with tiny.user_error("--batch-size 7", "--mixup 0"):
        mixup_with(batch_size=7)


def test_all_but_the_positions_goes_to_the_device():
    batch = mixed(None, device=torch.device("meta"))
    assert isinstance(batch, Batch) and batch.sizes is None
    positions = [tensor.device.type for tensor in (batch.images, batch.targets, batch.positions, batch.keys)]
    assert positions == ["meta", "meta", "cpu", "meta"]


def test_copies_to_the_host_wait(monkeypatch):
    """A copy to the host that is not waited for has not arrived when it is read."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking=False: seen.append(non_blocking))
    images = torch.zeros(1, 3, 4, 4, device="meta")
    batch = Batch(images, torch.zeros(1), torch.zeros(1), None, torch.zeros(1))
    for device, expected in (("cpu", False), ("cuda", True)):
        seen.clear()
        loaders.to_device(batch, torch.device(device))
        assert seen == [expected] * 3


def test_all_epochs_copy_on_one_stream(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    loaders.copy_stream.cache_clear()
    streams = {id(loaders.copy_stream(torch.device("cuda", index))) for index in (0, 0, 1, 0)}
    loaders.copy_stream.cache_clear()
    assert len(made) == len(streams) == 2


def test_cosub_sees_each_mixed_image_twice_and_counts_it_once():
    loaders = [
        EpochLoader(
            loader=[batch_of_six()],
            device=CPU,
            counter=None,
            num_batches=1,
            images_per_batch=6,
            updates_per_epoch=1,
            mixup_fn=build_mixup(MixupOptions(), 5, 6),
            cosub=cosub,
        )
        for cosub in (False, True)
    ]
    [plain], [doubled] = (list(loader) for loader in loaders)
    assert torch.equal(doubled.images, torch.cat([plain.images, plain.images]))
    assert torch.equal(doubled.targets, plain.targets) and torch.equal(doubled.positions, plain.positions)
    assert loaders[1].num_positions == loaders[0].num_positions == 6
