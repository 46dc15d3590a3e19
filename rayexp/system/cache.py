"""Where rayexp keeps what can be made again: downloads, packed data, copies of code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache's folder: RAYEXP_CACHE, $XDG_CACHE_HOME/rayexp or ~/.cache/rayexp."""
    if own := os.environ.get("RAYEXP_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "rayexp"
