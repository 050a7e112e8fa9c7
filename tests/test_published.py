"""The command lines of the original repositories (published_lines.txt): they parse unchanged and do what they say."""

import argparse
import re
import shlex

import pytest
import tiny
import torch
from test_recipes import PUBLISHED_DEFAULTS
from timm.scheduler import create_scheduler

import engine
import flags
import main
import run_with_submitit
from engine import TrainState
from samplers import Batch
from tools import visualize_tokens
from utils import StepLog

TEXT = (tiny.REPOSITORY / "tests" / "published_lines.txt").read_text()
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
TYPOS = {"--repeated-aug--bce-loss": "--repeated-aug --bce-loss"}  # one line of DeiT III lacks a space
VARIABLES = {"$datapath": "/path/to/imagenet", "$logdir": "/path/to/save", "$ckpt": "deit_small.pth"}
# Flags that say it with another name, or without a value.
SAYS = {
    "--unscale-lr": {"lr_scaling": "none"},
    "--ThreeAugment": {"aa": "3a"},
    "--use_volta32": {"constraint": "volta32gb"},
    "--no-repeated-aug": {"repeated_aug": False},
}
DEST = {"batch": "batch_size"}


def words_of(line):
    """Return a line's words after the script (typo fixed, shell variables replaced) and the script."""
    for old, new in (TYPOS | VARIABLES).items():
        line = line.replace(old, new)
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    return script, words[words.index(script) + 1 :]


def parsed(line):
    script, words = words_of(line)
    parser = {"main.py": flags.get_parser, "run_with_submitit.py": run_with_submitit.get_parser}[script]()
    return parser.parse_args(words)


def said(words):
    """Read the value of each flag from the words, without our parser."""
    values, pending = {}, list(words)
    while pending:
        flag = pending.pop(0)
        value = pending.pop(0) if pending and not pending[0].startswith("--") else True
        name = flag.lstrip("-").replace("-", "_")
        values |= SAYS.get(flag, {DEST.get(name, name): value})
    return values


def processes(line):
    launched, script = re.search(r"--nproc_per_node=(\d+)", line), words_of(line)[0]
    if script == "main.py":
        return int(launched[1]) if launched else 1
    values = said(words_of(line)[1])
    return int(values.get("nodes", 2)) * int(values.get("ngpus", 8))  # the defaults of the original launcher


def line_with(*parts):
    """The only line with all these parts, or the first of its repetitions."""
    found = [line for line in dict.fromkeys(LINES) if all(part in line for part in parts)]
    assert len(found) == 1, found
    return found[0]


# -- parsing -----------------------------------------------------------------------------------------------------------


def test_there_are_48_lines():
    assert len(LINES) == 48


@pytest.mark.parametrize("line", LINES, ids=map(str, range(len(LINES))))
def test_a_published_line_has_the_values_that_it_says(line):
    args, values = parsed(line), said(words_of(line)[1])
    expected = {**PUBLISHED_DEFAULTS, **values}
    for name, value in expected.items():
        found = getattr(args, name)
        found = found[0] if name == "input_size" else found
        value = value[0] if isinstance(value, list) else value
        number = isinstance(found, (int, float)) and isinstance(value, str)
        assert found == (float(value) if number else value), name
    batch = args.batch_size * processes(line)
    assert args.batch_size == int(values.get("batch", values.get("batch_size", 64)))
    peak = float(values.get("lr", 5e-4)) * (1 if "--unscale-lr" in line else batch / 512)
    assert flags.fill(engine.OptimizerOptions, args).scaled_lr(batch) == pytest.approx(peak, rel=1e-12)


