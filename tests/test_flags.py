"""Flags: parsing and checks, the table of what they affect, and the option classes."""

import dataclasses
import re
import shlex

import pytest
import timm.optim
import tiny
import torch

import augment
import checkpoints
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


@pytest.mark.parametrize(
    "recipe, typed, expected",
    [
        ("--pretrained\n--epochs 3", ["--finetune", "x.pth"], (False, "x.pth")),
        ("--pretrained", ["--finetune=x.pth"], (False, "x.pth")),
        ("--finetune x.pth\n--epochs 3", ["--pretrained"], (True, "")),
        ("--finetune=x.pth --epochs 3", ["--pretrained"], (True, "")),
        ("--pretrained", [], (True, "")),
        ("--pretrained", ["--no-pretrained", "--finetune", "x.pth"], (False, "x.pth")),
    ],
)
def test_typed_weights_replace_those_of_a_recipe(recipe, typed, expected, tmp_path):
    (tmp_path / "inner.args").write_text(recipe)
    (tmp_path / "x.args").write_text(f"--epochs 3\n@{tmp_path}/inner.args")
    for words in ([f"@{tmp_path}/x.args", *typed], [*typed, f"@{tmp_path}/x.args"]):
        args = parse_args(words)
        assert (args.pretrained, args.finetune, args.epochs) == (*expected, 3)


def test_a_replaced_switch_keeps_the_recipe_after_it(tmp_path):
    (tmp_path / "inner.args").write_text("--epochs 3")
    (tmp_path / "x.args").write_text(f"--pretrained\n@{tmp_path}/inner.args")
    args = parse_args([f"@{tmp_path}/x.args", "--finetune", "x.pth"])
    assert (args.pretrained, args.finetune, args.epochs) == (False, "x.pth", 3)


@pytest.mark.parametrize(
    "line, folder",
    [
        ("--output-dir run#2", "run#2"),
        ("--output-dir 'a # b' # c", "a # b"),
        ("# it's a comment", "output"),
        ("--output-dir '#1'", "#1"),
        ("--output-dir a#sha256=0 #it's", "a#sha256=0"),
        (r"  --output-dir=a\ b\#c", "a b#c"),
        ("--output-dir ''#", "#"),
    ],
)
def test_a_recipe_is_split_into_words_like_a_shell_does(line, folder, tmp_path):
    (tmp_path / "x.args").write_text(line)
    assert parse_args([f"@{tmp_path}/x.args"]).output_dir == folder


def test_typed_teacher_weights_replace_those_of_a_recipe(tmp_path):
    (tmp_path / "x.args").write_text("--teacher-pretrained\n--distillation-type hard")
    args = parse_args([f"@{tmp_path}/x.args", "--teacher_path", "t.pth"])
    assert (args.teacher_pretrained, args.teacher_path, args.distillation_type) == (False, "t.pth", "hard")


def test_two_typed_weights_are_refused(capsys):
    assert "pass one of them" in refused([*tiny.TINY, "--pretrained", "--finetune", "x.pth"], capsys)


@pytest.mark.parametrize(
    "typo, hint",
    [
        ("--overwit", ""),
        ("--overwritee", ""),
        ("--use-lmdb", ""),
        ("--epoch", "--epochs"),
        ("--weight-decy", "--weight-decay"),
        ("--repeated-aug--bce-loss", "--repeated-aug --bce-loss"),  # in a command of DeiT III
        ("-b", "--batch-size"),  # this and the next: flags of timm's train.py
        ("--img-size", "--input-size"),
        ("--crop_pct=0.9", "--eval-crop-ratio"),
        ("--grad-accum-steps", "--accum-steps"),
        ("--workers", "--num-workers"),
        ("--checkpoint-hist", ""),
        ("--drop-block", ""),
        ("--opt-kwargs", ""),
    ],
)
def test_suggestions_are_close_and_never_delete_a_run(typo, hint, capsys):
    said = refused([*tiny.TINY, typo], capsys)
    assert (f"did you mean {hint}?" in said) if hint else ("did you mean" not in said)


