"""A program's own model and dataset, as references that a configuration can name."""

from __future__ import annotations

import inspect
import sysconfig
from pathlib import Path
from typing import Any

from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.library.configs import Overrides, words

HERE = "__main__"  # the script, or the notebook, that is running


def with_parts(overrides: Overrides, **parts: Any) -> list[str]:
    """The overrides, and for each part (`model`, `data`) that is given the one that names it.

    Raises:
        UserError: a part is no class or function, or has no name that an import could find.
    """
    return [
        *words(overrides),
        *(f"{key}.name={reference(key, part)}" for key, part in parts.items() if part is not None),
    ]


def reference(key: str, part: Any) -> str:
    """`/folder/my_nets.py:TinyNet` of a class or function in a file of the user's, `package.module:Name` of one that is
    installed, `__main__:Name` of one that the running script or notebook defines.

    Args:
        key: `model` or `data`, for errors.

    Raises:
        UserError: see `with_parts`.
    """
    if isinstance(part, str):
        return part
    if not (inspect.isclass(part) or inspect.isfunction(part)):
        raise UserError(
            f"{key}: expected a class or a function that makes one, got a {type(part).__name__}; a run makes it anew "
            "wherever it runs, with the options that its configuration holds"
        )
    name, module = part.__qualname__, part.__module__
    if "<" in name:
        raise UserError(f"{key}: {name} has no name that an import could find; define it at the top of a file")
    file = inspect.getsourcefile(part) if module != HERE else None
    installed = tuple(sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib"))
    if module == HERE or file is None or file.startswith(installed):
        return f"{module}:{name}"
    return f"{Path(file).resolve()}:{name}"


def refuse_for_workers(config: ExperimentConfig) -> None:
    """Refuse (UserError) to train with workers what is defined in the running script or notebook."""
    if config.scaling.num_workers == 0:
        return
    for key, name in (("model", config.model.name), ("data", config.data.name), ("workload", config.workload)):
        if name.startswith(f"{HERE}:"):
            own = name.partition(":")[2]
            raise UserError(
                f"{key}: {own} is defined in this script or notebook, where workers cannot import it; put it into a "
                f"file, `from my_file import {own}` (in this process, scaling.num_workers 0, it trains as it is)"
            )
