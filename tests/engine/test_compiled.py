"""What `compile: true` hands to torch.compile on a GPU, traced here without making kernels of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import passes
from rayexp.engine.step import ControlFlags
from rayexp.engine.trainer import Trainer

IMAGES: dict[str, Any] = {
    "data": {"name": "shapes", "max_train_samples": 24, "max_val_samples": 8, "image_size": 32},
    "model": {"name": "resnet18"},
    "batch_size": 8,
    "shards": 2,
    "epochs": 2,
    "lr": 0.01,
    "reduction": "ddp",
    "precision": "bf16",
    "scaling": {"lanes": 1},
}


@pytest.mark.slow
def test_a_step_is_one_graph_that_serves_all_steps(
    static: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch norms of its shards too, of which no statistics are written twice; a break in the graph is an error."""
    graphs: list[GraphModule] = []
    compile_ = torch.compile

    def backend(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def traced(module: Any, **keys: Any) -> Any:
        return compile_(module, backend=backend, fullgraph=True, **keys)

    config = parse(IMAGES, ExperimentConfig, "test")
    plain, replica = static(config), passes.Replica
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(passes, "Replica", lambda *args, **keys: replica(*args, **{**keys, "compiled": True}))
    compiled = static(config)
    for one in (plain, compiled):
        one.stepper._watch_next = False
    first, same = (one.stepper.launch(1, 0, 0, 0.0, ControlFlags())() for one in (plain, compiled))
    # The formula of a batch norm rounds otherwise than PyTorch's kernel.
    assert same.loss == pytest.approx(first.loss, rel=0.02)
    torch.testing.assert_close(compiled.master.stats, plain.master.stats, rtol=0.05, atol=0.02)
    for step in (1, 2):
        compiled.stepper.launch(1, step, step, 0.01, ControlFlags())()
    assert len(graphs) == 1
