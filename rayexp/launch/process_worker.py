"""What a worker of launch.processes does.

python -m rayexp.launch.process_worker JOB.json RANK WORLD HOST:PORT PARENT
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from rayexp.engine import runtime
from rayexp.engine.group import join
from rayexp.errors import RunError, UserError
from rayexp.launch.faults import LostError, peer_lost, why_lost
from rayexp.launch.fence import end_with_parent
from rayexp.launch.job import WorkerJob
from rayexp.launch.worker import work
from rayexp.launch.worker_fault import WorkerFaultError
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter


def main(argv: list[str]) -> None:
    """Train as one worker, and end this process.

    Args:
        argv: the job's file, this worker's rank, how many there are, where rank 0 listens, and the process that has
            started this one.

    Raises:
        WorkerFaultError: a UserError or RunError, or another worker is lost, for the process that waits for this one.
    """
    end_with_parent(int(argv[4]))
    job = WorkerJob.read(Path(argv[0]))
    rank, world = int(argv[1]), int(argv[2])
    gpus = runtime.gpus() if job.device == "cuda" else 0
    device = runtime.device(job.device, rank % max(1, gpus))
    # NCCL refuses two workers on one GPU.
    backend = "nccl" if 1 < world <= gpus else "gloo"
    join_group = functools.partial(join, world, rank, argv[3], job.timeout_s, backend, device)
    try:
        work(job, join_group, RunWriter(Run(job.run)), device, world)
    except (UserError, RunError) as error:
        raise WorkerFaultError.of(error) from error
    except Exception as error:
        if peer_lost(error):
            raise WorkerFaultError.of(LostError(why_lost(error))) from error
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. Ending gloo's threads in the ordinary way aborts now and then when another worker is gone already.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
