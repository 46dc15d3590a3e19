"""The order of samples and the random draws: pure functions of (seed, purpose, epoch, ...).

Nothing here keeps state or knows the number of workers, so a resume at step k computes where it stands and replays
nothing. All draws come from splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"),
written here in integer arithmetic: they are the same on every machine and with every version of every library.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit key for one purpose: `key(seed, "dropout", epoch, step, shard)`."""
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64, element by element: uint64 of any shape."""
    with np.errstate(over="ignore"):
        z = values * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        return z ^ (z >> np.uint64(31))


def uniform(key: int, samples: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """`draws` uniform numbers in [0, 1) for each of the samples int64[n]: float64[n, draws], a function of (key,
    sample) alone."""
    with np.errstate(over="ignore"):
        start = mix(samples.astype(np.uint64) + np.uint64(1)) ^ mix(np.full(1, key, np.uint64))
        counters: NDArray[np.uint64] = np.arange(1, draws + 1).astype(np.uint64)
        words = mix(np.add(mix(start)[:, None], counters, dtype=np.uint64))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix_on(values: Tensor) -> Tensor:
    """`mix` on the values' device: int64 of any shape, whose bits are those of the uint64."""
    # int64 products wrap around like uint64 ones; only the shift must be told not to repeat the sign.
    z = values * _signed(_GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(_MIX1)
    z = (z ^ _shifted(z, 27)) * _signed(_MIX2)
    return z ^ _shifted(z, 31)


def uniform_on(key: Tensor, samples: Tensor, draws: int) -> Tensor:
    """`uniform` on the samples' device, with the same bits.

    Nothing waits for the device and nothing comes from the host, so that a CUDA graph can hold it and find another key
    and other samples at every replay.

    Args:
        key: int64[], on the device.
        samples: int64[n], on the device.
        draws: numbers for each sample.

    Returns:
        float64[n, draws].
    """
    mixed = mix_on(torch.cat([samples + 1, key.reshape(1)]))  # in one go: on a small tensor each operation counts
    start = mix_on(mixed[:-1] ^ mixed[-1])
    counters = torch.arange(1, draws + 1, device=samples.device)
    words = mix_on(start[:, None] + counters)
    return _shifted(words, 11).double() * 2.0**-53


def _signed(value: np.uint64) -> int:
    """The number with the same bits in int64."""
    return int(value.view(np.int64))


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shifted right by so many bits, with zeros coming in from the left."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of the n training samples in an epoch: int64[n], found by sorting random 64-bit integers."""
    with np.errstate(over="ignore"):
        words = mix(mix(np.arange(n, dtype=np.uint64)) ^ mix(np.full(1, key(seed, "order", epoch), np.uint64)))
    return np.argsort(words, kind="stable")


@dataclass(frozen=True, slots=True)
class Cut:
    """How the samples of an epoch are cut into batches and shards.

    Every sample comes exactly once an epoch. Where the last batch is too small to give every shard two samples (batch
    statistics need two), its samples join the batch before it; the shards of a batch are equal up to one sample.

    Attributes:
        n: number of samples.
        batch_size: samples of a batch.
        shards: shards of a batch.
    """

    n: int
    batch_size: int
    shards: int

    @property
    def steps(self) -> int:
        """Batches of an epoch, at least 1."""
        whole, rest = divmod(self.n, self.batch_size)
        return max(1, whole + (rest >= 2 * self.shards))

    def batch(self, step: int) -> range:
        """Positions (in the permuted order) of a step's batch."""
        last = step == self.steps - 1
        return range(step * self.batch_size, self.n if last else (step + 1) * self.batch_size)

    def sizes(self, step: int, shards: range) -> tuple[int, ...]:
        """Samples in each of these shards of a step's batch."""
        base, extra = divmod(len(self.batch(step)), self.shards)
        return tuple(base + (shard < extra) for shard in shards)

    def positions(self, step: int, shards: range) -> range:
        """Positions (in the permuted order) of consecutive shards of a step's batch."""
        start = self.batch(step).start + sum(self.sizes(step, range(shards.start)))
        return range(start, start + sum(self.sizes(step, shards)))


def share(count: int, parts: int, part: int) -> range:
    """Part number `part` of range(count) cut into `parts` consecutive, nearly equal parts."""
    base, extra = divmod(count, parts)
    start = part * base + min(part, extra)
    return range(start, start + base + (part < extra))
