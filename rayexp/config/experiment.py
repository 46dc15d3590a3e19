"""One training experiment: ExperimentConfig and its sections, frozen, unknown keys refused.

Checked without torch and without Ray; what only a workload can know (the keys under `model`) is checked by that
workload.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rayexp.config import yaml_tree
from rayexp.config.components import WORKLOADS
from rayexp.config.fields import alternatives
from rayexp.errors import nearest

IMAGE_DATA = ("shapes", "tiny_imagenet", "folder")
TEXT_DATA = ("python_docs", "wikitext2", "text")
IMAGES_ONLY = ("max_train_samples", "max_val_samples", "image_size", "augment")
TEXT_ONLY = ("max_train_tokens", "max_val_tokens", "bptt", "eval_columns")
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


def _no_uri(value: Any) -> Any:
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            "expected a folder (local, or a shared one that is mounted); `rayexp collect RUN --to URI` takes a run "
            "to s3:// or gs://, and `rayexp collect URI` brings it back"
        )
    return value


Folder = Annotated[Path, BeforeValidator(_no_uri)]


class Section(BaseModel):
    """A part of a configuration: frozen, with no key but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        field = cls.model_fields[info.field_name].annotation if info.field_name else Any
        if isinstance(value, bool) and not {bool, Any} & set(alternatives(field)):
            raise ValueError("true and false are not allowed here")
        return value


class AugmentConfig(Section):
    """Random resized crop and horizontal flip, drawn per sample from (seed, epoch, sample)."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop keeps."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: bool = True
    """Mirror every second image, on average."""
    pad: Annotated[int, Field(ge=0)] = 0
    """Instead of a resized crop: pad by that many pixels and cut the original size out at random (0: off)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale: smallest, then largest, at most 1")
        if not self.ratio[0] <= self.ratio[1]:
            raise ValueError("ratio: smallest, then largest")
        return self


class DataConfig(Section):
    """Which data, where it lies, and how much of it."""

    name: str = "shapes"
    """Images: shapes (made by rayexp), tiny_imagenet, folder. Text: python_docs (Python's own), wikitext2, text."""
    root: Path | None = None
    """The folder that `rayexp data fetch` filled, or your own; not needed for shapes and python_docs."""
    max_train_samples: PositiveInt | None = None
    """Images: train on this many only, the classes kept in balance."""
    max_val_samples: PositiveInt | None = None
    """Images: validate on this many only."""
    max_train_tokens: PositiveInt | None = None
    """Text: train on the first tokens only."""
    max_val_tokens: PositiveInt | None = None
    """Text: validate (and test) on the first tokens only."""
    image_size: PositiveInt = 64
    """Height and width in pixels after packing."""
    augment: AugmentConfig | None = AugmentConfig()
    """null: train on the images as they are."""
    bptt: PositiveInt = 35
    """Text: tokens in a window."""
    eval_columns: PositiveInt = 10
    """Text: parallel columns into which the validation text is cut."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = (*IMAGE_DATA, *TEXT_DATA)
        if name not in known:
            raise ValueError(f"unknown data {name!r}{nearest(name, known)}; allowed: {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _root_where_needed(self) -> Self:
        if self.root is None and self.name not in ("shapes", "python_docs"):
            raise ValueError(f"root: {self.name} needs the folder that `rayexp data fetch` filled (data.root=DIR)")
        return self


class ModelConfig(BaseModel):
    """The model's name and its own options, which the workload checks."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str = "resnet18"

    @property
    def options(self) -> dict[str, Any]:
        """Everything beside the name."""
        return dict(self.model_extra or {})


