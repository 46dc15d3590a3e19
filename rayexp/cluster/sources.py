"""Where a run is read from: a folder, an object store, or the cluster node on which its driver wrote it.

A run lies on the disk of its driver's host. `publish` links it into the log folder of that Ray node, which Ray's
dashboard serves. So one HTTP address and the token are enough to read it, even after its driver has ended:
    <session>/logs/rayexp/runs/<run>          -> the run directory
    <session>/logs/rayexp/jobs/<job>/<run>    -> the same, for finding a job's runs
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from rayexp.cluster import dashboard, job_context
from rayexp.errors import RunError, UserError, nearest
from rayexp.runs.run import Run
from rayexp.system import signals
from rayexp.system.disk import TEMPORARY, matching

LOG_FOLDER = "rayexp"  # folder in a Ray node's logs


class RunSource(Protocol):
    """Where a run is read from."""

    name: str

    def list(self, folder: str) -> list[str]:
        """The names in a folder of the run, sorted, folders with a trailing `/`; empty if there is no such folder."""

    def read(self, path: str) -> Iterator[bytes]:
        """The bytes of a file of the run, in pieces (RunError where it cannot be read to its end)."""


# ---------------------------------------------------------------------- the driver's side


def publish(run: Run) -> None:
    """Make a run collectable through the Ray node on which this process runs. Ray must be initialised."""
    import ray

    with signals.own_sigterm():
        context: Any = ray.init(ignore_reinit_error=True, configure_logging=False)  # describes the one there is
    folder = Path(context.address_info["session_dir"]) / "logs" / LOG_FOLDER
    job = job_context.job_id()
    for link in (folder / "runs" / run.id, *((folder / "jobs" / job / run.id,) if job else ())):
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f"{TEMPORARY}{os.getpid()}")
        temporary.symlink_to(run.root)
        temporary.replace(link)
    if job:
        run.update(job=job)


# ---------------------------------------------------------------------- sources


class Storage:
    """A run in a folder (local, NFS) or under s3://, gs:// or another URI that pyarrow knows."""

    def __init__(self, location: str) -> None:
        from pyarrow import fs

        if "://" in location:
            try:
                self.files, self.base = fs.FileSystem.from_uri(location)
            except Exception as error:
                raise UserError(f"{shown(location)}: no storage that can be read ({_line(error)})") from error
        else:
            self.files, self.base = fs.LocalFileSystem(), str(Path(location).expanduser().resolve())
        self.base = self.base.rstrip("/")
        self.name = shown(location)

    def list(self, folder: str) -> list[str]:
        """See RunSource."""
        from pyarrow import fs

        where = fs.FileSelector(f"{self.base}/{folder}".rstrip("/"), allow_not_found=True)
        found = self._try(lambda: self.files.get_file_info(where))
        return sorted(info.base_name + "/" * (info.type == fs.FileType.Directory) for info in found)

    def read(self, path: str) -> Iterator[bytes]:
        """See RunSource."""
        with self._try(lambda: self.files.open_input_stream(f"{self.base}/{path}")) as file:
            while piece := self._try(lambda: file.read(dashboard.CHUNK)):
                yield piece

    def sha(self, path: str) -> str | None:
        """The sha256 of a file; None if there is no such file."""
        from pyarrow import fs

        info = self._try(lambda: self.files.get_file_info(f"{self.base}/{path}"))
        if info.type != fs.FileType.File:
            return None
        digest = hashlib.sha256()
        for piece in self.read(path):
            digest.update(piece)
        return digest.hexdigest()

    def write(self, path: str, local: Path) -> None:
        """Copy a local file to `path`."""
        target = f"{self.base}/{path}"
        self._try(lambda: self.files.create_dir(target.rpartition("/")[0], recursive=True))
        with local.open("rb") as file, self._try(lambda: self.files.open_output_stream(target)) as sink:
            while piece := file.read(dashboard.CHUNK):
                self._try(lambda piece=piece: sink.write(piece))  # type: ignore[misc]

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (OSError, ValueError) as error:
            raise RunError(f"{self.name}: {_line(error)}") from error


class NodeSource:
    """A run on a node of a cluster, read through the dashboard: `link` is its path in the node's log folder."""

    def __init__(self, address: str, node: str, link: str) -> None:
        self.address, self.node, self.link = address, node, link
        self.name = f"{address}, node {node[:8]}"

    def list(self, folder: str) -> list[str]:
        """See RunSource."""
        base = f"{self.link}/{folder}".rstrip("/")
        return sorted(path[len(base) + 1 :] for path in _glob(self.address, self.node, f"{_literal(base)}/*"))

    def read(self, path: str) -> Iterator[bytes]:
        """See RunSource."""
        name = f"{self.link}/{path}"
        yield from dashboard.stream(self.address, "/api/v0/logs/file", node_id=self.node, filename=name, lines=-1)


def find(what: str, address: str | None) -> tuple[RunSource, str]:
    """Find a run by its path, URI, name (or a part of it) or job id; returns its source and its id.

    Raises:
        UserError: there is none, or there are several.
    """
    if "://" in what or (Path(what).expanduser() / "run.json").is_file():
        storage = Storage(what)
        return storage, storage.base.rpartition("/")[2]
    if "/" in what:
        raise UserError(f"{what}: no run.json there; give a run's path, its name, or a job's id")
    url = dashboard.address(address)
    found = _published(url, f"jobs/{_literal(what)}")
    if not found:
        published = _published(url, "runs")
        found = {n: published[n] for n in matching(what, published)}
        if not found:
            _explain_job(what, url)
            raise UserError(f"{url}: no run or job {what!r}{nearest(what, published)}; {_those(published)}")
    if len(found) > 1:
        raise UserError(f"{what!r} has several runs, name one: {', '.join(sorted(found))}")
    ((name, source),) = found.items()
    return source, name


def _published(address: str, folder: str) -> dict[str, NodeSource]:
    """The runs that are linked in this folder of `LOG_FOLDER` on any node that is alive, by id."""
    found = {}
    for node in dashboard.get(address, "/api/v0/nodes")["result"]:
        # A node that has just died is still called alive for a while.
        with contextlib.suppress(RunError):
            for path in _glob(address, node["node_id"], f"{LOG_FOLDER}/{folder}/*/run.json"):
                link = path.removesuffix("/run.json")
                found[link.rpartition("/")[2]] = NodeSource(address, node["node_id"], link)
    return found


def _explain_job(what: str, address: str) -> None:
    """Say so where `what` is a job that has made no run (UserError)."""
    from rayexp.cluster import jobs

    with contextlib.suppress(RunError):
        for job in jobs.jobs(address):
            if job.job == what:
                raise UserError(
                    f"job {what} ({job.status}) has no run that can be reached; `rayexp logs {what}` says why"
                )


def _glob(address: str, node: str, pattern: str) -> list[str]:
    """The paths in a node's log folder that match."""
    groups = dashboard.get(address, "/api/v0/logs", node_id=node, glob=pattern)
    try:
        return [str(path) for group in groups.values() for path in group if TEMPORARY not in str(path)]
    except (AttributeError, TypeError) as error:
        raise RunError(f"{address}: not a listing of files ({error})") from error


def _literal(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)


def _those(names: Any) -> str:
    return f"there are {', '.join(sorted(names))}" if names else "none has been offered since the cluster started"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def below(uri: str, name: str) -> str:
    """The URI of `name` in the folder `uri`; a query stays at the end."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def shown(location: str) -> str:
    """A path or URI as it may be printed: without name, password and query."""
    if "://" not in location:
        return location
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
