"""Tools on tiny inputs; what they time is not judged here."""

import json

import pytest
import tiny
import torch

from tools import loop_overhead, summarize
from tools.environment import describe_environment


def test_summary_names_accuracies_and_files(tmp_path):
    records = [{"epoch": 0, "test_acc1": 90.0}, {"epoch": 1}, {"epoch": 2, "test_acc1": 80.0, "test_ema_acc1": 85.0}]
    (tmp_path / "log.txt").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    text = summarize.summary(tmp_path)
    assert "3 epochs" in text and "80.00 % at the end, 90.00 % at best (epoch 0)" in text
    assert "85.00 % of the averaged weights" in text
    assert str(tmp_path / "best.pth") in text


def test_summary_of_no_run_is_a_line(tmp_path):
    output = tiny.run("-m", "tools.summarize", tmp_path, status=2)
    assert output.count("\n") == 1 and "has no log.txt" in output


def test_overhead_is_a_ratio_of_rates():
    calls = []

    def work(name, images):
        return lambda: calls.append(name) or images

    result = loop_overhead.interleaved(work("a", 10), work("b", 5), 3, torch.device("cpu"))
    assert sorted(calls) == ["a"] * 4 + ["b"] * 4  # a round to warm up, three that count
    assert result["ratio_min"] <= result["ratio"] <= result["ratio_max"]


def test_overhead_is_written_with_its_environment(tmp_path):
    flags = ["--device", "cpu", "--rounds", "1", "--steps", "1", "--batch-size", "2", "--views", "50"]
    output = tiny.run("-m", "tools.loop_overhead", *flags, "--output", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["environment"]["torch"] == torch.__version__
    assert written["loop"]["ratio"] == pytest.approx(
        written["loop"]["images_per_second"] / written["loop"]["images_per_second_bare"]
    )
    assert output.count("ratio") == 3


def test_environment_is_json_and_names_versions():
    environment = json.loads(json.dumps(describe_environment(torch.device("cpu"))))
    assert {"device", "torch", "torchvision", "timm", "python", "date"} <= environment.keys()
