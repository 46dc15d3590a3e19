"""A workload of independent samples: the order, the cut into batches and shards, and all else that needs no thought.

Image classification is built on it, and your own workload may be: give it arrays, a model and a loss.

    class Regression(SampleWorkload):
        goals = {"rmse": "min"}

        def __init__(self, config):
            super().__init__(config, train=Samples((x,), y), val=Samples((x2,), y2))

        def build(self):
            return nn.Linear(8, 1)

        def losses(self, outputs, targets):
            return F.mse_loss(outputs[:, 0], targets, reduction="none")
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayexp.config import ExperimentConfig
from rayexp.engine import order
from rayexp.engine.runtime import upload
from rayexp.engine.workload import Batch, RecurrentState
from rayexp.errors import UserError
from rayexp.runs.records import Predictions
from rayexp.runs.traits import Goal


class Split(Protocol):
    """The samples of one split: how many there are, and a hash that tells them from others."""

    def __len__(self) -> int: ...

    @property
    def sha(self) -> str:
        """sha256 of everything that is compared between two runs on the same samples."""


@dataclass(frozen=True)
class Samples:
    """n samples in memory.

    Attributes:
        inputs: arguments of the model's forward, each an array [n, ...].
        targets: [n, ...].
        names: n names, for people; none where it is empty.
    """

    inputs: tuple[NDArray[Any], ...]
    targets: NDArray[Any]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(array) for array in (*self.inputs, self.targets)} | ({len(self.names)} if self.names else set())
        if not self.inputs:
            raise UserError("workload: samples without inputs; allowed: at least one array")
        if len(lengths) != 1:
            raise UserError(f"workload: inputs, targets and names differ in length ({sorted(lengths)})")

    def __len__(self) -> int:
        return len(self.targets)

    @functools.cached_property
    def sha(self) -> str:
        """sha256 over the arrays, with their types and shapes, and the names."""
        found = hashlib.sha256(repr(self.names).encode())
        for array in (*self.inputs, self.targets):
            found.update(f"{array.dtype.str} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()


class SampleWorkload:
    """A workload whose samples are independent of each other (see engine/workload.py for every method).

    A child gives `build` and `losses`; `goals` and `metrics` where it has metrics beside `val_loss`, `columns` where
    more than the loss is to be kept of each prediction, and other methods where its samples are no arrays in memory.

    Attributes:
        config: the configuration.
        train, val: the two splits.
        cut: how the samples of an epoch are cut into batches and shards.
    """

    unit = "samples"
    kind = "samples"
    batch_unit = "samples"
    goals: Mapping[str, Goal] = {}
    batch_dim = 0
    shares_buffer = True
    together = False

    def __init__(self, config: ExperimentConfig, train: Split, val: Split) -> None:
        if len(train) < 2 * config.shards:
            raise UserError(
                f"data: {len(train)} training {self.unit} are too few for {config.shards} shards "
                f"(at least {2 * config.shards})"
            )
        if not len(val):
            raise UserError(f"data: there are no {self.unit} to validate on")
        self.config, self.train, self.val = config, train, val
        self.cut = order.Cut(len(train), config.batch_size, config.shards)
        self._order: tuple[int, NDArray[np.int64]] = (0, np.empty(0, np.int64))

    # ------------------------------------------------------------------ what a child gives

    def build(self) -> nn.Module:
        """A new model. Whatever it draws from PyTorch's generator follows from the configuration's seed."""
        raise NotImplementedError(f"{type(self).__name__} needs a method build")

    def losses(self, outputs: Any, targets: Tensor) -> Tensor:
        """The loss of each sample, [n], from the model's outputs and the targets [n, ...]."""
        raise NotImplementedError(f"{type(self).__name__} needs a method losses")

    def columns(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        """What is kept of each prediction beside `index` and `loss`, by name: tensors with n rows. Here: nothing."""
        return {}

    # ------------------------------------------------------------------ model

    def model(self) -> nn.Module:
        """A freshly initialised model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(order.key(self.config.seed, "init"))
            return self.build()

    def example(self) -> tuple[Any, ...]:
        """The inputs of the first validation sample."""
        return tuple(upload(array, torch.device("cpu")) for array in self._inputs(self.val, slice(0, 1)))

    # ------------------------------------------------------------------ training

    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.cut.steps

    def batch(self, epoch: int, step: int, shards: range, device: torch.device) -> Batch:
        """The samples of consecutive shards, on the device."""
        fed = {name: upload(array, device) for name, array in self.feed(epoch, step, shards).items()}
        return self.assemble(fed, self.sizes(step, shards))

    def feed(self, epoch: int, step: int, shards: range) -> dict[str, NDArray[Any]]:
        """`samples` int64[n], their `targets`, and the inputs by their position."""
        samples = self.samples(epoch, step, shards)
        inputs = {str(i): array for i, array in enumerate(self._inputs(self.train, samples))}
        return {"samples": samples, "targets": self.train.targets[samples], **inputs}  # type: ignore[attr-defined]

    def assemble(self, fed: Mapping[str, Tensor], sizes: Sequence[int]) -> Batch:
        """The batch that was fed."""
        inputs = tuple(fed[str(i)] for i in range(len(fed) - 2))
        return Batch(inputs, fed["targets"], tuple(sizes), sum(sizes))

    def samples(self, epoch: int, step: int, shards: range) -> NDArray[np.int64]:
        """The numbers of the samples of consecutive shards: int64[n]."""
        positions = self.cut.positions(step, shards)
        return self._permutation(epoch)[positions.start : positions.stop]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of the samples in an epoch. Of the epochs that threads ask for, the latest is remembered."""
        known, samples = self._order
        if known != epoch:
            samples = order.permutation(self.config.seed, epoch, len(self.train))
            self._order = epoch, samples
        return samples

    def _inputs(self, split: Any, samples: NDArray[np.int64] | slice) -> list[NDArray[Any]]:
        return [np.ascontiguousarray(array[samples]) for array in split.inputs]

    def resident_bytes(self) -> int:
        """None: samples are fed."""
        return 0

    def resident(self, device: torch.device) -> None:
        """Does nothing: samples are fed."""

    def sizes(self, step: int, shards: range) -> tuple[int, ...]:
        """Samples of each shard."""
        return self.cut.sizes(step, shards)

    def initial_state(self, size: int, device: torch.device) -> RecurrentState:
        """Empty: a sample hands nothing to the next step."""
        return {}

    def loss(self, model: nn.Module, batch: Batch, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """The sum of the losses."""
        return self.losses(model(*batch.inputs), batch.targets).float().sum(), {}

    def touched_rows(self, epoch: int, step: int) -> dict[str, NDArray[np.int64]]:
        """None: every gradient is dense."""
        return {}

    # ------------------------------------------------------------------ evaluation

    def val_streams(self) -> int:
        """Number of batches of validation samples."""
        return -(-len(self.val) // self.config.batch_size)

    def stream(self, stream: int) -> NDArray[np.int64]:
        """The numbers of the validation samples of a stream: int64[n]."""
        size = self.config.batch_size
        return np.arange(stream * size, min(len(self.val), (stream + 1) * size), dtype=np.int64)

    def predict(self, model: nn.Module, stream: int, device: torch.device) -> Mapping[str, NDArray[Any] | Tensor]:
        """`index`, `loss`, and the child's `columns`."""
        samples = self.stream(stream)
        inputs = [upload(array, device) for array in self._inputs(self.val, samples)]
        targets = upload(self.val.targets[samples], device)  # type: ignore[attr-defined]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            outputs = model(*inputs)
        found = self.columns(outputs, targets)
        return {"index": samples, "loss": self.losses(outputs, targets).float(), **found}

    def predictions(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> Predictions:
        """Put the streams together, in their order."""
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return Predictions(self.kind, self.val.sha, arrays)

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """`val_loss`, the mean."""
        return {"val_loss": float(predictions["loss"].mean(dtype=np.float64))}

    def describe(self) -> dict[str, Any]:
        """Numbers and hashes of the samples, and the names of those to validate on."""
        names = getattr(self.val, "names", ())
        return {
            **({"val_names": list(names)} if names else {}),
            "train_samples": len(self.train),
            "val_samples": len(self.val),
            "train_sha": self.train.sha,
            "val_sha": self.val.sha,
        }
