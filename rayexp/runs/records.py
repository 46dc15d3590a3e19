"""The values that are passed around in rayexp: frozen, plain, and free of torch and Ray.

EpochRecord    one line of epochs.jsonl
Predictions    a checkpoint's outputs for every validation sample: predictions/epoch_007.npz
RunRef         RUN@7, RUN@best, RUN@last, as the user types it
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rayexp.errors import UserError
from rayexp.runs.traits import Goal
from rayexp.system.disk import NEWEST, read_file

T = TypeVar("T")
# The phases of an epoch's wall-clock time, in the order in which reports stack them. They add up to `total`.
PHASES = ("data", "transfer", "compute", "reduce", "optimizer", "evaluate", "checkpoint", "other")


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch, as measured by rank 0.

    A loss or metric that is not finite is nan here, and null in JSON, which cannot express it.

    Attributes:
        epoch: number of the epoch, from 1; the record describes the state after it.
        step: optimizer steps since the start of the run.
        train_loss: mean loss per sample (images) or per token (language), over the epoch, in nats.
        val_loss: mean validation loss, likewise.
        metrics: the workload's own: `acc1`, `acc5` in percent (images), `ppl` (language).
        lr: learning rate of the epoch's last step.
        samples_per_second: global training throughput (images/s or tokens/s) without evaluation and checkpointing.
            The first step of a process (compilation, warm-up) is left out, after a resume too, unless the epoch has
            no other step; so are the seconds in which steps were captured on a GPU, which are part of `other`.
        seconds: `total` and the PHASES, by rank 0's clock, and `first_step` where the epoch includes the first step
            of a process. After a resume inside the epoch: only the steps since then.
        weights_sha: sha256 over the model's tensors. Two records with the same sha are the same model.
        state_sha: sha256 over model, optimizer and recurrent state.
        predictions_sha: sha256 of the predictions' file; empty where an older rayexp wrote the record.
        world_size: number of workers (0: in-process).
        peak_memory: bytes of rank 0's process: `host`, and on a GPU `device`.
        energy_joules: energy that the workers' GPUs used in the epoch; None where it is not known.
        busy: share of the epoch, from 0 to 1, in which the workers' devices computed; None where it is not known.
    """

    epoch: int
    step: int
    train_loss: float
    val_loss: float
    metrics: Mapping[str, float]
    lr: float
    samples_per_second: float
    seconds: Mapping[str, float]
    weights_sha: str
    state_sha: str = ""
    world_size: int = 0
    peak_memory: Mapping[str, int] = field(default_factory=dict)
    energy_joules: float | None = None
    busy: float | None = None
    predictions_sha: str = ""

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object, with the metrics beside `epoch`, `step`, `train_loss` and so on."""
        head = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": _finite(self.train_loss),
            "val_loss": _finite(self.val_loss),
        }
        tail = {
            "lr": _finite(self.lr),
            "samples_per_second": _finite(self.samples_per_second),
            "seconds": {name: _finite(value) for name, value in self.seconds.items()},
            "weights_sha": self.weights_sha,
            "state_sha": self.state_sha,
            "predictions_sha": self.predictions_sha,
            "world_size": self.world_size,
            "peak_memory": dict(self.peak_memory),
            "energy_joules": None if self.energy_joules is None else _finite(self.energy_joules),
            "busy": None if self.busy is None else _finite(self.busy),
        }
        return {**head, **{name: _finite(value) for name, value in self.metrics.items()}, **tail}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> EpochRecord:
        """The inverse of `to_json`: every number (or null) that is no field is a metric. Infinity and NaN, which older
        files may contain, become nan.

        Raises:
            TypeError, ValueError: a field is missing or of the wrong type; the message names it.
        """
        named = {name: row[name] for name in cls.__dataclass_fields__ if name in row and name != "metrics"}
        for name in ("epoch", "step", "world_size"):
            if not isinstance(named.get(name, 0), int):
                raise ValueError(f"{name}: expected a whole number, got {named[name]!r}")
        for name in ("weights_sha", "state_sha", "predictions_sha"):
            if not isinstance(named.get(name, ""), str):
                raise ValueError(f"{name}: expected text, got {named[name]!r}")
        for name in ("train_loss", "val_loss", "lr", "samples_per_second"):
            if name in named:
                named[name] = _number(name, named[name])
        for name in ("energy_joules", "busy"):
            if named.get(name) is not None:
                named[name] = _number(name, named[name])
        named["peak_memory"] = dict(named.get("peak_memory", {}))
        named["seconds"] = {name: _number(name, value) for name, value in dict(named.get("seconds", {})).items()}
        metrics = {k: _number(k, v) for k, v in row.items() if k not in named and (v is None or _is_number(v))}
        return cls(metrics=metrics, **named)

    @property
    def finite(self) -> bool:
        """Whether the validation loss is finite."""
        return math.isfinite(self.val_loss)


def best(records: Iterable[EpochRecord], goals: Mapping[str, Goal]) -> EpochRecord | None:
    """The epoch that is best by the first of the goals (`Run.goals`), or by the validation loss where it has no such
    metric; the earliest of equals. None where there is none.

    An epoch without a finite validation loss does not count, nor does one whose metric is not finite. But a metric of
    which less is better may be too large for a number (a perplexity): then it is the worst.
    """
    first = next(iter(goals), "val_loss")
    high = goals.get(first) == "max"

    def cost(record: EpochRecord) -> float:
        value = record.metrics.get(first, record.val_loss)
        if high and first in record.metrics:
            return -value
        return math.inf if math.isnan(value) else value

    def counts(record: EpochRecord) -> bool:
        return record.finite and -math.inf < cost(record) and (math.isfinite(cost(record)) or not high)

    return min((r for r in records if counts(r)), key=lambda r: (cost(r), r.epoch), default=None)


def ranges(numbers: list[int]) -> str:
    """`1-4, 7`."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1][-1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts)


