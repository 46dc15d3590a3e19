"""Every command in the README and in docs/ parses; every shipped configuration loads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from rayexp.cli import app
from rayexp.config import CompareConfig, ExperimentConfig, load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:console|bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.removeprefix("$ ").strip()
                if words.startswith("rayexp "):
                    found.append((page.name, words))
    return found


def parse(words: list[str]) -> None:
    """Parse without running."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    context = command.make_context(command.name, words)
    assert context.command is command


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_in_the_documents_parse(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    while words[:1] == ["--debug"]:
        words = words[1:]
    parse([word for word in words if word not in ("&",)])
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{page}: {word} is not there"


def test_there_are_commands_to_parse() -> None:
    assert len(commands()) > 15
    with pytest.raises(Exception, match="--no-such-option"):
        parse(["train", "x.yaml", "--no-such-option"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_load(path: Path) -> None:
    kind = CompareConfig if "scaling" in yaml.safe_load(path.read_text()) and "base" in path.read_text() else None
    if kind:
        config = load(path, kind=CompareConfig)
        base = load(path.parent / config.base)
    else:
        base = load(path, kind=ExperimentConfig)
    assert base.reduction == "exact"
