"""Flat buffers: where tensors lie, what looks into them, and what a replica leaves in a buffer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayexp.engine.gradients import SCALARS, GradientBuffer, Master, ParameterLayout, ReplicaModel
from rayexp.errors import UserError

CPU = torch.device("cpu")


class Net(nn.Module):
    """Weights of several kinds; `spare` is used only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=0.3)
        self.spare = nn.Linear(4, 2)
        self.head = nn.Linear(4, 2, bias=False)
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        features = self.norm(self.conv(x)).mean((2, 3))
        return (self.spare if spare else self.head)(features)


def net() -> Net:
    torch.manual_seed(0)
    return Net().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("shards", [1, 3, 8])
def test_where_tensors_lie(everywhere: bool, shards: int) -> None:
    """Each on a boundary that every number of workers cuts evenly, none over another, the decayed ones first."""
    model = net()
    layout = ParameterLayout(model, shards, everywhere)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {slot.name for slot in layout.params} == trained
    end = 0
    for slot in layout.params:
        assert slot.start % (16 * shards) == 0
        assert slot.start >= end
        end = slot.start + slot.size
        assert slot.size == model.get_parameter(slot.name).numel()
        decayed = everywhere or model.get_parameter(slot.name).ndim > 1
        assert (slot.start < layout.decayed) == decayed
    assert layout.size >= end
    assert layout.size % shards == layout.buffer_size % shards == 0
    assert len(SCALARS) <= 16
    assert layout.head_size >= 16 + layout.stats_size
    assert [slot.name for slot in layout.stats] == ["norm.running_mean", "norm.running_var"]
    buffer = torch.arange(float(layout.buffer_size))
    assert layout.scalars(buffer).tolist() == list(range(len(SCALARS)))
    assert layout.batch_stats(buffer).tolist() == list(range(16, 16 + layout.stats_size))
    assert layout.gradient(buffer).tolist() == list(range(layout.head_size, layout.buffer_size))
    assert layout.head(buffer).tolist() == list(range(layout.head_size))


def test_weights_of_another_type_are_refused() -> None:
    with pytest.raises((TypeError, UserError), match=r"weight.*float64"):
        ParameterLayout(nn.Linear(2, 2).double(), 4)


def test_the_master_holds_the_model_and_its_eval_models_look_into_it() -> None:
    model = net()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layout = ParameterLayout(model, 4)
    master = Master(model, layout, CPU)
    found = master.tensors(7)
    assert list(found) == list(state)
    for name, tensor in state.items():
        wanted = torch.tensor(7) if name.endswith("num_batches_tracked") else tensor
        assert torch.equal(found[name], wanted), name
    assert found["conv.weight"].stride() == state["conv.weight"].stride()
    evaluated = master.eval_model()
    assert not evaluated.training
    x = torch.randn(2, 3, 5, 5)
    before = evaluated(x)
    with torch.no_grad():
        master.params.mul_(2)
        master.stats.fill_(0.5)
    assert torch.equal(evaluated.head.weight, 2 * state["head.weight"])
    assert (evaluated.norm.running_var == 0.5).all()
    assert not torch.equal(evaluated(x), before)
    master.load(state)
    assert all(torch.equal(master.tensors(0)[n], t) for n, t in state.items() if not n.endswith("tracked"))
    with pytest.raises(KeyError):
        master.load({})


def test_running_statistics_take_the_mean_over_shards() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=None))
    layout = ParameterLayout(model, 2)
    master = Master(model, layout, CPU)
    buffer = torch.zeros(layout.buffer_size)
    sums = {slot.name: slot.view(layout.batch_stats(buffer)) for slot in layout.stats}
    sums["0.running_mean"].fill_(6.0)
    sums["1.running_var"].fill_(8.0)
    sums["2.running_var"].fill_(8.0)
    master.update_stats(buffer, 4, torch.tensor(0.0))
    found = master.tensors(0)
    torch.testing.assert_close(found["0.running_mean"], torch.full((3,), 0.3 * 6 / 4))
    torch.testing.assert_close(found["0.running_var"], torch.full((3,), 0.7))
    torch.testing.assert_close(found["1.running_var"], torch.full((2,), 0.9 + 0.1 * 8 / 4))
    assert found["2.running_var"].tolist() == [2.0, 2.0]  # of an average the first step leaves nothing of the 1
    sums["2.running_var"].fill_(20.0)
    master.update_stats(buffer, 4, torch.tensor(1.0))
    assert found["2.running_var"].tolist() == [3.5, 3.5]


