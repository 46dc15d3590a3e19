"""The figures of the reports, as SVG text to be set into a page. Readable in print and without colour."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayexp.runs.records import PHASES, EpochRecord

if TYPE_CHECKING:
    pass

# Okabe and Ito's palette, which survives colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#F0E442")
# The same for the phases, in an order that alternates dark and light, so that neighbours differ in grey too.
PHASE_COLOURS = ("#0072B2", "#F0E442", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#555555", "#BBBBBB")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
WIDTH = 7.2  # inches: a column of the page, and of A4
POINTS = 1000  # of a curve over the steps; of longer runs, each is a mean
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


def draw(name: str, height: float, fill: Callable[[Any], None], columns: int = 1) -> str:
    """An SVG of axes that `fill` draws on; `name` keeps its ids apart from those of other figures on the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        fill(axes[0] if columns == 1 else axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-labelledby="{name}"', 1)


# ---------------------------------------------------------------------- comparison


def short(value: float) -> str:
    """Three figures, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def stacked_bars(name: str, labels: Sequence[str], bars: Sequence[dict[str, float]], axis: str) -> str:
    """A horizontal bar for each label, cut into phases (seconds)."""
    longest = max(sum(bar.values()) for bar in bars) or 1.0
    shown = [p for p in PHASES if any(bar.get(p, 0.0) > 0 for bar in bars)]

    def fill(ax: Any) -> None:
        left = np.zeros(len(bars))
        for phase in shown:
            i = PHASES.index(phase)
            values = np.array([bar.get(phase, 0.0) for bar in bars])
            ax.barh(
                range(len(bars)), values, left=left, height=0.66, color=PHASE_COLOURS[i],
                edgecolor="white", linewidth=0.5, label=phase,
            )  # fmt: skip
            left += values
        for y, total in enumerate(left):
            ax.text(total, y, f" {short(total)} s", va="center", fontsize=8.5)
        ax.set_yticks(range(len(bars)), labels)
        ax.set_ylim(len(bars) - 0.4, -0.6)
        ax.set_xlim(0, 1.13 * longest)
        ax.grid(visible=False, axis="y")
        ax.set_xlabel(axis)
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8.5)

    return draw(name, 1.25 + 0.3 * len(bars), fill)


def curves(records: Sequence[EpochRecord]) -> str:
    """Losses, and accuracies or perplexity, over the epochs."""
    epochs = [r.epoch for r in records]
    names = [n for n in ("acc1", "acc5", "ppl") if n in records[0].metrics] or list(records[0].metrics)

    def fill(axes: Any) -> None:
        left, right = axes
        left.plot(epochs, [r.train_loss for r in records], "o-", color=COLOURS[0], markersize=4, label="training")
        left.plot(epochs, [r.val_loss for r in records], "s--", color=COLOURS[3], markersize=4, label="validation")
        left.set_ylabel("loss (nats)")
        for i, name in enumerate(names):
            values = [r.metrics.get(name, math.nan) for r in records]
            right.plot(
                epochs, values, MARKERS[i] + LINES[i % 4], color=COLOURS[(2, 4, 1)[i % 3]], markersize=4, label=name
            )
        right.set_ylabel("perplexity" if names == ["ppl"] else "accuracy (%)" if "acc1" in names else "metric")
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend(fontsize=8.5)

    return draw("fig-curves", 2.9, fill, columns=2)


def pace(records: Sequence[EpochRecord], unit: str, with_lr: bool) -> str:
    """Throughput over the epochs; `with_lr`: also the learning rate."""
    epochs = [r.epoch for r in records]
    shown = [([r.samples_per_second for r in records], f"{unit} per second")]
    if with_lr:
        shown.insert(0, ([r.lr for r in records], "learning rate"))

    def fill(axes: Any) -> None:
        for ax, (values, label) in zip(np.atleast_1d(axes), shown, strict=True):
            ax.plot(epochs, values, "o-", color=COLOURS[0], markersize=4)
            ax.set_ylim(0, 1.08 * max(values))
            ax.set_ylabel(label)
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)

    return draw("fig-pace", 2.4 if with_lr else 1.9, fill, columns=len(shown))


def step_curves(records: Sequence[EpochRecord], lines: Sequence[Mapping[str, Any]]) -> str:
    """Loss and learning rate over the optimizer steps, with the validation losses; empty where no step's is known.

    Args:
        records: the epochs.
        lines: of steps.jsonl, see `Run.steps`.
    """
    ends = {r.epoch: r.step for r in records}
    found = []
    for line in lines:
        losses, rates = line.get("loss", []), line.get("lr", [])
        begin = ends.get(line["epoch"], 0) - len(losses) + 1
        if line["epoch"] in ends:
            found += [(begin + i, *pair) for i, pair in enumerate(zip(losses, rates, strict=False)) if None not in pair]
    if not found:
        return ""
    step, loss, lr = thinned(np.array(sorted(found), dtype=np.float64))

    def fill(axes: Any) -> None:
        left, right = axes
        left.plot(step, loss, color=COLOURS[5], linewidth=0.8, label="training")
        left.plot(step, smoothed(loss), color=COLOURS[0], linewidth=1.6, label="training, smoothed")
        left.plot(
            list(ends.values()), [r.val_loss for r in records], "s", color=COLOURS[3], markersize=4, label="validation"
        )
        left.set_ylabel("loss (nats)")
        # A validation loss far above the training's would hide the rest.
        low, high = min([float(loss.min()), *(r.val_loss for r in records if r.finite)]), float(loss.max())
        margin = 0.06 * (high - low) or 0.1
        left.set_ylim(max(0.0, low - margin), high + margin)
        left.legend(fontsize=8.5)
        right.plot(step, lr, color=COLOURS[0])
        right.set_ylabel("learning rate")
        right.set_ylim(0, 1.08 * float(lr.max()))
        for ax in axes:
            ax.set_xlabel("step")
            ax.xaxis.get_major_locator().set_params(integer=True)

    return draw("fig-steps", 2.9, fill, columns=2)


def thinned(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most POINTS rows of `points` [n, columns], each the mean of as many neighbours; by column."""
    size = -(-len(points) // POINTS)
    starts = np.arange(0, len(points), size)
    sums = np.add.reduceat(points, starts, axis=0)
    return np.asarray((sums / np.diff(np.append(starts, len(points)))[:, None]).T)


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over a window around each value, a twentieth of all; it is cut off at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], values.cumsum()])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def heat_map(matrix: NDArray[np.int64]) -> str:
    """Shares of each row (a class's images) by column (predictions), on a scale that shows small ones too."""
    from matplotlib.colors import PowerNorm

    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)

    def fill(ax: Any) -> None:
        shown = ax.imshow(share, cmap="magma_r", norm=PowerNorm(0.5, 0, 1), interpolation="none")
        ax.grid(visible=False)
        ax.set_xlabel("predicted class")
        ax.set_ylabel("class")
        ax.figure.colorbar(shown, ax=ax, shrink=0.8, label="share of the class's images")

    return draw("fig-confusion", 5.6, fill)


def run_phases(records: Sequence[EpochRecord]) -> str:
    """Stacked seconds by phase, one bar an epoch; of long runs a selection."""
    picked = records if len(records) <= 30 else [records[round(i)] for i in np.linspace(0, len(records) - 1, 30)]
    bars = [{phase: r.seconds.get(phase, 0.0) for phase in PHASES} for r in picked]
    return stacked_bars("fig-phases", [f"epoch {r.epoch}" for r in picked], bars, "seconds")


def interval_plot(value: float, interval: tuple[float, float], max_drop: float | None) -> dict[str, float | None]:
    """Where to draw estimate, interval, zero and bound, in percent of the plot's width; `scale` is half its width."""
    reach = max(abs(value), abs(interval[0]), abs(interval[1]), max_drop or 0.0, 1e-9) * 1.15

    def place(x: float) -> float:
        return round(50 + 50 * x / reach, 2)

    bound = None if max_drop is None else place(-max_drop)
    return {
        "low": place(interval[0]),
        "high": place(interval[1]),
        "value": place(value),
        "bound": bound,
        "scale": reach,
    }
