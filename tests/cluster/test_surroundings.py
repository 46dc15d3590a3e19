"""What is around the process at the start: a home, a short temporary folder, a Ray that answers."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayexp.cluster import as_job, auth, listeners, surroundings
from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.launch import doctor

NAMES = ("HOME", "RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile goes with the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry in the table of users."""

    def home() -> Path:
        if "HOME" in os.environ:
            return Path(os.environ["HOME"])
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", home)


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that cannot be written (root could write any)."""
    home = Path("/proc")
    monkeypatch.setenv("HOME", str(home))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != home and access(path, mode))
    return home


# ---------------------------------------------------------------------- home


def test_a_home_that_can_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for home in (tmp_path, tmp_path / "made" / "later"):
        monkeypatch.setenv("HOME", str(home))
        before = dict(os.environ)
        surroundings.settle_home(said.append)
        assert dict(os.environ) == before
    assert said == []
    assert not surroundings.stand_in().exists()


def test_no_home_at_all(homeless: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no home directory for Ray's token; set HOME, RAY_AUTH_TOKEN_PATH or"):
        auth.token()
    said: list[str] = []
    surroundings.settle_home(said.append)
    folder = tmp_path / f"rayexp-{os.getuid()}"
    (line,) = said
    assert line.startswith(f"warning: this user has no home directory: caches and Ray's token go to {folder}; HOME=DIR")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ["HOME"] == str(folder)
    auth.make_token()
    assert auth.token()
    assert (folder / ".ray" / "auth_token").is_file()
    surroundings.settle_home(said.append)
    assert len(said) == 1


def test_a_home_that_cannot_be_written_keeps_its_name(unwritable: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^/proc/.ray/auth_token: Ray's token cannot be kept there .* set HOME, or"):
        auth.make_token()
    said: list[str] = []
    surroundings.settle_home(said.append)
    (line,) = said
    assert line.startswith("warning: the home directory /proc cannot be written: caches and Ray's token go to")
    folder = surroundings.stand_in()
    assert os.environ["HOME"] == "/proc"  # ~/x in a configuration means what it says
    assert os.environ["XDG_CACHE_HOME"] == str(folder / ".cache")
    auth.make_token()
    assert (folder / ".ray" / "auth_token").is_file()


def test_a_token_that_lies_in_such_a_home_is_used(
    unwritable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    surroundings.settle_home(lambda text: None)
    assert auth.token() == "mine"


@pytest.mark.parametrize("kind", ["open", "link", "file", "other"])
def test_a_stand_in_that_others_can_enter_is_refused(
    homeless: None, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = surroundings.stand_in()
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o700)
        if kind == "open":
            folder.chmod(0o750)
        else:
            real = os.getuid()
            monkeypatch.setattr(os, "getuid", lambda: real + 1)
            folder.rename(surroundings.stand_in())
    with pytest.raises(UserError, match="set HOME"):
        surroundings.settle_home(lambda text: None)
    assert "HOME" not in os.environ


def test_a_jobs_relative_paths_need_a_home_that_lasts(homeless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "j1"}}')
    surroundings.settle_home(lambda text: None)
    with pytest.raises(UserError, match=r"^runs: a job's relative paths count from the home directory, .*set HOME"):
        as_job.at_home(ExperimentConfig())
    absolute = ExperimentConfig(storage_path=Path("/nfs/runs"))
    assert as_job.at_home(absolute) == absolute


def test_the_command_says_it_in_one_line_and_works(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom rayexp.cli import main\n"
        "def home():\n    import os\n    if 'HOME' in os.environ: return pathlib.Path(os.environ['HOME'])\n"
        "    raise RuntimeError\n"
        "pathlib.Path.home = home\nsys.argv = ['rayexp', 'doctor', '--json']\nmain()"
    )
    env = {k: v for k, v in os.environ.items() if k != "HOME"} | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("warning: this user has no home directory")
    assert f"\"none: caches and Ray's token go to {tmp_path}/rayexp-" in done.stdout


# ---------------------------------------------------------------------- Ray's folder


def test_rays_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert surroundings.ray_folder() == Path("/tmp")
    with tempfile.TemporaryDirectory(prefix="rx-", dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", short)
        assert surroundings.ray_folder() == Path(short)
        fits = f"{short}/{'x' * (surroundings.SHORT - len(short) - 1)}"
        Path(fits).mkdir()
        monkeypatch.setenv("RAY_TMPDIR", fits)
        assert surroundings.ray_folder() == Path(fits)
        monkeypatch.setenv("RAY_TMPDIR", f"{fits}x")
        with pytest.raises(UserError, match=rf"^RAY_TMPDIR={fits}x: too long .* {surroundings.SHORT} bytes at most"):
            surroundings.ray_folder()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", f"/tmp/{'x' * 120}")
    assert surroundings.ray_folder() == Path("/tmp")  # simply right
    # A socket's path below the longest folder that is allowed still fits.
    session = f"/{'x' * (surroundings.SHORT - 1)}/ray/session_2026-11-26_08-03-31_216672_4194304/sockets/plasma_store"
    assert len(session) == 107


def test_rays_folder_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nothing")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        UserError, match=r"^/proc/nothing: Ray cannot write there; set RAY_TMPDIR to a folder of at most"
    ):
        surroundings.ray_folder()
    found = doctor._sockets(Path())
    assert not found.ok
    assert "set RAY_TMPDIR" in found.found


# ---------------------------------------------------------------------- a Ray that answers


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def dead_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_who_named_an_address_is_said(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert surroundings.ray_address(None) is None
    assert surroundings.ray_address(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    dead = f"127.0.0.1:{dead_port()}"
    with pytest.raises(
        UserError, match=rf"^--address {dead}: no Ray answers there; without one, a Ray is started here"
    ):
        surroundings.ray_address(dead)
    monkeypatch.setenv("RAY_ADDRESS", dead)
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS={dead}: no Ray answers there; where it is not set, a Ray is"):
        surroundings.ray_address(None)
    assert surroundings.ray_address(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert surroundings.ray_address(None) is None


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ray://head:10001", "Ray Client is not supported; `rayexp submit`"),
        ("http://head:8265", "a dashboard, to which `rayexp submit` sends a run; a Ray is joined at HEAD:6379"),
        ("127.0.0.1:99999", "no Ray answers there"),
        ("127.0.0.1:x", "no Ray answers there"),
        (":", "no Ray answers there"),
    ],
)
def test_addresses_that_cannot_be_joined(address: str, expected: str) -> None:
    with pytest.raises(UserError, match=f"^--address {address}: {expected}"):
        surroundings.ray_address(address)


def test_only_a_ray_of_this_user_is_joined_unasked(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert surroundings.left_here() is None
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text(f"127.0.0.1:{port}\n")
    assert surroundings.left_here() == f"127.0.0.1:{port}"
    for owner in (False, None):  # another user listens there now; or it is another machine's
        monkeypatch.setattr(listeners, "ours", lambda host, port, owner=owner: owner)
        assert surroundings.left_here() == (None if owner is False else f"127.0.0.1:{port}")
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)  # the file is another user's
    assert surroundings.left_here() is None
    monkeypatch.undo()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for text in (f"127.0.0.1:{dead_port()}", "", "nonsense", "\udcff"):
        file.write_bytes(text.encode(errors="surrogateescape"))
        assert surroundings.left_here() is None
    mine = tmp_path / "mine"
    mine.write_text(f"127.0.0.1:{port}")
    file.unlink()
    file.symlink_to(mine)
    assert surroundings.left_here() == f"127.0.0.1:{port}"


def test_a_dead_address_is_one_line_and_leaves_nothing(
    tmp_path: Path, command: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = f"127.0.0.1:{dead_port()}"
    monkeypatch.setenv("RAY_ADDRESS", dead)
    (tmp_path / "c.yaml").write_text("scaling: {num_workers: 2}")
    process = command("train", "c.yaml")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines() == [
        f"error: RAY_ADDRESS={dead}: no Ray answers there; where it is not set, a Ray is started here for the run"
    ]
    assert not list((tmp_path / "runs").iterdir())
