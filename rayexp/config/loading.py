"""Read a configuration from a YAML file and `KEY=VALUE` overrides with dotted keys (see yaml_tree), and check it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rayexp.config import code, yaml_tree
from rayexp.config.compare import CompareConfig
from rayexp.config.components import IMAGE_DATA, OPTIMIZERS, SCHEDULES, TEXT_DATA, WORKLOADS
from rayexp.config.experiment import IMAGES_ONLY, TEXT_ONLY, DataConfig, ExperimentConfig
from rayexp.config.fields import explain
from rayexp.config.shipped import find_config
from rayexp.errors import UserError

ConfigT = TypeVar("ConfigT", ExperimentConfig, CompareConfig)
MadeT = TypeVar("MadeT")


def load(path: Path | str, overrides: Sequence[str] = (), kind: type[ConfigT] = ExperimentConfig) -> ConfigT:  # type: ignore[assignment]
    """Read a configuration that a user wrote: find the file (`find_config`), `read` it, and refuse settings that
    contradict each other (UserError)."""
    path = find_config(path)

    def made(words: Sequence[str]) -> ConfigT:
        config = _read(path, words, kind)
        if isinstance(config, ExperimentConfig):
            refuse_contradictions(config, str(path))
        return config

    return blame_words(str(path), overrides, made)


def read(path: Path | str, overrides: Sequence[str] = (), kind: type[ConfigT] = ExperimentConfig) -> ConfigT:  # type: ignore[assignment]
    """Read a YAML file, apply `KEY=VALUE` overrides, and check the result.

    References to files and the entries of `code` are relative to the file, in overrides to the working directory.

    Raises:
        UserError: no such file, no YAML mapping, another kind of configuration, an unknown key, a value that is not
            allowed; the line names it.
    """
    return blame_words(str(path), overrides, lambda words: _read(path, words, kind))


def blame_words(source: str, overrides: Sequence[str], make: Callable[[Sequence[str]], MadeT]) -> MadeT:
    """What `make` makes of the overrides. Where it raises a UserError that begins with the source, and which would be
    another or none without some of the overrides, the line names these in the source's place."""
    try:
        return make(overrides)
    except UserError as error:
        line = str(error)
        if not line.startswith(f"{source}: "):
            raise
        words = [word for word in overrides if _said(make, [other for other in overrides if other != word]) != line]
        if not words:
            raise
        fault = line.removeprefix(f"{source}: ")
        if len(words) == 1:
            fault = fault.removeprefix(f"{words[0].partition('=')[0]}: ")
        raise UserError(f"{shlex.join(words)}: {fault}") from None


def _said(make: Callable[[Sequence[str]], object], overrides: Sequence[str]) -> str:
    """The line of the UserError that `make` raises; empty where it raises none."""
    try:
        make(overrides)
    except UserError as error:
        return str(error)
    return ""


def _read(path: Path | str, overrides: Sequence[str], kind: type[ConfigT]) -> ConfigT:
    tree = yaml_tree.read(Path(path), kind)
    _refuse_other_kind(tree, kind, str(path))
    if kind is ExperimentConfig:
        code.anchor(tree, Path(path).parent)
    elif isinstance(tree.get("overrides"), dict):
        code.anchor(tree["overrides"], Path(path).parent)
    for override in overrides:
        yaml_tree.set_override(tree, override, kind)
    if kind is ExperimentConfig:
        code.anchor(tree, Path.cwd(), [override.partition("=")[0] for override in overrides])
        code.resolve(tree, Path(path).parent, str(path))
    elif isinstance(tree.get("overrides"), dict):
        said = [override.partition("=")[0] for override in overrides]
        code.anchor(tree["overrides"], Path.cwd(), None if "overrides" in said else [_inner(key) for key in said])
    return parse(tree, kind, str(path))


