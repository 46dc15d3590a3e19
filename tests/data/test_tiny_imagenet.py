"""Tiny-ImageNet in every form in which it is kept: the same data, or a refusal that names the file."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayexp.config import DataConfig
from rayexp.data import pack as packing
from rayexp.data import packed, tiny_imagenet
from rayexp.errors import UserError


def config(root, **more):
    return DataConfig(name="tiny_imagenet", root=root, **more)


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_labels_order_and_pixels(tmp_path, tiny):
    files = tiny.layout()
    assert tiny_imagenet.fetch(tiny.write_zip(tmp_path / "a.zip", files), tmp_path / "d") is True
    data = tiny_imagenet.open_data(config(tmp_path / "d"))
    assert data.classes == (
        ("n01000001", "goldfish, Carassius auratus"),
        ("n02000002", "bee"),
        ("n03000003", "n03000003"),
    )
    assert data.train.labels.tolist() == [0] * 4 + [1] * 12 + [2] * 4
    assert data.train.names[4:16] == tuple(f"n02000002_{i}.JPEG" for i in range(12))  # by number, not as text
    assert data.val.names == tuple(f"val_{i}.JPEG" for i in range(9))
    assert data.val.labels.tolist() == [2, 0, 1] * 3
    for split, folder in ((data.train, "train/{}/images/{}"), (data.val, "val/images/{1}")):
        for row, (label, name) in enumerate(zip(split.labels, split.names, strict=True)):
            expected = rgb(files[folder.format(data.classes[label][0], name)])
            assert np.array_equal(split.read(np.array([row]))[0], expected)
    assert data.train.images.dtype == np.uint8
    assert not data.train.images.flags.writeable


FORMS = (
    "zip", "zip without the top folder", "zip twice nested", "folder", "folder that holds it", "folder twice nested",
    "tar", "tar.gz", "tar.bz2", "tar.xz", "tar made of ./",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_data(tmp_path, tiny, cache, form):
    files = tiny.layout()
    source = {
        "zip": lambda: tiny.write_zip(tmp_path / "a.zip", files),
        "zip without the top folder": lambda: tiny.write_zip(tmp_path / "a.zip", files, top=""),
        "folder": lambda: tiny.write_folder(tmp_path / "x", files),
        "folder that holds it": lambda: tiny.write_folder(tmp_path / "x" / tiny.top, files).parent,
        "zip twice nested": lambda: tiny.write_zip(tmp_path / "a.zip", files, top=2 * tiny.top),
        "folder twice nested": lambda: tiny.write_folder(tmp_path / "x" / tiny.top / tiny.top, files).parent.parent,
        "tar": lambda: tiny.write_tar(tmp_path / "a.tar", files),
        "tar.gz": lambda: tiny.write_tar(tmp_path / "a.tar.gz", files),
        "tar.bz2": lambda: tiny.write_tar(tmp_path / "a.tbz", files, mode="w:bz2"),
        "tar.xz": lambda: tiny.write_tar(tmp_path / "a.tar.xz", files, mode="w:xz"),
        "tar made of ./": lambda: tiny.write_tar(tmp_path / "a.tgz", files, top=f"./{tiny.top}"),
    }[form]()
    reference = tiny.write_zip(tmp_path / "reference.zip", dict(reversed(files.items())))
    tiny_imagenet.fetch(source, tmp_path / "d")
    tiny_imagenet.fetch(reference, tmp_path / "r")
    ours, theirs = (json.loads((tmp_path / d / "meta.json").read_text()) for d in "dr")
    assert ours["sha"] == theirs["sha"]
    assert Path(ours["source"]).exists()
    # What a tar becomes on the way is not kept, and the second call finds it done.
    assert tiny_imagenet.fetch(source, tmp_path / "d") is False
    assert not list(cache.glob("archives/*"))


def test_second_call_finds_it_done(tmp_path, tiny, listing, monkeypatch):
    source = tiny.write_zip(tmp_path / "a.zip", tiny.layout())
    assert tiny_imagenet.fetch(source, tmp_path / "d") is True
    before = listing(tmp_path / "d")
    monkeypatch.setattr(packing, "_pack", None)  # would fail if it were called
    assert tiny_imagenet.fetch(source, tmp_path / "d") is False
    assert tiny_imagenet.fetch(str(source), tmp_path / "d") is False
    source.unlink()
    assert tiny_imagenet.fetch(source, tmp_path / "d") is False
    assert tiny_imagenet.fetch(None, tmp_path / "d") is False
    assert listing(tmp_path / "d") == before


def test_other_data_is_not_overwritten(tmp_path, tiny, listing):
    files = tiny.layout()
    tiny_imagenet.fetch(tiny.write_zip(tmp_path / "a.zip", files), tmp_path / "d")
    before = listing(tmp_path / "d")
    files["val/images/val_0.JPEG"] = tiny.picture(77)
    with pytest.raises(UserError, match=r"holds other data already \(from .*a\.zip\)"):
        tiny_imagenet.fetch(tiny.write_zip(tmp_path / "b.zip", files), tmp_path / "d")
    tiny.write_zip(tmp_path / "a.zip", files)  # the same name, another archive
    with pytest.raises(UserError, match="holds other data already"):
        tiny_imagenet.fetch(tmp_path / "a.zip", tmp_path / "d")
    with pytest.raises(UserError, match="no such file or folder"):
        tiny_imagenet.fetch(tmp_path / "typo.zip", tmp_path / "d")
    assert listing(tmp_path / "d") == before


# ---------------------------------------------------------------------- refusals

SECOND = "n01000001"


def drop(*starts):
    return lambda files: {k: v for k, v in files.items() if not k.startswith(starts)}


def put(name, data):
    return lambda files: {**files, name: data(files[name]) if callable(data) else data}


REFUSALS = {
    "no wnids.txt": (drop("wnids.txt"), r"no wnids\.txt in it"),
    "wnids.txt empty": (put("wnids.txt", b"\n\n"), r"wnids\.txt: names no class"),
    "wnids.txt twice": (put("wnids.txt", lambda d: d + b"n01000001\n"), r"wnids\.txt: names n01000001 twice"),
    "wnids.txt binary": (put("wnids.txt", b"\xff\xfe\x00"), r"wnids\.txt: not UTF-8"),
    "class folder missing": (drop(f"train/{SECOND}/"), rf"train/{SECOND}/images: class folder missing or without"),
    "class folder empty": (drop(f"train/{SECOND}/images/"), rf"train/{SECOND}/images: class folder missing or without"),
    "class that is not listed": (
        put("train/n07000000/images/n07000000_0.JPEG", b""),
        r"train/n07000000: a class that wnids\.txt does not name",
    ),
    "no annotations": (drop("val/val_annotations.txt"), r"val/val_annotations\.txt: missing"),
    "annotations empty": (drop("val/images"), r"there is no image .*val/images/val_0\.JPEG"),
    "no val at all": (lambda f: {**drop("val/images")(f), "val/val_annotations.txt": b""}, "annotates no image"),
    "unknown image": (
        put("val/val_annotations.txt", lambda d: d + b"val_99.JPEG\tn01000001\t0\t0\t1\t1\n"),
        r"val_annotations\.txt line 10: there is no image .*val/images/val_99\.JPEG",
    ),
    "image above its folder": (
        put("val/val_annotations.txt", lambda d: d + b"../../wnids.txt\tn01000001\t0\t0\t1\t1\n"),
        r"line 10: there is no image",
    ),
    "unknown class": (
        put("val/val_annotations.txt", lambda d: d.replace(b"n02000002", b"n02999999", 1)),
        r"val_annotations\.txt line 3: unknown class 'n02999999'",
    ),
    "no class": (put("val/val_annotations.txt", lambda d: d + b"val_1.JPEG\n"), r"line 10: unknown class ''"),
    "annotated twice": (
        put("val/val_annotations.txt", lambda d: d + d.splitlines(keepends=True)[0]),
        r"line 10: annotates val_0\.JPEG a second time",
    ),
    "not annotated": (
        put("val/images/val_9.JPEG", b"x"),
        r"val/images/val_9\.JPEG: has no annotation in val/val_annotations\.txt",
    ),
    "undecodable": (
        put(f"train/{SECOND}/images/{SECOND}_2.JPEG", b"no image"),
        rf"train/{SECOND}/images/{SECOND}_2\.JPEG: cannot be decoded \(no image format",
    ),
    "empty file": (put("val/images/val_4.JPEG", b""), r"val/images/val_4\.JPEG: cannot be decoded"),
    "truncated": (
        put("val/images/val_4.JPEG", lambda d: d[: len(d) // 2]),
        r"(?i)val/images/val_4\.JPEG: cannot be decoded \(.*truncated",
    ),
    "other size": (
        put("val/images/val_4.JPEG", lambda d: Image.open(io.BytesIO(d)) and PNG_32),
        r"val/images/val_4\.JPEG: is 32x32 pixels, expected 64x64",
    ),
}
buffer = io.BytesIO()
Image.new("RGB", (32, 32)).save(buffer, "PNG")
PNG_32 = buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize("case", REFUSALS)
def test_refused_and_nothing_left(tmp_path, tiny, listing, case, kind):
    change, message = REFUSALS[case]
    files = change(tiny.layout())
    write = tiny.write_zip if kind == "zip" else tiny.write_folder
    source = write(tmp_path / "source", files)
    standing = tmp_path / "standing"
    standing.mkdir()
    (standing / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    for to in (tmp_path / "new" / "deep", standing):
        with pytest.raises(UserError, match=message) as caught:
            tiny_imagenet.fetch(source, to)
        assert "\n" not in str(caught.value)
        assert str(source) in str(caught.value)
        assert listing(tmp_path) == before


def archive_with(path: Path, tiny, *entries) -> Path:
    tiny.write_zip(path, tiny.layout())
    with zipfile.ZipFile(path, "a") as archive:
        for info, data in entries:
            archive.writestr(info, data)
    return path


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("tiny-imagenet-200/train/n01000001/images/link.JPEG")
    info.create_system = 3
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("../evil.JPEG", r"'\.\./evil\.JPEG' leads out of the archive"),
        ("tiny-imagenet-200/../../evil", "leads out of the archive"),
        ("/etc/evil", "leads out of the archive"),
        ("C:/evil", "leads out of the archive"),
        ("..\\evil", "leads out of the archive"),
        (link(), "link.JPEG' is a symbolic link"),
        ("tiny-imagenet-200/wnids.txt", "stands there twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_unsafe_archives(tmp_path, tiny, listing, entry, message):
    source = archive_with(tmp_path / "a.zip", tiny, (entry, b"x"))
    before = listing(tmp_path)
    with pytest.raises(UserError, match=message):
        tiny_imagenet.fetch(source, tmp_path / "d")
    assert listing(tmp_path) == before


def test_truncated_and_other_archives(tmp_path, tiny, listing):
    whole = tiny.write_zip(tmp_path / "a.zip", tiny.layout()).read_bytes()
    cases = {
        "half.zip": whole[: len(whole) // 2],
        "short.zip": whole[:-30],
        "empty.zip": b"",
        "text.zip": b"hello" * 99,
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    before = listing(tmp_path)
    for name in cases:
        with pytest.raises(UserError, match=f"{name}: not a ZIP archive, or a truncated one"):
            tiny_imagenet.fetch(tmp_path / name, tmp_path / "d")
    assert listing(tmp_path) == before


def test_flipped_bits_are_found_by_crc(tmp_path, tiny, listing):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in tiny.layout().items():
            archive.writestr(name, data)
        offset = archive.getinfo("val/images/val_7.JPEG").header_offset
    with path.open("r+b") as file:
        file.seek(offset + 30 + len("val/images/val_7.JPEG") + 300)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"val/images/val_7\.JPEG: damaged \(Bad CRC"):
        tiny_imagenet.fetch(path, tmp_path / "d")
    assert listing(tmp_path) == before


# ---------------------------------------------------------------------- opening


def test_unpacked_root_says_what_to_do(tmp_path, tiny):
    raw = tiny.write_folder(tmp_path / "raw", tiny.layout())
    for root in (raw, tiny.write_zip(tmp_path / "a.zip", tiny.layout())):
        with pytest.raises(
            UserError, match=f"{root} is not packed; run `rayexp data fetch tiny_imagenet --from {root}"
        ):
            tiny_imagenet.open_data(config(root))
    where = tmp_path / "nowhere"
    with pytest.raises(UserError, match=rf"data.root: no packed .* `rayexp data fetch tiny_imagenet .* --to {where}`"):
        tiny_imagenet.open_data(config(where))


@pytest.mark.parametrize("meta", ["[]", "{}", '{"layout": 1, "name": "wikitext2"}'])
def test_a_folder_with_other_data(tmp_path, tiny, listing, meta):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "meta.json").write_text(meta)
    source = tiny.write_zip(tmp_path / "a.zip", tiny.layout())
    before = listing(tmp_path)
    for use in (
        lambda: tiny_imagenet.open_data(config(tmp_path / "d")),
        lambda: tiny_imagenet.fetch(source, tmp_path / "d"),
    ):
        with pytest.raises(UserError, match="d: holds other data, not packed images"):
            use()
    assert listing(tmp_path) == before


# ---------------------------------------------------------------------- the real data


@pytest.mark.slow
def test_real_archive(tmp_path, real_data, helpers):
    to = tmp_path / "d"
    archive = real_data / "tiny-imagenet-200-first80.zip"
    assert tiny_imagenet.fetch(archive, to) is True
    data = tiny_imagenet.open_data(config(to))
    assert (len(data.train), len(data.val), len(data.classes)) == (16_000, 10_000, 200)
    assert np.bincount(data.train.labels).tolist() == [80] * 200
    assert np.bincount(data.val.labels).tolist() == [50] * 200
    # The labels of the lab's own list.
    known = {"val_1005.JPEG": 88, "val_1006.JPEG": 63, "val_1007.JPEG": 107, "val_1008.JPEG": 107, "val_101.JPEG": 42}
    assert {name: int(data.val.labels[data.val.names.index(name)]) for name in known} == known
    assert data.classes[107][0] == "n03444034"
    with zipfile.ZipFile(archive) as source:
        for row in np.random.default_rng(0).choice(16_000, 200, replace=False):
            wnid, name = data.classes[data.train.labels[row]][0], data.train.names[row]
            expected = rgb(source.read(f"tiny-imagenet-200/train/{wnid}/images/{name}"))
            assert np.array_equal(data.train.read(np.array([row]))[0], expected)
    packed.check(to)
    assert sorted(p.name for p in to.iterdir()) == sorted(
        ["meta.json", *(f"{s}_{p}.npy" for s in ("train", "val") for p in ("images", "labels"))]
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_real_archive_interrupted(tmp_path, real_data, how, helpers):
    """Stopped in the middle, the same command goes on, and the result is the same."""
    to = tmp_path / "d"
    command = [sys.executable, "-m", "rayexp", "data", "fetch", "tiny_imagenet"]
    command += ["--from", str(real_data / "tiny-imagenet-200-first80.zip"), "--to", str(to)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = to / ".tmp-pack" / "train_chunks"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 5 * 65):
        time.sleep(0.005)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    assert "Traceback" not in errors
    if how != signal.SIGKILL:
        assert "the same command goes on" in errors
    assert not (to / "meta.json").exists()
    with pytest.raises(UserError, match="packing was interrupted"):
        tiny_imagenet.open_data(config(to))
    kept = len(journal.read_text().split())
    assert kept >= 5
    shutil.copytree(to, tmp_path / "copy")
    calls = []
    original = packing.pool.ordered

    def count(function, arguments, *rest):
        return original(function, (calls.append(a) or a for a in arguments), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing.pool, "ordered", count)
        assert tiny_imagenet.fetch(real_data / "tiny-imagenet-200-first80.zip", to) is True
    rows = packing.chunk_rows(64)
    assert len(calls) == -(-16_000 // rows) - kept + -(-10_000 // rows)
    packed.check(to)
    tiny_imagenet.fetch(real_data / "tiny-imagenet-200-first80.zip", tmp_path / "fresh")
    ours, theirs = (json.loads((tmp_path / d / "meta.json").read_text())["sha"] for d in ("d", "fresh"))
    assert ours == theirs
