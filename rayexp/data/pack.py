"""Pack images once: decode every file to uint8[size, size, 3], into one array per split that workers map.

    DIR/train_images.npy  uint8[n, size, size, 3]    DIR/train_labels.npy  int64[n]    (and val_...)
    DIR/meta.json         format, classes, counts, sha256 of each split, names; moved last: without it there is no data
    DIR/.tmp-pack/        unfinished work: chunks in order with their hashes, which the next call checks and continues.
                          All files, meta.json too, are complete in there before the first one is moved to DIR

The order depends only on the source: the same files give the same arrays and hashes on any machine, with any number of
cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rayexp.data import pool
from rayexp.data.fetch import FileSource
from rayexp.errors import FULL, UserError
from rayexp.system.disk import TEMPORARY, now, sync_directory, write_json
from rayexp.system.locks import locked

FORMAT = 1
SPLITS = ("train", "val")
ARRAYS = tuple(f"{split}_{part}.npy" for split in SPLITS for part in ("images", "labels"))
PARTIAL = f"{TEMPORARY}pack"
MOVING = "moving"  # a file in PARTIAL that exists while files are moved out of it
LOCK = "lock"
CHUNK_BYTES = 4 << 20  # bytes of pixels that are decoded in one call and hashed together

Item = tuple[str, str, int]
"""A file of the source, its name in the packed data (`val_1008.JPEG`), and its label."""


@dataclass(frozen=True, slots=True)
class PackPlan:
    """What is to be packed; everything is checked but the pixels.

    Attributes:
        dataset: name of the dataset.
        source: the files.
        classes: (id, readable name) of each class, in label order.
        splits: `train` and `val` -> their items in the order in which they are stored.
        size: height and width in pixels.
        resize: False: images of another size are refused. True: the shorter side is resized to `size` (bilinear,
            antialiased) and the centre cropped, as torchvision's Resize and CenterCrop do.
        layout: which folders were used for which split, in a line.
        decoder: `module:name` of the function that the pool runs, see decode.decode.
    """

    dataset: str
    source: FileSource
    classes: tuple[tuple[str, str], ...]
    splits: Mapping[str, Sequence[Item]]
    size: int
    resize: bool
    layout: str = ""
    decoder: str = "rayexp.data.decode:decode"

    def key(self) -> str:
        """sha256 over everything that the result depends on; unfinished work is continued only under the same key."""
        parts = [FORMAT, self.source.key(), self.classes, {k: list(v) for k, v in self.splits.items()}]
        return hashlib.sha256(json.dumps([*parts, self.size, self.resize]).encode()).hexdigest()

    def bytes(self) -> int:
        """The approximate size of the packed data in bytes: pixels, labels and names."""
        items = [item for split in self.splits.values() for item in split]
        return sum(self.size * self.size * 3 + 8 + len(json.dumps(name)) + 8 for _, name, _ in items)

    def call(self, part: Sequence[Item]) -> list[Any]:
        """The decoder's arguments for these images."""
        source = self.source
        files = [file for file, _, _ in part]
        return [str(source.path), source.prefix, files, self.size, self.resize, str(source.shown or "")]


def done(to: Path) -> bool:
    """Whether a folder contains finished data."""
    return (to / "meta.json").is_file()


def pack(to: Path, make_plan: Callable[[], PackPlan]) -> bool:
    """Pack into a folder; return False if that was done before.

    Several processes may call this at once: one packs, the others wait for it. `make_plan` is called under the lock.
    Ctrl-C or a power failure leaves `.tmp-pack`, which the next call continues; an error leaves nothing.

    Raises:
        UserError: a file cannot be decoded or has the wrong size, the folder cannot be written, the disk is full.
    """
    if done(to):
        return False
    to = to.absolute()
    made = [folder for folder in (to, *to.parents) if not folder.exists()]
    try:
        with _alone(to) as partial:
            try:
                if done(to):
                    shutil.rmtree(partial, ignore_errors=True)  # a waiting process may have put its lock there
                    return False
                _pack(make_plan(), to, partial)
            except (UserError, OSError):
                _take_back(to, partial)
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except (UserError, OSError) as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails, as it should, if it contains anything else
        if isinstance(error, UserError):
            raise
        full = error.errno in FULL
        advice = "the disk is full; free some space there, or choose another folder"
        raise UserError(f"{to}: {advice if full else f'cannot be written ({error.strerror})'}") from error
    return True


@contextlib.contextmanager
def _alone(to: Path) -> Iterator[Path]:
    """The folder for unfinished work, locked against other processes (the lock is released if its holder dies)."""
    partial = to / PARTIAL
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(partial / LOCK))
            except FileNotFoundError:
                continue  # another process has just finished and removed it
            yield partial
            return


