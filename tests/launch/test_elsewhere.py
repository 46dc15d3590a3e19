"""A checkpoint is used without rayexp: the lines of docs/your-own-data.md do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.data import open_data
from rayexp.launch.driver import run

PAGE = Path(__file__).parents[2] / "docs" / "your-own-data.md"


def test_the_lines_of_the_page_load_a_checkpoint_and_judge_alike(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "data": {"name": "shapes", "max_train_samples": 32, "max_val_samples": 24, "image_size": 32},
        "batch_size": 16,
        "shards": 2,
        "lr": 0.01,
        "storage_path": str(tmp_path),
    }
    config = parse(tree, ExperimentConfig, "test")
    made = run(config, argv=[])
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("RUN/checkpoints/epoch_007", str(made.checkpoint(1))).replace("=200", "=20")
    names: dict[str, Any] = {}
    exec(code, names)
    mean, deviation = (
        torch.tensor([float(number) for number in found.split(",")])[:, None, None]
        for found in re.search(r"from 0 to 1, less \((.+?)\), over \((.+?)\)", text).groups()
    )
    images = torch.from_numpy(open_data(config.data).val.read(np.arange(24))).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        probabilities = names["model"]((images - mean) / deviation).softmax(1)
    stored = made.predictions(1)
    np.testing.assert_allclose(probabilities.max(1).values, stored["confidence"], rtol=1e-3)
    np.testing.assert_array_equal(probabilities.argmax(1), stored["top5"][:, 0])
