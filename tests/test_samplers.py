"""The sampling order, and the random keys of all draws."""

import random
import zlib

import numpy as np
import pytest
import torch

from samplers import KeyedSampler, random_key, random_keys, seed_generators, signed

MASK = 2**64 - 1


def splitmix64(state):
    """One step of SplitMix64 from `state`, in Python's unbounded integers (Steele et al. 2014, figure 17)."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_key(seed, purpose, *counters):
    key = splitmix64(seed % 2**64)
    for counter in (zlib.crc32(purpose.encode()), *counters):
        key = splitmix64(key ^ counter)
    return key


def order_of(sampler):
    return [index for index, _, _ in sampler]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_splitmix64_gives_the_published_first_output():
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    # The key so far is XORed with each counter. With itself as the counter that is 0.
    assert random_key(0, "view", random_key(0, "view")) == 0xE220A8397B1DCDAF


STATES = [0, 1, 2**32, 2**63, MASK, 0x9E3779B97F4A7C15, 123456789123456789]


def test_keys_hash_every_counter_as_unbounded_integers_do():
    counters = np.array(STATES, dtype=np.uint64) ^ np.uint64(random_key(0, "view"))
    assert random_keys(0, "view", counters).tolist() == [splitmix64(state) for state in STATES]


@pytest.mark.parametrize("seed", [*STATES, 7, 2**31, 2**64 + 5])
def test_keys_agree_with_unbounded_integers(seed):
    positions = np.arange(5)
    expected = [reference_key(seed, "view", 3, position) for position in range(5)]
    assert random_keys(seed, "view", 3, positions).tolist() == expected
    assert [random_key(seed, "view", 3, position) for position in range(5)] == expected


def test_keys_broadcast_their_counters():
    keys = random_keys(0, "step", np.arange(3)[:, None], np.arange(4))
    assert keys.shape == (3, 4) and keys.dtype == np.uint64
    assert int(keys[2, 1]) == random_key(0, "step", 2, 1)


def test_different_seeds_purposes_and_counters_give_different_keys():
    counters = np.arange(20)
    keys = [
        int(key)
        for seed in (0, 1)
        for purpose in ("shuffle", "view", "step")
        for key in random_keys(seed, purpose, counters[:, None], counters).ravel()
    ]
    assert len(set(keys)) == len(keys) == 2 * 3 * 20 * 20


def test_the_order_of_counters_matters():
    assert random_key(0, "view", 1, 2) != random_key(0, "view", 2, 1)


def test_seeding_repeats_the_draws_of_python_numpy_and_torch():
    def draw():
        return random.random(), float(np.random.rand()), torch.rand(3).tolist(), torch.randperm(50).tolist()

    key = random_key(0, "view", 0, 0)
    seed_generators(key)
    first, second = draw(), draw()
    seed_generators(key, torch.device("cpu"))
    assert draw() == first != second
    seed_generators(random_key(0, "view", 0, 1))
    assert all(mine != yours for mine, yours in zip(draw(), first, strict=True))


def test_a_signed_key_has_the_same_64_bits():
    keys = np.array([0, 1, 2**63 - 1, 2**63, MASK], dtype=np.uint64)
    assert [signed(key) for key in keys.tolist()] == keys.view(np.int64).tolist()


def test_every_64_bit_key_can_seed():
    for key in (0, 2**63, MASK):
        seed_generators(key)


# -- orders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 10, 255, 257, 1000])
def test_an_epoch_is_a_permutation(length):
    samples = list(KeyedSampler(length))
    assert sorted(index for index, _, _ in samples) == list(range(length))
    assert [position for _, position, _ in samples] == list(range(length))


def test_the_order_is_shuffled_and_depends_on_seed_and_epoch_only():
    sampler = KeyedSampler(100, seed=1)
    first = list(sampler)
    assert order_of(sampler) != list(range(100))
    sampler.set_epoch(1)
    second = list(sampler)
    assert [index for index, _, _ in second] != [index for index, _, _ in first]
    assert {key for _, _, key in second}.isdisjoint(key for _, _, key in first)
    sampler.set_epoch(0)
    assert list(sampler) == first == list(KeyedSampler(100, seed=1))
    assert order_of(KeyedSampler(100, seed=2)) != [index for index, _, _ in first]


def test_each_position_has_its_own_key():
    sampler = KeyedSampler(1000, seed=3)
    sampler.set_epoch(7)
    assert [key for _, _, key in sampler] == [reference_key(3, "view", 7, position) for position in range(1000)]


def test_the_shuffle_is_fair():
    # 2,000 epochs of 6 images: each image comes first in a sixth of them (standard deviation 17).
    sampler, first = KeyedSampler(6), np.zeros(6)
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        first[next(iter(sampler))[0]] += 1
    assert np.abs(first - 2000 / 6).max() < 5 * 17


@pytest.mark.parametrize("start", [0, 5, 29])
def test_a_sampler_prepares_its_samples_in_pieces(start, monkeypatch):
    def samples():
        sampler = KeyedSampler(100, seed=3, rank=1, world_size=3, multiple=6)
        sampler.set_epoch(2, start)
        return list(sampler)

    whole = samples()
    monkeypatch.setattr("samplers.CHUNK", 7)
    assert samples() == whole and len(whole) == 32 - start


def test_samples_are_plain_integers_that_processes_can_exchange():
    assert all(type(value) is int for sample in KeyedSampler(3) for value in sample)


# -- repeated augmentation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 7, 100, 255, 256, 769])
def test_repeated_augmentation_draws_each_image_several_times_in_a_row(length, repeats):
    sampler = KeyedSampler(length, repeats=repeats)
    order = order_of(sampler)
    assert len(order) == len(sampler) == length
    runs = [order[start : start + repeats] for start in range(0, length, repeats)]
    assert all(len(set(run)) == 1 for run in runs)
    drawn = [run[0] for run in runs]
    assert len(set(drawn)) == len(drawn) == sampler.num_drawn == -(-length // repeats)


def test_the_views_of_one_image_have_different_keys():
    keys = [key for _, _, key in KeyedSampler(30, repeats=3)]
    assert len(set(keys)) == 30


def test_all_images_are_drawn_in_the_course_of_the_epochs():
    sampler, seen = KeyedSampler(50, repeats=3), set()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        seen.update(order_of(sampler))
    assert seen == set(range(50))


# -- balanced classes --------------------------------------------------------------------------------------------------

COUNTS = [1, 5, 40, 3]  # of four classes


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("multiple", [1, 16])
def test_balanced_epochs_hold_equally_many_of_each_class(repeats, multiple):
    classes = np.random.default_rng(0).permutation(np.repeat(range(4), COUNTS))
    sampler = KeyedSampler(len(classes), repeats=repeats, classes=classes, multiple=multiple)
    seen, fewest = set(), set()
    for epoch in range(150):
        sampler.set_epoch(epoch)
        drawn = order_of(sampler)[::repeats]
        counts = np.bincount(classes[drawn], minlength=4)
        assert len(drawn) == sampler.num_drawn
        fewest.add(counts.argmin())
        if multiple == 1:  # else the order is cut after it is drawn
            assert counts.max() - counts.min() <= 1
            for label in range(4):  # none a third time before all came twice
                times = np.bincount(drawn, minlength=len(classes))[classes == label]
                assert times.max() - times.min() <= 1
        seen.update(drawn)
        assert order_of(sampler) == order_of(sampler)
    assert seen == set(range(len(classes)))
    assert len(fewest) > 1 or sampler.num_drawn % 4 == 0  # no class is always the one with fewer


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_balanced_epoch_does_not_depend_on_the_batch_size(repeats):
    classes = np.repeat(range(4), COUNTS)
    orders = [order_of(KeyedSampler(49, repeats=repeats, classes=classes, multiple=n, seed=3)) for n in (1, 5, 16, 32)]
    assert [len(order) for order in orders] == [49, 45, 48, 32]
    assert all(order == orders[0][: len(order)] for order in orders)


def test_balanced_classes_without_samples_are_left_alone():
    assert sorted(order_of(KeyedSampler(4, classes=np.array([7, 2, 2, 2])))).count(0) == 2


def test_ranks_share_a_balanced_epoch():
    classes = np.array([0] * 9 + [1] * 3)
    shares = [list(KeyedSampler(12, classes=classes, rank=rank, world_size=2)) for rank in (0, 1)]
    whole = list(KeyedSampler(12, classes=classes))
    assert sorted(shares[0] + shares[1], key=lambda sample: sample[1]) == whole


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("length", [5, 64, 301])
def test_the_ranks_together_hold_the_single_process_order(length, world_size, repeats):
    def share(rank, size):
        sampler = KeyedSampler(length, seed=4, repeats=repeats, rank=rank, world_size=size)
        sampler.set_epoch(2)
        samples = list(sampler)
        assert len(samples) == len(sampler)
        return samples

    together = sorted((s for rank in range(world_size) for s in share(rank, world_size)), key=lambda s: s[1])
    assert together == share(0, 1)


def test_a_global_batch_holds_the_same_views_for_every_number_of_ranks():
    def batches(world_size, accum_steps=1, global_batch=16):
        per_rank = global_batch // world_size // accum_steps
        ranks = [
            list(KeyedSampler(100, repeats=3, rank=rank, world_size=world_size, multiple=global_batch))
            for rank in range(world_size)
        ]
        steps = [
            {sample for rank in ranks for sample in rank[start : start + per_rank]}
            for start in range(0, len(ranks[0]), per_rank)
        ]
        return [set().union(*steps[i : i + accum_steps]) for i in range(0, len(steps), accum_steps)]

    single = batches(1)
    assert len(single) == 6 and all(len(batch) == 16 for batch in single)
    assert [{position for _, position, _ in batch} for batch in single][1] == set(range(16, 32))
    for world_size, accum_steps in ((2, 1), (4, 1), (1, 2), (2, 4)):
        assert batches(world_size, accum_steps) == single


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 50])
def test_evaluation_pads_nothing(length, world_size):
    shares = [order_of(KeyedSampler(length, shuffle=False, rank=r, world_size=world_size)) for r in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(length))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_without_shuffling_the_order_is_the_data_s():
    sampler = KeyedSampler(10, shuffle=False)
    sampler.set_epoch(5)
    assert order_of(sampler) == list(range(10))


@pytest.mark.parametrize("length, multiple, expected", [(100, 16, 96), (96, 16, 96), (95, 16, 80), (15, 16, 0)])
def test_the_order_is_cut_to_whole_updates(length, multiple, expected):
    for world_size in (1, 2, 4):
        ranks = [KeyedSampler(length, rank=r, world_size=world_size, multiple=multiple) for r in range(world_size)]
        assert [len(list(rank)) for rank in ranks] == [expected // world_size] * world_size


def test_cutting_takes_nothing_but_the_end():
    assert list(KeyedSampler(100, multiple=16)) == list(KeyedSampler(100))[:96]


def test_every_image_has_its_turn_when_the_order_is_cut():
    sampler, seen = KeyedSampler(20, multiple=16), set()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        seen.update(order_of(sampler))
    assert seen == set(range(20))
