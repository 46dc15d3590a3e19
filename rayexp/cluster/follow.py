"""Follow what a cluster's job prints, until it ends; also from a notebook, whose thread runs an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from rayexp.cluster import auth, dashboard, jobs
from rayexp.cluster.jobs import Job
from rayexp.errors import RunError, UserError

SILENCE_S = 10.0  # without output, before the cluster is asked whether the job has ended
PATIENCE_S = 300.0  # without an answer from the cluster, before following is given up


def follow(
    address: str | None,
    job: str,
    out: Callable[[str], None],
    say: Callable[[str], None] = lambda text: None,
    patience_s: float = PATIENCE_S,
) -> Job:
    """Pass what the job prints to `out`, from the beginning, until it ends; returns the ended job.

    A lost connection is made again, and nothing is passed on twice; the job does not notice.

    Args:
        address: see `dashboard.address`.
        job: its id.
        out: gets the text in pieces, raw: with whatever control sequences the job has printed.
        say: told when the connection is lost.
        patience_s: seconds without an answer from the cluster, before following is given up.

    Raises:
        UserError: there is no such job.
        RunError: the cluster has not answered for `patience_s` seconds.
    """
    jobs.find(address, job)
    done, lost = 0, 0.0

    def take(piece: str) -> None:
        nonlocal done, lost
        out(piece)
        done, lost = done + len(piece), 0.0

    while True:
        try:
            _run(_tail(dashboard.address(address), job, done, take, lambda: jobs.find(address, job).ended))
            known: Job | None = jobs.find(address, job)
            lost = 0.0
        except BrokenPipeError:  # of `out`: nobody reads any more
            raise
        except (OSError, TimeoutError, UserError, RunError) as error:
            known = _known(address, job)
            if not lost:
                lost = time.monotonic()
                fate = "the job goes on" if known and not known.ended else "the job does not depend on it"
                say(f"connection lost ({error}); {fate}; trying again")
            if time.monotonic() - lost > patience_s and not (known and known.ended):
                fate = "the job goes on" if known else "whether the job goes on is not known"
                raise RunError(
                    f"no word of job {job} for {patience_s:,.0f} s ({error}); {fate}; "
                    f"`rayexp logs {job} -f` takes it up"
                ) from error
        if known and known.ended:
            if not _rest(address, job, lambda text: take(text[done:])):
                say("what the job printed last cannot be read any more")
            return known
        time.sleep(1)


def _rest(address: str | None, job: str, take: Callable[[str], None]) -> bool:
    """Pass on all that an ended job has printed; False where it cannot be read, as when the job's node is gone."""
    for wait in (1, 2, 0):
        try:
            text = jobs.logs(address, job)
        except (UserError, RunError):
            time.sleep(wait)
        else:
            take(text)
            return True
    return False


def _known(address: str | None, job: str) -> Job | None:
    """The job as the cluster knows it; None while the cluster does not answer."""
    try:
        return jobs.find(address, job)
    except (UserError, RunError):
        return None


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, as `asyncio.run` does, but in a thread of its own: that of a notebook runs a loop already,
    in which `asyncio.run` raises RuntimeError."""
    loop, ended = asyncio.new_event_loop(), threading.Event()
    task = loop.create_task(work)

    def run() -> None:
        try:
            loop.run_until_complete(asyncio.wait([task]))
        finally:
            loop.close()
            ended.set()

    threading.Thread(target=run, name="tail", daemon=True).start()
    try:
        while not ended.wait(1):  # wakes up to handle a signal that another thread has caught
            pass
    except BaseException:  # Ctrl-C comes to the caller's thread
        with contextlib.suppress(RuntimeError):  # the loop has just closed
            loop.call_soon_threadsafe(task.cancel)
        ended.wait()
        raise
    task.result()


async def _tail(
    address: str, job: str, skip: int, take: Callable[[str], None], ended: Callable[[], bool] = lambda: False
) -> None:
    """Pass on what the job prints, without the first `skip` characters, until the connection or the job ends.

    JobSubmissionClient.tail_job_logs would not do: it sends no heartbeat, so a silently cut link would hold it for
    ever; and when the job's node is gone, the dashboard keeps the connection open and sends nothing more.
    """
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=dashboard.TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=auth.headers(), timeout=limits) as session,
            session.ws_connect(f"{address}/api/jobs/{job}/logs/tail", heartbeat=dashboard.TIMEOUT_S / 2) as socket,
        ):
            while True:
                try:
                    message = await socket.receive(timeout=SILENCE_S)
                except TimeoutError:
                    if await asyncio.to_thread(ended):
                        return
                    continue
                if message.type is not aiohttp.WSMsgType.TEXT:
                    return
                take(message.data[skip:])
                skip = max(0, skip - len(message.data))
    except aiohttp.ClientError as error:
        raise ConnectionError(str(error)) from error
