"""One training experiment: ExperimentConfig and its sections. They are frozen and refuse unknown keys.

The checks need neither torch nor Ray; the keys under `model`, which only a workload knows, are checked by the workload.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rayexp.config import components, yaml_tree
from rayexp.config.code import relocate
from rayexp.config.components import IMAGE_DATA, OPTIMIZERS, SCHEDULES, TEXT_DATA, WORKLOADS
from rayexp.config.fields import listed
from rayexp.config.model import ModelConfig
from rayexp.config.phrases import NAME
from rayexp.config.section import OpenSection, Section

IMAGES_ONLY = ("max_train_samples", "max_val_samples", "image_size", "resident", "augment")
TEXT_ONLY = ("max_train_tokens", "max_val_tokens", "bptt", "eval_columns")
UNDECIDED = {"precision": "auto", "threads_per_shard": None}
"""Keys that a run decides once, when it begins, and the value that leaves them open."""
NO_URI = (
    "expected a folder (local, or a shared one that is mounted); `rayexp collect RUN --to URI` takes a run to s3:// or "
    "gs://, and `rayexp collect URI` brings it back"
)
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


def _no_uri(value: Any) -> Any:
    if isinstance(value, str) and "://" in value:
        raise ValueError(NO_URI)
    return value


Folder = Annotated[Path, BeforeValidator(_no_uri)]


class AugmentConfig(Section):
    """Random resized crop and horizontal flip, drawn per sample from (seed, epoch, sample)."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop keeps; each above 0 and at most 1."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of a crop; each above 0."""
    flip: bool = True
    """Mirror each image left to right with probability 1/2."""
    pad: Annotated[int, Field(ge=0)] = 0
    """Above 0: instead of a resized crop, pad each side by this many pixels and cut out the original size at a random
    position. 0: off."""

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        least, most = value
        if least > most or (info.field_name == "scale" and most > 1):
            at_most = ", at most 1" if info.field_name == "scale" else ""
            raise ValueError(f"expected the smallest number, then the largest{at_most}")
        return value


class DataConfig(OpenSection):
    """Which data, where it is, and how much of it. The further keys of your own dataset are its options."""

    name: str = "shapes"
    """The dataset. Images: shapes (drawn by rayexp), tiny_imagenet, folder (your own, one folder per class). Text:
    python_docs (the documentation that comes with Python), wikitext2, text (your own files). Or your own dataset, by
    reference."""
    root: Path | None = None
    """The folder that `rayexp data fetch` filled, or your own; required except for shapes and python_docs."""
    max_train_samples: PositiveInt | None = None
    """Images: train on only this many images, with the classes kept in balance; null: on all."""
    max_val_samples: PositiveInt | None = None
    """Images: validate on only this many images, with the classes kept in balance; null: on all."""
    max_train_tokens: PositiveInt | None = None
    """Text: train on only the first tokens, this many; null: on all."""
    max_val_tokens: PositiveInt | None = None
    """Text: validate (and test) on only the first tokens, this many; null: on all."""
    image_size: PositiveInt = 64
    """Images: height and width, in pixels, of the packed images."""
    resident: Literal["auto"] | bool = "auto"
    """Images, on a GPU. true: keep the packed pixels in its memory. false: send each batch through pinned memory. auto:
    keep them where they take less than half of what is free. Never changes a bit of the result."""
    augment: AugmentConfig | None = AugmentConfig()
    """Images: random augmentation of the training images; null: train on them as they are."""
    bptt: PositiveInt = 35
    """Text: tokens in a training window, through which the gradient is backpropagated."""
    eval_columns: PositiveInt = 10
    """Text: number of columns of equal length into which the validation text is cut."""

    @model_validator(mode="after")
    def _root_where_needed(self) -> Self:
        if self.root is None and self.name in ("tiny_imagenet", "folder", "wikitext2", "text"):
            raise ValueError(f"root: {self.name} needs the folder that `rayexp data fetch` filled (data.root=DIR)")
        return self


class OptimizerConfig(OpenSection):
    """SGD or AdamW, or your own; `lr` and `weight_decay` are at the top level of the configuration."""

    name: str = "sgd"
    """The update rule: sgd or adamw, those of torch.optim.SGD and torch.optim.AdamW. Or your own, by reference; the
    further keys are its options."""
    momentum: Fraction = 0.9
    """sgd: the momentum factor, from 0 (none) to 1."""
    nesterov: bool = False
    """sgd: use Nesterov's momentum; needs a momentum above 0."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """adamw: decay rates of the running averages of the gradient and of its square; each from 0 to below 1."""
    eps: Positive = 1e-8
    """adamw: added to the denominator for numerical stability; above 0."""
    clip: Positive | None = None
    """Largest global L2 norm of the gradient, above 0; a larger one is scaled down to it. null: no clipping."""
    decay_norm_and_bias: bool = True
    """false: no weight decay on biases and normalisation layers (every one-dimensional parameter)."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return components.check_name("optimizer.name", name, OPTIMIZERS)

    @model_validator(mode="after")
    def _nesterov(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class ScheduleConfig(OpenSection):
    """How the learning rate changes during training."""

    name: str = "constant"
    """constant: `lr` throughout. step: multiplied by `gamma` every `step_epochs`. cosine: half a cosine from `lr` down
    to `min_lr`. onecycle: linearly from `lr` / 25 up to `lr`, then down to `min_lr`. plateau: multiplied by `gamma`
    after an epoch whose validation loss is no better than the best. Or your own, by reference; the further keys are its
    options."""
    warmup_epochs: NonNegative = 0
    """Rise linearly from 0 to `lr` over this many epochs, which may be a fraction; not with onecycle, which rises by
    itself."""
    step_epochs: PositiveInt = 30
    """step: epochs between two drops of the rate."""
    gamma: Positive = 0.1
    """step, plateau: the factor by which the rate is multiplied; above 0."""
    min_lr: NonNegative = 0
    """cosine, onecycle: the rate at the end, from 0 to `lr`."""
    peak: Fraction = 0.3
    """onecycle: share of the run, from 0 to 1, after which the rate is highest."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return components.check_name("schedule.name", name, SCHEDULES)

    @property
    def depends_on_epochs(self) -> bool:
        """Whether the rate of a step depends on how many epochs the run has, so that none can be added later. Of a
        schedule of the user's own that is not known here, so it counts as one that does."""
        return self.name not in ("constant", "step", "plateau")