def test_help_opens_with_commands_and_names_no_empty_default(capsys):
    with pytest.raises(SystemExit):
        main.cli(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: main.py [@RECIPE] [flags]\n") and len(said.split("options:")[0].splitlines()) <= 11
    for words in re.findall(r"python main.py (.*)", said.split("options:")[0]):
        known = [word for word in shlex.split(words) if word != "FLAGS"]
        parse_args([f"@{tiny.REPOSITORY / word[1:]}" if word.startswith("@") else word for word in known])
    assert not re.search(r"default: (None|True|False|\{|''|;|$)", " ".join(said.split()))


def test_flags_of_timm_are_unknown_here_and_their_hints_known():
    known = flags.get_parser()._option_string_actions.keys()
    assert not known & flags.OF_TIMM.keys() and known > set(flags.OF_TIMM.values()) - {""}


# -- checking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--base-keep-rate=0.5", "--drop-loc=1", "--no-fuse-token", "--shrink-epochs=3"])
def test_flags_of_evit_with_another_model_are_a_one_line_error(flag, capsys):
    assert "has no EViT blocks; use a model such as evit_small" in refused([*tiny.TINY, flag], capsys)


RUN = [*tiny.TINY, "--epochs", "2", "--teacher-model", "test_resnet", "--output-dir", ""]
HARD = [*RUN, "--distillation-type", "hard"]
CACHED = [*HARD, "--teacher-cache", "cache"]
PRECOMPUTED = [*CACHED, "--precompute-teacher"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ([*RUN, "--teacher-cache", "cache"], "--teacher-cache: there is no distillation; add --distillation-type hard"),
        ([*RUN, "--teacher-path", "x.pth"], "--teacher-path: there is no distillation; add --distillation-type hard"),
        ([*RUN, "--teacher-pretrained"], "--teacher-pretrained: there is no distillation; add --distillation-type"),
        ([*RUN, "--distill-on-class-token"], "--distill-on-class-token: there is no distillation; add --dist"),
        (
            [*HARD, "--precompute-teacher"],
            "--precompute-teacher: there is no folder for the predictions; add --teacher",
        ),
        ([*HARD, "--precompute-epochs", "0:1"], "--precompute-epochs: there is no folder for the predictions; add"),
        ([*HARD, "--precompute-batch-size", "64"], "--precompute-batch-size: there is no folder for the predictions"),
        (
            [*CACHED, "--precompute-epochs", "0:1"],
            "--precompute-epochs: nothing is precomputed; add --precompute-teacher",
        ),
        (
            [*CACHED, "--precompute-batch-size", "64"],
            "--precompute-batch-size: nothing is precomputed; add --precompute",
        ),
        (
            [*PRECOMPUTED, "--eval", "--pretrained"],
            "--precompute-teacher: --eval only evaluates; drop one of them",
        ),
        ([*CACHED, "--precompute-epochs", "3:3"], "holds no epochs"),
        ([*CACHED, "--precompute-epochs", "0-3"], "argument --precompute-epochs: '0-3' is not FROM:TO, such as 0:30"),
        ([*CACHED, "--precompute-epochs", ":3"], "argument --precompute-epochs: ':3' is not FROM:TO, such as 0:30"),
        ([*PRECOMPUTED, "--precompute-epochs", "0:3"], "end with :2"),
        ([*PRECOMPUTED, "--precompute-epochs", "0:2", "--augmentation-epochs", "1"], "end with :1"),
    ],
)
def test_flags_of_a_cached_teacher_that_do_not_fit_are_a_one_line_error(words, remedy, capsys):
    assert remedy in refused(words, capsys)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (tiny.ONE_VIEW[:-1], "add --no-repeated-aug"),
        (tiny.ONE_VIEW[2:], "add --aa none"),
        ([*tiny.ONE_VIEW, "--train-scope", "all"], "needs --train-scope head"),
        ([*tiny.ONE_VIEW, "--cutmix-minmax", "0.1", "0.2"], "no --cutmix-minmax"),
    ],
)
def test_flags_of_cached_features_that_do_not_fit_are_a_one_line_error(words, remedy, capsys):
    assert remedy in refused([*tiny.HEAD, *words, "--output-dir", ""], capsys)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--cosub", "--distillation-type", "hard"], "--cosub: cannot be combined with a teacher"),
        (["--src", "--input-size", "32", "48"], "--input-size 32 48: --src crops squares above 8 px"),
        (["--src", "--input-size", "8"], "--input-size 8: --src crops squares above 8 px"),
        ([*tiny.HEAD, *tiny.ONE_VIEW, "--src"], "add --no-src"),
        ([*tiny.HEAD, *tiny.ONE_VIEW, "--cosub"], "add --no-cosub"),
        (["--layer-decay", "0"], "0 is not above 0 and at most 1"),
        (["--layer-decay", "1.5"], "1.5 is not above 0 and at most 1"),
    ],
)
def test_flags_of_deit3_that_do_not_fit_are_a_one_line_error(words, remedy, capsys):
    assert remedy in refused([*tiny.TINY, *words, "--output-dir", ""], capsys)


