"""How cores are shared out among the shards of a batch. Plain arithmetic.

A shard is computed by a replica, which has a number of threads. That number enters the bits of a result, since it says
how sums are split; it is decided once in the life of a run. The number of replicas side by side enters nothing but the
time a step takes, and every worker decides it from the cores that it has at present.
"""

from __future__ import annotations

PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""For the environment of a process, before PyTorch is imported: threads that wait for the others of their shard sleep.
Otherwise they spin, and beside other busy processes a step takes eight times as long, or more."""


def threads_per_shard(cores: float, shards: int) -> int:
    """Threads of each shard, at least 1, where this many cores are there for this many shards."""
    return max(1, int(cores // shards))


def replicas(cores: float, threads: int, shards: int) -> int:
    """How many replicas a worker runs side by side, from 1 to the number of its shards: as many as its cores hold.

    Args:
        cores: of the worker.
        threads: of each replica. More of them than there are cores take turns.
        shards: that the worker computes in a step.
    """
    return max(1, min(int(cores // threads), shards))
