"""SGD, AdamW and clipping on flat buffers against `torch.optim` and `clip_grad_norm_` in float64, over 20 steps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import optimizer as optimize
from rayexp.engine.gradients import Master, ParameterLayout, Touched
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.runtime import Runtime, configure
from rayexp.errors import UserError

STEPS = 20
COUNT = 12
LANES = 3
SGD = [
    {"momentum": momentum, "nesterov": nesterov}
    for momentum, nesterov in ((0.0, False), (0.5, False), (0.9, False), (0.9, True))
]
ADAMW = [{"name": "adamw", "betas": betas, "eps": eps} for betas in ([0.9, 0.999], [0.5, 0.8]) for eps in (1e-8, 0.05)]


def net() -> nn.Module:
    """Matrices, a kernel in channels_last, norms and biases: some of them decayed, some perhaps not."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, 3, bias=False)
    )
    return model.to(memory_format=torch.channels_last)


def experiment(optimizer: dict[str, Any], **changes: Any) -> ExperimentConfig:
    return parse({"optimizer": optimizer, **changes}, ExperimentConfig, "test")


def rate(step: int) -> float:
    """Another one in each step, as under a schedule."""
    return 0.02 * (1 + step % 7)


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """SUMs over the samples; norms from well below the clip to well above."""
    generator = torch.Generator().manual_seed(step)
    scale = COUNT * (0.03, 0.2, 1.0, 4.0)[step % 4]
    return {n: scale * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def reference(config: ExperimentConfig, model: nn.Module) -> torch.optim.Optimizer:
    """torch.optim's own over float64 copies, no decay on one-dimensional parameters where that is not configured."""
    o = config.optimizer
    thin = [p for p in model.parameters() if p.ndim == 1]
    thick = [p for p in model.parameters() if p.ndim > 1]
    decay = config.weight_decay
    groups = [
        {"params": thick, "weight_decay": decay},
        {"params": thin, "weight_decay": decay if o.decay_norm_and_bias else 0.0},
    ]
    if o.name == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, betas=o.betas, eps=o.eps, foreach=False)
    return torch.optim.SGD(groups, lr=1.0, momentum=o.momentum, nesterov=o.nesterov, foreach=False)


@functools.cache
def replicas_of(lanes: int) -> Runtime:
    """So many replicas, of one thread each."""
    return configure(experiment({}, scaling={"lanes": lanes}), torch.device("cpu"), 8, 1)


def ours(config: ExperimentConfig, model: nn.Module, lanes: int = LANES) -> tuple[Master, Optimizer, Runtime]:
    layout = ParameterLayout(model, config.shards, config.optimizer.decay_norm_and_bias)
    master = Master(model, layout, torch.device("cpu"))
    return master, Optimizer(config, layout, master.params), replicas_of(lanes)


def advance(
    optimizer: Optimizer,
    buffer: Tensor,
    lr: float,
    step: int,
    runtime: Runtime,
    touched: Sequence[Touched] = (),
    count: int = COUNT,
) -> None:
    """Step number `step`, from 1."""
    optimizer.layout.scalars(buffer)[1] = count
    optimizer.update(buffer, torch.tensor(lr, dtype=torch.float64), torch.tensor(step - 1.0), runtime, touched)


def buffer_of(layout: ParameterLayout, found: dict[str, Tensor]) -> Tensor:
    buffer = torch.zeros(layout.buffer_size)
    for slot in layout.params:
        slot.view(layout.gradient(buffer)).copy_(found[slot.name])
    return buffer


def close(master: Master, flat: Tensor, true: nn.Module, of: Callable[[nn.Parameter], Any], tolerance: float) -> None:
    """A flat buffer holds what belongs to each parameter."""
    pairs = [(mine.double(), of(true.get_parameter(name))) for name, mine in master.named(flat)]
    mine, wanted = (torch.cat([t.reshape(-1) for t in side]) for side in zip(*pairs, strict=True))
    torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


