"""Where a run is read from: a folder, an object store, or the node of a cluster whose driver wrote it.

A run lies on the disk of its driver's host. `offer` links it into that Ray node's log folder, which Ray's dashboard
serves; so one HTTP address and the token are enough to reach it, also when its driver is gone:
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

from rayexp.cluster import as_job, auth
from rayexp.errors import RunError, UserError, nearest
from rayexp.runs.run import Run
from rayexp.system.disk import TEMPORARY, matching

SHELF = "rayexp"  # folder in a Ray node's logs


class RunSource(Protocol):
    """Where a run is read from."""

    name: str

    def list(self, folder: str) -> list[str]:
        """Names in a folder of the run, sorted, folders with a `/` behind; empty where there is no such folder."""

    def read(self, path: str) -> Iterator[bytes]:
        """A file of the run in pieces (RunError where it cannot be read whole)."""


# ---------------------------------------------------------------------- the driver's side


def offer(run: Run) -> None:
    """Make a run collectable through the Ray node on which this process runs. Ray must be initialised."""
    import ray

    node: Any = ray._private.worker._global_node  # Ray has no public word for a node's log folder
    shelf = Path(node.get_logs_dir_path()) / SHELF
    job = as_job.job_id()
    for link in (shelf / "runs" / run.id, *((shelf / "jobs" / job / run.id,) if job else ())):
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f"{TEMPORARY}{os.getpid()}")
        temporary.symlink_to(run.root)
        temporary.replace(link)
    if job:
        run.update(job=job)


# ---------------------------------------------------------------------- sources


class Storage:
    """A run in a folder (local, NFS) or under s3://, gs:// and what else pyarrow knows."""

    def __init__(self, place: str) -> None:
        from pyarrow import fs

        if "://" in place:
            try:
                self.files, self.base = fs.FileSystem.from_uri(place)
            except Exception as error:
                raise UserError(f"{shown(place)}: no storage that can be read ({_line(error)})") from error
        else:
            self.files, self.base = fs.LocalFileSystem(), str(Path(place).expanduser().resolve())
        self.base = self.base.rstrip("/")
        self.name = shown(place)

    def list(self, folder: str) -> list[str]:
        """See Source."""
        from pyarrow import fs

        where = fs.FileSelector(f"{self.base}/{folder}".rstrip("/"), allow_not_found=True)
        found = self._try(lambda: self.files.get_file_info(where))
        return sorted(info.base_name + "/" * (info.type == fs.FileType.Directory) for info in found)

    def read(self, path: str) -> Iterator[bytes]:
        """See Source."""
        with self._try(lambda: self.files.open_input_stream(f"{self.base}/{path}")) as file:
            while piece := self._try(lambda: file.read(auth.CHUNK)):
                yield piece

    def sha(self, path: str) -> str | None:
        """sha256 of a file, None where it is not there."""
        from pyarrow import fs

        info = self._try(lambda: self.files.get_file_info(f"{self.base}/{path}"))
        if info.type != fs.FileType.File:
            return None
        digest = hashlib.sha256()
        for piece in self.read(path):
            digest.update(piece)
        return digest.hexdigest()

    def write(self, path: str, local: Path) -> None:
        """Copy a local file there."""
        target = f"{self.base}/{path}"
        self._try(lambda: self.files.create_dir(target.rpartition("/")[0], recursive=True))
        with local.open("rb") as file, self._try(lambda: self.files.open_output_stream(target)) as sink:
            while piece := file.read(auth.CHUNK):
                self._try(lambda piece=piece: sink.write(piece))  # type: ignore[misc]

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (OSError, ValueError) as error:
            raise RunError(f"{self.name}: {_line(error)}") from error


class NodeSource:
    """A run on a node of a cluster, read through the dashboard."""

    def __init__(self, address: str, node: str, link: str) -> None:
        self.address, self.node, self.link = address, node, link
        self.name = f"{address}, node {node[:8]}"

    def list(self, folder: str) -> list[str]:
        """See Source."""
        base = f"{self.link}/{folder}".rstrip("/")
        return sorted(path[len(base) + 1 :] for path in _glob(self.address, self.node, f"{_literal(base)}/*"))

    def read(self, path: str) -> Iterator[bytes]:
        """See Source."""
        name = f"{self.link}/{path}"
        yield from auth.stream(self.address, "/api/v0/logs/file", node_id=self.node, filename=name, lines=-1)


def find(what: str, address: str | None) -> tuple[RunSource, str]:
    """The run of that path, URI, name (or part of it) or job id, and the run's own id.

    Raises:
        UserError: none or several.
    """
    if "://" in what or (Path(what).expanduser() / "run.json").is_file():
        storage = Storage(what)
        return storage, storage.base.rpartition("/")[2]
    if "/" in what:
        raise UserError(f"{what}: no run.json there; give a run's path, its name, or a job's id")
    place = auth.address(address)
    found = _offers(place, f"jobs/{_literal(what)}")
    if not found:
        offered = _offers(place, "runs")
        found = {n: offered[n] for n in matching(what, offered)}
        if not found:
            _explain_job(what, place)
            raise UserError(f"{place}: no run or job {what!r}{nearest(what, offered)}; {_those(offered)}")
    if len(found) > 1:
        raise UserError(f"{what!r} has several runs, name one: {', '.join(sorted(found))}")
    ((name, source),) = found.items()
    return source, name


def _offers(place: str, folder: str) -> dict[str, NodeSource]:
    """The runs linked there on any living node."""
    found = {}
    for node in auth.get(place, "/api/v0/nodes")["result"]:
        # A node that has just died is still called alive for a while.
        with contextlib.suppress(RunError):
            for path in _glob(place, node["node_id"], f"{SHELF}/{folder}/*/run.json"):
                link = path.removesuffix("/run.json")
                found[link.rpartition("/")[2]] = NodeSource(place, node["node_id"], link)
    return found


def _explain_job(what: str, place: str) -> None:
    """A job that has made no run (UserError)."""
    from rayexp.cluster import jobs

    with contextlib.suppress(RunError):
        for job in jobs.jobs(place):
            if job.job == what:
                raise UserError(
                    f"job {what} ({job.status}) has no run that can be reached; `rayexp logs {what}` says why"
                )


def _glob(address: str, node: str, pattern: str) -> list[str]:
    groups = auth.get(address, "/api/v0/logs", node_id=node, glob=pattern)
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
    """The URI of something in that folder; a query stays at the end."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def shown(place: str) -> str:
    """A URI without what may be secret in it."""
    if "://" not in place:
        return place
    parts = urlsplit(place)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
