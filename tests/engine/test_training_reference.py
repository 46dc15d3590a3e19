"""Whole training steps against a plain loop in float64: autograd, torch.optim, its schedulers, batch norm by hand.

The plain loop goes through the shards one by one; nothing of it is rayexp's but the order of the samples.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import lr_scheduler

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import checkpoint, order
from rayexp.engine.group import WorkerGroup
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.passes import Passes
from rayexp.engine.runtime import configure
from rayexp.engine.step import ControlFlags
from rayexp.engine.trainer import EpochDone, StepDone, Trainer
from rayexp.engine.workload import Batch, RecurrentState
from rayexp.errors import RunError
from rayexp.runs.records import Predictions

SAMPLES, SHARDS, BATCH = 55, 4, 16  # three batches; the last has 23 samples, in shards of 6, 6, 6 and 5
CLASSES = 3
MOMENTUM = {"1": 0.3, "4": 0.1}  # the two batch norms'


class Toy:
    """Noise in as many classes; two batch norms, one of which sees flat features."""

    unit, batch_dim, shares_buffer = "images", 0, True

    def __init__(self, config: ExperimentConfig, together: bool = True) -> None:
        self.config, self.together = config, together
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, 2, 5, 5, generator=generator)
        self.y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        self.cut = order.Cut(SAMPLES, config.batch_size, config.shards)

    def model(self) -> nn.Module:
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Flatten(),
            nn.BatchNorm1d(36), nn.Linear(36, CLASSES),
        )  # fmt: skip
        with torch.no_grad():
            model[1].running_mean.fill_(0.7)
            model[1].running_var.fill_(2.0)
        return model

    def samples(self, epoch: int, step: int, shards: range) -> NDArray[np.int64]:
        where = self.cut.positions(step, shards)
        return order.permutation(self.config.seed, epoch, SAMPLES)[where.start : where.stop]

    def feed(self, epoch: int, step: int, shards: range) -> dict[str, NDArray[Any]]:
        return {"samples": self.samples(epoch, step, shards)}

    def assemble(self, fed: Mapping[str, Tensor], sizes: Sequence[int]) -> Batch:
        found = fed["samples"]
        return Batch((self.x[found],), self.y[found], tuple(sizes), len(found))

    def sizes(self, step: int, shards: range) -> tuple[int, ...]:
        return self.cut.sizes(step, shards)

    def steps(self) -> int:
        return self.cut.steps

    def initial_state(self, size: int, device: torch.device) -> RecurrentState:
        return {}

    def loss(self, model: nn.Module, batch: Batch, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        return F.cross_entropy(model(*batch.inputs), batch.targets, reduction="sum"), {}

    def touched_rows(self, epoch: int, step: int) -> dict[str, NDArray[np.int64]]:
        return {}

    def val_streams(self) -> int:
        return 3

    def predict(self, model: nn.Module, stream: int, device: torch.device) -> Mapping[str, NDArray[Any]]:
        mine = np.arange(stream, SAMPLES, 3)
        losses = F.cross_entropy(model(self.x[mine]), self.y[mine], reduction="none")
        return {"index": mine, "loss": losses.numpy()}

    def predictions(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> Predictions:
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return Predictions("images", "", arrays)

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        return {"val_loss": float(predictions["loss"].mean(dtype=np.float64))}

    def describe(self) -> dict[str, Any]:
        return {}

    def example(self) -> tuple[Any, ...]:
        return (self.x[:1],)


class Plain:
    """The loop in float64."""

    def __init__(self, toy: Toy) -> None:
        config = toy.config
        self.toy, self.model = toy, toy.model().double()
        o = config.optimizer
        args = {"lr": config.lr, "weight_decay": config.weight_decay}
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self.model.parameters(), betas=o.betas, eps=o.eps, **args)
            if o.name == "adamw"
            else torch.optim.SGD(self.model.parameters(), momentum=o.momentum, nesterov=o.nesterov, **args)
        )

    def step(self, epoch: int, step: int) -> tuple[float, int]:
        """SUM of the losses, and samples."""
        norms = {name: self.model.get_submodule(name) for name in MOMENTUM}
        kept = {name: (m.running_mean.clone(), m.running_var.clone()) for name, m in norms.items()}
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}
        inputs: dict[str, Tensor] = {}
        hooks = [
            m.register_forward_pre_hook(lambda m, args, n=n: inputs.__setitem__(n, args[0].detach()))
            for n, m in norms.items()
        ]
        losses, count = [], 0
        self.optimizer.zero_grad()
        for shard in range(SHARDS):
            samples = self.toy.samples(epoch, step, range(shard, shard + 1))
            loss = F.cross_entropy(self.model(self.toy.x[samples].double()), self.toy.y[samples], reduction="sum")
            loss.backward()
            losses.append(loss.item())
            count += len(samples)
            for name, x in inputs.items():
                channels = x.transpose(0, 1).flatten(1).numpy()
                found[name].append(tuple(torch.from_numpy(s) for s in (channels.mean(1), channels.var(1, ddof=1))))
        for hook in hooks:
            hook.remove()
        for parameter in self.model.parameters():
            parameter.grad /= count
        self.gradient = {n: p.grad.clone() * count for n, p in self.model.named_parameters()}
        if self.toy.config.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.toy.config.optimizer.clip)
        self.optimizer.step()
        for name, m in norms.items():
            for i, running in enumerate((m.running_mean, m.running_var)):
                of_shards = torch.stack([pair[i] for pair in found[name]]).mean(0)
                running.copy_((1 - MOMENTUM[name]) * kept[name][i] + MOMENTUM[name] * of_shards)
        return sum(losses), count


def configured(**changes: Any) -> ExperimentConfig:
    tree = {
        "batch_size": BATCH,
        "shards": SHARDS,
        "lr": 0.05,
        "weight_decay": 0.01,
        "optimizer": {"momentum": 0.9, "nesterov": True, "clip": 0.3},
        "scaling": {"lanes": 1},
        **changes,
    }
    return parse(tree, ExperimentConfig, "test")


def opened(config: ExperimentConfig, together: bool = True, static: bool = False) -> tuple[Trainer, Toy]:
    toy = Toy(config, together)
    runtime = configure(config, torch.device("cpu"), config.shards, 1, static)
    return Trainer(config, toy, WorkerGroup(), runtime), toy


def close(session: Trainer, plain: Plain, tolerance: float = 2e-5) -> None:
    tensors = session.master.tensors(session.global_step)
    for name, wanted in plain.model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(
                tensors[name].double(), wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


WAYS = {
    "together": {},
    "lanes": {"scaling": {"lanes": 3}},
    "ddp": {"reduction": "ddp"},
    "adamw": {"optimizer": {"name": "adamw"}, "lr": 0.003},
}


@pytest.mark.parametrize("way", [*WAYS, "apart", "static"])
def test_steps_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Two epochs: weights, running statistics, losses; every shard by itself, shards of two sizes."""
    if way == "together":  # whether they have the same bits or not
        monkeypatch.setattr(Passes, "_alike", lambda *args: True)
    session, toy = opened(configured(epochs=2, **WAYS.get(way, {})), together=way != "apart", static=way == "static")
    plain = Plain(toy)
    assert session.stepper.passes.together == (way not in ("apart", "ddp", "static"))
    sums, rates, took, began = np.zeros(2), [], 0.0, time.perf_counter()
    for event in session.train():
        if isinstance(event, StepDone):
            loss, count = plain.step(event.epoch, event.step - 1)
            assert event.count == count
            assert min(event.seconds.values()) >= 0
            if way != "static":  # whose steps overlap
                assert sum(event.seconds.values()) <= event.count / event.rate
            assert event.loss == pytest.approx(loss / count, rel=1e-5)
            sums += loss, count
            rates.append(event.rate)
            took += event.count / event.rate
        else:
            assert event.record.train_loss == pytest.approx(sums[0] / sums[1], rel=1e-5)
            assert sums[1] == SAMPLES
            assert min(rates) <= event.record.samples_per_second <= max(rates)
            rates.clear()
            sums[:] = 0
            evaluated = copy.deepcopy(plain.model).eval()
            with torch.no_grad():
                wanted = F.cross_entropy(evaluated(toy.x.double()), toy.y, reduction="none").numpy()
            assert sorted(event.predictions["index"]) == list(range(SAMPLES))
            np.testing.assert_allclose(event.predictions["loss"], wanted[event.predictions["index"]], rtol=1e-3)
            assert event.record.val_loss == pytest.approx(wanted.mean(), rel=1e-4)
        if isinstance(event, EpochDone) or event.settled:
            close(session, plain)
    assert 0 < took < time.perf_counter() - began


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_the_reduced_gradient_is_the_sum_over_all_samples(
    monkeypatch: pytest.MonkeyPatch, reduction: str, lanes: int
) -> None:
    """Before it is divided: within float32's rounding of the sum in float64; and what else the update is told."""
    session, toy = opened(configured(reduction=reduction, scaling={"lanes": lanes}))
    plain = Plain(toy)
    told: list[tuple[dict[str, Tensor], float, float, int]] = []
    update = Optimizer.update

    def spy(self: Optimizer, buffer: Tensor, lr: Tensor, done: Tensor, *others: Any) -> None:
        gradient, count = self.layout.gradient(buffer).clone(), self.layout.scalars(buffer)[1].item()
        told.append(({s.name: s.view(gradient) for s in self.layout.params}, count, lr.item(), int(done) + 1))
        update(self, buffer, lr, done, *others)

    monkeypatch.setattr(Optimizer, "update", spy)
    for event in session.train():
        if isinstance(event, StepDone):
            _, samples = plain.step(event.epoch, event.step - 1)
            gradient, count, lr, step = told[-1]
            assert (count, lr, step) == (samples, 0.05, event.step)
            for name, wanted in plain.gradient.items():
                torch.testing.assert_close(gradient[name].double(), wanted, rtol=1e-4, atol=2e-5)
    assert len(told) == 3


