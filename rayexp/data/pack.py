"""Images packed once: every file decoded to uint8[size, size, 3], all of a split in one array that workers map.

    DIR/train_images.npy  uint8[n, size, size, 3]    DIR/train_labels.npy  int64[n]    (and val_...)
    DIR/meta.json         format, classes, counts, sha256 by split, names; it is written last: no meta.json, no data
    DIR/.tmp-pack/        while packing: chunks in order with their hashes; the next call checks them and goes on

The source decides the order: the same files give the same arrays and hashes on any machine, with any number of cores.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rayexp.data import pool
from rayexp.data.fetch import Source, read
from rayexp.disk import TEMPORARY, now, sync_directory, write_json
from rayexp.errors import UserError
from rayexp.locks import locked

FORMAT = 1
SPLITS = ("train", "val")
PARTIAL = f"{TEMPORARY}pack"
LOCK = "lock"
CHUNK_BYTES = 4 << 20  # pixels decoded in one call and hashed together
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not all of Pillow's: some start other programs
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")

Item = tuple[str, str, int]
"""A file of the source, the name it is known by (`val_1008.JPEG`), and its label."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be packed, fully checked but for the pixels.

    Attributes:
        classes: (id, words) in label order.
        splits: train and val, each in the order in which it is stored.
        size: height and width in pixels.
        resize: False: images of another size are refused. True: the shorter side is resized to `size`
            (bilinear, antialiased) and the centre cut out, as torchvision's Resize and CenterCrop do.
    """

    dataset: str
    source: Source
    classes: tuple[tuple[str, str], ...]
    splits: Mapping[str, Sequence[Item]]
    size: int
    resize: bool

    def key(self) -> str:
        """sha256 over all that decides the result; an unfinished packing goes on only under the same key."""
        parts = [FORMAT, self.source.key(), self.classes, {k: list(v) for k, v in self.splits.items()}]
        return hashlib.sha256(json.dumps([*parts, self.size, self.resize]).encode()).hexdigest()

    def bytes(self) -> int:
        """Size of the pixels in bytes."""
        return sum(map(len, self.splits.values())) * self.size * self.size * 3


def done(to: Path) -> bool:
    """Whether a folder holds finished data."""
    return (to / "meta.json").is_file()


def pack(to: Path, make_plan: Callable[[], Plan]) -> bool:
    """Pack into a folder; False where that was done before. Several processes may call it at once: one packs, the
    others wait for it. `make_plan` is called under that lock.

    Ctrl-C and lost power leave `.tmp-pack`, with which the next call goes on. After a refusal nothing is left.

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
                    shutil.rmtree(partial, ignore_errors=True)  # one that waits may have begun in it
                    return False
                _pack(make_plan(), to, partial)
            except (UserError, OSError):
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except (UserError, OSError) as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails, as it should, where something else is in it
        if isinstance(error, UserError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "the disk is full; free some space there, or choose another folder"
        raise UserError(f"{to}: {advice if full else f'cannot be written ({error.strerror})'}") from error
    return True


@contextlib.contextmanager
def _alone(to: Path) -> Iterator[Path]:
    """The folder of unfinished work, locked against other processes (the lock goes when its holder dies)."""
    partial = to / PARTIAL
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(partial / LOCK))
            except FileNotFoundError:
                continue  # the one before us has just finished and swept up
            yield partial
            return


