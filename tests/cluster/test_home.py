"""Where caches and the token lie, also for a user without a home."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rayexp.cluster import auth, job_context
from rayexp.cluster.home import ensure_home, fallback_home
from rayexp.config import ExperimentConfig
from rayexp.errors import UserError

pytestmark = pytest.mark.usefixtures("own_environment")


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


def test_a_home_that_can_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for home in (tmp_path, tmp_path / "made" / "later"):
        monkeypatch.setenv("HOME", str(home))
        before = dict(os.environ)
        ensure_home(said.append)
        assert dict(os.environ) == before
    assert said == []
    assert not fallback_home().exists()


def test_no_home_at_all(homeless: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no home directory for Ray's token; set HOME, RAY_AUTH_TOKEN_PATH or"):
        auth.token()
    said: list[str] = []
    ensure_home(said.append)
    folder = tmp_path / f"rayexp-{os.getuid()}"
    (line,) = said
    assert line.startswith(f"warning: this user has no home directory: caches and Ray's token go to {folder}; HOME=DIR")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ["HOME"] == str(folder)
    auth.make_token()
    assert auth.token()
    assert (folder / ".ray" / "auth_token").is_file()
    ensure_home(said.append)
    assert len(said) == 1


def test_a_home_that_cannot_be_written_keeps_its_name(unwritable: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^/proc/.ray/auth_token: Ray's token cannot be kept there .* set HOME, or"):
        auth.make_token()
    said: list[str] = []
    ensure_home(said.append)
    (line,) = said
    assert line.startswith("warning: the home directory /proc cannot be written: caches and Ray's token go to")
    folder = fallback_home()
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
    ensure_home(lambda text: None)
    assert auth.token() == "mine"


@pytest.mark.parametrize("kind", ["open", "link", "file", "other"])
def test_a_fallback_that_others_can_enter_is_refused(
    homeless: None, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fallback_home()
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
            folder.rename(fallback_home())
    with pytest.raises(UserError, match="set HOME"):
        ensure_home(lambda text: None)
    assert "HOME" not in os.environ


def test_a_jobs_relative_paths_need_a_home_that_lasts(homeless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "j1"}}')
    ensure_home(lambda text: None)
    with pytest.raises(UserError, match=r"^runs: a job's relative paths count from the home directory, .*set HOME"):
        job_context.resolve_paths(ExperimentConfig())
    absolute = ExperimentConfig(storage_path=Path("/nfs/runs"))
    assert job_context.resolve_paths(absolute) == absolute


def test_the_command_says_it_in_one_line_and_works(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom rayexp.cli import main\n"
        "def home():\n    import os\n    if 'HOME' in os.environ: return pathlib.Path(os.environ['HOME'])\n"
        "    raise RuntimeError\n"
        "pathlib.Path.home = home\nsys.argv = ['rayexp', 'doctor', '--json']\n"
        "from rayexp.launch import doctor\ndoctor._LOOKS = (doctor._home,)\nmain()"
    )
    env = {k: v for k, v in os.environ.items() if k != "HOME"} | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("warning: this user has no home directory")
    assert f"\"none: caches and Ray's token go to {tmp_path}/rayexp-" in done.stdout
