"""Compute against communication: what the workers of a cell send each other, how fast, and how much of it is waited
for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rayexp.grid.forecast import Link, exchange_seconds, ring_bytes
from rayexp.grid.measured import Measured


@dataclass(frozen=True, slots=True)
class Communication:
    """The exchange of a step; means over the repeats.

    Attributes:
        volume: bytes that are reduced.
        sent: bytes that each worker sends for that, 2 (n-1)/n of the volume.
        bare: seconds of the same sum alone, measured before training; None where it was not.
        ring: seconds by the ring model, 2 (n-1)/n volume / bandwidth + 2 (n-1) latency, over the link that all cells of
            the family show together; None without a link.
        waited: seconds of a step that are spent waiting for the sum: what does not hide behind the backward pass, and
            waiting for slower workers.
        share: `waited` as a share of the step.
        compute: seconds of data, transfer, forward, backward and optimizer.
    """

    volume: float
    sent: float
    bare: float | None
    ring: float | None
    waited: float
    share: float
    compute: float

    @property
    def bandwidth(self) -> float | None:
        """Effective bytes per second of each worker in the bare sum (what nccl-tests call bus bandwidth)."""
        return self.sent / self.bare if self.bare else None

    @property
    def hidden(self) -> float | None:
        """Share of the bare sum's time that is not waited for in a step."""
        return max(0.0, 1 - self.waited / self.bare) if self.bare else None

    def to_json(self) -> dict[str, Any]:
        """For `--json`: bytes and seconds of a step."""
        return {
            "bytes": self.volume,
            "bytes_sent_per_worker": self.sent,
            "bare_seconds": self.bare,
            "ring_seconds": self.ring,
            "waited_seconds": self.waited,
            "share_of_step": self.share,
            "compute_seconds": self.compute,
            "bytes_per_second": self.bandwidth,
            "hidden_share": self.hidden,
        }


def communication(m: Measured, link: Link | None) -> Communication | None:
    """Of a cell; None with fewer than two workers, or where a run does not say how much it exchanged."""
    n, volume = m.cell.workers, float(m.meta.get("exchange_bytes") or 0)
    if n < 2 or not volume:
        return None
    links = [r.run.meta().get("link") or {} for r in m.repeats]
    bare = float(np.mean([found["seconds"] for found in links])) if all(links) else None
    waited = m.phase_seconds("reduce")
    return Communication(
        volume=volume,
        sent=ring_bytes(n, volume),
        bare=bare,
        ring=None if link is None else exchange_seconds(n, volume, link.bandwidth, link.latency),
        waited=waited,
        share=waited / m.phase_seconds(),
        compute=m.phase_seconds("data", "transfer", "compute", "optimizer"),
    )
