"""What a worker and Ray Train tell each other while it trains: epochs, and nodes that are about to be taken away."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, collective

from rayexp.launch.job import WorkerJob
from rayexp.runs.records import EpochRecord

LOOK_S = 5.0  # how often the workers ask whether a node is about to be taken away
WATCHED = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


class Reports:
    """Reports the epochs to Ray Train, whose callbacks and Result then have their metrics.

    A Result keeps only metrics that come with a checkpoint. Ours is a pointer: `epoch.json` names the run and the
    epoch, whose files lie in the run directory.

    Args:
        job: the run.
        rank: this worker's; every worker reports, rank 0 with the checkpoint.
    """

    def __init__(self, job: WorkerJob, rank: int) -> None:
        self._job, self._rank = job, rank

    def epoch(self, record: EpochRecord) -> None:
        """Report an epoch; every worker must call it."""
        metrics = {key: value for key, value in record.to_json().items() if isinstance(value, int | float)}
        checkpoint = self._pointer(record.epoch) if self._rank == 0 else None
        ray.train.report(metrics, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    def _pointer(self, epoch: int) -> Checkpoint:
        folder = Path(ray.train.get_context().get_storage().experiment_fs_path)
        path = folder / f"epoch_{epoch:03d}"
        if folder.is_dir():  # the driver's temporary folder, which a worker on another host does not see
            path.mkdir(exist_ok=True)
            (path / "epoch.json").write_text(json.dumps({"run": str(self._job.run), "epoch": epoch}))
        return Checkpoint(path)


class Preemption:
    """Whether a node of this run is about to be taken away: then it is time for a snapshot.

    Ray Train answers all workers together, so every worker must ask before every step, and all of them look at the same
    steps: rank 0 says how many steps ahead the next look is, so that there is one every LOOK_S seconds. A Ray that has
    no such answer (before 2.60), or does not watch its nodes, is not asked.
    """

    def __init__(self) -> None:
        self._info: Callable[[], Any] | None = getattr(ray.train, "get_preemption_info", None)
        if os.environ.get(WATCHED) == "0":
            self._info = None
        self._step, self._next = 0, 2
        self._looked = (time.monotonic(), 1)
        self._known: frozenset[str] = frozenset()

    def __call__(self) -> bool:
        """Ask; True once for every node."""
        self._step += 1
        if self._info is None or self._step < self._next:
            return False
        info = self._info()
        self._next = self._step + collective.broadcast_from_rank_zero(self._ahead())
        nodes = frozenset(info.preempted_node_ids) if info is not None else frozenset()
        new = nodes - self._known
        self._known |= nodes
        return bool(new)

    def _ahead(self) -> int:
        now, (then, step) = time.monotonic(), self._looked
        self._looked = (now, self._step)
        return max(1, round(LOOK_S * (self._step - step) / max(now - then, 1e-6)))
