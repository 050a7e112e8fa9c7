"""Hostile files: malicious checkpoints and downloads lead to a one-line error and nothing else."""

import contextlib
import copy
import hashlib
import io
import logging
import os
import random
import shlex
import time
import zipfile

import pytest
import timm
import tiny
import torch

import checkpoints
import engine
import flags
import main
import models
import run_with_submitit
import utils
from checkpoints import read_checkpoint
from tools import command, summarize
from utils import UserError

# -- downloads ---------------------------------------------------------------------------------------------------------


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


def content_of(checkpoint):
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    return stream.getvalue()


def files_below(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["w%2F..%2F..%2F..%2Fx", "%2e%2e%2Fx", "..%5C..%5Cx", "%00x", "%0Ax", "%2Ftmp%2Fx", "a" * 300]
)
def test_a_download_has_a_name_in_the_cache_only(tmp_path, web, name):
    content = content_of({"epoch": 3})
    path = f"/{name}-{hash_of(content)}.pth"
    web[1][path] = content
    before = files_below(tmp_path)
    assert read_checkpoint(web[0] + path, "--finetune")["epoch"] == 3
    (written,) = files_below(tmp_path) - before
    assert written.parent == tmp_path / "cache" / "hub" / "checkpoints"
    assert written.name.isascii() and written.name.isprintable()


def test_a_file_in_the_cache_is_hashed_whenever_it_is_used(tmp_path, web):
    content = content_of({"epoch": 3})
    web[1]["/best.pth"] = content
    address = f"{web[0]}/best.pth#sha256={hash_of(content)}"
    read_checkpoint(address, "--finetune")
    (cached,) = files_below(tmp_path / "cache")
    cached.write_bytes(content_of({"epoch": 99}))  # such as that of an address whose checksum is the same
    assert read_checkpoint(address, "--finetune")["epoch"] == 3
    cached.write_bytes(b"")
    web[1].clear()
    with tiny.user_error("--finetune", "cannot be downloaded", "404"):
        read_checkpoint(address, "--finetune")


@pytest.mark.parametrize("target", ["http://127.0.0.1:9/x.pth", "ftp://127.0.0.1:9/x", "HTTP://127.0.0.1:9/x"])
def test_a_redirect_leads_to_https_only(web, target):
    content = content_of({"epoch": 3})
    web[1].update({"/a.pth": target, "/b.pth": f"{web[0]}/c.pth", "/c.pth": content})
    with tiny.user_error("--finetune", "it redirects to", "not https"):
        read_checkpoint(f"{web[0]}/a.pth#sha256={hash_of(content)}", "--finetune")
    assert read_checkpoint(f"{web[0]}/b.pth#sha256={hash_of(content)}", "--finetune")["epoch"] == 3


@pytest.mark.parametrize("address", ["https://[x/a-{}.pth", "https://x\ud800/a-{}.pth", "https://127.0.0.1:x/a-{}.pth"])
def test_an_address_that_is_none_is_one_line(tmp_path, monkeypatch, address):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with tiny.user_error("--finetune https://", "cannot be downloaded"):
        read_checkpoint(address.format("0" * 64), "--finetune")


# -- what is in a file -------------------------------------------------------------------------------------------------


def quantized():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