@pytest.mark.parametrize("line", [line for line in LINES if "https://" in line], ids=lambda line: line[-30:-4])
def test_an_address_with_8_digits_says_which_line_to_use(line):
    args = parsed(line)
    name, address = next(
        (name, shown) for name in ("resume", "finetune", "teacher_path") if (shown := vars(args)[name])
    )
    flag, file = flags.spelled(name), address.rpartition("/")[2]
    kind = "teacher-" if name == "teacher_path" else ""
    with tiny.user_error(flag, address, f"sha256sum {file}", f"pass {flag} {file}") as info:
        flags.check_flags(args)
    told = re.search(rf"{flag} (\S+#sha256=)<the 64 digits>; timm has the same weights: (.*)$", str(info.value))
    flags.check_flags(argparse.Namespace(**vars(args) | {name: told[1] + "0" * 64}))
    instead = flags.parse_args(shlex.split(told[2]))
    assert getattr(instead, f"{kind.replace('-', '_')}pretrained")
    model = getattr(instead, f"{kind.replace('-', '_')}model")
    assert model.split(".")[0] == file.partition("-")[0]


@pytest.mark.parametrize(
    "words, changed",
    [
        ("--batch 8", {"batch_size": 8}),
        ("--dr 0.3", {"decay_rate": 0.3}),
        ("--eval_gap 5", {"eval_interval": 5}),
        ("--start_epoch 3", {"start_epoch": 3}),
        ("--local_rank 1", {"local_rank": "1"}),
        ("--local-rank=1", {"local_rank": "1"}),  # as torch.distributed.launch adds it without --use_env
        ("--resplit", {"resplit": True}),
        ("--no-train-mode --nb_classes 10", {"train_mode": False, "nb_classes": 10}),
        ("--train-mode", {}),
    ],
)
def test_a_flag_of_the_original_parsers_changes_only_itself(words, changed):
    assert vars(flags.parse_args(words.split())) == vars(flags.parse_args([])) | changed


def test_flags_of_a_job_keep_their_meaning():
    args = run_with_submitit.get_parser().parse_args(["--partition", "gpu", "--comment", "why", "--job_dir", "x"])
    assert (args.partition, args.comment, args.job_dir, args.job_name) == ("gpu", "why", "x", "deit")
    assert (args.constraint, args.mem_gb) == (None, None)


@pytest.mark.parametrize(
    "words, told",
    [
        ("--sched plateau", "plateau follows a metric; use --sched step"),
        ("--sched linear", "use one of cosine, step"),
        ("--start-epoch 4 --epochs 4", "pass a lower number"),
        ("--test_speed --base-keep-rate 0.5", "tools.speed_test --models deit_base_patch16_224 --input-size 224"),
        ("--only_test_speed", "run python -m tools.speed_test"),
        ("--data-set DIGITS --nb-classes 1000 --output-dir=", "DIGITS has 10 classes; drop the flag"),
    ],
)
def test_what_is_refused_names_what_to_do(words, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.cli(words.split())
    assert told in capsys.readouterr().err.splitlines()[-1]


# -- running -----------------------------------------------------------------------------------------------------------

# Appended to a line, whose later flags count: a model, data and a run that are small.
SHORT = shlex.split("--epochs 1 --warmup-epochs 0 --train-fraction 0.03 --batch-size 16 --amp off --no-model-ema")
PLAIN, DISTILLED, TOKENS = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "--drop-loc 1"


def small(*changes):
    return [*tiny.MODEL, *tiny.DATA, *SHORT, *shlex.split(" ".join(map(str, changes)))]


def run(words, script="main.py"):
    """Run these words in this process; for a job, run its tasks."""
    parser = {"main.py": flags.get_parser, "run_with_submitit.py": run_with_submitit.get_parser}[script]()
    main.main(flags.parse_command([str(word) for word in words], parser))


def run_line(line, folder, *changes):
    """Run a line at a small size; return its log.txt and its checkpoint."""
    script, words = words_of(line)
    run([*words, *small(*changes), "--output-dir", folder], script)
    if "--eval" not in words:
        return tiny.log_of(folder), torch.load(folder / "checkpoint.pth", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of a tiny DeiT and of one with a distillation token, by model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in (PLAIN, DISTILLED)}
    for name, folder in folders.items():
        run([*small("--model", name), "--output-dir", folder])
    return folders


def assert_evaluated(folder, said):
    assert f"test_loss {tiny.log_of(folder)[-1]['test_loss']:.4g} " in said


def assert_tuned(checkpoint, folder):
    """Check that training started from the weights of another run and changed them."""
    before = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]["blocks.1.mlp.fc1.weight"]
    change = (checkpoint["model"]["blocks.1.mlp.fc1.weight"] - before).abs().max()
    assert 0 < change < 2e-3 < before.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("model", [PLAIN, DISTILLED])
