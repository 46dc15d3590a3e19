"""A trained model from its run directory, without the data that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rayexp import workloads
from rayexp.config import ExperimentConfig
from rayexp.config.references import provide
from rayexp.engine import checkpoint, settings
from rayexp.engine.checkpoint import FIELDS, TENSORS, State
from rayexp.engine.portable import Portable
from rayexp.errors import RunError
from rayexp.runs.code import code_of
from rayexp.runs.retention import checkpoint_of
from rayexp.runs.run import Run, broken


def read_state(run: Run, epoch: int) -> State:
    """The checkpoint of an epoch.

    Raises:
        UserError: the epoch has none.
        RunError: it is damaged.
    """
    folder = checkpoint_of(run, epoch)
    if why := broken(folder):
        raise RunError(f"{folder}: {why}")
    return checkpoint.decode({name: (folder / name).read_bytes() for name in (TENSORS, FIELDS)})


def open_portable(run: Run, epoch: int) -> Portable:
    """The model after an epoch, for use without rayexp; `about` says where it comes from, too.

    Raises:
        UserError: the epoch has no checkpoint; or the run's workload has no method `portable`, so that its data must be
            opened, and it is not there.
        RunError: the checkpoint is damaged, or does not fit the run's model.
    """
    import rayexp

    state, config = read_state(run, epoch), run.config()
    if config.code:
        provide(config.code, code_of(run.root))
    kind: Any = workloads.workload_class(config)
    make = getattr(kind, "portable", _with_data)
    try:
        with settings.models():
            found: Portable = make(config, run.data(), state.weights())
    except RuntimeError as error:
        folder = run.checkpoint(epoch)
        raise RunError(f"{folder}: does not fit the run's model ({' '.join(str(error).split())})") from error
    record = next((record for record in run.records() if record.epoch == epoch), None)
    source = {
        "run": run.id,
        "epoch": epoch,
        "weights_sha": str(state.fields["weights_sha"]),
        "metrics": {} if record is None else {"val_loss": record.val_loss, **record.metrics},
        "rayexp": rayexp.__version__,
    }
    return Portable(**{**vars(found), "about": {**found.about, "build": "\n".join(found.build), **source}})


def _with_data(config: ExperimentConfig, described: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Portable:
    """The model of a workload that does not say how it leaves: it is made by the workload, with its data opened."""
    workload = workloads.open_workload(config)
    model, dim = workload.model(), workload.batch_dim
    model.load_state_dict(weights)
    # Two samples, because what is exported with one is made for one.
    inputs = tuple(torch.cat([part, part], dim) for part in workload.example())
    shapes = [f"{str(part.dtype).removeprefix('torch.')}{[*part.shape]}" for part in inputs]
    return Portable(
        model=model.eval(),
        weights=weights,
        inputs=inputs,
        axes=tuple({dim: "batch"} for _ in inputs),
        build=(),
        about={
            "task": config.workload,
            "architecture": config.subject,
            "input": f"{', '.join(shapes)} for two samples, along dimension {dim}",
            "output": "what the model gives",
        },
    )
