"""Image classification: the crop against torchvision's, the models, the predictions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from rayexp.config import AugmentConfig, ExperimentConfig, parse
from rayexp.engine import order
from rayexp.engine.rng import Draws, adopt, seeded
from rayexp.errors import UserError
from rayexp.runs.records import Predictions
from rayexp.workloads.image_classification.augmentation import DRAWS, augment, boxes, resampling
from rayexp.workloads.image_classification.classify import Classifier
from rayexp.workloads.image_classification.workload import ImageClassification, Options, build


def draws(n: int, key: int = 1) -> torch.Tensor:
    return torch.from_numpy(order.uniform(key, np.arange(n), DRAWS))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(16, 80), st.integers(16, 80))
def test_boxes_lie_in_the_image_and_keep_their_promises(key: int, height: int, width: int) -> None:
    recipe = AugmentConfig(scale=(0.2, 0.9), ratio=(0.8, 1.25))
    box = boxes(recipe, draws(64, key), height, width).numpy()
    top, left, h, w = box.T
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert ((top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width)).all()
    assert (box == np.rint(box)).all()


def test_crops_have_the_distribution_of_torchvision() -> None:
    from torchvision.transforms import RandomResizedCrop

    box = boxes(AugmentConfig(), draws(20_000), 64, 64).numpy()
    torch.manual_seed(0)
    blank = torch.zeros(3, 64, 64)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(20_000)])
    assert np.abs(box.mean(0) - theirs.mean(0)).max() < 0.4
    assert np.abs(box.std(0) - theirs.std(0)).max() < 0.4


def test_resampling_is_pillows_bilinear_within_a_grey_level() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for top, left, h, w in ((0, 0, 64, 64), (5, 9, 30, 41), (1, 2, 61, 17), (20, 30, 8, 9)):
        cut = Image.fromarray(image[top : top + h, left : left + w])
        wanted = np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR), dtype=np.float32)
        rows = resampling(torch.tensor([float(top)]), torch.tensor([float(h)]), 64, 64)[0]
        columns = resampling(torch.tensor([float(left)]), torch.tensor([float(w)]), 64, 64)[0]
        found = torch.einsum("oh,hwc,pw->opc", rows, torch.from_numpy(image).float(), columns).numpy()
        assert np.abs(found - wanted).max() <= 1.01


def test_flip_mirrors_about_every_second_image() -> None:
    images = torch.arange(64 * 64 * 3).reshape(1, 64, 64, 3).remainder(251).to(torch.uint8).repeat(1000, 1, 1, 1)
    whole = AugmentConfig(scale=(1, 1), ratio=(1, 1), flip=True)
    out = augment(images[:200], whole, draws(200))
    plain = images[0].permute(2, 0, 1).float()
    same = [torch.allclose(o, plain, atol=1e-3) for o in out]
    mirrored = [torch.allclose(o, plain.flip(2), atol=1e-3) for o in out]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 70 < sum(mirrored) < 130


def test_padding_shifts_and_fills_with_zero() -> None:
    image = torch.full((1, 8, 8, 3), 200, dtype=torch.uint8)
    recipe = AugmentConfig(pad=4, flip=False)
    d = draws(1)
    d[:, 20:22] = 0.0  # the window starts 4 above and 4 left of the image
    out = augment(image, recipe, d)[0, 0]
    assert (out[:4] == 0).all()
    assert (out[:, :4] == 0).all()
    assert (out[4:, 4:] == 200).all()


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "mobilenet_v3_small", "squeezenet1_1", "vit_b_16", "googlenet", "densenet121", "vgg11"],
)
def test_models_of_torchvision_get_a_new_head(name: str) -> None:
    model = build(name, Options(), 7, 64).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_small_stem_keeps_the_resolution() -> None:
    model = build("resnet18", Options(stem="small"), 7, 32)
    assert model.layer1(model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32)))).shape == (1, 64, 32, 32)


def config(**changes: object) -> ExperimentConfig:
    data = {"name": "shapes", "max_train_samples": 64, "max_val_samples": 40}
    return parse({"data": data, "batch_size": 32, **changes}, ExperimentConfig, "test")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"name": "resnet19"}},
            ["model.name", "resnet18", "mobilenet_v2, ", ", package.module:Name or ./file.py:Name"],
        ),
        ({"model": {"name": "nets.Net"}}, ["model.name", "did you mean ./nets.py:Net or nets:Net?"]),
        ({"model": {"name": "net.py", "width": 8}}, ["model.name", "did you mean net.py:Name"]),
        ({"model": {"name": "resnet18", "stemm": "small"}}, ["model.stemm", "stem"]),
        ({"model": {"name": "vgg11", "stem": "small"}}, ["ResNets"]),
        ({"model": {"name": "vgg11", "stem": "stride2"}}, ["ResNets"]),
        ({"model": {"name": "resnet18", "stem": "stride3"}}, ["model.stem", "imagenet", "stride2", "small"]),
        ({"data": {"name": "python_docs"}}, ["data.name", "tiny_imagenet"]),
    ],
)
def test_wrong_words_are_named(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        ImageClassification(config(**changes)).model()
    for word in words:
        assert word in str(error.value)


def test_shards_of_a_batch_are_the_batch() -> None:
    workload = ImageClassification(config())
    cpu = torch.device("cpu")
    whole = workload.batch(1, 0, range(8), cpu)
    parts = [workload.batch(1, 0, range(s, s + 1), cpu) for s in range(8)]
    assert torch.equal(whole.targets, torch.cat([p.targets for p in parts]))
    assert torch.allclose(whole.inputs[0], torch.cat([p.inputs[0] for p in parts]), atol=1e-5)
    again = workload.batch(1, 0, range(3, 4), cpu)
    assert torch.equal(again.inputs[0], parts[3].inputs[0])
    other = workload.batch(2, 0, range(3, 4), cpu)
    assert not torch.equal(other.inputs[0], parts[3].inputs[0])


def test_dropout_is_drawn_image_by_image() -> None:
    """What a shard draws does not depend on the shards beside it."""
    workload, random = ImageClassification(config()), Draws()
    layers = nn.Sequential(nn.Dropout(0.5)).train()
    adopt(layers, random, workload.batch_dim)
    random.begin(seeded([1, 2], torch.device("cpu")), [3, 4])
    both = layers(torch.ones(7, 7, 8, 8))
    random.begin(seeded([2], torch.device("cpu")), [4])
    assert torch.equal(layers(torch.ones(4, 7, 8, 8)), both[3:])


def test_predictions_are_sorted_and_counted() -> None:
    workload = ImageClassification(config())
    model = workload.model().eval()
    with torch.no_grad():
        parts = [workload.predict(model, s, torch.device("cpu")) for s in range(workload.val_streams())]
    found = workload.predictions(parts)
    assert found["index"].tolist() == list(range(40))
    assert found["top5"].shape == (40, 5)
    hits = [row[0] == label for row, label in zip(found["top5"], found["label"], strict=True)]
    assert workload.metrics(found)["acc1"] == pytest.approx(100 * sum(hits) / 40)
    assert ((found["confidence"] > 0) & (found["confidence"] <= 1)).all()


class Says(nn.Module):
    """Gives the logits that a test wants, batch after batch."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.rows = iter(torch.from_numpy(logits.astype(np.float32)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([next(self.rows) for _ in range(len(images))])


