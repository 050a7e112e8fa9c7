"""Jobs through submitit, without a SLURM: its local executor starts real processes."""

import argparse
import os
import pickle

import pytest
import tiny

import run_with_submitit
import utils

LOCAL = ["run_with_submitit.py", "--cluster", "local", "--nodes", "1", "--ngpus", "0"]
FEW = ["--train-fraction", "0.25"]


@pytest.mark.process
def test_a_local_job_trains_on_two_processes(tmp_path):
    folder = tmp_path / "jobs"
    flags = ["--tasks-per-node", "2", *tiny.PLAIN, *FEW, "--batch-size", "32", "--checkpoint-minutes", "0"]
    output = tiny.run(*LOCAL, "--job-dir", folder, *flags)
    (job,) = folder.iterdir()
    assert str(job) in output
    assert len(tiny.log_of(job)) == 1
    assert all((job / name).exists() for name in ("checkpoint.pth", "checkpoint_previous.pth", "best.pth"))
    assert "effective batch 64 images" in (job / f"{job.name}_0_log.err").read_text()


@pytest.mark.process
def test_a_debug_job_runs_in_this_process(tmp_path):
    flags = ["--cluster", "debug", "--nodes", "1", "--ngpus", "0", "--job-dir", tmp_path, *tiny.PLAIN, *FEW]
    tiny.run("run_with_submitit.py", *flags, "--output-dir", tmp_path / "output")
    assert len(tiny.log_of(tmp_path / "output")) == 1


@pytest.mark.process
def test_a_failed_job_ends_with_status_1_and_its_reason(tmp_path):
    output = tiny.run(*LOCAL, "--job-dir", tmp_path, *tiny.PLAIN, "--batch-size", "4096", status=1)
    assert "--batch-size 4096" in output


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--nodes", "2"], "--nodes 2: --cluster local has one machine"),
        (["--ngpus", "8", "--tasks-per-node", "1"], "--tasks-per-node 1: 8 GPUs need one task each"),
        (["--ngpus", "8", "--tasks-per-node", "16"], "--tasks-per-node 16: 8 GPUs need one task each"),
        (["--cluster", "debug", "--ngpus", "8"], "--ngpus 8: --cluster debug has one process"),
        (["--cluster", "debug", "--tasks-per-node", "2"], "--tasks-per-node 2: --cluster debug has one process"),
        (["--cluster", "debug", "--timeout", "60"], "--timeout: has no effect with --cluster debug"),
        (["--partition", "gpu"], "--partition: has no effect with --cluster local"),
        (["--signal-delay", "60"], "--signal-delay: has no effect with --cluster local"),
        (["--mem-gb", "8"], "--mem-gb: has no effect with --cluster local"),
        (["--resume", "auto"], "--resume auto: the folder of each new job is empty"),
    ],
)
def test_contradictions_are_refused_before_submission(flags, error, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_with_submitit.cli([*LOCAL[1:], *flags, "--job-dir", str(tmp_path), *tiny.PLAIN])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"run_with_submitit.py: error: {error}")
    assert not list(tmp_path.iterdir())


def test_without_slurm_the_local_cluster_is_offered(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun
    args = run_with_submitit.get_parser().parse_args(["--job-dir", str(tmp_path), "--data-set", "DIGITS"])
    with pytest.raises(utils.UserError, match="--cluster local"):
        run_with_submitit.submit(args)


@pytest.mark.parametrize(
    ("sbatch", "job_dir", "error"),
    [
        (
            "echo sbatch: error: a >&2; echo sbatch: error: invalid partition: x >&2; exit 1",
            "jobs",
            "invalid partition: x",
        ),
        ("exit 1", "file/jobs", "--job-dir {}: cannot be written (Not a directory"),
        ("exit 1", "file", "--job-dir {}: cannot be written (File exists"),
    ],
)
def test_a_refused_job_is_a_one_line_error(sbatch, job_dir, error, tmp_path, monkeypatch, capsys):
    for name, command in (("srun", "exit 0"), ("sbatch", sbatch)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SystemExit) as end:
        run_with_submitit.cli(["--job-dir", str(tmp_path / job_dir), "--data-set", "DIGITS"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and last.startswith("run_with_submitit.py: error: --")
    assert error.format(tmp_path / job_dir) in last


def restarted(job, folder):
    """The flags of a job that is requeued when `folder` holds what it holds."""
    return pickle.loads(pickle.dumps(job)).checkpoint().function._args_of(folder.name)


def test_a_restarted_job_leaves_the_run_that_it_replaces(tmp_path):
    (tmp_path / "checkpoint.pth").touch()
    words = ["--overwrite", "--output-dir", str(tmp_path)]
    args = run_with_submitit.get_parser().parse_args(words)
    job = run_with_submitit.Job(args, earlier=run_with_submitit._saved(tmp_path))
    assert restarted(job, tmp_path).overwrite and restarted(job, tmp_path).resume == ""  # requeued before it began
    os.utime(tmp_path / "checkpoint.pth", (1, 1))  # written by this job
    assert not restarted(job, tmp_path).overwrite and restarted(job, tmp_path).resume == "auto"
    again = job.checkpoint().function.checkpoint().function
    assert not again._args_of("17").overwrite


def test_a_restarted_evaluation_evaluates_the_same_file(tmp_path):
    (tmp_path / "checkpoint.pth").touch()
    words = ["--eval", "--resume", str(tmp_path / "best.pth"), "--output-dir", str(tmp_path)]
    job = run_with_submitit.Job(run_with_submitit.get_parser().parse_args(words))
    assert restarted(job, tmp_path).resume == str(tmp_path / "best.pth")


def test_a_restarted_job_resumes_its_own_checkpoint(tmp_path):
    args = run_with_submitit.get_parser().parse_args(["--job-dir", str(tmp_path), "--overwrite"])
    folder = tmp_path / "17"
    folder.mkdir()
    (folder / "checkpoint.pth").touch()
    first = run_with_submitit.Job(args)
    assert first._args_of("17").resume == ""
    restarted = pickle.loads(pickle.dumps(first.checkpoint().function))
    again = restarted._args_of("17")
    assert again.resume == "auto" and not again.overwrite
    assert restarted._args_of("18").resume == ""  # it was stopped before its first checkpoint
    assert run_with_submitit.Job.checkpoint is run_with_submitit.Job.__submitit_checkpoint__
    assert args.resume == "" and isinstance(args, argparse.Namespace)


def test_help_shows_this_command_and_the_folder_of_a_job(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = run_with_submitit.get_parser().format_help()
    assert "python main.py" not in said.partition("options:")[0]
    (output_dir,) = [line for line in said.splitlines() if line.lstrip().startswith("--output-dir")]
    assert output_dir.endswith("; default: JOB_DIR/<job id>")  # '' means that folder here, see `Job._args_of`


def test_job_flags_have_the_published_defaults():
    args = run_with_submitit.get_parser().parse_args([])
    assert (args.ngpus, args.nodes, args.timeout, args.partition) == (8, 2, 2800, None)