def test_a_deit_is_evaluated(model, trained, tmp_path, capsys):
    line = line_with("--eval", "deit_tiny", "deit_tiny_distilled" if model == DISTILLED else "deit_tiny_patch16_224-")
    capsys.readouterr()
    run_line(line, tmp_path, "--model", model, "--resume", trained[model] / "checkpoint.pth")
    assert_evaluated(trained[model], capsys.readouterr().err)


@pytest.mark.slow
def test_a_deit_is_evaluated_at_another_image_size(trained, tmp_path, capsys):
    changes = ["--model", PLAIN, "--resume", trained[PLAIN] / "checkpoint.pth", "--input-size 48"]
    run_line(line_with("--eval", "deit_base_patch16_384-"), tmp_path, *changes)
    assert "--input-size was [32], is [48]" in (said := capsys.readouterr().err) and "test_images 355" in said


@pytest.mark.slow
def test_an_evit_is_evaluated_visualized_and_fine_tuned(trained, tmp_path, capsys):
    start = trained[PLAIN] / "checkpoint.pth"
    log, checkpoint = run_line(line_with("--shrink_epochs 0"), tmp_path / "tuned", TOKENS, "--finetune", start)
    assert log[-1]["keep_rate"] == 0.7 and checkpoint["args"]["fuse_token"] is True
    assert "peak learning rate 6.25e-07" in capsys.readouterr().err  # 2e-5 x 16 / 512
    assert_tuned(checkpoint, trained[PLAIN])

    resume = ["--resume", tmp_path / "tuned" / "checkpoint.pth", TOKENS]
    capsys.readouterr()
    run_line(line_with("shrink_base", "--eval"), tmp_path, *resume)
    assert_evaluated(tmp_path / "tuned", capsys.readouterr().err)

    with tiny.user_error("--visualize-mask: main.py only trains and evaluates; run python -m") as info:
        run_line(line_with("--visualize_mask"), tmp_path, *resume, "--n_visualization 2")
    tool = shlex.split(str(info.value).partition("tools.visualize_tokens ")[2])
    visualize_tokens.main([*tool, *tiny.MODEL, "--data-set", "DIGITS", "--output", str(tmp_path / "pictures")])
    assert len(list((tmp_path / "pictures").iterdir())) == 2


@pytest.mark.slow
def test_an_evit_is_trained_from_scratch(tmp_path, capsys):
    log, checkpoint = run_line(line_with("--shrink_epochs 100"), tmp_path, TOKENS)
    assert log[-1]["keep_rate"] == 1  # until epoch 10
    assert checkpoint["args"]["base_keep_rate"] == 0.7
    assert "the run ends at keep rate 1, not at --base-keep-rate 0.7" in capsys.readouterr().err


@pytest.mark.slow
def test_a_deit_is_trained_as_a_job(tmp_path):
    log, checkpoint = run_line(line_with("run_with_submitit.py --model deit_base_patch16_224 --data"), tmp_path)
    assert checkpoint["args"]["nodes"] == 2 and len(log) == 1
    assert checkpoint["model"]["head.weight"].shape == (10, 48)


@pytest.mark.slow
def test_a_deit_is_distilled_as_a_job(trained, tmp_path):
    teacher = ["--teacher-model", PLAIN, "--teacher-path", trained[PLAIN] / "checkpoint.pth"]
    teacher += ["--teacher-model-kwargs patch_size=8", *tiny.MODEL[-3:]]
    log, checkpoint = run_line(line_with("--use_volta32", "--distillation-type hard"), tmp_path, *teacher)
    assert checkpoint["args"]["constraint"] == "volta32gb"
    losses = [log[-1][f"train_loss{part}"] for part in ("", "_base", "_distillation")]
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-4)


