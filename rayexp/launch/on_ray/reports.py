"""What a worker and Ray Train tell each other while it trains: epochs, and nodes that are about to be taken away.

Ray Train answers all workers of a run together, and only while its controller lives. So it is spoken to in a thread:
training waits for no answer, and can still save and stop when Ray is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, collective

from rayexp.launch.job import WorkerJob
from rayexp.runs.records import EpochRecord

LOOK_S = 5.0  # how often the workers ask whether a node is about to be taken away
CLOSE_S = 10.0  # for the last report; a Ray that is gone takes none
WATCHED = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
LOOK, END = -1, -2  # what rank 0 has the others do next; else the epoch to report


class Reports:
    """Reports epochs to Ray Train, whose callbacks and Result then have their metrics, and asks it about its nodes.

    Whatever is asked of Ray Train, every worker must ask in the same order: rank 0 says what comes next. Epochs that
    end faster than Ray takes reports are passed over, but for the last. A Result keeps only metrics that come with a
    checkpoint; ours is a pointer, whose `epoch.json` names the run and the epoch.

    Args:
        job: the run.
        rank: this worker's.
        log: is told, in a line, where Ray Train can be told no more; training goes on.
    """

    def __init__(self, job: WorkerJob, rank: int, log: Callable[[str], object]) -> None:
        self._job, self._rank, self._log = job, rank, log
        info: Callable[[], Any] | None = getattr(ray.train, "get_preemption_info", None)  # since Ray 2.60
        self._preemption = None if os.environ.get(WATCHED) == "0" else info
        self._records: deque[EpochRecord] = deque()
        self._news = threading.Condition()
        self._ended = self._leaving = False
        self._thread: threading.Thread | None = None

    def leaving(self) -> bool:
        """Whether a node of this run is about to be taken away: True once for every node, on some worker."""
        if self._thread is None:  # the first step: all workers have joined
            self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
            self._thread.start()
        leaving, self._leaving = self._leaving, False
        return leaving

    def epoch(self, record: EpochRecord) -> None:
        """Report an epoch, when Ray takes it; every worker must call it."""
        with self._news:
            self._records.append(record)
            self._news.notify()

    def close(self) -> None:
        """Wait until the last epoch is reported, for a while; every worker must call it."""
        with self._news:
            self._ended = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        try:
            self._converse()
        except Exception as error:  # whatever it is, the run directory has all that Ray would have been told
            self._log(f"Ray Train is told no more: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _converse(self) -> None:
        known: frozenset[str] = frozenset()
        while (what := collective.broadcast_from_rank_zero(self._next() if self._rank == 0 else 0)) != END:
            if what != LOOK:
                self._report(self._take(what))
            elif self._preemption is not None and (info := self._preemption()) is not None:
                self._leaving |= not known.issuperset(info.preempted_node_ids)
                known |= frozenset(info.preempted_node_ids)

    def _next(self) -> int:
        """What rank 0 has everyone do; waits for something to do."""
        with self._news:
            self._news.wait_for(lambda: self._records or self._ended, LOOK_S if self._preemption else None)
            return self._records[-1].epoch if self._records else END if self._ended else LOOK

    def _take(self, epoch: int) -> EpochRecord:
        """This worker's record of that epoch, waited for; those before it are dropped."""
        with self._news:
            while True:
                self._news.wait_for(lambda: self._records)
                record = self._records.popleft()
                if record.epoch == epoch:
                    return record

    def _report(self, record: EpochRecord) -> None:
        metrics = {key: value for key, value in record.to_json().items() if isinstance(value, int | float)}
        checkpoint = self._pointer(record.epoch) if self._rank == 0 else None
        ray.train.report(metrics, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    def _pointer(self, epoch: int) -> Checkpoint:
        folder = Path(ray.train.get_context().get_storage().experiment_fs_path)
        path = folder / f"epoch_{epoch:03d}"
        if folder.is_dir():  # the driver's temporary folder, which a worker on another host does not see
            with contextlib.suppress(OSError):  # a full disk
                path.mkdir(exist_ok=True)
                (path / "epoch.json").write_text(json.dumps({"run": str(self._job.run), "epoch": epoch}))
        return Checkpoint(path)