ODD_TENSORS = {
    "sparse": lambda: torch.sparse_coo_tensor([[0]], [1.0], (10**12,)),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "quint8": quantized,
    "meta": lambda: torch.empty(10**12, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "expanded": lambda: torch.ones(1).expand(10**12),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["model", "model_ema", "optimizer"])
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_odd_tensors_are_refused_by_name_at_once(tmp_path, kind, part):
    torch.save({"model": {"w": torch.ones(3)}} | {part: {"a.weight": ODD_TENSORS[kind]()}}, tmp_path / "x.pth")
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        read_checkpoint(str(tmp_path / "x.pth"), "--resume")
    assert time.process_time() - start < 5  # 10**12 elements take far longer
    line = str(caught.value)
    assert line.startswith("--resume ") and "\n" not in line and len(line) < 500
    # torch itself does not read all of them
    assert f"{part}.a.weight is " in line and kind in line or "not a readable checkpoint" in line


def doubled(value, times):
    for _ in range(times):
        value = [value, value]
    return value


def of_itself():
    value = {}
    value["more"] = [value]
    return value


ENDLESS = {
    "doubled": doubled("x", 40),
    "of itself": of_itself(),
    "number": 10**5000,
    "key": {10**5000: 1},
    "key of a key": {(10**5000,): [10**5000]},
    "long name": {"x" * 10**6: 1 << 2000},
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_values_without_end_are_refused(tmp_path, kind):
    value = ENDLESS[kind]
    torch.save({"model": {"w": torch.ones(3)}, "args": value}, tmp_path / "x.pth")
    start = time.process_time()
    with pytest.raises(UserError, match="nested without end|a number of .* bits|not a readable") as caught:
        read_checkpoint(str(tmp_path / "x.pth"), "--resume")
    assert time.process_time() - start < 20 and len(str(caught.value)) < 500


def rewritten(content, change, compression=zipfile.ZIP_STORED):
    """Rewrite a torch file with `change` applied to its pickle, and valid checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            record = old.read(name)
            new.writestr(name, change(record) if name.endswith("data.pkl") else record)
    return stream.getvalue()


def test_compressed_records_are_refused_before_they_are_read(tmp_path, monkeypatch):
    content = content_of({"model": {"w": torch.zeros(10**7)}})
    (tmp_path / "x.pth").write_bytes(rewritten(content, bytes, zipfile.ZIP_DEFLATED))
    assert (tmp_path / "x.pth").stat().st_size < 10**5
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("it was inflated"))
    for mmap in (False, True):
        with tiny.user_error("--finetune", "compressed", "checkpoint_previous.pth"):
            read_checkpoint(str(tmp_path / "x.pth"), "--finetune", mmap=mmap)


def test_records_that_overlap_are_refused(tmp_path):
    content = content_of({"model": {"w": torch.ones(1000), "v": torch.ones(1000)}})
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        first, second = (file.getinfo(f"archive/data/{number}").header_offset for number in (0, 1))
    central = content.index(b"PK\1\2")
    old, new = (offset.to_bytes(4, "little") for offset in (second, first))
    (tmp_path / "x.pth").write_bytes(content[:central] + content[central:].replace(old, new))
    with tiny.user_error("--finetune", "overlap"):
        read_checkpoint(str(tmp_path / "x.pth"), "--finetune", mmap=True)


def test_a_storage_that_claims_more_than_its_record_is_refused(tmp_path):
    def claim(pickled):
        position = pickled.index(b"cpu")
        return pickled[:position] + pickled[position:].replace(b"K\x64", b"J" + (2 * 10**9).to_bytes(4, "little"))

    (tmp_path / "x.pth").write_bytes(rewritten(content_of({"model": {"w": torch.ones(100)}}), claim))
    with tiny.user_error("--finetune", "not a readable checkpoint"):
        read_checkpoint(str(tmp_path / "x.pth"), "--finetune")


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.pth")
    assert not checkpoints.is_whole(tmp_path / "checkpoint.pth")
    with tiny.user_error("--resume", "is a FIFO, not a regular file"):
        read_checkpoint(str(tmp_path / "checkpoint.pth"), "--resume")


@pytest.mark.parametrize("value", [5, "abc", {"a": 1}, [[1]], torch.ones(3), None, {"val": 7}, {("a",): 1}])
def test_what_a_file_says_of_its_run_may_be_anything(value):
    names = ("class_names", "class_samples", "run", "args")
    checkpoint = {"args": {"input_size": value, "model_kwargs": value}} | dict.fromkeys(names[:3], value)
    for each in (checkpoint, dict.fromkeys(names, value)):
        data = type("Data", (), {"class_names": tuple("abc"), "class_samples": (1, 2, 3)})
        checkpoints.compare_classes(each, {"val": data}, "--resume x", allow_mismatch=True)
        checkpoints.changes(each, {"args": {}, "run": {}}, ())
        assert checkpoints.trained_size(each) in (None, (5, 5))


# -- the state of the optimizer ----------------------------------------------------------------------------------------


def new_state():
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 10}
    model = models.place(timm.create_model("deit_tiny_patch16_224", **kwargs), torch.device("cpu"))
    optimizer = engine.build_optimizer(model, "adamw", lr=1e-3, weight_decay=0.05)
    return engine.TrainState(model, model, optimizer)


def train(state, steps):
    for step in range(steps):
        torch.manual_seed(step)
        state.step(state.model(torch.randn(4, 3, 32, 32)).square().mean())
    return state


def checkpoint_of(state):
    checkpoint = state.state_dict([])
    return torch.load(io.BytesIO(content_of(checkpoint)), weights_only=True)


def resumed(checkpoint):
    state = new_state()
    state.resume(checkpoint, "x.pth", 100)
    return state


def qkv(checkpoint):
    """The optimizer's state of a weight [144, 48]."""
    return next(each for each in checkpoint["optimizer"]["state"].values() if each["exp_avg"].shape == (144, 48))


def put(name, value):
    return lambda checkpoint: qkv(checkpoint).update({name: value})


def group(name, value):
    return lambda checkpoint: checkpoint["optimizer"]["param_groups"][1].update({name: value})


ATTACKS = {
    "one value": (put("exp_avg", torch.zeros(1)), "exp_avg is [1] of torch.float32, not [144, 48]"),
    "scalar": (put("exp_avg", torch.tensor(0.0)), "exp_avg is []"),
    "number": (put("exp_avg", 0.0), "exp_avg is a float, not a Tensor"),
    "transposed": (put("exp_avg", torch.zeros(48, 144)), "exp_avg is [48, 144]"),
    "another type": (put("exp_avg", torch.zeros(144, 48).double()), "torch.float64"),
    "not finite": (put("exp_avg_sq", torch.full((144, 48), float("inf"))), "exp_avg_sq is not finite"),
    "no number of steps": (put("step", torch.tensor(float("nan"))), "step is not finite"),
    "steps in words": (put("step", "7"), "step is a str"),
    "a part": (lambda checkpoint: qkv(checkpoint).pop("exp_avg_sq"), "has no exp_avg_sq"),
    "more": (put("exp_avg_more", torch.zeros(7)), "exp_avg_more is [7]"),
    "empty": (lambda checkpoint: checkpoint["optimizer"].update(state={}), "optimizer.state is empty"),
    "of nothing": (
        lambda checkpoint: checkpoint["optimizer"]["state"].update({99: {}}),
        "99, which is not a parameter",
    ),
    "of a list": (lambda checkpoint: checkpoint["optimizer"].update(state=[1]), "fits"),
    "lr": (group("lr", "0.1"), "param_groups.1.lr is 0.1"),
    "no lr": (group("lr", float("nan")), "param_groups.1.lr is nan"),
    "lr of two": (group("lr", torch.ones(2)), "fits"),
    "betas": (group("betas", 0.9), "param_groups.1.betas is 0.9"),
    "uphill": (group("maximize", True), "param_groups.1.maximize is True, here False"),
    "exchanged": (lambda checkpoint: checkpoint["optimizer"]["param_groups"][1]["params"].reverse(), "group 1"),
    "epoch": (lambda checkpoint: checkpoint.update(epoch=-3), "epoch is -3"),
    "late epoch": (lambda checkpoint: checkpoint.update(epoch=10**300), "epoch is 1000"),
    "half a step": (lambda checkpoint: checkpoint.update(step=torch.ones(3)), "step is tensor"),
    "no best": (lambda checkpoint: checkpoint.update(best_acc1=float("nan")), "best_acc1 is nan"),
    "progress": (lambda checkpoint: checkpoint.update(progress={"images": "x", "totals": []}), "progress.images is x"),
    "totals": (lambda checkpoint: checkpoint.update(progress={"images": 1, "totals": [3]}), "fits"),
    "scale": (lambda checkpoint: checkpoint.update(scaler={"scale": float("inf")}), "scaler.scale is inf"),
}


@pytest.fixture(scope="module")
def trained():
    return checkpoint_of(train(new_state(), 2))


@pytest.mark.parametrize(("attack", "found"), ATTACKS.values(), ids=ATTACKS)
def test_a_state_of_another_optimizer_is_refused_by_name(trained, attack, found):
    checkpoint = copy.deepcopy(trained)
    attack(checkpoint)
    with tiny.user_error("--resume x.pth: has no training state that fits", found, "--opt"):
        resumed(checkpoint)


def test_other_memory_layouts_give_the_same_numbers(trained):
    expected = train(resumed(copy.deepcopy(trained)), 1).module.state_dict()
    checkpoint, both = copy.deepcopy(trained), torch.zeros(2, 144, 48)
    for index, name in enumerate(("exp_avg", "exp_avg_sq")):
        both[index] = qkv(checkpoint)[name]
        qkv(checkpoint)[name] = qkv(checkpoint)[name].t().contiguous().t()
    transposed = train(resumed(copy.deepcopy(checkpoint)), 1).module.state_dict()
    qkv(checkpoint).update(exp_avg=both[0], exp_avg_sq=torch.nn.Parameter(both[1]))  # in one storage
    shared = train(resumed(checkpoint), 1).module.state_dict()
    for found in (transposed, shared):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parameters_without_a_state_are_counted(trained, caplog, monkeypatch):
    monkeypatch.setattr(utils.logger, "propagate", True)
    checkpoint = copy.deepcopy(trained)
    del checkpoint["optimizer"]["state"][0]
    resumed(checkpoint)
    assert "x.pth: 1 of 20 parameters have no optimizer state" in caplog.text


def test_an_empty_state_is_right_where_updates_may_have_been_skipped(trained):
    checkpoint = copy.deepcopy(trained)
    checkpoint["optimizer"]["state"] = {}
    checkpoint["scaler"] = {"scale": 32768.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    resumed(checkpoint)
    checkpoint["scaler"], checkpoint["step"] = {}, 0
    resumed(checkpoint)


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"pos_embed": torch.zeros(1, 0, 48)},
        {"pos_embed": torch.zeros(0, 17, 48)},
        {"pos_embed": torch.zeros(1, 1, 48)},
        {"pos_embed": torch.zeros(2, 17, 48)},
        {"pos_embed": torch.zeros(1, 17, 0)},
        {"pos_embed": torch.zeros(())},
        {"reg_token": torch.zeros(())},
        {"reg_token": torch.zeros(0)},
        {"patch_embed.proj.weight": torch.zeros(48, 3, 0, 0), "pos_embed": torch.zeros(1, 5, 48)},
    ],
)
def test_embeddings_of_no_size_are_refused(changed):
    model = new_state().module
    with tiny.user_error("--finetune x.pth: does not fit", min(changed)):
        models.load_weights(model, model.state_dict() | changed, "--finetune", "x.pth", models.FINETUNING, (32, 32))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"architecture": 3}', '{"architecture": "deit_tiny", "x": 1}'])
