from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError
from rayexp.launch.evaluate import judge, predict
from rayexp.launch.train import run

Tiny = Callable[..., ExperimentConfig]
IMAGES = {
    "workload": "image_classification",
    "data": {"name": "shapes", "max_train_samples": 64, "max_val_samples": 72},
    "model": {"name": "squeezenet1_1"},
    "epochs": 1,
    "lr": 0.01,
}


@pytest.mark.parametrize("changes", [{}, IMAGES], ids=["text", "images"])
def test_a_checkpoint_says_again_what_training_stored(tiny: Tiny, changes: dict[str, object]) -> None:
    made = run(tiny(**changes), argv=[])
    stored = made.predictions(1)
    found = judge(made, 1)
    assert found.equal
    assert not found.stored
    record = made.records()[0]
    assert found.metrics["val_loss"] == record.val_loss
    assert record.metrics.items() <= found.metrics.items()
    assert found.weights_sha == record.weights_sha
    made.predictions_path(1).unlink()
    again = predict(made, 1)
    for name, array in stored.arrays.items():
        np.testing.assert_array_equal(again[name], array)
    assert made.predictions_path(1).exists()


def test_batches_come_in_their_order(tiny: Tiny) -> None:
    made = run(tiny(scaling={"lanes": 2}, shards=4, epochs=1), argv=[])
    seen: list[int] = []
    judge(made, 1, lambda batches: seen.append(-batches), lambda batch, part: seen.append(batch))
    assert seen == [-4, 0, 1, 2, 3]


def test_what_is_damaged_or_missing_is_named(tiny: Tiny) -> None:
    made = run(tiny(), argv=[])
    with pytest.raises(UserError, match="no checkpoint"):
        predict(made, 3)
    file = made.checkpoint(2) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"state\.safetensors is damaged"):
        predict(made, 2)


def test_the_lines_are_those_of_pytorchs_example(
    tiny: Tiny, tmp_path: Path, command: Callable[..., subprocess.Popen[str]]
) -> None:
    made = run(tiny(**IMAGES, batch_size=32), argv=[])
    out, err = command("evaluate", f"{made.id}@last", "--print-freq", "2").communicate(timeout=60)
    lines = out.splitlines()
    assert [line.split("\t")[0] for line in lines[:2]] == ["Test: [1/3]", "Test: [3/3]"], err
    assert [part.split()[0] for part in lines[0].split("\t")] == ["Test:", "Time", "Loss", "Acc@1", "Acc@5"]
    metrics = made.records()[0].metrics
    assert lines[2] == f" * Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f}"
    means = lines[1].split("\t")
    assert means[3].endswith(f"({metrics['acc1']:6.2f})")
    out, _ = command("evaluate", f"{made.id}@1", "--json").communicate(timeout=60)
    assert json.loads(out)["acc1"] == metrics["acc1"]
