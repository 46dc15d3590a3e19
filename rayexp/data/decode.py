"""Image files to pixels, in the processes of the pool."""

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

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not all of Pillow's: some start other programs
LARGEST = 256 << 20  # bytes of one file in an archive
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


def decode(path: str, prefix: str, names: list[str], size: int, resize: bool, shown: str = "") -> bytes:
    """sha256 of the pixels, then the pixels: uint8[len(names), size, size, 3].

    Args:
        path, prefix, shown: of the Source that holds the files.
        names: the files.
        size: height and width in pixels.
        resize: False: images of another size are refused.

    Raises:
        UserError: a file is damaged, no image, of a kind whose brightness is not known, or of another size.
    """
    warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
    source = FileSource(Path(path), prefix, {}, shown=Path(shown) if shown else None)
    pixels = np.empty((len(names), size, size, 3), np.uint8)
    for row, name in enumerate(names):
        data = read(source.path, prefix + name, source.where(name), LARGEST)
        try:
            image = rgb(data, size if resize else None)
        except Exception as error:  # Pillow raises nearly anything on broken files
            why = "no image format that is known here" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"{source.where(name)}: cannot be decoded ({why})") from error
        if image.size != (size, size):
            raise UserError(f"{source.where(name)}: is {image.width}x{image.height} pixels, expected {size}x{size}")
        pixels[row] = np.asarray(image)
    return answer(pixels)


def answer(pixels: NDArray[np.uint8]) -> bytes:
    """What the pool sends back: sha256 of the pixels, then the pixels."""
    return hashlib.sha256(pixels.data).digest() + pixels.tobytes()


def rgb(data: bytes, size: int | None) -> Image.Image:
    """Decode to RGB as torchvision's loader does (grey, palette and CMYK converted, alpha dropped); with `size`,
    turned upright by its EXIF tag, resized and cropped.

    Raises:
        Anything that Pillow raises on a broken file.
        ValueError: pixels of 32 bits or floats.
    """
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if size:
        # JPEGs far larger than needed are decoded at a half, a quarter or an eighth, never below twice the size.
        image.draft(None, (2 * size, 2 * size))
    image.load()
    if size:
        with contextlib.suppress(Exception):  # a broken EXIF tag does not make a broken image
            image = ImageOps.exif_transpose(image)
    image = _eight_bits(image).convert("RGB")
    return fit(image, size) if size else image


def fit(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to `size` (bilinear, antialiased) and the centre cut out, as torchvision's Resize and
    CenterCrop do."""
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deeper grey images scaled to 8 bits, which Pillow would clip: nearly all of it comes out white.

    16 bits (and 12) have a white of their own. Numbers of 32 bits and floats have none: 1.0, 255 or 65,535 may be
    meant, and scaling each image by its own range would lose their brightness, so they are refused.
    """
    if image.mode.startswith("I;16"):
        depth = _tiff_bits(image) or 16
        return Image.fromarray((np.asarray(image) >> (depth - 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "signed or 32-bit integers"
        raise ValueError(f"its pixels are {kind}, whose white is not known; allowed: 8 or 16 bits a channel")
    return image


def _tiff_bits(image: Image.Image) -> int | None:
    """BitsPerSample of a grey TIFF."""
    tags = getattr(image, "tag_v2", None)
    return int(tags.get(258, (16,))[0]) if tags else None
