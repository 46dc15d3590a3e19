"""A captured step gives the bits of the eager one at every step of a training, found out without a GPU.

A CUDA graph runs the kernels of its capture again and none of the Python around them: whatever Python gave a kernel
stays what it was, and each tensor is looked for where it lay.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rayexp.engine import checkpoint, settings
from rayexp.engine.gradients import Master
from rayexp.engine.group import WorkerGroup
from rayexp.engine.inputs import StepInputs
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.passes import Passes
from rayexp.engine.rng import Draws, Dropout
from rayexp.engine.runtime import Runtime
from rayexp.engine.step import ControlFlags
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.errors import RunError

SHAPES = {"name": "shapes", "max_train_samples": 28, "max_val_samples": 8, "image_size": 16}
IMAGES: dict[str, Any] = {  # four steps an epoch, the last one of half a batch
    "data": SHAPES,
    "model": {"name": "own_model.py:SmallNet", "width": 4, "depth": 2, "dropout": 0.2},
    "batch_size": 8,
    "shards": 2,
    "lr": 0.05,
}
WORDS: dict[str, Any] = {  # four windows an epoch, the last one shorter
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 120, "max_val_tokens": 100, "bptt": 4, "eval_columns": 4},
    "batch_size": 8,
    "shards": 2,
    "lr": 0.05,
}
TEXT = {"emsize": 8, "nhid": 8, "nlayers": 2, "dropout": 0.2}
TRANSFORMER = {"name": "transformer", **TEXT, "nhead": 2, "context": 4}
ADAMW = {"name": "adamw", "clip": 0.5, "decay_norm_and_bias": False}
NESTEROV = {"momentum": 0.9, "nesterov": True, "clip": 0.5}
COSINE = {"name": "cosine", "warmup_epochs": 0.5}
PLATEAU = {"name": "plateau", "gamma": 0.5}
QUICK: dict[str, dict[str, Any]] = {
    "images": {**IMAGES, "optimizer": NESTEROV, "schedule": {"name": "onecycle"}, "label_smoothing": 0.1},
    "images ddp": {**IMAGES, "optimizer": ADAMW, "schedule": COSINE, "reduction": "ddp", "precision": "bf16"},
    "lstm": {**WORDS, "model": {"name": "lstm", **TEXT}, "optimizer": NESTEROV, "schedule": PLATEAU},
    "transformer": {**WORDS, "model": TRANSFORMER, "optimizer": ADAMW, "schedule": COSINE, "precision": "bf16"},
    "regression": {
        "workload": "own_workload.py:Regression",
        "data": {"samples": 28},
        **{key: IMAGES[key] for key in ("batch_size", "shards", "lr")},
        "schedule": {"name": "step", "step_epochs": 1},
    },
    "weighed": {
        "workload": "parts.py:Weighed",
        "data": {"samples": 28},
        **{key: IMAGES[key] for key in ("batch_size", "shards", "lr")},
    },
    "rnn": {**WORDS, "model": {"name": "rnn_relu", **TEXT}, "schedule": {"name": "onecycle"}},
    "masked": {**WORDS, "model": {"name": "parts.py:Masked"}, "optimizer": ADAMW},
    "own": {
        **IMAGES,
        "model": {"name": "parts.py:averaging"},
        "optimizer": {"name": "parts.py:RMSprop"},
        "schedule": {"name": "parts.py:halved"},
        "lr": 0.01,
    },
}
LONG: dict[str, dict[str, Any]] = {
    "resident": {**IMAGES, "data": {**SHAPES, "resident": True}, "optimizer": ADAMW, "precision": "bf16"},
    "pad": {**IMAGES, "data": {**SHAPES, "augment": {"pad": 2}}},
    "as they are": {**IMAGES, "data": {**SHAPES, "augment": None}, "optimizer": {"momentum": 0}},
    "resnet18 frozen": {
        **IMAGES,
        "model": {"name": "resnet18", "stem": "small", "freeze": ["conv1.*", "*bn?.*", "layer[12].*"]},
        "optimizer": ADAMW,
    },
    "mobilenet": {**IMAGES, "data": {**SHAPES, "image_size": 32}, "model": {"name": "mobilenet_v3_small"}},
    "googlenet": {**IMAGES, "data": {**SHAPES, "image_size": 32}, "model": {"name": "googlenet"}, "precision": "bf16"},
    "depths": {**IMAGES, "data": {**SHAPES, "image_size": 32}, "model": {"name": "efficientnet_b0"}},
    "own ddp": {**QUICK["own"], "reduction": "ddp"},
    "lstm ddp": {**QUICK["lstm"], "reduction": "ddp", "optimizer": {"momentum": 0, "clip": 0.25}},
    "gru": {**WORDS, "model": {"name": "gru", **TEXT}, "optimizer": ADAMW, "precision": "bf16"},
    "tied": {**WORDS, "model": {"name": "lstm", **TEXT, "tied": True}, "precision": "bf16"},
    "transformer ddp": {**QUICK["transformer"], "reduction": "ddp"},
    "no context": {**WORDS, "model": {**TRANSFORMER, "context": 0}, "optimizer": NESTEROV},
}
TRAININGS = QUICK | LONG
Open = Callable[..., Trainer]


def slow(*values: Any) -> list[Any]:
    """Parameters of tests that take long."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class Through(TorchDispatchMode):
    """Changes nothing. (Within any mode PyTorch computes some gradients in another way.)"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def steps(one: Trainer, flags: Callable[[], ControlFlags] = ControlFlags) -> list[tuple[float, str]]:
    """Loss and hash after each step of what is left of a training."""
    with Through():
        return [
            (event.loss, checkpoint.sha(one.state().tensors))
            for event in one.train(flags, wanted=lambda step: True)
            if isinstance(event, StepDone)
        ]


def replayed(one: Trainer, count: int = 2) -> None:
    """Assert that all of a trainer's steps are graphs, of so many shapes of batch."""
    assert one.stepper.capture == "graph", one.stepper.capture
    programs = list(one.stepper.programs)
    assert len(programs) == count
    halves: list[Any] = [half for program in programs for half in (program.compute, program.update)]
    assert all(half.operations for half in halves)


