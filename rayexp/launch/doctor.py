"""Check what a run needs of this machine, without starting anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from rayexp import __version__
from rayexp.cluster import discovery
from rayexp.cluster.home import fallback_home, user_home, writable
from rayexp.display import counted
from rayexp.errors import UserError
from rayexp.system.cores import cores

ROOM = 2e9  # bytes; twenty checkpoints of a ResNet-18 with momentum


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: what was checked, what was found, and whether that is good enough for a run."""

    what: str
    found: str
    ok: bool = True


def examine(folder: Path) -> list[Check]:
    """All checks; `folder` is where runs are stored."""
    return [look(folder) for look in _LOOKS]


def _python(folder: Path) -> Check:
    return Check("python", f"{platform.python_version()}, {platform.platform()}", sys.version_info >= (3, 11))


def _rayexp(folder: Path) -> Check:
    names = ("rayexp", "numpy", "safetensors", "pydantic", "tensorboardX")
    return Check("packages", ", ".join(f"{name} {version(name)}" for name in names))


def _torch_pair(folder: Path) -> Check:
    """PyPI's torchvision is built for PyPI's torch of the same day; beside another build it does not import."""
    pair = f"torch {version('torch')}, torchvision {version('torchvision')}"
    # In a process of its own: a failed import leaves torchvision half imported.
    code = "import torch, torchvision; torchvision.ops.nms"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("torch pair", f"{pair}: they fit together")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Check(
        "torch pair",
        f"{pair} do not fit together ({last}); install both from one index, in one command: "
        "pip install --force-reinstall torch torchvision",
        ok=False,
    )


def _devices(folder: Path) -> Check:
    def look() -> str:
        from rayexp.engine.runtime import gpu_names

        names = gpu_names()
        return f"{len(names)}: {', '.join(names)}" if names else "none that this PyTorch can use"

    return _tried("GPUs", look)


def _cores(folder: Path) -> Check:
    return Check("CPU", f"{counted(cores(), 'core')} usable, {platform.machine()}")


def _memory(folder: Path) -> Check:
    memory = psutil.virtual_memory()
    return Check("memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free", memory.available > 1e9)


def _ray(folder: Path) -> Check:
    def look() -> str:
        running = discovery.named_address(None) or discovery.started_here()
        where = f"would join {running}" if running else "none of yours runs here; one is started for a run"
        return f"{version('ray')}; {where}"

    return _tried("ray", look)


def _home(folder: Path) -> Check:
    """Where caches and Ray's token are stored."""
    home, other = user_home(), fallback_home()
    if home is None or home == other or not writable(home):
        why = "none" if home in (None, other) else f"{home} cannot be written"
        return Check("home", f"{why}: caches and Ray's token go to {other}; HOME=DIR chooses another place")
    return Check("home", str(home))


def _sockets(folder: Path) -> Check:
    """Where a Ray that is started here puts its sockets."""
    return _tried("Ray's folder", lambda: f"{discovery.temp_folder() / 'ray'}")


def _shared(folder: Path) -> Check:
    """Ray stores objects in shared memory, and on a slow disk where there is too little of it."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return Check("shared memory", "no /dev/shm here")
    free = shutil.disk_usage(shared).free
    return Check("shared memory", f"{free / 1e9:.1f} GB free in {shared}", free > 1e8)


def _disk(folder: Path) -> Check:
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    return Check(
        "disk", f"{free / 1e9:.1f} GB free for {folder}{'' if writable else ', not writable'}", free > ROOM and writable
    )


def version(name: str) -> str:
    """A package's version; `missing` where it is not installed. rayexp itself need not be: it may be a source tree."""
    if name == "rayexp":
        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _tried(what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what, look())
    except UserError as error:
        return Check(what, str(error), ok=False)
    except Exception as error:
        return Check(what, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", ok=False)


_LOOKS = (_python, _rayexp, _torch_pair, _devices, _cores, _memory, _ray, _home, _sockets, _shared, _disk)
