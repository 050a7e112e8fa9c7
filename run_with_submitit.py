"""Run main.py as a SLURM job, or as local processes: `python run_with_submitit.py --help`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

import flags
from utils import UserError, escaped, last_line

REPOSITORY = str(Path(__file__).resolve().parent)
# Flags that act on SLURM only, and those that a debug job ignores as well.
SLURM_ONLY = ("cpus_per_task", "mem_gb", "job_name", "signal_delay", "partition", "constraint", "comment")
IGNORED = {"slurm": (), "local": SLURM_ONLY, "debug": (*SLURM_ONLY, "timeout", "max_timeouts")}


DESCRIPTION = """Run main.py as a SLURM job that resumes by itself after a timeout or preemption.

SLURM         python run_with_submitit.py --nodes 2 --ngpus 8 --data-path /path/to/imagenet
this machine  python run_with_submitit.py --cluster local --nodes 1 --ngpus 0 --data-set CIFAR

The flags of the SLURM job are at the end of this list.
"""


def get_parser() -> flags.Parser:
    """Build the parser: the flags of main.py and those of a job."""
    parser = flags.get_parser(prog="run_with_submitit.py", description=DESCRIPTION)
    parser.set_defaults(output_dir="")
    output_dir = next(action for action in parser._actions if action.dest == "output_dir")
    output_dir.help = "folder of log.txt, checkpoints and TensorBoard files; default: JOB_DIR/<job id>"
    add = parser.add_argument_group("job").add_argument
    natural, count = flags.in_range(int, 0), flags.in_range(int, 1)
    add(
        "--cluster",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="where to run; local: processes on this machine; debug: in this process",
    )
    add("--nodes", type=count, default=2, help="number of machines")
    add("--ngpus", type=natural, default=8, help="GPUs per machine, with one process each; 0: a CPU job")
    add("--tasks-per-node", type=count, help="processes per machine; default: one per GPU, one for a CPU job")
    add("--cpus-per-task", type=count, default=10, help="CPUs per process")
    memory = "GB of memory per machine; default: that of the cluster"
    add("--mem-gb", type=count, help=memory)
    add("--job-name", default="deit", help="name of the job in SLURM")
    add("--timeout", type=count, default=2800, help="time limit of the job in minutes")
    add(
        "--signal-delay",
        type=count,
        default=120,
        help="seconds before the time limit at which the job saves and is requeued",
    )
    add("--max-timeouts", type=natural, default=100, help="maximum number of times to requeue the job after a timeout")
    add("--partition", help="SLURM partition")
    add("--constraint", help="SLURM constraint, for example a GPU type")
    volta = {"dest": "constraint", "action": "store_const", "const": "volta32gb"}
    add("--use-volta32", **volta, help="same as --constraint volta32gb")
    add("--comment", help="SLURM comment")
    add("--job-dir", default="jobs", help="folder of the jobs' logs, on a file system shared by all machines")
    return parser


class Job:
    """One process of the job, called by submitit on every task.

    Slow imports are inside the methods, because submitit handles no signals while it unpickles the job.
    """

    def __init__(self, args: argparse.Namespace, restarted: bool = False, earlier: Sequence[int] = ()) -> None:
        self.args, self.restarted, self.repository = args, restarted, REPOSITORY
        self.earlier = list(earlier)  # `_saved` at submission: checkpoints of another run, which --overwrite deletes

    def __call__(self) -> None:
        sys.path.insert(0, self.repository)
        import main
        import utils

        environment = submitit.JobEnvironment()
        if environment.cluster == "slurm":
            # Remove the error that an earlier, preempted attempt of this task may have left.
            environment.paths.result_pickle.unlink(missing_ok=True)
        os.environ.pop("MASTER_PORT", None)  # a port inherited from an outer job may be in use
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if environment.cluster != "slurm":
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # a machine's own name may not resolve
        try:
            main.main(self._args_of(environment.job_id))
        except utils.Preempted as stopped:
            print(f"rank {environment.global_rank}: {utils.escaped(str(stopped))}", file=sys.stderr, flush=True)
            if stopped.signal in (signal.SIGTERM, signal.SIGINT):  # the job was canceled, or the cluster requeues it
                sys.exit(75)
            # Call submitit's own handler, which was replaced during the run. On the first task it requeues the job.
            signal.raise_signal(stopped.signal)

    def _args_of(self, job_id: str) -> argparse.Namespace:
        folder = Path(self.args.output_dir or Path(self.args.job_dir) / job_id)
        changes: dict[str, Any] = {"output_dir": str(folder)}
        restarted = self.restarted or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        if restarted and _saved(folder) not in ([], self.earlier) and not self.args.eval:
            changes |= {"resume": "auto", "overwrite": False}
        return argparse.Namespace(**{**vars(self.args), **changes})

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return what submitit runs after a preemption or timeout: the same job, resumed."""
        return submitit.helpers.DelayedSubmission(Job(self.args, True, self.earlier))

    __submitit_checkpoint__ = checkpoint  # name in newer submitit documentation


