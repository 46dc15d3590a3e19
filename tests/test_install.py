"""An environment that has a torch is used as it is: constraints.py and the Makefile's TORCH=system."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def kept(pins: list[str], installed: dict[str, str]) -> list[str]:
    spec = importlib.util.spec_from_file_location("constraints", ROOT / "constraints.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kept(pins, installed)


PINS = [
    "Jinja2==3.1.6",
    "numpy==2.4.6",
    "nvidia-nccl-cu13==2.30.7",
    "torch==2.14.1",
    "torchvision==0.29.1",
    "rich==15.0.0",
]


def test_what_is_installed_keeps_its_version() -> None:
    assert kept(PINS, {"torch": "2.12.0+cpu", "torchvision": "0.27.0+cpu", "jinja2": "3.0.0", "numpy": "2.3.0"}) == [
        "torch==2.12.0+cpu",
        "torchvision==0.27.0+cpu",
        "rich==15.0.0",
    ]


def test_a_missing_torchvision_is_left_to_pip_which_finds_the_one_for_that_torch() -> None:
    assert kept(PINS, {"torch": "2.12.0"}) == ["torch==2.12.0", "Jinja2==3.1.6", "numpy==2.4.6", "rich==15.0.0"]


def fake(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("")


def python(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=env)


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")
def test_pip_leaves_another_torch_alone(tmp_path: Path) -> None:
    fake(tmp_path / "site", "torch", "2.12.0+cpu")
    printed = python(str(ROOT / "constraints.py"), path=tmp_path / "site")
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "here.txt").write_text(printed.stdout)
    pip = ("-m", "pip", "install", "--dry-run", "--no-index", "torch>=2.11", "--constraint")
    done = python(*pip, str(tmp_path / "here.txt"), path=tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Would install" not in done.stdout
    # The pins as they stand would have changed it.
    assert python(*pip, str(ROOT / "constraints.txt"), path=tmp_path / "site").returncode != 0


def test_a_torch_that_is_too_old_is_named(tmp_path: Path) -> None:
    fake(tmp_path / "site", "torch", "2.9.1")
    done = python(str(ROOT / "constraints.py"), path=tmp_path / "site")
    assert done.returncode == 1
    assert done.stderr == "constraints.py: torch 2.9.1 is too old; rayexp needs 2.11\n"


def planned(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("TORCH", "VENV", "PIP_ARGS", "MAKEFLAGS")}
    command = ["make", "--dry-run", "install", f"VENV={folder}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_takes_the_torch_that_is_there(tmp_path: Path) -> None:
    pinned = planned(tmp_path / "v", "PIP_ARGS=--find-links W").stdout
    assert "--system-site-packages" not in pinned
    assert "--constraint constraints.txt --find-links W --editable" in pinned
    system = planned(tmp_path / "v", "TORCH=system").stdout
    assert "-m venv --system-site-packages" in system
    assert "--constraint constraints.txt" not in system
    wrong = planned(tmp_path / "v", "TORCH=none")
    assert wrong.returncode == 2
    assert "allowed are pinned" in wrong.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_environment_stays_what_it_was_made_as(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shutil.copy("/bin/true", tmp_path / "bin" / "python")
    (tmp_path / ".rayexp-system").touch()
    os.utime(tmp_path / ".rayexp-system", (0, 0))  # older than the pins: install once more, still without them
    again = planned(tmp_path).stdout
    assert "--constraint constraints.txt" not in again
    assert "constraints.py" in again
