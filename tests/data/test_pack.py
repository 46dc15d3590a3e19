from __future__ import annotations

import base64
import errno
import io
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from rayexp.data import pack as packing
from rayexp.data import packed, tiny_imagenet
from rayexp.errors import RunError, UserError


@pytest.fixture
def source(tmp_path, tiny, monkeypatch) -> Path:
    """20 train and 9 val images, in chunks of 4."""
    monkeypatch.setattr(packing, "CHUNK_BYTES", 4 * 64 * 64 * 3)
    return tiny.write_zip(tmp_path / "a.zip", tiny.layout())


@pytest.fixture
def counted(monkeypatch) -> list[list[str]]:
    """The calls that reach the pool; `stop_after` of them, the pool raises."""
    calls: list[list[str]] = []
    original = packing.pool.ordered

    def ordered(function, arguments, *rest):
        return original(function, (calls.append(a[2]) or a for a in arguments), *rest)

    monkeypatch.setattr(packing.pool, "ordered", ordered)
    return calls


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


def test_hash_does_not_depend_on_the_number_of_processes(tmp_path, source, monkeypatch):
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
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(4)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(answers) == ["False", "False", "False", "True"]
    packed.check(tmp_path / "d")
    assert not (tmp_path / "d" / ".tmp-pack").exists()


def test_a_dead_helper_is_reported(tmp_path):
    with pytest.raises(RunError, match=r"ended early \(exit code 3"):
        list(packing.pool.ordered("os:_exit", [[3]], 1))
    with pytest.raises(RunError, match="a helper process failed: ZeroDivisionError"):
        list(packing.pool.ordered("operator:truediv", [[1, 0]], 1))


def test_pool_keeps_the_order():
    texts = [f"{k:04d}" for k in range(50)]
    answers = packing.pool.ordered("base64:b64decode", ([text] for text in texts), 3)
    assert list(answers) == [base64.b64decode(text) for text in texts]


def test_pool_ends_its_processes_when_it_is_left():
    answers = packing.pool.ordered("base64:b64decode", [["AAAA"]] * 50, 2)
    next(answers)
    assert psutil.Process().children()
    answers.close()
    assert not psutil.Process().children()


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "I;16"])
def test_other_modes_become_rgb(tiny, mode):
    if mode == "I;16":
        gradient = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
        out = io.BytesIO()
        Image.fromarray(gradient).save(out, "PNG")
        assert np.array_equal(np.asarray(packing._rgb(out.getvalue(), None))[..., 0], gradient >> 8)
    else:
        image = packing._rgb(tiny.picture(1, mode, format="PNG"), None)
        assert (image.mode, image.size) == ("RGB", (64, 64))