def test_one_view_flags_satisfy_the_check():
    flags.check_flags(parse_args([*tiny.HEAD, *tiny.ONE_VIEW]))


# -- flags that do not act --------------------------------------------------------------------------------------------


WITHOUT_EFFECT = {
    "--mixup 0 --cutmix 0 --mixup-prob 0.5 --mixup-mode elem": ["--mixup-prob", "--mixup-mode"],
    "--mixup 0 --mixup-prob 0.5 --mixup-mode elem": [],
    "--mixup 0 --mixup-switch-prob 0.1": ["--mixup-switch-prob"],
    "--cutmix 0.5 --cutmix-minmax 0.1 0.2": ["--cutmix"],
    "--reprob 0 --remode const --recount 2": ["--remode", "--recount"],
    "--color-jitter 0.4": ["--color-jitter"],
    "--color-jitter 0.4 --ThreeAugment": [],
    "--input-size 32 --train-interpolation random --eval-crop-ratio 1": ["--train-interpolation", "--eval-crop-ratio"],
    "--input-size 32 --train-interpolation bilinear": [],
    "--src --train-interpolation random": ["--train-interpolation"],
    "--cosub --drop-path 0": ["--cosub"],
    "--cosub --no-train-mode": ["--cosub"],
    "--cosub --train-scope head": ["--cosub"],
    "--drop-path 0.2 --train-scope head": ["--drop-path"],
    "--drop-path 0.2 --drop 0.1 --no-train-mode": ["--drop-path", "--drop"],
    "--drop-path 0.2 --drop 0.1 --train-scope attn": [],
    "--cosub --layer-decay 0.7": [],
    "--layer-decay 0.7 --train-scope head": ["--layer-decay"],
    "--data-set CIFAR --train-split a --val-split b --inat-category genus": ["--inat-category"],
    "--eval --inat-category genus --momentum 0.8 --reprob 0 --remode const": ["--inat-category"],
    "--data-set DIGITS --data-path a": ["--data-path"],
    "--no-model-ema --model-ema-decay 0.9 --model-ema-warmup": ["--model-ema-decay", "--model-ema-warmup"],
    "--sched step --min-lr 0 --warmup-epochs 0 --warmup-lr 0": ["--min-lr", "--warmup-lr"],
    "--decay-rate 0.5 --decay-epochs 10 --poly-power 2": ["--decay-epochs", "--decay-rate", "--poly-power"],
    "--lr-noise-pct 0.5 --lr-noise-std 2": ["--lr-noise-pct", "--lr-noise-std"],
    "--lr-noise 0.1 --lr-noise-pct 0.5 --lr-noise-std 2": [],
    "--opt sgd --opt-betas 0.8 0.9 --opt-eps 1e-6 --momentum 0.8": ["--opt-betas", "--opt-eps"],
    "--opt-betas 0.8 0.9 --opt-eps 1e-6 --momentum 0.8": ["--momentum"],
    "--opt lookahead_lion --opt-eps 1e-6": ["--opt-eps"],
    "--opt '' --momentum 0.8": [],  # which is refused later
    "--teacher-model resnet18 --distillation-alpha 0.1": ["--teacher-model", "--distillation-alpha"],
    "--distillation-type hard --teacher-model resnet18 --distillation-tau 3": ["--distillation-tau"],
    "--distillation-type soft --distillation-scale legacy --teacher-cache-topk 9": ["--teacher-cache-topk"],
    "--distillation-type soft --teacher-cache-topk 9 --teacher-cache a": [],
    "--distillation-type hard --teacher-cache-topk 9 --teacher-cache a": ["--teacher-cache-topk"],
    "--cooldown-epochs 3 --patience-epochs 3 --world-size 8 --dist-eval": [],  # their help says so
}


@pytest.mark.parametrize("words", WITHOUT_EFFECT)
def test_flags_without_effect_are_named(words):
    sentences = flags.without_effect(parse_args(shlex.split(words)))
    assert [sentence.split()[0] for sentence in sentences] == WITHOUT_EFFECT[words]
    assert all("has no effect: it needs" in sentence for sentence in sentences)


def test_a_run_names_its_flags_without_effect_in_a_warning(tmp_path, capsys):
    words = [*tiny.TINY, "--train-fraction", "0.1", "--momentum", "0.8", "--output-dir", str(tmp_path)]
    main.cli(words)
    assert " --momentum has no effect: it needs another --opt\n" in capsys.readouterr().err
    main.cli(["--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--momentum", "0.8"])
    assert "no effect" not in capsys.readouterr().err  # nothing of training has one
    main.cli(["--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--inat-category", "genus"])
    assert "--inat-category has no effect" in capsys.readouterr().err
    assert "no named splits" in refused(
        ["--eval", "--resume", tmp_path / "checkpoint.pth", "--val-split", "test"], capsys
    )


