"""Epochs and steps as a generator: it yields what happened, and the caller writes, shows or stops.

session = Session(config, workload, group, place)
session.load(state)                              # when a run goes on
for event in session.train(wish):
    StepDone    after every step                 (session.state() is what a snapshot needs)
    EpochDone   after every epoch                (its record still lacks the hashes, which the writer adds)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import safetensors.torch
from torch import Tensor

from rayexp.config import ExperimentConfig
from rayexp.engine.checkpoint import State
from rayexp.engine.evaluate import predict
from rayexp.engine.gradients import Master, ParameterLayout
from rayexp.engine.group import WorkerGroup
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.runtime import Runtime
from rayexp.engine.schedule import Schedule
from rayexp.engine.step import ControlFlags, Stepper, touched
from rayexp.engine.workload import Workload
from rayexp.errors import RunError
from rayexp.runs.records import PHASES, EpochRecord, Predictions


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step has ended.

    Attributes:
        epoch: counts from 1.
        step: steps done in this epoch, of `steps`.
        loss: mean loss of the step.
        rate: samples per second of this step.
        count: samples of this step over all workers; `count / rate` is its wall-clock.
        first: this process's first step.
        save: a worker wished for a snapshot; every worker sees the same.
        stopped: the run ends here, because a worker wished it.
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


@dataclass(frozen=True, slots=True)
class EpochDone:
    """An epoch has ended. `record` has no hashes yet."""

    record: EpochRecord
    predictions: Predictions


class Trainer:
    """A run in memory: the master weights, the optimizer, and where the run stands."""

    def __init__(self, config: ExperimentConfig, workload: Workload, group: WorkerGroup, runtime: Runtime) -> None:
        self.config, self.workload, self.group, self.runtime = config, workload, group, runtime
        model = workload.model()
        self.layout = ParameterLayout(model, config.shards, config.optimizer.decay_norm_and_bias)
        self.master = Master(model, self.layout, runtime.device)
        sparse = touched(workload, self.layout, runtime.device, 1, 0)
        self.optimizer = Optimizer(config, self.layout, self.master.params, sparse)
        self.stepper = Stepper(config, workload, self.master, self.optimizer, group, runtime)
        self.eval_models = [self.master.eval_model() for _ in range(runtime.replicas)]
        self.steps = workload.steps()
        self.schedule = Schedule(config, self.steps)
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the present epoch
        self.loss_sum, self.loss_count = 0.0, 0

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.steps + self.step

    # ------------------------------------------------------------------ state

    def state(self) -> State:
        """Everything needed to go on from here, as views. Inside an epoch, every worker must call it (carried state is
        gathered)."""
        state = self.replicated()
        return State(state.fields, state.tensors | self._gather_recurrent_states()) if self.step else state

    def replicated(self) -> State:
        """`state` without what only the worker of a shard has."""
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
        """Go on from a state.

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
        recurrent_states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.tensors.items():
            if name.startswith("carry."):
                _, shard, rest = name.split(".", 2)
                recurrent_states.setdefault(int(shard), {})[rest] = tensor.to(self.runtime.device)
        self.stepper.recurrent_states = {
            shard: recurrent_states[shard] for shard in self.stepper.shards if shard in recurrent_states
        }

    def _gather_recurrent_states(self) -> dict[str, Tensor]:
        mine = {
            f"carry.{shard}.{name}": tensor.detach().cpu().contiguous()
            for shard, state in self.stepper.recurrent_states.items()
            for name, tensor in state.items()
        }
        if self.group.world == 1:
            return mine
        parts = self.group.gather(safetensors.torch.save(mine))
        return {name: tensor for data in parts for name, tensor in safetensors.torch.load(data).items()}

    # ------------------------------------------------------------------ training

    def train(self, flags: Callable[[], ControlFlags] = ControlFlags) -> Iterator[StepDone | EpochDone]:
        """Run what is left of the configured epochs.

        Args:
            wish: asked before every step on every worker.

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
            while self.step < self.steps:
                start = time.perf_counter()
                lr = self.schedule.lr(self.global_step)
                result = self.stepper(self.epoch + 1, self.step, self.global_step, lr, flags())
                self.step += 1
                self.loss_sum += result.loss
                self.loss_count += result.count
                took = time.perf_counter() - start
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
                        f"the loss is {mean} at epoch {self.epoch + 1}, step {self.step}; a smaller lr may help"
                    )
                stop, save = result.flags.stop, result.flags.save
                yield StepDone(
                    self.epoch + 1, self.step, self.steps, mean, rate, result.count, result.seconds, fresh, save, stop
                )
                fresh = False
                if stop:
                    return
            saved = time.perf_counter()
            predictions = predict(self.workload, self.eval_models, self.group, self.runtime)
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
