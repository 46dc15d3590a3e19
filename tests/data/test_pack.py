"""Packing: what was interrupted goes on, what cannot be finished leaves nothing, and the hashes are always the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from rayexp.config import DataConfig
from rayexp.data import folder, packed, tiny_imagenet
from rayexp.data import pack as packing
from rayexp.errors import RunError, UserError
from rayexp.system.disk import write_json


@pytest.fixture
def source(tmp_path, tiny, monkeypatch) -> Path:
    """20 train and 9 val images, in chunks of 4."""
    monkeypatch.setattr(packing, "CHUNK_BYTES", 4 * 64 * 64 * 3)
    return tiny.write_zip(tmp_path / "a.zip", tiny.layout())


def interrupt(monkeypatch, after: int, error: BaseException) -> None:
    """Make the pool fail once it has answered `after` calls."""
    answered = 0
    original = packing.pool.ordered

    def ordered(*arguments):
        nonlocal answered
        for answer in original(*arguments):
            if answered == after:
                raise error
            answered += 1
            yield answer

    monkeypatch.setattr(packing.pool, "ordered", ordered)


def shas(to: Path) -> dict[str, str]:
    return packed.read_meta(to)["sha"]


@pytest.mark.parametrize(
    ("after", "error"),
    [*((after, KeyboardInterrupt()) for after in (0, 1, 4, 5, 7)), (3, RunError("a helper process ended early"))],
)
def test_goes_on_where_it_was_interrupted(tmp_path, source, counted, after, error):
    to = tmp_path / "d"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after, error)
        with pytest.raises(type(error)):
            tiny_imagenet.fetch(source, to)
    assert not packing.done(to)
    assert {p.name for p in to.iterdir()} == {".tmp-pack"}
    counted.clear()
    assert tiny_imagenet.fetch(source, to) is True
    assert {p.name for p in to.iterdir()} == {
        "meta.json",
        *(f"{s}_{p}.npy" for s in packing.SPLITS for p in ("images", "labels")),
    }
    # 5 chunks of train, 3 of val; the last of a split is always done again.
    kept = min(after, 4) + max(0, min(after - 5, 2))
    assert len(counted) == 8 - kept
    tiny_imagenet.fetch(source, tmp_path / "fresh")
    assert shas(to) == shas(tmp_path / "fresh")
    packed.check(to)


@pytest.mark.parametrize("damage", ["flip", "cut", "journal", "header", "other source"])
def test_what_an_interruption_left_is_checked(tmp_path, tiny, source, counted, damage):
    to = tmp_path / "d"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tiny_imagenet.fetch(source, to)
    images, journal = to / ".tmp-pack" / "train_images.npy", to / ".tmp-pack" / "train_chunks"
    whole, kept = images.read_bytes(), 2
    if damage == "flip":  # in the third chunk, as a power cut may leave it
        at = 128 + 2 * packing.CHUNK_BYTES + 5
        images.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    elif damage == "cut":
        images.write_bytes(whole[: 128 + 3 * packing.CHUNK_BYTES - 1])
    elif damage == "journal":
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join([*lines[:2], lines[2][:10]]))
    elif damage == "header":
        images.write_bytes(b"x" + whole[1:])
        kept = 0
    else:
        files = tiny.layout()
        files["val/images/val_0.JPEG"] = tiny.picture(99)
        tiny.write_zip(source, files)
        kept = 0
    counted.clear()
    tiny_imagenet.fetch(source, to)
    assert len(counted) == 8 - kept
    packed.check(to)
    tiny_imagenet.fetch(source, tmp_path / "fresh")
    assert shas(to) == shas(tmp_path / "fresh")


def test_hash_does_not_depend_on_the_number_of_processes(tmp_path, source, monkeypatch, helpers):
    for processes in (1, 3):
        monkeypatch.setattr(packing.pool, "cores", lambda n=processes: n)
        tiny_imagenet.fetch(source, tmp_path / f"{processes}")
    assert shas(tmp_path / "1") == shas(tmp_path / "3")


def test_too_little_space_is_seen_beforehand(tmp_path, source, listing, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**5))
    before = listing(tmp_path)
    with pytest.raises(
        UserError, match=rf"{tmp_path / 'd'}: the disk is too full; packing needs 2 MB more, 0 MB are free"
    ):
        tiny_imagenet.fetch(source, tmp_path / "d")
    assert listing(tmp_path) == before


def test_disk_that_fills_up_meanwhile(tmp_path, source, listing, monkeypatch):
    before = listing(tmp_path)
    interrupt(monkeypatch, 3, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=rf"{tmp_path / 'd'}: the disk is full"):
        tiny_imagenet.fetch(source, tmp_path / "d")
    assert listing(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path, source, listing, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(UserError, match="the disk is too full"):
            tiny_imagenet.fetch(source, disk / "d")
        assert list(disk.iterdir()) == []
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: usage(10**9, 0, 10**9))
        with pytest.raises(UserError, match="the disk is full"):
            tiny_imagenet.fetch(source, disk / "d")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_target_that_cannot_be_written(tmp_path, source, listing):
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    for to in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"{to}: cannot be written"):
            tiny_imagenet.fetch(source, to)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot be written"):
            tiny_imagenet.fetch(source, tmp_path / "locked")
        (tmp_path / "locked").rmdir()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("at", [*packing.ARRAYS, "meta.json"])
@pytest.mark.parametrize("how", ["disk", "killed"])
def test_interrupted_while_files_are_moved(tmp_path, source, counted, monkeypatch, at, how):
    """A full disk takes everything back; a killed process leaves what the next call goes on with."""
    to = tmp_path / "d"
    move = Path.replace

    def fail(self, target):
        if self.parent.name == ".tmp-pack" and self.name == at:
            raise OSError(errno.ENOSPC, "No space left on device") if how == "disk" else KeyboardInterrupt
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(UserError if how == "disk" else KeyboardInterrupt):
            tiny_imagenet.fetch(source, to)
    assert not packing.done(to)
    assert to.exists() is (how == "killed")
    counted.clear()
    assert tiny_imagenet.fetch(source, to) is True
    assert len(counted) == (8 if how == "disk" else 2)  # the last chunk of each split is always done again
    packed.check(to)
    assert {p.name for p in to.iterdir()} == {"meta.json", *packing.ARRAYS}
    tiny_imagenet.fetch(source, tmp_path / "fresh")
    assert shas(to) == shas(tmp_path / "fresh")


def test_another_source_after_a_kill_while_files_were_moved(tmp_path, tiny, source, monkeypatch):
    """What was moved was the packing's own, and does not stand in the way of another."""
    to = tmp_path / "d"
    sync = packing.sync_directory
    with monkeypatch.context() as patch:
        patch.setattr(packing, "sync_directory", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tiny_imagenet.fetch(source, to)
    assert sync is packing.sync_directory
    assert (to / "train_images.npy").exists()
    files = tiny.layout()
    files["val/images/val_0.JPEG"] = tiny.picture(99)
    tiny.write_zip(source, files)
    assert tiny_imagenet.fetch(source, to) is True
    packed.check(to)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_disk_that_fills_and_is_enlarged(tmp_path, tiny):
    """Many images with long names: the names take more than the pixels."""
    disk, root = tmp_path / "disk", tmp_path / "images"
    disk.mkdir()
    image = tiny.picture(1, size=(4, 4), format="PNG")
    names = [f"{c}/{'long' * 50}-{k}.png" for c in "ab" for k in range(1500)]
    tiny.write_folder(root, dict.fromkeys(names, image))
    plan = folder.make_plan(root, 4)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    usage = namedtuple("usage", "total used free")
    try:
        for estimate in (None, usage(10**9, 0, 10**9)):  # seen beforehand, and not
            with pytest.MonkeyPatch.context() as patch:
                if estimate:
                    patch.setattr(packing.shutil, "disk_usage", lambda _, estimate=estimate: estimate)
                for _ in range(2):
                    with pytest.raises(UserError, match=rf"{disk / 'd'}: the disk is (too )?full"):
                        packing.pack(disk / "d", lambda: plan)
                    assert list(disk.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert packing.pack(disk / "d", lambda: plan) is True
        packed.check(disk / "d")
        assert plan.bytes() > (disk / "d" / "meta.json").stat().st_size  # names count beforehand
    finally:
        subprocess.run(["umount", disk], check=True)


def test_files_of_the_same_name_are_not_overwritten(tmp_path, source, listing):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "val_labels.npy").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"val_labels\.npy: stands in the way"):
        tiny_imagenet.fetch(source, tmp_path / "d")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
