"""What a new user types first: the bare command, -h, a misspelt word, the shell's completion."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from rayexp.cli import app
from rayexp.cli._app import main
from rayexp.config import shipped_configs
from rayexp.runs.run import Run

Typed = Callable[..., tuple[int, str, str]]
GROUPS = {"": typer.main.get_command(app)} | {
    name: command for name, command in typer.main.get_command(app).commands.items() if hasattr(command, "commands")
}
COMMANDS = [
    tuple(word for word in (group, name) if word) for group, parent in GROUPS.items() for name in parent.commands
]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Typed:
    """Run `rayexp WORDS` in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rayexp", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("columns", [80, 100])
def test_a_bare_group_shows_its_commands_a_line_each(typed: Typed, monkeypatch, group: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = typed(*group.split())
    assert (code, out) == (2, "")  # a command is missing
    assert err.startswith("Usage: ")
    lines = err.splitlines()
    assert max(map(len, lines)) <= columns
    assert "..." not in err.partition("Commands:")[2]  # no description is cut off
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.strip()]
    assert listed == list(GROUPS[group].commands)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("words", [(), *((name,) for name in GROUPS if name), *COMMANDS], ids=" ".join)
def test_help_that_is_asked_for_is_an_answer(typed: Typed, words: tuple[str, ...], flag: str) -> None:
    code, out, err = typed(*words, flag)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")
    assert "-h, --help" in out
    assert not re.findall(r"<\w.*>", out)  # `CONFIG`, not `CONFIG <str>`


def test_arguments_are_called_what_the_usage_calls_them(typed: Typed) -> None:
    _, out, _ = typed("train", "-h")
    assert re.search(r"^  CONFIG +YAML of", out, re.MULTILINE)
    assert re.search(r"^  KEY=VALUE +Set a key", out, re.MULTILINE)
    assert re.search(r"^  --resume RUN +Go on", out, re.MULTILINE)


def test_a_wrong_word_is_one_line_that_leads_to_the_help(typed: Typed) -> None:
    assert typed("trian") == (2, "", "error: No such command 'trian'. Did you mean 'train'? (see rayexp -h)\n")
    assert typed("verify") == (2, "", "error: Missing argument 'CONFIG' (see rayexp verify -h)\n")
    code, _, err = typed("data", "info", "--no-such")
    assert code == 2
    assert err.endswith("(see rayexp data info -h)\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "quickstart", "--epochs", "3"), "; as a key of the configuration it is epochs=VALUE (see"),
        (("verify", "quickstart", "--batch-size=4"), "; as a key of the configuration it is batch_size=VALUE (see"),
        (
            ("submit", "quickstart", "--num-workers"),
            "; as a key of the configuration it is scaling.num_workers=VALUE (",
        ),
        (("compare", "devices", "--repeats", "5"), "; as a key of the configuration it is repeats=VALUE (see"),
        (("train", "quickstart", "--no-such"), "No such option: --no-such (see"),
        (("runs", "--epochs", "3"), "No such option: --epochs (see"),
    ],
    ids=" ".join,
)
def test_a_key_that_is_typed_as_an_option_is_recognised(typed: Typed, words: tuple[str, ...], said: str) -> None:
    code, _, err = typed(*words)
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    "words",
    [
        ("train", "quickstart", "--runs", "s3://b/r"),
        ("compare", "devices", "--runs", "s3://b/r"),
        ("quickstart", "--runs", "s3://b/r"),
        ("runs", "--runs", "s3://b/r"),
        ("report", "x", "--runs", "s3://b/r"),
        ("data", "fetch", "shapes", "--to", "s3://b/r"),
        ("train", "quickstart", "storage_path=s3://b/r"),
    ],
    ids=" ".join,
)
def test_a_uri_is_no_folder(typed: Typed, tmp_path: Path, words: tuple[str, ...]) -> None:
    code, out, err = typed(*words)
    assert (code, out) == (2, "")
    assert "s3://b/r" in err
    assert "expected a folder" in err
    assert "rayexp collect RUN --to URI" in err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- completion


@pytest.fixture
def offered(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """What bash is offered for the last word of a line."""

    def complete(line: str) -> list[str]:
        env = {"_RAYEXP_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        code, out, err = typed()
        assert (code, err) == (0, "")
        return out.split()

    return complete


def test_the_shell_is_told_how_to_complete(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    # With the detection of the shell, the option takes no name.
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    code, out, _ = typed("--show-completion")
    assert code == 0
    assert "_RAYEXP_COMPLETE=complete_bash" in out


def test_names_of_configurations_and_keys_are_offered(offered: Callable[[str], list[str]], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("epochs: 1\n")
    assert offered("rayexp summ") == ["summary"]
    grids = {"devices", "quickstart_devices"}
    assert set(offered("rayexp train ")) == {*shipped_configs(), "mine.yaml"} - grids
    assert set(offered("rayexp compare ")) == {*grids, "mine.yaml"}
    assert offered("rayexp verify tiny") == ["tiny_imagenet", "tiny_imagenet_best", "tiny_imagenet_fast"]
    assert offered("rayexp train quickstart scaling.n") == ["scaling.num_workers="]
    assert offered("rayexp train quickstart data.augment.sc") == ["data.augment.scale="]
    assert offered("rayexp submit quickstart batch") == ["batch_size="]
    assert offered("rayexp compare devices rep") == ["repeats="]
    assert offered("rayexp data fetch wiki") == ["wikitext2"]


def test_names_of_runs_and_checkpoints_are_offered(
    offered: Callable[[str], list[str]], tmp_path: Path, tiny_images: dict[str, Any]
) -> None:
    from rayexp.config import parse
    from rayexp.config.experiment import ExperimentConfig

    def made(name: str, folder: str) -> Run:
        fields = {**tiny_images, "name": name, "storage_path": str(tmp_path / folder)}
        return Run.create(parse(fields, ExperimentConfig, "test"), argv=[])

    one, other = made("one", "runs"), made("one_more", "runs")
    one.checkpoint(3).mkdir(parents=True)
    elsewhere = made("two", "elsewhere")
    assert offered("rayexp evaluate one") == ["one", "one_more"]
    assert set(offered("rayexp report ")) == {"one", "one_more", one.id, other.id, "@newest"}
    assert offered("rayexp evaluate one@") == ["one@best", "one@last", "one@3"]
    assert offered("rayexp diff one@3 one@l") == ["one@last"]
    assert offered("rayexp train --resume one_") == ["one_more"]
    assert offered("rayexp runs --runs elsewhere two") == ["two"]
    assert offered("rayexp generate none@") == []  # no such run: nothing, and no error
    made("one", "runs")
    assert "one" not in offered("rayexp runs on")  # it names two runs now
    assert elsewhere.id.startswith("2")
