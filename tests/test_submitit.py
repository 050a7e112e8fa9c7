"""Jobs through submitit, without a SLURM: its local executor starts real processes."""

import argparse
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
        (["--ngpus", "8", "--tasks-per-node", "1"], "--tasks-per-node 1: uses 1 of 8 GPUs"),
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
