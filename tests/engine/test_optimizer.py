"""The update on flat buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.gradients import Master, ParameterLayout, Touched
from rayexp.engine.optimizer import Optimizer
from rayexp.engine.runtime import configure


@pytest.mark.parametrize("clip", [None, 0.25])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_rows_without_a_gradient_are_passed_over_where_they_stay_as_they_are(
    clip: float | None, weight_decay: float, momentum: float, where: int
) -> None:
    """Three steps with and without knowing which rows are touched; the matrix first, between others, and last."""
    optimizer = {"name": "sgd", "momentum": momentum, "clip": clip}
    tree = {"workload": "language_model", "weight_decay": weight_decay, "optimizer": optimizer}
    config = parse({**tree, "data": {"name": "python_docs"}, "model": {"name": "lstm"}}, ExperimentConfig, "test")
    runtime = configure(config, torch.device("cpu"), config.shards)
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 7), nn.Linear(7, 3)]
        layers.insert(where, nn.Embedding(50, 5))
        model = nn.Sequential(*layers)
        layout = ParameterLayout(model, config.shards)
        master = Master(model, layout, torch.device("cpu"))
        name = f"{where}.weight"

        def touched(rows: list[int], layout: ParameterLayout = layout, name: str = name) -> list[Touched]:
            return layout.touched({name: torch.tensor(rows, dtype=torch.int64)})

        update = Optimizer(config, layout, master.params, touched([]) if sparse else ()).update
        for step, rows in enumerate([[1, 4], [], [4, 49]]):
            buffer = torch.zeros(layout.buffer_size)
            for slot in layout.params:
                view = slot.view(layout.gradient(buffer))
                if slot.name == name:
                    view[rows] = torch.randn(len(rows), 5)
                else:
                    view.copy_(torch.randn(slot.shape))
            layout.scalars(buffer)[1] = 10
            lr, done = torch.tensor(0.1, dtype=torch.float64), torch.tensor(float(step))
            update(buffer, lr, done, runtime, touched(rows) if sparse else ())
        found.append(dict(master.named(master.params)))
    for (name, mine), wanted in zip(found[0].items(), found[1].values(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0 if clip is None else 1e-6, atol=0 if clip is None else 1e-7)
        assert mine.isfinite().all(), name
