"""The pool: answers in order, from processes that import nothing else and end with their caller."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rayexp.data import pool
from rayexp.errors import RunError

HOUSE = Path(__file__).parents[2]


def test_a_dead_helper_is_reported(tmp_path, helpers):
    with pytest.raises(RunError, match=r"ended early \(exit code 3"):
        list(pool.ordered("os:_exit", [[3]], 1))
    with pytest.raises(RunError, match="a helper process failed: ZeroDivisionError"):
        list(pool.ordered("operator:truediv", [[1, 0]], 1))


def test_pool_keeps_the_order(helpers):
    texts = [f"{k:04d}" for k in range(50)]
    answers = pool.ordered("base64:b64decode", ([text] for text in texts), 3)
    assert list(answers) == [base64.b64decode(text) for text in texts]


def test_pool_ends_its_processes_when_it_is_left(helpers):
    answers = pool.ordered("base64:b64decode", [["AAAA"]] * 50, 2)
    next(answers)
    assert psutil.Process().children()
    answers.close()
    assert not psutil.Process().children()


def test_pool_s_processes_end_when_their_caller_is_killed(cache):
    code = (
        "import psutil, time; from rayexp.data import pool\n"
        "answers = pool.ordered('base64:b64decode', [['AAAA']] * 50, 2); next(answers)\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as caller:
        children = [psutil.Process(int(pid)) for pid in caller.stdout.readline().split()]
        caller.kill()
    assert len(children) == 2
    assert psutil.wait_procs(children, timeout=20)[1] == []


def test_what_a_function_prints_is_no_answer(capfd, helpers):
    assert list(pool.ordered("builtins:print", [["said"]], 1)) == [None]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "said\n")


@pytest.mark.parametrize("command", ["-c", "script", "-m"])
def test_helpers_import_nothing_from_the_working_directory(tmp_path, command, cache):
    """However the caller was started, and even where it has the working directory in its path."""
    for module in ("random", "queue", "token", "numpy"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\n")
    call = "from rayexp.data import pool; print(list(pool.ordered('base64:b64decode', [['AAAA']])))"
    code = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(0, {str(tmp_path)!r}); {call}"
    # The caller has imported its own modules before the folder is in its path.
    code = f"import random, queue, token, json, numpy; import rayexp.data.pool; {code}"
    script = tmp_path.parent / f"{tmp_path.name}-script.py"
    script.write_text(code)
    args = {"-c": ["-c", code], "script": [script], "-m": ["-m", script.stem]}[command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOUSE), str(script.parent)])}
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=60, cwd=script.parent, env=environment
    )
    assert done.stdout == "[b'\\x00\\x00\\x00']\n", done.stderr
    assert not (tmp_path / "ran").exists()


def test_helpers_are_of_the_caller_s_own_tree(tmp_path):
    """A source tree in which one works, though another is installed."""
    shutil.copytree(HOUSE / "rayexp", tmp_path / "rayexp", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "rayexp" / "data" / "here.py").write_text("def where():\n    return __file__.encode()\n")
    code = "from rayexp.data import pool; print(next(pool.ordered('rayexp.data.here:where', [[]])).decode())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
    )
    assert done.stdout.strip() == str(tmp_path / "rayexp" / "data" / "here.py"), done.stderr
