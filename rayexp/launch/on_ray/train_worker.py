"""What a worker of Ray Train does. Imported by name in the workers; heavy imports wait until all of them are up."""

from __future__ import annotations

import functools
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.train

from rayexp.errors import RunError, UserError, WriteError
from rayexp.launch.faults import LostError, peer_lost
from rayexp.launch.job import WorkerJob
from rayexp.launch.on_ray import remote_writer


def member(fields: Mapping[str, Any]) -> str:
    """Train as one worker; returns `done` or `stopped`.

    Args:
        fields: a WorkerJob as JSON.

    Raises:
        UserError, RunError: training cannot go on, and would not another time.
        LostError: another worker is gone.
    """
    job = WorkerJob.from_json(fields)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    mine = remote_writer.take(job)
    try:
        return _train(job, rank, world, mine)
    except UserError as error:
        mine.log(rank, traceback.format_exc())
        where = f"node {socket.gethostname()} ({_address()}): " if job.nodes > 1 else ""
        raise UserError(f"{where}{error}") from None
    except WriteError as error:
        mine.log(rank, traceback.format_exc())
        raise RunError(error, f"; --resume {job.run.name} goes on from the newest checkpoint") from None
    except (RunError, LostError):
        mine.log(rank, traceback.format_exc())
        raise
    except Exception as error:
        mine.log(rank, traceback.format_exc())
        if peer_lost(error):
            raise LostError("lost touch with a peer") from None
        line = f"{type(error).__name__}: {_line(error)}"
        raise RunError(line, f" (rank {rank}; logs/rank_{rank}.log)") from None


def _train(job: WorkerJob, rank: int, world: int, mine: Any) -> str:
    from rayexp.engine import runtime
    from rayexp.engine.group import WorkerGroup, join, leave
    from rayexp.launch.worker import work

    device = runtime.device(job.device, _gpu(runtime.gpus()) if job.device == "cuda" else 0)
    meet: Callable[[], WorkerGroup] = WorkerGroup
    if world > 1:
        # NCCL refuses two workers on one GPU; gloo carries rows through host memory.
        nccl = device.type == "cuda" and not job.shared_gpu
        _choose_interface()
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        backend = "nccl" if nccl else "gloo"
        meet = functools.partial(join, world, rank, address, job.timeout_s, backend, device)
    status = work(job, meet, mine, device, world)
    leave()
    return status


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


def _choose_interface() -> None:
    """Name the interface that carries the node's address; gloo would look up the host's name, which may not resolve."""
    import psutil

    address = _address()
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
