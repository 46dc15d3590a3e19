"""shapes: the default images, drawn by rayexp as JPEGs in the layout of Tiny-ImageNet, then packed in the same way.

Twenty classes: {bar, circle, ring, star, triangle} x {plain, striped} x {warm, cold}. Independent of the class are
position, size, angle, exact colours, background, smaller stray shapes (below and above), noise and JPEG quality. An
image depends only on (seed, split, class, number). Only random functions that are the same in all versions of Python
(`Random.random`, `randbytes`) and drawing in whole pixels are used, so that every machine draws the same images.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from rayexp.config import DataConfig
from rayexp.data import ImageData, pool
from rayexp.data.fetch import open_source
from rayexp.data.pack import PackPlan, done, pack
from rayexp.data.packed import info, open_packed
from rayexp.data.resize import open_resized
from rayexp.data.tiny_imagenet import SIZE, make_plan
from rayexp.errors import UserError
from rayexp.system.cache import cache_dir
from rayexp.system.disk import TEMPORARY

__all__ = ["draw", "draw_archive", "fetch", "home", "info", "open_data"]

VERSION = 1  # of the images; part of the cached folder's name
FORMS = ("bar", "circle", "ring", "star", "triangle")
CLASSES = {
    f"{tone}_{fill}_{form}": f"{form}, {fill}, {tone}"
    for tone in ("cold", "warm")
    for fill in ("plain", "striped")
    for form in FORMS
}
FINE = 3  # each pixel is the average of FINE x FINE drawn ones
Colour = tuple[int, int, int]


def open_data(config: DataConfig) -> ImageData:
    """The images at `config.image_size` (drawn at 64, else resized): made in `cache_dir` on first use, or those that
    `fetch` put into `config.root`.

    Raises:
        UserError: the cache cannot be written or its disk is full.
    """
    if config.root:
        return open_resized(config.root.expanduser(), config)
    return open_packed(home(config.image_size), config)


def home(size: int = SIZE, train: int = 200, val: int = 50, seed: int = 0) -> Path:
    """The packed folder with `train` and `val` images of each class; made if it is missing. It also contains the JPEGs,
    in shapes.zip."""
    to = cache_dir() / f"shapes-v{VERSION}-{train}x{val}-seed{seed}-{size}px"
    fetch(None, to, size=size, train=train, val=val, seed=seed)
    return to


def fetch(source: str | None, to: Path, *, size: int = SIZE, train: int = 200, val: int = 50, seed: int = 0) -> bool:
    """Draw and pack into `to`; return False if that was done before. `source` is ignored: there is none."""

    archive = to.absolute() / "shapes.zip"
    drawn = []

    def plan() -> PackPlan:
        if not archive.exists():
            temporary = archive.with_name(f"{TEMPORARY}{archive.name}")
            try:
                draw_archive(temporary, train, val, seed)
                drawn.append(temporary.replace(archive))
            finally:
                temporary.unlink(missing_ok=True)
        return make_plan(open_source(archive, "wnids.txt"), "shapes", size)

    try:
        return not done(to) and pack(to, plan)
    except UserError:
        for path in drawn:
            path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        raise


def draw_archive(path: Path, train: int, val: int, seed: int) -> None:
    """Write a ZIP in the layout of Tiny-ImageNet: the same bytes for the same arguments (and the same JPEG library)."""
    top = "tiny-imagenet-200/"
    parts = [(split, name, count) for split, count in (("train", train), ("val", val)) for name in CLASSES]
    calls = ([split, name, count, seed] for split, name, count in parts)
    annotations = []
    with (
        zipfile.ZipFile(path, "w") as archive,
        contextlib.closing(pool.ordered("rayexp.data.shapes:draw_class", calls)) as answers,
    ):
        archive.writestr(zipfile.ZipInfo(top + "wnids.txt"), "".join(f"{name}\n" for name in CLASSES))
        readable = "".join(f"{name}\t{text}\n" for name, text in CLASSES.items())
        archive.writestr(zipfile.ZipInfo(top + "words.txt"), readable)
        for (split, name, _), answer in zip(parts, answers, strict=True):
            for number, jpeg in enumerate(_unjoin(answer)):
                file = f"train/{name}/images/{name}_{number}.JPEG"
                if split == "val":
                    # Neighbouring numbers belong to different classes, as in the official data.
                    position = number * len(CLASSES) + list(CLASSES).index(name)
                    file = f"val/images/val_{position}.JPEG"
                    annotations.append((position, f"val_{position}.JPEG\t{name}\t0\t0\t{SIZE - 1}\t{SIZE - 1}\n"))
                archive.writestr(zipfile.ZipInfo(top + file), jpeg)
        archive.writestr(zipfile.ZipInfo(top + "val/val_annotations.txt"), "".join(a for _, a in sorted(annotations)))


def draw_class(split: str, name: str, count: int, seed: int) -> bytes:
    """Draw `count` JPEGs, and return them as bytes for the pool: each after its length."""
    out = io.BytesIO()
    for number in range(count):
        jpeg = io.BytesIO()
        quality = 60 + int(35 * Random(f"{seed} quality {split} {name} {number}").random())
        draw(split, name, number, seed).save(jpeg, "JPEG", quality=quality)
        out.write(struct.pack("<I", jpeg.tell()))
        out.write(jpeg.getvalue())
    return out.getvalue()


def _unjoin(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


def draw(split: str, name: str, number: int, seed: int = 0) -> Image.Image:
    """Draw one image: RGB, 64x64 pixels, before JPEG compression."""
    tone, fill, form = name.split("_")
    rng = Random(f"{seed} {split} {name} {number}")
    side = SIZE * FINE
    corners = np.frombuffer(rng.randbytes(27), np.uint8).reshape(3, 3, 3) // 2 + 64  # duller than the shapes
    canvas = Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR)
    for _ in range(1 + int(3 * rng.random())):
        _stray(canvas, rng)
    radius = side * (0.2 + 0.16 * rng.random())
    centre = (side * (0.32 + 0.36 * rng.random()), side * (0.32 + 0.36 * rng.random()))
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(outline(form, centre, radius, math.tau * rng.random()), fill=255)
    canvas.paste(_surface(tone, fill, radius, rng), mask=mask)
    for _ in range(int(2 * rng.random())):
        _stray(canvas, rng)
    pixels = np.asarray(canvas.reduce(FINE)).astype(np.int16)
    # The sum of two random bytes has a triangular distribution; its width is random too.
    noise = np.frombuffer(rng.randbytes(2 * SIZE * SIZE * 3), np.uint8).reshape(2, SIZE, SIZE, 3).astype(np.int16)
    strength = 2 + int(10 * rng.random())
    pixels += (noise.sum(0, dtype=np.int16) - 255) * strength // 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def outline(form: str, centre: tuple[float, float], radius: float, angle: float) -> list[tuple[int, int]]:
    """The corners of a form, in whole pixels."""
    circle = [k / 36 for k in range(37)]
    polar = {
        "bar": [(1.2, 0.055), (1.2, 0.445), (1.2, 0.555), (1.2, 0.945)],
        "circle": [(0.95, a) for a in circle],
        "ring": [(1.0, a) for a in circle] + [(0.55, -a) for a in circle],  # round outside, and back round inside
        "star": [(1.2 if k % 2 == 0 else 0.5, k / 10) for k in range(10)],
        "triangle": [(1.2, k / 3) for k in range(3)],
    }[form]
    x, y = centre
    return [
        (round(x + radius * r * math.cos(angle + math.tau * a)), round(y + radius * r * math.sin(angle + math.tau * a)))
        for r, a in polar
    ]


def _surface(tone: str, fill: str, radius: float, rng: Random) -> Image.Image:
    """A canvas filled with the object's colour, with or without stripes."""
    side = SIZE * FINE
    colour = _colour(tone, rng)
    surface = Image.new("RGB", (side, side), colour)
    angle, width = math.tau * rng.random(), radius * (0.22 + 0.2 * rng.random())
    lighter = 0.45 + 0.2 * rng.random()
    if fill == "striped":
        shade = 255 if sum(colour) < 380 else 0
        other = tuple(round(c + (shade - c) * lighter) for c in colour)
        drawing, dx, dy = ImageDraw.Draw(surface), math.cos(angle), math.sin(angle)
        for k in range(-int(side / width), int(side / width) + 1):
            x, y = side / 2 + 2 * k * width * dx, side / 2 + 2 * k * width * dy
            ends = [
                (round(x + s * width * dx / 2 + t * side * dy), round(y + s * width * dy / 2 - t * side * dx))
                for s, t in ((-1, -2), (1, -2), (1, 2), (-1, 2))
            ]
            drawing.polygon(ends, fill=other)
    return surface


def _colour(tone: str, rng: Random) -> Colour:
    """A random colour. Warm: from magenta through red to yellow. Cold: from green through cyan to blue."""
    hue = (-0.08 + 0.24 * rng.random()) % 1 if tone == "warm" else 0.36 + 0.32 * rng.random()
    return _rgb(hue, 0.35 + 0.6 * rng.random(), 0.45 + 0.5 * rng.random())


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    """Convert HSV (each from 0 to 1) to RGB (each from 0 to 255)."""

    def channel(n: int) -> int:
        k = (n + hue * 6) % 6
        return round(255 * (value - value * saturation * max(0.0, min(k, 4 - k, 1.0))))

    return channel(5), channel(3), channel(1)


def _stray(canvas: Image.Image, rng: Random) -> None:
    """Draw a small shape of random form, colour and position."""
    side = SIZE * FINE
    form = FORMS[int(len(FORMS) * rng.random())]
    centre = (side * rng.random(), side * rng.random())
    corners = outline(form, centre, side * (0.03 + 0.06 * rng.random()), math.tau * rng.random())
    ImageDraw.Draw(canvas).polygon(corners, fill=_rgb(rng.random(), rng.random(), 0.2 + 0.8 * rng.random()))