def test_a_local_folder_without_a_model_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with tiny.user_error(f"--model local-dir:{tmp_path}", "cannot be built"):
        models.build_model(models.ModelOptions(model=f"local-dir:{tmp_path}", input_size=(32, 32)), 10)


def test_mutated_checkpoints_lead_to_one_line_errors_only(tmp_path, trained):
    """80 checkpoints with a few random changes of the pickle and valid checksums."""
    content, path, generator = content_of(trained | {"args": {"model": "x"}}), tmp_path / "x.pth", random.Random(0)
    state, outcomes = new_state(), {"read": 0, "refused": 0}

    def change(pickled):
        mutated = bytearray(pickled)
        for _ in range(generator.randint(1, 2)):
            position = generator.randrange(len(mutated))
            mutated[position : position + generator.choice((0, 1))] = bytes([generator.randrange(256)])
        return bytes(mutated)

    for _ in range(80):
        path.write_bytes(rewritten(content, change))
        try:
            checkpoint = read_checkpoint(str(path), "--resume")
            checkpoints.changes(checkpoint, {"args": {"model": "x"}, "run": {}}, ("model",))
            state.resume(checkpoint, str(path), 100)
            outcomes["read"] += 1
        except UserError as error:
            assert str(error).startswith("--resume ")
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 2, outcomes