@pytest.mark.parametrize("name", [*QUICK, *slow(*LONG)])
def test_replayed_steps_have_the_bits_of_eager_ones(opened: Open, name: str) -> None:
    expected = steps(opened(TRAININGS[name], capture=False))
    assert len({sha for _, sha in expected}) == len(expected) > 9
    one = opened(TRAININGS[name])
    assert steps(one) == expected
    replayed(one)


@pytest.mark.parametrize("name", ["images", *slow("transformer")])
def test_a_step_late_on_two_replicas(opened: Open, name: str) -> None:
    """As a GPU trains: nobody waits for a step, and shards are computed side by side."""
    eager, one = opened(TRAININGS[name], capture=False), opened(TRAININGS[name], replicas=2)
    with Through():
        losses = [[event.loss for event in each.train() if isinstance(event, StepDone)] for each in (eager, one)]
    assert losses[0] == losses[1]
    assert checkpoint.sha(one.state().tensors) == checkpoint.sha(eager.state().tensors)
    assert len(one.stepper.passes.replicas) == 2
    replayed(one)


@pytest.mark.parametrize("name", ["rnn", *slow("images", "lstm", "own", "gru", "transformer")])
def test_graphs_go_on_from_a_state_that_is_loaded(opened: Open, name: str) -> None:
    """From within the second epoch: graphs of before, and a process that has none yet."""
    first = opened(TRAININGS[name])
    expected, files = [], {}
    with Through():
        for event in first.train(wanted=lambda step: True):
            if isinstance(event, StepDone):
                expected.append((event.loss, checkpoint.sha(first.state().tensors)))
                files[len(expected)] = checkpoint.encode(first.state())
    for at, one in itertools.product((2, first.steps + 1), (first, opened(TRAININGS[name]))):
        one.load(checkpoint.decode(files[at]))
        assert steps(one) == expected[at:]
        replayed(one)


def fail(patch: pytest.MonkeyPatch, error: type[Exception], at: int) -> None:
    """Have a capture fail, after so many others."""
    true, calls = Runtime.graph, itertools.count(1)

    def graph(here: Runtime, work: Callable[[], object], *args: Any) -> Callable[[], object]:
        def broken() -> None:
            work()
            raise error("why")

        return true(here, broken if next(calls) == at else work, *args)

    patch.setattr(Runtime, "graph", graph)


