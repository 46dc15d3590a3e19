"""The figures of the reports, as SVG text to be set into a page. Readable in print and without colour."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.runs.records import PHASES, EpochRecord

# Okabe and Ito's palette, which survives colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#F0E442")
# The same for the phases, in an order that alternates dark and light, so that neighbours differ in grey too.
PHASE_COLOURS = ("#0072B2", "#F0E442", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#555555", "#BBBBBB")
INK, GRID, PAPER, PALE = "#17191e", "#d5d9e0", "#ffffff", "#cfe3f3"
# What a page that is dark shows in place of a colour; it has a variable for each, `--ink-0072b2`.
DARK = {
    INK: "#e8eaee", GRID: "#363b45", PAPER: "#14161a", PALE: "#1f4766", "#0072B2": "#4aa3df", "#009E73": "#2bbf94",
    "#D55E00": "#f5843f", "#CC79A7": "#de93be", "#8C8C8C": "#a4abb8", "#555555": "#7d8490", "#BBBBBB": "#cfd3da",
}  # fmt: skip
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
NATS = "loss (nats)"  # what an axis says of a cross-entropy
WIDE, NARROW = 9.6, 4.0  # inches: a figure across a page, and across a telephone's
NAMED = 48  # classes whose names find room at a heat map's axes
LABEL = 24  # characters of such a name
POINTS = 1000  # of a curve over the steps; of longer runs, each is a mean
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


def draw(
    name: str,
    height: float,
    fill: Callable[[Any], None],
    panels: int = 1,
    width: float = WIDE,
    narrow_height: float | None = None,
) -> str:
    """Two SVGs of what `fill` draws, one for a page's width and one for a telephone's, of which the page shows one.

    They have no ground, and the page's colours.

    Args:
        name: keeps the ids of a figure apart from those of others on the page, and is that of its caption.
        height: in inches, of a panel.
        fill: is given the axes, a list of them where there are several panels; called twice.
        panels: how many axes; as many in a row as there is room for.
        width: in inches, where a figure does not want all of WIDE.
        narrow_height: of a panel on a telephone.
    """
    columns = panels if panels <= 3 else 2 if panels == 4 else 3
    wide = _svg(f"{name}-wide", (width, height), fill, panels, columns)
    narrow = _svg(f"{name}-narrow", (NARROW, narrow_height or height), fill, panels, 1)
    share = f' style="max-width:{100 * width / WIDE:.0f}%"' if width < WIDE else ""
    return (
        wide.replace("<svg", f'<svg role="img" aria-labelledby="{name}" class="for-wide"{share}', 1)
        + "\n"
        + narrow.replace("<svg", f'<svg role="img" aria-labelledby="{name}" class="for-narrow"', 1)
    )


def _svg(salt: str, size: tuple[float, float], fill: Callable[[Any], None], panels: int, columns: int) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(size[0], rows * size[1]), layout="constrained")
        FigureCanvasSVG(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for unused in axes[panels:]:
            unused.set_visible(False)
        fill(axes[0] if panels == 1 else axes[:panels])
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    return re.sub(r"#[0-9a-f]{6}(?=[;\"])", _variable, text[text.index("<svg") :])


def _variable(found: re.Match[str]) -> str:
    return f"var({variable(found[0])}, {found[0]})" if found[0] in _THEMED else found[0]


def variable(colour: str) -> str:
    """The name of the CSS variable that stands for a colour of a figure."""
    return f"--ink-{colour[1:].lower()}"


_THEMED = frozenset(colour.lower() for colour in DARK)


def narrow(ax: Any) -> bool:
    """Whether the axes are those of a telephone's figure."""
    return bool(ax.figure.get_figwidth() <= NARROW)


def legend(ax: Any) -> None:
    """A legend that covers nothing: to the right of the axes, below them on a telephone."""
    place = "outside lower center" if narrow(ax) else "outside right upper"
    ax.figure.legend(*ax.get_legend_handles_labels(), loc=place, fontsize=8.5)


def name_rows(ax: Any, names: Sequence[str]) -> None:
    """Name the horizontal bars at 0, 1, ..., the first on top: beside them, or on a telephone above them."""
    ax.grid(visible=False, axis="y")
    if not narrow(ax):
        ax.set_yticks(range(len(names)), [textwrap.fill(name, 40) for name in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
        return
    ax.set_yticks([])
    ax.set_ylim(len(names) - 0.7, -1)
    for y, name in enumerate(names):
        ax.text(0, y - 0.26, textwrap.fill(name, 46), va="bottom", fontsize=8.5, linespacing=1.0)


def bar_height(ax: Any) -> float:
    """Of horizontal bars that stand one apart."""
    return 0.44 if narrow(ax) else 0.64


def rows_height(count: int, extra: float) -> tuple[float, float]:
    """The heights of a figure with so many horizontal bars and `extra` inches of axis and legend: of the wide one, and
    of the narrow one."""
    return extra + 0.3 * count, extra + 0.25 + 0.46 * count


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
                range(len(bars)), values, left=left, height=bar_height(ax), color=PHASE_COLOURS[i], edgecolor=PAPER,
                linewidth=0.5, label=phase,
            )  # fmt: skip
            left += values
        for y, total in enumerate(left):
            ax.text(total, y, f" {short(total)} s", va="center", fontsize=8.5)
        name_rows(ax, labels)
        ax.set_xlim(0, (1.25 if narrow(ax) else 1.1) * longest)
        ax.set_xlabel(axis)
        columns = 3 if narrow(ax) else len(PHASES)
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=8.5)

    wide, high = rows_height(len(bars), 1.0)
    return draw(name, wide, fill, narrow_height=high)


