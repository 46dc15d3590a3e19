"""Progress on a terminal: a bar that follows the run directory, and a line for every finished epoch.

The screen reads progress.json and epochs.jsonl, wherever the workers are; nothing is sent to it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexp.display import figure, folded, printable, short
from rayexp.launch.resuming import here
from rayexp.runs.records import EpochRecord, read_lines
from rayexp.runs.residency import residency_of
from rayexp.runs.run import Run

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 0.2
WIDE = 100  # columns of a terminal that have room for all times beside the bar
NARROW = 72  # below, the rate goes, too
ECHO = 3  # columns behind the bar


def show(console: Console | None, text: str) -> None:
    """Print one line on a console, on a terminal folded between words; None: nowhere."""
    with contextlib.suppress(OSError):  # the terminal may have been closed
        if console is not None:
            lines = folded(printable(text, keep="\n"), console.width if console.is_terminal else None)
            console.print(lines, highlight=False, markup=False, soft_wrap=True)


class Screen:
    """Shows one run on a console, from `open` to `close`; with `console` None it shows nothing.

    With `named`, the first line says where the run lies.
    """

    def __init__(self, run: Run, console: Console | None, named: bool = True) -> None:
        self.run, self.console, self.named = run, console, named
        self.shown = len(read_lines(run.epochs_path, EpochRecord.from_json, []))  # a resume mends damaged lines
        self._at = (0, 0)  # the inode of epochs.jsonl, and the bytes of it that have been read
        self.warned: set[str] = set()
        self.begun = False
        self._end = threading.Event()
        self._bar: Any = None
        self._task: Any = None
        self._thread = threading.Thread(target=self._follow, name="screen", daemon=True)

    def say(self, text: str) -> None:
        """One line above the bar."""
        show(self.console, text)

    def phase(self, text: str) -> None:
        """Show what is done before the first step."""
        if self._bar is not None:
            self._bar.update(self._task, description=printable(text))

    def open(self) -> None:
        """Start to follow the run."""
        if self.console is None:
            return
        if self.console.is_terminal:
            self._bar = bar(self.console)
            self._task = self._bar.add_task("starting", total=None, figures="", rate="")
            self._bar.start()
        self._thread.start()

    def close(self) -> None:
        """Show what is new since the last look, and release the terminal."""
        if self.console is None or not self._thread.ident:
            return
        self._end.set()
        self._thread.join()
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(POLL_S)
            # A display must not cost a run, and files are read as they are written.
            with contextlib.suppress(Exception):
                self._begun()
                self._progress()
                if ended:  # a short run may end between two looks
                    self._warn(self.run.meta().get("warnings", ()))
                self._epochs()

    def _begun(self) -> None:
        """As soon as a worker has opened the data, show where the run lies, and which part of the data folder serves as
        which split. (A run that cannot begin is removed, so nothing is said of it.)"""
        if not self.begun and "data" in (meta := self.run.meta()):
            self.begun = True
            if self.named:
                self.say(f"run: {here(self.run.root)}")
            if layout := meta["data"].get("layout"):
                self.say(f"data: {layout}")
            if residency := residency_of(meta):
                self.say(f"samples: {residency}")
            if "summary" in (weights := meta.get("weights") or {}):
                self.say(f"weights: {weights['source']}: {weights['summary']}")
            if frozen := meta.get("frozen"):
                self.say(f"frozen: {frozen:,} of {frozen + meta['parameters']:,} parameters")

    def _progress(self) -> None:
        try:
            at = json.loads(self.run.progress_path.read_bytes())
        except (OSError, ValueError):
            return
        self._warn(at.get("warnings", ()))
        if self._bar is None or "step" not in at:
            return
        done = (at["epoch"] - 1) * at["steps"] + at["step"]
        self._bar.update(
            self._task,
            description=f"epoch {at['epoch']}/{at['epochs']}",
            completed=done,
            total=at["epochs"] * at["steps"],
            figures=f"step {at['step']}/{at['steps']}  loss {_loss(at['loss'])}",
            rate=f"{at['rate']:,.0f} {at['unit']}/s",
        )

    def _warn(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            if warning not in self.warned:
                self.warned.add(warning)
                self.say(f"warning: {warning}")

    def _epochs(self) -> None:
        try:
            file = self.run.epochs_path.open("rb")
        except FileNotFoundError:
            return
        with file:
            inode, read = self._at
            anew = os.fstat(file.fileno()).st_ino != inode
            file.seek(0 if anew else read)
            # A last line without a newline is being written.
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
            self._at = (os.fstat(file.fileno()).st_ino, sum(map(len, lines)) + (0 if anew else read))
        if anew:  # the new file also has the epochs that have been shown
            self.shown = min(self.shown, len(lines))
            lines = lines[self.shown :]
        for line in lines:
            self.shown += 1
            width = self.console.width if self.console is not None and self.console.is_terminal else None
            self.say(epoch_line(EpochRecord.from_json(json.loads(line)), width))


def epoch_line(record: EpochRecord, width: int | None = None) -> str:
    """`epoch 7  train_loss 2.1034  val_loss 2.2001  acc1 48.73  acc5 75.30  412/s  61.2 s  weights 0f3a1234`.

    A terminal of `width` columns (None: no terminal) that is too narrow gets shorter words, then fewer figures: the
    line is never broken.
    """
    train, val = _loss(record.train_loss), _loss(record.val_loss)
    metrics = [f"{name} {figure(value, '.2f')}" for name, value in record.metrics.items()]
    rate, took = f"{record.samples_per_second:,.0f}/s", f"{record.seconds['total']:.1f} s"
    parts = [f"epoch {record.epoch}", f"train_loss {train}", f"val_loss {val}", *metrics, rate, took]
    weights = [f"weights {short(record.weights_sha)}"] if record.weights_sha else []  # a plain script's have no hash
    parts += weights
    goes = [rate, took, *metrics[:0:-1], *weights, parts[1]]  # the first to go first
    line = "  ".join(parts)
    if width is not None and len(line) > width:
        line = "  ".join(part for part in parts if part != rate)
    while width is not None and len(line) > width and goes:
        gone = goes.pop(0)
        parts = [part for part in parts if part != gone]
        line = "  ".join(parts).replace("train_loss", "train").replace("val_loss", "val")
    return line


def _loss(value: float | None) -> str:
    return figure(math.nan if value is None else value, ".4f")


def bar(console: Console) -> Any:
    """A progress bar of rich's; its tasks have the fields `figures` and `rate`.

    It leaves ECHO columns free: a terminal shows a Ctrl-C as `^C` behind it, which would else begin a line of its own,
    and the bar would not find its line again.
    """
    from rich.console import RenderableType
    from rich.constrain import Constrain
    from rich.progress import BarColumn, Progress, TextColumn

    class Bar(Progress):
        def get_renderable(self) -> RenderableType:
            return Constrain(super().get_renderable(), console.width - ECHO)

    plain = console.file is sys.stderr  # otherwise `chatter_to` sends stdout and stderr to a file
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}", markup=False),
        *([TextColumn("{task.fields[rate]}", markup=False)] if console.width >= NARROW else []),
        _times(console.width >= WIDE),
        console=console,
        transient=True,
        redirect_stdout=plain,
        redirect_stderr=plain,
    )


def _times(both: bool) -> Any:
    """A column that says how long it has taken and will take; with `both` False only the latter, where it is known."""
    from rich.progress import ProgressColumn, Task
    from rich.table import Column
    from rich.text import Text

    class Times(ProgressColumn):
        def render(self, task: Task) -> Text:
            elapsed = f"{clock(task.elapsed or 0)} elapsed"
            if task.time_remaining is None:
                return Text(elapsed, no_wrap=True)
            left = f"{clock(task.time_remaining)} left"
            return Text(f"{elapsed}, {left}" if both else left, no_wrap=True)

    return Times(table_column=Column(no_wrap=True))  # the bar gives way instead


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


@contextmanager
def chatter_to(path: Path, console: Console | None) -> Iterator[None]:
    """Send everything that this process and its children write to a file, except what the console shows.

    Ray and its processes write to the file descriptors themselves, so these are redirected. Outside the main thread
    nothing is done: the process then belongs to somebody else, such as a notebook.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    path.parent.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    shown = console is not None and console.file is sys.stderr
    with path.open("a") as log, os.fdopen(os.dup(2), "w") as terminal:
        if console is not None and shown:
            console.file = terminal
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in enumerate(kept, 1):
                os.dup2(saved, number)
                os.close(saved)
            if console is not None and shown:
                console.file = sys.stderr


@contextmanager
def screen(run: Run, console: Console | None) -> Iterator[Screen]:
    """A screen that is open while the block runs."""
    shown = Screen(run, console)
    shown.open()
    try:
        yield shown
    finally:
        shown.close()
