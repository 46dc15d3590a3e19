from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from rayexp.config import DataConfig
from rayexp.data import folder
from rayexp.errors import UserError


def config(root, **more):
    return DataConfig(name="folder", root=root, **more)


@pytest.fixture
def mixed(tiny):
    """Two classes, 11 and 6 images, all kinds of files, sizes and modes."""
    files = {f"cat/{k}.JPG": tiny.picture(k, size=(90 + 10 * k, 70)) for k in range(8)}
    files |= {
        "cat/grey.png": tiny.picture(20, "L", (64, 64), "PNG"),
        "cat/alpha.webp": tiny.picture(21, "RGBA", (30, 50), "WEBP"),
    }
    files |= {"cat/deeper/x.bmp": tiny.picture(22, "RGB", (65, 64), "BMP")}
    files |= {f"dog/{k}.jpeg": tiny.picture(40 + k, size=(64, 200)) for k in range(6)}
    return {**files, "cat/notes.txt": b"no image", "README.md": b"", ".git/x.png": b"", "dog/.hidden.png": b""}


def test_class_folders_alone(tmp_path, tiny, mixed, cache):
    root = tiny.write_folder(tmp_path / "pets", mixed)
    data = folder.open_data(config(root))
    assert data.classes == (("cat", "cat"), ("dog", "dog"))
    assert np.bincount(data.train.labels).tolist() == [9, 5]
    assert np.bincount(data.val.labels).tolist() == [2, 1]
    everything = {
        name for name in mixed if name.startswith(("cat", "dog")) and not name.endswith(("txt", "hidden.png"))
    }
    assert {*data.train.names} | {*data.val.names} == everything
    assert not {*data.train.names} & {*data.val.names}
    assert data.train.images.shape == (14, 64, 64, 3)


def test_a_new_file_moves_few_others():
    names = [f"cat/{k}.png" for k in range(100)]
    held = set(folder._held_out(names))
    assert len(held) == 20
    assert held != set(names[:20])
    for k in range(100, 120):
        more = set(folder._held_out([*names, f"cat/{k}.png"]))
        assert len(held - more) <= 1


def test_the_split_does_not_depend_on_where_the_folder_lies(tmp_path, tiny, mixed):
    one = folder.open_data(config(tiny.write_folder(tmp_path / "one", mixed)))
    two = folder.open_data(config(tiny.write_folder(tmp_path / "x" / "two", dict(reversed(mixed.items())))))
    assert (one.train.sha, one.val.sha, one.val.names) == (two.train.sha, two.val.sha, two.val.names)


def test_train_and_val(tmp_path, tiny):
    files = {
        f"{split}/{c}/{k}.png": tiny.picture(k, format="PNG")
        for split, n in (("train", 4), ("val", 2), ("test", 1))
        for c in "ab"
        for k in range(n)
    }
    files.pop("val/b/0.png")
    data = folder.open_data(config(tiny.write_folder(tmp_path / "d", files)))
    assert data.train.names == tuple(f"{c}/{k}.png" for c in "ab" for k in range(4))
    assert data.val.names == ("a/0.png", "a/1.png", "b/1.png")
    assert data.val.labels.tolist() == [0, 0, 1]
    expected = np.asarray(Image.open(io.BytesIO(files["val/b/1.png"])))
    assert np.array_equal(data.val.read(np.array([2]))[0], expected)


def test_train_without_val_is_split(tmp_path, tiny):
    files = {f"train/{c}/{k}.png": tiny.picture(k, format="PNG") for c in "ab" for k in range(5)}
    data = folder.open_data(config(tiny.write_folder(tmp_path / "d", files)))
    assert (len(data.train), len(data.val), len(data.classes)) == (8, 2, 2)


def test_relaid_tiny_imagenet(tmp_path, tiny):
    """val sorted into class folders, as many people keep it."""
    files = {
        f"{split}/{w}/images/{w}_{k}.JPEG": tiny.picture(k)
        for split in ("train", "val")
        for w in tiny.wnids
        for k in range(2)
    }
    data = folder.open_data(config(tiny.write_folder(tmp_path / "d", files)))
    assert [c for c, _ in data.classes] == sorted(tiny.wnids)
    assert (len(data.train), len(data.val)) == (6, 6)


def test_a_class_called_train(tmp_path, tiny):
    files = {f"{c}/{k}.png": tiny.picture(k, format="PNG") for c in ("car", "train") for k in range(3)}
    data = folder.open_data(config(tiny.write_folder(tmp_path / "d", files)))
    assert [c for c, _ in data.classes] == ["car", "train"]
    assert data.train.names[0].startswith("car/")