class OptimizerConfig(Section):
    """SGD or AdamW; `lr` and `weight_decay` stand at the top of the configuration."""

    name: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9
    nesterov: bool = False
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip: Positive | None = None
    """Largest global L2 norm of the gradient."""
    decay_norm_and_bias: bool = True
    """false: no weight decay on biases and normalisation layers (every one-dimensional parameter)."""

    @model_validator(mode="after")
    def _nesterov(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class ScheduleConfig(Section):
    """How the learning rate moves."""

    name: Literal["constant", "step", "cosine", "onecycle", "plateau"] = "constant"
    warmup_epochs: NonNegative = 0
    """Rise linearly from 0 over this many epochs (all but onecycle, which rises by itself)."""
    step_epochs: PositiveInt = 30
    """step: multiply by `gamma` after every so many epochs."""
    gamma: Positive = 0.1
    """step: the factor after `step_epochs`. plateau: the factor after an epoch without a better validation loss."""
    min_lr: NonNegative = 0
    """cosine, onecycle: the rate at the end; not above `lr`."""
    peak: Fraction = 0.3
    """onecycle: share of the schedule after which the rate is highest."""


class ScaleConfig(Section):
    """How many workers, and on what. Ray's own words."""

    num_workers: Annotated[int, Field(ge=0)] | tuple[PositiveInt, PositiveInt] = 0
    """0: in this process, without Ray. N: workers of Ray Train. [MIN, MAX]: elastic."""
    use_gpu: Literal["auto"] | bool = "auto"
    """auto: a GPU per worker where the machine or the cluster has enough of them."""
    cpus_per_worker: Positive | None = None
    """CPU cores a worker holds; null: the machine's cores divided by the workers (at least 1)."""
    gpus_per_worker: Positive = 1
    """Used where the workers use GPUs; fractions share a GPU."""
    lanes: PositiveInt | None = None
    """CPU, exact: shards computed side by side in a worker, one thread each; null: one a core. Never changes a bit."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError("num_workers: smallest, then largest")
        return self


class CheckpointConfig(Section):
    """Every epoch is kept. These add snapshots inside the epoch, of which the newest two are kept."""

    every_steps: PositiveInt | None = None
    every_seconds: Positive | None = None


class ExperimentConfig(Section):
    """One training experiment. `rayexp train CONFIG [KEY=VALUE ...]` reads it; the run directory keeps it resolved."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "run"
    workload: str = "image_classification"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 256
    """Global: the samples (or text columns) of one optimizer step over all workers together."""
    lr: Positive = 0.1
    weight_decay: NonNegative = 1e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    reduction: Literal["exact", "ddp"] = "exact"
    """exact: the same bits at any number of workers. ddp: the same mathematics by ordinary all-reduce."""
    shards: PositiveInt = 8
    """Logical shards of a batch; the numbers of workers that divide it are allowed."""
    compile: bool = False
    """torch.compile the model (worth its start-up time on GPUs only)."""
    scaling: ScaleConfig = ScaleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often lost workers are replaced before the run is given up."""
    storage_path: Folder = Path("runs")
    """The folder in which run directories are made."""

    @field_validator("workload")
    @classmethod
    def _known_workload(cls, name: str) -> str:
        if name not in WORKLOADS:
            raise ValueError(f"unknown workload {name!r}{nearest(name, WORKLOADS)}; allowed: {', '.join(WORKLOADS)}")
        return name

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.batch_size % self.shards:
            allowed = [n for n in range(1, min(self.batch_size, 64) + 1) if self.batch_size % n == 0]
            raise ValueError(f"shards: {self.shards} does not divide batch_size {self.batch_size}; allowed: {allowed}")
        workers = self.scaling.num_workers
        if isinstance(workers, int) and workers and self.shards % workers:
            raise ValueError(
                f"scaling.num_workers: {workers} does not divide shards {self.shards}; "
                f"allowed: 0, {', '.join(map(str, self.allowed_workers))}"
            )
        if isinstance(workers, tuple) and not any(workers[0] <= n <= workers[1] for n in self.allowed_workers):
            raise ValueError(
                f"scaling.num_workers: nothing from {workers[0]} to {workers[1]} divides shards {self.shards}; "
                f"allowed: {', '.join(map(str, self.allowed_workers))}"
            )
        return self

    @property
    def allowed_workers(self) -> list[int]:
        """The worker counts (beside 0) that divide the shards."""
        return [n for n in range(1, self.shards + 1) if self.shards % n == 0]

    def to_yaml(self) -> str:
        """The resolved configuration as a YAML file that `load` reads back equal."""
        return yaml_tree.dump(self.model_dump(mode="json"))

    def absolute(self) -> ExperimentConfig:
        """The same with absolute paths: workers run in other directories."""
        data = self.data.model_copy(update={"root": self.data.root and self.data.root.expanduser().resolve()})
        return self.model_copy(update={"data": data, "storage_path": self.storage_path.expanduser().resolve()})
