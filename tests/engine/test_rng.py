"""Keyed dropout and stochastic depth: their distribution, their scale, and what their draws depend on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torchvision import models, ops

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import order
from rayexp.engine.rng import Draws, Dropout, StochasticDepth, adopt, seeded
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.errors import UserError

CPU = torch.device("cpu")
SIZES = (40, 30, 30)


def drawn(module: Dropout | StochasticDepth, x: Tensor, keys: tuple[int, ...] = (1, 2, 3)) -> Tensor:
    module.train()
    module.draws.begin(seeded(keys, CPU), SIZES)
    out: Tensor = module(x)
    return out


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_drops_at_its_rate_and_scales_what_is_left(p: float) -> None:
    x = torch.rand(100, 50) + 0.5
    out = drawn(Dropout(p), x)
    kept = out != 0
    torch.testing.assert_close(out[kept], (x / (1 - p))[kept])
    assert stats.binomtest(int((~kept).sum()), kept.numel(), p).pvalue > 1e-4
    # Elements are drawn by themselves: neighbours agree as often as chance has it.
    agree = (kept[:, 1:] == kept[:, :-1]).float().mean().item()
    assert agree == pytest.approx(p**2 + (1 - p) ** 2, abs=0.05)


def test_dropout_leaves_what_it_must() -> None:
    x = torch.rand(100, 5)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
    assert not drawn(Dropout(1.0), x).any()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_s_draws_are_its_own(dim: int) -> None:
    """Another key of a shard changes that shard's slice alone; alone it draws what it draws among others."""
    x = torch.ones((100, 7) if dim == 0 else (7, 100))
    module = Dropout(0.5, dim)
    first, second = drawn(module, x), drawn(module, x, (1, 9, 3))
    parts = list(zip(first.split(SIZES, dim), second.split(SIZES, dim), strict=True))
    assert [torch.equal(a, b) for a, b in parts] == [True, False, True]
    module.draws.begin(seeded([2], CPU), [30])
    assert torch.equal(module(x.narrow(dim, 0, 30)), parts[1][0])
    # A second layer of the pass goes on in the same stream: it is not given the same mask again.
    module.draws.begin(seeded([2], CPU), [30])
    one = module(x.narrow(dim, 0, 30))
    assert not torch.equal(module(x.narrow(dim, 0, 30)), one)


def test_samples_that_are_folded_with_time() -> None:
    out = drawn(Dropout(0.5), torch.ones(400, 3))
    module = Dropout(0.5)
    module.draws.begin(seeded([1], CPU), [40])
    assert torch.equal(module(torch.ones(160, 3)), out[:160])


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_stochastic_depth_by_row(dim: int) -> None:
    """As torchvision's: each sample's branch is whole or gone, and what is left is scaled."""
    x = torch.rand(100, *[3] * (dim - 1)) + 0.5
    out = drawn(StochasticDepth(0.4, "row"), x)
    kept = out.flatten(1).any(1)
    torch.testing.assert_close(out[kept], x[kept] / 0.6)
    assert not out[~kept].any()
    assert stats.binomtest(int((~kept).sum()), 100, 0.4).pvalue > 1e-3
    assert all(0 < int(part.sum()) < len(part) for part in kept.split(SIZES))  # samples of one shard differ