ODD_VALUES = [None, True, -1, 0, 10**30, float("nan"), -0.5, "x", "a\n", [], [[]], {}, {1: 2}, {(1,): 2}, (), (1, 2)]
ODD_VALUES += [torch.ones(3), torch.tensor(1), torch.ones(1, 0, 5), torch.zeros(2, 3, dtype=torch.bool), b"x", 1j]
ABOUT = {
    "args": {"model": "x", "input_size": [32], "model_kwargs": {"depth": 1}},
    "class_names": list("abc"),
    "class_samples": {"val": [1, 2, 3]},
    "run": {"images": 5, "versions": {"torch": "2"}},
    "progress": {"images": 64, "totals": [{"steps": 3.0, "loss": 2.0}]},
    "broken_images": [3],
}


def with_an_odd_value(value, generator, depth=0):
    """Copy nested values with a random one replaced or removed."""
    if not isinstance(value, dict | list) or not value or (depth and generator.random() < 0.25):
        return generator.choice(ODD_VALUES)
    value = copy.copy(value)
    key = generator.choice(list(value)) if isinstance(value, dict) else generator.randrange(len(value))
    if isinstance(value, dict) and generator.random() < 0.1:
        del value[key]
    else:
        value[key] = with_an_odd_value(value[key], generator, depth + 1)
    return value