def test_several_at_once(tmp_path, tiny, faults, flock):
    """One packs, the others wait for it; all find the same."""
    source = tiny.write_zip(tmp_path / "a.zip", tiny.layout())
    code = (
        "import sys; from pathlib import Path; from rayexp.data.tiny_imagenet import fetch\n"
        "print(fetch(sys.argv[1], Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "d")]
    env = None if flock else faults(flock=errno.ENOLCK)
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(answers) == ["False", "False", "True"]
    packed.check(tmp_path / "d")
    assert not (tmp_path / "d" / ".tmp-pack").exists()


@pytest.mark.parametrize("where", ["image", "class", "root", "stray"])
def test_names_that_are_no_utf8(tmp_path, tiny, cache, where):
    """Latin-1, as old disks have it: packed, found again, and kept through JSON."""
    cafe = os.fsdecode(b"caf\xe9")
    root = tmp_path / (cafe if where == "root" else "d")
    one, other = (cafe if where == "class" else "a"), "b"
    files = {f"{c}/{k}.png": tiny.picture(k, format="PNG") for c in (one, other) for k in range(3)}
    if where == "image":
        files[f"a/{cafe}.png"] = tiny.picture(9, format="PNG")
    if where == "stray":
        files[f"{cafe}.png"] = tiny.picture(9, format="PNG")
    tiny.write_folder(root, files)
    config = DataConfig(name="folder", root=root)
    first = folder.open_data(config)
    assert {*first.train.names, *first.val.names} == {name for name in files if "/" in name}
    os.utime(root / other / "0.png", ns=(1, 1))
    again = folder.open_data(config)
    assert (again.train.sha, again.train.names, again.classes) == (first.train.sha, first.train.names, first.classes)
    (at,) = [path for path in (cache / "folders").iterdir() if not path.is_symlink()]
    packed.check(at)
    described = {"val_names": list(first.val.names), "classes": first.classes, "layout": first.layout}
    write_json(tmp_path / "data.json", described)
    assert json.loads((tmp_path / "data.json").read_text())["val_names"] == described["val_names"]