def predicted(workload: ImageClassification, logits: np.ndarray) -> Predictions:
    model, cpu = Says(logits), torch.device("cpu")
    return workload.predictions([workload.predict(model, s, cpu) for s in range(workload.val_streams())])


def test_top5_confidence_and_loss_by_independent_code() -> None:
    """Of equal logits the lower class comes first (torch.topk leaves their order open); all in plain Python."""
    workload = ImageClassification(config())
    classes = len(workload.data.classes)
    rng = np.random.default_rng(7)
    logits = rng.integers(0, 4, (40, classes)).astype(np.float64)  # many ties, across the fifth place too
    logits[0] = 0
    logits[1, 3] = -np.inf  # a class that cannot be, which is a prediction like any other
    found = predicted(workload, logits)
    hits = [0, 0]
    for row, top5, confidence, loss, label in zip(
        logits.tolist(),
        found["top5"].tolist(),
        found["confidence"],
        found["loss"],
        found["label"].tolist(),
        strict=True,
    ):
        order_of = sorted(range(classes), key=lambda c: (-row[c], c))[:5]
        assert top5 == order_of
        total = math.fsum(math.exp(x) for x in row)
        assert confidence == pytest.approx(math.exp(row[order_of[0]]) / total, rel=1e-5)
        assert loss == pytest.approx(math.log(total) - row[label], rel=1e-5)
        hits[0] += order_of[0] == label
        hits[1] += label in order_of
    metrics = workload.metrics(found)
    assert metrics["acc1"] == pytest.approx(100 * hits[0] / 40)
    assert metrics["acc5"] == pytest.approx(100 * hits[1] / 40)
    assert metrics["val_loss"] == pytest.approx(np.mean(found["loss"].astype(np.float64)))
    assert found.finite.all() == (not np.isinf(found["loss"]).any())


@pytest.mark.parametrize("broken", [[math.nan], [math.inf], [-math.inf] * 99, [math.nan, math.inf]])
def test_an_output_that_is_not_finite_names_no_class(broken: list[float]) -> None:
    """A descending sort puts NaN first: class 0 would be the likeliest, and right wherever it is the label."""
    workload = ImageClassification(config())
    classes = len(workload.data.classes)
    labels = workload.data.val.labels
    logits = np.full((40, classes), -1.0)
    logits[np.arange(40), labels] = 5.0  # right everywhere but for
    spoilt = [0, 1, 2, 38]
    for row in spoilt:
        logits[row, : len(broken[:classes])] = broken[:classes]
    found = predicted(workload, logits)
    assert np.flatnonzero(~found.finite).tolist() == spoilt
    assert (found["top5"][spoilt] == -1).all()
    assert np.isnan(found["confidence"][spoilt]).all()
    assert np.isnan(found["loss"][spoilt]).all()
    metrics = workload.metrics(found)
    assert (metrics["acc1"], metrics["acc5"]) == (90, 90)
    assert math.isnan(metrics["val_loss"])
    again = Predictions.from_npz(found.to_npz(), "x")
    assert again.same_as(found)
    elsewhere = {**again.arrays, "loss": np.where(np.arange(40) == 3, np.nan, again["loss"]).astype(np.float32)}
    assert not Predictions("images", found.data_sha, elsewhere).same_as(found)


def test_a_classifier_that_cannot_be_set_up_leaves_the_settings_as_they_were() -> None:
    class Large(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of memory")

    before = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="out of memory"), Classifier(Large(1, 1), ExperimentConfig(), gpu=False):
        pass
    assert (torch.get_deterministic_debug_mode(), torch.get_num_threads()) == before
