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
    """Part of the comparison directory's name: 1 to 64 letters, digits, `_`, `.` or `-`; the first is a letter or a
    digit."""
    base: str
    """The base experiment: the path of its YAML file, relative to this file, or the name of one that comes with rayexp.
    Required."""
    overrides: Annotated[dict[str, Any], KeysOf(ExperimentConfig)] = Field(default={})
    """Keys of the base experiment, nested or dotted, to set in every cell."""
    scaling: Annotated[tuple[ScaleConfig, ...], Field(min_length=1)]
    """The devices to compare: a list of `scaling` sections with a fixed `num_workers`, at least one. Required."""
    precision: tuple[Literal["fp32", "tf32", "bf16", "auto"], ...] = ()
    """Precisions to compare; empty: that of the base. A cell with auto is on CPUs the one with fp32."""
    reduction: tuple[Literal["exact", "ddp"], ...] = ()
    """Reductions to compare; empty: that of the base."""
    repeats: PositiveInt = 3
    """How often each cell is run; the repeats are interleaved."""
    mode: Literal["strong", "weak"] = "strong"
    """strong: `batch_size` stays. weak: `batch_size` and `shards` of the base are multiplied by the number of
    workers."""
    target: dict[str, float] = Field(default={})
    """Report the seconds until a metric reaches a value, for example {acc1: 40} (percent). Images: acc1, acc5,
    val_loss, train_loss. Text: ppl, val_loss, train_loss."""
    price_per_device_hour: dict[Literal["cpu", "gpu"], NonNegative] = Field(default={})
    """Price of one device for one hour, in `currency`, from which the cost of an epoch is computed:
    {cpu: 0.04, gpu: 2.50}; a cpu is one core. Empty: no costs in the report."""
    currency: str = "USD"
    """The currency of the prices, as printed in the report."""
    interconnect: dict[Literal["bandwidth_gbit", "latency_us"], Positive] = Field(default={})
    """The link between workers for the forecast: bandwidth in Gbit/s and latency in microseconds, each above 0; a value
    that is not given is measured in the cells with two or more workers."""
    baseline: bool = True
    """Also time a plain single-process PyTorch script of the same mathematics."""
    storage_path: Folder = Path("runs")
    """The folder in which the comparison's directory is made: local, or shared and mounted."""