def follow(config: ExperimentConfig, lanes: int = LANES, tolerance: float = 2e-6) -> None:
    """Both take the same 20 steps; after each, parameters and gradients (divided, clipped) are equal."""
    model, true = net(), net().double()
    master, optimizer, runtime = ours(config, model, lanes)
    theirs = reference(config, true)
    clipped = 0
    for step in range(STEPS):
        found = gradients(true, step)
        buffer = buffer_of(master.layout, found)
        advance(optimizer, buffer, rate(step), step + 1, runtime)
        for name, parameter in true.named_parameters():
            parameter.grad = found[name].double() / COUNT
        if config.optimizer.clip is not None:
            norm = nn.utils.clip_grad_norm_(true.parameters(), config.optimizer.clip)
            clipped += bool(norm > config.optimizer.clip)
        for group in theirs.param_groups:
            group["lr"] = rate(step)
        theirs.step()
        close(master, master.params, true, lambda p: p.detach(), tolerance)
        close(master, master.layout.gradient(buffer), true, lambda p: p.grad, 1e-6)
    if config.optimizer.clip is not None:
        assert 0 < clipped < STEPS
    for buffer, flat in optimizer.state.items():
        close(master, flat, true, lambda p, b=buffer: theirs.state[p][b], 1e-5)


@pytest.mark.parametrize("optimizer", [*SGD, *ADAMW], ids=lambda o: " ".join(str(v) for v in o.values()))
@pytest.mark.parametrize(("weight_decay", "everywhere"), [(0.0, True), (0.1, True), (0.1, False)])
@pytest.mark.parametrize("clip", [None, 5.0])
def test_it_follows_torch_optim(
    optimizer: dict[str, Any], weight_decay: float, everywhere: bool, clip: float | None
) -> None:
    words = {**optimizer, "decay_norm_and_bias": everywhere, "clip": clip}
    follow(experiment(words, weight_decay=weight_decay))


@pytest.mark.parametrize("optimizer", [SGD[3], ADAMW[0]], ids=["sgd", "adamw"])
@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_chunks_and_replicas_treat_every_element_once(
    monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any], lanes: int
) -> None:
    monkeypatch.setattr(optimize, "_CHUNK", 32)
    config = experiment({**optimizer, "clip": 5.0, "decay_norm_and_bias": False}, weight_decay=0.1)
    _, one, _ = ours(config, net())
    assert len(one.chunks) > 5
    covered = [i for where, _ in one.chunks for i in range(where.start, where.stop)]
    assert covered == list(range(one.layout.size))
    follow(config, lanes)


