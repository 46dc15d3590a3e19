"""Two checkpoints that judged the same validation data, read from their run directories."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.config.identity import code_content, flat
from rayexp.errors import UserError
from rayexp.runs.integrity import predictions_fault
from rayexp.runs.records import Predictions
from rayexp.runs.run import Run


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run's epoch with its stored judgements. `weights_sha` is empty where nothing recorded it."""

    run: Run
    epoch: int
    predictions: Predictions
    weights_sha: str

    @property
    def name(self) -> str:
        """`20250102T030405Z-resnet-ab12@7`"""
        return f"{self.run.id}@{self.epoch}"

    def to_json(self) -> dict[str, Any]:
        """Run, epoch and weights."""
        return {"run": self.run.id, "epoch": self.epoch, "weights_sha": self.weights_sha}


def read(run: Run, epoch: int) -> Checkpoint:
    """Read one checkpoint's stored predictions.

    Raises:
        UserError: there are none, or they are damaged, or not those of that epoch.
    """
    record = next((record for record in run.records() if record.epoch == epoch), None)
    path = run.predictions_path(epoch)
    if record and record.predictions_sha and path.is_file() and (fault := predictions_fault(path, record)):
        raise UserError(f"{path}: {fault}; remove it, and `rayexp evaluate {run.id}@{epoch}` makes it anew")
    return Checkpoint(run, epoch, run.predictions(epoch), weights_sha(run, epoch))


def read_pair(a: tuple[Run, int], b: tuple[Run, int]) -> tuple[Checkpoint, Checkpoint]:
    """Read two checkpoints and make sure that they may be compared.

    Raises:
        UserError: predictions are missing or damaged, they are of different kinds, or they are of different
            validation data.
    """
    first, second = read(*a), read(*b)
    check(first, second)
    return first, second


def check(a: Checkpoint, b: Checkpoint) -> None:
    """Refuse what cannot be compared (UserError)."""
    p, q = a.predictions, b.predictions
    if p.kind != q.kind:
        raise UserError(f"{a.name} judged {p.kind} and {b.name} judged {q.kind}: there is nothing to compare")
    if p.kind not in POSITION:
        raise UserError(f"{a.name}: predictions of unknown kind {p.kind!r}; allowed: {', '.join(POSITION)}")
    if p.data_sha != q.data_sha:
        raise UserError(
            f"{a.name} and {b.name} judged different validation data "
            f"(data_sha {p.data_sha[:12]}, n {len(p):,}; {q.data_sha[:12]}, n {len(q):,}); "
            "compare runs of the same data and the same data.max_val_* and data.image_size"
        )
    for checkpoint in (a, b):
        _check_rows(checkpoint)
    position = POSITION[p.kind]
    if not np.array_equal(p[position], q[position]):
        raise UserError(
            f"{a.name} and {b.name} judged different parts of the validation data "
            f"({len(p):,} and {len(q):,} rows); `rayexp evaluate` makes both anew after their files are removed"
        )


POSITION = {"images": "index", "tokens": "offset", "samples": "index"}
COLUMNS = {
    "images": ("index", "label", "top5", "confidence", "loss"),
    "tokens": ("offset", "token", "loss"),
    "samples": ("index", "loss"),
}


def _check_rows(checkpoint: Checkpoint) -> None:
    p = checkpoint.predictions
    path = checkpoint.run.predictions_path(checkpoint.epoch)
    missing = [name for name in COLUMNS[p.kind] if name not in p.arrays]
    if missing:
        raise UserError(f"{path}: the array {missing[0]!r} is missing; expected {', '.join(COLUMNS[p.kind])}")
    lengths = {len(p[name]) for name in COLUMNS[p.kind]}
    if len(lengths) != 1 or 0 in lengths:
        raise UserError(f"{path}: the arrays are empty or of unequal length ({sorted(lengths)})")
    if p.kind == "images" and (p["top5"].ndim != 2 or not p["top5"].shape[1]):
        raise UserError(f"{path}: top5 has shape {p['top5'].shape}; expected (images, 1 to 5)")
    if np.any(np.diff(p[POSITION[p.kind]]) <= 0):
        raise UserError(f"{path}: {POSITION[p.kind]} does not rise strictly")


def top1(predictions: Predictions) -> NDArray[np.int64]:
    """int64[n]: the first of the five classes; -1, which is no class, where the output is not finite."""
    return np.where(predictions.finite, predictions["top5"][:, 0], -1).astype(np.int64)


def same_model(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both sides have the same weights, bit for bit."""
    return bool(a.weights_sha) and a.weights_sha == b.weights_sha


def equal(a: Checkpoint, b: Checkpoint, churn: int) -> bool:
    """Whether both say the same of every sample: the same bits, or the same weights and no changed judgement (other
    devices round losses differently). What is not finite is equal to nothing.

    Args:
        churn: judgements that changed.
    """
    p, q = a.predictions, b.predictions
    if not (p.finite.all() and q.finite.all()):
        return False
    return p.same_as(q) or (same_model(a, b) and churn == 0)


def weights_sha(run: Run, epoch: int) -> str:
    """The hash of an epoch's weights, from epochs.jsonl or from the checkpoint's state.json."""
    for record in run.records():
        if record.epoch == epoch and record.weights_sha:
            return record.weights_sha
    try:
        return str(json.loads((run.checkpoint(epoch) / "state.json").read_bytes())["weights_sha"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def config_changes(a: Checkpoint, b: Checkpoint) -> list[tuple[str, Any, Any]]:
    """The configuration's dotted keys in which two runs differ, with both values; names and places are left out."""
    if a.run.root == b.run.root:
        return []
    configs = [side.run.config() for side in (a, b)]
    # Of code that travels, the content counts: each run has a copy of its own.
    first, second = ({**flat(c.model_dump(mode="json")), "code": code_content(c)} for c in configs)
    keys = [*first, *(k for k in second if k not in first)]
    skipped = ("name", "storage_path", "data.root")
    return [(k, first.get(k), second.get(k)) for k in keys if k not in skipped and first.get(k) != second.get(k)]
