"""Follow what a job of a cluster prints, until it ends."""

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

SILENCE_S = 10.0  # without output, then the job is asked after
PATIENCE_S = 300.0  # without a word from the cluster, then following is given up


def follow(
    address: str | None,
    job: str,
    out: Callable[[str], None],
    say: Callable[[str], None] = lambda text: None,
    patience_s: float = PATIENCE_S,
) -> Job:
    """Hand on what the job prints, from the beginning, until it ends; returns the ended job.

    A lost connection is taken up again and nothing is handed on twice; the job does not notice.

    Raises:
        UserError: no such job.
        RunError: nothing could be learnt of it for `patience_s` seconds.
    """
    jobs.find(address, job)
    done, lost = 0, 0.0

    def take(piece: str) -> None:
        nonlocal done, lost
        out(piece)
        done, lost = done + len(piece), 0.0

    while True:
        try:
            _blocking(_tail(dashboard.address(address), job, done, take, lambda: jobs.find(address, job).ended))
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
    """Hand on all that an ended job has printed; False where that has gone, as with the job's node."""
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
    """The job as the cluster knows it, or None where that cannot be learnt."""
    try:
        return jobs.find(address, job)
    except (UserError, RunError):
        return None


def _blocking(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end in a thread of its own: a notebook's own thread has a running loop already."""
    loop, ended = asyncio.new_event_loop(), threading.Event()
    task = loop.create_task(work)

    def drive() -> None:
        try:
            loop.run_until_complete(asyncio.wait([task]))
        finally:
            loop.close()
            ended.set()

    threading.Thread(target=drive, name="tail", daemon=True).start()
    try:
        while not ended.wait(1):  # a signal that another thread caught is seen then
            pass
    except BaseException:  # Ctrl-C comes to the caller's thread
        with contextlib.suppress(RuntimeError):  # it has just ended
            loop.call_soon_threadsafe(task.cancel)
        ended.wait()
        raise
    task.result()


async def _tail(
    place: str, job: str, skip: int, take: Callable[[str], None], ended: Callable[[], bool] = lambda: False
) -> None:
    """Hand on what the job prints, without the first `skip` characters, until the connection or the job ends.

    JobSubmissionClient.tail_job_logs sends no heartbeat, so a silently cut link would hold it for ever; and where the
    job's node is gone, the dashboard keeps the connection and says no more.
    """
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=dashboard.TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=auth.headers(), timeout=limits) as session,
            session.ws_connect(f"{place}/api/jobs/{job}/logs/tail", heartbeat=dashboard.TIMEOUT_S / 2) as socket,
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
