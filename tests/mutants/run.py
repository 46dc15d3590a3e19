"""A mutation run: `make mutants`, or

    python tests/mutants/run.py [--since REV] [--files GLOB ...] [--names GLOB ...] [--jobs 2] [--listed | --mechanical]

Each mutant's tests run in a process that is forked from this one, which has torch imported but nothing of rayexp: a
start costs no import of torch. The working tree is never touched: every job has a copy of it, in which one file is
changed at a time. A whole run writes RESULT.md; one of a part prints only.

Exit code 1: less than 90 % are killed, or a survivor has no reason in survivors.toml.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import datetime
import fnmatch
import os
import platform
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutants import HERE, Mutant, listed, mechanical, targets

ROOT = HERE.parents[1]
GOAL = 90.0
EQUIVALENT = "equivalent: "
"""What the reason of a survivor begins with that no test can tell from the original."""
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant (None: of the code as it is)."""

    mutant: Mutant | None
    tests: tuple[str, ...]
    verdict: str
    seconds: float
    tail: str


@dataclass
class Job:
    """A process under way in a slot's copy."""

    mutant: Mutant | None
    tests: tuple[str, ...]
    pid: int
    began: float
    limit: float


class Slot:
    """A copy of the working tree in which one mutant at a time is tried."""

    def __init__(self, number: int, top: Path) -> None:
        self.home = top / f"tree{number}"
        self.log = top / f"log{number}"
        self.job: Job | None = None
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.cores = set(cores[number % len(cores) :][:1]) if cores else set()
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (self.home / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.home / name)
        # Bytecode that is checked by its source's hash: a time stamp does not tell two mutants of one second apart.
        compileall.compile_dir(
            self.home / "rayexp", quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
        )

    def start(self, mutant: Mutant | None, tests: tuple[str, ...], limit: float) -> None:
        """Change the file, and fork."""
        if mutant is not None:
            (self.home / mutant.file).write_text(mutant.text, encoding="utf-8")
        pid = os.fork()
        if pid == 0:
            _child(self.home, self.log, tests, self.cores)
        self.job = Job(mutant, tests, pid, time.monotonic(), limit)

    def poll(self) -> Outcome | None:
        """The outcome, once there is one; the file is put back."""
        assert self.job is not None
        job, seconds = self.job, time.monotonic() - self.job.began
        pid, status = os.waitpid(job.pid, os.WNOHANG)
        if not pid and seconds < job.limit:
            return None
        # The whole session: tests start processes too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        if not pid:
            os.waitpid(job.pid, 0)
        self.job = None
        if job.mutant is not None:
            shutil.copyfile(ROOT / job.mutant.file, self.home / job.mutant.file)
        shutil.rmtree(self.home / ".tmp", ignore_errors=True)
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        code = os.waitstatus_to_exitcode(status) if pid else None
        if code in (4, 5, 77):
            raise SystemExit(f"pytest could not run the tests of {job.mutant and job.mutant.id} (code {code}):\n{tail}")
        return Outcome(job.mutant, job.tests, TIMEOUT if code is None else KILLED if code else SURVIVED, seconds, tail)


def _child(home: Path, log: Path, tests: Sequence[str], cores: set[int]) -> None:
    """Run the tests on the copy, in a session and on a core of its own; never returns."""
    code = 77
    try:
        os.setsid()
        if cores:  # threads of two jobs that wait for each other on two cores take many times as long
            os.sched_setaffinity(0, cores)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(home)
        sys.path.insert(0, str(home))
        os.environ["PYTHONPATH"] = str(home)
        import hypothesis
        import pytest

        # The first failure is enough, and the same examples each time.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutants", phases=phases, database=None, derandomize=True, deadline=None)
        hypothesis.settings.load_profile("mutants")
        words = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", f"--basetemp={home / '.tmp'}"]
        code = int(pytest.main([*words, "-m", "not (ray or slow or netns or browser or gpu)", *tests]))
        import rayexp

        if not str(rayexp.__file__).startswith(str(home)):
            code = 77
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        print(repr(error))
        code = 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def warm_up() -> None:
    """Import what the tests import, but for rayexp. No thread may be started: a fork would leave it behind."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's and SciPy's
    import hypothesis
    import numpy
    import PIL.Image
    import pydantic
    import pytest
    import scipy.stats
    import torch
    import torchvision
    import yaml

    for module in (hypothesis, numpy, PIL.Image, pydantic, pytest, scipy.stats, torchvision, yaml):
        assert module
    torch.set_num_threads(1)
    assert "rayexp" not in sys.modules
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1


def run(wanted: Sequence[tuple[Mutant | None, tuple[str, ...], float]], jobs: int, top: Path) -> list[Outcome]:
    """Try all, some side by side, and say so."""
    slots, queue, found = [Slot(i, top) for i in range(jobs)], list(wanted), []
    while queue or any(slot.job for slot in slots):
        for slot in slots:
            if slot.job is None and queue:
                slot.start(*queue.pop(0))
            elif slot.job is not None and (outcome := slot.poll()):
                found.append(outcome)
                name = outcome.mutant.id if outcome.mutant else "as it is"
                print(f"{len(found):4}/{len(wanted)} {outcome.verdict:8} {outcome.seconds:5.1f} s  {name}", flush=True)
        time.sleep(0.02)
    return found


def changed_since(revision: str) -> set[str]:
    """Files that differ from a revision."""
    words = ["git", "diff", "--name-only", revision, "--"]
    new = ["git", "ls-files", "-o", "--exclude-standard"]
    return {
        line
        for command in (words, new)
        for line in subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.splitlines()
    }


def report(outcomes: Sequence[Outcome], reasons: dict[str, str]) -> tuple[str, float, list[str]]:
    """The table and the survivors as Markdown, the score, and what lacks a reason."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        assert outcome.mutant is not None
        rows.setdefault(outcome.mutant.file, []).append(outcome)
    lines = [
        "| file | listed slips killed | mechanical mutants killed | of these by time-out | equivalent |",
        "| --- | --- | --- | --- | --- |",
    ]
    total = [0, 0, 0, 0, 0, 0]

    def cells(counts: Sequence[int]) -> str:
        return f"{counts[0]} of {counts[1]} | {counts[2]} of {counts[3]} | {counts[4]} | {counts[5]}"

    for file, found in sorted(rows.items()):
        counts = [0, 0, 0, 0, 0, 0]
        for outcome in found:
            assert outcome.mutant is not None
            at = 0 if outcome.mutant.listed else 2
            counts[at] += outcome.verdict != SURVIVED
            counts[at + 1] += 1
            counts[4] += outcome.verdict == TIMEOUT
            counts[5] += outcome.verdict == SURVIVED and reasons.get(outcome.mutant.id, "").startswith(EQUIVALENT)
        total = [a + b for a, b in zip(total, counts, strict=True)]
        lines.append(f"| {file} | {cells(counts)} |")
    lines.append(f"| all | {cells(total)} |")
    killed, count, same = total[0] + total[2], total[1] + total[3], total[5]
    score = 100 * killed / max(1, count - same)
    lines += [
        "",
        f"{killed} of {count} killed ({100 * killed / max(1, count):.1f} %); "
        f"without {same} that are equivalent: {score:.1f} %.",
        "",
    ]
    survivors = sorted(o.mutant.id for o in outcomes if o.mutant and o.verdict == SURVIVED)
    bare = [name for name in survivors if name not in reasons]
    lines += [f"- `{name}`: {reasons.get(name, '**no reason yet**')}" for name in survivors]
    return "\n".join(lines), score, bare