def one_pass(
    replica: ReplicaModel, layout: ParameterLayout, buffer: GradientBuffer, x: Tensor, spare: bool
) -> dict[str, Tensor]:
    """What the buffer holds after it."""
    replica.module(x, spare).square().sum().backward()
    replica.finish_pass()
    return dict(zip([slot.name for slot in layout.params], buffer.gradients, strict=True))


@pytest.mark.parametrize("zeroed", [True, False])
def test_a_replica_leaves_its_gradients_and_statistics_in_the_buffer(zeroed: bool) -> None:
    """Over what was there before, or added to zeros; and zeros for the parameters that a pass does not use."""
    model = net()
    layout = ParameterLayout(model, 2)
    master = Master(model, layout, CPU)
    replica, buffer = ReplicaModel(master), GradientBuffer(layout, CPU)
    assert replica.module.training
    completed: list[int] = []
    replica.watch(completed.append)
    x = torch.randn(6, 3, 5, 5)
    for spare in (True, False):
        if zeroed:
            buffer.tensor.zero_()
        else:
            layout.gradient(buffer.tensor).fill_(7.0)
            buffer.clear(())
        replica.bind(buffer, None if zeroed else set())
        completed.clear()
        found = one_pass(replica, layout, buffer, x, spare)
        true = net().train()
        true.norm.momentum = 1.0
        true(x, spare).square().sum().backward()
        for name, parameter in true.named_parameters():
            if name in found:
                wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(found[name], wanted, msg=lambda m, n=name: f"{n}: {m}")
        used = {i for i, slot in enumerate(layout.params) if true.get_parameter(slot.name).grad is not None}
        assert set(completed) == used
        for slot, stat in zip(layout.stats, buffer.stats, strict=True):
            torch.testing.assert_close(stat, true.get_buffer(slot.name))
    # A second pass into the same buffer is added.
    once = {name: tensor.clone() for name, tensor in found.items()}
    twice = one_pass(replica, layout, buffer, x, False)
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], 2 * tensor)


class Setting(torch.autograd.Function):
    """A linear layer whose backward pass sets the weight's gradient by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.weight.grad = grad.t() @ ctx.saved_tensors[0]
        return grad @ ctx.weight, None


def test_a_gradient_that_a_model_puts_beside_the_buffer_is_fetched() -> None:
    model = nn.Linear(3, 2, bias=False)
    layout = ParameterLayout(model, 2)
    replica, buffer = ReplicaModel(Master(model, layout, CPU)), GradientBuffer(layout, CPU)
    x = torch.randn(4, 3, requires_grad=True)
    buffer.tensor.fill_(7.0)  # of an earlier pass
    replica.bind(buffer, set())
    Setting.apply(x, replica.module.weight).square().sum().backward()
    replica.finish_pass()
    expected = (2 * (x @ model.weight.t())).t() @ x
    torch.testing.assert_close(buffer.gradients[0], expected)
    assert replica.module.weight.grad is buffer.gradients[0]


def test_a_buffer_is_cleared_where_it_was_touched() -> None:
    layout = ParameterLayout(nn.Embedding(10, 4), 2)
    buffer = GradientBuffer(layout, CPU)
    buffer.clear(layout.touched({"weight": torch.tensor([2, 5])}))
    buffer.tensor.fill_(3.0)
    buffer.clear(layout.touched({"weight": torch.tensor([7])}))
    (gradient,) = buffer.gradients
    assert (gradient == 0).all(1).nonzero()[:, 0].tolist() == [2, 5]
    assert not buffer.head.any()
    buffer.clear(())
    assert (gradient == 0).all(1).nonzero()[:, 0].tolist() == [2, 5, 7]
