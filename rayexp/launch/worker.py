"""What every worker does, wherever it runs: open the data, take up the newest state, train, and let rank 0 write.

What comes in is a `WorkerJob` (launch.job).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rayexp import workloads
from rayexp.config import passed_over
from rayexp.engine import checkpoint, link, runtime
from rayexp.engine.checkpoint import FIELDS, TENSORS, CheckpointWriter, State
from rayexp.engine.fingerprint import differences, fingerprint
from rayexp.engine.group import WorkerGroup, join
from rayexp.engine.runtime import Runtime
from rayexp.engine.step import ControlFlags
from rayexp.engine.trainer import EpochDone, StepDone, Trainer
from rayexp.engine.workload import Workload
from rayexp.errors import UserError
from rayexp.launch.alike import WorkerInfo, everyone, unlike, unlike_weights
from rayexp.launch.fence import end_with_parent
from rayexp.launch.job import WorkerJob
from rayexp.runs.manifest import digest
from rayexp.runs.writer import RunWriter

PROGRESS_SECONDS = 0.3


def work(
    job: WorkerJob,
    join: Callable[[], WorkerGroup],
    pen: RunWriter,
    device: torch.device,
    world: int = 1,
    world_size: int | None = None,
) -> str:
    """Train as one worker of a group; returns `done` or `stopped`.

    Args:
        job: what to train, and how.
        join: joins the group. Called when this worker's data is there: it may have to pack it first, for as long as
            that takes, and the others' patience with a silent worker begins when all have joined.
        pen: only rank 0 writes with it; every rank logs. Anything with a Recorder's methods will do.
        device: where this worker computes.
        world: the group's size.
        world_size: what records say (0: in-process); None: the group's size.

    Raises:
        UserError: the configuration or the data is wrong, or the workers are unlike where they must not be.
        RunError: training cannot go on.
    """
    entered = time.monotonic()
    config = job.config
    try:
        with runtime.configure(config, device, config.shards // world, job.cpus) as settled:
            workload = workloads.open_workload(config)
            group = join()
            size = group.world if world_size is None else world_size
            return _Worker(job, group, pen, settled, workload, size, entered).run()
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UserError(
            f"reduction: exact takes deterministic operations only, and {operation} has no such kernel for "
            f"{device.type}; allowed with this model: ddp"
        ) from error


class _Worker:
    def __init__(
        self,
        job: WorkerJob,
        group: WorkerGroup,
        pen: RunWriter,
        settled: Runtime,
        workload: Workload,
        world_size: int,
        entered: float,
    ) -> None:
        self.job, self.config, self.group, self.pen = job, job.config, group, pen
        self.runtime, self.workload, self.world_size, self.entered = settled, workload, world_size, entered
        self.lead = group.rank == 0
        self.described = self.workload.describe()
        self.fingerprint = fingerprint(self.runtime)
        self.session = Trainer(self.config, self.workload, group, self.runtime)
        self.writer = CheckpointWriter()
        self.buffers: dict[str, torch.Tensor] = {}
        self.steps: list[StepDone] = []  # of the present epoch
        self.energy: dict[str, float] = {}
        self.warnings: list[str] = []
        self.saved = self.told = time.monotonic()

    def run(self) -> str:
        where = f"{self.runtime.device}, {self.runtime.replicas} lanes, pid {os.getpid()} on {socket.gethostname()}"
        self._log(f"rank {self.group.rank} of {self.group.world}: {where}")
        if self.lead:
            for warning in self._doubts():
                self._warn(warning)
        self._resume()
        workers = self._compare()
        measured = None
        if self.job.measure_link and self.group.world > 1:
            measured = link.measure(self.group, self.runtime, self.session.stepper.exchange_bytes)
        if self.lead:
            self._begin(measured, workers)
        status = "done"
        self.energy = self._energy()
        try:
            for event in self.session.train(self._wish):
                if isinstance(event, EpochDone):
                    self._epoch(event)
                else:
                    self._step(event)
                    if event.stopped:
                        status = "stopped"
            self.writer.wait()
        finally:
            with contextlib.suppress(*([Exception] if sys.exc_info()[0] else [])):
                self.writer.close()
        if self.lead:
            self.pen.end(status)
        return status

    # ------------------------------------------------------------------ beginning

    def _resume(self) -> None:
        files: dict[str, bytes] | None = None
        if self.lead:
            files, notes = self.pen.resume()
            for note in notes:
                self._warn(note)
        words = self.group.broadcast(files[FIELDS] if files else b"")
        if not words:
            return
        tensors = self.group.broadcast(files[TENSORS] if files else None)
        state = checkpoint.decode({FIELDS: words, TENSORS: tensors})
        self.session.load(state)
        self._log(f"resumed at epoch {self.session.epoch + 1}, step {self.session.step}")
        self._same_data(state.fields.get("data"))
        then = state.fields.get("fingerprint")
        if self.lead and then and (differs := ", ".join(differences(then, self.fingerprint))):
            self._warn(f"resumed under another fingerprint: {differs}; the bits may differ from here on")

    def _doubts(self) -> list[str]:
        """What this machine, this data or another setting makes of the configuration, and it does not say."""
        lines = passed_over(self.config, self.runtime.device.type == "cuda")
        if self.config.precision == "bf16" and not self.runtime.has_bf16():
            lines.append("precision: this processor has no instructions for bf16; fp32 is many times as fast here")
        images, batch = self.described.get("train_samples"), self.config.batch_size
        if self.workload.unit == "images" and images is not None and batch > images:
            lines.append(f"batch_size: {batch} is above the {images} training images: every step takes all of them")
        return lines

    def _compare(self) -> list[WorkerInfo]:
        """All workers, of whom none is unlike the others where the reduction does not allow it."""
        weights = checkpoint.sha(self.session.replicated().weights())
        workers = everyone(self.group, socket.gethostname(), self.fingerprint, weights)
        exact = self.config.reduction == "exact"
        if found := unlike(workers):
            if exact:
                raise UserError(f"reduction: exact needs workers that compute alike, and {found}; allowed here: ddp")
            if self.lead:
                self._warn(f"the workers do not compute alike: {found}")
        if found := unlike_weights(workers):
            if exact:
                raise UserError(f"reduction: exact needs the same weights everywhere, and {found}; allowed here: ddp")
            # As DistributedDataParallel does.
            state = checkpoint.snapshot(self.session.replicated(), {})
            files = checkpoint.encode(state) if self.lead else {}
            sent = {name: self.group.broadcast(files.get(name)) for name in (FIELDS, TENSORS)}
            self.session.load(checkpoint.decode(sent))
        return workers

    def _warn(self, warning: str) -> None:
        self._log(warning)
        self.warnings.append(warning)
        self._tell({})

    def _tell(self, progress: dict[str, Any]) -> None:
        # Warnings every time: a driver looks when it looks.
        self.pen.progress(progress | ({"warnings": self.warnings} if self.warnings else {}))

    def _same_data(self, then: Mapping[str, str] | None) -> None:
        now = self._words()["data"]
        if then is not None and then != now:
            differs = ", ".join(f"{k} {str(then.get(k))[:12]} -> {now[k][:12]}" for k in now if then.get(k) != now[k])
            raise UserError(
                f"data: {self.config.data.root or self.config.data.name} does not hold the data of this run ({differs})"
            )

    def _begin(self, measured: Mapping[str, float] | None, workers: Sequence[WorkerInfo]) -> None:
        described = self.described
        layout = self.session.layout
        meta = {
            "status": "running",
            "world_size": self.world_size,
            "device": str(self.runtime.device.type),
            "lanes": self.runtime.replicas,
            "fingerprint": self.fingerprint,
            "workers": [worker.to_json() for worker in workers],
            "parameters": sum(slot.size for slot in layout.params),
            "exchange_bytes": self.session.stepper.exchange_bytes,
            "link": measured,
            "steps_per_epoch": self.session.steps,
            "warnings": self.warnings,
            "data": {k: v for k, v in described.items() if not isinstance(v, list)},
        }
        self.pen.begin(meta, described)

    # ------------------------------------------------------------------ while it runs

    def _wish(self) -> ControlFlags:
        last = self.job.max_steps
        stop = last is not None and self.session.global_step + 1 >= last
        if not self.lead:
            return ControlFlags(stop, False)
        now, c = time.monotonic(), self.config.checkpoint
        save = c.every_seconds is not None and now - self.saved >= c.every_seconds and self.writer.idle()
        return ControlFlags(stop or self.pen.stop_requested(), save)

    def _step(self, event: StepDone) -> None:
        if event.first and self.lead:
            self.pen.first_step(self.job.started, time.monotonic() - self.entered)
        if self.job.trace:
            self._trace(event)  # before the snapshot: a step that is saved is not done again
        every = self.config.checkpoint.every_steps
        due = event.save or (every is not None and self.session.global_step % every == 0)
        if event.stopped or (due and event.step < event.steps):
            self._snapshot()
        if not self.lead:
            return
        self.steps.append(event)
        now = time.monotonic()
        if now - self.told >= PROGRESS_SECONDS or event.step == event.steps:
            self.told = now
            self._tell(
                {
                    "epoch": event.epoch,
                    "epochs": self.config.epochs,
                    "step": event.step,
                    "steps": event.steps,
                    "loss": event.loss,
                    "rate": event.rate,
                    "unit": self.workload.unit,
                }
            )

    def _trace(self, event: StepDone) -> None:
        state = self.session.state()  # every worker must call it: each has the carried state of its own shards
        if self.lead:
            hashes = {name: checkpoint.sha({name: tensor}) for name, tensor in state.tensors.items()}
            weights, step = checkpoint.sha(state.weights()), self.session.global_step
            self.pen.trace({"step": step, "weights_sha": weights, "tensors": hashes, "rate": event.rate})

    def _snapshot(self) -> None:
        state = self.session.state()
        self.saved = time.monotonic()
        if self.lead:
            held = self._hold(state)
            step = self.session.global_step
            self.writer.submit(lambda: self.pen.snapshot(step, checkpoint.encode(held, self._words())))

    def _epoch(self, event: EpochDone) -> None:
        start = time.perf_counter()
        then, self.energy = self.energy, self._energy()
        if not self.lead:
            return
        held = self._hold(self.session.state())
        self.saved = time.monotonic()
        blocked = time.perf_counter() - start
        seconds = dict(event.record.seconds)
        seconds["checkpoint"] += blocked
        seconds["total"] += blocked
        energy = sum(self.energy[gpu] - then[gpu] for gpu in self.energy.keys() & then.keys()) or None
        record = dataclasses.replace(event.record, seconds=seconds, world_size=self.world_size, energy_joules=energy)
        predictions = event.predictions
        steps, self.steps = step_times(self.steps), []

        def write() -> None:
            weights, state = checkpoint.sha(held.weights()), checkpoint.sha(held.tensors)
            judged = predictions.to_npz()
            row = dataclasses.replace(
                record, weights_sha=weights, state_sha=state, predictions_sha=digest(judged)
            ).to_json()
            files = checkpoint.encode(
                held, {**self._words(), "weights_sha": weights, "state_sha": state, "record": row}
            )
            self.pen.epoch(row, files, judged, {"epoch": record.epoch, **steps})

        self.writer.submit(write)
        if record.epoch == 1 and not self.job.trace:
            # In the background and after the first epoch: a picture must not disturb the first steps' times.
            from rayexp.runs.tensorboard import graph_events

            model = copy.deepcopy(self.session.master.model).cpu().eval()
            self.writer.submit(lambda: self.pen.graph(graph_events(model, self.workload.example())))

    def _energy(self) -> dict[str, float]:
        """The energy counters of all workers' GPUs; every worker must call it."""
        if self.runtime.device.type != "cuda":
            return {}
        parts = self.group.gather(json.dumps(self.runtime.energy()).encode())
        return {gpu: joules for part in parts for gpu, joules in json.loads(part).items()}

    def _hold(self, state: State) -> State:
        """A copy that the writer may read while training goes on; waits for the writer, which reads the same."""
        self.writer.wait()
        return checkpoint.snapshot(state, self.buffers)

    def _words(self) -> dict[str, Any]:
        data = {key: self.described[key] for key in ("train_sha", "val_sha")}
        config = self.config.model_dump(mode="json")
        return {"fingerprint": self.fingerprint, "data": data, "config": config}

    def _log(self, text: str) -> None:
        self.pen.log(self.group.rank, text)


def step_times(steps: list[StepDone]) -> dict[str, Any]:
    """The steps of an epoch in columns; see `runs.Run.steps`. Microseconds are kept."""
    names = steps[0].seconds if steps else {}
    return {
        "first": bool(steps) and steps[0].first,
        "count": [step.count for step in steps],
        "total": [round(step.count / step.rate, 6) for step in steps],
        **{name: [round(step.seconds[name], 6) for step in steps] for name in names},
    }


def main(argv: list[str]) -> None:
    """`python -m rayexp.launch.worker JOB.json RANK WORLD HOST:PORT`: one worker of launch.processes."""
    from rayexp.runs.run import Run

    end_with_parent()
    job = WorkerJob.read(Path(argv[0]))
    rank, world = int(argv[1]), int(argv[2])
    there = runtime.gpus() if job.device == "cuda" else 0
    device = runtime.device(job.device, rank % max(1, there))
    # NCCL refuses two workers on one GPU.
    backend = "nccl" if 1 < world <= there else "gloo"
    meet = functools.partial(join, world, rank, argv[3], job.timeout_s, backend, device)
    work(job, meet, RunWriter(Run(job.run)), device, world)
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. Taking down gloo's threads in turn aborts now and then when another worker is gone already.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
