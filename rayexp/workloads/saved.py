"""A trained model from its run directory, without the data that it was trained on."""

from __future__ import annotations

from typing import Any

from rayexp import workloads
from rayexp.config.references import provide
from rayexp.engine import checkpoint, settings
from rayexp.engine.checkpoint import FIELDS, TENSORS, State
from rayexp.engine.portable import Portable
from rayexp.errors import RunError, UserError
from rayexp.runs.code import code_of
from rayexp.runs.run import Run, broken


def read_state(run: Run, epoch: int) -> State:
    """The checkpoint of an epoch.

    Raises:
        UserError: the epoch has none.
        RunError: it is damaged.
    """
    folder = run.checkpoint(epoch)
    if not folder.is_dir():
        raise UserError(f"{run.id}@{epoch}: has no checkpoint in {folder.parent}; there are {run.epochs()}")
    if why := broken(folder):
        raise RunError(f"{folder}: {why}")
    return checkpoint.decode({name: (folder / name).read_bytes() for name in (TENSORS, FIELDS)})


def open_portable(run: Run, epoch: int) -> Portable:
    """The model after an epoch, for use without rayexp; `about` says where it comes from, too.

    Raises:
        UserError: the epoch has no checkpoint, or the run's workload does not say how its models leave rayexp.
        RunError: the checkpoint is damaged, or does not fit the run's model.
    """
    import rayexp

    state, config = read_state(run, epoch), run.config()
    if config.code:
        provide(config.code, code_of(run.root))
    kind: Any = workloads.workload_class(config)
    if not hasattr(kind, "portable"):
        raise UserError(
            f"{run.id}: a model of {config.workload} cannot be taken out of its run: the workload has no method "
            "`portable`; `rayexp evaluate` judges its data"
        )
    try:
        with settings.models():
            found: Portable = kind.portable(config, run.data(), state.weights())
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
