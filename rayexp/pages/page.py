"""One offline HTML page from a template: no script, font or picture is fetched from anywhere."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

from rayexp import __version__
from rayexp.display import counted, figure, printable, tied
from rayexp.errors import UserError
from rayexp.pages.plots import DARK, variable
from rayexp.system.disk import write_atomic

TEMPLATES = Path(__file__).parent / "templates"
# Tags, and elements whose text stays as it is, because it is code or is copied.
_MARKUP = re.compile(
    "(" + "|".join(rf"<{tag}\b.*?</{tag}>" for tag in ("script", "style", "pre", "code", "svg")) + "|<[^>]*>)",
    re.DOTALL,
)
# The CSS variables for the colours of the figures: name, light, dark.
INKS = [(variable(light), light.lower(), dark) for light, dark in DARK.items()]


def render(template: str, **values: Any) -> str:
    """Fill a template of templates/; everything in it is escaped, control characters too; missing values are errors. No
    line ends between a number and its unit."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["p"] = p_value
    environment.filters["figure"] = figure
    environment.filters["counted"] = counted
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = environment.get_template(template).render(version=__version__, made=made, inks=INKS, **values)
    return "".join(part if part.startswith("<") else tied(part) for part in _MARKUP.split(page))


def _shown(value: Any) -> Any:
    # Only plain text comes from outside; what the templates and filters have made safe is of a class of its own.
    return printable(value, keep="\n\t") if type(value) is str else value


def save(path: Path, page: str, within: Path | None = None) -> None:
    """Write the page whole (UserError where `path` is a folder); `within`: see `write_atomic`."""
    if path.is_dir():
        raise UserError(f"--html: {path} is a folder; name a file")
    write_atomic(path, page, within)


def p_value(p: float | None) -> str:
    """`0.034`, `2.1e-07`, `< 1e-300`; `none` where there is no test."""
    if p is None or p != p:
        return "none"
    if p < 1e-300:
        return "< 1e-300"
    return f"{p:.2g}" if p < 0.0995 else f"{p:.2f}"
