"""The lines of pytorch/examples' imagenet/main.py (AverageMeter, ProgressMeter), so that scripts read them unchanged.

Test: [ 1/40]	Time  0.412 ( 0.412)	Loss 1.9142e+00 (1.9142e+00)	Acc@1  52.34 ( 52.34)	Acc@5  79.30 ( 79.30)
 * Acc@1 48.730 Acc@5 75.300
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from rayexp.display import figure


class Meter:
    """The last value and the mean so far, weighted."""

    def __init__(self, name: str, form: str) -> None:
        self.name, self.form = name, form
        self.last = self.sum = 0.0
        self.count = 0

    def update(self, value: float, n: int = 1) -> None:
        """One batch's mean value over n samples."""
        self.last = value
        self.sum += value * n
        self.count += n

    @property
    def mean(self) -> float:
        """Over everything so far."""
        return self.sum / self.count

    def __str__(self) -> str:
        return f"{self.name} {figure(self.last, self.form)} ({figure(self.mean, self.form)})"


class Progress:
    """Prints a line, which begins with `head`, for every `every`-th batch and the first.

    On a terminal of `width` columns a line has spaces instead of tabs, and less on it where it would be broken: first
    the time goes, then the loss.
    """

    def __init__(self, every: int, width: int | None = None, head: str = "Test") -> None:
        self.every, self.width, self.head, self.batches = every, width, head, 0
        self.time = Meter("Time", "6.3f")
        self.loss = Meter("Loss", ".4e")
        self.acc1, self.acc5 = Meter("Acc@1", "6.2f"), Meter("Acc@5", "6.2f")
        self.then = time.perf_counter()

    def begin(self, batches: int) -> None:
        """How many batches there will be; the clock starts."""
        self.batches, self.then = batches, time.perf_counter()

    def seen(self, batch: int, part: Mapping[str, NDArray[Any]]) -> None:
        """One batch's arrays (see records.Predictions)."""
        n = len(part["loss"])
        now = time.perf_counter()
        self.time.update(now - self.then)
        self.then = now
        self.loss.update(float(part["loss"].mean()), n)
        meters = [str(self.time), str(self.loss)]
        if "label" in part:
            hits = part["top5"] == part["label"][:, None]
            self.acc1.update(100 * float(hits[:, 0].mean()), n)
            self.acc5.update(100 * float(hits.any(1).mean()), n)
            meters += [str(self.acc1), str(self.acc5)]
        elif "offset" in part:  # of words; other losses are no logarithms of probabilities
            meters.append(f"ppl {_perplexity(self.loss.last)} ({_perplexity(self.loss.mean)})")
        if batch % self.every == 0:
            digits = len(str(self.batches))
            print(self._line([f"{self.head}: [{batch + 1:{digits}d}/{self.batches}]", *meters]), flush=True)

    def _line(self, parts: list[str]) -> str:
        if self.width is None:
            return "\t".join(parts)
        line = "  ".join(parts)
        while len(line) > self.width and len(parts) > 2:
            del parts[1]
            line = "  ".join(parts)
        return line


def summary(metrics: Mapping[str, float]) -> str:
    """` * Acc@1 48.730 Acc@5 75.300`, or ` * ppl 112.345 test_ppl 108.111`; all metrics of one's own."""
    names = {"acc1": "Acc@1", "acc5": "Acc@5", "ppl": "ppl", "test_ppl": "test_ppl"}
    if names.keys().isdisjoint(metrics):
        names = {name: name for name in metrics}
    return " ".join([" *", *(f"{names[name]} {figure(metrics[name], '.3f')}" for name in names if name in metrics)])


def _perplexity(loss: float) -> str:
    return figure(math.inf if loss >= 700 else math.exp(loss), "8.2f")
