"""The protocol that a workload implements: its model, data, loss and predictions. The engine knows nothing else of
images or words.

Indices, named alike in all of the engine:
    epoch    counts from 1
    step     optimizer step within the epoch, from 0; `global_step` counts over all epochs
    shard    logical part of a batch, 0 .. config.shards-1; always the same samples, whoever computes it
    stream   part of the validation data that is evaluated front to back, 0 .. val_streams-1; fixed by the configuration
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayexp.config import ExperimentConfig
from rayexp.runs.records import Predictions
from rayexp.runs.traits import Goal

RecurrentState = dict[str, Tensor]
"""What a shard hands from a step to the next (the hidden state of a recurrent net), by name; empty where there is none.
The samples lie along the workload's `batch_dim`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of some consecutive shards, on the device.

    Attributes:
        inputs: arguments of the model's forward, with the samples in the order of the shards.
        targets: int64[count], the class of each image, or the next word of each token.
        sizes: samples (images, or columns of text) of each shard; their sum is the size of the batch dimension.
        count: number of loss terms (images, or tokens).
    """

    inputs: tuple[Any, ...]
    targets: Tensor
    sizes: tuple[int, ...]
    count: int


class Workload(Protocol):
    """A model, its data, its loss and its predictions. `workloads.open_workload(config)` makes one in every process, so
    that must be cheap."""

    unit: str
    """What throughput counts: `images`, `tokens`, `samples`, or another word."""

    kind: str
    """The kind of its predictions (see records.Predictions): `images`, `tokens`, or `samples` for any other."""

    goals: Mapping[str, Goal]
    """Its metrics in the order in which they are shown, and whether `max` or `min` is better. The first decides which
    epoch is the best. `val_loss` is always known."""

    batch_unit: str
    """What `batch_size` counts: `images`, `columns`, `samples`."""

    batch_dim: int
    """The dimension of activations along which samples lie: 0 for images, 1 for [time, columns, features]."""

    shares_buffer: bool
    """Whether a shard's gradients may be added to another shard's in one gradient buffer. That takes a backward pass
    that adds each parameter's gradient once, when it is complete (see engine/gradients.py, ReplicaModel). False: every
    shard gets a zeroed buffer of its own."""

    together: bool
    """Whether several shards may go through the model in one pass. That takes a model with one input and one output,
    samples along the first dimension of both, no recurrent state, and one loss term for each sample."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Open the data and check the configuration.

        Raises:
            UserError: the configuration or the data does not fit.
        """

    def model(self) -> nn.Module:
        """A freshly initialised model on the CPU; all draws come from (seed, "init")."""

    def steps(self) -> int:
        """Optimizer steps of an epoch."""

    def batch(self, epoch: int, step: int, shards: range, device: torch.device) -> Batch:
        """The augmented training samples of consecutive shards, whatever the number of workers: what `assemble` makes
        of `feed` on the device.

        Called for one shard or a few of them with `exact`, for all of a worker's shards at once with `ddp`.
        """

    def feed(self, epoch: int, step: int, shards: range) -> Mapping[str, NDArray[Any]]:
        """What the host contributes to the batch of consecutive shards: small arrays, by name, and the samples
        themselves unless they are resident.

        Of the same shards all steps but an epoch's last give the same names, dtypes and shapes, so that buffers on the
        device can be made once and filled for every step. May be called from several threads at once, and for steps
        ahead.
        """

    def assemble(self, fed: Mapping[str, Tensor], sizes: Sequence[int]) -> Batch:
        """The batch that follows from `feed` on the device where `fed` lies: gathering, draws, augmentation.

        From the second call on a device it neither waits for the device nor takes anything from the host but `fed`, so
        that a CUDA graph can hold it. The bits are the same whether the samples are resident or fed.

        A workload may also have a method `prepare` with the same arguments, for what it makes of many shards at once as
        well as of one: the result, tensors by name with the samples of all shards like those of `feed`, takes their
        place in `fed`. A step on a GPU calls it once, before the shards: many small kernels cost it more than a few
        large ones. It must give every sample the bits that it gives it beside any other shards, or none.

        Args:
            fed: the arrays of `feed`, on one device; or what `prepare` made of them.
            sizes: `Batch.sizes` of the shards.
        """

    def resident_bytes(self) -> int:
        """Memory that `resident` takes, in bytes."""

    def resident(self, device: torch.device) -> None:
        """Keep the training and validation samples on the device from now on: `feed` leaves them out, and `assemble`
        and `predict` take them from there. Does nothing where a feed is small anyway."""

    def sizes(self, step: int, shards: range) -> tuple[int, ...]:
        """`Batch.sizes` of these shards of a step, in any epoch."""

    def initial_state(self, size: int, device: torch.device) -> RecurrentState:
        """The recurrent state of a shard of `size` samples at the start of an epoch."""

    def loss(self, model: nn.Module, batch: Batch, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """The SUM of the loss over the batch, a scalar to differentiate, and the recurrent state after it, detached."""

    def touched_rows(self, epoch: int, step: int) -> Mapping[str, NDArray[np.int64]]:
        """The rows int64[k] that a step of the global batch touches, sorted, by name of a parameter whose gradient is
        zero in all other rows (an embedding). Only these rows are exchanged. The parameters are always the same; all
        follows from the configuration and the data, so workers need not tell each other."""

    def val_streams(self) -> int:
        """Number of streams into which the validation data is cut."""

    def predict(self, model: nn.Module, stream: int, device: torch.device) -> Mapping[str, NDArray[Any] | Tensor]:
        """The prediction arrays of one stream (see records.Predictions). The model is in eval mode, without grad.

        Arrays may be left on the device as tensors: then nothing waits for the device until all streams are done.
        """

    def predictions(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> Predictions:
        """Put the arrays of all streams, in their order, together."""

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """`val_loss` and the workload's own metrics: `acc1` and `acc5` in percent, or `ppl`; those of `goals`. Computed
        in float64."""

    def describe(self) -> dict[str, Any]:
        """The content of data.json beside `kind`, which describes the data to a reader who does not have it:
        `train_samples`, `val_samples`, `train_sha`, `val_sha`; `classes` and `val_names`, or `vocabulary`, where there
        are such; and `layout`, one line, where there was a choice of what to take for which split."""

    def example(self) -> tuple[Any, ...]:
        """Inputs of the model's forward for one sample, for the layer table and the model graph."""