def test_odd_values_anywhere_lead_to_one_line_errors_only(tmp_path, trained):
    path, generator, state = str(tmp_path / "x.pth"), random.Random(0), new_state()
    data = type("Data", (), {"class_names": tuple("abc"), "class_samples": (1, 2, 3)})
    for _ in range(75):
        torch.save(with_an_odd_value(ABOUT | trained | ABOUT, generator), path)
        with contextlib.suppress(UserError):
            checkpoint = read_checkpoint(path, "--resume")
            checkpoints.compare_classes(checkpoint, {"val": data}, "--resume", allow_mismatch=True)
            checkpoints.changes(checkpoint, {"args": ABOUT["args"], "run": {}}, ("model",))
            checkpoints.ema_of(checkpoint, "--resume", path)
            here = dict.fromkeys(models.MODEL_FLAGS) | {"model": "x", "model_kwargs": {"depth": 1}}
            models.refuse_another_model(here, {"model": "x"} | checkpoints.flags_of(checkpoint), "--resume")
            with contextlib.suppress(SystemExit):  # argparse's error of one line
                flags.parse_trained(flags.get_parser(), [], checkpoint, path)
            state.resume(checkpoint, path, 100)


# -- what a checkpoint may choose --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words", "found"),
    [
        ({"model": "hf-hub:evil/model"}, "", "hf-hub:evil/model"),
        ({"model": "local-dir:/tmp"}, "", "local-dir:/tmp"),
        ({"model": ["hf_hub:evil/model"]}, "", "hf_hub:evil/model"),
        ({"model_kwargs": {"checkpoint_path": "/tmp/x"}}, "", "checkpoint_path"),
        ({"model_kwargs": {"pretrained": True}}, "", "pretrained"),
        ({"model_kwargs": {"pretrained_cfg": {"url": "https://x"}}}, "", "pretrained_cfg"),
        ({"model_kwargs": "pretrained_cfg={'url':'https://x'}"}, "", "--model-kwargs"),
        ({"model_kwargs": ["cache_dir=/tmp"]}, "", "--model-kwargs"),
        ({"data_set": "hfds/evil/data"}, "", "add --data-set hfds/evil/data"),
        ({"data_set": "tfds/evil"}, "", "add --data-set tfds/evil"),
        ({"data_set": "wds/", "data_path": "pipe:touch x"}, "", "add --data-set wds/"),
        ({"data_set": "wds/", "data_path": "pipe:touch x"}, "--data-set wds/", "add --data-path pipe:touch x"),
        ({"data_set": "wds/", "val_split": "{pipe:touch x}"}, "--data-set wds/", "add --val-split {pipe:touch x}"),
    ],
)
def test_a_checkpoint_does_not_choose_what_is_fetched(tmp_path, args, words, found):
    checkpoint = {"model": {"w": torch.ones(3)}, "args": {"model": "deit_tiny_patch16_224"} | args}
    torch.save(checkpoint, tmp_path / "x.pth")
    own = ["--resume", str(tmp_path / "x.pth"), *words.split()]
    with tiny.user_error(f"--resume {tmp_path / 'x.pth'}: ", found):
        command.parse(command.get_parser("export", None), own)
    with tiny.user_error(f"--resume {tmp_path / 'x.pth'}: ", found):
        flags.parse_command(["--eval", *own])


def test_data_that_the_user_names_are_those_of_the_checkpoint():
    checkpoint = {"args": {"data_set": "hfds/me/data", "val_split": "test[:90%]", "data_path": "/data"}}
    args = flags.parse_trained(flags.get_parser(), ["--data-set", "hfds/me/data"], checkpoint, "x")
    assert (args.data_set, args.val_split, args.data_path) == ("hfds/me/data", "test[:90%]", "/data")