def _inner(key: str) -> str:
    """A key of a grid's as one of its base; empty where it is another."""
    return key.removeprefix("overrides.") if key.startswith("overrides.") else ""


def _refuse_other_kind(tree: Mapping[str, Any], kind: type[BaseModel], source: str) -> None:
    """Name a grid where an experiment is expected, and the reverse; else the first key that does not fit would be."""
    other = ExperimentConfig if kind is CompareConfig else CompareConfig
    if tree.keys() <= kind.model_fields.keys() or not tree.keys() <= other.model_fields.keys():
        return
    if other is CompareConfig and "base" in tree:
        raise UserError(
            f"{source}: a grid, for `rayexp compare`; expected an experiment, such as its base {tree['base']}"
        )
    if other is ExperimentConfig:
        raise UserError(f"{source}: an experiment, for `rayexp train`; expected a grid, which names one as `base`")


def refuse_contradictions(config: ExperimentConfig, source: str) -> None:
    """Raise UserError for settings that contradict each other: text options for images (or the reverse), `min_lr` above
    `lr`, a warm-up for onecycle, a compiled model with `exact`.

    Only for what a user writes now. `read` does not call it, so that the config.yaml of a run made before one of these
    rules still opens.
    """
    data, schedule = config.data, config.schedule
    images = data.name in IMAGE_DATA or (data.name not in TEXT_DATA and config.workload == "image_classification")
    kind, names = ("text", TEXT_DATA) if images else ("images", IMAGE_DATA)
    own = config.workload not in WORKLOADS  # which reads what it likes
    for key in () if own else TEXT_ONLY if images else IMAGES_ONLY:
        if getattr(data, key) != DataConfig.model_fields[key].default:
            raise UserError(f"{source}: data.{key} is for {kind} ({', '.join(names)}); data.name is {data.name}")
    if schedule.min_lr > config.lr:
        raise UserError(f"{source}: schedule.min_lr: {schedule.min_lr:g} is above lr {config.lr:g}; allowed: 0 to lr")
    if schedule.name == "onecycle" and schedule.warmup_epochs:
        raise UserError(
            f"{source}: schedule.warmup_epochs: onecycle rises by itself, for the share schedule.peak of the run; "
            "allowed with it: 0"
        )
    if config.compile and config.reduction == "exact":
        raise UserError(
            f"{source}: compile: for reduction ddp only; exact refuses it, because kernels that are tuned in each "
            "process may round differently; allowed with exact: false"
        )


# Section -> key -> the values of `name` in that section that use the key.
_READ_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "optimizer": {"momentum": ("sgd",), "nesterov": ("sgd",), "betas": ("adamw",), "eps": ("adamw",)},
    "schedule": {
        "step_epochs": ("step",),
        "gamma": ("step", "plateau"),
        "min_lr": ("cosine", "onecycle"),
        "peak": ("onecycle",),
    },
}


def passed_over(config: ExperimentConfig, on_gpu: bool) -> list[str]:
    """One line for each setting that has no effect in this run, because another optimizer or schedule was chosen or the
    device lacks it. The user is warned and not refused, so that one file serves several devices and optimizers."""
    lines = []
    for part, keys in _READ_BY.items():
        section = getattr(config, part)
        for key, names in keys.items() if section.name in (*OPTIMIZERS, *SCHEDULES) else ():
            if section.name not in names and getattr(section, key) != type(section).model_fields[key].default:
                lines.append(f"{part}.{key} is for {' and '.join(names)}, {part}.name is {section.name}: not used")
    if not on_gpu and config.precision == "tf32":
        lines.append("precision: tf32 is a format of NVIDIA GPUs: on this CPU it is fp32")
    if not on_gpu and config.compile:
        lines.append("compile: on a CPU nothing is compiled")
    return lines


def parse(tree: Mapping[str, Any], kind: type[ConfigT], source: str) -> ConfigT:
    """Check a tree of plain values; `source` names it in errors (UserError)."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, kind)}") from None
