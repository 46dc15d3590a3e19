"""Augmentation and normalisation against torchvision's transforms, and what an augmentation depends on."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomCrop, RandomResizedCrop
from torchvision.transforms import functional as true

from rayexp.config import AugmentConfig, ExperimentConfig, parse
from rayexp.engine import order
from rayexp.workloads.image_classification.augmentation import DRAWS, TRIES, resampling
from rayexp.workloads.image_classification.augmentation import augment as augmented
from rayexp.workloads.image_classification.augmentation import boxes as drawn_boxes
from rayexp.workloads.image_classification.workload import ImageClassification

CPU = torch.device("cpu")
MANY = 4000


def draws(n: int, key: int = 1) -> NDArray[np.float64]:
    return order.uniform(key, np.arange(n), DRAWS)


def boxes(config: AugmentConfig, draws: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    return drawn_boxes(config, torch.from_numpy(draws), height, width).numpy()


def augment(images: Tensor, config: AugmentConfig, draws: NDArray[np.float64]) -> Tensor:
    return augmented(images, config, torch.from_numpy(draws))


def boxes_in_numpy(config: AugmentConfig, draws: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """The boxes by numpy alone, as they were computed on the host before devices drew them."""
    n, u, v = len(draws), draws[:, 2 * TRIES], draws[:, 2 * TRIES + 1]
    if config.pad:
        top, left = np.floor(u * (2 * config.pad + 1)) - config.pad, np.floor(v * (2 * config.pad + 1)) - config.pad
        return np.stack([top, left, np.full(n, height), np.full(n, width)], 1).astype(np.float64)
    area = height * width * (config.scale[0] + (config.scale[1] - config.scale[0]) * draws[:, :TRIES])
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = np.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, found = fits.argmax(1), fits.any(1)
    h, w = h[np.arange(n), first], w[np.arange(n), first]
    whole = width / height
    best = min(max(whole, config.ratio[0]), config.ratio[1])
    fall_h, fall_w = (np.rint(width / best), width) if whole < best else (height, np.rint(height * best))
    h, w = np.where(found, h, min(fall_h, height)), np.where(found, w, min(fall_w, width))
    top = np.where(found, np.floor(u * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(v * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], 1)


POSITIVE = st.floats(0.01, 1.0)


@settings(max_examples=200, deadline=None)
@given(
    key=st.integers(0, 2**63 - 1),
    scale=st.tuples(POSITIVE, POSITIVE).map(sorted),
    ratio=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted),
    pad=st.sampled_from([0, 0, 0, 1, 4, 9]),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
)
def test_boxes_are_those_that_numpy_computes(
    key: int, scale: list[float], ratio: list[float], pad: int, height: int, width: int
) -> None:
    """Exponentials may differ in their last bit; the whole pixels that come of them do not."""
    recipe = AugmentConfig(scale=tuple(scale), ratio=tuple(ratio), pad=pad)  # type: ignore[arg-type]
    u = draws(500, key)
    assert np.array_equal(boxes(recipe, u, height, width), boxes_in_numpy(recipe, u, height, width))


def test_of_the_crops_that_fit_the_first_is_taken() -> None:
    """Ten tries: the first too wide, the second and the third fit, the rest too high."""
    u = np.full((1, DRAWS), 0.5)
    u[0, :TRIES] = [1.0, 0.25, 0.5, *[1.0] * 7]
    u[0, TRIES : 2 * TRIES] = [1.0, 0.5, 0.5, *[0.0] * 7]
    recipe = AugmentConfig(scale=(0.04, 1.0), ratio=(0.5, 2.0))
    side = round(math.sqrt(4096 * (0.04 + 0.96 * 0.25)))
    assert boxes(recipe, u, 64, 64)[0, 2:].tolist() == [side, side]


@functools.cache
def theirs(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> NDArray[np.float64]:
    torch.manual_seed(0)
    blank = torch.zeros(3, height, width)
    found = [RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(MANY)]
    return np.array(found, dtype=np.float64)


def statistics(box: NDArray[np.float64], height: int, width: int) -> dict[str, NDArray[np.float64]]:
    """Of crops [n, 4]: area, shape, and where in the room that is left they lie."""
    top, left, h, w = box.T
    return {
        "area": h * w,
        "ratio": w / h,
        "top": top / np.maximum(1, height - h),
        "left": left / np.maximum(1, width - w),
    }


@pytest.mark.parametrize(("height", "width"), [(64, 64), (200, 120), (60, 180)])
@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.9), (0.5, 2.0)), ((0.2, 0.2), (1.0, 1.0)), ((0.1, 0.5), (0.4, 0.9))],
)
def test_crops_are_distributed_like_torchvision_s(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    """Kolmogorov-Smirnov, on fixed seeds: a tail cut by a few per cent, or a scale that is not uniform, fails."""
    mine = boxes(AugmentConfig(scale=scale, ratio=ratio), draws(MANY), height, width)
    one, other = (statistics(box, height, width) for box in (mine, theirs(height, width, scale, ratio)))
    for name in one:
        assert stats.ks_2samp(one[name], other[name]).pvalue > 1e-3, name


def test_what_tells_nothing_of_another_tells_nothing() -> None:
    """Area, shape, height and place are drawn apart, as by torchvision. (Crops that fit always, so that none is drawn
    again.)"""
    found = statistics(boxes(AugmentConfig(scale=(0.1, 0.4)), draws(MANY), 400, 400), 400, 400)
    for one, other in itertools.combinations(found, 2):
        assert stats.kendalltau(found[one], found[other]).pvalue > 1e-3, (one, other)


@pytest.mark.parametrize(("height", "width"), [(30, 90), (90, 30), (31, 97)])
def test_where_no_crop_fits_it_is_torchvision_s_centre(height: int, width: int) -> None:
    """A crop of the whole area never fits an image so long: the largest one with an allowed ratio, in the middle."""
    mine = boxes(AugmentConfig(scale=(1, 1)), draws(20), height, width)
    torch.manual_seed(0)
    wanted = RandomResizedCrop.get_params(torch.zeros(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    assert (mine == np.array(wanted)).all()


def test_an_image_of_the_right_shape_is_taken_whole() -> None:
    mine = boxes(AugmentConfig(scale=(1, 1), ratio=(1, 1)), draws(20), 40, 40)
    assert (mine == [0, 0, 40, 40]).all()


def image(size: int = 64) -> Tensor:
    """uint8[h, w, 3]"""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)


def test_a_crop_is_torchvision_s_resized_crop_and_flip() -> None:
    """Pixel for pixel, with the same boxes: crop, antialiased bilinear resize, mirror."""
    n = 40
    one, u = image(), draws(n)
    mine = augment(one.expand(n, -1, -1, -1), AugmentConfig(), u)
    box = boxes(AugmentConfig(), u, 64, 64).astype(int)
    flipped = u[:, 22] < 0.5
    assert 5 < flipped.sum() < 35
    planes = one.permute(2, 0, 1).float()
    for found, (top, left, h, w), mirror in zip(mine, box.tolist(), flipped, strict=True):
        wanted = true.resized_crop(planes, top, left, h, w, [64, 64], antialias=True)
        wanted = true.hflip(wanted) if mirror else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("out", [16, 40, 64, 100])
def test_resampling_to_any_size_is_torchvision_s(out: int) -> None:
    """Shrinking averages over all pixels (antialiased), growing interpolates between two."""
    start, length = torch.tensor([5.0]), torch.tensor([50.0])
    matrix = resampling(start, length, 64, out)[0]
    planes = image().permute(2, 0, 1).float()
    found = matrix @ planes @ matrix.t()
    wanted = true.resized_crop(planes, 5, 5, 50, 50, [out, out], antialias=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("scale", "pad"), [((0.08, 1.0), 0), ((1.0, 1.0), 4)])
def test_flips_are_drawn_apart_from_the_crop(scale: tuple[float, float], pad: int) -> None:
    u = draws(MANY)
    flipped = u[:, 22] < 0.5
    assert stats.binomtest(int(flipped.sum()), MANY, 0.5).pvalue > 1e-3
    box = boxes(AugmentConfig(scale=scale, pad=pad), u, 64, 64)
    for column in box.T:
        if len(set(column)) > 1:
            assert stats.ks_2samp(column[flipped], column[~flipped]).pvalue > 1e-3


def test_no_flip_where_none_is_wished() -> None:
    whole = AugmentConfig(scale=(1, 1), ratio=(1, 1), flip=False)
    out = augment(image().expand(50, -1, -1, -1), whole, draws(50))
    torch.testing.assert_close(out, image().permute(2, 0, 1).float().expand(50, -1, -1, -1), rtol=0, atol=1e-2)


def test_pad_and_crop_is_torchvision_s() -> None:
    """Every shift as often as any other, zeros outside, all pixels where they belong."""
    n, pad = 600, 2
    one, recipe, u = image(8), AugmentConfig(pad=pad, flip=False), draws(600)
    box = boxes(recipe, u, 8, 8).astype(int)
    assert set(map(tuple, box[:, 2:].tolist())) == {(8, 8)}
    counts = np.zeros((5, 5))
    np.add.at(counts, (box[:, 0] + pad, box[:, 1] + pad), 1)
    assert stats.chisquare(counts.reshape(-1)).pvalue > 1e-3
    torch.manual_seed(0)
    drawn = {RandomCrop.get_params(torch.zeros(3, 12, 12), (8, 8))[:2] for _ in range(500)}
    assert set(map(tuple, (box[:, :2] + pad).tolist())) == drawn
    padded = true.pad(one.permute(2, 0, 1).float(), [pad])
    found = augment(one.expand(n, -1, -1, -1), recipe, u)
    for image_found, (top, left, _, _) in zip(found[:60], box.tolist(), strict=False):
        torch.testing.assert_close(image_found, true.crop(padded, top + pad, left + pad, 8, 8), rtol=0, atol=1e-3)


def workload(**changes: Any) -> ImageClassification:
    data = {"name": "shapes", "max_train_samples": 64, "max_val_samples": 40}
    tree = {"batch_size": 16, "shards": 4, **changes, "data": {**data, **changes.get("data", {})}}
    return ImageClassification(parse(tree, ExperimentConfig, "test"))


def epoch_of(work: ImageClassification, epoch: int) -> dict[int, Tensor]:
    """Each sample's image as it comes in an epoch."""
    found: dict[int, Tensor] = {}
    places = order.permutation(work.config.seed, epoch, 64)
    for step in range(work.steps()):
        batch = work.batch(epoch, step, range(work.config.shards), CPU)
        images = batch.inputs[0]
        samples = places[step * work.config.batch_size :][: len(images)]
        assert np.array_equal(batch.targets, work.data.train.labels[samples])
        found |= dict(zip(samples.tolist(), images, strict=True))
    assert sorted(found) == list(range(64))
    return found


