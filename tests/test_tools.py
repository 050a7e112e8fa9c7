"""Tools on tiny inputs; what they time is not judged here."""

import json

import pytest
import tiny
import torch

from tools import checkpoint_cost, distillation_cost, speed_test, summarize
from tools.timing import describe_environment, rates_in_turn, ratio_row


def test_summary_names_accuracies_and_files(tmp_path):
    records = [{"epoch": 0, "test_acc1": 90.0}, {"epoch": 1}, {"epoch": 2, "test_acc1": 80.0, "test_ema_acc1": 85.0}]
    (tmp_path / "log.txt").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    text = summarize.summary(tmp_path)
    assert "3 epochs" in text and "80.00 % at the end, 90.00 % at best (epoch 0)" in text
    assert "85.00 % of the averaged weights" in text
    assert str(tmp_path / "best.pth") in text


@pytest.mark.process
def test_summary_of_no_run_is_a_line(tmp_path):
    output = tiny.run("-m", "tools.summarize", tmp_path, status=2)
    assert output.count("\n") == 1 and "log.txt: No such file" in output and "--output-dir" in output


def test_works_take_turns_after_a_round_to_warm_up():
    calls = []

    def work(name, images):
        return lambda: calls.append(name) or images

    rates = rates_in_turn([work("a", 10), work("b", 5)], 3, torch.device("cpu"))
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [len(each) for each in rates] == [3, 3]
    row = ratio_row([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    rate = {"images_per_second": 4.0, "images_per_second_min": 2.0, "images_per_second_max": 9.0}
    assert row == rate | {"ratio": 2.0, "ratio_min": 1.0, "ratio_max": 3.0}


@pytest.mark.process
def test_overhead_is_written_with_its_environment(tmp_path):
    flags = ["--device", "cpu", "--rounds", "1", "--steps", "1", "--batch-size", "2", "--views", "50"]
    output = tiny.run("-m", "tools.loop_overhead", *flags, "--output", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["environment"]["torch"] == torch.__version__
    loop = written["loop"]  # of a single round
    assert loop["ratio"] == pytest.approx(loop["images_per_second"] / loop["images_per_second_bare"])
    assert output.count("ratio") == 3


def test_environment_is_json_and_names_versions():
    environment = json.loads(json.dumps(describe_environment(torch.device("cpu"))))
    assert {"device", "torch", "torchvision", "timm", "python", "date"} <= environment.keys()


def test_speed_rows_count_tokens_and_products(tmp_path, capsys):
    flags = [
        "--models",
        "deit_tiny_patch16_224",
        "evit_tiny_patch16_224",
        "--keep-rates",
        "0.5",
        "--batch-sizes",
        "1",
        "2",
    ]
    flags += ["--input-size", "64", "--rounds", "1", "--steps", "1", "--device", "cpu"]
    speed_test.main([*flags, "--output", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["model"], row["batch_size"]) for row in rows] == [
        (name, size) for size in (1, 2) for name in ("deit_tiny_patch16_224", "evit_tiny_patch16_224")
    ]
    deit, evit = rows[:2]
    assert deit["ratio"] == 1.0 and deit["tokens"] == [17] * 12
    # 16 patches -> 8 and the fused one -> 5 and the fused one -> 3 and the fused one, each with the class token
    assert evit["tokens"] == [17] * 3 + [10] * 3 + [7] * 3 + [5] * 3
    width, tokens = 192, 17
    block = (
        12 * width * width * tokens + 2 * tokens * tokens * width
    )  # qkv, projection, MLP; q·kᵀ and its product with v
    assert deit["macs"] == 12 * block + 16 * 768 * width + width * 1000
    assert evit["parameters"] == deit["parameters"] and evit["macs"] < deit["macs"]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_speed_of_an_unknown_model_is_a_line(capsys):
    with pytest.raises(SystemExit):
        speed_test.main(["--models", "deit_tinny_patch16_224", "--device", "cpu"])
    assert "did you mean deit_tiny_patch16_224" in capsys.readouterr().err


def test_peak_memory_is_what_was_held_at_once():
    def work():
        first = torch.zeros(1 << 20)  # 4 MiB
        del first
        return torch.zeros(1 << 20).add(1).numel()  # two more at once

    assert speed_test.peak_memory(work, torch.device("cpu")) == pytest.approx(2 * 4 * 2**20, rel=0.01)


def test_the_whole_attention_matrix_takes_its_memory(tmp_path):
    peaks = {}
    for attention in ("fused", "math"):
        flags = ["--models", "deit_tiny_patch16_224", "--attention", attention, "--batch-sizes", "2", "--device", "cpu"]
        flags += ["--input-size", "384", "--rounds", "1", "--steps", "1", "--output", str(tmp_path / attention)]
        speed_test.main(flags)
        peaks[attention] = json.loads((tmp_path / attention).read_text())["rows"][0]["peak_memory_bytes"]
    matrix = 2 * 3 * 577 * 577 * 4  # images, heads, tokens, tokens, bytes
    assert peaks["math"] - peaks["fused"] > matrix


def test_every_way_to_be_taught_is_timed(tmp_path, capsys):
    flags = ["--teacher", "test_resnet", "--input-size", "32", "--batch-size", "2", "--rounds", "1", "--steps", "2"]
    distillation_cost.main([*flags, "--device", "cpu", "--output", str(tmp_path / "cost.json")])
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [row["teacher"].split()[0] for row in rows] == ["no", "stored", "50", "live"]
    assert rows[0]["ratio"] == 1.0 and all(row["images_per_second"] > 0 for row in rows)
    assert capsys.readouterr().out.count("images/s") == 4


@pytest.mark.process
def test_saving_and_resuming_are_measured(tmp_path, capsys):
    small = ["--input-size", "32", "--batch-size", "2", "--steps", "1", "--rounds", "1", "--middle", "20"]
    flags = [*map(str, tiny.TINY), "--batch-size", "16", "--epochs", "9"]
    checkpoint_cost.main([*small, "--device", "cpu", "--output", str(tmp_path / "out.json"), "--", *flags])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["saving"]["mebibytes"] > 60 and written["saving"]["seconds_of_saving"] > 0  # four of 5.5 million
    assert written["resuming"]["images_skipped"] % 16 == 0 and written["resuming"]["images_skipped"] >= 20 * 16
    for kind in ("fresh", "resumed"):
        assert written["resuming"][kind]["seconds"] > 0 and written["resuming"][kind]["mebibytes_read"] > 1
    assert capsys.readouterr().out.count(" to the first step") == 2
