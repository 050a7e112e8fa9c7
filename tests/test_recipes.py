"""Recipes, and how flags are read: published spellings, published defaults, comments, quotes, literals."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import timm
import tiny
import torch
from timm.utils import ModelEmaV3

import datasets
import engine
import run_with_submitit
from flags import check_flags, fill, get_parser, parse_args, without_effect
from tools.runs import read_run
from tools.summarize import summarize_run
from utils import read_log

RECIPES = sorted((tiny.REPOSITORY / "recipes").glob("*.args"))
# facebookresearch/deit main.py; `--color-jitter` is 0.3 in its last version
PUBLISHED_DEFAULTS = {
    "batch_size": 64,
    "epochs": 300,
    "bce_loss": False,
    "model": "deit_base_patch16_224",
    "input_size": [224],
    "drop": 0.0,
    "drop_path": 0.1,
    "model_ema": True,
    "model_ema_decay": 0.99996,
    "model_ema_force_cpu": False,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": None,
    "clip_grad": None,
    "momentum": 0.9,
    "weight_decay": 0.05,
    "sched": "cosine",
    "lr": 5e-4,
    "lr_noise": None,
    "lr_noise_pct": 0.67,
    "lr_noise_std": 1.0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "decay_epochs": 30,
    "warmup_epochs": 5,
    "cooldown_epochs": 10,
    "patience_epochs": 10,
    "decay_rate": 0.1,
    "color_jitter": 0.3,
    "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1,
    "train_interpolation": "bicubic",
    "repeated_aug": True,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_minmax": None,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "teacher_model": "regnety_160",
    "teacher_path": "",
    "distillation_type": "none",
    "distillation_alpha": 0.5,
    "distillation_tau": 1.0,
    "finetune": "",
    "cosub": False,
    "src": False,
    "data_set": "IMNET",
    "inat_category": "name",
    "seed": 0,
    "resume": "",
    "eval": False,
    "eval_crop_ratio": 0.875,
    "pin_mem": True,
}


def parse(*words):
    return parse_args([str(word) for word in words])


def header(recipe):
    """The comment at the top of a recipe, with continued lines joined."""
    lines = recipe.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return re.sub(r" \\\n +", " ", "\n".join(line[1:] for line in lines[:end]))


def commands(recipe):
    """The commands in a recipe's header that run this very recipe, as words."""
    found = re.findall(r"^ +((?:python|torchrun) .*)$", header(recipe), flags=re.MULTILINE)
    return [shlex.split(command) for command in found if f"@recipes/{recipe.name}" in command.split()]


def processes(words):
    """Return the number of processes that a command starts."""
    flags = ("--nproc-per-node", "--nodes", "--ngpus")
    return math.prod(int(words[words.index(flag) + 1]) for flag in flags if flag in words)


def test_there_are_recipes():
    assert len(RECIPES) >= 15


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
class TestRecipe:
    def test_parses_and_its_flags_agree(self, recipe):
        args = parse(f"@{recipe}")
        check_flags(args)
        assert without_effect(args) == []
        assert args.data_set in datasets.NAMES
        assert args.output_dir == f"output/{recipe.stem}"

    def test_models_are_timm_models(self, recipe):
        args = parse(f"@{recipe}")
        for name in (args.model, args.teacher_model):
            assert timm.is_model(name.split(".")[0]), name
            assert timm.get_pretrained_cfg(name) is not None, name  # a tag that there is

    def test_header_names_the_command_and_the_measurement(self, recipe):
        assert commands(recipe), f"no command with @recipes/{recipe.name}"
        assert len(re.findall(r"^ Measured: \S", header(recipe), flags=re.MULTILINE)) == 1

    def test_commands_in_the_header_parse(self, recipe, monkeypatch):
        monkeypatch.chdir(tiny.REPOSITORY)
        for words in commands(recipe):
            script = next(word for word in words if word.endswith(".py"))
            parser = {"main.py": get_parser, "run_with_submitit.py": run_with_submitit.get_parser}[script]()
            args = parser.parse_args(words[words.index(script) + 1 :])
            check_flags(args)
            if args.data_set in ("IMNET", "INAT", "INAT19", "CARS"):
                assert args.data_path, "data that are not downloaded need a folder"
            if recipe.stem.endswith("_imagenet"):
                batch = 2048 if recipe.stem.startswith("evit") else 1024
                assert args.batch_size * args.accum_steps * processes(words) == batch
                assert f"= {batch}" in header(recipe)
                assert fill(engine.OptimizerOptions, args).scaled_lr(batch) == 5e-4 * batch / 512


