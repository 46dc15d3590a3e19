"""Configurations as a program gives them: a file, a shipped name, a dict, or a configuration that is one already."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from rayexp.config import (
    CompareConfig,
    ExperimentConfig,
    blame_words,
    code,
    find_config,
    load,
    parse,
    refuse_contradictions,
    yaml_tree,
)
from rayexp.errors import UserError

Config = str | PathLike[str] | Mapping[str, Any] | ExperimentConfig
Overrides = Sequence[str] | Mapping[str, Any]
KindT = TypeVar("KindT", ExperimentConfig, CompareConfig)


def load_config(config: Config, overrides: Overrides = ()) -> ExperimentConfig:
    """The experiment that `config` and `overrides` describe, checked.

    Args:
        config: a YAML file, a name that `rayexp configs` lists, a dict with the keys of docs/configuration.md, or an
            ExperimentConfig.
        overrides: keys to set, dotted where they are nested: `{"epochs": 3, "data.root": "images"}`, or as on the
            command line `["epochs=3", "data.root=images"]`.

    Raises:
        UserError: no such file, an unknown key, or a value that is not allowed; the line names it.

    Example:
        >>> import rayexp
        >>> rayexp.load_config("quickstart", {"epochs": 3}).epochs
        3
        >>> rayexp.load_config({"data": {"image_size": 32}}, ["lr=0.5"]).lr
        0.5
    """
    return read(config, overrides, ExperimentConfig)


def read(config: Config | CompareConfig, overrides: Overrides, kind: type[KindT]) -> KindT:
    """As `load_config`, for a configuration of that kind."""
    changes = words(overrides)
    if isinstance(config, str | PathLike):
        return load(Path(config), changes, kind)
    tree = config.model_dump(mode="json") if isinstance(config, kind) else config
    if not isinstance(tree, Mapping):
        raise UserError(f"config: expected a path, a name, a dict or {kind.__name__}, got {type(config).__name__}")
    has_code = kind is ExperimentConfig

    def made(changes: Sequence[str]) -> KindT:
        changed = copy.deepcopy(dict(tree))
        for change in changes:
            yaml_tree.set_override(changed, change, kind)
        if has_code:
            # References to files count from the working directory; those of a configuration that is one are known.
            keys = [change.partition("=")[0] for change in changes] if isinstance(config, kind) else None
            code.anchor(changed, Path.cwd(), keys)
            code.resolve(changed, Path.cwd(), "config")
        parsed = parse(changed, kind, "config")
        if isinstance(parsed, ExperimentConfig):
            refuse_contradictions(parsed, "config")
        return parsed

    return blame_words("config", changes, made)


def folder_of(config: Any) -> Path:
    """The folder from which paths in a configuration are understood: that of its file, else the working directory."""
    return find_config(Path(config)).parent if isinstance(config, str | PathLike) else Path.cwd()


def words(overrides: Overrides) -> list[str]:
    """Overrides as `KEY=VALUE`; JSON is YAML, too."""
    if isinstance(overrides, str):
        raise UserError(f"overrides: expected a list of KEY=VALUE or a dict, got the text {overrides!r}")
    if not isinstance(overrides, Mapping):
        if not isinstance(overrides, Sequence) or not all(isinstance(word, str) for word in overrides):
            raise UserError(f"overrides: expected a list of KEY=VALUE or a dict, got {overrides!r}")
        return list(overrides)
    return [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in overrides.items()]
