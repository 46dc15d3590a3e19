"""What every worker does, wherever it runs: open the data, load the newest state, train; rank 0 writes the run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rayexp import workloads
from rayexp.config import passed_over
from rayexp.config.references import provide
from rayexp.display import counted
from rayexp.engine import checkpoint, link, runtime
from rayexp.engine.checkpoint import FIELDS, TENSORS
from rayexp.engine.contract import operation_of, refusal
from rayexp.engine.diagnosis import absurd_loss
from rayexp.engine.fingerprint import differences, fingerprint
from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import Runtime
from rayexp.engine.settings import WORKSPACE
from rayexp.engine.step import ControlFlags, Stepper
from rayexp.engine.trainer import EpochDone, StepDone, Trainer
from rayexp.engine.workload import Workload
from rayexp.errors import RunError, UserError
from rayexp.launch import starting
from rayexp.launch.alike import WorkerInfo, everyone, refuse_other_data, unlike, unlike_weights
from rayexp.launch.contract import before_training
from rayexp.launch.job import WorkerJob
from rayexp.launch.precision import decided, lacking
from rayexp.launch.readings import DeviceReadings
from rayexp.launch.saver import Saver
from rayexp.launch.step_log import StepLog
from rayexp.runs.manifest import WEIGHTS
from rayexp.runs.records import EpochRecord
from rayexp.runs.traits import Traits
from rayexp.runs.writer import RunWriter
from rayexp.system.cores import cores

PROGRESS_SECONDS = 0.3  # how often rank 0 reports where the epoch stands
BOARD_SECONDS = 10.0  # how often it plots the steps since


def work(
    job: WorkerJob,
    join: Callable[[], WorkerGroup],
    writer: RunWriter,
    device: torch.device,
    world: int = 1,
    world_size: int | None = None,
    leaving: Callable[[], bool] = lambda: False,
    epoch_done: Callable[[EpochRecord], object] = lambda record: None,
) -> str:
    """Train as one worker of a group; returns `done` or `stopped`.

    Args:
        job: what to train, and how.
        join: joins the group. It is called when this worker has opened its data, which it may have to pack first for as
            long as that takes: the others' timeout for a silent worker begins when all have joined.
        writer: rank 0 writes the run with it, every rank its log. Anything with a RunWriter's methods will do.
        device: where this worker computes.
        world: the group's size.
        world_size: what records say (0: in-process); None: the group's size.
        leaving: asked before every step, by every worker: whether to save because a machine is about to be taken away.
        epoch_done: called after every epoch, by every worker; the record has no hashes yet.

    Raises:
        UserError: the configuration or the data is wrong, or the workers differ where they must not.
        RunError: training cannot go on.
    """
    entered = time.monotonic()
    config = job.config
    if config.code and (code := writer.code()):
        provide(config.code, code)
    try:
        with runtime.configure(config, device, config.shards // world, job.cpus) as configured:
            workload = workloads.open_workload(config)
            group = join()
            if (job := decided(job, group, writer, configured)).config != config:
                workload = workloads.open_workload(job.config)
            size = group.world if world_size is None else world_size
            return _Worker(job, group, writer, configured, workload, size, entered, leaving, epoch_done).run()
    except torch.OutOfMemoryError as error:
        told = ". ".join(str(error).split(". ")[1:3])  # after "CUDA out of memory": what was asked for, what is there
        raise RunError(
            f"the memory of {device} is too small for this training ({told}); a smaller batch_size, more shards or "
            "data.resident=false may help"
        ) from error
    except RuntimeError as error:
        if WORKSPACE in str(error):  # before torch 2.14: how it was when a process first asked cuBLAS
            raise UserError(
                f"reduction: exact needs {WORKSPACE}=:4096:8 before a process's first product on a GPU, and in this "
                "process there was one before; set it in the environment in which the program is started"
            ) from error
        if (operation := operation_of(error)) is None:
            raise
        raise refusal(operation, device) from error


class _Worker:
    def __init__(
        self,
        job: WorkerJob,
        group: WorkerGroup,
        writer: RunWriter,
        configured: Runtime,
        workload: Workload,
        world_size: int,
        entered: float,
        leaving: Callable[[], bool],
        epoch_done: Callable[[EpochRecord], object],
    ) -> None:
        self.job, self.config, self.group, self.writer = job, job.config, group, writer
        self.runtime, self.workload, self.world_size, self.entered = configured, workload, world_size, entered
        self.leaving, self.epoch_done = leaving, epoch_done
        self.lead = group.rank == 0
        self.dataset = {"kind": workload.kind, **workload.describe()}
        self.data_shas = {key: self.dataset[key] for key in ("train_sha", "val_sha")}
        self.fingerprint = fingerprint(self.runtime)
        weights, self.weights = starting.share(self.config, group, writer, self.dataset.get("vocabulary"))
        self.fingerprint |= {"weights": self.weights["sha256"]} if self.weights else {}
        classes = len(self.dataset.get("classes", ())) or None
        self.trainer = Trainer(self.config, workload, group, self.runtime, weights, classes)
        config = self.config.model_dump(mode="json")
        self.saver = Saver(writer, {"fingerprint": self.fingerprint, "data": self.data_shas, "config": config})
        self.steps = StepLog()
        self.capture, self.lanes = "", configured.side_by_side  # what run.json says of them
        self.warnings: list[str] = []
        self.saved = self.reported = self.plotted = time.monotonic()

    def run(self) -> str:
        replicas = counted(self.runtime.side_by_side, "replica")
        what = f"{self.runtime.device}, {replicas}, {self.config.precision}"
        # launch/killer.py reads where a worker is from the end of this line.
        where = f"pid {os.getpid()} on {socket.gethostname()}"
        self._log(f"rank {self.group.rank} of {self.group.world}: {what}, {where}")
        if self.lead:
            for warning in self._config_warnings():
                self._warn(warning)
        self._resume()
        if not self.trainer.global_step:
            self._check_contract()
        workers = self._compare()
        measured = None
        if self.job.measure_link and self.group.world > 1:
            measured = link.measure(self.group, self.runtime, self.trainer.stepper.exchange_bytes)
        if self.lead:
            self._begin(measured, workers)
        status = "done"
        claimed = self.runtime.replicas * self.runtime.threads if self.config.scaling.lanes else self.job.cpus
        self.devices = DeviceReadings(self.group, self.runtime, claimed or cores())
        try:
            for event in self.trainer.train(self._flags, self._wanted):
                if isinstance(event, EpochDone):
                    self._epoch(event)
                    self.epoch_done(event.record)
                else:
                    self._step(event)
                    if event.stopped:
                        status = "stopped"
            self.saver.wait()
        finally:
            self.devices.close()
            with contextlib.suppress(*([Exception] if sys.exc_info()[0] else [])):
                self.saver.close()
        if self.lead:
            self.writer.end(status)
        return status

    # ------------------------------------------------------------------ beginning

    def _resume(self) -> None:
        """Load the newest whole checkpoint in every worker, where there is one."""
        files: dict[str, bytes] | None = None
        if self.lead:
            files, notes = self.writer.resume()
            for note in notes:
                self._warn(note)
        fields = self.group.broadcast(files[FIELDS] if files else b"")
        if not fields:
            if self.config.model.weights is not None and self.trainer.fit is None:
                raise RunError(f"{WEIGHTS} is missing or damaged, and no checkpoint is whole: nothing to begin with")
            return
        tensors = self.group.broadcast(files[TENSORS] if files else None)
        state = checkpoint.decode({FIELDS: fields, TENSORS: tensors})
        self.trainer.load(state)
        self.steps = StepLog.resumed(self.trainer.global_step, self.trainer.step, state.fields)
        self._log(f"resumed at epoch {self.trainer.epoch + 1}, step {self.trainer.step}")
        refuse_other_data(self.config, state.fields.get("data"), self.data_shas)
        before = state.fields.get("fingerprint")
        if self.lead and before and (differs := ", ".join(differences(before, self.fingerprint))):
            self._warn(f"resumed under another fingerprint: {differs}; the bits may differ from here on")

    def _config_warnings(self) -> list[str]:
        """A line for every setting that this machine, these data or another setting overrules."""
        lines = passed_over(self.config, self.runtime.device.type == "cuda")
        lines += lacking(self.config, self.runtime)
        there, batch, unit = self.dataset.get("train_samples"), self.config.batch_size, self.workload.unit
        if self.workload.batch_unit == unit and there is not None and batch > there:
            lines.append(f"batch_size: {batch} is above the {there} training {unit}: every step takes all of them")
        return lines

    def _check_contract(self) -> None:
        """Refuse (UserError) a model of the user's own that does what the engine cannot keep."""
        model = self.trainer.master.model
        for warning in before_training(self.config, self.workload, model, self.group, self.runtime):
            if self.lead:
                self._warn(warning)

    def _compare(self) -> list[WorkerInfo]:
        """All workers; UserError where they differ in what the reduction needs to be alike."""
        weights = checkpoint.sha(self.trainer.replicated().weights())
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
            # All take the weights of rank 0, as with DistributedDataParallel.
            state = checkpoint.snapshot(self.trainer.replicated(), {})
            files = checkpoint.encode(state) if self.lead else {}
            sent = {name: self.group.broadcast(files.get(name)) for name in (FIELDS, TENSORS)}
            self.trainer.load(checkpoint.decode(sent))
        return workers

    def _begin(self, measured: Mapping[str, float] | None, workers: Sequence[WorkerInfo]) -> None:
        meta = {
            "status": "running",
            **Traits(self.workload.unit, self.workload.kind, self.workload.goals).to_json(),
            "world_size": self.world_size,
            "device": str(self.runtime.device.type),
            "lanes": self.runtime.side_by_side,
            "fingerprint": self.fingerprint,
            "workers": [worker.to_json() for worker in workers],
            "parameters": sum(slot.size for slot in self.trainer.layout.params),
            "frozen": self.trainer.master.frozen,
            "exchange_bytes": self.trainer.stepper.exchange_bytes,
            "link": measured,
            "steps_per_epoch": self.trainer.steps,
            "residency": residency.to_json() if (residency := self.trainer.residency) else None,
            "capture": None,  # see _say_how
            "warnings": self.warnings,
            "data": {k: v for k, v in self.dataset.items() if not isinstance(v, list)},
        }
        if self.trainer.fit is not None:
            meta["weights"] = self.weights | self.trainer.fit.to_json()
        self.writer.begin(meta, self.dataset)

    # ------------------------------------------------------------------ while it runs

    def _flags(self) -> ControlFlags:
        """What this worker asks of the coming step; of all workers' flags, one that is set counts."""
        last = self.job.max_steps
        stop = last is not None and self.trainer.global_step + 1 >= last
        leaving = self.leaving()
        if not self.lead:
            return ControlFlags(stop, leaving)
        now, seconds = time.monotonic(), self.config.checkpoint.every_seconds
        save = seconds is not None and now - self.saved >= seconds and self.saver.idle()
        return ControlFlags(stop or self.writer.stop_requested(), save or leaving)

    def _wanted(self, global_step: int) -> bool:
        """Whether something is to be done with the state right after so many steps; the same on every worker."""
        return self.job.trace or global_step == self.job.max_steps or self._due(global_step)

    def _due(self, global_step: int) -> bool:
        """Whether the configuration asks for a snapshot after so many steps."""
        every = self.config.checkpoint.every_steps
        return every is not None and global_step % every == 0

    def _step(self, event: StepDone) -> None:
        if event.first and self.lead:
            self.writer.first_step(self.job.started, time.monotonic() - self.entered)
        if self.lead and self.runtime.static:
            self._say_how(self.trainer.stepper)
        if self.job.trace:
            self._trace(event)  # before the snapshot: a step that is saved is not done again
        due = event.save or self._due(self.trainer.global_step)
        if self.lead:
            self.steps.add(event)
        if event.stopped or (event.settled and due and event.step < event.steps):
            self._snapshot()
        if not self.lead:
            return
        now = time.monotonic()
        if event.stopped or now - self.plotted >= BOARD_SECONDS:
            self._plot()
        if now - self.reported >= PROGRESS_SECONDS or event.step == event.steps:
            self.reported = now
            self._report(
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

    def _say_how(self, stepper: Stepper) -> None:
        """Put into run.json how a GPU runs the steps, and warn where it does so slowly without having been told to."""
        lanes, capture = len(stepper.passes.replicas), stepper.capture
        if lanes != self.lanes:
            what = f"the GPU's memory holds {lanes} of {counted(self.runtime.side_by_side, 'replica')} side by side"
            self.lanes = lanes
            self.writer.note({"lanes": lanes})
            self._warn_while_training(f"scaling.lanes: {what}; steps take longer than with all of them")
        if capture != self.capture:
            self.capture = capture
            self.writer.note({"capture": capture})
            if capture.startswith("eager") and self.config.capture is not False:
                what = f"steps run without CUDA graphs, which takes several times as long ({capture})"
                self._warn_while_training(f"capture: {what}")

    def _trace(self, event: StepDone) -> None:
        state = self.trainer.state()  # every worker must call it: each has the recurrent state of its own shards
        if self.lead:
            hashes = {name: checkpoint.sha({name: tensor}) for name, tensor in state.tensors.items()}
            weights, step = checkpoint.sha(state.weights()), self.trainer.global_step
            self.writer.trace({"step": step, "weights_sha": weights, "tensors": hashes, "rate": event.rate})

    def _snapshot(self) -> None:
        state = self.trainer.state()  # as in _trace
        self.saved = time.monotonic()
        if self.lead:
            self.saver.snapshot(self.trainer.global_step, self.saver.copy(state), self.steps.curves())

    def _epoch(self, event: EpochDone) -> None:
        start = time.perf_counter()
        joules, busy = self.devices.take()
        if not self.lead:
            return
        copied = self.saver.copy(self.trainer.state())
        self.saved = time.monotonic()
        blocked = time.perf_counter() - start
        seconds = dict(event.record.seconds)
        seconds["checkpoint"] += blocked
        seconds["total"] += blocked
        record = dataclasses.replace(
            event.record, seconds=seconds, world_size=self.world_size, energy_joules=joules, busy=busy
        )
        self._plot()
        self.saver.epoch(record, copied, event.predictions, self.steps.end(record.epoch))
        momenta = [momentum for _, momentum in self.trainer.layout.momentum]
        known = self.workload.kind != "samples"
        if absurd := absurd_loss(record.epoch, record.val_loss, momenta, record.step, known):
            self._warn_while_training(absurd)
        if record.epoch == 1 and not self.job.trace and "tensorboard" in self.config.tracking:
            # After the first epoch: drawing must not disturb the first steps' times.
            self.saver.graph(self.trainer.master.model, self.workload.example(), self._warn_while_training)

    def _plot(self) -> None:
        self.plotted = time.monotonic()
        for warning in self.writer.plot_steps(*self.steps.take()):
            self._warn_while_training(warning)

    # ------------------------------------------------------------------ what the user sees

    def _warn(self, warning: str) -> None:
        self._log(warning)
        self.warnings.append(warning)
        self._report({})

    def _warn_while_training(self, warning: str) -> None:
        """`_warn` after the first step: progress.json goes on to name the step, so that a signal saves it. The warning
        comes with the next report, and stands in run.json for the end of the run."""
        self._log(warning)
        self.warnings.append(warning)
        self.writer.note({"warnings": self.warnings})

    def _report(self, progress: dict[str, Any]) -> None:
        # With the warnings every time: the driver reads only the newest report.
        self.writer.progress(progress | ({"warnings": self.warnings} if self.warnings else {}))

    def _log(self, text: str) -> None:
        self.writer.log(self.group.rank, text)