def test_the_first_steps_of_adamw_are_corrected_for_their_bias() -> None:
    """Without decay and eps, the first step is lr times the gradient's sign, whatever the betas."""
    model = net()
    master, optimizer, runtime = ours(experiment({"name": "adamw", "eps": 1e-30}, weight_decay=0.0), model)
    before = {name: p.clone() for name, p in master.named(master.params)}
    found = gradients(model, 0)
    advance(optimizer, buffer_of(master.layout, found), 0.01, 1, runtime)
    for name, mine in master.named(master.params):
        torch.testing.assert_close(mine, before[name] - 0.01 * found[name].sign(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("betas", [[1.0, 0.999], [0.9, 1.0], [-0.1, 0.9]])
def test_betas_with_which_adamw_divides_by_zero_are_refused(betas: list[float]) -> None:
    """As by torch.optim.AdamW."""
    with pytest.raises(ValueError, match="beta"):
        torch.optim.AdamW(net().parameters(), betas=tuple(betas))
    with pytest.raises(UserError, match=r"optimizer\.betas"):
        experiment({"name": "adamw", "betas": betas})


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_embedding_whose_touched_rows_alone_are_updated(clip: float | None, momentum: float) -> None:
    """The whole matrix ends as torch.optim.SGD leaves it; with momentum all rows move, and all are updated."""
    config = experiment({"momentum": momentum, "clip": clip}, weight_decay=0.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Embedding(40, 5), nn.Linear(5, 2))
    true = nn.Sequential(nn.Linear(4, 3), nn.Embedding(40, 5), nn.Linear(5, 2)).double()
    true.load_state_dict(model.state_dict())
    layout = ParameterLayout(model, config.shards)
    master = Master(model, layout, torch.device("cpu"))

    def touched(rows: Sequence[int]) -> list[Touched]:
        return layout.touched({"1.weight": torch.tensor(rows, dtype=torch.int64)})

    optimizer = Optimizer(config, layout, master.params, touched([]))
    assert optimizer.sparse == (momentum == 0)
    runtime = replicas_of(LANES)
    theirs = torch.optim.SGD(true.parameters(), lr=1.0, momentum=momentum)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        rows = sorted({int(i) for i in torch.randint(40, (step % 5,), generator=generator)})
        found = {n: COUNT * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        found["1.weight"][[i for i in range(40) if i not in rows]] = 0
        advance(optimizer, buffer_of(layout, found), rate(step), step + 1, runtime, touched(rows))
        for name, parameter in true.named_parameters():
            parameter.grad = found[name].double() / COUNT
        if clip is not None:
            nn.utils.clip_grad_norm_(true.parameters(), clip)
        theirs.param_groups[0]["lr"] = rate(step)
        theirs.step()
    for name, mine in master.named(master.params):
        torch.testing.assert_close(mine.double(), true.get_parameter(name).detach(), rtol=1e-6, atol=1e-6)


def test_what_is_decayed() -> None:
    """The layout puts matrices first; biases and norms are decayed only where that is configured."""
    for everywhere, optimizer in itertools.product((True, False), ("sgd", "adamw")):
        words = {"name": optimizer, "momentum": 0.0, "decay_norm_and_bias": everywhere}
        model = net()
        master, update, runtime = ours(experiment(words, weight_decay=0.5), model)
        before = {name: p.clone() for name, p in master.named(master.params)}
        advance(update, torch.zeros(master.layout.buffer_size), 0.1, 1, runtime)
        for name, mine in master.named(master.params):
            factor = 0.95 if everywhere or mine.ndim > 1 else 1.0
            torch.testing.assert_close(mine, factor * before[name], msg=f"{optimizer} {everywhere} {name}")


def test_a_tiny_gradient_is_clipped_as_by_torch() -> None:
    """Where the norm is so small that the 1e-6 under it counts."""
    config, model = experiment({"momentum": 0.0, "clip": 2e-6}, weight_decay=0.0), net()
    master, optimizer, runtime = ours(config, model)
    buffer = torch.zeros(master.layout.buffer_size)
    buffer[master.layout.head_size] = COUNT * 3e-6
    advance(optimizer, buffer, 0.1, 1, runtime)
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parameter.grad = torch.tensor([3e-6], dtype=torch.float64)
    nn.utils.clip_grad_norm_([parameter], 2e-6)
    assert buffer[master.layout.head_size].item() == pytest.approx(parameter.grad.item(), rel=1e-4)


def test_a_gradient_that_is_not_finite_is_not_hidden_by_the_clip() -> None:
    model = net()
    master, optimizer, runtime = ours(experiment({"clip": 1.0}), model)
    found = gradients(model, 0)
    found["3.weight"][0, 0] = float("nan")
    advance(optimizer, buffer_of(master.layout, found), 0.1, 1, runtime)
    assert all(mine.isnan().all() for _, mine in master.named(master.params))


def test_a_step_without_samples_moves_nothing() -> None:
    model = net()
    master, optimizer, runtime = ours(experiment({"momentum": 0.0}, weight_decay=0.0), model)
    before = master.params.clone()
    advance(optimizer, buffer_of(master.layout, gradients(model, 0)), 0.1, 1, runtime, count=0)
    assert torch.equal(master.params, before)