def test_stochastic_depth_by_batch() -> None:
    """One draw for a whole shard, another for the next."""
    x = torch.rand(100, 2, 3, 3) + 0.5
    module = StochasticDepth(0.4, "batch")
    gone, patterns = 0, set()
    for trial in range(200):
        out = drawn(module, x, (3 * trial, 3 * trial + 1, 3 * trial + 2))
        kept = []
        for part, whole in zip(out.split(SIZES), x.split(SIZES), strict=True):
            kept.append(bool(part.any()))
            if kept[-1]:
                torch.testing.assert_close(part, whole / 0.6)
        gone += kept.count(False)
        patterns.add(tuple(kept))
    assert stats.binomtest(gone, 600, 0.4).pvalue > 1e-3
    assert patterns == set(itertools.product((True, False), repeat=3))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_is_torchvision_s_where_nothing_is_drawn(mode: str) -> None:
    x = torch.rand(100, 4)
    true = ops.StochasticDepth(0.3, mode)
    ours = StochasticDepth(0.3, mode)
    assert torch.equal(ours.eval()(x), true.eval()(x))
    for p in (0.0, 1.0):
        assert torch.equal(drawn(StochasticDepth(p, mode), x), ops.StochasticDepth(p, mode).train()(x))


def test_a_pass_that_was_not_announced_is_noticed() -> None:
    module = Dropout(0.5).train()
    with pytest.raises(RuntimeError, match="outside a training pass"):
        module(torch.ones(10, 2))
    module.draws.begin(seeded([1], CPU), [4])
    with pytest.raises(RuntimeError, match="another batch"):
        module(torch.ones(10, 2))


@pytest.mark.parametrize("build", [models.efficientnet_b0, models.mobilenet_v3_small, models.convnext_tiny])
def test_every_random_layer_of_a_model_is_adopted(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = build()
    before = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Dropout | ops.StochasticDepth)]
    draws = Draws()
    adopt(model, draws, 0)
    after = dict(model.named_modules())
    assert before
    for name, old in before:
        new = after[name]
        assert isinstance(new, Dropout | StochasticDepth)
        assert new.draws is draws
        assert new.p == old.p
        assert isinstance(new, StochasticDepth) == isinstance(old, ops.StochasticDepth)
        if isinstance(new, StochasticDepth):
            assert new.mode == old.mode
    assert not any(isinstance(m, nn.Dropout | ops.StochasticDepth) for m in model.modules())


@pytest.mark.parametrize(
    "layer", [nn.Dropout2d(0.1), nn.LSTM(2, 2, 2, dropout=0.1), nn.MultiheadAttention(4, 2, dropout=0.1)]
)
def test_what_draws_by_itself_is_refused(layer: nn.Module) -> None:
    with pytest.raises((TypeError, UserError), match="draw"):
        adopt(nn.Sequential(layer), Draws(), 0)


def test_an_attribute_called_dropout_is_no_dropout() -> None:
    """Of a model that only notes what it was made with."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
    model.dropout = 0.3  # type: ignore[assignment]
    assert adopt(nn.Sequential(model), Draws(), 0)


def test_each_epoch_step_and_shard_has_a_key_of_its_own(
    session: Callable[[ExperimentConfig], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is the seed's: the same again in a second run, all others under another seed."""

    def keys(seed: int) -> list[int]:
        found: list[int] = []
        begin = Draws.begin

        def spy(self: Draws, generators: list[torch.Generator], sizes: tuple[int, ...]) -> None:
            found.extend(generator.initial_seed() for generator in generators)
            begin(self, generators, sizes)

        monkeypatch.setattr(Draws, "begin", spy)
        tree = {
            "workload": "language_model", "data": {"name": "python_docs", "max_train_tokens": 500, "bptt": 20},
            "model": {"name": "gru", "emsize": 8, "nhid": 8, "nlayers": 1}, "batch_size": 8, "shards": 4, "epochs": 2,
            "seed": seed, "scaling": {"lanes": 1}, "optimizer": {"momentum": 0},
        }  # fmt: skip
        steps = sum(isinstance(e, StepDone) for e in session(parse(tree, ExperimentConfig, "test")).train())
        monkeypatch.setattr(Draws, "begin", begin)
        assert len(found) == 4 * steps
        assert steps >= 4
        return found

    first = keys(0)
    assert len(set(first)) == len(first)
    assert keys(0) == first
    assert not set(keys(1)) & set(first)
    assert first[0] == order.key(0, "dropout", 1, 0, 0)
