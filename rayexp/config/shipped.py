"""The configurations that come with rayexp, and which file a user means by CONFIG."""

from __future__ import annotations

import re
from pathlib import Path

from rayexp.config import yaml_tree
from rayexp.config.compare import CompareConfig
from rayexp.errors import UserError, nearest

SUFFIX = ".yaml"


def shipped_configs() -> dict[str, Path]:
    """The shipped configurations by name (`quickstart`), in alphabetical order."""
    package = Path(__file__).resolve().parents[1]
    # In an installed package, or beside the package in a checkout.
    folder = next((p for p in (package / "configs", package.parent / "configs") if p.is_dir()), package / "configs")
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def shipped(name: str) -> Path:
    """The path of a shipped configuration, by name or file name (KeyError where there is none)."""
    return shipped_configs()[name.removesuffix(SUFFIX)]


def find_config(text: str | Path, beside: Path | None = None) -> Path:
    """The file that a user means: a path, with or without `.yaml`, or the name of a shipped configuration. A file that
    is there wins over a shipped one of that name.

    Args:
        text: as the user typed it.
        beside: a folder in which a relative path is looked up first.

    Raises:
        UserError: there is no such file; the line names the nearest shipped configuration. Or it is the directory of a
            run or of a comparison.
    """
    path = Path(text).expanduser()
    places = ([beside / path] if beside else []) + [path]
    try:
        for place in places:
            for file in (place, place.with_name(f"{place.name}{SUFFIX}") if place.name else place):
                if file.exists() and not file.is_dir():
                    return file
        known = shipped_configs()
        name = str(text).removeprefix("configs/").removesuffix(SUFFIX)  # README's paths, from any folder
        if name in known:
            return known[name]
        for kind, inner in (("run", "config.yaml"), ("comparison", "compare.yaml")):
            if (path / inner).is_file():
                raise UserError(f"{text}: the directory of a {kind}; its configuration is {path / inner}")
        if path.is_dir():
            raise UserError(f"{path}: a folder; expected a YAML file or one of `rayexp configs`")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    raise UserError(
        f"{places[0]}: no such file, and no configuration of that name comes with rayexp"
        f"{nearest(Path(name).name, known)}; `rayexp configs` lists them"
    )


def headline(path: Path) -> str:
    """The first sentence of the comment at a file's head; empty where there is none."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#  "):  # what follows further in is an example
            break
        lines.append(line.lstrip("#").strip())
    return re.split(r"(?<=[.!?])(?<! al\.)\s", " ".join(lines), maxsplit=1)[0]  # `et al.` ends no sentence


def is_grid(path: Path) -> bool:
    """Whether a file describes a grid, for `compare`, and no experiment (UserError where it cannot be read)."""
    return "base" in yaml_tree.read(path, CompareConfig)