@pytest.mark.slow
def test_a_deit_is_fine_tuned_at_another_image_size(trained, tmp_path):
    start = ["--finetune", trained[PLAIN] / "checkpoint.pth", "--input-size 48", "--lr-scaling none"]
    log, checkpoint = run_line(line_with("--use_volta32", "--finetune"), tmp_path, *start)
    assert log[-1]["train_lr"] == pytest.approx(5e-6, rel=1e-9)  # --lr is --min-lr
    assert_tuned(checkpoint, trained[PLAIN])
    assert checkpoint["model"]["pos_embed"].shape[1] == 1 + 36


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("deit_small", "--epochs 800"), ("deit_base", "--epochs 20", "--input-size 224")])
def test_a_deit_iii_is_trained_and_fine_tuned(parts, trained, tmp_path, capsys):
    # its models come with another change
    tuned = ["--finetune", trained[PLAIN] / "checkpoint.pth"] if "--epochs 20" in parts else []
    log, checkpoint = run_line(line_with(*parts), tmp_path, "--model", PLAIN, "--nb-classes 10", *tuned)
    args, group = checkpoint["args"], checkpoint["optimizer"]["param_groups"][0]
    if tuned:
        assert (args["opt"], args["aa"], args["repeated_aug"]) == ("adamw", "rand-m9-mstd0.5-inc1", False)
        assert_tuned(checkpoint, trained[PLAIN])
    else:
        assert (args["opt"], args["aa"], args["bce_loss"]) == ("fusedlamb", "3a", True)
        assert group["max_grad_norm"] == 1.0  # of timm's lamb alone
        assert "--opt fusedlamb: trains with timm's lamb" in capsys.readouterr().err
        assert log[-1]["train_loss"] < 1  # binary: about ln 2 at first, of 10 classes ln 10


@pytest.mark.process
def test_the_original_launcher_starts_two_processes(tmp_path):
    words = words_of(line_with("--nproc_per_node=4", "deit_tiny"))[1]
    launcher = [
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node=2",
        "--use_env",
        f"--master_port={tiny.free_port()}",
    ]
    output = tiny.run(*launcher, "main.py", *words, *small("--batch 8"), "--output_dir", tmp_path)
    assert "effective batch 16 images" in output and len(tiny.log_of(tmp_path)) == 1


# -- the original's clock, first epoch and mode ------------------------------------------------------------------------

CLOCKED = [
    "--sched cosine",
    "--sched cosine --warmup-epochs 0",
    "--sched cosine --lr-noise 0.2 0.8 --seed 3",
    "--sched step --decay-epochs 4 --decay-rate 0.5",
    "--sched multistep --decay-milestones 6 3 --decay-rate 0.2",
    "--sched tanh",
    "--sched tanh --warmup-epochs 0",
    "--sched poly --decay-rate 2 --poly-power 2",
    "--sched wsd --decay-epochs 3",
    "--sched rsqrt --decay-epochs 3",
    "--sched constant",
]


def fresh(args, lr=0.4):
    """A state with one weight, and its learning rate in an epoch of 3 updates."""
    model = torch.nn.Linear(1, 1)
    state = TrainState(model, model, torch.optim.SGD(model.parameters(), lr=lr))
    (schedule,) = engine.build_schedules(state, 3, flags.fill(engine.ScheduleOptions, args))
    return state, schedule