def test_every_step_has_the_schedule_s_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and cosine through a session, and after a resume in the middle of an epoch."""
    config = configured(epochs=4, schedule={"name": "cosine", "warmup_epochs": 1})
    told: list[float] = []
    update = Optimizer.update

    def spy(self: Optimizer, buffer: Tensor, lr: Tensor, done: Tensor, *others: Any) -> None:
        told.append(lr.item())
        assert int(done) + 1 == len(told)
        update(self, buffer, lr, done, *others)

    monkeypatch.setattr(Optimizer, "update", spy)
    one = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    up = lr_scheduler.LinearLR(one, 1 / 3, 1.0, total_iters=2)
    down = lr_scheduler.CosineAnnealingLR(one, 9)
    scheduler = lr_scheduler.SequentialLR(one, [up, down], [3])
    wanted = []
    for _ in range(12):
        wanted.append(one.param_groups[0]["lr"])
        one.step()
        scheduler.step()
    session, _ = opened(config)
    records = []
    for event in session.train():
        if isinstance(event, EpochDone):
            records.append(event.record.lr)
        if len(told) == 7:
            state = session.state()
            break
    session, _ = opened(config)
    session.load(state)
    records += [event.record.lr for event in session.train() if isinstance(event, EpochDone)]
    assert told == pytest.approx(wanted, rel=1e-6)
    assert records == pytest.approx(wanted[2::3], rel=1e-6)


HEARD = [1.0, 2.0, 3.0, 0.5, 0.6, 0.7]
"""Validation losses that go up where training's go down."""