def test_recipes_of_deit_and_evit_fine_tune_without_stochastic_depth():
    # the original implementations fine-tune in eval mode
    tuned = [recipe for recipe in RECIPES if re.search("finetune", recipe.stem) and parse(f"@{recipe}").pretrained]
    assert len(tuned) >= 8 and {parse(f"@{recipe}").drop_path for recipe in tuned} == {0}


def test_recipes_of_evit_state_what_its_scripts_state():
    for recipe in RECIPES:
        args = parse(f"@{recipe}")
        assert (args.fuse_token is True) is ("evit" in recipe.stem)


IMAGES = {"IMNET": 1281167, "INAT": 437513, "INAT19": 265213, "CIFAR10": 50000, "CIFAR100": 50000}
IMAGES |= {"CARS": 8144, "FLOWERS": 2040, "DIGITS": 1442}  # of the training parts


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_no_pointless_run(recipe, monkeypatch, caplog):
    monkeypatch.chdir(tiny.REPOSITORY)
    monkeypatch.setattr(engine.logger, "propagate", True)
    narrow = {"img_size": 32, "embed_dim": 48, "num_heads": 3}
    for words in commands(recipe):
        args = parse_args(words[words.index(f"@recipes/{recipe.name}") :])
        batch = args.batch_size * args.accum_steps * processes(words)
        is_evit = args.model.startswith("evit")
        model = timm.create_model("evit_tiny_patch16_224", **narrow) if is_evit else timm.create_model("test_vit")
        optimizer = torch.optim.SGD(model.parameters(), lr=fill(engine.OptimizerOptions, args).scaled_lr(batch))
        ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        state = engine.TrainState(model, model, optimizer, ema=ema)
        engine.build_schedules(state, IMAGES[args.data_set] // batch, fill(engine.ScheduleOptions, args))
    assert caplog.text == ""


def test_a_teacher_recipe_writes_what_its_student_reads():
    for recipe in RECIPES:
        path = parse(f"@{recipe}").teacher_path
        if path.startswith("output/"):
            teacher = recipe.parent / f"{path.split('/')[1]}.args"
            assert teacher in RECIPES
            assert parse(f"@{teacher}").output_dir == path.removesuffix("/best.pth")
            assert parse(f"@{teacher}").data_set == parse(f"@{recipe}").data_set
            assert f"recipes/{teacher.name}" in header(recipe)


# -- docs/results.md ---------------------------------------------------------------------------------------------------


def stated(what, recipe):
    """The top-1 accuracy that the header of a recipe states as `Published` or `Measured`, or None."""
    found = re.search(rf"^ {what}: ([\d.]+) % top-1", header(recipe), flags=re.MULTILINE)
    return found and found[1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_results_have_a_row_that_agrees_with_the_header(recipe):
    page = (tiny.REPOSITORY / "docs" / "results.md").read_text()
    (row,) = re.findall(rf"^\| `{recipe.stem}` \|(.*)\|$", page, flags=re.MULTILINE)
    _, _, published, ours, _ = (cell.strip() for cell in row.split("|"))
    assert published.split()[0] == (stated("Published", recipe) or "not")
    assert ours.split()[0] == (stated("Measured", recipe) or "not")
    assert published[0].isdigit() or published == "not published"
    assert ours[0].isdigit() or ours == "not measured"


def test_results_have_no_row_without_a_recipe():
    page = (tiny.REPOSITORY / "docs" / "results.md").read_text()
    names = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert sorted(names) == [recipe.stem for recipe in RECIPES]


# -- reading a recipe --------------------------------------------------------------------------------------------------


def test_comments_quotes_and_spellings_in_a_recipe(tmp_path):
    recipe = tmp_path / "a recipe.args"
    recipe.write_text(
        "# it's a comment with an apostrophe and --lr 3\n"
        "\n"
        "--output-dir 'a folder/with # and \"quotes\"'  # a comment after a flag\n"
        "--batch_size 32 --lr=1e-3\n"
        "   --opt-betas 0.8 0.9\n"
        "--model-kwargs embed_dim=48 'act_layer=a b'\n"
        "--no-model-ema"  # no newline at the end
    )
    args = parse(f"@{recipe}")
    assert args.output_dir == 'a folder/with # and "quotes"'
    assert (args.batch_size, args.lr, args.opt_betas) == (32, 1e-3, [0.8, 0.9])
    assert args.model_kwargs == {"embed_dim": 48, "act_layer": "a b"}
    assert args.model_ema is False


def test_flags_after_a_recipe_win_over_it(tmp_path):
    first, second = tmp_path / "first.args", tmp_path / "second.args"
    first.write_text("--lr 1 --epochs 10\n--no-repeated-aug\n--model-kwargs depth=1 num_heads=3\n")
    second.write_text("--lr 2\n")
    assert parse(f"@{first}", "--lr", "3").lr == 3
    assert parse("--lr", "3", f"@{first}").lr == 1
    both = parse(f"@{first}", f"@{second}", "--repeated-aug", "--model-kwargs", "depth=2")
    assert (both.lr, both.epochs, both.repeated_aug) == (2, 10, True)
    assert both.model_kwargs == {"depth": 2}  # replaced, not merged


# -- published command lines -------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones():
    args = vars(parse())
    assert {name: args[name] for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS
    assert args["lr_scaling"] == "linear" and args["train_scope"] == "all"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--data_path /a_b/c_d", {"data_path": "/a_b/c_d"}),
        ("--data_path=/a_b/c_d", {"data_path": "/a_b/c_d"}),
        ("--output_dir my_run", {"output_dir": "my_run"}),
        ("--num_workers 7", {"num_workers": 7}),
        ("--batch_size 8 --weight_decay 0.1", {"batch_size": 8, "weight_decay": 0.1}),
        ("--pin-mem", {"pin_mem": True}),
        ("--no-pin-mem", {"pin_mem": False}),
        ("--no_pin_mem", {"pin_mem": False}),
        ("--no-model-ema", {"model_ema": False}),
        ("--no-repeated-aug", {"repeated_aug": False}),
        ("--dist-eval --distributed", {"dist_eval": True, "distributed": True}),
        ("--world_size 16 --dist_url env://", {"world_size": "16", "dist_url": "env://"}),
        ("--unscale-lr", {"lr_scaling": "none"}),
        ("--attn-only", {"train_scope": "attn"}),
        ("--bce-loss", {"bce_loss": True}),
        ("--cutmix-minmax 0.2 0.8", {"cutmix_minmax": [0.2, 0.8]}),
        ("--ThreeAugment --src --color-jitter 0.3", {"aa": "3a", "src": True, "color_jitter": 0.3}),
        ("--cosub --bce-loss", {"cosub": True, "bce_loss": True}),
        ("--data-set CIFAR", {"data_set": "CIFAR"}),
        ("--eval --resume a_b.pth", {"eval": True, "resume": "a_b.pth"}),
        (
            "--model deit_small_patch16_224 --batch-size 256 --data-path /path/to/imagenet --output_dir /path/to/save",
            {"model": "deit_small_patch16_224", "batch_size": 256, "output_dir": "/path/to/save"},
        ),
        (
            "--model deit_base_distilled_patch16_224 --distillation-type hard --teacher-model regnety_160 "
            "--teacher-path regnety_160-a5fe301d.pth",
            {"distillation_type": "hard", "distillation_alpha": 0.5},
        ),
        (
            "--model deit_base_patch16_384 --batch-size 32 --finetune x.pth --input-size 384 --lr 5e-6 "
            "--weight-decay 1e-8 --epochs 30 --min-lr 5e-6",
            {"input_size": [384], "lr": 5e-6, "weight_decay": 1e-8, "epochs": 30, "min_lr": 5e-6},
        ),
    ],
)
def test_published_command_lines(words, expected):
    args = parse(*words.split())
    assert {name: getattr(args, name) for name in expected} == expected
    check_flags(args)


@pytest.mark.parametrize("flag", ["--batch-s", "--mod", "--dist"])
def test_flags_are_not_abbreviated(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(flag, "8")
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


# -- literals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48", 48),
        ("1e-3", 1e-3),
        ("True", True),
        ("None", None),
        ("(1, 2)", (1, 2)),
        ("{'a': [1]}", {"a": [1]}),
        ("'quoted'", "quoted"),
        ("avg", "avg"),
        ("a=b", "a=b"),
        ("", ""),
        ("1 +", "1 +"),  # not Python at all
        ("2 * 3", "2 * 3"),  # Python, but no literal
        ("open('x')", "open('x')"),
    ],
)
def test_values_of_model_kwargs_are_literals(text, value):
    assert parse("--model-kwargs", f"key={text}").model_kwargs == {"key": value}
    assert parse("--teacher-model-kwargs", f"key={text}").teacher_model_kwargs == {"key": value}