@pytest.mark.parametrize("option", ["momentum", "betas", "eps"])
def test_an_optimizer_takes_what_the_table_says(option):
    weight = torch.nn.Linear(2, 2)
    flag = {"momentum": "momentum"}.get(option, f"opt_{option}")
    (acts,) = [acts for names, acts, _ in flags.ACTS_IF if flag in names.split()]
    for name in timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*", "adahessian"]):
        betas = (0.8, 0.85, 0.95)[: timm.optim.get_optimizer_info(name).num_betas]
        changed = {"momentum": 0.7, "betas": betas, "eps": 1e-5}[option]
        groups = [
            engine.build_optimizer(weight, name, lr=1.0, **options).param_groups[0]
            for options in ({"momentum": 0.9, "eps": 1e-8}, {"momentum": 0.9, "eps": 1e-8, option: changed})
        ]
        differing = {key for key in groups[0] if key != "params" and groups[0][key] != groups[1][key]}
        assert bool(differing) is acts(parse_args(["--opt", name])), (name, differing)


@pytest.mark.parametrize("sched", flags.SCHEDULES)
@pytest.mark.parametrize("words", ["--min-lr 1e-2", "--decay-epochs 3", "--decay-rate 0.7", "--poly-power 2"])
def test_a_schedule_takes_what_the_table_says(sched, words):
    rates = []
    for changed in ([], words.split()):
        milestones = ["--decay-milestones", "4"] if sched == "multistep" else []
        args = parse_args(["--sched", sched, "--epochs", "9", "--decay-epochs", "4", *milestones, *changed])
        model = torch.nn.Linear(2, 2)
        state = engine.TrainState(model, model, torch.optim.SGD(model.parameters(), lr=1.0))
        (schedule,) = engine.build_schedules(state, 5, flags.fill(engine.ScheduleOptions, args))
        rates.append([schedule.step_update(update) or schedule.value for update in range(45)])
    acts = words.split()[0][2:].replace("-", "_") in flags.SCHEDULES[sched]
    assert (rates[0] != rates[1]) is acts


def test_flags_that_do_not_always_act_are_flags_of_training():
    names = {name for names, _, _ in flags.ACTS_IF for name in names.split()}
    assert names <= set(NAMES) - {*flags.SHAPES["original"]}


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


@pytest.mark.parametrize(
    ("then", "now", "changed"),
    [
        ("", "--base-keep-rate 0.7 --drop-loc 3,6,9 --fuse-token", []),
        ("--base-keep-rate 0.5", "--model-kwargs keep_rate=0.5 drop_path_rate=0.2", []),
        ("--input-size 224", "--input-size 224 224 --model evit_small_patch16_224.fb_in1k", []),
        ("--model deit_small_patch16_224_shrink05", "--base-keep-rate 0.5", []),
        ("--data-path a --epochs 3 --mixup 0", "--data-path b", []),
        ("--patch-size 16", "", []),
        ("", "--base-keep-rate 0.5", ["--base-keep-rate"]),
        ("--model deit_small_patch16_224_shrink05", "", ["--base-keep-rate"]),
        ("--model deit_small_patch16_224", "", ["--model", "--base-keep-rate"]),
        ("", "--drop-loc 1 --no-fuse-token --input-size 256", ["--drop-loc", "--fuse-token", "--input-size"]),
        ("--eval-crop-ratio 1", "--data-set csv/a.csv", ["--data-set", "--eval-crop-ratio"]),
        ("--val-fraction 0.1 --upright", "", ["--val-fraction", "--upright"]),
        ("--model-kwargs num_heads=3", "", ["--model-kwargs"]),
    ],
)
def test_flags_that_change_what_an_accuracy_measures_are_named(then, now, changed):
    trained, args = (parse_args(["--model", "evit_small_patch16_224", *words.split()]) for words in (then, now))
    assert set(flags.measured_otherwise(args, checkpoints.as_json(vars(trained)))) == set(changed)


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


def test_other_data_are_seen_as_those_of_the_checkpoint():
    saved = {"data_set": "IMNET", "data_path": "a", "val_fraction": 0.2, "upright": True, "eval_crop_ratio": 0.9}
    args = flags.parse_trained(flags.get_parser(), ["--data-set", "csv/x.csv"], {"args": saved}, "x")
    assert (args.data_path, args.val_fraction, args.upright, args.eval_crop_ratio) == (None, 0.0, True, 0.9)
