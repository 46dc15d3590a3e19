"""Evaluate a checkpoint on the validation data, outside of training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rayexp.config import ExperimentConfig
from rayexp.config.references import provide
from rayexp.errors import RunError, UserError
from rayexp.launch.local import on_gpu
from rayexp.runs.code import code_of
from rayexp.runs.manifest import digest, seal_predictions
from rayexp.runs.records import Predictions
from rayexp.runs.retention import checkpoint_of
from rayexp.runs.run import Run, broken
from rayexp.system.disk import write_atomic

Part = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        predictions: one for each sample of the validation data.
        metrics: the workload's own (`val_loss`, and `acc1`, `acc5` | `ppl` | others), and those on test data where it
            has any.
        weights_sha: the hash of the weights, as epochs.jsonl has it.
        stored: whether the predictions were stored now, because the run had none.
        equal: whether they equal the stored ones bit for bit (None: there were none, or they are mirrored); a sample
            that is not finite must be so in both.
        mirrored: whether probabilities are averaged over each image and its mirror image. Such predictions are never
            stored, so that nothing takes them for the run's own.
    """

    predictions: Predictions
    metrics: Mapping[str, float]
    weights_sha: str
    stored: bool
    equal: bool | None
    mirrored: bool = False

    @property
    def not_finite(self) -> int:
        """The number of samples for which the model's output is not finite."""
        return int((~self.predictions.finite).sum())


def predict(run: Run, epoch: int) -> Predictions:
    """The predictions of a checkpoint, computed now; they are stored if the run has none.

    Raises:
        UserError: the epoch has no checkpoint, or the validation data is missing or not the run's.
        RunError: the checkpoint is damaged.
    """
    return evaluate(run, epoch).predictions


def evaluate(
    run: Run,
    epoch: int,
    begin: Callable[[int], None] | None = None,
    seen: Callable[[int, Part], None] | None = None,
    root: Path | None = None,
    mirror: bool = False,
) -> Evaluation:
    """`predict`, with metrics.

    Args:
        run: has the checkpoint.
        epoch: counts from 1.
        begin: called with the number of batches before the first.
        seen: called with the number and the predictions of each batch, in order.
        root: where the run's data lies now; None: where it was. It must be the same data, by hash.
        mirror: average probabilities over each image and its mirror image; then nothing is stored or compared.

    Raises:
        UserError, RunError: as `predict`; UserError also where there are no images to mirror.
    """
    from rayexp import workloads
    from rayexp.engine import checkpoint, evaluate, runtime
    from rayexp.engine.group import WorkerGroup

    folder = checkpoint_of(run, epoch)
    if why := broken(folder):
        raise RunError(f"{folder}: {why}")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    config = run.config()
    if config.code:
        provide(config.code, code_of(run.root))
    if root is not None:
        there = config.data.model_copy(update={"root": root.expanduser().resolve()})
        config = config.model_copy(update={"data": there})
    device = runtime.device("cuda" if on_gpu(config) else "cpu")
    with runtime.configure(config, device, config.shards) as configured:
        try:
            workload = workloads.open_workload(config)
        except UserError as error:
            if root is None and config.data.root is not None and not config.data.root.exists():
                moved = f"`rayexp evaluate {run.id}@{epoch} data.root=DIR` takes the data from where it lies now"
                raise UserError(f"{error}; {moved}") from error
            raise
        mirrored = getattr(workload, "mirrored", None)
        if mirror and mirrored is None:
            raise UserError(f"--mirror: {config.workload}, which {run.id} is of, mirrors nothing; allowed for images")
        _same_data(run, workload.describe(), config)
        model = checkpoint.load_model(workload, files).to(configured.device)
        if mirror and mirrored is not None:
            model = mirrored(model)
        if begin is not None:
            begin(workload.val_streams())
        models = [copy.deepcopy(model) for _ in range(configured.replicas)]
        ordered = _InOrder(seen) if seen is not None else None
        predictions = evaluate.predict(workload, models, WorkerGroup(), configured, ordered)
        metrics = workload.metrics(predictions)
        if (test := getattr(workload, "test_metrics", None)) is not None:
            metrics |= configured.run([lambda: test(model, configured.device)])[0]
    weights_sha = checkpoint.decode(files).fields["weights_sha"]
    if mirror:
        return Evaluation(predictions, metrics, weights_sha, stored=False, equal=None, mirrored=True)
    path = run.predictions_path(epoch)
    data = predictions.to_npz()
    missing = not path.exists()
    equal = None
    if missing:
        trained = {record.epoch: record.predictions_sha for record in run.records()}.get(epoch)
        # Another device or other versions round differently; the epoch's record hashes what training stored.
        kept = data if digest(data) == trained else seal_predictions(data, weights_sha)
        write_atomic(path, kept, within=run.root)
    else:
        equal = run.predictions(epoch).same_as(predictions)
    return Evaluation(predictions, metrics, weights_sha, missing, equal)


def _same_data(run: Run, found: Mapping[str, Any], config: ExperimentConfig) -> None:
    """Refuse (UserError) data whose hash is not that of the run's, or whose classes or words have other numbers."""
    wanted, where = run.data(), config.data.root or config.data.name
    if wanted.get("val_sha") and wanted["val_sha"] != found["val_sha"]:
        raise UserError(
            f"data.root: the validation data in {where} is not that of {run.id} "
            f"(sha256 {found['val_sha'][:12]}, the run's {wanted['val_sha'][:12]})"
        )
    for key, entries in (("classes", "classes"), ("vocabulary", "words")):
        if key in wanted and _ids(wanted[key]) != _ids(found.get(key, [])):
            raise UserError(f"data.root: the {entries} in {where} are not those of {run.id}, in the same order")


def _ids(entries: Sequence[Any]) -> list[str]:
    """The words of a vocabulary, or the ids of classes (the name of a class may change)."""
    return [entry if isinstance(entry, str) else str(entry[0]) for entry in entries]


class _InOrder:
    """Hands batches on in their order, whichever replica finishes first."""

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
