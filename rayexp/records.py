"""The values that flow through rayexp: frozen, plain, and free of torch and Ray.

EpochRecord    one line of epochs.jsonl
Predictions    what a checkpoint says of every validation sample: predictions/epoch_007.npz
RunRef         RUN@7, RUN@best, RUN@last, as typed
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.errors import UserError

# The phases of an epoch's wall-clock, in the order in which reports stack them. They add up to `total`.
PHASES = ("data", "transfer", "compute", "reduce", "optimizer", "evaluate", "checkpoint", "other")


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch, as measured by rank 0.

    Attributes:
        epoch: counts from 1; this is the state after that epoch.
        step: optimizer steps since the start of the run.
        train_loss: mean loss per sample (images) or per token (language), over the epoch, in nats.
        val_loss: mean validation loss, likewise.
        metrics: `acc1`, `acc5` in percent (images), or `ppl` (language).
        lr: learning rate of the epoch's last step.
        samples_per_second: global training throughput (images/s or tokens/s) without evaluation and checkpointing.
            A process's first step (compilation, warm-up) is left out, so one after every resume too; where an epoch
            has no other step, it is that one's.
        seconds: `total` and the PHASES, in seconds of rank 0's clock, and `first_step` where the epoch held a
            process's first. After a resume inside the epoch: of the steps since.
        weights_sha: sha256 over the model's tensors. Two rows with one sha are the same model.
        state_sha: sha256 over model, optimizer and carried state.
        world_size: number of workers (0: in-process).
        peak_memory: bytes of rank 0's process: `host`, and on a GPU `device`.
        energy_joules: what the workers' GPUs used in the epoch; None where it is not known.
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

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object: the metrics' names stand beside `epoch`, `step`, `train_loss` ..."""
        head = {"epoch": self.epoch, "step": self.step, "train_loss": self.train_loss, "val_loss": self.val_loss}
        tail = {
            "lr": self.lr,
            "samples_per_second": self.samples_per_second,
            "seconds": dict(self.seconds),
            "weights_sha": self.weights_sha,
            "state_sha": self.state_sha,
            "world_size": self.world_size,
            "peak_memory": dict(self.peak_memory),
            "energy_joules": self.energy_joules,
        }
        return {**head, **self.metrics, **tail}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> EpochRecord:
        """The inverse of `to_json`; every unnamed number is a metric."""
        named = {name: row[name] for name in cls.__dataclass_fields__ if name in row and name != "metrics"}
        metrics = {k: v for k, v in row.items() if k not in named and isinstance(v, int | float)}
        return cls(metrics=metrics, **named)


@dataclass(frozen=True, slots=True)
class Predictions:
    """Judgements on the validation data, sample by sample; one .npz without pickled objects.

    Arrays of kind `images` (n images): `index` int64[n] position in the validation data, `label` int64[n],
    `top5` int32[n, k] classes by falling probability (k = min(5, classes)), `confidence` float32[n] the
    probability of the first, `loss` float32[n] cross-entropy in nats (without label smoothing).
    Arrays of kind `tokens` (n tokens): `offset` int64[n] position of the token in the validation text,
    `token` int32[n] its id, `loss` float32[n] in nats.

    Rows are sorted by `index` or `offset`. `data_sha` names the validation data: two Predictions can be compared
    only where it is equal.
    """

    kind: str
    data_sha: str
    arrays: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.arrays["loss"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def to_npz(self) -> bytes:
        """The file's bytes: the arrays, and `kind` and `data_sha` as strings."""
        buffer = io.BytesIO()
        words: Any = {"kind": np.array(self.kind), "data_sha": np.array(self.data_sha), **self.arrays}
        np.savez(buffer, **words)
        return buffer.getvalue()

    @classmethod
    def from_npz(cls, data: bytes, source: str) -> Predictions:
        """Read `to_npz`'s bytes; `source` names the file in errors.

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
    """`RUN@EPOCH` as typed: `epoch` is a number, `best` or `last`."""

    run: str
    epoch: int | str

    @classmethod
    def parse(cls, text: str) -> RunRef:
        """Parse `RUN@7`, `RUN@best`, `RUN@last`; a bare `RUN` means `RUN@last`.

        Raises:
            UserError: the part after `@` is none of these.
        """
        run, at, epoch = text.rpartition("@")
        if not at:
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