def _pack(plan: Plan, to: Path, partial: Path) -> None:
    """Write all arrays into `partial`, then move them to their places."""
    ours = [f"{split}_{part}.npy" for split in SPLITS for part in ("images", "labels")]
    state = partial / "key"
    if state.exists() and state.read_text() == plan.key():
        pass
    elif standing := next((name for name in ours if (to / name).exists()), None):
        raise UserError(
            f"{to / standing}: stands in the way (and is not finished data); remove it or choose another folder"
        )
    else:
        for leftover in partial.iterdir():
            if not leftover.name.startswith(LOCK):
                leftover.unlink()
        state.write_text(plan.key())
    have = sum(file.stat().st_size for file in (*partial.glob("*_images.npy"), *to.glob("*_images.npy")))
    missing = plan.bytes() - have + (2 << 20)
    if shutil.disk_usage(to).free < missing:
        free = shutil.disk_usage(to).free / 1e6
        raise UserError(
            f"{to}: the disk is too full; packing needs {missing / 1e6:,.0f} MB more, {free:,.0f} MB are free"
        )

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
    for name in ours:
        if (partial / name).exists():
            (partial / name).replace(to / name)
    sync_directory(to)
    meta = {
        "format": FORMAT,
        "kind": "images",
        "dataset": plan.dataset,
        "image_size": plan.size,
        "source": plan.source.origin,
        "source_key": plan.source.key(),
        "packed": now(),
        "counts": {split: part["count"] for split, part in splits.items()},
        "sha": {split: part["sha"] for split, part in splits.items()},
        "classes": plan.classes,
        "chunk": chunk_rows(plan.size),
        "chunks": {split: part["chunks"] for split, part in splits.items()},
        "names": {split: part["names"] for split, part in splits.items()},
    }
    write_json(to / "meta.json", meta)
    shutil.rmtree(partial, ignore_errors=True)


def chunk_rows(size: int) -> int:
    """Images of one chunk."""
    return max(1, CHUNK_BYTES // (size * size * 3))


def split_sha(names: Sequence[str], labels: Sequence[int], chunks: Sequence[str]) -> str:
    """A split's sha256: over the JSON text of [format, names, labels, the sha256 of each chunk's pixels].

    Hashing by chunk lets all cores share the work; every pixel counts all the same.
    """
    return hashlib.sha256(json.dumps([FORMAT, list(names), list(labels), list(chunks)]).encode()).hexdigest()


def _images(plan: Plan, items: Sequence[Item], path: Path, journal: Path, advance: Callable[[int], None]) -> list[str]:
    """Append what is missing of one split's images; the hashes of all chunks."""
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
        calls = (
            [str(plan.source.path), plan.source.prefix, [i[0] for i in part], plan.size, plan.resize] for part in todo
        )
        with contextlib.closing(
            pool.ordered("rayexp.data.pack:decode", calls, min(pool.cores(), len(todo)))
        ) as answers:
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
    """The leading chunks of an unfinished file that are as they should be; the file is cut after them."""
    good: list[str] = []
    if file.read(len(header)) == header:
        for sha in shas[: most - 1]:  # the last one is decoded again rather than special
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
    """The head of an .npy file."""
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
    """A bar on stderr (nothing where that is no terminal)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("packing", total=total)
        yield lambda images: bar.advance(task, images)


# ---------------------------------------------------------------------- in the pool's processes


def decode(path: str, prefix: str, names: list[str], size: int, resize: bool) -> bytes:
    """sha256 of the pixels, then the pixels: uint8[len(names), size, size, 3].

    Raises:
        UserError: a file is damaged, no image, or (without `resize`) of another size.
    """
    warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
    source = Source(Path(path), prefix, {})
    pixels = np.empty((len(names), size, size, 3), np.uint8)
    for row, name in enumerate(names):
        data = read(source.path, prefix + name)
        try:
            image = _rgb(data, size if resize else None)
        except Exception as error:  # Pillow raises nearly anything on broken files
            why = "no image format that is known here" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"{source.where(name)}: cannot be decoded ({why})") from error
        if image.size != (size, size):
            raise UserError(f"{source.where(name)}: is {image.width}x{image.height} pixels, expected {size}x{size}")
        pixels[row] = np.asarray(image)
    return hashlib.sha256(pixels.data).digest() + pixels.tobytes()


def _rgb(data: bytes, size: int | None) -> Image.Image:
    """Decode to RGB as torchvision's loader does (grey, palette and CMYK converted, alpha dropped); with `size`,
    turned upright by its EXIF tag, resized and cropped."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if size:
        # JPEGs far larger than needed are decoded at a half, a quarter or an eighth, never below twice the size.
        image.draft(None, (2 * size, 2 * size))
    image.load()
    if size:
        with contextlib.suppress(Exception):  # a broken EXIF tag does not make a broken image
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    if size:
        short = min(image.size)
        width, height = (size if side == short else int(size * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (round((side - size) / 2) for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    return image
