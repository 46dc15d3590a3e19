"""Archives that lie, explode or lead out: refused by name, before or while they are unpacked, and nothing is left."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from rayexp.config import DataConfig
from rayexp.data import archive, open_data, tiny_imagenet, wikitext2
from rayexp.data import decode as decoding
from rayexp.errors import UserError

MB = 1 << 20
IMAGE = "train/n01000001/images/n01000001_2.JPEG"


class Zeros(io.RawIOBase):
    """So many zero bytes."""

    def __init__(self, size: int) -> None:
        self.left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = min(self.left, len(buffer))
        buffer[:count] = bytes(count)
        self.left -= count
        return count


def bomb_zip(path: Path, tiny, size: int, claims: int | None = None) -> Path:
    """The usual files, one image of which unpacks to `size` bytes, and claims to have another size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in tiny.layout().items():
            if name != IMAGE:
                target.writestr(name, data)
        with target.open(IMAGE, "w") as file:
            for _ in range(size // MB):
                file.write(bytes(MB))
    if claims is not None:
        raw = bytearray(path.read_bytes())
        for magic, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
            name_at = raw.index(IMAGE.encode(), raw.index(magic) if magic[2] == 1 else 0)
            start = raw.rindex(magic, 0, name_at)
            struct.pack_into("<I", raw, start + at, claims)
        path.write_bytes(raw)
    return path


def bomb_tar(path: Path, tiny, size: int) -> Path:
    with tarfile.open(path, "w:gz") as target:
        for name, data in tiny.layout().items():
            entry = tarfile.TarInfo(name)
            entry.size = size if name == IMAGE else len(data)
            target.addfile(entry, io.BufferedReader(Zeros(size)) if name == IMAGE else io.BytesIO(data))
    return path


def refuse(source: Path, to: Path, message: str, cache: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny_imagenet.fetch(source, to)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    assert not to.exists()
    assert not list(cache.glob("archives/*"))


def test_one_entry_by_what_it_claims(tmp_path, tiny, cache, monkeypatch):
    """Nothing is unpacked: that would take the memory which the limit is to save."""
    source = bomb_zip(tmp_path / "a.zip", tiny, 16 * MB)
    monkeypatch.setattr(archive, "LARGEST", 8 * MB)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # would fail if it were called
    refuse(
        source, tmp_path / "d", rf"a\.zip: entry '{IMAGE}' claims 0\.0 GB; refused \(at most 0\.0 GB a file\)", cache
    )
    monkeypatch.undo()
    monkeypatch.setattr(archive, "LARGEST", 16 * MB)
    monkeypatch.setattr(archive, "PLENTY", 64 * MB)
    archive.list_zip(source, source)


def test_all_entries_together(tmp_path, tiny, cache, monkeypatch):
    source = bomb_zip(tmp_path / "a.zip", tiny, 32 * MB)
    monkeypatch.setattr(archive, "PLENTY", 31 * MB)
    refuse(source, tmp_path / "d", r"a\.zip: unpacks to more than 0\.0 GB, from 0\.1 MB; refused", cache)
    # An archive that packs as well as ordinary files may hold more.
    monkeypatch.setattr(archive, "TIGHT", 1000)
    archive.list_zip(source, source)


def test_an_image_is_no_text(tmp_path, tiny, cache, monkeypatch):
    """What a text may have is too much for an image."""
    source = bomb_zip(tmp_path / "a.zip", tiny, 3 * MB)
    monkeypatch.setattr(decoding, "LARGEST", 2 * MB)
    with pytest.raises(UserError, match=rf"a\.zip:{IMAGE}: unpacks to 3 MB; refused \(at most 2 MB\)"):
        decoding.decode(str(source), "", [IMAGE], 64, False)


@pytest.mark.parametrize("claims", [100, 2 * MB])
def test_a_size_that_is_a_lie(tmp_path, tiny, cache, claims):
    """It unpacks to 64 MB: no more than it claims is ever held."""
    source = bomb_zip(tmp_path / "a.zip", tiny, 64 * MB, claims)
    held = []
    unpack = zlib.decompressobj

    class Counted:
        def __init__(self, *arguments):
            self.inner = unpack(*arguments)

        def decompress(self, data, most=0):
            result = self.inner.decompress(data, most)
            held.append(len(result))
            return result

        def __getattr__(self, name):
            return getattr(self.inner, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.zlib, "decompressobj", Counted)
        with pytest.raises(UserError, match=rf"{IMAGE}: damaged \(Bad CRC"):
            archive.read(source, IMAGE, f"{source}:{IMAGE}")
    assert 0 < max(held) <= archive.BLOCK
    assert sum(held) <= claims + archive.BLOCK
    refuse(source, tmp_path / "d", rf"{IMAGE}: damaged \(Bad CRC", cache)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_memory_stays_small(tmp_path, tiny, kind):
    """Hundreds of megabytes of pixels behind a small archive are refused without unpacking them."""
    make = bomb_zip if kind == "zip" else bomb_tar
    source = make(tmp_path / f"a.{kind}", tiny, 320 * MB)  # more than PLENTY
    assert source.stat().st_size < 4 * MB
    code = (
        "import re\n"
        "from pathlib import Path\n"
        "from rayexp.data import archive, tiny_imagenet\n"
        "from rayexp.errors import UserError\n"
        "try:\n"
        f"    tiny_imagenet.fetch({str(source)!r}, Path({str(tmp_path / 'd')!r}))\n"
        "except UserError as error:\n"
        "    print(error)\n"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    message, kilobytes = done.stdout.splitlines()
    assert "refused" in message
    assert int(kilobytes) < 250 << 10
    assert not (tmp_path / "d").exists()


def test_a_tar_counts_too(tmp_path, tiny, cache, monkeypatch):
    source = bomb_tar(tmp_path / "a.tar.gz", tiny, 16 * MB)
    monkeypatch.setattr(archive, "LARGEST", 8 * MB)
    monkeypatch.setattr(archive, "list_zip", None)  # it is seen before all is unpacked
    refuse(source, tmp_path / "d", rf"a\.tar\.gz: entry '{IMAGE}' claims", cache)
    monkeypatch.setattr(archive, "LARGEST", 64 * MB)
    monkeypatch.setattr(archive, "PLENTY", 8 * MB)
    refuse(source, tmp_path / "d", r"a\.tar\.gz: unpacks to more than", cache)


def add(path: Path, entry: tarfile.TarInfo, data: bytes = b"") -> Path:
    """A tar with the usual first file and this entry."""
    with tarfile.open(path, "w") as target:
        target.addfile(tarfile.TarInfo("wnids.txt"))
        entry.size = len(data)
        target.addfile(entry, io.BytesIO(data))
    return path


def named(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (named("../evil"), "entry '../evil' leads out of the archive"),
        (named("/etc/evil"), "entry '/etc/evil' leads out of the archive"),
        (named("a/../../evil"), "leads out of the archive"),
        (named("a", tarfile.SYMTYPE, "/etc/passwd"), "entry 'a' is a link, a device or has holes"),
        (named("a", tarfile.LNKTYPE, "wnids.txt"), "entry 'a' is a link"),
        (named("a", tarfile.CHRTYPE), "entry 'a' is a link, a device"),
        (named("a", tarfile.FIFOTYPE), "entry 'a' is a link, a device"),
        (named("wnids.txt"), "entry 'wnids.txt' stands there twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_unsafe_tars(tmp_path, cache, monkeypatch, entry, message):
    if "twice" not in message:
        monkeypatch.setattr(archive, "list_zip", None)  # it is seen before all is unpacked
    refuse(add(tmp_path / "a.tar", entry), tmp_path / "d", message, cache)


def test_a_header_of_a_tar_that_claims_much(tmp_path, cache):
    """A name of 64 MB, which tarfile would read whole."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 64 * MB
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(64):
            file.write(b"a" * MB)
    refuse(path, tmp_path / "d", r"a\.tar\.gz: a header of the tar claims 67 MB; refused", cache)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz", "tar.bz2"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_tars(tmp_path, tiny, cache, kind, share):
    mode = {"tar.xz": "w:xz", "tar.bz2": "w:bz2"}.get(kind, "w:gz")
    path = tiny.write_tar(tmp_path / f"a.{kind}", tiny.layout(), mode=mode)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    refuse(path, tmp_path / "d", r"a\.tar.*: (not a tar archive, or a truncated one|no wnids|.*missing)", cache)


def test_sizes_that_are_whole_blocks(tmp_path, cache):
    """Behind such a file there is nothing to skip."""
    texts = {name: "".join(f"{name}{k:07d}\n" for k in range(512)) for name in ("train", "valid", "test")}
    path = tmp_path / "w.tgz"
    with tarfile.open(path, "w:gz") as target:
        for name, lines in texts.items():
            entry = tarfile.TarInfo(f"w/wiki.{name}.tokens")
            data = (lines + "x " * 4096)[:4096].encode()
            entry.size = len(data)
            target.addfile(entry, io.BytesIO(data))
    wikitext2.fetch(path, tmp_path / "d")
    data = open_data(DataConfig(name="wikitext2", root=tmp_path / "d"))
    assert [data.vocabulary[n] for n in data.valid[:3]] == ["valid0000000", "<eos>", "valid0000001"]
    assert not list(cache.glob("archives/*"))


def test_names_of_a_tar_that_are_no_utf8(tmp_path, tiny, cache):
    files = tiny.layout()
    raw = os.fsdecode(b"train/n01000001/images/caf\xe9_9.JPEG")
    path = tiny.write_tar(tmp_path / "a.tar", {**files, raw: tiny.picture(3)})
    tiny_imagenet.fetch(path, tmp_path / "d")
    data = open_data(DataConfig(name="tiny_imagenet", root=tmp_path / "d"))
    assert "caf\xe9_9.JPEG" in data.train.names


def test_what_no_tar_becomes_in_a_cache_that_cannot_be_written(tmp_path, tiny, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "file"))
    source = tiny.write_tar(tmp_path / "a.tar.gz", tiny.layout())
    with pytest.raises(UserError, match=rf"a\.tar\.gz: cannot be unpacked into {tmp_path / 'file'} "):
        tiny_imagenet.fetch(source, tmp_path / "d")


def test_other_compressions_of_a_zip(tmp_path, tiny):
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", kind) as target:
            target.writestr("x", bytes(3 * MB))
        assert archive.read(tmp_path / "a.zip", "x", "x") == bytes(3 * MB)
