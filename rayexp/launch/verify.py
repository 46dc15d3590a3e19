"""Run one configuration at several numbers of workers, and compare the state of every step, tensor by tensor.

Every worker count trains the same first steps and writes the sha256 of every tensor after every step to trace.jsonl.
With `kill`, one more run loses a worker to SIGKILL half way and goes on from its last snapshot. The configuration also
runs with `reduction: ddp`: the difference in speed is the price of exactness, and its weights show the difference.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayexp.config import ExperimentConfig, parse
from rayexp.display import counted
from rayexp.errors import RunError, UserError
from rayexp.launch import processes, starting
from rayexp.launch.driver import run as train
from rayexp.launch.job import WorkerJob
from rayexp.launch.killer import Killer
from rayexp.launch.local import here
from rayexp.launch.placement import Placement, with_threads
from rayexp.launch.resuming import without_advice
from rayexp.launch.screen import chatter_to
from rayexp.launch.trial_screen import TrialScreen, worded
from rayexp.runs.run import Run

if TYPE_CHECKING:
    from rich.console import Console

Launcher = Literal["ray", "processes"]
STEPS = 10


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the configuration.

    Attributes:
        label: `0`, `4`, `4, one killed`.
        workers: the number of workers; 0: in-process.
        steps: the lines of trace.jsonl by step: `step`, `weights_sha`, `tensors` {name: sha256}, `rate` (samples per
            second).
    """

    label: str
    workers: int
    steps: tuple[dict[str, Any], ...]

    @property
    def weights(self) -> str:
        """The hash of the weights after the last step."""
        return str(self.steps[-1]["weights_sha"])

    @property
    def rate(self) -> float:
        """Samples per second, the median over the steps; the first step is left out."""
        return float(statistics.median(step["rate"] for step in self.steps[1:] or self.steps))


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a trial first differs from the reference.

    Attributes:
        label: of the trial.
        step: counts from 1.
        tensor: its name; of the model's, without the prefix `model.`.
    """

    label: str
    step: int
    tensor: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of `verify`.

    Attributes:
        unit: of rates: `images`, `tokens`, `samples`.
        trials: the first is the reference.
        contrast: the same worker counts with `reduction: ddp`; may be empty.
        differences: at most one for each trial but the first.
    """

    unit: str
    trials: tuple[Trial, ...]
    contrast: tuple[Trial, ...]
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether every step of every trial has the same weights and optimizer state."""
        return not self.differences

    def rows(self) -> list[dict[str, Any]]:
        """A row for each trial: workers, weights, rate, and the price against ddp with as many workers."""
        ddp = {trial.workers: trial for trial in self.contrast}
        rows = []
        for trial in self.trials:
            row = {
                "workers": trial.label,
                "weights": trial.weights[:12],
                "equal": not any(d.label == trial.label for d in self.differences),
                f"{self.unit}/s": round(trial.rate, 1),
            }
            if ddp:
                other = ddp.get(trial.workers) if trial.label == str(trial.workers) else None
                row |= {
                    "ddp weights": other and other.weights[:12],
                    f"ddp {self.unit}/s": other and round(other.rate, 1),
                    "price": other and f"{100 * (other.rate / trial.rate - 1):+.1f} %",
                }
            rows.append(row)
        return rows

    def sentence(self) -> str:
        """The answer in one line."""
        steps = len(self.trials[0].steps)
        if self.ok:
            counts = ", ".join(trial.label for trial in self.trials)
            return (
                "equal: weights and optimizer state have the same bits after each of "
                f"{counted(steps, 'step')} (workers: {counts})"
            )
        first = self.differences[0]
        return f"DIFFERENT: workers {first.label}, first at step {first.step}, tensor {first.tensor}"

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return self.to_json()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        differences = [asdict(d) for d in self.differences]
        return {"ok": self.ok, "steps": len(self.trials[0].steps), "rows": self.rows(), "differences": differences}


def verify(
    config: ExperimentConfig,
    workers: Sequence[int],
    *,
    steps: int = STEPS,
    kill: bool = False,
    launcher: Launcher = "ray",
    contrast: bool = True,
    console: Console | None = None,
    guest: bool = False,
) -> Verdict:
    """Compare the worker counts; the first is the reference.

    Args:
        workers: 0 or divisors of `shards`.
        steps: how many steps of training to compare.
        kill: also SIGKILL one worker of a further run half way, and let it go on.
        launcher: `ray`: as `rayexp train` does; `processes`: plain processes of this machine.
        contrast: also run `reduction: ddp`.
        console: where progress is shown; None: nowhere.
        guest: as for `driver.run`.

    Raises:
        UserError: a worker count is not allowed.
        RunError: a run failed.
    """
    if len(set(workers)) < 2:
        raise UserError(f"--workers: comparing needs two or more different counts, got {list(workers)}")
    if kill and max(workers) < 2:
        raise UserError("--kill: a worker can only be lost where there are two or more; add 2 to --workers")
    config = starting.resolved(config)
    configs = {n: _with(config, n) for n in dict.fromkeys(workers)}
    with tempfile.TemporaryDirectory(prefix="rayexp-verify-") as folder:
        beside = contrast and config.reduction == "exact"
        total = len(configs) * (1 + beside) + kill
        bench = _Bench(Path(folder), steps, launcher, TrialScreen(console, Path(folder), total, steps), guest)
        with bench.session(console, any(workers)):
            trials = [bench.run(c, str(n), n, worded(n)) for n, c in configs.items()]
            if kill:
                most = max(n for n in configs if n)
                trials.append(bench.run_killed(configs[most], f"{most}, one killed", most, len(trials[0].steps)))
            others = []
            if beside:
                ddp = {n: c.model_copy(update={"reduction": "ddp"}) for n, c in configs.items()}
                others = [bench.run(c, f"ddp {n}", n, worded(n, "ddp")) for n, c in ddp.items()]
    return Verdict(bench.unit, tuple(trials), tuple(others), tuple(differences(trials)))


def differences(trials: Sequence[Trial]) -> list[Difference]:
    """The first step and tensor of each trial that differ from the first trial's."""
    found = []
    reference = trials[0]
    for trial in trials[1:]:
        for mine, theirs in zip(reference.steps, trial.steps, strict=True):
            if mine["tensors"] != theirs["tensors"]:
                names = list({**mine["tensors"], **theirs["tensors"]})
                first = next(n for n in names if mine["tensors"].get(n) != theirs["tensors"].get(n))
                found.append(Difference(trial.label, int(theirs["step"]), first.removeprefix("model.")))
                break
    return found


