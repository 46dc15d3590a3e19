"""Packed images at another size: a copy in the cache, from the packed pixels alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from rayexp.config import DataConfig
from rayexp.data import folder as folders
from rayexp.data import open_data, tiny_imagenet
from rayexp.errors import UserError


def config(root, **more):
    return DataConfig(name="tiny_imagenet", root=root, **more)


def test_another_image_size_is_another_copy(tmp_path, tiny, cache):
    files = tiny.layout()
    source = tiny.write_zip(tmp_path / "a.zip", files)
    tiny_imagenet.fetch(source, tmp_path / "d")
    source.unlink()  # the packed pixels are enough
    plain = tiny_imagenet.open_data(config(tmp_path / "d"))
    for size in (96, 32):
        data = tiny_imagenet.open_data(config(tmp_path / "d", image_size=size))
        assert (data.train.names, data.val.names, data.classes) == (plain.train.names, plain.val.names, plain.classes)
        assert data.train.labels.tolist() == plain.train.labels.tolist()
        assert data.train.sha != plain.train.sha
        for row, name in enumerate(data.val.names):
            expected = Image.open(io.BytesIO(files[f"val/images/{name}"])).convert("RGB").resize((size, size), 2)
            assert np.array_equal(data.val.read(np.array([row]))[0], np.asarray(expected))
    few = tiny_imagenet.open_data(config(tmp_path / "d", image_size=32, max_train_samples=3))
    assert few.train.read(np.arange(3)).shape == (3, 32, 32, 3)
    assert len(list((cache / "folders").iterdir())) == 2
    # Elsewhere, it is the same copy.
    (tmp_path / "d").rename(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "y")
    (tmp_path / "deep").mkdir()
    (tmp_path / "y").rename(tmp_path / "deep" / "d")
    tiny_imagenet.open_data(config(tmp_path / "deep" / "d", image_size=32))
    assert len(list((cache / "folders").iterdir())) == 2


def test_data_that_were_cut_to_size_are_not_resized(tmp_path, tiny, cache):
    files = {f"{c}/{k}.png": tiny.picture(k, size=(80, 60), format="PNG") for c in "ab" for k in range(2)}
    root = tiny.write_folder(tmp_path / "f", files)
    folders.open_data(DataConfig(name="folder", root=root))
    (packed_there,) = (cache / "folders").iterdir()
    for name in ("tiny_imagenet", "folder"):
        with pytest.raises(UserError, match=r"data\.image_size: .* packed at 64 pixels, got 32; allowed: 64"):
            open_data(DataConfig(name=name, root=packed_there, image_size=32))
