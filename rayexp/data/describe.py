"""Describe a dataset or a folder as plain values, for `rayexp data info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayexp.config import DataConfig
from rayexp.data import DATASETS, TextData, folder, packed, python_docs, shapes, text
from rayexp.data.fetch import check_readable
from rayexp.data.pack import PARTIAL, done
from rayexp.errors import UserError, nearest


def describe(target: str, check: bool = False) -> dict[str, Any]:
    """Counts, classes or vocabulary size, and hashes of a dataset by name or of a folder, packed or not.

    `kind` is `images` or `text`. With `check`, all packed data are read and compared with their hashes.

    Raises:
        UserError: there is no such dataset or folder, or it is damaged.
    """
    root = Path(target).expanduser()
    check_readable(root)
    if target == "python_docs":
        return _text(python_docs.open_data(DataConfig(name="python_docs")))
    if target == "shapes":
        root = shapes.home()
    elif target in DATASETS and not root.exists():
        root = Path("data") / target
        if not root.exists():
            raise UserError(f"{target}: not in {root}; name its folder, or `rayexp data fetch {target}` puts it there")
    if not root.is_dir():
        known = ", ".join(DATASETS)
        raise UserError(f"{target}: no such folder or dataset{nearest(target, DATASETS)}; allowed: a folder, {known}")
    if not done(root) and not (root / PARTIAL).exists():
        if (root / "train.txt").exists():
            return text.info(root)
        if (root / "wnids.txt").exists():
            raise UserError(f"{target}: not packed; run `rayexp data fetch tiny_imagenet --from {target} --to DIR`")
        return folder.info(root)
    if (root / "vocabulary.txt").exists():
        return text.info(root)  # this compares the hashes
    summary = packed.info(root)
    if check:
        packed.check(root)
    return summary


def _text(data: TextData) -> dict[str, Any]:
    tokens = {name: len(getattr(data, name)) for name in text.SPLITS}
    return {"kind": "text", "tokens": tokens, "vocabulary": len(data.vocabulary), "sha": data.sha}
