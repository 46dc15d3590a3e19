"""Describe a dataset or a folder as plain values, for `rayexp data info`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayexp.config import DataConfig, ExperimentConfig, code, parse, yaml_tree
from rayexp.config.components import is_reference
from rayexp.data import DATASETS, TextData, folder, own, packed, python_docs, recipe, shapes, text
from rayexp.data.fetch import check_readable
from rayexp.data.pack import PARTIAL, done
from rayexp.errors import UserError, nearest


def describe(target: str, check: bool = False, options: Sequence[str] = ()) -> dict[str, Any]:
    """Counts, classes or vocabulary size, and hashes of a dataset by name or of a folder, packed or not; or of a
    dataset of the user's own, by reference.

    `kind` is `images` or `text`. With `check`, all packed data are read and compared with their hashes. `options` are
    what a dataset of the user's own is called with, as `data.KEY=VALUE`.

    Raises:
        UserError: there is no such dataset or folder, it is damaged, or it takes no such options.
    """
    if is_reference(target):
        return _own(target, options)
    if options:
        raise UserError(f"{options[0]!r}: data.KEY=VALUE is for a dataset of your own, ./FILE.py:NAME; got {target}")
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
    if root.exists() and not root.is_dir():
        raise UserError(f"{target} is no folder")
    if not root.is_dir():
        known = ", ".join(name for name in DATASETS if name not in ("folder", "text"))  # which are read where they lie
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


def _own(name: str, options: Sequence[str]) -> dict[str, Any]:
    """A dataset of the user's own, by a reference relative to the working directory; no image is packed."""
    tree: dict[str, Any] = {"data": {"name": name}}
    for option in options:
        if not option.startswith("data."):
            raise UserError(f"{option!r}: expected data.KEY=VALUE, for example data.root=DIR")
        yaml_tree.set_override(tree, option, ExperimentConfig)
    code.anchor(tree, Path.cwd())
    code.resolve(tree, Path.cwd(), "data info")
    config = parse(tree, ExperimentConfig, "data info")
    made = recipe.Recipe.of(config.data, config.code)
    if own.gives_text(made):
        return _text(own.open_text(config.data, config.code))
    plan = own.make_plan(made)
    labels = {split: [label for _, _, label in items] for split, items in plan.splits.items()}
    return {
        "kind": "images",
        "name": name,
        "packed": "no: on first use, into the cache",
        **{split: len(of) for split, of in labels.items()},
        "classes": packed.class_table(plan.classes, labels),
    }


def _text(data: TextData) -> dict[str, Any]:
    tokens = {name: len(getattr(data, name)) for name in text.SPLITS}
    return {"kind": "text", "tokens": tokens, "vocabulary": len(data.vocabulary), "sha": data.sha}
