"""Attempts on Ray, one after another, until the run is done: rayexp decides what follows a fault, not Ray.

fault                                      what follows
UserError, RunError of a worker            nothing: it would come again
a worker or a node lost, a hung worker     another attempt, at most `max_failures` times
a node taken away, as it was announced     the workers save before it goes; another attempt, not counted
Ray's head lost, or this host's raylet     the workers save and stop after their step; nothing more: Ray ends too
elastic, and fewer places than before      another attempt with the largest allowed number that can be placed
elastic, and more places than before       the workers save and stop after their step; another attempt, not counted
"""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

from rayexp.cluster import sources
from rayexp.config import ExperimentConfig
from rayexp.display import counted
from rayexp.errors import HeadLostError, RunError, UserError
from rayexp.launch import placement as planning
from rayexp.launch.faults import LostError
from rayexp.launch.job import WorkerJob
from rayexp.launch.on_ray import autoscale, session
from rayexp.launch.on_ray.attempt import Attempt, PreemptedError
from rayexp.launch.on_ray.head import HeadWatch
from rayexp.launch.on_ray.remote_writer import NONCE, start_writer
from rayexp.launch.placement import Placement
from rayexp.launch.resuming import go_on
from rayexp.launch.screen import Screen
from rayexp.runs.run import Run

GROW_S = 30.0  # how often an elastic run looks for more room
WAIT_S = 120.0  # how long a run waits for lost nodes to come back, or for others to make room
PLACE_S = 5.0  # how long one plan is given to find its places


def supervise(
    run: Run,
    config: ExperimentConfig,
    make_job: Callable[[Placement, int], WorkerJob],
    shown: Screen,
    stopped: Callable[[], bool],
    own_ray: bool,
    watch: HeadWatch,
) -> str:
    """Train on the connected Ray; returns `done` or `stopped`.

    Args:
        make_job: gives the job of an attempt from its plan and the number of machines.
        shown: the screen.
        stopped: whether the user asked to stop.
        own_ray: whether this Ray was started for the run.
        watch: over that Ray.

    Raises:
        UserError, RunError: see the table above.
        KeyboardInterrupt: workers were lost when it was asked to stop.
    """
    try:
        sources.publish(run)
    except OSError as error:  # its folder of logs may be another user's
        shown.say(f"warning: `rayexp collect` will not find this run: {error.filename}: {error.strerror}")
    failures = 0
    # A Ray of our own has nobody else in it.
    plan = planning.make(config, session.nodes()) if own_ray else _room(config, shown, stopped)
    while True:
        job = make_job(plan, len(session.nodes()))
        (run.root / NONCE).write_text(job.nonce)
        writer = start_writer(run, job.nonce, session.node_id(), job.driver) if job.nodes > 1 else None
        attempt = Attempt(job, plan)
        attempt.start()
        try:
            growing = _follow(run, config, plan, attempt, stopped, watch)
        finally:
            (run.root / NONCE).unlink(missing_ok=True)
            attempt.close()
        if attempt.status != "done" and (why := watch.verdict()):
            raise HeadLostError(why)
        if writer is not None:
            ray.kill(writer)
        if attempt.error is None:
            if not growing or attempt.status != "stopped":
                return attempt.status
            run.stop_path.unlink(missing_ok=True)
            if stopped():  # looked at after that: its request may have gone with ours
                return attempt.status
            shown.say("there is room for more workers: going on with them")
        elif isinstance(attempt.error, LostError):
            failures += not isinstance(attempt.error, PreemptedError)
            if stopped():
                raise KeyboardInterrupt
            if failures > config.max_failures:
                raise RunError(
                    f"workers were lost {counted(failures, 'time')} (max_failures: {config.max_failures}); "
                    f"last: {attempt.error}",
                    go_on(run.root),
                )
            shown.say(f"workers lost ({attempt.error}); attempt {failures + 1} of {config.max_failures + 1}")
        else:
            raise attempt.error
        plan = _room_again(config, shown, stopped)


def _follow(
    run: Run, config: ExperimentConfig, plan: Placement, attempt: Attempt, stopped: Callable[[], bool], watch: HeadWatch
) -> bool:
    """Wait for the attempt's end, or Ray's; returns whether the workers were asked to make room for more of them."""
    growing, looked = False, time.monotonic()
    while attempt.is_alive() and not watch.lost:
        attempt.join(0.1)
        elastic = isinstance(config.scaling.num_workers, tuple)
        if elastic and not growing and not stopped() and time.monotonic() - looked >= GROW_S:
            looked = time.monotonic()
            if run.stepping() and session.room(plan, config, PLACE_S) > plan.workers:
                growing = True
                run.stop_path.touch()
    return growing


def _room(config: ExperimentConfig, shown: Screen, stopped: Callable[[], bool]) -> Placement:
    """A plan for which there is room now, or after a while.

    Raises:
        UserError: it can never be placed.
        RunError: there was no room within WAIT_S.
        KeyboardInterrupt: it was asked to stop while it waited.
    """
    if autoscale.addable(session.nodes()):
        return autoscale.provide(config, shown.say, stopped)
    plans = planning.choices(config, session.nodes())
    until = time.monotonic() + WAIT_S
    while not (found := next((plan for plan in plans if session.placeable(plan, PLACE_S)), None)):
        if time.monotonic() > until:
            raise RunError(f"waited {WAIT_S:.0f} s for room: others hold what is needed for {plans[-1]}")
        if stopped():
            raise KeyboardInterrupt
        plans = planning.choices(config, session.nodes())
    return found


def _room_again(config: ExperimentConfig, shown: Screen, stopped: Callable[[], bool]) -> Placement:
    """`_room` after a loss: what was there before may come back, for a while."""
    until = time.monotonic() + WAIT_S
    shown.phase("waiting for room")
    while True:
        try:
            return _room(config, shown, stopped)
        except UserError as error:
            if time.monotonic() > until:
                raise RunError(f"waited {WAIT_S:.0f} s for the cluster to have enough again: {error}") from error
            if stopped():
                raise KeyboardInterrupt from error
            time.sleep(1)