def test_a_sample_is_augmented_anew_in_every_epoch() -> None:
    work = workload()
    first, second = epoch_of(work, 1), epoch_of(work, 2)
    same = [i for i in first if torch.allclose(first[i], second[i], atol=1e-2)]
    assert len(same) < 4  # a crop of nearly the whole image may come twice
    assert all(torch.equal(first[i], again) for i, again in epoch_of(workload(), 1).items())
    other = epoch_of(workload(seed=1), 1)
    assert sum(torch.allclose(first[i], other[i], atol=1e-2) for i in first) < 4


def test_an_augmentation_belongs_to_the_sample_not_to_its_batch() -> None:
    first, other = epoch_of(workload(), 1), epoch_of(workload(batch_size=32, shards=2), 1)
    for i, found in first.items():
        torch.testing.assert_close(found, other[i], rtol=1e-4, atol=1e-4)


def test_samples_and_epochs_draw_by_themselves() -> None:
    """No draw of one sample says anything of another's, of another epoch's or of its own other draws."""
    samples = np.arange(2000)
    one, other = (order.uniform(order.key(0, "augment", epoch), samples, DRAWS) for epoch in (1, 2))
    assert not (one == other).any()
    limit = 5 / np.sqrt(len(samples))
    assert np.abs(np.corrcoef(one.T, other.T) - np.eye(2 * DRAWS)).max() < limit
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(one[:-lag].reshape(-1), one[lag:].reshape(-1))[0, 1]) < 5 / np.sqrt(one.size)
    assert stats.kstest(one.reshape(-1), "uniform").pvalue > 1e-3


