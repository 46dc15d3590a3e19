"""Packed images that are not what was packed are refused by name."""

from __future__ import annotations

import os

import numpy as np
import pytest

from rayexp.config import DataConfig
from rayexp.data import packed, tiny_imagenet
from rayexp.errors import UserError


@pytest.mark.parametrize(
    "damage", ["meta cut", "meta newer", "array cut", "array gone", "labels wild", "pixel", "label"]
)
def test_damaged_packed_data(tmp_path, tiny, damage):
    to = tmp_path / "d"
    tiny_imagenet.fetch(tiny.write_zip(tmp_path / "a.zip", tiny.layout()), to)
    packed.check(to)
    meta = to / "meta.json"
    if damage == "meta cut":
        meta.write_text(meta.read_text()[:200])
    elif damage == "meta newer":
        meta.write_text(meta.read_text().replace('"format": 1', '"format": 2'))
    elif damage == "array cut":
        with (to / "train_images.npy").open("r+b") as file:
            file.truncate(5000)
    elif damage == "array gone":
        (to / "val_labels.npy").unlink()
    elif damage == "labels wild":
        np.save(to / "val_labels.npy", np.full(9, 3))
    elif damage == "label":
        np.save(to / "val_labels.npy", np.zeros(9, np.int64))
    else:
        with (to / "train_images.npy").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x07")
    with pytest.raises(UserError, match=f"{to}"):
        tiny_imagenet.open_data(DataConfig(name="tiny_imagenet", root=to))
    with pytest.raises(UserError, match=f"{to}"):
        packed.check(to)
