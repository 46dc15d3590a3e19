"""An update rule and a schedule of one's own: against torch.optim, and how each mistake is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import runtime
from rayexp.engine.gradients import COUNT, Master, ParameterLayout
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.own_rules import open_rule, open_schedule
from rayexp.engine.schedule import Schedule
from rayexp.errors import UserError

RMSPROP = """
import torch
class RMSprop:
    state = ("square_avg",)
    def __init__(self, alpha: float = 0.99, eps: float = 1e-8):
        self.alpha, self.eps = alpha, eps
    def update(self, params, gradient, state, lr, step, weight_decay):
        gradient.add_(params, alpha=weight_decay)
        state["square_avg"].mul_(self.alpha).addcmul_(gradient, gradient, value=1 - self.alpha)
        params.sub_(lr * gradient / (state["square_avg"].sqrt() + self.eps))
"""
Make = Callable[..., ExperimentConfig]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "code").mkdir()

    def config(text: str, **tree: Any) -> ExperimentConfig:
        (tmp_path / "code" / "own.py").write_text(text)
        return parse({"code": [str(tmp_path / "code")], **tree}, ExperimentConfig, "test")

    return config


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_own_rmsprop_is_that_of_torch(
    make: Make, replicas: int, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, shared by replicas; norms and biases may be left without decay."""
    monkeypatch.setattr("rayexp.engine.optimizer._CHUNK", 64)
    optimizer = {"name": "own.py:RMSprop", "alpha": 0.9, "decay_norm_and_bias": False}
    config = make(RMSPROP, lr=0.05, weight_decay=decay, optimizer=optimizer, scaling={"lanes": replicas})
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 13), torch.nn.Linear(13, 5)).double().float()
    theirs = [p.detach().clone().requires_grad_() for p in model.parameters()]
    groups = [
        {"params": [p for p in theirs if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in theirs if p.ndim == 1]},
    ]
    reference = torch.optim.RMSprop(groups, lr=0.05, alpha=0.9, eps=1e-8)
    layout = ParameterLayout(model, config.shards, decay_norm_and_bias=False)
    master = Master(model, layout, torch.device("cpu"))
    ours = Optimizer(config, layout, master.params)
    assert list(ours.state) == ["square_avg"]
    assert len(ours.chunks) > 2
    with runtime.configure(config, torch.device("cpu"), config.shards) as here:
        for step in range(5):
            buffer = torch.zeros(layout.buffer_size)
            layout.scalars(buffer)[COUNT] = 4
            for (_, view), p in zip(
                master.named(layout.gradient(buffer)), sorted(theirs, key=lambda p: p.ndim < 2), strict=True
            ):
                p.grad = torch.randn(p.shape)
                view.copy_(4 * p.grad)
            ours.update(buffer, torch.tensor(0.05, dtype=torch.float64), torch.tensor(float(step)), here)
            reference.step()
    for (_, view), p in zip(master.named(master.params), sorted(theirs, key=lambda p: p.ndim < 2), strict=True):
        torch.testing.assert_close(view, p.detach(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ("gradient.add_", "gradient.div_(gradient.norm()); gradient.add_"),
            r"own.py:RMSprop is not elementwise: in two",
        ),
        (
            ("params.sub_(lr", "self.calls = getattr(self, 'calls', 0) + 1; params.sub_(lr"),
            r"^optimizer.name: own.py:RMSprop: its update changes its attribute calls \(2 -> 4\), which no checkpoint "
            r"holds; allowed: what follows from `state`, and from `step`",
        ),
        (
            ("params.sub_(lr", "gradient.add_(getattr(self, 'last', 0)); self.last = gradient; params.sub_(lr"),
            r"its update makes something else of the same values the second time: it keeps something",
        ),
        (("params.sub_(lr", "params.mul_(torch.rand(1)).sub_(lr"), r"the second time: .*, or draws random numbers"),
        (("params.sub_(lr", "params.sub(lr"), r"own.py:RMSprop: its update changes no parameter"),
        (("alpha=weight_decay", "alpha=gone"), r"its update fails \(line 8 of .*own.py: NameError: name 'gone'"),
        (('state = ("square_avg",)', ""), r"own.py:RMSprop has no `state`, a tuple of names"),
        (("def update", "def advance"), r"own.py:RMSprop has no method `update`"),
        (("alpha: float", "rho, alpha: float"), r"^optimizer.rho: own.py:RMSprop needs it, and it has no default"),
    ],
)
def test_what_is_no_update_rule(make: Make, change: tuple[str, str], line: str) -> None:
    assert RMSPROP.count(change[0]) == 1
    with pytest.raises(UserError, match=line):
        open_rule(make(RMSPROP.replace(*change), optimizer={"name": "own.py:RMSprop"}))


def test_a_rule_may_remember_what_never_changes(make: Make) -> None:
    """A size, or how many there are in all: the same in every call that is made alike."""
    text = RMSPROP.replace("gradient.add_", "self.size, self.none = len(params), float('nan'); gradient.add_")
    assert open_rule(make(text, optimizer={"name": "own.py:RMSprop"})) is not None


def test_a_rule_that_changes_nothing(make: Make) -> None:
    text = (
        "class R:\n    state = ()\n    def update(self, params, gradient, state, lr, step, weight_decay): params - lr"
    )
    with pytest.raises(UserError, match="its update changes no parameter"):
        open_rule(make(text, optimizer={"name": "own.py:R"}))


def test_an_own_schedule(make: Make) -> None:
    text = "def cycle(epoch: float, epochs, low: float = 0.5): return low + (1 - low) * abs(epoch % 2 - 1)"
    config = make(text, lr=0.2, epochs=4, schedule={"name": "own.py:cycle", "low": 0.1, "warmup_epochs": 0.5})
    schedule = Schedule(config, steps=4)
    expected = [0.2 * min(1, (step + 1) / 2) * (0.1 + 0.9 * abs(step / 4 % 2 - 1)) for step in range(16)]
    assert [schedule.lr(step) for step in range(16)] == pytest.approx(expected)
    assert config.schedule.depends_on_epochs
    assert open_schedule(parse({}, ExperimentConfig, "test"), 4) is None
    moments = "def at(step, steps, epochs, progress): return step + 100 * steps + 10000 * epochs + progress"
    factor = open_schedule(make(moments, epochs=2, schedule={"name": "own.py:at"}), 5)
    assert factor is not None
    assert factor(7) == 7 + 500 + 20000 + 0.7


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def s(step): return -1", r"^schedule.name: own.py:s gives -1 at step 0; expected a number from 0$"),
        ("def s(step): return float('nan')", r"gives nan at step 0"),
        ("def s(step): return 'x'", r"gives 'x' at step 0"),
        ("def s(step): return 1 / step", r"cannot be made \(line 1 of .*ZeroDivisionError"),
        ("def s(step, low): return 1", r"^schedule.low: own.py:s needs it"),
    ],
)
def test_what_is_no_schedule(make: Make, text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        open_schedule(make(text, schedule={"name": "own.py:s"}), 4)