def _saved(folder: Path) -> list[int]:
    """Return the times (ns) at which the checkpoints in a folder were written."""
    return [path.lstat().st_mtime_ns for path in sorted(folder.glob("checkpoint*.pth"))]


def _check_job(args: argparse.Namespace) -> None:
    """Check the flags of the job.

    Raises:
        UserError: if they contradict each other, or have no effect on this cluster.
    """
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto: the folder of each new job is empty; add --output-dir FOLDER")
    if args.cluster != "slurm" and args.nodes != 1:
        raise UserError(f"--nodes {args.nodes}: --cluster {args.cluster} has one machine; pass --nodes 1")
    if args.ngpus and args.tasks_per_node and args.tasks_per_node != args.ngpus:
        raise UserError(
            f"--tasks-per-node {args.tasks_per_node}: {args.ngpus} GPUs need one task each; "
            f"pass --ngpus {args.tasks_per_node}, or drop --tasks-per-node"
        )
    tasks = args.tasks_per_node or max(1, args.ngpus)
    if args.cluster == "debug" and tasks > 1:
        name = "tasks_per_node" if args.tasks_per_node else "ngpus"
        raise UserError(f"{flags.spelled(name)} {tasks}: --cluster debug has one process; pass {flags.spelled(name)} 1")
    for name in ("job_dir", "job_name", "partition", "constraint", "comment"):  # written into a shell script
        if not (getattr(args, name) or "").isprintable():
            raise UserError(f"{flags.spelled(name)} {getattr(args, name)}: has a control character; drop it")
    defaults = get_parser().parse_args([])
    for name in IGNORED[args.cluster]:
        if getattr(args, name) != getattr(defaults, name):
            raise UserError(f"{flags.spelled(name)}: has no effect with --cluster {args.cluster}; drop it")


def submit(args: argparse.Namespace) -> submitit.Job:
    """Submit the job to SLURM, or start it on this machine.

    Raises:
        UserError: if flags contradict each other, SLURM is missing or refuses the job, or the job's folder cannot be
            written.
    """
    _check_job(args)
    flags.check_flags(argparse.Namespace(**{**vars(args), "output_dir": args.output_dir or args.job_dir}))
    # A relative path may mean another folder on another machine.
    args = argparse.Namespace(**{**vars(args), "job_dir": str(Path(args.job_dir).resolve())})
    try:
        Path(args.job_dir).mkdir(parents=True, exist_ok=True)
        return _executor(args).submit(Job(args, earlier=_saved(Path(args.output_dir)) if args.output_dir else ()))
    except OSError as error:
        what = f"{error.strerror}: {error.filename}"
        raise UserError(f"--job-dir {args.job_dir}: cannot be written ({what}); name another folder") from None
    except submitit.core.utils.FailedJobError as error:  # with what sbatch printed
        raise UserError(
            f"--cluster {args.cluster}: the job is refused ({last_line(error)}); check --partition, --constraint, "
            f"--timeout, --nodes and --mem-gb"
        ) from None


def _executor(args: argparse.Namespace) -> submitit.AutoExecutor:
    """Build what submits jobs like this one."""
    timeouts = {f"{args.cluster}_max_num_timeout": args.max_timeouts} if args.cluster != "debug" else {}
    try:
        executor = submitit.AutoExecutor(folder=Path(args.job_dir) / "%j", cluster=args.cluster, **timeouts)
    except RuntimeError as error:
        raise UserError(f"--cluster {args.cluster}: {error}; use --cluster local for this machine") from None
    slurm = {"partition": args.partition, "constraint": args.constraint, "comment": args.comment}
    executor.update_parameters(
        name=args.job_name,
        nodes=args.nodes,
        tasks_per_node=args.tasks_per_node or max(1, args.ngpus),
        gpus_per_node=args.ngpus,
        cpus_per_task=args.cpus_per_task,
        timeout_min=args.timeout,
        slurm_signal_delay_s=args.signal_delay,
        slurm_srun_args=["--kill-on-bad-exit=1"],  # one failed task ends the others, which would wait for it
        **({"mem_gb": args.mem_gb} if args.mem_gb else {}),
        **{f"slurm_{name}": value for name, value in slurm.items() if value},
    )
    return executor


def cli(argv: list[str] | None = None) -> None:
    """Submit the job; on this machine, wait until it ends."""
    try:
        args = flags.parse_command(argv, get_parser())
        job = submit(args)
    except UserError as error:
        print(f"run_with_submitit.py: error: {escaped(str(error))}", file=sys.stderr)
        sys.exit(2)
    print(f"job {job.job_id}: logs in {Path(args.job_dir).resolve() / job.job_id}", flush=True)
    if args.cluster == "slurm":
        return
    try:
        job.results()
    except Exception as error:
        print(f"run_with_submitit.py: job {job.job_id} failed: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        with contextlib.suppress(OSError):
            (Path(args.job_dir) / "%j").rmdir()  # submitit's local executor also creates a folder with the literal name


if __name__ == "__main__":
    cli()