def _with(config: ExperimentConfig, workers: int) -> ExperimentConfig:
    """The configuration with that number of workers, all on one kind of device: they share GPUs where there are few."""
    scaling: dict[str, Any] = {"num_workers": workers}
    gpus = here().gpus if config.scaling.use_gpu is not False else 0
    if workers > gpus > 0:
        scaling["gpus_per_worker"] = 1 / math.ceil(workers / gpus)
    tree = config.model_dump(mode="json")
    tree["scaling"] |= scaling
    return parse(tree, ExperimentConfig, "--workers")


class _Bench:
    """Runs trials, each in a run directory that is removed afterwards."""

    def __init__(self, folder: Path, steps: int, launcher: Launcher, screen: TrialScreen, guest: bool) -> None:
        self.folder, self.steps, self.launcher, self.screen, self.guest = folder, steps, launcher, screen, guest
        self.unit = "samples"
        self.killer: Killer | None = None
        self.threads: int | None = None  # of a shard, as the first trial decides it

    @contextlib.contextmanager
    def session(self, console: Console | None, needed: bool) -> Iterator[None]:
        """One Ray for all trials."""
        if self.launcher != "ray" or not needed:
            yield
            return
        with contextlib.nullcontext() if self.guest else chatter_to(self.folder / "ray.log", console):
            from rayexp.launch.on_ray import session

            with session.session(None):
                yield

    def run(self, config: ExperimentConfig, label: str, workers: int, name: str) -> Trial:
        """One trial from start to end; `name`: for the screen."""
        threads = config.threads_per_shard or self.threads
        own = {"storage_path": self.folder, "tracking": (), "threads_per_shard": threads}
        config = config.model_copy(update=own)
        with without_advice(), self.screen.trial(name):
            if workers and self.launcher == "processes":
                made = self._processes(config, workers)
            else:
                made = train(config, argv=["verify"], max_steps=self.steps, trace=True, guest=self.guest)
        self.threads = made.config().threads_per_shard
        trial = self._read(made, label, workers)
        self.screen.ended(name, trial.weights, len(trial.steps), f"{trial.rate:,.0f} {self.unit}/s")
        return trial

    def run_killed(self, config: ExperimentConfig, label: str, workers: int, steps: int) -> Trial:
        """One trial that loses a worker half way; `steps` is the number that the first trial came to."""
        if steps < 2:
            raise UserError("--kill: a worker is killed after a step and before another, and this run has only one")
        checkpoint = config.checkpoint.model_copy(update={"every_steps": 1})
        failures = max(1, config.max_failures)
        config = config.model_copy(update={"checkpoint": checkpoint, "max_failures": failures})
        known = set(self.folder.iterdir())
        with Killer(self.folder, known, steps // 2) as killer:
            self.killer = killer
            trial = self.run(config, label, workers, worded(workers, "one killed"))
        if killer.elsewhere:
            raise RunError(
                f"--kill: all workers were on other hosts ({', '.join(killer.elsewhere)}), and a process can only be "
                f"killed on this one ({socket.gethostname()}); run it where workers are, or with --launcher processes"
            )
        if not killer.pid:
            raise RunError(
                f"no worker could be killed within {counted(steps, 'step')}; "
                "more of them (--steps, epochs, data) give more time"
            )
        self.screen.say(f"  (worker {killer.rank}, pid {killer.pid}, was killed after step {killer.step})")
        return trial

    def _processes(self, config: ExperimentConfig, workers: int) -> Run:
        node = here()
        gpu = node.gpus > 0 and config.scaling.use_gpu is not False
        plan = Placement(workers, gpu, max(1, node.cpus // workers))
        config = with_threads(config, plan, node.cpus)
        weights = starting.read(config)
        made = Run.create(config, argv=["verify"])
        if weights is not None:
            weights.keep(made)
        job = WorkerJob(
            run=made.root.absolute(),
            config=config.absolute(),
            device="cuda" if gpu else "cpu",
            cpus=plan.cpus,
            max_steps=self.steps,
            trace=True,
        )
        for left in reversed(range(config.max_failures + 1)):
            started = processes.start(job, workers)
            try:
                processes.wait(job.run, started)
                return made
            except processes.WorkersFailedError as error:
                # Of a worker that the killer chose, the end may be seen later than what it brings about in the others.
                chosen = self.killer is not None and self.killer.pid in {worker.pid for worker in started}
                if not left or not (error.killed or chosen):
                    raise
        return made

    def _read(self, made: Run, label: str, workers: int) -> Trial:
        self.unit = made.unit()
        rows: dict[int, dict[str, Any]] = {}
        for line in (made.root / "trace.jsonl").read_text().splitlines():
            row = json.loads(line)
            # Steps are done again after a kill, and must give the same bits.
            if rows.setdefault(row["step"], row)["tensors"] != row["tensors"]:
                raise RunError(f"workers {label}: step {row['step']} came to something else when it was done again")
        if sorted(rows) != list(range(1, len(rows) + 1)):
            raise RunError(f"workers {label}: steps are missing from the trace")
        return Trial(label, workers, tuple(rows[step] for step in sorted(rows)))