@pytest.mark.parametrize("name", ["rnn", *slow("images", "lstm")])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", [1, 4, *slow(2, 3)])
def test_a_capture_fails_after_others_have_worked(
    opened: Open, monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], at: int
) -> None:
    """The first or the second half of a step, of the ordinary shape of batch or of the shorter one."""
    expected = steps(opened(TRAININGS[name], capture=False))
    fail(monkeypatch, error, at)
    one = opened(TRAININGS[name], replicas=2)
    assert steps(one) == expected
    fewer = error is torch.OutOfMemoryError and at % 2 == 1
    assert len(one.stepper.passes.replicas) == (1 if fewer else 2)
    assert one.stepper.capture.startswith("graph" if fewer else "eager: ")
    assert len(one.stepper.programs._kept) == (4 if fewer else 0)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize(("name", "data"), [("masked", {"bptt": 8}), ("weighed", {"samples": 12})])
def test_what_is_kept_from_a_failed_capture_is_forgotten(
    opened: Open, monkeypatch: pytest.MonkeyPatch, error: type[Exception], name: str, data: dict[str, int]
) -> None:
    """A mask that was made then holds nothing. Epochs have two steps, and each makes anew what the other replaces."""
    tree = {**QUICK[name], "data": {**QUICK[name]["data"], **data}}
    expected = steps(opened(tree, capture=False))
    fail(monkeypatch, error, 1)
    one = opened(tree, replicas=2)
    assert steps(one) == expected


@pytest.mark.parametrize("flag", ["save", *slow("stop")])
def test_flags_are_heard_from_replayed_steps(opened: Open, flag: str) -> None:
    one, calls = opened(QUICK["own"]), itertools.count(1)
    told = []
    for event in one.train(lambda: ControlFlags(**{flag: next(calls) == 7})):
        if isinstance(event, StepDone):
            told.append(event.save or event.stopped)
    assert told == [False] * 7 + [True] + [False] * (4 if flag == "save" else 0)
    replayed(one)


# ---------------------------------------------------------------------- several workers


class Neighbours:
    """What threads hand to each other, all at the same time."""

    def __init__(self, world: int) -> None:
        self.barrier, self.given = threading.Barrier(world, timeout=60), [b""] * world

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        """What each thread has given, in the order of their ranks."""
        self.given[rank] = mine.clone() if isinstance(mine, Tensor) else mine
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class Neighbour(WorkerGroup):
    """A worker that is a thread."""

    direct = False

    def __init__(self, rank: int, neighbours: Neighbours) -> None:
        super().__init__(rank, len(neighbours.given))
        object.__setattr__(self, "_exchange", lambda mine: neighbours.exchange(rank, mine))

    def gather(self, data: bytes) -> list[bytes]:
        return self._exchange(data)

    def scatter(self, tensor: Tensor, out: Tensor) -> Any:
        for into, each in zip(out.view(self.world, -1), self._exchange(tensor), strict=True):
            into.copy_(each.view(self.world, -1)[self.rank])
        return SimpleNamespace(wait=lambda: None)

    def collect(self, part: Tensor, out: Tensor) -> Any:
        for into, each in zip(out.view(self.world, -1), self._exchange(part), strict=True):
            into.copy_(each)
        return SimpleNamespace(wait=lambda: None)

    def sum(self, tensor: Tensor) -> Callable[[], object]:
        tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))
        return lambda: None


@pytest.mark.parametrize("name", ["regression", *slow("images", "images ddp", "lstm", "transformer", "own")])
def test_several_workers_replay(opened: Open, name: str) -> None:
    """The exchange lies between the two graphs of a step; each worker has three shards of six, two of them one node."""
    tree = {**TRAININGS[name], "shards": 6, "batch_size": 12, "epochs": 4}
    found: dict[Any, Any] = {}

    def work(rank: int, one: Trainer, neighbours: Neighbours) -> None:
        settings.set_threads(1)
        try:
            found[one.config.capture, rank] = steps(one)
        except BaseException:
            neighbours.barrier.abort()  # nobody comes any more
            raise

    for capture in (False, "auto"):
        neighbours = Neighbours(2)
        trainers = [opened(tree, group=Neighbour(rank, neighbours), capture=capture) for rank in range(2)]
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(work, range(2), trainers, [neighbours] * 2))
    for one in trainers:
        replayed(one)
    assert len(found[False, 0]) > 5
    assert found["auto", 0] == found["auto", 1] == found[False, 0] == found[False, 1]
    if one.config.reduction == "exact":
        assert found[False, 0] == steps(opened(tree))


# ---------------------------------------------------------------------- slips that only a replay shows

told: dict[str, Any] = {}
"""What Python knows of the present step."""


