"""Train in this process, without Ray."""

from __future__ import annotations

import traceback

from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError
from rayexp.launch.job import WorkerJob
from rayexp.launch.placement import Node
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter
from rayexp.system.cores import cores


def here() -> Node:
    """This machine."""
    from rayexp.engine import runtime

    return Node("this machine", cores(), runtime.gpus())


def on_gpu(config: ExperimentConfig) -> bool:
    """Whether this process computes on a GPU what trains nothing: on one that is here, unless `scaling.use_gpu` is
    false. (`true` asks for GPUs to train on; a run that had them is also judged where there is none.)"""
    return config.scaling.use_gpu is not False and here().gpus > 0


def attempt(run: Run, job: WorkerJob) -> str:
    """Train from the run's newest checkpoint, or from the beginning; returns `done` or `stopped`.

    Raises:
        UserError, RunError: training cannot go on. An unexpected error is logged and becomes a RunError.
    """
    from rayexp.engine import runtime
    from rayexp.engine.group import WorkerGroup
    from rayexp.launch.worker import work

    writer = RunWriter(run)
    try:
        return work(job, WorkerGroup, writer, runtime.device(job.device), world_size=0)
    except (UserError, RunError):
        raise
    except OSError as error:
        writer.log(0, traceback.format_exc())
        raise RunError(error, job.go_on) from error
    except Exception as error:
        writer.log(0, traceback.format_exc())
        line = " ".join(str(error).split())[:500]
        raise RunError(f"{type(error).__name__}: {line}", f" (see {run.logs / 'rank_0.log'})") from error