def main() -> int:
    """See above."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    words.add_argument("--since", help="only files that changed since this revision, or whose tests did")
    words.add_argument("--files", nargs="+", default=["*"], help="patterns of files")
    words.add_argument("--names", nargs="+", default=["*"], help="patterns of mutants' names")
    words.add_argument("--jobs", type=int, default=2)
    words.add_argument("--list", action="store_true", help="only print the mutants")
    words.add_argument("--fraction", type=float, default=1.0, help="a part of them, for a quick look")
    kinds = words.add_mutually_exclusive_group()
    kinds.add_argument("--listed", action="store_true")
    kinds.add_argument("--mechanical", action="store_true")
    said = words.parse_args()

    mutants = [] if said.mechanical else listed(ROOT)
    mutants += [] if said.listed else [m for t in targets().values() for m in mechanical(ROOT, t)]
    everything = len(mutants)
    if said.since:
        new = changed_since(said.since)
        mutants = [m for m in mutants if m.file in new or any(t.split("::")[0] in new for t in m.tests)]
    mutants = [m for m in mutants if any(fnmatch.fnmatch(m.file, p) for p in said.files)]
    mutants = [m for m in mutants if any(fnmatch.fnmatch(m.name, p) for p in said.names)]
    step = 1 / said.fraction
    mutants = [mutants[int(i * step)] for i in range(int(len(mutants) * said.fraction))]
    if said.list:
        print("\n".join(m.id for m in mutants))
        return 0
    if not mutants:
        print("no mutants of what changed")
        return 0
    warm_up()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as top:
        sets = sorted({m.tests for m in mutants})
        plain = run([(None, tests, 1200.0) for tests in sets], said.jobs, Path(top))
        for outcome in plain:
            if outcome.verdict != SURVIVED:
                print(outcome.tail)
                print("the tests fail on the code as it is")
                return 1
        # A test that waits for ever is stopped; a busy machine is not mistaken for one.
        limits = {o.tests: max(120.0, 6 * o.seconds) for o in plain}
        outcomes = run([(m, m.tests, limits[m.tests]) for m in mutants], said.jobs, Path(top))
    reasons = tomllib.loads((HERE / "survivors.toml").read_text(encoding="utf-8"))
    table, score, bare = report(outcomes, reasons)
    took = (time.monotonic() - began) / 60
    print(table)
    if len(mutants) == everything and not (said.listed or said.mechanical):
        gone = sorted(set(reasons) - {m.id for m in mutants})
        print("\n".join(f"survivors.toml: no such mutant any more: {name}" for name in gone))
        data = "with" if os.environ.get("RAYEXP_TEST_DATA") else "without"
        head = (
            "# The last whole mutation run\n\n"
            "`make mutants` writes this file; mutants.py says what the mutants are, survivors.toml why some live.\n\n"
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}, {said.jobs} at a time, {took:.0f} minutes, "
            f"{data} RAYEXP_TEST_DATA.\n\n"
        )
        (HERE / "RESULT.md").write_text(f"{head}{table}\n", encoding="utf-8")
    return int(score < GOAL or bool(bare))


if __name__ == "__main__":
    sys.exit(main())