class ScaleConfig(Section):
    """How many workers, and on what devices. Where Ray Train's ScalingConfig has the same option, the name is the
    same."""

    num_workers: Annotated[int, Field(ge=0)] | tuple[PositiveInt, PositiveInt] = 0
    """0: train in this process, without Ray. N: that many workers of Ray Train; N must divide `shards`. [MIN, MAX]:
    elastic, as many as the cluster has room for at the time."""
    use_gpu: Literal["auto"] | bool = "auto"
    """auto: give every worker a GPU if the machine or the cluster has enough of them, else use CPUs. true: GPUs, or an
    error. false: CPUs."""
    cpus_per_worker: Positive | None = None
    """CPU cores that a worker reserves, above 0; a fraction lets workers share a core. null: the cores of all machines
    divided by the number of workers, or 1 for an elastic run."""
    gpus_per_worker: Positive = 1
    """GPUs that a worker reserves if workers use GPUs, above 0; a fraction lets workers share a GPU."""
    lanes: PositiveInt | None = None
    """Model replicas of a worker, which compute shards side by side: in threads on a CPU, on streams on a GPU. null: as
    many as the cores hold (see `threads_per_shard`), on a GPU up to 8 with exact and 1 with ddp. With exact it never
    changes a bit of the result."""

    @field_validator("num_workers")
    @classmethod
    def _ordered(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError("expected the smallest number, then the largest")
        return value


class CheckpointConfig(Section):
    """Which epochs' checkpoints stay on disk, and snapshots inside the epoch, of which the newest two are kept."""

    keep: Literal["all", "best"] | PositiveInt = "all"
    """Whose checkpoints stay. all: every epoch's. best: the best epoch's and the newest one, which a resume needs. N:
    those of the newest N epochs, and the best one. Others are removed as soon as a newer epoch is whole on disk; their
    records, hashes and predictions stay, so `diff` and `report` still know them. A resume may change it."""
    every_steps: PositiveInt | None = None
    """Save a snapshot every this many optimizer steps; null: not by steps."""
    every_seconds: Positive | None = None
    """Save a snapshot when the last one is this many seconds old; null: not by time."""


class ExperimentConfig(Section):
    """One training experiment. `rayexp train CONFIG [KEY=VALUE ...]` reads it; the run directory keeps the resolved
    one."""

    name: Annotated[str, Field(pattern=NAME)] = "run"
    """Part of the run directory's name: 1 to 64 letters, digits, `_`, `.` or `-`; the first is a letter or a digit."""
    workload: str = "image_classification"
    """What is trained: image_classification or language_model. Or your own workload, by reference."""
    code: tuple[str, ...] | None = None
    """The code of your own that travels with the run: files, packages, folders of modules, patterns; relative to this
    file. null: where a reference names a file, the Python files of this file's folder."""
    data: DataConfig = DataConfig()
    """Which data, where it is, and how much of it."""
    model: ModelConfig = ModelConfig()
    """The model's name and its own options."""
    epochs: PositiveInt = 1
    """Passes over the training data."""
    batch_size: PositiveInt = 256
    """Samples (text: columns) of one optimizer step, over all workers; a multiple of `shards`."""
    lr: Positive = 0.1
    """The learning rate, above 0; the highest one if the schedule changes it."""
    weight_decay: NonNegative = 1e-4
    """Weight decay, from 0. sgd: added to the gradient (an L2 penalty). adamw: decoupled."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0
    """Images: share of the target that is spread evenly over all classes, from 0 to below 1; only in the training
    loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule and its settings."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate changes during training."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Determines every random draw (initialisation, order, augmentation, dropout); from 0 to below 2**63."""
    precision: Literal["fp32", "tf32", "bf16", "auto"] = "fp32"
    """fp32: float32 throughout. tf32: matrix products and convolutions in TF32 on NVIDIA GPUs. bf16: torch.autocast to
    bfloat16. auto: bf16 if the workers have GPUs with bfloat16, else fp32; decided before a run's first step, from when
    on its config.yaml names it. Parameters, summed gradients and the optimizer's state are always float32."""
    reduction: Literal["exact", "ddp"] = "exact"
    """exact: the same bits at any number of workers. ddp: the same mathematics by ordinary all-reduce."""
    shards: PositiveInt = 8
    """Logical shards into which a batch is cut; must divide `batch_size`. The number of workers must divide it."""
    threads_per_shard: PositiveInt | None = None
    """On a CPU: threads that compute a shard. null: decided when a run starts, the cores of all its workers divided by
    `shards`, at least 1; the run keeps it. The bits depend on it, and not on who has how many cores."""
    cpu_kernels: bool = True
    """true: on a CPU, rayexp's own kernels where they are faster. false: PyTorch's operations alone, which is the same
    mathematics with other rounding."""
    compile: bool = False
    """Compile the model with torch.compile on a GPU (worth it if training takes much longer than compiling); only with
    `reduction: ddp`, since kernels that are tuned in each process may round differently."""
    capture: Literal["auto"] | bool = "auto"
    """On a GPU: capture a step once in CUDA graphs and replay them. auto: unless it cannot be captured, which run.json
    then explains. true: or it is an error. false: never. Never changes a bit of the result."""
    scaling: ScaleConfig = ScaleConfig()
    """How many workers, and on what devices."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Which checkpoints stay on disk, and snapshots inside the epoch."""
    tracking: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], BeforeValidator(listed)] = (
        "tensorboard",
    )
    """Where the run can be followed besides its own files. tensorboard: tb/ of the run directory. mlflow, wandb:
    extras, `pip install 'rayexp[mlflow]'`; where they are is said by MLFLOW_TRACKING_URI and WANDB_MODE. []: nowhere. A
    resume may change it."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often lost workers are replaced before the run fails; 0: never."""
    storage_path: Folder = Path("runs")
    """The folder in which run directories are made: local, or shared and mounted."""

    @field_validator("workload")
    @classmethod
    def _known_workload(cls, name: str) -> str:
        return components.check_name("workload", name, WORKLOADS)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, tree: Any) -> Any:
        """Refuse unknown keys where they are no options of a component of the user's own."""
        if not isinstance(tree, dict):
            return tree
        sections: list[tuple[str, type[OpenSection], tuple[str, ...]]] = [
            ("optimizer", OptimizerConfig, OPTIMIZERS),
            ("schedule", ScheduleConfig, SCHEDULES),
        ]
        if tree.get("workload", "image_classification") in tuple(WORKLOADS):
            sections.append(("data", DataConfig, (*IMAGE_DATA, *TEXT_DATA)))
        for name, kind, shipped in sections:
            keys = tree.get(name)
            if isinstance(keys, dict) and keys.get("name", kind.model_fields["name"].default) in shipped:
                for key in (key for key in keys if isinstance(key, str) and key not in kind.model_fields):
                    line: Any = {"type": "extra_forbidden", "loc": (name, key), "input": keys[key]}
                    raise ValidationError.from_exception_data(cls.__name__, [line])
        return tree

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.workload in WORKLOADS:
            try:
                components.check_name("data.name", self.data.name, (*IMAGE_DATA, *TEXT_DATA))
            except ValueError as error:
                raise ValueError(f"data.name: {error}") from None
        if components.is_reference(self.model.name):
            try:
                components.check_name("model.name", self.model.name, ())
            except ValueError as error:
                raise ValueError(f"model.name: {error}") from None
        if self.batch_size % self.shards:
            allowed = ", ".join(str(n) for n in range(1, min(self.batch_size, 64) + 1) if self.batch_size % n == 0)
            more = self.batch_size // self.shards * self.shards + self.shards
            raise ValueError(
                f"shards: {self.shards} does not divide batch_size {self.batch_size}; allowed: {allowed}, or a "
                f"batch_size that it divides, such as {more}"
            )
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
    def subject(self) -> str:
        """What is trained, in a word: the model; a workload of the user's own, which may name no model."""
        return self.model.name if self.workload in WORKLOADS else self.workload

    @property
    def allowed_workers(self) -> list[int]:
        """The numbers of workers (besides 0) that divide `shards`."""
        return [n for n in range(1, self.shards + 1) if self.shards % n == 0]

    def to_yaml(self, code: str | None = None) -> str:
        """The resolved configuration as YAML; `load` gives an equal one back.

        Args:
            code: the name of a folder beside the file that holds a copy of the code that travels; None: there is none,
                and references lead to the files themselves.
        """
        tree = self.model_dump(mode="json")
        relocate(tree, code)
        return yaml_tree.dump(tree)

    def absolute(self) -> ExperimentConfig:
        """The same with absolute paths, because workers run in other directories."""
        data = self.data.model_copy(update={"root": self.data.root and self.data.root.expanduser().resolve()})
        code = self.code and tuple(str(Path(entry).expanduser().absolute()) for entry in self.code)
        changes = {"data": data, "code": code, "storage_path": self.storage_path.expanduser().resolve()}
        return self.model_copy(update=changes)