def test_values_of_model_kwargs_are_never_evaluated(tmp_path):
    marker = tmp_path / "marker"
    attack = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    recipe = tmp_path / "attack.args"
    recipe.write_text(f'--model-kwargs "key={attack}"\n')
    assert parse("--model-kwargs", f"key={attack}").model_kwargs == {"key": attack}
    assert parse(f"@{recipe}").model_kwargs == {"key": attack}
    assert not marker.exists()


LOGS = sorted(log.parent for log in (tiny.REPOSITORY / "results").glob("study*/*/log.txt"))
AGAIN = {("study_avx512", "teacher"), ("study_avx512", "deit")}  # second runs, of other seeds and on another machine
STUDY = [folder for folder in LOGS if folder.parts[-2:] not in AGAIN]


@pytest.mark.parametrize("folder", LOGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_committed_log_is_that_of_its_recipe(folder):
    """Compare flags, except for the copy of the data, the file of the weights, what `auto` was, and resuming."""
    config = json.loads((folder / "config.json").read_text())
    recipe = vars(parse(f"@{tiny.REPOSITORY / 'recipes' / f'study_{folder.name}.args'}"))
    assert config["output_dir"] == recipe["output_dir"]
    free = {"data_set", "data_path", "num_workers", "pretrained", "finetune"}
    free |= {"resume", "overwrite", "checkpoint_minutes"} | ({"seed"} if folder not in STUDY else set())
    differing = {
        name: (value, config[name])
        for name, value in recipe.items()
        if name not in free and name in config and config[name] not in ("auto", json.loads(json.dumps(value)))
    }
    assert not differing
    assert [record["epoch"] for record in read_log(folder)] == list(range(len(read_log(folder))))


def row_of(file, recipe):
    """The cells of a recipe's row in a table of a page."""
    [line] = [line for line in file.read_text().splitlines() if line.startswith(f"| `{recipe}` |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.parametrize("folder", STUDY, ids=lambda path: path.name)
def test_accuracies_of_the_study_are_those_of_its_logs(folder):
    """In the table of the study, and for finished runs in the table of results and in the recipe's header."""
    run, name = read_run(folder), f"study_{folder.name}"
    accuracy, epochs = f"{run.values('test_acc1')[-1]:.1f}", len(run.records)
    row = row_of(tiny.REPOSITORY / "docs" / "study.md", name)
    assert f"{epochs} of {run.config['epochs']}" in row and accuracy in " ".join(row).split()
    if epochs == run.config["epochs"]:
        assert accuracy in row_of(tiny.REPOSITORY / "docs" / "results.md", name)
        header = (tiny.REPOSITORY / "recipes" / f"{name}.args").read_text().partition("# Measured:")[2]
        assert header.split()[:2] == [accuracy, "%"]


@pytest.mark.parametrize("study", ["study", "study_avx512"])
def test_the_summary_of_the_study_is_that_of_its_logs(study):
    committed = json.loads((tiny.REPOSITORY / "results" / study / "summary.json").read_text())
    folders = [folder for folder in LOGS if folder.parent.name == study]
    assert [Path(row.pop("folder")).name for row in committed] == [folder.name for folder in folders]
    for row, folder in zip(committed, folders, strict=True):
        own = summarize_run(read_run(folder))
        del own["folder"]
        assert row == pytest.approx(own)
