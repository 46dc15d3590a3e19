"""Decode image files to pixels, in the processes of the pool."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from rayexp.data.fetch import FileSource, read
from rayexp.errors import UserError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not all of Pillow's: some run other programs
LARGEST = 256 << 20  # most bytes of one file in an archive
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


def decode(path: str, prefix: str, names: list[str], size: int, resize: bool, shown: str = "") -> bytes:
    """Decode images. Returns the sha256 of the pixels, then the pixels: uint8[len(names), size, size, 3].

    Args:
        path, prefix, shown: those of the FileSource that contains the files.
        names: the files.
        size: height and width in pixels.
        resize: True: resize and crop images of another size; False: refuse them.

    Raises:
        UserError: a file is damaged, is not an image, has pixels whose range is not known, or has another size.
    """
    warnings.simplefilter("ignore")  # Pillow warns of unusual but readable files
    source = FileSource(Path(path), prefix, {}, shown=Path(shown) if shown else None)
    pixels = np.empty((len(names), size, size, 3), np.uint8)
    for row, name in enumerate(names):
        data = read(source.path, prefix + name, source.where(name), LARGEST)
        try:
            image = rgb(data, size if resize else None)
        except Exception as error:  # Pillow may raise almost any error for a broken file
            raise UserError(f"{source.where(name)}: cannot be decoded ({error})") from error
        if image.size != (size, size):
            raise UserError(f"{source.where(name)}: is {image.width}x{image.height} pixels, expected {size}x{size}")
        pixels[row] = np.asarray(image)
    return answer(pixels)


def answer(pixels: NDArray[np.uint8]) -> bytes:
    """The bytes that the pool sends back: sha256 of the pixels, then the pixels."""
    return hashlib.sha256(pixels.data).digest() + pixels.tobytes()


def rgb(data: bytes, size: int | None) -> Image.Image:
    """Decode an image to RGB as torchvision's loader does (grey, palette and CMYK are converted, alpha is dropped).
    With `size`, also rotate it by its EXIF tag, resize and crop it.

    Raises:
        Exception: any error that Pillow raises for a broken file.
        ValueError: it is no image, or the pixels are 32-bit integers or floats.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # it would name the bytes in memory
        raise ValueError("no image format that is known here") from None
    if size:
        # Decode large JPEGs at a half, a quarter or an eighth of their size, but never below twice the size needed.
        image.draft(None, (2 * size, 2 * size))
    image.load()
    if size:
        with contextlib.suppress(Exception):  # a broken EXIF tag does not make a broken image
            image = ImageOps.exif_transpose(image)
    image = eight_bits(image).convert("RGB")
    return fit(image, size) if size else image


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` (bilinear, antialiased) and crop the centre, as torchvision's Resize and
    CenterCrop do."""
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey images of more than 8 bits to 8 bits; Pillow would clip them, which makes nearly all pixels white.

    16-bit (and 12-bit) images have a known white. 32-bit integers and floats have none: white may be 1.0, 255 or
    65,535. To scale each image by its own range would lose its brightness, so they are refused.
    """
    if image.mode.startswith("I;16"):
        depth = _tiff_bits(image) or 16
        return Image.fromarray((np.asarray(image) >> (depth - 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "signed or 32-bit integers"
        raise ValueError(f"its pixels are {kind}, whose white is not known; allowed: 8 or 16 bits a channel")
    return image


def _tiff_bits(image: Image.Image) -> int | None:
    """BitsPerSample of a grey TIFF; None for other images."""
    tags = getattr(image, "tag_v2", None)
    return int(tags.get(258, (16,))[0]) if tags else None