def curves(records: Sequence[EpochRecord], metrics: Sequence[str], loss: str = NATS) -> str:
    """Losses, and each metric on axes of its own, over the epochs.

    Args:
        records: the epochs.
        metrics: names of the metrics to draw, at most five of them.
        loss: what the axis of the losses says.
    """
    epochs = [r.epoch for r in records]
    shown = metrics[:5]

    def fill(axes: Any) -> None:
        losses, *others = np.atleast_1d(axes)
        losses.plot(epochs, [r.train_loss for r in records], "o-", color=COLOURS[0], markersize=4, label="training")
        losses.plot(epochs, [r.val_loss for r in records], "s--", color=COLOURS[3], markersize=4, label="validation")
        if broken := [r.epoch for r in records if not r.finite]:
            where = {"transform": losses.get_xaxis_transform(), "clip_on": False}
            losses.plot(broken, [0.0] * len(broken), "x", color=COLOURS[3], label="not finite", **where)
        losses.set_ylabel(loss)
        losses.legend(fontsize=8.5)
        for i, (ax, name) in enumerate(zip(others, shown, strict=True)):
            values = [r.metrics.get(name, math.nan) for r in records]
            ax.plot(epochs, values, f"{MARKERS[i % len(MARKERS)]}-", color=COLOURS[(2, 4, 1)[i % 3]], markersize=4)
            ax.set_ylabel(metric_label(name))
        for ax in (losses, *others):
            _count_along(ax, "epoch")

    return draw("fig-curves", 2.7, fill, panels=1 + len(shown))


def metric_label(name: str) -> str:
    """What an axis says of a metric."""
    return {"acc1": "acc1 (%)", "acc5": "acc5 (%)", "ppl": "perplexity"}.get(name, name)


def pace(records: Sequence[EpochRecord], unit: str) -> str:
    """Learning rate and throughput over the epochs."""

    def fill(axes: Any) -> None:
        rate, speed = axes
        _over_epochs(rate, records, [r.lr for r in records], "learning rate")
        _over_epochs(speed, records, [r.samples_per_second for r in records], f"{unit} per second")

    return draw("fig-pace", 2.4, fill, panels=2)


def _over_epochs(ax: Any, records: Sequence[EpochRecord], values: Sequence[float], label: str) -> None:
    ax.plot([r.epoch for r in records], values, "o-", color=COLOURS[0], markersize=4)
    ax.set_ylim(0, 1.08 * max(values))
    ax.set_ylabel(label)
    _count_along(ax, "epoch")


def _count_along(ax: Any, what: str) -> None:
    """Whole numbers along the axis, be it one alone."""
    ax.set_xlabel(what)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def step_curves(
    records: Sequence[EpochRecord], lines: Sequence[Mapping[str, Any]], unit: str, loss_label: str = NATS
) -> str:
    """Loss and learning rate over the optimizer steps, with the validation losses, and the throughput over the epochs;
    empty where no step's loss is known.

    Args:
        records: the epochs.
        lines: of steps.jsonl, see `Run.steps`.
        unit: of the throughput.
        loss_label: what the axis of the losses says.
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
        left, middle, right = axes
        left.plot(step, loss, color=COLOURS[5], linewidth=0.8, label="training")
        left.plot(step, smoothed(loss), color=COLOURS[0], linewidth=1.6, label="training, smoothed")
        left.plot(
            list(ends.values()), [r.val_loss for r in records], "s", color=COLOURS[3], markersize=4, label="validation"
        )
        left.set_ylabel(loss_label)
        # A validation loss far above the training's would hide the rest.
        low, high = min([float(loss.min()), *(r.val_loss for r in records if r.finite)]), float(loss.max())
        margin = 0.06 * (high - low) or 0.1
        left.set_ylim(low - margin if low < 0 else max(0.0, low - margin), high + margin)
        left.legend(fontsize=8.5)
        middle.plot(step, lr, color=COLOURS[0])
        middle.set_ylabel("learning rate")
        middle.set_ylim(0, 1.08 * float(lr.max()))
        for ax in (left, middle):
            _count_along(ax, "step")
        _over_epochs(right, records, [r.samples_per_second for r in records], f"{unit} per second")

    return draw("fig-steps", 2.7, fill, panels=3)


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


def heat_map(matrix: NDArray[np.int64], names: Sequence[str]) -> str:
    """Shares of each row (a class's images) by column (predictions), on a scale that shows small ones too.

    Args:
        matrix: int64[classes, classes].
        names: of the classes; they stand at the axes, where there are many every second, third and so on.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # From nothing to full, so that it stands on any ground.
    scale = LinearSegmentedColormap.from_list("share", [(0.1, 0.45, 0.85, 0.0), (0.1, 0.45, 0.85, 1.0)])

    def fill(ax: Any) -> None:
        shown = ax.imshow(share, cmap=scale, norm=PowerNorm(0.5, 0, 1), interpolation="none")
        ax.grid(visible=False)
        ax.set_xlabel("predicted class")
        ax.set_ylabel("class")
        written = range(0, len(names), -(-len(names) // (NAMED // 3 if narrow(ax) else NAMED)) or 1)
        labels = [names[i] if len(names[i]) <= LABEL else f"{names[i][: LABEL - 3].rstrip()}..." for i in written]
        ax.set_xticks(written, labels, rotation=90, fontsize=7)
        ax.set_yticks(written, labels, fontsize=7)
        where = {"location": "bottom", "shrink": 0.9} if narrow(ax) else {"shrink": 0.8}
        ax.figure.colorbar(shown, ax=ax, label="share of the class's images", **where)

    return draw("fig-confusion", 6.0, fill, width=7.6, narrow_height=4.6)


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