# -- what is printed ---------------------------------------------------------------------------------------------------

FORGED = "a\n12:00:00 all is well\r\x1b[31m\x9b1m\u2028\u202e\u200b\ud800\x00"


def test_escaped_text_is_one_line_of_printable_characters():
    assert utils.escaped(FORGED).isprintable()
    assert utils.escaped("größe 日本 'x' \\") == "größe 日本 'x' \\"
    assert utils.escaped("a\n\x1b\u2028\ud800") == "a\\n\\x1b\\u2028\\ud800"


def test_log_lines_cannot_be_forged(capfd):
    utils.set_up_logging(utils.World.alone(torch.device("cpu")))
    utils.logger.warning("resuming %s", FORGED)
    # pytest-xdist cannot send a captured lone surrogate
    logging.getLogger("timm.some").warning("unexpected keys %s", FORGED.replace("\ud800", ""))
    lines = capfd.readouterr().err.splitlines()
    assert all(line.isprintable() for line in lines)
    assert sum("all is well" in line for line in lines) >= 1
    assert not any(line.startswith("12:00:00 all") for line in lines)


@pytest.mark.parametrize("start", [main.cli, "export"])
@pytest.mark.parametrize("where", ["model", "data_set", "tensor", "patch_size"])
def test_errors_print_what_a_file_says_on_one_line(tmp_path, capsys, where, start):
    args = {"model": "deit_tiny_patch16_224", "data_set": "DIGITS", "num_classes": None}
    weights = {"w" + FORGED.replace("\ud800", "") * (where == "tensor"): torch.ones(3)}
    args |= {where: FORGED} if where != "tensor" else {}
    torch.save({"model": weights, "args": args}, tmp_path / "x.pth")
    words = ["--resume", str(tmp_path / "x.pth"), "--input-size", "32"]
    with pytest.raises(SystemExit) as end:
        if start == "export":
            from tools import export

            export.main([*words, "--output", str(tmp_path / "x.onnx")])
        else:
            start(["--eval", *words, "--num-workers", "0", "--device", "cpu"])
    assert end.value.code == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert ": error: " in line and "all is well" in line or where == "data_set" and start == "export"
    assert all(each.isprintable() for each in (*before, line))


@pytest.mark.parametrize("flag", ["comment", "partition", "constraint", "job-dir"])
def test_values_of_a_job_have_no_line_break(tmp_path, flag):
    words = ["--job-dir", str(tmp_path), f"--{flag}", "a\n#SBATCH --wrap=evil", "--cluster", "local", "--nodes", "1"]
    args = run_with_submitit.get_parser().parse_args([*words, "--data-set", "DIGITS"])
    with pytest.raises(UserError, match=f"--{flag} a\n.*: has a control character"):
        run_with_submitit.submit(args)
    assert not list(tmp_path.iterdir())


LOGS = ['["test_acc1"]', "{", '{"test_acc1": 1, "epoch": "\\u001b"}', "\udcff", ""]


@pytest.mark.parametrize("line", LOGS)
def test_a_log_without_an_epoch_has_none(tmp_path, capsys, line):
    (tmp_path / "log.txt").write_text(line + "\n", errors="surrogateescape")
    summarize.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == [str(tmp_path), "0", "-"]


# -- true messages -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_called_intact_only_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def kept(words):
        return main._what_is_kept(flags.parse_args(shlex.split(words)))

    none, intact = "; no checkpoint has been written", "; the last checkpoint is intact"
    assert kept("--output-dir ''") == kept(f"--output-dir {tmp_path}") == none
    (tmp_path / "checkpoint.pth").touch()
    assert kept(f"--output-dir {tmp_path} --resume auto") == intact
    assert kept(f"--output-dir {tmp_path}") == intact
    assert kept(f"--output-dir {tmp_path} --eval --resume x") == ""
    monkeypatch.setenv("RANK", "1")
    assert kept(f"--output-dir {tmp_path}") == ""


def test_a_run_that_cannot_save_says_that_there_is_no_checkpoint(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    words = [*tiny.PLAIN, "--train-fraction", "0.05", "--output-dir", str(tmp_path / "output"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="1"):
        main.cli(words)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("No space left on device; no checkpoint has been written")
