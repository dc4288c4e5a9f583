"""The executor `slurm`: the runs of a study as an array of Slurm jobs, through submitit.

The study waits for its jobs and says how each went. It can be stopped and started again meanwhile: the jobs go on, and are
found again by the number that lies beside the folder of their run.
"""

import contextlib
import io
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from studies import local
from studies.job import Job
from studies.study import Study, StudyRun
from utils.errors import UserError
from utils.runs.files import write_bytes
from utils.runs.progress import LOGGER
from utils.runs.signals import Signals, Stopped

if TYPE_CHECKING:
    import submitit

POLL_SECONDS = 2.0
CLUSTER = "slurm"  # as submitit calls it; the tests also use its local and debug clusters
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, eq=False)
class Task:
    """A command for a job. log: where it prints; the job's number lies beside it. run: what the command makes, None for a
    process of a search."""

    name: str
    command: Sequence[str]
    log: Path
    run: StudyRun | None = None

    @property
    def number_file(self) -> Path:
        return self.log.with_suffix(".job")


def carry_out(study: Study, work: local.Work, command: Sequence[str]) -> None:
    """Makes the runs of `work`, each by `command --config FILE` in a job of its own.

    Raises Stopped after a signal, which the jobs hear nothing of.
    """
    tasks = []
    while (run := work.take()) is not None:
        try:
            config, log = local.config_file(run, run.config.device)
        except OSError as error:
            raise local.cannot_start(run, error) from error
        tasks.append(Task(f"{run.name} seed {run.seed}", [*command, "--config", str(config.resolve())], log.resolve(), run))
    for task, status, seconds in finished(study, tasks, study.jobs):
        record, failure = (None, status) if isinstance(status, str) else local.outcome(task.run, status, task.log)
        local.report(task.run, record, failure, seconds, task.log, work)


def finished(study: Study, tasks: Sequence[Task], at_once: int) -> Iterator[tuple[Task, int | str, float]]:
    """Submits what is not under way, `at_once` jobs at a time, and waits: each task as its job ends, with the command's exit
    status, or in words why there is none, and the seconds since the call."""
    jobs, started = _jobs(study, tasks, at_once), time.monotonic()
    with Signals() as signals:
        while jobs:
            for task in [task for task, each in jobs.items() if each.done()]:
                ended = jobs.pop(task)
                task.number_file.unlink(missing_ok=True)
                yield task, _status(ended), time.monotonic() - started
            if signals.received is not None:
                numbers = " ".join(sorted({each.job_id.partition("_")[0] for each in jobs.values()}))
                LOGGER.info(f"{signals.received.name}: {len(jobs)} jobs go on without this command, which started again waits "
                            f"for them; scancel {numbers} ends them")
                raise Stopped(signals.received)
            if jobs:
                time.sleep(POLL_SECONDS)


def _jobs(study: Study, tasks: Sequence[Task], at_once: int) -> dict[Task, "submitit.Job[int]"]:
    """The job of every task: one that is under way, or else a new one."""
    submitit = _import_submitit()
    folder = study.filepath.resolve() / "slurm"
    jobs = {task: each for task in tasks if (each := _under_way(submitit, folder, task))}
    for task, each in jobs.items():
        LOGGER.info(f"Queued    {task.name} as job {each.job_id} already ({task.number_file} says so)")
    new = [task for task in tasks if task not in jobs]
    if not new:
        return jobs
    said = io.StringIO()  # submitit prints what sbatch says, and raises it too
    try:
        with contextlib.redirect_stderr(said), submitit.helpers.clean_env():
            executor = _executor(submitit, study, folder, at_once)
            with executor.batch():
                made = [executor.submit(Job(task.command, task.log)) for task in new]
    except (OSError, RuntimeError) as error:  # submitit's own are RuntimeErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"executor: Slurm does not take the jobs ({reason}); mend 'slurm' in the study, or use --set "
                        "executor=local.") from error
    for task, each in zip(new, made, strict=True):
        write_bytes(task.number_file, each.job_id.encode())
        LOGGER.info(f"Submitted {task.name} as job {each.job_id}, log {task.log}")
    return jobs | dict(zip(new, made, strict=True))


def _executor(submitit: ModuleType, study: Study, folder: Path, at_once: int) -> "submitit.Executor":
    keys = study.file.slurm
    executor = submitit.AutoExecutor(folder=folder, cluster=CLUSTER, slurm_max_num_timeout=keys.timeouts)
    path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"  # a job finds `studies.job`
    executor.update_parameters(
        name=study.name, timeout_min=keys.minutes, cpus_per_task=keys.cpus, gpus_per_node=keys.gpus or None,
        mem_gb=keys.memory_gb, slurm_partition=keys.partition, slurm_account=keys.account, slurm_qos=keys.qos,
        slurm_constraint=keys.constraint, slurm_signal_delay_s=keys.notice_seconds, slurm_array_parallelism=at_once,
        slurm_setup=[path], slurm_additional_parameters={"requeue": True})
    return executor


def _under_way(submitit: ModuleType, folder: Path, task: Task) -> "submitit.Job[int] | None":
    """The job that an earlier start of the study has submitted, if it has not ended."""
    if not task.number_file.exists():
        return None
    job = submitit.SlurmJob(folder=folder, job_id=task.number_file.read_text().strip())
    return None if job.done(force_check=True) else job


def _status(job: "submitit.Job[int]") -> int | str:
    from submitit.core.utils import UncompletedJobError

    try:
        return job.result()
    except UncompletedJobError:  # also of a job that failed before its command ran
        return f"job {job.job_id} ended as {job.state} without an exit status; its own log is {job.paths.stderr}"


def _import_submitit() -> ModuleType:
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)  # its own choice, SIGUSR2, is not one that a run listens to
    try:
        import submitit
    except ImportError as error:
        raise UserError("executor: 'slurm' needs the package submitit; install it with: pip install submitit") from error
    missing = [command for command in ("sbatch", "srun") if CLUSTER == "slurm" and shutil.which(command) is None]
    if missing:
        raise UserError(f"executor: 'slurm' needs the command {missing[0]}, which is not on this machine; start the study "
                        "where jobs are submitted, or use --set executor=local.")
    return submitit
