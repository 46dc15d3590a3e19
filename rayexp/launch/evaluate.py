"""Judge the validation data with a checkpoint, outside of training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from rayexp.disk import write_atomic
from rayexp.errors import RunError, UserError
from rayexp.launch import plan
from rayexp.launch.local import here
from rayexp.records import Predictions
from rayexp.runs import Run, broken

Part = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of it.

    Attributes:
        metrics: the workload's own (`val_loss`, `acc1`, `acc5` | `ppl`), and those on test data where it has any.
        stored: whether the predictions were stored now.
        equal: whether they are bit for bit those that training had stored (None: there were none).
    """

    predictions: Predictions
    metrics: Mapping[str, float]
    weights_sha: str
    stored: bool
    equal: bool | None


def predict(run: Run, epoch: int) -> Predictions:
    """The predictions of a checkpoint, computed here and now, and stored where the run had none.

    Raises:
        UserError: the epoch has no checkpoint, or the validation data is missing or another one.
        RunError: the checkpoint is damaged.
    """
    return judge(run, epoch).predictions


def judge(
    run: Run, epoch: int, begin: Callable[[int], None] | None = None, seen: Callable[[int, Part], None] | None = None
) -> Judgement:
    """See `predict`.

    Args:
        begin: is told the number of batches before the first.
        seen: is told of each batch, in order.
    """
    from rayexp import workloads
    from rayexp.engine import checkpoint, evaluate, place
    from rayexp.engine.group import Group

    folder = run.checkpoint(epoch)
    if not folder.is_dir():
        raise UserError(f"{run.id}@{epoch}: has no checkpoint in {folder.parent}; there are {run.epochs()}")
    if why := broken(folder):
        raise RunError(f"{folder}: {why}")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    config = run.config()
    # One process, whatever the run had: the workers' number never changes what a model says.
    alone = config.model_copy(update={"scaling": config.scaling.model_copy(update={"num_workers": 0})})
    gpu = plan.make(alone, [here()]).gpu
    settled = place.settle(config, place.device("cuda" if gpu else "cpu"), config.shards)
    workload = workloads.open_workload(config)
    model = checkpoint.load_model(workload, files).to(settled.device)
    if begin is not None:
        begin(workload.val_streams())
    models = [copy.deepcopy(model) for _ in range(settled.lanes)]
    ordered = _InOrder(seen) if seen is not None else lambda stream, part: None
    predictions = evaluate.judge(workload, models, Group(), settled, ordered)
    _same_data(run, predictions)
    metrics = workload.metrics(predictions)
    if (test := getattr(workload, "test_metrics", None)) is not None:
        metrics |= test(model, settled.device)
    path = run.predictions_path(epoch)
    data = predictions.to_npz()
    missing = not path.exists()
    equal = None
    if missing:
        write_atomic(path, data)
    else:
        stored = run.predictions(epoch)
        equal = all((stored[name] == array).all() for name, array in predictions.arrays.items())
    return Judgement(predictions, metrics, checkpoint.decode(files).words["weights_sha"], missing, equal)


def _same_data(run: Run, predictions: Predictions) -> None:
    wanted = run.data().get("val_sha")
    if wanted and wanted != predictions.data_sha:
        raise UserError(
            f"{run.id}: the validation data in {run.config().data.root or run.config().data.name} is not the run's "
            f"(sha256 {predictions.data_sha[:12]}, the run's {wanted[:12]})"
        )


class _InOrder:
    """Passes batches on in their order, whichever lane was first."""

    def __init__(self, seen: Callable[[int, Part], None]) -> None:
        self.seen, self.next = seen, 0
        self.waiting: dict[int, Part] = {}
        self.lock = threading.Lock()

    def __call__(self, stream: int, part: Part) -> None:
        with self.lock:
            self.waiting[stream] = part
            while self.next in self.waiting:
                self.seen(self.next, self.waiting.pop(self.next))
                self.next += 1