@pytest.mark.parametrize("words", CLOCKED)
def test_the_clock_of_epochs_is_that_of_the_original_loop(words):
    args = flags.parse_args(["--epochs", "9", "--warmup-epochs", "2", *words.split(), "--sched-on-epochs"])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    milestones = {"decay_milestones": sorted(args.decay_milestones or ())}
    scheduler, _ = create_scheduler(argparse.Namespace(**vars(args) | milestones), optimizer)
    expected = []
    for epoch in range(9):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    if "--warmup-epochs 0" not in words:
        assert expected[0] == expected[1] == 1e-6

    state, schedule = fresh(args)
    assert [schedule.step_update(update) or schedule.value for update in range(27)] == [
        rate for rate in expected for _ in range(3)
    ]
    for epoch, rate in enumerate(expected):
        state.start_at(epoch, 3)
        schedule.step_update(state.num_updates)
        resumed, its_schedule = fresh(args)
        resumed.resume(state.state_dict([schedule]), "here", updates_per_epoch=3)
        its_schedule.step_update(resumed.num_updates)
        assert its_schedule.value == rate, epoch


def test_a_run_with_the_clock_of_epochs_logs_one_rate_per_epoch(tmp_path):
    run([*small("--epochs 3 --warmup-epochs 2 --eval-interval 3 --sched-on-epochs"), "--output-dir", tmp_path])
    peak = 5e-4 * 16 / 512
    rates = [record["train_lr"] for record in tiny.log_of(tmp_path)]
    assert rates == pytest.approx([1e-6, 1e-6, 1e-6 + (peak - 1e-6) / 2], rel=1e-9)


def test_a_run_starts_at_the_epoch_of_start_epoch(tmp_path, capsys):
    words = small("--epochs 4 --warmup-epochs 1 --eval-interval 4")
    run([*words, "--output-dir", tmp_path / "whole"])
    run([*words, "--start_epoch", 2, "--output-dir", tmp_path / "late"])
    whole, late = (tiny.log_of(tmp_path / name) for name in ("whole", "late"))
    for name in ("epoch", "train_lr"):
        assert [record[name] for record in late] == [record[name] for record in whole][2:]
    assert saved(tmp_path / "late", "step") == saved(tmp_path / "whole", "step")
    capsys.readouterr()
    run([*words, "--start_epoch", 3, "--resume", "auto", "--output-dir", tmp_path / "late"])
    assert "--start-epoch has no effect: it needs a run that does not resume" in capsys.readouterr().err
    assert len(tiny.log_of(tmp_path / "late")) == 2


def test_no_train_mode_is_a_run_without_dropout_and_stochastic_depth(trained, tmp_path):
    teacher = ["--teacher-model", PLAIN, "--teacher-path", trained[PLAIN] / "checkpoint.pth"]
    teacher += ["--teacher-model-kwargs patch_size=8", *tiny.MODEL[-3:], "--distillation-type hard"]
    words = small("--model", DISTILLED, *teacher)
    modes = {
        "off": ["--drop", 0.2, "--drop-path", 0.3, "--no-train-mode"],
        "none": ["--drop", 0, "--drop-path", 0],
        "on": ["--drop", 0.2, "--drop-path", 0.3],
    }
    for name, mode in modes.items():
        run([*words, *mode, "--output-dir", tmp_path / name])
    off, none, on = (saved(tmp_path / name) for name in modes)
    assert all(torch.equal(off[name], none[name]) for name in none)
    assert not torch.equal(off["blocks.0.attn.qkv.weight"], on["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("train_mode", [True, False])
def test_no_train_mode_leaves_batch_statistics_alone(train_mode):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3))
    state = TrainState(model, model, torch.optim.SGD(model.parameters(), lr=0.1), train_mode=train_mode)
    batch = Batch(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 1]), torch.arange(2))
    schedules = engine.build_schedules(state, 1, engine.ScheduleOptions())
    engine.train_one_epoch(state, [batch], lambda out, _: (out.square().sum(), {}), schedules, StepLog(0, 1, 2, 50))
    assert model[0].running_mean.tolist() == pytest.approx([0.2, 0.4] if train_mode else [0, 0])  # momentum 0.1
    assert model[1].weight.grad is None and state.num_updates == 1


def saved(folder, key="model"):
    return torch.load(folder / "checkpoint.pth", weights_only=True)[key]