def step_line(row: Any) -> dict[str, Any]:
    """Check a line of steps.jsonl, and return it (ValueError where it has no epoch, or a curve is no list)."""
    if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
        raise ValueError("epoch is missing")
    for name in ("loss", "lr"):
        values = row.get(name, [])
        if not isinstance(values, list) or not all(v is None or _is_number(v) for v in values):
            raise ValueError(f"{name}: expected a list of numbers")
    return row


def read_lines(path: Path, make: Callable[[Any], T], damaged: list[str] | None = None) -> list[T]:
    """Make one value from each line of JSON; a last line that a crash left unfinished is skipped.

    Args:
        path: the file; a missing one has no lines.
        make: makes the value from a line's JSON.
        damaged: receives a note for each damaged line, which is then skipped too.

    Raises:
        UserError: the file cannot be read, or a line is damaged.
    """
    try:
        lines = read_file(path).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(make(json.loads(line)))
        except (ValueError, RecursionError, TypeError, AttributeError, OverflowError) as error:
            if number == len(lines):  # no newline behind it
                break
            if damaged is None:
                raise UserError(f"{path}: line {number} is damaged ({one_line(error)})") from error
            damaged.append(f"line {number} is damaged ({one_line(error)})")
    return rows


def one_line(error: BaseException) -> str:
    """An error as one line; for an error of the system, without the path."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    """A number from JSON; null, and infinity in an older file, become nan."""
    if value is None:
        return math.nan
    if not _is_number(value):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return value if math.isfinite(value) else math.nan


@dataclass(frozen=True, slots=True)
class Predictions:
    """A checkpoint's outputs for the validation data, sample by sample; one .npz without pickled objects.

    Arrays of kind `images` (n images): `index` int64[n] position in the validation data, `label` int64[n],
    `top5` int32[n, k] classes by decreasing probability (k = min(5, classes)), `confidence` float32[n] the
    probability of the first, `loss` float32[n] cross-entropy in nats (without label smoothing).
    Arrays of kind `tokens` (n tokens): `offset` int64[n] position of the token in the validation text,
    `token` int32[n] its id, `loss` float32[n] in nats.

    Arrays of kind `samples` (n samples of any other workload): `index` int64[n], `loss` float32[n], and what else the
    workload likes, each with n rows.

    Where a model's output is not finite nothing is predicted: `loss` (and `confidence`) are not finite either, every
    class in `top5` is -1, and the sample counts as wrong.

    Samples are sorted by `index` or `offset`. `data_sha` identifies the validation data: two Predictions can only be
    compared if theirs are equal.
    """

    kind: str
    data_sha: str
    arrays: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.arrays["loss"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    @property
    def finite(self) -> NDArray[np.bool_]:
        """bool[n]: whether the sample's loss (and confidence) are finite."""
        columns = [self.arrays[name] for name in ("loss", "confidence") if name in self.arrays]
        return np.asarray(np.isfinite(np.stack(columns)).all(axis=0))

    def same_as(self, other: Predictions) -> bool:
        """Whether both predict the same for the same data, bit for bit; samples that are not finite must be so in
        both."""
        if self.kind != other.kind or self.data_sha != other.data_sha or self.arrays.keys() != other.arrays.keys():
            return False
        if len(self) != len(other) or not np.array_equal(whole := self.finite, other.finite):
            return False
        return all(np.array_equal(array[whole], other[name][whole]) for name, array in self.arrays.items())

    def to_npz(self) -> bytes:
        """The bytes of the file: the arrays, and `kind` and `data_sha` as strings."""
        file = io.BytesIO()
        fields: Any = {"kind": np.array(self.kind), "data_sha": np.array(self.data_sha), **self.arrays}
        np.savez(file, **fields)
        return file.getvalue()

    @classmethod
    def from_npz(cls, data: bytes, source: str) -> Predictions:
        """Read the bytes that `to_npz` gives; `source` names the file in errors.

        Raises:
            UserError: the bytes are no predictions (truncated, pickled or another file).
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as npz:
                arrays = {name: npz[name] for name in npz.files}
            return cls(str(arrays.pop("kind")), str(arrays.pop("data_sha")), arrays)
        except Exception as error:
            raise UserError(f"{source}: not a predictions file ({error})") from error


@dataclass(frozen=True, slots=True)
class RunRef:
    """`RUN@EPOCH` as the user types it: `epoch` is a number, `best` or `last`."""

    run: str
    epoch: int | str

    @classmethod
    def parse(cls, text: str) -> RunRef:
        """Parse `RUN@7`, `RUN@best`, `RUN@last`; a bare `RUN` means `RUN@last`. RUN may be `@newest`.

        Raises:
            UserError: the part after `@` is none of these.
        """
        run, at, epoch = text.rpartition("@")
        if not at or text == NEWEST:
            return cls(text, "last")
        if run and epoch in ("best", "last"):
            return cls(run, epoch)
        if run and epoch.isdecimal() and int(epoch) >= 1:
            return cls(run, int(epoch))
        raise UserError(
            f"{text!r}: not a checkpoint reference; write RUN@7, RUN@best or RUN@last (epochs count from 1)"
        )

    def __str__(self) -> str:
        return f"{self.run}@{self.epoch}"


def reference(text: str) -> RunRef:
    """`RunRef.parse`; but a run's directory is one, though its path has an `@` in it."""
    with contextlib.suppress(OSError):  # the name is longer than a file name may be
        if (Path(text).expanduser() / "run.json").is_file():
            return RunRef(text, "last")
    return RunRef.parse(text)
