"""The shipped experiments: each builds its model, and the image recipes are those whose figures their heads give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rayexp.config import ExperimentConfig, load
from rayexp.engine import order
from rayexp.engine.schedule import Schedule
from rayexp.workloads.image_classification.workload import Options
from rayexp.workloads.image_classification.workload import build as build_images
from rayexp.workloads.language_model.model import build as build_words

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(path for path in CONFIGS.glob("*.yaml") if "\nbase:" not in path.read_text())
TRAIN_IMAGES = 100_000  # of Tiny-ImageNet


def model_of(config: ExperimentConfig) -> nn.Module:
    if config.workload == "language_model":
        return build_words(config, 1000)
    return build_images(config.model.name, Options(**config.model.options), 200, config.data.image_size)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_builds_its_model(path: Path) -> None:
    assert sum(p.numel() for p in model_of(load(path)).parameters()) > 100_000


def prototype_rate(lr: float, step: int, total: int) -> float:
    """A quarter of the run from lr / 25 up to lr, then down to 0, by straight lines."""
    top = 0.25 * total
    return lr * (0.04 + 0.96 * step / top) if step < top else lr * (1 - (step - top) / (total - top))


@pytest.mark.parametrize(
    ("name", "stem", "batch", "lr", "decay", "smallest", "shard"),
    [
        ("tiny_imagenet", "imagenet", 256, 0.2, 5e-4, 0.25, 32),
        ("tiny_imagenet_fast", "stride2", 512, 0.5, 5e-4, 0.25, 64),
        ("tiny_imagenet_best", "small", 512, 0.5, 1e-3, 0.35, 512),
    ],
)
def test_recipes_are_those_that_were_measured(
    name: str, stem: str, batch: int, lr: float, decay: float, smallest: float, shard: int
) -> None:
    """What the prototype trained with, in the words of the configuration."""
    config = load(CONFIGS / f"{name}.yaml")
    expected: dict[str, Any] = {
        "model": {"name": "resnet18", "stem": stem, "zero_init_residual": True},
        "epochs": 20,
        "batch_size": batch,
        "lr": lr,
        "weight_decay": decay,
        "label_smoothing": 0.1,
        "precision": "auto",
        "reduction": "exact",
        "compile": False,
    }
    found = config.model_dump(mode="json")
    found["model"] = {"stem": "imagenet"} | {key: found["model"][key] for key in config.model.model_fields_set}
    assert {key: found[key] for key in expected} == expected
    assert config.optimizer.model_dump(include={"name", "momentum", "nesterov", "decay_norm_and_bias", "clip"}) == {
        "name": "sgd",
        "momentum": 0.9,
        "nesterov": True,
        "decay_norm_and_bias": False,
        "clip": None,
    }
    augment = config.data.augment
    assert augment is not None
    assert (augment.scale, augment.ratio, augment.flip, augment.pad) == ((smallest, 1), (3 / 4, 4 / 3), True, 0)
    cut = order.Cut(TRAIN_IMAGES, config.batch_size, config.shards)
    assert set(cut.sizes(0, range(config.shards))) == {shard}
    assert len(cut.batch(cut.steps - 1)) == 160  # as the files say: a batch of its own
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert f"{cut.steps} steps an epoch, the last of them with the remaining 160 images" in text
    schedule, total = Schedule(config, cut.steps), 20 * cut.steps
    one_step = 0.96 * lr / (0.25 * total)
    assert max(abs(schedule.lr(s) - prototype_rate(lr, s, total)) for s in range(total)) <= one_step * 1.001