def _pack(plan: PackPlan, to: Path, partial: Path) -> None:
    """Write all files into `partial`, then move them to `to`."""
    _begin(plan, to, partial)
    splits: dict[str, dict[str, Any]] = {}
    with _progress(sum(map(len, plan.splits.values()))) as advance:
        for split in SPLITS:
            items = plan.splits[split]
            labels = np.array([label for _, _, label in items], np.int64)
            _write_array(partial / f"{split}_labels.npy", labels)
            chunks = _images(plan, items, partial / f"{split}_images.npy", partial / f"{split}_chunks", advance)
            names = [name for _, name, _ in items]
            sha = split_sha(names, labels.tolist(), chunks)
            splits[split] = {"count": len(items), "sha": sha, "names": names, "chunks": chunks}
    meta = {
        "format": FORMAT,
        "kind": "images",
        "dataset": plan.dataset,
        "image_size": plan.size,
        "source": plan.source.origin,
        "source_key": plan.source.key(),
        "layout": plan.layout,
        "packed": now(),
        "counts": {split: part["count"] for split, part in splits.items()},
        "sha": {split: part["sha"] for split, part in splits.items()},
        "classes": plan.classes,
        "chunk": chunk_rows(plan.size),
        "chunks": {split: part["chunks"] for split, part in splits.items()},
        "names": {split: part["names"] for split, part in splits.items()},
    }
    write_json(partial / "meta.json", {**meta, "meta_sha": meta_sha(meta)})
    (partial / MOVING).touch()
    for name in (*ARRAYS, "meta.json"):
        (partial / name).replace(to / name)
        if name == ARRAYS[-1]:
            sync_directory(to)
    sync_directory(to)
    shutil.rmtree(partial, ignore_errors=True)  # a waiting process may have put its lock there


def _begin(plan: PackPlan, to: Path, partial: Path) -> None:
    """Make sure that `partial` contains only unfinished work for this plan, and that there is room for the rest.

    Raises:
        UserError: `to` contains files with the arrays' names that are not from packing, or the disk is too full.
    """
    _take_back(to, partial)
    state = partial / "key"
    if not (state.exists() and state.read_text() == plan.key()):
        if standing := next((name for name in ARRAYS if (to / name).exists()), None):
            raise UserError(
                f"{to / standing}: stands in the way (and is not finished data); remove it or choose another folder"
            )
        for leftover in partial.iterdir():
            if not leftover.name.startswith(LOCK):
                leftover.unlink()
        state.write_text(plan.key())
    have = sum(file.stat().st_size for file in partial.glob("*_images.npy"))
    missing = plan.bytes() - have + (2 << 20)
    if shutil.disk_usage(to).free < missing:
        free = shutil.disk_usage(to).free / 1e6
        raise UserError(
            f"{to}: the disk is too full; packing needs {missing / 1e6:,.0f} MB more, {free:,.0f} MB are free"
        )


def _take_back(to: Path, partial: Path) -> None:
    """Move the files of an unfinished packing back into `partial`, so that it can be continued."""
    if (partial / MOVING).exists() and not done(to):
        for name in ARRAYS:
            with contextlib.suppress(FileNotFoundError):
                (to / name).replace(partial / name)
        (partial / MOVING).unlink()


def meta_sha(meta: Mapping[str, Any]) -> str:
    """sha256 over the JSON text of everything else in meta.json."""
    return hashlib.sha256(json.dumps({k: v for k, v in meta.items() if k != "meta_sha"}).encode()).hexdigest()


def chunk_rows(size: int) -> int:
    """The number of images in a chunk."""
    return max(1, CHUNK_BYTES // (size * size * 3))


def split_sha(names: Sequence[str], labels: Sequence[int], chunks: Sequence[str]) -> str:
    """The sha256 of a split: over the JSON text of [format, names, labels, the sha256 of each chunk's pixels].

    Hashing by chunk lets all cores share the work, and still covers every pixel.
    """
    return hashlib.sha256(json.dumps([FORMAT, list(names), list(labels), list(chunks)]).encode()).hexdigest()


def _images(
    plan: PackPlan, items: Sequence[Item], path: Path, journal: Path, advance: Callable[[int], None]
) -> list[str]:
    """Append the missing images of a split, and return the sha256 of all its chunks."""
    rows = chunk_rows(plan.size)
    starts = range(0, len(items), rows)
    header = _header((len(items), plan.size, plan.size, 3), np.dtype(np.uint8))
    with path.open("r+b" if path.exists() else "w+b") as file, journal.open("a+") as shas:
        shas.seek(0)
        chunks = _whole(file, header, shas.read().split(), rows * plan.size * plan.size * 3, len(starts))
        shas.truncate(0)
        shas.write("".join(f"{sha}\n" for sha in chunks))
        advance(min(len(chunks) * rows, len(items)))
        todo = [items[start : start + rows] for start in starts[len(chunks) :]]
        calls = (plan.call(part) for part in todo)
        with contextlib.closing(pool.ordered(plan.decoder, calls, min(pool.cores(), len(todo)))) as answers:
            for part, answer in zip(todo, answers, strict=True):
                file.write(answer[32:])
                file.flush()
                chunks.append(answer[:32].hex())
                shas.write(f"{chunks[-1]}\n")
                shas.flush()
                advance(len(part))
        os.fsync(file.fileno())
    return chunks


def _whole(file: BinaryIO, header: bytes, shas: list[str], size: int, most: int) -> list[str]:
    """The hashes of the intact chunks at the beginning of an unfinished file; the file is truncated after them."""
    good: list[str] = []
    if file.read(len(header)) == header:
        for sha in shas[: most - 1]:  # the last chunk may be shorter; it is always decoded again
            pixels = file.read(size)
            if len(pixels) < size or hashlib.sha256(pixels).hexdigest() != sha:
                break
            good.append(sha)
    file.seek(0)
    file.write(header)
    file.seek(len(header) + len(good) * size)
    file.truncate()
    return good


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The header of an .npy file."""
    head = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, description)
    return head.getvalue()


def _write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr (nothing if that is not a terminal)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    counts = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    columns = (*counts, TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("packing", total=total)
        yield lambda images: bar.advance(task, images)
