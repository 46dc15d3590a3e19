"""Check once, before the first step, whether the workers of a run may train it together.

`exact` promises the same bits whoever computes a shard, so it refuses workers whose kernels round differently, by name.
`ddp` makes no such promise and only warns. Both need the same initial weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rayexp.config import ExperimentConfig
from rayexp.engine.fingerprint import differences
from rayexp.engine.group import WorkerGroup
from rayexp.errors import UserError

NAMED = 3  # groups of workers that a line names; the rest is counted


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker tells all others about itself.

    Attributes:
        rank: its rank.
        host: the name of its machine.
        fingerprint: what its bits depend on (engine.fingerprint).
        weights_sha: the hash of its initial weights.
    """

    rank: int
    host: str
    fingerprint: Mapping[str, Any]
    weights_sha: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        return {"rank": self.rank, "host": self.host, "fingerprint": dict(self.fingerprint)}


def everyone(group: WorkerGroup, host: str, fingerprint: Mapping[str, Any], weights_sha: str) -> list[WorkerInfo]:
    """All workers, by rank; every worker must call it."""
    mine = WorkerInfo(group.rank, host, fingerprint, weights_sha)
    return [WorkerInfo(**json.loads(part)) for part in group.gather(json.dumps(asdict(mine)).encode())]


def unlike(workers: Sequence[WorkerInfo]) -> str | None:
    """Which workers have another fingerprint than most, and where it differs; None if all have the same."""
    kinds: list[list[WorkerInfo]] = []
    for worker in workers:
        kind = next((k for k in kinds if k[0].fingerprint == worker.fingerprint), None)
        if kind is None:
            kinds.append([worker])
        else:
            kind.append(worker)
    usual = max(kinds, key=len)  # of two as large the first, which has the lower rank
    others = [kind for kind in kinds if kind is not usual]
    if not others:
        return None
    prints = [", ".join(differences(usual[0].fingerprint, kind[0].fingerprint)) for kind in others[:NAMED]]
    named = "; ".join(f"{_these(kind)} has {found}" for kind, found in zip(others, prints, strict=False))
    more = f"; and {len(others) - NAMED} kinds more" if len(others) > NAMED else ""
    return f"{named} as {_these(usual)}{more}"


def unlike_weights(workers: Sequence[WorkerInfo]) -> str | None:
    """Which worker has other initial weights than rank 0; None if all have the same."""
    other = next((worker for worker in workers if worker.weights_sha != workers[0].weights_sha), None)
    if other is None:
        return None
    mine, others = workers[0].weights_sha[:12], other.weights_sha[:12]
    return f"{other} starts from other weights ({others}) than {workers[0]} ({mine})"


def _these(kind: Sequence[WorkerInfo]) -> str:
    return str(kind[0]) + (f" (and {len(kind) - 1} more)" if len(kind) > 1 else "")


def refuse_other_data(config: ExperimentConfig, before: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
    """Refuse (UserError) other data than a checkpoint was trained on; hashes by name, None where it has none."""
    if before is not None and before != now:
        changed = [key for key in now if before.get(key) != now[key]]
        differs = ", ".join(f"{key} {str(before.get(key))[:12]} -> {now[key][:12]}" for key in changed)
        raise UserError(f"data: {config.data.root or config.data.name} does not hold the data of this run ({differs})")
