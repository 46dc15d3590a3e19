"""The step on a GPU: captured, on streams, resident and staged, it has the bits of the eager one.

benchmarks/gpu.py tries the same at full size, with workers and beside its peers.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import checkpoint, gpu, runtime
from rayexp.engine.contract.check import check
from rayexp.engine.group import WorkerGroup
from rayexp.engine.passes import Passes
from rayexp.engine.runtime import Runtime
from rayexp.engine.trainer import EpochDone, StepDone, Trainer
from rayexp.errors import UserError
from rayexp.workloads import open_workload
from rayexp.workloads.image_classification.workload import ImageClassification

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here"),
]

TEXT = {"emsize": 64, "nhid": 64, "nlayers": 2, "dropout": 0.2}
IMAGES: dict[str, Any] = {
    "data": {"name": "shapes", "max_train_samples": 184, "max_val_samples": 64},  # the last batch has 56 of 64
    "model": {"name": "resnet18"},
    "batch_size": 64,
}
WORDS: dict[str, Any] = {
    "workload": "language_model",
    "data": {"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "bptt": 20},
    "batch_size": 16,
    "optimizer": {"momentum": 0, "clip": 0.25},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18 bf16": {**IMAGES, "precision": "bf16"},
    "resnet18 tf32": {**IMAGES, "precision": "tf32"},
    "resnet18 ddp": {**IMAGES, "precision": "bf16", "reduction": "ddp"},
    "mobilenet dropout": {**IMAGES, "model": {"name": "mobilenet_v3_small"}},
    "lstm": {**WORDS, "model": {"name": "lstm", **TEXT}, "precision": "tf32"},
    "gru": {**WORDS, "model": {"name": "gru", **TEXT}, "precision": "bf16"},
    "rnn": {**WORDS, "model": {"name": "rnn_tanh", **TEXT}},
    "transformer": {
        **WORDS,
        "model": {"name": "transformer", **TEXT, "nhead": 2, "context": 8},
        "optimizer": {"name": "adamw", "clip": 1.0},
        "precision": "bf16",
    },
}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """A trainer of a family on the first GPU; keywords replace its keys."""
    with contextlib.ExitStack() as stack:

        def make(family: str, **changes: Any) -> Trainer:
            tree = {"epochs": 2, "lr": 0.01, "storage_path": str(tmp_path), **FAMILIES[family], **changes}
            config = parse(tree, ExperimentConfig, "test")
            here = stack.enter_context(runtime.configure(config, torch.device("cuda", 0), config.shards))
            torch.set_deterministic_debug_mode("error")  # ddp's kernels may add in any order otherwise
            return Trainer(config, open_workload(config), WorkerGroup(), here)

        yield make


def final(one: Trainer, capture: str = "graph") -> str:
    """The hash of the state after all epochs, of which the last step of each is a shorter batch."""
    for _ in one.train():
        pass
    assert one.stepper.capture.startswith(capture), one.stepper.capture
    return checkpoint.sha(one.state().tensors)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_captured_steps_have_the_bits_of_eager_ones(opened: Callable[..., Trainer], family: str) -> None:
    expected = final(opened(family, capture=False), "eager: capture is false")
    assert final(opened(family)) == expected
    assert final(opened(family, capture=True)) == expected


@pytest.mark.parametrize("family", ["resnet18 bf16", "mobilenet dropout", "lstm", "transformer"])
def test_streams_change_no_bit(opened: Callable[..., Trainer], family: str) -> None:
    found = {lanes: final(opened(family, scaling={"lanes": lanes})) for lanes in (1, 2, 4, 8)}
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("recipe", [{}, {"pad": 4}, None])
def test_a_shard_is_prepared_alike_beside_any_others(opened: Callable[..., Trainer], recipe: Any) -> None:
    """Whichever worker has it: draws, boxes and matrices are made for all of a worker's shards at once."""
    one = opened("resnet18 bf16", data={**IMAGES["data"], "augment": recipe})
    work: Any = one.workload
    for at in (0, one.steps - 1):
        alone = [work.batch(1, at, range(shard, shard + 1), one.runtime.device) for shard in range(8)]
        for count in (1, 2, 4):
            for rank in range(count):
                shards = range(8 // count * rank, 8 // count * (rank + 1))
                sizes = work.sizes(at, shards)
                fed = {name: torch.from_numpy(array).cuda() for name, array in work.feed(1, at, shards).items()}
                planes = work.prepare(fed, sizes)["planes"].split(list(sizes))
                for shard, found in zip(shards, planes, strict=True):
                    assert torch.equal(found, alone[shard].inputs[0]), (at, count, shard)


def test_resident_and_staged_data_give_the_same_bits(opened: Callable[..., Trainer]) -> None:
    data = IMAGES["data"]
    found = {kept: final(opened("resnet18 bf16", data={**data, "resident": kept})) for kept in (True, False)}
    assert len(set(found.values())) == 1, found


def ending_in(monkeypatch: pytest.MonkeyPatch, *layers: nn.Module) -> None:
    """Have mobilenets pool through these layers first."""
    true = ImageClassification.build

    def build(workload: ImageClassification) -> Any:
        model: Any = true(workload)
        model.avgpool = nn.Sequential(*layers, model.avgpool)
        return model

    monkeypatch.setattr(ImageClassification, "build", build)


def test_a_pool_that_cuda_adds_up_in_any_order_is_added_up_in_one(
    opened: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in AlexNet and VGG, which are larger."""
    ending_in(monkeypatch, nn.AdaptiveAvgPool2d(3))
    expected = final(opened("mobilenet dropout", capture=False), "eager: capture is false")
    assert final(opened("mobilenet dropout")) == expected


def test_an_operation_without_a_deterministic_kernel_is_refused_in_the_first_step(
    opened: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending_in(monkeypatch, nn.AdaptiveMaxPool2d(3))
    one = opened("mobilenet dropout")
    said = r"adaptive_max_pool2d_backward_cuda in avgpool\.0 \(AdaptiveMaxPool2d\) has no such kernel for cuda; allowed"
    with pytest.raises(UserError, match=said):
        final(one)
    assert one.global_step <= 1


def test_a_model_is_tried_with_the_pools_that_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []
    for pool in (nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3)):
        with monkeypatch.context() as patched:
            ending_in(patched, pool)
            config = parse({"storage_path": str(tmp_path), **FAMILIES["mobilenet dropout"]}, ExperimentConfig, "test")
            with runtime.configure(config, torch.device("cuda", 0), config.shards) as here:
                refused.append(list(map(str, check(config, open_workload, here).refused)))
    assert refused[0] == []
    assert "adaptive_max_pool2d_backward_cuda in avgpool.0 (AdaptiveMaxPool2d) has no determ" in " ".join(refused[1])


@pytest.mark.parametrize("family", ["resnet18 bf16", "lstm"])
def test_resumed_steps_have_the_same_bits(opened: Callable[..., Trainer], family: str) -> None:
    """The feeder goes on from within an epoch, and the recurrent state is that of the snapshot."""
    first = opened(family)
    for event in first.train(wanted=lambda done: done == 2):
        if isinstance(event, StepDone) and first.global_step == 2 and event.settled:
            files = checkpoint.encode(first.state())
    again = opened(family)
    again.load(checkpoint.decode(files))
    assert final(again) == checkpoint.sha(first.state().tensors)


@pytest.mark.parametrize("family", ["resnet18 bf16", "lstm"])
def test_many_repeats_have_one_hash(opened: Callable[..., Trainer], family: str) -> None:
    one = opened(family)
    files, found = checkpoint.encode(one.state()), set()
    for _ in range(10):
        one.load(checkpoint.decode(files))
        for event in one.train(wanted=lambda done: done == 3):
            if isinstance(event, StepDone) and event.settled:
                break
        found.add(checkpoint.sha(one.replicated().tensors))
    assert len(found) == 1


def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every pass ask the device for a value, which no graph can hold."""
    true = Passes.one

    def one(*args: Any) -> float:
        torch.zeros((), device="cuda").item()
        return true(*args)

    monkeypatch.setattr(Passes, "one", one)


@pytest.mark.parametrize("family", ["resnet18 bf16", "mobilenet dropout", "lstm"])
def test_what_cannot_be_captured_runs_eagerly(
    opened: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    expected = final(opened(family))
    present = torch.cuda.current_stream()
    waits(monkeypatch)
    one = opened(family)
    assert final(one, "eager: ") == expected
    assert "captur" in one.stepper.capture, "the reason is not told"
    assert torch.cuda.current_stream() == present
    torch.rand(1, device="cuda")  # the global generator draws as before


def test_capture_true_refuses_what_cannot_be_captured(
    opened: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits(monkeypatch)
    with pytest.raises(UserError, match=r"^capture: true, and this step cannot be captured"):
        final(opened("lstm", capture=True))


def test_a_graph_for_which_memory_is_short_has_fewer_streams(
    opened: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = final(opened("mobilenet dropout"))
    true, calls = gpu.Graph, itertools.count(1)

    def graph(*args: Any) -> Any:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(*args)

    monkeypatch.setattr(gpu, "Graph", graph)
    one = opened("mobilenet dropout")
    assert final(one) == expected
    assert len(one.stepper.passes.replicas) == 4


def test_a_graph_that_would_not_fit_is_not_begun(
    opened: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight streams as they stand, then one, whose graph would not fit either."""
    expected = final(opened("resnet18 bf16"))
    one = opened("resnet18 bf16")
    monkeypatch.setattr(Runtime, "free_memory", lambda here: 1)
    assert final(one, "eager: too little memory for a graph") == expected
    assert len(one.stepper.passes.replicas) == 1
    assert all(needed > 1 << 20 for needed in one.stepper.programs._needs.values()), "what passes take is not seen"
    assert len(one.stepper.programs._needs) == 8


def test_a_step_for_which_memory_is_short_starts_again(
    opened: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a capture, and eagerly: the bits are those of eight streams."""
    expected = final(opened("lstm"))
    true, calls = Passes.compute, itertools.count(1)

    def compute(passes: Passes, number: int, *args: Any) -> float:
        seconds = true(passes, number, *args)
        # The first eager step, and the first capture on the four streams that are left.
        if (number, next(calls)) in ((5, 6), (2, 6 + 4 + 3)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds

    monkeypatch.setattr(Passes, "compute", compute)
    one = opened("lstm")
    assert final(one) == expected
    assert len(one.stepper.passes.replicas) == 2


def test_what_a_trainer_holds_goes_with_it(opened: Callable[..., Trainer]) -> None:
    """Not when Python next looks for circles: a program that trains again needs the memory, and the files stay open."""
    one = opened("resnet18 bf16", epochs=1)
    assert [event for event in one.train() if isinstance(event, EpochDone)]
    workload = weakref.ref(one.workload)
    gc.collect()
    gc.disable()
    try:
        del one
        assert workload() is None
    finally:
        gc.enable()
