"""Image files of every mode and depth as eight bits a channel; what has no known white is refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rayexp.config import DataConfig
from rayexp.data import decode as decoding
from rayexp.data import folder
from rayexp.errors import UserError


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1"])
def test_other_modes_become_rgb(tiny, mode):
    image = decoding.rgb(tiny.picture(1, mode, format="PNG"), None)
    assert (image.mode, image.size) == ("RGB", (64, 64))


def saved(array: np.ndarray, format: str, **more) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, format, **more)
    return out.getvalue()


GRADIENT = (np.arange(64 * 64) * 16).reshape(64, 64)  # 0 .. 65,520


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled(format, order):
    if format == "PNG" and order == ">u2":
        pytest.skip("a PNG has one order")
    image = decoding.rgb(saved(GRADIENT.astype(order), format), None)
    assert np.array_equal(np.asarray(image), np.repeat((GRADIENT >> 8)[..., None], 3, 2))
    assert (np.asarray(decoding.rgb(saved(GRADIENT.astype(order), format), 32)).std()) > 50


def test_sixteen_bits_of_colour():
    """Written by hand: Pillow reads such a PNG but does not write one."""
    rows = b"".join(b"\0" + bytes([x, 7, 128, 9, 255 - x, 200]) * 4 for x in range(4))
    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    pixels = np.asarray(decoding.rgb(png, None))
    assert pixels[:, 0].tolist() == [[x, 128, 255 - x] for x in range(4)]


def test_twelve_bits_are_scaled():
    """A TIFF of 12 bits a sample, two samples in three bytes."""
    values = (np.arange(16) * 273).reshape(4, 4)
    pairs = values.reshape(-1, 2)
    data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    tags = [(256, 4), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, len(data))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, of) for tag, of in tags)
    tiff = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + struct.pack("<I", 0)
    assert np.array_equal(np.asarray(decoding.rgb(tiff, None))[..., 0], values >> 4)


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_numbers_without_a_white_are_refused(tmp_path, tiny, cache, kind):
    """They came out all white or all black."""
    for scale in (1, 255, 65_535):
        data = saved((GRADIENT / GRADIENT.max() * scale).astype(kind), "TIFF")
        files = {f"{c}/{k}.png": tiny.picture(k, format="PNG") for c in "ab" for k in range(2)}
        root = tiny.write_folder(tmp_path / f"{scale}", {**files, "b/x.tif": data})
        what = "floats" if kind == "float32" else "signed or 32-bit integers"
        with pytest.raises(
            UserError, match=rf"b/x\.tif: cannot be decoded \(its pixels are {what}, .*allowed: 8 or 16"
        ):
            folder.open_data(DataConfig(name="folder", root=root))
        assert list(cache.glob("folders/*")) == []
