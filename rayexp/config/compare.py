"""A device grid: a base experiment and what to vary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from rayexp.config.experiment import ExperimentConfig, Folder, NonNegative, Positive, ScaleConfig, Section
from rayexp.config.fields import KeysOf


class CompareConfig(Section):
    """A device grid: a base experiment and what to vary. See configs/devices.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "compare"
    base: str
    """Path of the base experiment's YAML, relative to this file."""
    overrides: Annotated[dict[str, Any], KeysOf(ExperimentConfig)] = Field(default={})
    """Dotted keys of the base set in every cell."""
    scaling: Annotated[tuple[ScaleConfig, ...], Field(min_length=1)]
    """The device column of the grid."""
    precision: tuple[Literal["fp32", "tf32", "bf16"], ...] = ()
    """Empty: the base's own."""
    reduction: tuple[Literal["exact", "ddp"], ...] = ()
    """Empty: the base's own."""
    repeats: PositiveInt = 3
    mode: Literal["strong", "weak"] = "strong"
    """strong: the global batch stays. weak: `batch_size` (and `shards`) are those of one worker, times the workers."""
    target: dict[str, float] = Field(default={})
    """Time to reach a metric, for example {acc1: 40}."""
    price_per_device_hour: dict[Literal["cpu", "gpu"], NonNegative] = Field(default={})
    currency: str = "USD"
    interconnect: dict[Literal["bandwidth_gbit", "latency_us"], Positive] = Field(default={})
    """For the forecast; measured between the workers where it is not given."""
    baseline: bool = True
    """Also time a plain single-process PyTorch script of the same mathematics."""
    storage_path: Folder = Path("runs")
