"""What the engine asks of a workload. `workloads/` holds the answers; nothing else in the engine knows images or words.

Index glossary, used in all of the engine:
    epoch    counts from 1
    step     optimizer step within the epoch, from 0; `global_step` counts over all epochs
    shard    logical part of a batch, 0 .. config.shards-1; always the same samples, whoever computes it
    stream   part of the validation data that is judged front to back, 0 .. val_streams-1; fixed by the configuration
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

RecurrentState = dict[str, Tensor]
"""State that one shard hands from a step to the next (a recurrent net's hidden state); empty where there is none."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of some consecutive shards, on the device.

    Attributes:
        inputs: arguments of the model's forward, the samples in shard order.
        targets: int64, one per sample or token.
        sizes: samples (language: columns) of each shard, in order; their sum is the batch dimension.
        count: number of loss terms (images, or tokens).
    """

    inputs: tuple[Any, ...]
    targets: Tensor
    sizes: tuple[int, ...]
    count: int


class Workload(Protocol):
    """A model, its data, its loss and its judge. Built by `open(config)`; cheap to build in every process."""

    unit: str
    """What throughput counts: `images` or `tokens`."""
    batch_dim: int
    """The dimension of activations along which samples lie (0 for images, 1 for [time, column, feature])."""

    shares_buffer: bool
    """Whether a second shard's gradients may be added to a first one's where they lie: backward completes each
    parameter's gradient before it adds it, by autograd or by itself (see engine.flat.Replica). False: every shard has
    zeroed ones of its own."""

    together: bool
    """Whether the shards of a pass may go through the model together: it has one input and one output, along whose
    first dimension the samples lie, nothing is carried, and there is one loss term a sample."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Open the data and check the configuration (UserError)."""

    def model(self) -> nn.Module:
        """A freshly initialised model on the CPU; every draw comes from (seed, "init")."""

    def steps(self) -> int:
        """Optimizer steps of an epoch."""

    def batch(self, epoch: int, step: int, shards: range, device: torch.device) -> Batch:
        """The training samples of consecutive shards, augmented; never depends on the number of workers.

        Called for one shard or a few of them under `exact`, for all of a worker's shards at once under `ddp`.
        """

    def sizes(self, step: int, shards: range) -> tuple[int, ...]:
        """The `sizes` of that batch, in any epoch."""

    def initial_state(self, size: int, device: torch.device) -> RecurrentState:
        """The carried state at the start of an epoch for a shard of that many samples; the batch dimension is
        `batch_dim` of each tensor."""

    def loss(self, model: nn.Module, batch: Batch, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """SUM of the loss over the batch (a scalar that can be differentiated) and the state handed on (detached)."""

    def touched_rows(self, epoch: int, step: int) -> Mapping[str, NDArray[np.int64]]:
        """Parameters whose gradient is zero outside some rows, and these rows of the global batch, sorted. Always the
        same parameters; they follow from the configuration, so no worker need be told. Only these rows travel."""

    def val_streams(self) -> int:
        """Number of streams into which the validation data is cut."""

    def predict(self, model: nn.Module, stream: int, device: torch.device) -> Mapping[str, NDArray[Any]]:
        """The prediction arrays (see records.Predictions) of one stream; the model is in eval mode, no grad."""

    def predictions(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> Predictions:
        """All streams' arrays, in stream order, put together."""

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """`val_loss` and the workload's own (`acc1`, `acc5` in percent; `ppl`), in float64."""

    def describe(self) -> dict[str, Any]:
        """data.json: what a reader of the run needs to know of the data without having it. `kind` (images, tokens),
        `train_samples`, `val_samples`, `train_sha`, `val_sha`, and `classes` + `val_names`, or `vocabulary`; `layout`,
        in a line, where there was a choice of what to take for which split."""

    def example(self) -> tuple[Any, ...]:
        """Example inputs for the layer table and the model graph (batch of 1)."""
