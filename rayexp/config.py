"""What a user may write: ExperimentConfig and CompareConfig, frozen, unknown keys refused.

A configuration is a YAML file plus `KEY=VALUE` words with dotted keys. It is checked here without torch and without
Ray; what only a workload can know (the words under `model`) is checked by that workload.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from rayexp.errors import UserError, nearest

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
    """Rise linearly from 0 over this many epochs (constant, step, cosine)."""
    step_epochs: PositiveInt = 30
    """step: multiply by `gamma` after every so many epochs."""
    gamma: Positive = 0.1
    """step: the factor after `step_epochs`. plateau: the factor after an epoch without a better validation loss."""
    min_lr: NonNegative = 0
    """cosine, onecycle: the rate at the end."""
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
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def absolute(self) -> ExperimentConfig:
        """The same with absolute paths: workers run in other directories."""
        data = self.data.model_copy(update={"root": self.data.root and self.data.root.expanduser().resolve()})
        return self.model_copy(update={"data": data, "storage_path": self.storage_path.expanduser().resolve()})


class CompareConfig(_Section):
    """A device grid: a base experiment and what to vary. See configs/devices.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "compare"
    base: str
    """Path of the base experiment's YAML, relative to this file."""
    overrides: dict[str, Any] = {}
    """Dotted keys set in every cell."""
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
    """What a user wrote: `read`, and a setting that the data would pass over is refused too (UserError)."""
    config = read(path, overrides, kind)
    if isinstance(config, ExperimentConfig):
        refuse_unread(config.data, str(path))
    return config


def read(path: Path | str, overrides: Sequence[str] = (), kind: type[ConfigT] = ExperimentConfig) -> ConfigT:  # type: ignore[assignment]
    """Read a YAML file, set `KEY=VALUE` words on top, and check all of it.

    Raises:
        UserError: no such file, no YAML mapping, an unknown key, a value that is not allowed; the line names it.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(tree).__name__}")
    for word in overrides:
        _set(tree, word)
    return parse(tree, kind, str(path))


def refuse_unread(data: DataConfig, source: str) -> None:
    """Refuse a setting under `data` that this data would pass over in silence (UserError). Not part of the check that
    a run's own config.yaml must pass: there it did no harm."""
    images = data.name in IMAGE_DATA
    kind, names = ("text", TEXT_DATA) if images else ("images", IMAGE_DATA)
    for key in _TEXT_ONLY if images else _IMAGES_ONLY:
        if getattr(data, key) != DataConfig.model_fields[key].default:
            raise UserError(f"{source}: data.{key} is for {kind} ({', '.join(names)}); data.name is {data.name}")


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


def explain(error: ValidationError, kind: type[BaseModel], prefix: str = "") -> str:
    """The first complaint of pydantic's as one line: key, what is wrong, what is allowed."""
    first = error.errors()[0]
    # Union members are part of pydantic's location but not of the user's key.
    parts = [str(p) for p in first["loc"] if not re.search(r"[\[\]()]|^(literal|int|bool|tuple|constrained)", str(p))]
    key = ".".join([prefix, *parts] if prefix else parts)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        allowed = list(_section(kind, parts[:-1]).model_fields)
        return f"unknown key {key}{nearest(parts[-1], allowed)}; allowed: {', '.join(allowed)}"
    given = first.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) and "got" not in message else ""
    return f"{key}: {message}{shown}" if key else message


def _section(kind: type[BaseModel], parts: Sequence[str]) -> type[BaseModel]:
    """The model class under a dotted key (list positions are passed over)."""
    for part in parts:
        if part.isdecimal() or part not in kind.model_fields:
            continue
        found = _models(kind.model_fields[part].annotation)
        if found:
            kind = found[0]
    return kind


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models(a)]


def _set(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r}: expected KEY=VALUE, for example epochs=2 or data.root=DIR")
    try:
        value = number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"{word!r}: the value is not YAML") from error
    *path, last = key.split(".")
    for part in path:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {part} is a single value and has no keys under it")
    tree[last] = value


def number(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; numbers written so are meant as numbers."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value
