"""Small datasets in Tiny-ImageNet's layout, as {name: bytes}, written as a ZIP or a folder."""

from __future__ import annotations

import importlib
import io
import json
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexp.data import pool

WNIDS = ("n03000003", "n01000001", "n02000002")  # not in alphabetical order, as in the official file
TOP = "tiny-imagenet-200/"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RAYEXP_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool without its processes, which take longer to start than a few images to decode. Tests of the pool itself
    ask for `helpers`."""
    monkeypatch.setattr(pool, "cores", lambda: 1)
    if "helpers" in request.fixturenames:
        return

    def ordered(function: str, calls: Iterable[list[Any]], processes: int | None = None) -> Generator[bytes]:
        module, _, name = function.partition(":")
        for arguments in calls:
            with warnings.catch_warnings():
                yield getattr(importlib.import_module(module), name)(*json.loads(json.dumps(arguments)))

    monkeypatch.setattr(pool, "ordered", ordered)


@pytest.fixture
def helpers() -> None:
    """The pool as it is."""


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (64, 64), format: str = "JPEG") -> bytes:
    """A blurry random image in a file's bytes."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.convert(mode).save(out, format)
    return out.getvalue()


def layout() -> dict[str, bytes]:
    """3 classes, 4 train images each (12 in the third class), 9 val images; one is grey, one CMYK."""
    files = {
        "wnids.txt": "".join(f"{w}\n" for w in WNIDS).encode(),
        "words.txt": b"n01000001\tgoldfish, Carassius auratus\nn02000002\tbee\nn09999999\tsomething else\n",
    }
    for k, wnid in enumerate(WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"x\t0\t0\t63\t63\n"
        for i in range(12 if k == 2 else 4):
            mode = {(0, 1): "L", (1, 2): "CMYK"}.get((k, i), "RGB")
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = picture(100 * k + i, mode)
    lines = []
    for i in range(9):
        files[f"val/images/val_{i}.JPEG"] = picture(1000 + i)
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t63\t63\n")
    files["val/val_annotations.txt"] = "".join(lines).encode()
    files["test/images/test_0.JPEG"] = b"never read"
    return files


def write_zip(path: Path, files: dict[str, bytes], top: str = TOP) -> Path:
    """The files below `top` in a compressed archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(top + name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], top: str = TOP, mode: str = "w:gz") -> Path:
    """The same in a tar; `mode` as tarfile.open has it, plain for a name that ends so."""
    with tarfile.open(path, "w:" if path.suffix == ".tar" else mode) as archive:
        folder = tarfile.TarInfo(top or "./")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for name, data in files.items():
            entry = tarfile.TarInfo(top + name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    """The same as a folder."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Makers of small datasets: `layout`, `picture`, `write_zip`, `write_tar`, `write_folder`."""
    return SimpleNamespace(
        layout=layout,
        picture=picture,
        write_zip=write_zip,
        write_tar=write_tar,
        write_folder=write_folder,
        wnids=WNIDS,
        top=TOP,
    )


@pytest.fixture
def listing() -> Callable[[Path], dict[str, bytes]]:
    """Everything below a folder, to compare before and after."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"dir" for p in folder.rglob("*")}

    return read


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real archives."""
    folder = os.environ.get("RAYEXP_TEST_DATA")
    if not folder:
        pytest.skip("RAYEXP_TEST_DATA is not set (a folder with tiny-imagenet-200-first80.zip)")
    return Path(folder)


@pytest.fixture
def counted(monkeypatch) -> list[list[str]]:
    """The files that reach the packing pool, by call."""
    calls: list[list[str]] = []
    original = pool.ordered

    def ordered(function, arguments, *rest):
        return original(function, (calls.append(a[2]) or a for a in arguments), *rest)

    monkeypatch.setattr(pool, "ordered", ordered)
    return calls
