"""Flags: how they are parsed and checked, the table of what they shape, and the option classes that they fill."""

import dataclasses

import pytest
import tiny

import augment
import datasets
import engine
import flags
import loaders
import losses
import main
import models
import teachers
from flags import parse_args

NAMES = vars(parse_args([])).keys()
KINDS = [
    augment.ViewOptions,
    datasets.DataOptions,
    loaders.LoaderOptions,
    loaders.MixupOptions,
    models.ModelOptions,
    teachers.TeacherOptions,
    losses.LossOptions,
    engine.OptimizerOptions,
    engine.ScheduleOptions,
    engine.RunOptions,
]


def refused(words, capsys):
    """The last line of a run that ends with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        main.cli([str(word) for word in words])
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# -- parsing -----------------------------------------------------------------------------------------------------------


def test_three_augment_has_its_published_spelling():
    assert parse_args(["--ThreeAugment"]) == parse_args(["--aa", "3a"])


@pytest.mark.parametrize("spelling", ["3,6,9", "(3, 6, 9)", "[3,6,9]"])
def test_layers_are_read_in_every_spelling(spelling):
    assert parse_args(["--drop_loc", spelling]).drop_loc == [3, 6, 9]


def test_keep_rates_are_read_one_or_per_layer():
    assert parse_args(["--base_keep_rate", "0.5"]).base_keep_rate == 0.5
    assert parse_args(["--base-keep-rate", "0.7,0.7,0.5"]).base_keep_rate == [0.7, 0.7, 0.5]


# -- checking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--base-keep-rate=0.5", "--drop-loc=1", "--no-fuse-token", "--shrink-epochs=3"])
def test_flags_of_evit_with_another_model_are_a_line(flag, capsys):
    assert "has no EViT blocks; use a model such as evit_small" in refused([*tiny.TINY, flag], capsys)


RUN = [*tiny.TINY, "--epochs", "2", "--teacher-model", "test_resnet", "--output-dir", ""]
HARD = [*RUN, "--distillation-type", "hard"]
CACHED = [*HARD, "--teacher-cache", "cache"]
PRECOMPUTED = [*CACHED, "--precompute-teacher"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ([*RUN, "--teacher-cache", "cache"], "add --distillation-type hard"),
        ([*HARD, "--precompute-teacher"], "add --teacher-cache FOLDER"),
        ([*CACHED, "--precompute-epochs", "0:1"], "add --precompute-teacher"),
        ([*CACHED, "--precompute-batch-size", "64"], "add --precompute-teacher"),
        ([*CACHED, "--precompute-epochs", "3:3"], "holds no epochs"),
        ([*PRECOMPUTED, "--precompute-epochs", "0:3"], "end with :2"),
        ([*PRECOMPUTED, "--precompute-epochs", "0:2", "--augmentation-epochs", "1"], "end with :1"),
    ],
)
def test_flags_of_a_cached_teacher_that_do_not_fit_are_a_line(words, remedy, capsys):
    assert remedy in refused(words, capsys)


HEAD = ["--model", "test_resnet", *tiny.DATA, "--input-size", "32", "--train-scope", "head", "--cache-features"]
ONE_VIEW = ["--aa", "none", "--color-jitter", "0", "--hflip", "0", "--reprob", "0", "--mixup", "0", "--cutmix", "0"]
ONE_VIEW += ["--drop-path", "0", "--no-repeated-aug"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (ONE_VIEW[:-1], "add --no-repeated-aug"),
        (ONE_VIEW[2:], "add --aa none"),
        ([*ONE_VIEW, "--train-scope", "all"], "needs --train-scope head"),
        ([*ONE_VIEW, "--cutmix-minmax", "0.1", "0.2"], "no --cutmix-minmax"),
    ],
)
def test_flags_of_cached_features_that_do_not_fit_are_a_line(words, remedy, capsys):
    assert remedy in refused([*HEAD, *words, "--output-dir", ""], capsys)


def test_one_view_flags_satisfy_the_check():
    flags.check_flags(parse_args([*HEAD, *ONE_VIEW]))


# -- the table of what flags shape -------------------------------------------------------------------------------------


def test_shapes_names_every_flag_and_no_other():
    assert {name for row in flags.SHAPES.values() for name in row} == set(NAMES)


def test_shapes_names_no_flag_twice_in_a_row():
    assert all(len(set(row)) == len(row) for row in flags.SHAPES.values())


def test_free_flags_shape_nothing_else_but_the_data_path():
    free = {*flags.SHAPES["nothing"], *flags.SHAPES["original"]}
    others = {name for kind, row in flags.SHAPES.items() if kind not in ("nothing", "original") for name in row}
    assert free & others == {"data_path"}
    assert not set(flags.SHAPES["nothing"]) & set(flags.SHAPES["original"])
    assert free == flags.FREE_ON_RESUME


def test_one_view_names_flags():
    assert flags.ONE_VIEW.keys() <= NAMES


# -- option classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_option_class_has_the_defaults_of_the_flags(kind):
    assert flags.fill(kind, parse_args([])) == kind()


@pytest.mark.parametrize("kind", KINDS)
def test_option_class_is_frozen_and_its_fields_are_flags(kind):
    options, names = kind(), [field.name for field in dataclasses.fields(kind)]
    assert set(names) <= NAMES
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, names[0], None)


@pytest.mark.parametrize(("words", "size"), [(["32"], (32, 32)), (["32", "48"], (32, 48))])
@pytest.mark.parametrize("kind", [augment.ViewOptions, models.ModelOptions, teachers.TeacherOptions])
def test_input_size_fills_height_and_width(kind, words, size):
    assert flags.fill(kind, parse_args(["--input-size", *words])).input_size == size
