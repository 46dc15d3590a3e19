"""A flipped label or pixel is found before the first step; what was found to be good is not hashed again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rayexp.config import DataConfig
from rayexp.data import integrity, open_data, packed, tiny_imagenet
from rayexp.data import pack as packing
from rayexp.errors import UserError

COUNT = """
import sys
from pathlib import Path
from rayexp.config import DataConfig
from rayexp.data import integrity, open_data
look = integrity._first_difference
def count(*arguments):
    print("hashed")
    return look(*arguments)
integrity._first_difference = count
open_data(DataConfig(name="tiny_imagenet", root=Path(sys.argv[1])))
"""


@pytest.fixture
def folder(tmp_path, tiny, monkeypatch) -> Path:
    """20 train and 9 val images, in chunks of 4."""
    monkeypatch.setattr(packing, "CHUNK_BYTES", 4 * 64 * 64 * 3)
    tiny_imagenet.fetch(tiny.write_zip(tmp_path / "a.zip", tiny.layout()), tmp_path / "d")
    return tmp_path / "d"


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """The sizes of the arrays that were hashed."""
    sizes: list[int] = []
    look = integrity._first_difference

    def count(images, rows, chunks):
        sizes.append(len(images))
        return look(images, rows, chunks)

    monkeypatch.setattr(integrity, "_first_difference", count)
    return sizes


def open_(root: Path):
    return open_data(DataConfig(name="tiny_imagenet", root=root))


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a byte, in place."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("opened_before", [False, True])
def test_a_flipped_pixel_is_named(folder, split, opened_before):
    if opened_before:
        open_(folder)
    flip(folder / f"{split}_images.npy")
    images = {"train": "16 to 19", "val": "8 to 8"}[split]
    with pytest.raises(
        UserError, match=rf"{split}_images\.npy: damaged \(images {images} .*; remove {folder}"
    ) as caught:
        open_(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_flipped_label_is_named(folder, split, opened_before):
    if opened_before:
        open_(folder)
    path = folder / f"{split}_labels.npy"
    labels = np.load(path)
    labels[3] = (labels[3] + 1) % 3
    np.save(path, labels)
    with pytest.raises(UserError, match=rf"{split}_labels\.npy: damaged"):
        open_(folder)
    with pytest.raises(UserError, match=rf"{split}_labels\.npy: damaged"):
        packed.info(folder)


def test_every_pixel_counts(folder):
    """First and last byte of the first, a middle and the last chunk."""
    path = folder / "train_images.npy"
    chunk, size = packing.CHUNK_BYTES, path.stat().st_size
    for at in (128, 128 + chunk - 1, 128 + 2 * chunk, size - 1):
        flip(path, at)
        with pytest.raises(UserError, match="damaged"):
            open_(folder)
        flip(path, at)
    open_(folder)


@pytest.mark.parametrize("change", ["class name", "class more", "chunk gone", "chunk rows"])
def test_meta_that_was_edited(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    if change == "class name":
        meta["classes"][1][1] = "wasp"
    elif change == "class more":
        meta["classes"].append(["n09", "nine"])
    elif change == "chunk gone":
        meta["chunks"]["val"].pop()
    else:
        meta["chunk"] += 1
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=rf"{folder / 'meta.json'}: damaged"):
        open_(folder)


@pytest.mark.parametrize("change", [None, "chunk gone", "chunk rows"])
def test_meta_of_an_older_rayexp(folder, change):
    """It has no hash of itself and no layout; chunks are covered all the same."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["meta_sha"], meta["layout"]
    if change == "chunk gone":
        meta["chunks"]["val"].pop()
    elif change == "chunk rows":
        meta["chunk"] += 1
    (folder / "meta.json").write_text(json.dumps(meta))
    if change:
        with pytest.raises(UserError, match="damaged"):
            open_(folder)
    else:
        assert open_(folder).layout == ""


def test_hashed_once(folder, hashed):
    for _ in range(3):
        open_(folder)
    assert hashed == [20, 9]
    packed.check(folder)  # whatever is remembered
    assert hashed == [20, 9, 20, 9]


