"""A job on a real SLURM, started by `slurm.sh`: time limit, requeue, preemption, cancellation in sequence."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny

from tools import chaos

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).with_name("slurm.sh")
FLAGS = [*tiny.TINY, "--epochs", "200", "--batch-size", "16", "--drop", "0.1", "--warmup-epochs", "1"]
FLAGS += ["--model-ema-decay", "0.99", "--num-workers", "1"]  # SLURM signals data-loader workers as well
JOB = ["--nodes", "1", "--ngpus", "0", "--tasks-per-node", "2", "--cpus-per-task", "1", "--partition", "low"]


@pytest.fixture(scope="module")
def slurm():
    """Return the environment variables of a running SLURM."""
    if shutil.which("slurmctld", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip("slurmctld not found")
    folder = tempfile.mkdtemp(prefix="slurm", dir="/tmp")
    try:
        subprocess.run([SCRIPT, "start", folder], check=True, timeout=120)
        path = tiny.environment()["PATH"]
        yield {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{path}", "GLOO_SOCKET_IFNAME": "lo"}
    finally:
        subprocess.run([SCRIPT, "stop", folder], timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


class Submitted:
    """A submitted job and the events in its life."""

    def __init__(self, slurm, job, folder):
        self.environment, self.id, self.folder = tiny.environment(**slurm), job, folder
        self.start = time.monotonic()

    def ask(self, *command):
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def show(self, key):
        return re.search(rf"\b{key}=(\S+)", self.ask("scontrol", "-o", "show", "job", self.id))[1]

    @property
    def epochs(self):
        return len(tiny.log_of(self.folder)) if (self.folder / "log.txt").exists() else 0

    def tell(self, what):
        passed = time.monotonic() - self.start
        print(
            f"{passed:5.0f} s  job {self.id}  {self.show('JobState'):10s} restarts {self.show('Restarts')}  "
            f"epochs {self.epochs:2d}  {what}"
        )

    def wait(self, what, until, seconds=240):
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, f"not {what}: {self.logs()}"
            time.sleep(0.3)
        self.tell(what)

    def logs(self):
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*_log.*")))

    def wait_for_restart(self, number, epochs):
        self.wait(f"restarted {number} times", lambda: int(self.show("Restarts")) >= number)
        self.wait("training again", lambda: self.epochs > epochs)

    def cancel(self):
        self.ask("scancel", self.id)
        self.wait("canceled", lambda: self.show("JobState") == "CANCELLED" and not self.ask("squeue", "-h"))


def submit(slurm, job_dir, *flags):
    output = tiny.run("run_with_submitit.py", *JOB, "--job-dir", job_dir, *flags, **slurm)
    job = re.match(r"job (\d+): logs in ", output)[1]
    return Submitted(slurm, job, job_dir / job)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the folder of the same two-process run without interruptions."""
    return tmp_path_factory.mktemp("undisturbed") / "output"


def assert_same_epochs(undisturbed, job):
    """Check that log.txt has each epoch once, with exactly the losses of the uninterrupted run."""
    ours = tiny.log_of(job.folder)
    run = chaos.Run(undisturbed, FLAGS, processes=2, restarts=0)  # next to the job, it would slow its start down
    logged = undisturbed / "log.txt"
    job.wait("overtaken by the undisturbed run", lambda: logged.exists() and len(tiny.log_of(undisturbed)) >= len(ours))
    chaos.kill(run.living())
    theirs = tiny.log_of(undisturbed)[: len(ours)]
    for record in (*ours, *theirs):
        del record["images_per_second"]
    assert [record["epoch"] for record in ours] == list(range(len(ours)))
    assert ours == theirs


def test_a_job_survives_everything_and_stays_bitwise_identical(slurm, undisturbed, tmp_path):
    # It times out after a minute, of which SLURM looks at its clock every half. A slow start may be all of that.
    job = submit(slurm, tmp_path / "jobs", *FLAGS, "--timeout", "1", "--signal-delay", "10")
    job.wait("training", lambda: job.epochs >= 1)

    job.ask("sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    job.tell("is preempted by a job of higher priority")
    job.wait_for_restart(1, job.epochs)

    job.ask("scontrol", "requeue", job.id)
    job.tell("is requeued by its administrator")
    job.wait_for_restart(2, job.epochs)

    job.wait("timed out", lambda: int(job.show("Restarts")) >= 3)
    job.wait("training again", lambda epochs=job.epochs: job.epochs > epochs)
    job.cancel()
    for path in job.folder.glob("*_log.out"):  # of the last start
        assert "completed successfully" not in path.read_text().rpartition("Starting with")[2]
    assert "stopped by SIGTERM; epoch" in job.logs()
    assert_same_epochs(undisturbed, job)
    names = {path.name for path in job.folder.iterdir()}
    assert {"config.json", "log.txt", "checkpoint.pth", "checkpoint_previous.pth", "best.pth", "tensorboard"} <= names
    assert {f"{job.id}_{rank}_log.{kind}" for rank in (0, 1) for kind in ("out", "err")} <= names
    assert job.logs().count("rank 0: stopped by SIG") >= 3  # it saved first whenever it was stopped while it trained


def test_a_task_that_fails_ends_the_job(slurm, tmp_path):
    job = submit(slurm, tmp_path / "jobs", *FLAGS, "--tasks-per-node", "1", "--batch-size", "4096")
    job.wait("failed", lambda: job.show("JobState") == "FAILED")
    assert "--batch-size 4096" in job.logs()


def test_a_job_trains_to_its_end(slurm, tmp_path):
    job = submit(slurm, tmp_path / "jobs", *FLAGS, "--tasks-per-node", "1", "--epochs", "2")
    job.wait("over", lambda: job.show("JobState") not in ("PENDING", "RUNNING", "COMPLETING"))
    assert job.show("JobState") == "COMPLETED" and job.epochs == 2, job.logs()


def test_a_batch_script_of_one_s_own_requeues_itself(slurm, undisturbed, tmp_path):
    # as docs/resuming.md has it; that script's time would be up instead
    flags = [*FLAGS, "--output-dir", tmp_path / "output", "--resume", "auto"]
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n"
        f"srun --kill-on-bad-exit=1 {sys.executable} main.py {' '.join(map(str, flags))}\n"
        "status=$?\n"
        "[ $status = 75 ] && scontrol requeue $SLURM_JOB_ID\n"
        "exit $status\n"
    )
    options = ["-p", "low", "-n", "2", "--requeue", "--parsable", "--open-mode=append", "-o", tmp_path / "0_log.out"]
    command = ["sbatch", *map(str, options), str(script)]
    environment = tiny.environment(**slurm)
    id = subprocess.run(
        command, cwd=tiny.REPOSITORY, env=environment, check=True, capture_output=True, text=True
    ).stdout
    job = Submitted(slurm, id.strip(), tmp_path / "output")
    job.wait("training", lambda: job.epochs >= 1)
    job.ask("scancel", "--signal=USR1", job.id)
    job.tell("is sent SIGUSR1")
    job.wait_for_restart(1, job.epochs)
    job.cancel()
    assert_same_epochs(undisturbed, job)
