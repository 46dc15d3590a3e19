"""Models that do what the engine cannot keep are refused by name in their first step; others are kept to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import checkpoint
from rayexp.engine.passes import Passes
from rayexp.engine.rng import Dropout
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.errors import UserError
from rayexp.workloads.image_classification.workload import ImageClassification

Open = Callable[[ExperimentConfig], Trainer]
Train = Callable[..., Trainer]


class Net(nn.Module):
    """A small classifier that calls `middle` on features fp32[n, 8]."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.norm = nn.BatchNorm2d(8)
        self.middle = middle or nn.Identity()
        self.head = nn.Linear(8, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture
def train(session: Open, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train a model of one's own for some steps."""

    def run(make: Callable[[], nn.Module], steps: int = 2, **changes: Any) -> Trainer:
        def model(self: ImageClassification) -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made = make()
            return made.to(memory_format=torch.channels_last)

        monkeypatch.setattr(ImageClassification, "model", model)
        tree = {
            "data": {"name": "shapes", "max_train_samples": 80, "max_val_samples": 20, "image_size": 32},
            "batch_size": 16,
            "shards": 4,
            "lr": 0.05,
            "scaling": {"lanes": 1},
        }
        one = session(parse({**tree, **changes}, ExperimentConfig, "test"))
        for _ in itertools.islice((e for e in one.train() if isinstance(e, StepDone)), steps):
            pass
        return one

    return run


def sha(session: Trainer) -> str:
    return checkpoint.sha(session.state().tensors)


# ---------------------------------------------------------------------- draws


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = self.second = layer
        self.below = nn.Sequential(layer, nn.Identity(), layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.below(x)


def test_a_dropout_of_several_names_is_keyed_under_all_of_them(train: Train) -> None:
    before = torch.get_rng_state()
    one = train(lambda: Net(Twice(nn.Dropout(0.3))))
    assert torch.equal(torch.get_rng_state(), before)
    modules = dict(one.stepper.passes.replicas[0].model.module.named_modules(remove_duplicate=False))
    names = ("middle.first", "middle.second", "middle.below.0", "middle.below.2")
    assert [type(modules[name]) for name in names] == [Dropout] * 4
    assert sha(train(lambda: Net(Twice(nn.Dropout(0.3))), scaling={"lanes": 2})) == sha(one)
    assert sha(train(lambda: Net(Twice(nn.Identity())))) != sha(one)


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class Hidden(nn.Module):
    """Keeps a layer where PyTorch does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Dropout(0.3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Functional, r"middle\.1 \(Functional\)"),
        (Hidden, r"middle\.1 \(Hidden\)"),
        (nn.RReLU, r"middle\.1 \(RReLU\)"),
    ],
)
def test_what_draws_from_the_global_generator_is_refused(
    train: Train, make: Callable[[], nn.Module], name: str, lanes: int
) -> None:
    def model() -> nn.Module:
        return Net(nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8, 8)))

    with pytest.raises(UserError, match=rf"exact .* {name} draws from PyTorch's global generator.*: ddp$"):
        train(model, scaling={"lanes": lanes})
    train(model, reduction="ddp")


@pytest.mark.parametrize("layer", [nn.Dropout1d(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()])
def test_dropouts_without_a_keyed_form_are_refused(train: Train, layer: nn.Module) -> None:
    with pytest.raises(UserError, match=rf"middle\.0 \({type(layer).__name__}\) .*allowed: nn.Dropout"):
        train(lambda: Net(nn.Sequential(layer)))


def test_a_loss_that_draws_is_refused(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ImageClassification.loss
    monkeypatch.setattr(ImageClassification, "loss", lambda *args: (loss(*args), torch.rand(1))[0])
    with pytest.raises(UserError, match="the loss draws"):
        train(Net)


def test_what_another_thread_draws_is_not_the_models(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    recycle = Passes.recycle

    def drawing(self: Passes, *args: Any) -> None:
        torch.rand(1)
        recycle(self, *args)

    undisturbed = sha(train(Net))
    monkeypatch.setattr(Passes, "recycle", drawing)
    assert sha(train(Net)) == undisturbed


# ---------------------------------------------------------------------- buffers


class Counting(nn.Module):
    def __init__(self, persistent: bool = True, late: bool = False) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.tensor([1.0, float("nan")]))
        if not late:
            self.register_buffer("seen", torch.zeros(()), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.register_buffer("seen", getattr(self, "seen", torch.zeros(())) + 1)
        return x * self.fixed[0]


TRACKING = nn.Sequential(nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True))


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Counting(), "middle.0.seen"),
        (Counting(persistent=False), "middle.0.seen"),
        (Counting(late=True), "middle.0.seen"),
        (
            nn.Sequential(nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True)),
            "middle.0.1.running_mean",
        ),
    ],
)
def test_a_buffer_that_training_writes_is_refused(train: Train, layer: nn.Module, name: str, reduction: str) -> None:
    with pytest.raises(UserError, match=rf"writes the buffer {name}, "):
        train(lambda: Net(nn.Sequential(layer, nn.Flatten())), reduction=reduction)


def test_a_buffer_that_stays_is_kept(train: Train) -> None:
    class Fixed(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.fixed[0]

    assert "model.middle.fixed" in train(lambda: Net(Fixed())).state().tensors


# ---------------------------------------------------------------------- shared modules


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
def test_a_batch_norm_that_runs_twice_is_refused(train: Train, reduction: str) -> None:
    with pytest.raises(UserError, match=r"batch norm middle\.first runs 4 times in a pass"):
        train(lambda: Net(Twice(nn.BatchNorm1d(8))), reduction=reduction)


def test_a_weight_of_several_names_is_trained_under_all_of_them(train: Train) -> None:
    one = train(lambda: Net(Twice(nn.Linear(8, 8))))
    state = one.state()
    weights = state.weights()
    names = [f"middle.{place}.weight" for place in ("first", "second", "below.0", "below.2")]
    assert not torch.equal(weights[names[0]], one.workload.model().state_dict()[names[0]])
    for name in names[1:]:
        assert torch.equal(weights[name], weights[names[0]])
    loaded = checkpoint.load_model(one.workload, checkpoint.encode(checkpoint.snapshot(state, {})))
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(loaded(x), one.eval_models[0](x))


class Recurring(nn.Module):
    """One convolution used twice, on maps where its gradient goes tap by tap, or as products."""

    def __init__(self, size: int, norm: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 192, 32 // size, stride=32 // size)
        self.norm = norm
        self.conv = nn.Conv2d(192, 192, 3, padding=1, bias=False)
        self.head = nn.Linear(192, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head(self.conv(self.conv(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(4, 192)])
def test_a_convolution_that_runs_twice_has_the_same_bits_on_any_replica(
    train: Train, size: int, norm: nn.Module
) -> None:
    found = {sha(train(lambda: Recurring(size, norm), scaling={"lanes": lanes})) for lanes in (1, 2, 4)}
    assert len(found) == 1


def test_parameters_are_float32(train: Train) -> None:
    with pytest.raises(UserError, match=r"model: middle\.weight is float64; allowed: float32"):
        train(lambda: Net(nn.Linear(8, 8).double()))


FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1",
    "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_torchvisions_models_keep_to_it(session: Open, name: str) -> None:
    size = 96 if name == "inception_v3" else 64
    tree: dict[str, Any] = {
        "data": {"name": "shapes", "max_train_samples": 16, "max_val_samples": 8, "image_size": size},
        "model": {"name": name},
        "batch_size": 8,
        "shards": 4,
        "lr": 0.001,
        "scaling": {"lanes": 1},
    }
    event = next(session(parse(tree, ExperimentConfig, "test")).train())
    assert isinstance(event, StepDone)