def test_by_all_processes_together(folder):
    command = [sys.executable, "-c", COUNT, str(folder)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(worker.communicate(timeout=120)[0] for worker in workers)
    assert said.split() == ["hashed"] * 2  # train and val, by whoever came first


def test_an_edit_that_restores_size_and_mtime_is_seen(folder, hashed):
    open_(folder)
    path = folder / "val_images.npy"
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(UserError, match=r"val_images\.npy: damaged"):
        open_(folder)


def test_another_file_in_its_place_is_seen(folder, hashed):
    open_(folder)
    path = folder / "val_images.npy"
    before = path.stat()
    other = folder / "other"
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    open_(folder)
    assert hashed == [20, 9, 9]


def test_a_write_just_after_packing_shows(folder, monkeypatch):
    """File times go in steps. Hashing waits until a later write must have a later time."""
    path = folder / "val_images.npy"
    waited: list[float] = []
    monkeypatch.setattr(integrity.time, "sleep", waited.append)
    monkeypatch.setattr(integrity.time, "time", lambda: 1_000.01)
    assert integrity._wait_for_next_file_time([0, 0, 0, 0, 1_000_000_000_001])
    assert waited == [pytest.approx(integrity.FINE_S - 0.01, abs=1e-6)]
    assert integrity._wait_for_next_file_time([0, 0, 0, 0, 999_000_000_000])  # whole seconds: a coarse file system
    assert waited[1:] == [pytest.approx(integrity.COARSE_S - 1.01)]
    assert integrity._wait_for_next_file_time([0, 0, 0, 0, 990_000_000_001])
    assert len(waited) == 2
    assert not integrity._wait_for_next_file_time([0, 0, 0, 0, 1_001_000_000_001])  # from the future: another clock
    assert path.exists()


def test_hashing_waits_for_the_next_file_time(folder, hashed, monkeypatch):
    seen: list[int] = []

    def wait(opened):
        seen.append(len(hashed))
        return False  # the clocks disagree

    monkeypatch.setattr(integrity, "_wait_for_next_file_time", wait)
    open_(folder)
    open_(folder)
    assert seen == [0, 1, 2, 3]
    assert hashed == [20, 9, 20, 9]  # nothing was remembered


def test_nothing_is_remembered_of_a_file_that_changed_meanwhile(folder, hashed, monkeypatch):
    look = integrity._first_difference

    def slow(images, rows, chunks):
        result = look(images, rows, chunks)
        os.utime(folder / "train_images.npy")
        return result

    monkeypatch.setattr(integrity, "_first_difference", slow)
    open_(folder)
    open_(folder)
    assert hashed == [20, 9, 20]


def test_a_memory_that_others_could_write_is_not_trusted(folder, cache, hashed):
    open_(folder)
    (cache / "verified").chmod(0o777)
    open_(folder)
    assert hashed == [20, 9, 20, 9]


def test_without_a_cache_it_is_hashed_each_time(folder, hashed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "file"))
    open_(folder)
    open_(folder)
    assert hashed == [20, 9, 20, 9]


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"identity": 1}', b"\xff"])
def test_a_damaged_memory_is_made_anew(folder, cache, hashed, damage):
    open_(folder)
    notes = [path for path in (cache / "verified").iterdir() if not path.suffix]
    assert len(notes) == 2
    for note in notes:
        note.write_bytes(damage)
    open_(folder)
    open_(folder)
    assert hashed == [20, 9, 20, 9]


def rewritten(folder: Path, chunks: list[str]) -> None:
    """A meta.json that is whole and of one piece, with other hashes of the pixels."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["chunks"]["val"] = chunks
    labels = np.load(folder / "val_labels.npy").tolist()
    meta["sha"]["val"] = packing.split_sha(meta["names"]["val"], labels, chunks)
    meta["meta_sha"] = packing.meta_sha(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_what_is_remembered_is_of_these_hashes(folder, hashed):
    before = open_(folder).val.sha
    chunks = json.loads((folder / "meta.json").read_text())["chunks"]["val"]
    rewritten(folder, [chunks[0], chunks[0], chunks[2]])  # the pixels are as they were
    with pytest.raises(UserError, match=r"val_images\.npy: damaged \(images 4 to 7"):
        open_(folder)
    rewritten(folder, chunks)
    assert open_(folder).val.sha == before


def test_the_first_chunk_that_differs():
    images = np.zeros((1000, 64, 64, 3), np.uint8)
    sha = hashlib.sha256(images[:341].data).hexdigest()
    last = hashlib.sha256(images[:318].data).hexdigest()
    assert integrity._first_difference(images, 341, [sha, sha, last]) is None
    assert integrity._first_difference(images, 341, [sha, last, sha]) == 341
    assert integrity._first_difference(images, 341, [sha, sha]) == 0
