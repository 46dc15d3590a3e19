from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from rayexp.config import DataConfig
from rayexp.data import pack, packed, shapes, tiny_imagenet
from rayexp.errors import UserError


def test_drawing_is_the_same_everywhere():
    """Before JPEG, so that another JPEG library does not matter. A change here changes everybody's data: then
    shapes.VERSION must rise."""
    drawn = hashlib.sha256()
    for k, name in enumerate(shapes.CLASSES):
        for split in ("train", "val"):
            drawn.update(shapes.draw(split, name, k).tobytes())
    assert shapes.VERSION == 1
    assert drawn.hexdigest() == "937b5ab205ea03f3b60642680c415d55c53ad685cf3dfbbe22bac7d36f3fc0f5"


def test_every_draw_is_its_own():
    images = {
        shapes.draw(split, name, number, seed).tobytes()
        for split in ("train", "val")
        for name in list(shapes.CLASSES)[:3]
        for number in (0, 1)
        for seed in (0, 1)
    }
    assert len(images) == 24


def test_made_on_first_use(cache):
    data = packed.open_packed(shapes.home(train=3, val=2), DataConfig())
    assert (len(data.train), len(data.val), len(data.classes)) == (60, 40, 20)
    assert data.train.labels.tolist() == np.repeat(np.arange(20), 3).tolist()
    assert data.val.labels.tolist() == [*range(20)] * 2
    assert data.classes[0] == ("cold_plain_bar", "bar, plain, cold")
    assert [name for name, _ in data.classes] == sorted(shapes.CLASSES)
    packed.check(shapes.home(train=3, val=2))
    # JPEG changes little of what was drawn.
    drawn = np.asarray(shapes.draw("train", "cold_plain_bar", 1)).astype(int)
    assert np.abs(data.train.read(np.array([1]))[0] - drawn).mean() < 12


def test_archive_has_the_official_layout_and_packs_like_it(cache, tmp_path):
    home = shapes.home(train=2, val=1)
    with zipfile.ZipFile(home / "shapes.zip") as archive:
        names = archive.namelist()
        assert archive.read("tiny-imagenet-200/val/images/val_3.JPEG")[:2] == b"\xff\xd8"
    assert "tiny-imagenet-200/train/warm_plain_star/images/warm_plain_star_1.JPEG" in names
    assert {
        "tiny-imagenet-200/wnids.txt",
        "tiny-imagenet-200/words.txt",
        "tiny-imagenet-200/val/val_annotations.txt",
    } < set(names)
    tiny_imagenet.fetch(home / "shapes.zip", tmp_path / "d")
    assert packed.read_meta(tmp_path / "d")["sha"] == packed.read_meta(home)["sha"]


def test_other_size_and_seed(cache):
    small = packed.open_packed(shapes.home(32, train=2, val=1), DataConfig(image_size=32))
    assert small.train.images.shape == (40, 32, 32, 3)
    one, other = (packed.read_meta(shapes.home(train=2, val=1, seed=seed))["sha"]["train"] for seed in (0, 1))
    assert one != other


def test_fetched_elsewhere(tmp_path, cache):
    assert shapes.fetch(None, tmp_path / "d", train=2, val=1) is True
    assert shapes.fetch(None, tmp_path / "d", train=2, val=1) is False
    assert len(shapes.open_data(DataConfig(root=tmp_path / "d")).train) == 40
    assert list(cache.glob("shapes-*")) == []


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="the disk is too full"):
        shapes.fetch(None, tmp_path / "d", train=1, val=1)
    assert list(tmp_path.iterdir()) == []


def test_first_use_by_several_processes(cache):
    code = (
        "from rayexp.data import packed, shapes\n"
        "home = shapes.home(train=4, val=2)\n"
        "packed.check(home)\n"
        "print(packed.read_meta(home)['sha']['train'])"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 3
    assert len(answers) == 1
    (home,) = cache.glob("shapes-*")
    assert sorted(p.name for p in home.iterdir() if p.suffix != ".npy") == ["meta.json", "shapes.zip"]


def test_a_script_without_a_main_guard_works(tmp_path, cache):
    script = tmp_path / "script.py"
    script.write_text("from rayexp.data import shapes\nprint(shapes.home(train=1, val=1).name)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "shapes-v1-1x1-seed0-64px\n", "")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file/shapes-v1-200x50-seed0-64px: cannot be written"):
        shapes.open_data(DataConfig())


@pytest.mark.slow
def test_default(cache):
    data = shapes.open_data(DataConfig(max_train_samples=400))
    assert (len(data.train), len(data.val)) == (400, 1000)
    assert np.bincount(data.train.labels).tolist() == [20] * 20
