"""The training loop as a generator: it yields what happened, and the caller writes, shows or stops.

trainer = Trainer(config, workload, group, runtime)
trainer.load(state)                              # when a run continues
for event in trainer.train(flags):
    StepDone    after every step                 (trainer.state() is what a snapshot needs)
    EpochDone   after every epoch                (its record still lacks the hashes, which the writer adds)
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from rayexp.config import ExperimentConfig
from rayexp.engine.checkpoint import State
from rayexp.engine.evaluate import predict
from rayexp.engine.freezing import freeze
from rayexp.engine.gradients import Master, ParameterLayout
from rayexp.engine.group import WorkerGroup
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.residency import keep_samples
from rayexp.engine.runtime import Runtime
from rayexp.engine.schedule import Schedule
from rayexp.engine.starting import adopt
from rayexp.engine.step import ControlFlags, Stepper, StepResult, touched
from rayexp.engine.workload import Workload
from rayexp.errors import RunError
from rayexp.runs.records import PHASES, EpochRecord, Predictions


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step has ended.

    Attributes:
        epoch: counts from 1.
        step: steps done in this epoch.
        steps: steps of an epoch.
        loss: mean loss of the step.
        rate: samples (images or tokens) per second.
        count: samples of the step over all workers; `count / rate` is its wall-clock in seconds.
        seconds: seconds of this worker by phase.
        first: whether it is this process's first step.
        save: a worker asked for a snapshot; the same on every worker.
        stopped: the run ends here, because a worker asked for it.
        lr: the step's learning rate.
        settled: whether `Trainer.state()` is the state after this step; otherwise the next one is under way already.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    rate: float
    count: int
    seconds: dict[str, float]
    first: bool
    save: bool
    stopped: bool
    lr: float
    settled: bool


@dataclass(frozen=True, slots=True)
class _Done:
    """A step whose result is known: which one of its epoch (from 1), and what `StepDone` tells of it.

    Attributes:
        shift: what is to be added to the seconds since the step before was told, for the seconds of this one: its own
            launch, which may have been before that, less launches of later steps, and captures.
    """

    step: int
    lr: float
    result: StepResult
    save: bool
    stop: bool
    settled: bool
    shift: float


@dataclass(frozen=True, slots=True)
class EpochDone:
    """An epoch has ended.

    Attributes:
        record: the epoch's record, still without hashes.
        predictions: on the whole validation data.
    """

    record: EpochRecord
    predictions: Predictions


class Trainer:
    """A run in memory: the weights, the optimizer, and how far it has come.

    Attributes:
        layout: where tensors lie in the flat buffers.
        master: the weights and running statistics.
        optimizer, stepper, schedule: what updates the weights, runs a step, and gives the learning rate.
        eval_models: a model in eval mode for each replica, always with the current weights.
        steps: optimizer steps of an epoch.
        epoch: finished epochs.
        step: finished steps of the present epoch.
        loss_sum, loss_count: sum of the loss and number of loss terms so far in the present epoch.
        fit: what the model has taken of `weights`; None without.
        residency: how the samples reach a GPU; None where that makes no difference.

    Args:
        weights: tensors to start from, by name (`model.weights`).
        classes: how many the data has; an output layer of so many outputs need not fit `weights`.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        workload: Workload,
        group: WorkerGroup,
        runtime: Runtime,
        weights: Mapping[str, Tensor] | None = None,
        classes: int | None = None,
    ) -> None:
        self.config, self.workload, self.group, self.runtime = config, workload, group, runtime
        self.residency = keep_samples(config, workload, runtime)
        model = workload.model()
        self.fit = adopt(model, weights, str(config.model.weights), classes) if weights else None
        freeze(model, config.model)
        self.layout = ParameterLayout(model, config.shards, config.optimizer.decay_norm_and_bias)
        half = runtime.static and config.precision == "bf16"
        self.master = Master(model, self.layout, runtime.device, half)
        sparse = touched(workload, self.layout, runtime, 1, 0)
        self.optimizer = Optimizer(config, self.layout, self.master.params, sparse)
        self.stepper = Stepper(config, workload, self.master, self.optimizer, group, runtime)
        self.eval_models = [self.master.eval_model() for _ in range(runtime.replicas)]
        self.steps = workload.steps()
        self.schedule = Schedule(config, self.steps)
        self.epoch = self.step = 0
        self.loss_sum, self.loss_count = 0.0, 0

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.steps + self.step

    # ------------------------------------------------------------------ state

    def state(self) -> State:
        """Everything needed to continue from here, as views. Within an epoch every worker must call it, since recurrent
        states are gathered."""
        state = self.replicated()
        return State(state.fields, state.tensors | self._gather_recurrent_states()) if self.step else state

    def replicated(self) -> State:
        """`state` without the recurrent states, which only the worker of a shard has."""
        tensors: dict[str, Tensor] = {f"model.{n}": t for n, t in self.master.tensors(self.global_step).items()}
        for buffer, flat in self.optimizer.state.items():
            tensors |= {f"optimizer.{buffer}.{n}": t for n, t in self.master.named(flat)}
        fields = {
            "epoch": self.epoch,
            "step": self.global_step,
            "step_in_epoch": self.step,
            "steps": self.steps,
            "schedule": self.schedule.state(),
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
        }
        return State(fields, tensors)

    def load(self, state: State) -> None:
        """Continue from a state.

        Raises:
            RunError: the state is of another model or another length of epoch, or lacks something.
        """
        fields = state.fields
        if fields.get("steps") != self.steps:
            raise RunError(f"checkpoint: an epoch had {fields.get('steps')} steps there and has {self.steps} here")
        try:
            self.master.load(state.weights())
            for buffer, flat in self.optimizer.state.items():
                for name, view in self.master.named(flat):
                    view.copy_(state.tensors[f"optimizer.{buffer}.{name}"])
        except (KeyError, RuntimeError) as error:
            raise RunError(f"checkpoint: does not fit this model ({error})") from error
        try:
            self.epoch, self.step = fields["epoch"], fields["step_in_epoch"]
            self.loss_sum, self.loss_count = fields["loss_sum"], fields["loss_count"]
            self.schedule.load(fields["schedule"])
        except (KeyError, TypeError) as error:
            raise RunError(f"checkpoint: its state.json lacks what a resume needs ({error})") from error
        recurrent: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.tensors.items():
            if name.startswith("carry."):
                _, shard, rest = name.split(".", 2)
                recurrent.setdefault(int(shard), {})[rest] = tensor.to(self.runtime.device)
        for mine in self.stepper.shards:
            if mine in recurrent:
                self.stepper.passes.keep_state(mine, recurrent[mine])

    def _gather_recurrent_states(self) -> dict[str, Tensor]:
        mine = {
            f"carry.{shard}.{name}": tensor.detach().cpu().contiguous()
            for shard, state in self.stepper.passes.recurrent_states.items()
            for name, tensor in state.items()
        }
        if self.group.world == 1:
            return mine
        parts = self.group.gather(safetensors.torch.save(mine))
        return {name: tensor for data in parts for name, tensor in safetensors.torch.load(data).items()}

    # ------------------------------------------------------------------ training

    def train(
        self,
        flags: Callable[[], ControlFlags] = ControlFlags,
        wanted: Callable[[int], bool] = lambda global_step: False,
    ) -> Iterator[StepDone | EpochDone]:
        """Run what is left of the configured epochs.

        Args:
            flags: returns what this worker asks for; called before every step.
            wanted: whether the caller wants the state right after so many steps. It is told of every step, but a GPU is
                a step ahead of what is told, unless it has to wait (see `StepDone.settled`).

        Raises:
            RunError: the loss is no longer finite.
        """
        fresh = True
        while self.epoch < self.config.epochs:
            began = time.perf_counter()
            spent = dict.fromkeys(PHASES, 0.0)
            first: float | None = None  # seconds of this process's first step, where this epoch holds it
            counted, counted_seconds, rate = 0, 0.0, 0.0
            lr = self.schedule.lr(max(0, self.global_step - 1))
            last = time.perf_counter()
            for done in self._steps(flags, wanted):
                result, lr = done.result, done.lr
                self.loss_sum += result.loss
                self.loss_count += result.count
                took, last = time.perf_counter() - last + done.shift, time.perf_counter()
                if fresh:
                    first = took
                else:
                    counted, counted_seconds = counted + result.count, counted_seconds + took
                for phase, seconds in result.seconds.items():
                    spent[phase] += seconds
                rate = result.count / took
                mean = result.loss / result.count
                if not math.isfinite(mean):
                    raise RunError(
                        f"the loss is {mean} at epoch {self.epoch + 1}, step {done.step}; a smaller lr may help"
                    )
                yield StepDone(
                    epoch=self.epoch + 1,
                    step=done.step,
                    steps=self.steps,
                    loss=mean,
                    rate=rate,
                    count=result.count,
                    seconds=result.seconds,
                    first=fresh,
                    save=done.save,
                    stopped=done.stop,
                    lr=lr,
                    settled=done.settled,
                )
                fresh = False
                if done.stop:
                    return
                last = time.perf_counter()
            saved = time.perf_counter()
            predictions = self._predictions()
            self.runtime.synchronize()
            spent["evaluate"] = time.perf_counter() - saved
            metrics = self.workload.metrics(predictions)
            val_loss = metrics.pop("val_loss")
            self.schedule.epoch(val_loss)
            self.epoch, self.step = self.epoch + 1, 0
            train_loss = self.loss_sum / self.loss_count
            self.loss_sum, self.loss_count = 0.0, 0
            total = time.perf_counter() - began
            spent["other"] = max(0.0, total - sum(spent.values()))
            record = EpochRecord(
                epoch=self.epoch,
                step=self.global_step,
                train_loss=train_loss,
                val_loss=val_loss,
                metrics=metrics,
                lr=lr,
                samples_per_second=counted / counted_seconds if counted else rate,
                seconds={"total": total, **({} if first is None else {"first_step": first}), **spent},
                weights_sha="",
                world_size=0,
                peak_memory=self.runtime.peak_memory(),
            )
            yield EpochDone(record, predictions)

    def _predictions(self) -> Predictions:
        """On the whole validation data. Where a GPU's memory is too small for them beside the steps' graphs, these go:
        no worker has handed on anything by then."""
        while True:
            try:
                return predict(self.workload, self.eval_models, self.group, self.runtime)
            except torch.OutOfMemoryError:
                if not self.stepper.programs.make_room():
                    raise

    def _steps(self, flags: Callable[[], ControlFlags], wanted: Callable[[int], bool]) -> Iterator[_Done]:
        """Run the rest of an epoch. A result is asked for `Stepper.late` steps later, so that a GPU never waits. Who
        asks to save or to stop gets the state after the last step that is under way: the same one on every worker,
        since all see the same flags."""
        under_way: deque[tuple[int, float, Callable[[], StepResult], float]] = deque()
        stop = save = False
        shift = 0.0
        while under_way or self.step < self.steps:
            if self.step < self.steps:
                lr = self.schedule.lr(self.global_step)
                wanting, began = flags(), time.perf_counter()
                launched = self.stepper.launch(self.epoch + 1, self.step, self.global_step, lr, wanting)
                seconds = time.perf_counter() - began
                self.step += 1
                shift -= seconds
                seconds -= sum(self.stepper.captures.values())
                under_way.append((self.step, lr, launched, seconds))
            late = 0 if self.step == self.steps or wanted(self.global_step) else self.stepper.late
            while len(under_way) > late:
                step, lr, launched, seconds = under_way.popleft()
                result = launched()
                stop, save = stop or result.flags.stop, save or result.flags.save
                if stop or save:
                    late = 0
                settled = not under_way
                yield _Done(step, lr, result, settled and save, settled and stop, settled, shift + seconds)
                shift = 0.0
                save = save and not settled
