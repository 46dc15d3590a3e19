"""What a user may write: ExperimentConfig and CompareConfig, frozen, unknown keys refused.

A configuration is a YAML file plus `KEY=VALUE` words with dotted keys (see yaml_tree). It is checked here without torch
and without Ray; what only a workload can know (the words under `model`) is checked by that workload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rayexp import yaml_tree
from rayexp.errors import UserError, nearest
from rayexp.fields import KeysOf, alternatives
from rayexp.fields import explain as explain  # workloads check their own keys with it

IMAGE_DATA = ("shapes", "tiny_imagenet", "folder")
TEXT_DATA = ("python_docs", "wikitext2", "text")
_IMAGES_ONLY = ("max_train_samples", "max_val_samples", "image_size", "augment")
_TEXT_ONLY = ("max_train_tokens", "max_val_tokens", "bptt", "eval_columns")
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


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        field = cls.model_fields[info.field_name].annotation if info.field_name else Any
        if isinstance(value, bool) and not {bool, Any} & set(alternatives(field)):
            raise ValueError("true and false are not allowed here")
        return value


class AugmentConfig(_Section):
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


class DataConfig(_Section):
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

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "resnet18"

    @property
    def options(self) -> dict[str, Any]:
        """Everything beside the name."""
        return dict(self.model_extra or {})


class OptimizerConfig(_Section):
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


class ScheduleConfig(_Section):
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


class ScaleConfig(_Section):
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


class CheckpointConfig(_Section):
    """Every epoch is kept. These add snapshots inside the epoch, of which the newest two are kept."""

    every_steps: PositiveInt | None = None
    every_seconds: Positive | None = None


class ExperimentConfig(_Section):
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
        from rayexp.workloads import TABLE

        if name not in TABLE:
            raise ValueError(f"unknown workload {name!r}{nearest(name, TABLE)}; allowed: {', '.join(TABLE)}")
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


class CompareConfig(_Section):
    """A device grid: a base experiment and what to vary. See configs/devices.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "compare"
    base: str
    """Path of the base experiment's YAML, relative to this file."""
    overrides: Annotated[dict[str, Any], KeysOf(ExperimentConfig)] = {}
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
    target: dict[str, float] = {}
    """Time to reach a metric, for example {acc1: 40}."""
    price_per_device_hour: dict[Literal["cpu", "gpu"], NonNegative] = {}
    currency: str = "USD"
    interconnect: dict[Literal["bandwidth_gbit", "latency_us"], Positive] = {}
    """For the forecast; measured between the workers where it is not given."""
    baseline: bool = True
    """Also time a plain single-process PyTorch script of the same mathematics."""
    storage_path: Folder = Path("runs")


ConfigT = TypeVar("ConfigT", ExperimentConfig, CompareConfig)


def load(path: Path | str, overrides: Sequence[str] = (), kind: type[ConfigT] = ExperimentConfig) -> ConfigT:  # type: ignore[assignment]
    """What a user wrote: `read`, and what contradicts itself is refused too (UserError)."""
    config = read(path, overrides, kind)
    if isinstance(config, ExperimentConfig):
        refuse_contradictions(config, str(path))
    return config


def read(path: Path | str, overrides: Sequence[str] = (), kind: type[ConfigT] = ExperimentConfig) -> ConfigT:  # type: ignore[assignment]
    """Read a YAML file, set `KEY=VALUE` words on top, and check all of it.

    Raises:
        UserError: no such file, no YAML mapping, an unknown key, a value that is not allowed; the line names it.
    """
    tree = yaml_tree.read(Path(path), kind)
    for word in overrides:
        yaml_tree.set_word(tree, word, kind)
    return parse(tree, kind, str(path))


def refuse_contradictions(config: ExperimentConfig, source: str) -> None:
    """Refuse a setting that another one makes meaningless (UserError). Not part of the check that a run's own
    config.yaml must pass: there it did no harm."""
    data, schedule = config.data, config.schedule
    images = data.name in IMAGE_DATA
    kind, names = ("text", TEXT_DATA) if images else ("images", IMAGE_DATA)
    for key in _TEXT_ONLY if images else _IMAGES_ONLY:
        if getattr(data, key) != DataConfig.model_fields[key].default:
            raise UserError(f"{source}: data.{key} is for {kind} ({', '.join(names)}); data.name is {data.name}")
    if schedule.min_lr > config.lr:
        raise UserError(f"{source}: schedule.min_lr: {schedule.min_lr:g} is above lr {config.lr:g}; allowed: 0 to lr")
    if schedule.name == "onecycle" and schedule.warmup_epochs:
        raise UserError(
            f"{source}: schedule.warmup_epochs: onecycle rises by itself, for the share schedule.peak of the run; "
            "allowed with it: 0"
        )


# Keys that one choice alone reads.
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
    """A line for every setting that has no effect in this run: a choice that was left, or one that this kind of device
    does not have. Warned of and not refused, so that one file serves several devices, optimizers and schedules."""
    lines = []
    for part, keys in _READ_BY.items():
        section = getattr(config, part)
        for key, names in keys.items():
            if section.name not in names and getattr(section, key) != type(section).model_fields[key].default:
                lines.append(f"{part}.{key} is for {' and '.join(names)}, {part}.name is {section.name}: not used")
    if not on_gpu and config.precision == "tf32":
        lines.append("precision: tf32 is a format of NVIDIA GPUs: on this CPU it is fp32")
    if not on_gpu and config.compile:
        lines.append("compile: on a CPU nothing is compiled")
    return lines


def shipped(name: str) -> Path:
    """The path of a configuration that comes with rayexp: from the checkout, or from the installed package."""
    package = Path(__file__).resolve().parent
    return next(p for p in (package.parent / "configs" / name, package / "configs" / name) if p.exists())


def parse(tree: Mapping[str, Any], kind: type[ConfigT], source: str) -> ConfigT:
    """Check a tree of plain values; `source` names it in errors (UserError)."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, kind)}") from None