def test_resized_and_cropped_as_torchvision_does(tmp_path, tiny):
    transforms = pytest.importorskip("torchvision.transforms")
    as_torchvision = transforms.Compose([transforms.Resize(48), transforms.CenterCrop(48)])
    sizes = [(48, 48), (200, 100), (33, 90), (20, 31), (640, 480), (49, 48), (48, 51)]
    files = {f"{c}/{k}.png": tiny.picture(k, size=size, format="PNG") for c in "ab" for k, size in enumerate(sizes)}
    data = folder.open_data(config(tiny.write_folder(tmp_path / "d", files), image_size=48))
    for split in (data.train, data.val):
        for row, name in enumerate(split.names):
            expected = as_torchvision(Image.open(io.BytesIO(files[name])).convert("RGB"))
            assert np.array_equal(split.read(np.array([row]))[0], np.asarray(expected)), name


def test_large_jpegs_stay_close_to_the_full_decoding(tmp_path, tiny):
    files = {f"{c}/{k}.jpg": tiny.picture(k, size=(1600, 1200)) for c in "ab" for k in range(3)}
    data = folder.open_data(config(tiny.write_folder(tmp_path / "d", files)))
    for row, name in enumerate(data.train.names):
        full = Image.open(io.BytesIO(files[name])).resize((85, 64), Image.Resampling.BILINEAR).crop((10, 0, 74, 64))
        assert np.abs(data.train.read(np.array([row]))[0].astype(int) - np.asarray(full)).mean() < 1.5


def test_exif_turns_upright(tmp_path, tiny):
    image = Image.open(io.BytesIO(tiny.picture(5)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif, quality=95)
    files = {f"{c}/{k}.jpg": out.getvalue() for c in "ab" for k in range(2)}
    data = folder.open_data(config(tiny.write_folder(tmp_path / "d", files)))
    upright = np.rot90(np.asarray(Image.open(io.BytesIO(out.getvalue()))), -1)
    assert np.array_equal(data.train.read(np.array([0]))[0], upright)


def test_packed_once_and_again_after_a_change(tmp_path, tiny, mixed, cache):
    root = tiny.write_folder(tmp_path / "pets", mixed)
    first = folder.open_data(config(root))
    (packed,) = (cache / "folders").iterdir()
    stamp = (packed / "meta.json").stat().st_mtime_ns
    folder.open_data(config(root))
    assert (packed / "meta.json").stat().st_mtime_ns == stamp
    assert first.layout == "2 classes; train from the class folders; val: a fifth of each class, held out"
    (root / "dog" / "0.jpeg").write_bytes(tiny.picture(99, size=(64, 200)))
    os.utime(root / "dog" / "0.jpeg", ns=(1, 1))
    second = folder.open_data(config(root))
    assert (first.train.sha, first.val.sha) != (second.train.sha, second.val.sha)
    assert folder.open_data(config(root, image_size=32)).train.images.shape[1] == 32
    assert len(list((cache / "folders").iterdir())) == 3


def test_info_without_packing(tmp_path, tiny, mixed, cache):
    summary = folder.info(tiny.write_folder(tmp_path / "pets", mixed))
    assert (summary["train"], summary["val"]) == (14, 3)
    assert summary["classes"][0] == {"label": 0, "id": "cat", "words": "cat", "train": 9, "val": 2}
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no images in class folders; accepted: train/<class>/"),
        ({"a.png": 1}, "no images in class folders"),
        ({"a/1.png": 1, "a/2.png": 1}, "only the class a"),
        ({"a/1.png": 1, "b/1.png": 1}, "too few images"),
        ({"a/1.png": 1, "b/1.txt": 0}, "b: class folder without images"),
        ({"train/a/1.png": 1, "train/b/1.png": 1, "val/c/1.png": 1}, "val/c: a class that .*train does not have"),
        ({"train/a/1.png": 1, "train/b/1.txt": 0, "val/a/1.png": 1}, "train/b: class folder without images"),
        ({"a/1.png": 1, "a/2.png": 0, "b/1.png": 1, "b/2.png": 1}, r"a/2\.png: cannot be decoded"),
    ],
)
def test_refused(tmp_path, tiny, cache, files, message):
    root = tmp_path / "d"
    root.mkdir()
    tiny.write_folder(root, {name: tiny.picture(1, format="PNG") if good else b"no" for name, good in files.items()})
    with pytest.raises(UserError, match=message):
        folder.open_data(config(root))
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.root: .*none is no folder"):
        folder.open_data(config(tmp_path / "none"))
