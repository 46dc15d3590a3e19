"""The base of workloads whose samples are independent: everything that a child need not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import order
from rayexp.engine.workload import Workload
from rayexp.errors import UserError
from rayexp.workloads import REQUIRED
from rayexp.workloads.samples import Samples, SampleWorkload

CPU = torch.device("cpu")


class TwoInputs(SampleWorkload):
    """y from a + b, with two inputs of unlike shapes."""

    def __init__(self, config: ExperimentConfig, train: int = 50, val: int = 21) -> None:
        super().__init__(config, *(samples(n, seed) for n, seed in ((train, 1), (val, 2))))

    def build(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.Linear(3, 1), nn.Linear(2, 1)

            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return (self.left(a) + self.right(b))[:, 0]

        return Net()

    def losses(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.l1_loss(outputs, targets, reduction="none")

    def columns(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        return {"output": outputs}


def samples(n: int, seed: int) -> Samples:
    draws = np.random.default_rng(seed)
    a, b, y = (draws.standard_normal(shape, dtype=np.float32) for shape in ((n, 3), (n, 2), (n,)))
    return Samples((a, b), y, tuple(f"s{i}" for i in range(n)))


def make(**tree: Any) -> TwoInputs:
    return TwoInputs(parse({"batch_size": 16, "shards": 4, **tree}, ExperimentConfig, "test"))


def test_it_has_all_that_the_protocol_asks_for() -> None:
    public = {name for name in vars(Workload) if not name.startswith("_")} | Workload.__annotations__.keys()
    assert set(REQUIRED) == public
    assert all(hasattr(SampleWorkload, name) for name in public)


def test_an_epoch_has_every_sample_once_in_the_keyed_order_whoever_asks() -> None:
    work = make(seed=3)
    whole = order.permutation(3, 2, 50)
    seen = [work.samples(2, step, range(4)) for step in range(work.steps())]
    assert np.array_equal(np.concatenate(seen), whole)
    for step in range(work.steps()):
        alone = [work.samples(2, step, range(shard, shard + 1)) for shard in range(4)]
        assert np.array_equal(np.concatenate(alone), seen[step])
        assert tuple(map(len, alone)) == work.sizes(step, range(4))
    assert not np.array_equal(work.samples(1, 0, range(4)), seen[0])


def test_a_batch_holds_what_belongs_together() -> None:
    work = make()
    batch = work.batch(1, 1, range(1, 3), CPU)
    rows = work.samples(1, 1, range(1, 3))
    assert batch.sizes == work.sizes(1, range(1, 3))
    assert batch.count == len(rows) == sum(batch.sizes)
    for found, array in zip((*batch.inputs, batch.targets), (*work.train.inputs, work.train.targets), strict=True):  # type: ignore[attr-defined]
        assert np.array_equal(found.numpy(), array[rows])
    model = work.model()
    total, state = work.loss(model, batch, {})
    expected = F.l1_loss(model(*batch.inputs), batch.targets, reduction="sum")
    torch.testing.assert_close(total, expected)
    assert state == {} == work.initial_state(3, CPU) == work.touched_rows(1, 0)


def test_predictions_are_in_order_and_whole() -> None:
    work = make()
    model = work.model().eval()
    with torch.no_grad():
        parts = [work.predict(model, stream, CPU) for stream in range(work.val_streams())]
        outputs = model(*(torch.from_numpy(array) for array in work.val.inputs))  # type: ignore[attr-defined]
    found = work.predictions([{k: np.asarray(v) for k, v in part.items()} for part in parts])
    assert (found.kind, found.data_sha) == ("samples", work.val.sha)
    assert np.array_equal(found["index"], np.arange(21))
    assert np.allclose(found["output"], outputs)
    assert np.allclose(found["loss"], np.abs(outputs.numpy() - work.val.targets))  # type: ignore[attr-defined]
    assert work.metrics(found) == {"val_loss": pytest.approx(float(found["loss"].astype(np.float64).mean()))}


def test_the_model_follows_from_the_seed_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (make(seed=seed).model().state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["left.weight"], other["left.weight"])


def test_the_hash_tells_samples_apart() -> None:
    base = samples(9, 1)
    changed = [
        samples(9, 2),
        samples(8, 1),
        Samples(base.inputs, base.targets),
        Samples(base.inputs[::-1], base.targets, base.names),
        Samples(base.inputs, base.targets.astype(np.float64), base.names),
        Samples((base.inputs[0].reshape(9, 3, 1), base.inputs[1]), base.targets, base.names),
    ]
    assert base.sha == samples(9, 1).sha
    assert len({base.sha, *(one.sha for one in changed)}) == 7
    assert make().describe() == {
        "val_names": [f"s{i}" for i in range(21)],
        "train_samples": 50,
        "val_samples": 21,
        "train_sha": samples(50, 1).sha,
        "val_sha": samples(21, 2).sha,
    }


def test_what_is_too_little_or_does_not_fit_is_refused() -> None:
    config = parse({"batch_size": 16, "shards": 4}, ExperimentConfig, "test")
    with pytest.raises(UserError, match=r"^data: 7 training samples are too few for 4 shards \(at least 8\)$"):
        TwoInputs(config, train=7)
    with pytest.raises(UserError, match=r"^data: there are no samples to validate on$"):
        TwoInputs(config, val=0)
    for wrong in (((np.zeros(3),), np.zeros(4)), ((np.zeros(4),), np.zeros(4), ("a",))):
        with pytest.raises(UserError, match=r"differ in length \(\["):
            Samples(*wrong)
    with pytest.raises(UserError, match=r"^workload: samples without inputs; allowed: at least one array$"):
        Samples((), np.zeros(4))