def test_plateau_hears_the_validation_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(Toy, "metrics", lambda self, predictions: {"val_loss": HEARD[len(seen)]})
    session, _ = opened(configured(epochs=6, schedule={"name": "plateau", "gamma": 0.5}))
    for event in session.train():
        if isinstance(event, EpochDone):
            seen.append(event.record.lr)
    assert seen == [0.05, 0.05, 0.025, 0.0125, 0.0125, 0.00625]


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"momentum": 0.9, "nesterov": True}])
def test_a_resumed_run_ends_in_the_same_bits(monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any]) -> None:
    """With an optimizer that remembers, and a schedule that does; from every step of some epochs."""
    config = configured(epochs=6, lr=0.003, optimizer=optimizer, schedule={"name": "plateau", "gamma": 0.5})
    session, _ = opened(config)
    monkeypatch.setattr(Toy, "metrics", lambda self, predictions: {"val_loss": HEARD[session.epoch]})
    saved = [(checkpoint.encode(session.state()), event) for event in session.train()]
    wanted, last = session.master.params.clone(), saved[-1][1]
    for files, _ in saved[2:12]:
        session, _ = opened(config)
        session.load(checkpoint.decode(files))
        *_, event = session.train()
        assert torch.equal(session.master.params, wanted)
        assert isinstance(event, EpochDone)
        assert isinstance(last, EpochDone)
        assert (event.record.lr, event.record.train_loss) == (last.record.lr, last.record.train_loss)


def test_an_epoch_trains_on_every_sample_once_and_the_next_in_another_order() -> None:
    session, toy = opened(configured(epochs=3))
    read: list[list[int]] = [[], [], []]
    samples = toy.samples

    def spy(epoch: int, step: int, shards: range) -> NDArray[np.int64]:
        found = samples(epoch, step, shards)
        read[epoch - 1] += found.tolist()
        return found

    for _ in zip(range(4), session.train(), strict=False):  # the first tries what may go together
        pass
    toy.samples = spy  # type: ignore[method-assign]
    list(session.train())
    assert sorted(read[1]) == sorted(read[2]) == list(range(SAMPLES))
    assert read[1] != read[2]
    assert read[1] != sorted(read[1])


def test_a_control_flag_is_heard_after_its_step() -> None:
    """To save: that step says so, and the run goes on. To stop: that step is the last."""
    session, _ = opened(configured(epochs=2))
    asked = iter([ControlFlags(), ControlFlags(save=True), ControlFlags(), ControlFlags(stop=True)])
    events = [e for e in session.train(lambda: next(asked)) if isinstance(e, StepDone)]
    assert [(e.save, e.stopped) for e in events] == [(False, False), (True, False), (False, False), (False, True)]
    assert (session.epoch, session.step) == (1, 1)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    session, toy = opened(configured())
    toy.x[toy.samples(1, 1, range(SHARDS))[0]] = float("nan")
    with pytest.raises(RunError, match="loss is nan at epoch 1, step 2"):
        list(session.train())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda words, tensors: tensors.pop("model.5.bias"), "does not fit"),
        (lambda words, tensors: tensors.update({"model.5.bias": torch.zeros(7)}), "does not fit"),
        (lambda words, tensors: tensors.pop("optimizer.momentum_buffer.5.bias"), "does not fit"),
        (lambda words, tensors: words.update(steps=9), "9 steps there and has 3 here"),
    ],
)
def test_a_state_of_another_model_is_refused(change: Callable[..., object], words: str) -> None:
    session, _ = opened(configured())
    state = checkpoint.decode(checkpoint.encode(session.state()))
    change(state.fields, state.tensors)
    with pytest.raises(RunError, match=words):
        session.load(state)
