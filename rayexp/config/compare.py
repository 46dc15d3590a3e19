"""A device grid: a base experiment and what to vary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from rayexp.config.experiment import ExperimentConfig, Folder, NonNegative, Positive, ScaleConfig
from rayexp.config.fields import KeysOf
from rayexp.config.phrases import NAME
from rayexp.config.section import Section

Scaling = Literal["strong", "weak"]


def _listed(value: Any) -> Any:
    """One value as a list of one, so that `mode: weak` need not be `mode: [weak]`."""
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


class CompareConfig(Section):
    """A device grid: a base experiment and what to vary. See configs/devices.yaml."""

    name: Annotated[str, Field(pattern=NAME)] = "compare"
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
    mode: Annotated[tuple[Scaling, ...], BeforeValidator(_listed), Field(min_length=1)] = ("strong",)
    """One or both, as [strong, weak]. strong: `batch_size` stays. weak: `batch_size` and `shards` are those of one
    worker, and are multiplied by the number of workers. A cell of one worker belongs to both and runs once."""
    batch_size: Annotated[tuple[PositiveInt, ...], BeforeValidator(_listed)] = ()
    """Batch sizes to compare, as [64, 256, 1024]; empty: that of the base. `shards` is that of the base, or the
    greatest divisor of it that divides the batch."""
    target: dict[str, float] = Field(default={})
    """Report the seconds until a metric reaches a value, for example {acc1: 40} (percent): a metric of the workload
    (images: acc1, acc5; text: ppl), or val_loss or train_loss."""
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

    @field_validator("mode", "batch_size")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ValueError(f"{twice[0]} stands there twice")
        return values
