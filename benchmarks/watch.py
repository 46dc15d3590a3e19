"""Is the clock of `rayexp compare` honest? A comparison, and a second clock that watches it while it runs.

    python benchmarks/watch.py CONFIG [KEY=VALUE ...]        (as for `rayexp compare`)

This process reads nothing that the engine measures. It polls every cell's progress.json and takes the time at which the
number of finished steps changes; a step's rate is the batch over the time since the change before. The table sets the
median of these beside what the comparison says of the same steps: the same execution by two clocks, so that a machine
whose speed drifts from minute to minute, as clock.py meets it, cannot come between them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from rayexp.grid.comparison import PLAIN, Comparison
from rayexp.grid.measured import read_measured

POLL_S = 0.002


class Watch:
    """Seconds between steps, by the run's directory, as progress.json tells them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[Path, list[float]] = defaultdict(list)
        self._seen: dict[Path, tuple[int, int, int, float]] = {}  # mtime, epoch, step, clock

    def look(self) -> None:
        """See what has changed."""
        for path in self.folder.glob("*/cells/*/progress.json"):
            try:
                changed = path.stat().st_mtime_ns
                if path in self._seen and self._seen[path][0] == changed:
                    continue
                now, words = time.perf_counter(), json.loads(path.read_text())
            except (FileNotFoundError, ValueError):
                continue
            if "step" not in words:
                continue
            _, epoch, step, then = self._seen.get(path, (0, 0, 0, 0.0))
            self._seen[path] = changed, words["epoch"], words["step"], now
            if (words["epoch"], words["step"]) == (epoch, step + 1):
                self.seconds[path.parent].append(now - then)


def main() -> None:
    """Run, watch, print."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        watch = Watch(Path(name))
        command = [sys.executable, "-m", "rayexp", "compare", *sys.argv[1:], f"storage_path={name}"]
        with (Path(name) / "said").open("w") as said:
            running = subprocess.Popen(command, stdout=said, stderr=said)
            while running.poll() is None:
                watch.look()
                time.sleep(POLL_S)
        if running.returncode:
            sys.exit((Path(name) / "said").read_text()[-2000:])
        (root,) = (path for path in Path(name).iterdir() if path.is_dir())
        comparison = Comparison(root)
        rows = comparison.rows()
        print(
            f"{'cell':<24}{'compare':>10}{'watched':>10}{'agree':>8}{'steps':>8}{'phases off by':>15}{'in neither':>12}"
        )
        for m in read_measured(comparison):
            if m.cell.reduction == PLAIN:
                continue
            runs = [comparison.run(row) for row in rows if row.cell == m.cell.id]
            seconds = [s for run in runs if run is not None for s in watch.seconds[run.root]]
            said_rate, watched = m.rate().value, m.cell.config["batch_size"] / statistics.median(seconds)
            off = max(r.unaccounted() for r in m.repeats)
            rest = max(abs(r.shutdown) / r.wall for r in m.repeats)
            rates = f"{said_rate:>10.1f}{watched:>10.1f}{said_rate / watched:>8.3f}{len(seconds):>8}"
            print(f"{m.cell.id:<24}{rates}{100 * off:>13.2f} %{100 * rest:>10.1f} %")


if __name__ == "__main__":
    main()
