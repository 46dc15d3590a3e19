"""What `rayexp logs` shows of a job's output: its text, and nothing that a terminal would obey."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.cli._job_output import JobOutput
from rayexp.cluster import follow, jobs

CASES = [
    ("plain\n\ttext, caf\xe9\n", "plain\n\ttext, caf\xe9\n"),
    ("\x1b[2J\x1b[Hcleared", "\\x1b[2J\\x1b[Hcleared"),
    ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
    ("\x1b]52;c;cm0gLXJm\x1b\\", "\\x1b]52;c;cm0gLXJm\\x1b\\"),  # the clipboard
    ("\x9b31mone byte", "\\x9b31mone byte"),
    ("\u202eturned", "\\u202eturned"),
    ("\x1b[36m(worker)\x1b[0m \x1b[1;38:5:9mred\x1b[m\n", "(worker) red\n"),
    (" 10%\r 20%\r100%\r\n", " 10%\r 20%\r100%\r\n"),
    ("10\b\b20", "10\\x08\\x0820"),
    ("\x1b[8", "\\x1b[8"),  # no colour, though it begins as one
    ("\x1b", "\\x1b"),
]


def shown(*pieces: str) -> str:
    stream = io.StringIO()
    output = JobOutput(stream)
    for piece in pieces:
        output.write(piece)
    output.close()
    return stream.getvalue()


@pytest.mark.parametrize(("printed", "expected"), CASES)
def test_only_text_is_shown(printed: str, expected: str) -> None:
    assert shown(printed) == expected
    assert shown(*printed) == expected  # in pieces of one character


@given(st.text(alphabet=st.sampled_from("a1;:m[]\x1b\r\n\x9b\u202e"), max_size=60), st.lists(st.integers(0, 60)))
def test_pieces_may_end_anywhere(text: str, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole = shown(text)
    assert shown(*(text[a:b] for a, b in pairwise(bounds))) == whole
    assert not set(whole) & {"\x1b", "\x9b", "\u202e"}


def test_nothing_is_held_back_that_cannot_become_a_colour() -> None:
    stream = io.StringIO()
    JobOutput(stream).write(f"epoch 1\x1b[{'1' * 1000}")
    assert stream.getvalue().startswith("epoch 1\\x1b[1")


@pytest.mark.parametrize("words", [["logs", "j1"], ["logs", "j1", "-f"], ["logs", "j2"]])
def test_the_command_shows_only_text(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.Job("j1", "", "succeeded", 0, None, None, message="\x1b]0;title\x07")
    monkeypatch.setattr(jobs, "find", lambda address, job_id: job)
    monkeypatch.setattr(jobs, "logs", lambda address, job_id: "\x1b[2Jone\n" if words[1] == "j1" else "")

    def ended(address: Any, job_id: str, out: Any, say: Any) -> jobs.Job:
        out("\x1b")
        out("[2Jone\n")
        out("\x1b[")  # the job was killed within a sequence
        return job

    monkeypatch.setattr(follow, "follow", ended)
    done = CliRunner().invoke(app, words)
    assert "\x1b" not in done.stdout
    expected = {"j1": "\\x1b[2Jone\n", "j2": "\\x1b]0;title\\x07\n"}[words[1]]
    assert done.stdout == expected + ("\\x1b[" if "-f" in words else "")
