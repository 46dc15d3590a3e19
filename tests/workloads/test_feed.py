"""What the host feeds and what the device makes of it: the same bits resident and fed, and nothing in between that
would wait for the device."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.evaluate import on_host
from rayexp.engine.inputs import StepInputs
from rayexp.engine.workload import Batch
from rayexp.workloads import open_workload
from rayexp.workloads.image_classification import workload as images
from rayexp.workloads.image_classification.workload import ImageClassification

CPU = torch.device("cpu")
RECIPES: dict[str, Any] = {"crops": {}, "pad": {"pad": 3}, "plain": None}


def pictures(augment: Any, **data: Any) -> ImageClassification:
    tree = {
        "data": {"name": "shapes", "max_train_samples": 70, "max_val_samples": 40, "augment": augment, **data},
        "batch_size": 16,
        "shards": 4,
        "seed": 3,
    }
    workload = open_workload(parse(tree, ExperimentConfig, "test"))
    assert isinstance(workload, ImageClassification)
    return workload


def words() -> Any:
    tree = {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 1000, "max_val_tokens": 200, "bptt": 20},
        "model": {"name": "lstm", "emsize": 8, "nhid": 8},
        "batch_size": 8,
        "shards": 4,
    }
    return open_workload(parse(tree, ExperimentConfig, "test"))


def tensors(fed: Mapping[str, Any], device: str = "cpu") -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).to(device) for name, array in fed.items()}


def assert_equal(one: Batch, other: Batch) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))
    assert torch.equal(one.targets, other.targets)
    assert (one.sizes, one.count) == (other.sizes, other.count)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resident_and_fed_images_have_the_same_bits(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "PIECE", 32)  # so that several pieces are copied
    fed, resident = pictures(RECIPES[recipe]), pictures(RECIPES[recipe])
    resident.resident(CPU)
    assert resident.resident_bytes() == (70 + 40) * 64 * 64 * 3
    for epoch in (1, 2):
        for step in range(fed.steps()):
            for shards in (range(4), range(1, 2), range(2, 4)):
                small = resident.feed(epoch, step, shards)
                assert set(small) == {"samples", "labels", "key"}
                assert set(fed.feed(epoch, step, shards)) == {*small, "images"}
                sizes = fed.sizes(step, shards)
                assert_equal(resident.assemble(tensors(small), sizes), fed.batch(epoch, step, shards, CPU))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_prepared_for_all_shards_has_the_bits_of_each_by_itself(recipe: str) -> None:
    """On whichever worker a shard is, and in an epoch's shorter last step, whose shards differ in size."""
    work = pictures(RECIPES[recipe])
    for step in (0, work.steps() - 1):
        for shards in (range(4), range(1, 3)):
            inputs = StepInputs(shards, work.sizes(step, shards), CPU, work.batch_dim, static=True)
            inputs.tell(tensors(work.feed(1, step, shards)), 0.1, 0, False, False)
            ready = inputs.with_fed(work.prepare(inputs.fed, inputs.sizes))
            assert set(ready.fed) == {*inputs.fed, "planes"}
            assert "planes" not in inputs.fed
            for shard in shards:
                one = range(shard, shard + 1)
                assert_equal(work.assemble(*ready.of(one)), work.batch(1, step, one, CPU))
    assert len(set(work.sizes(work.steps() - 1, range(4)))) == 2


def test_resident_and_read_validation_images_are_predicted_alike() -> None:
    fed, resident = pictures({}), pictures({})
    resident.resident(CPU)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 20)).eval()
    with torch.inference_mode():
        for stream in range(fed.val_streams()):
            one, other = (on_host(work.predict(model, stream, CPU)) for work in (fed, resident))
            assert all(np.array_equal(one[name], other[name]) for name in one)
            assert one["index"].tolist() == list(range(stream * 16, min(40, stream * 16 + 16)))


@pytest.mark.parametrize("make", [lambda: pictures({}), words])
def test_every_step_but_the_last_is_fed_alike(make: Any) -> None:
    """One set of buffers serves them all."""
    work = make()
    assert work.steps() > 3
    for shards in (range(4), range(1, 3)):
        shapes = [
            {name: (array.dtype, array.shape) for name, array in work.feed(epoch, step, shards).items()}
            for epoch in (1, 2)
            for step in range(work.steps() - 1)
        ]
        assert all(shape == shapes[0] for shape in shapes)


def test_a_window_is_cut_into_inputs_and_targets() -> None:
    work = words()
    for step in (0, work.steps() - 1):
        fed = work.feed(1, step, range(1, 3))
        assert set(fed) == {"window"}
        assert fed["window"].dtype == np.int64
        batch = work.assemble(tensors(fed), work.sizes(step, range(1, 3)))
        assert_equal(batch, work.batch(1, step, range(1, 3), CPU))
        assert batch.sizes == (2, 2)
        assert np.array_equal(batch.inputs[0], fed["window"][:-1])
        assert np.array_equal(batch.targets.view(-1, 4), fed["window"][1:])
    assert len(fed["window"]) < 21  # an epoch's last window is shorter
    work.resident(CPU)
    assert work.resident_bytes() == 0
    assert set(work.feed(1, 0, range(4))) == {"window"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_waits_for_the_device(recipe: str) -> None:
    """Tensors of the device `meta` have no values: what asked for one, or brought a tensor from the host, would fail,
    as it would while a CUDA graph is captured."""
    work = pictures(RECIPES[recipe])
    work.resident(torch.device("meta"))
    sizes = work.sizes(0, range(4))
    batch = work.assemble(tensors(work.feed(1, 0, range(4)), "meta"), sizes)
    assert batch.inputs[0].shape == (16, 3, 64, 64)
    assert batch.inputs[0].device.type == "meta"
    assert batch.inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert (batch.sizes, batch.count) == ((4, 4, 4, 4), 16)
    text = words()
    assert text.assemble(tensors(text.feed(1, 0, range(4)), "meta"), (2, 2, 2, 2)).targets.shape == (160,)


def test_threads_may_be_in_different_epochs() -> None:
    """One that feeds ahead is in the next epoch already; each finds its own epoch's samples."""
    work, alone = pictures({}), {epoch: pictures({}).feed(epoch, 0, range(4))["samples"] for epoch in (1, 2, 3)}
    wrong: list[int] = []

    def ask(epoch: int) -> None:
        for _ in range(200):
            if not np.array_equal(work.feed(epoch, 0, range(4))["samples"], alone[epoch]):
                wrong.append(epoch)

    threads = [threading.Thread(target=ask, args=(epoch,)) for epoch in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_predicting_first_does_not_hinder_training() -> None:
    work = pictures({})
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 20))
    with torch.inference_mode():
        work.predict(model, 0, CPU)
    loss, _ = work.loss(model, work.batch(1, 0, range(4), CPU), {})
    loss.backward()
    assert model[1].weight.grad is not None
