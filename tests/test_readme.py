"""What the documents say is there: commands parse, links and paths lead somewhere, quoted errors are rayexp's own, and
every shipped configuration loads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from rayexp.cli import app
from rayexp.config import CompareConfig, ExperimentConfig, load

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# A path of the repository in the text, with or without `rayexp/` in front. Folders end in a slash.
FOLDERS = ("rayexp", "tests", "docs", "configs", "benchmarks")
PARTS = tuple(path.name for path in sorted((ROOT / "rayexp").iterdir()) if path.is_dir() and path.name != "__pycache__")
NAMED = re.compile(rf"(?<![\w/.~-])((?:{'|'.join(FOLDERS + PARTS)})/[\w./-]*)(?![\w<*])")
ENDINGS = (".py", ".yaml", ".toml", ".md", ".png", ".j2", "/")
LONGEST = 150  # lines of the README


def commands() -> list[tuple[str, str]]:
    """Every `rayexp ...` of a console block, and every one between backticks that has more than a name."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for kind, block in FENCE.findall(text):
            if kind in ("console", "bash", "sh"):
                lines = block.replace("\\\n", " ").splitlines()
                found += [(page.name, line.removeprefix("$ ").strip()) for line in lines]
        found += [(page.name, " ".join(line.split())) for line in re.findall(r"`(rayexp [^`]+)`", FENCE.sub("", text))]
    form = re.compile(r"\.\.\.|\|| \[")  # with optional parts: no command
    return [(page, line) for page, line in found if line.startswith("rayexp ") and not form.search(line)]


def parse(words: list[str]) -> None:
    """Parse without running; a command by itself is only named."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] not in ("--help", "--debug", "COMMAND"):
        name, *words = words
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    if words and words[0] not in ("--help", "COMMAND"):
        context = command.make_context(command.name, words)
        assert (context.info_name or "").split()[0] == command.name


def test_no_two_runs_of_the_readme_have_one_name() -> None:
    """Whoever types all of it refers to each run by its name."""
    lines = [line for page, line in commands() if page == "README.md"]
    named = [word.removeprefix("name=") for line in lines for word in line.split() if word.startswith("name=")]
    assert len(named) == len(set(named)) >= 2


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_in_the_documents_parse(page: str, line: str) -> None:
    words = [word for word in shlex.split(line, comments=True)[1:] if word not in ("--debug", "&")]
    parse(words)
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{page}: {word} is not there"


def test_there_are_commands_to_parse() -> None:
    assert len(commands()) > 30
    with pytest.raises(Exception, match="--no-such-option"):
        parse(["train", "x.yaml", "--no-such-option"])
    with pytest.raises(AssertionError, match="no-such-command"):
        parse(["no-such-command"])


def lost_links(page: Path) -> Iterator[str]:
    """Relative links of a page that lead nowhere."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = page.parent / path if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            yield target


def anchors(page: Path) -> list[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def lost_paths(page: Path) -> Iterator[str]:
    """Files and folders of the repository that a page names and that are not there."""
    for name in dict.fromkeys(NAMED.findall(page.read_text(encoding="utf-8"))):
        name = name.rstrip(".")
        if not name.endswith(ENDINGS) or (name.split("/")[0] in ("runs", "data") and not name.endswith(".py")):
            continue  # `runs/` and `data/` are a user's folders, too
        if not (ROOT / name).exists() and not (ROOT / "rayexp" / name).exists():
            yield name


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent == ROOT else f"{page.parent.name}-{page.name}"
)
def test_what_a_page_links_to_and_names_is_there(page: Path) -> None:
    assert list(lost_links(page)) == []
    assert list(lost_paths(page)) == []


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n[a](gone.md) [b](page.md#a-title) [c](#no-title) [d](https://example.org/gone)\n"
        "`rayexp/engine/step.py`, `engine/gone.py`, tests/gone/, (runs/RUN/config.yaml) and configs/gone.yaml.\n"
    )
    assert list(lost_links(page)) == ["gone.md", "#no-title"]
    assert list(lost_paths(page)) == ["engine/gone.py", "tests/gone/", "configs/gone.yaml"]


def test_the_readme_is_short_and_shows_three_pictures() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert re.findall(r"!\[.+\]\(docs/(.+)\)", text) == ["compare.png", "verify.png", "diff.png"]


def quoted() -> list[str]:
    """The error lines in the first column of the tables on troubleshooting."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    first = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    spans = [span for cell in first for span in re.findall(r"``\s?(.+?)\s?``|`([^`]+)`", cell)]
    return [one or other for one, other in spans if " " in (one or other) and not (one or other).startswith("make ")]


@pytest.fixture(scope="module")
def source() -> str:
    """All of rayexp's source, with strings that stand side by side put together."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "rayexp").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("line", quoted())
def test_quoted_errors_are_those_of_the_program(line: str, source: str) -> None:
    for piece in line.split("…"):
        words = re.sub(r"\((No space left on device|checksum differs)\)", "\0", piece).split("\0")
        for part in words:
            assert part.strip(" ()") in source, f"rayexp does not say {part!r}"


def test_there_are_errors_to_look_for() -> None:
    assert len(quoted()) > 25


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_load(path: Path) -> None:
    kind = CompareConfig if "scaling" in yaml.safe_load(path.read_text()) and "base" in path.read_text() else None
    if kind:
        config = load(path, kind=CompareConfig)
        base = load(path.parent / config.base)
    else:
        base = load(path, kind=ExperimentConfig)
    assert base.reduction == "exact"