def replace(patch: pytest.MonkeyPatch, owner: type, name: str, new: Callable[..., Any]) -> None:
    """Call `new` with the method that it replaces and its arguments."""
    true = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: new(true, *args, **kwargs))


def note(true: Any, inputs: StepInputs, fed: Any, lr: float, done: int, *flags: bool) -> None:
    told.update(lr=lr, done=done)
    true(inputs, fed, lr, done, *flags)


def as_number(name: str, at: int) -> Callable[..., Any]:
    """Give a method a number of Python's in the place of a tensor."""

    def call(true: Any, *args: Any) -> Any:
        return true(*args[:at], torch.full_like(args[at], told[name]), *args[at + 1 :])

    return call


def new_inputs(true: Any, inputs: StepInputs, *args: Any) -> None:
    inputs._static = False
    true(inputs, *args)


def new_rate(true: Any, inputs: StepInputs, *args: Any) -> None:
    true(inputs, *args)
    inputs.lr = inputs.lr.clone()


def seeds_in_a_pass(true: Any, passes: Passes, replica: Any, buffer: Any, inputs: Any, shards: range) -> float:
    for shard in shards:
        passes.generators[shard].manual_seed(passes._keys[shard] + 1)
    return true(passes, replica, buffer, inputs, shards)


def mask_of_numpy(true: Any, draws: Draws, like: Tensor, keep: float, *args: Any) -> Tensor:
    luck = np.random.default_rng(draws.generators[0].initial_seed())
    return torch.from_numpy(luck.random(like.shape) < keep).to(like.dtype)


def new_state(true: Any, passes: Passes, shard: int, state: dict[str, Tensor]) -> None:
    passes.recurrent_states[shard] = {name: tensor.clone() for name, tensor in state.items()}


def new_state_at_the_start(true: Any, passes: Passes, epoch: int, step: int, inputs: StepInputs) -> None:
    if step == 0:
        passes.recurrent_states.clear()
    true(passes, epoch, step, inputs)


def rounded_by_numpy(true: Any, master: Master) -> None:
    if master.half is not None:
        master.half.copy_(torch.from_numpy(master.params.numpy().copy()))


def new_moments(true: Any, optimizer: Optimizer, *args: Any) -> None:
    true(optimizer, *args)
    optimizer.state = {name: tensor.clone() for name, tensor in optimizer.state.items()}


def counted(true: Any, dropout: Dropout, x: Tensor) -> Tensor:
    dropout.calls = getattr(dropout, "calls", 0) + 1  # type: ignore[assignment]
    return true(dropout, x) * (1 + 1 / dropout.calls) if dropout.training else true(dropout, x)


SLIPS: dict[str, tuple[str, type, str, Callable[..., Any]]] = {
    "a rate that is a number": ("regression", Optimizer, "update", as_number("lr", 2)),
    "a step that is a number": ("images ddp", Optimizer, "update", as_number("done", 3)),
    "statistics by a number": ("own", Master, "update_stats", as_number("done", 3)),
    "inputs that are replaced": ("regression", StepInputs, "tell", new_inputs),
    "a rate that is replaced": ("regression", StepInputs, "tell", new_rate),
    "seeds in a pass": ("images", Passes, "one", seeds_in_a_pass),
    "a mask of numpy's": ("images", Draws, "bernoulli", mask_of_numpy),
    "a state that is replaced": ("rnn", Passes, "keep_state", new_state),
    "a state that is new at the start of an epoch": ("rnn", Passes, "begin", new_state_at_the_start),
    "weights that numpy has seen": ("transformer", Master, "round_weights", rounded_by_numpy),
    "moments that are replaced": ("regression", Optimizer, "update", new_moments),
    "a layer that counts its calls": ("rnn", Dropout, "forward", counted),
}


@pytest.mark.parametrize("slip", list(SLIPS))
def test_a_slip_is_found(opened: Open, monkeypatch: pytest.MonkeyPatch, slip: str) -> None:
    """It does no harm where steps are not captured."""
    name, owner, method, new = SLIPS[slip]
    replace(monkeypatch, StepInputs, "tell", note)
    replace(monkeypatch, owner, method, new)
    expected = steps(opened(TRAININGS[name], capture=False, epochs=2))
    one = opened(TRAININGS[name], epochs=2)

    def alike() -> None:
        assert steps(one) == expected
        replayed(one)

    with pytest.raises((AssertionError, RunError)):  # other bits, a tensor that is gone, NaN, or no graph at all
        alike()