def test_images_are_normalised_as_torchvision_s_pipeline_does() -> None:
    """ToTensor and Normalize with ImageNet's numbers; without augmentation, in training and in evaluation alike."""
    work = workload(data={"augment": None})
    pixels = torch.from_numpy(work.data.train.read(np.arange(64))).permute(0, 3, 1, 2).float() / 255
    wanted = true.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for i, found in epoch_of(work, 1).items():
        torch.testing.assert_close(found, wanted[i], rtol=1e-5, atol=1e-5)
    augmented = workload(data={"augment": {"scale": [1, 1], "ratio": [1, 1], "flip": False}})
    for i, found in epoch_of(augmented, 1).items():
        torch.testing.assert_close(found, wanted[i], rtol=1e-4, atol=1e-3)
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean((2, 3)) @ torch.ones(3, 20)

    for stream in range(work.val_streams()):
        work.predict(Spy(), stream, CPU)
    pixels = torch.from_numpy(work.data.val.read(np.arange(40))).permute(0, 3, 1, 2).float() / 255
    predicted = true.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(torch.cat(seen), predicted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing(smoothing: float) -> None:
    """Szegedy et al. 2016: (1 - s) of the target's cross-entropy, s of the mean over all classes. Summed."""
    work = workload(label_smoothing=smoothing)
    batch = work.batch(1, 0, range(4), CPU)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 20, generator=generator, requires_grad=True)
    loss, _ = work.loss(lambda x: logits, batch, {})  # type: ignore[arg-type]
    logs = logits.detach().double().numpy()
    logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
    target = np.full((16, 20), smoothing / 20) + (1 - smoothing) * np.eye(20)[batch.targets.numpy()]
    assert loss.item() == pytest.approx(-(target * logs).sum(), rel=1e-6)
    loss.backward()
    np.testing.assert_allclose(logits.grad.numpy(), np.exp(logs) - target, atol=1e-6)  # type: ignore[union-attr]


def test_evaluation_does_not_smooth() -> None:
    found = []
    for smoothing in (0.0, 0.3):
        work = workload(label_smoothing=smoothing)
        found.append(work.predict(lambda x: x.mean((2, 3)) @ torch.eye(3, 20), 0, CPU)["loss"])  # type: ignore[arg-type]
    assert np.array_equal(*found)
