"""What a worker of Ray Train does. Imported by name in the workers; heavy imports wait until all of them are up."""

from __future__ import annotations

import datetime
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import collective

from rayexp.errors import RunError, UserError, WriteError
from rayexp.launch.faults import LostError, peer_lost, why_lost
from rayexp.launch.job import WorkerJob
from rayexp.launch.on_ray import remote_writer, reports
from rayexp.launch.on_ray.rendezvous import node_address
from rayexp.launch.worker_fault import WorkerFaultError

if TYPE_CHECKING:
    from rayexp.engine.group import WorkerGroup


def train_loop(fields: Mapping[str, Any]) -> None:
    """Train as one worker, in the process group that Ray Train has set up; run.json says how it ended.

    Args:
        fields: a WorkerJob as JSON.

    Raises:
        WorkerFaultError: a UserError or RunError (training cannot go on, and would not another time), or a LostError
            (another worker is gone).
    """
    try:
        _train_loop(WorkerJob.from_json(fields))
    except (UserError, RunError, LostError) as error:
        raise WorkerFaultError.of(error) from None


def _train_loop(job: WorkerJob) -> None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    writer = remote_writer.open_writer(job)
    try:
        _train(job, rank, world, writer)
    except UserError as error:
        writer.log(rank, traceback.format_exc())
        where = f"node {socket.gethostname()} ({node_address()}): " if job.nodes > 1 else ""
        raise UserError(f"{where}{error}") from None
    except WriteError as error:
        writer.log(rank, traceback.format_exc())
        raise RunError(error, job.go_on) from None
    except (RunError, LostError):
        writer.log(rank, traceback.format_exc())
        raise
    except Exception as error:
        writer.log(rank, traceback.format_exc())
        if peer_lost(error):
            raise LostError(why_lost(error)) from None
        line = f"{type(error).__name__}: {_line(error)}"
        raise RunError(line, f" (rank {rank}; logs/rank_{rank}.log)") from None


def _train(job: WorkerJob, rank: int, world: int, writer: Any) -> None:
    from rayexp.engine import runtime
    from rayexp.engine.group import WorkerGroup
    from rayexp.launch.worker import work

    device = runtime.device(job.device, _gpu(runtime.gpus()) if job.device == "cuda" else 0)
    # NCCL refuses two workers on one GPU; gloo carries gradient buffers through host memory.
    nccl = device.type == "cuda" and not job.shared_gpu

    def join() -> WorkerGroup:
        collective.barrier()  # without a time limit: some worker may have to pack its data first
        return WorkerGroup.join(
            backend="nccl" if nccl else None, timeout=datetime.timedelta(seconds=job.timeout_s), device=device
        )

    join_group: Callable[[], WorkerGroup] = join if world > 1 else WorkerGroup
    told = reports.Reports(job, rank, lambda line: writer.log(rank, line))
    work(job, join_group, writer, device, world, leaving=told.leaving, epoch_done=told.epoch)
    told.close()


def _gpu(there: int) -> int:
    """The index of the CUDA device that Ray has given to this worker; Ray Train shows each all of its node's."""
    if not there:
        raise UserError(
            f"scaling.use_gpu: Ray counts GPUs on {socket.gethostname()}, but PyTorch sees no CUDA device there; "
            "allowed: false"
        )
    given = str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", given).split(",")
    return visible.index(given) if given in visible else 0


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
