"""What all commands share: the typer app, consoles, error lines and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from rayexp.display import NOT_FINITE, figure, plain, printable


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """See click; typer itself ends every interruption as Ctrl-C."""
        from rayexp.errors import Stopped
        from rayexp.system import signals

        try:
            with signals.ending():
                return super().invoke(ctx)
        except Stopped as stopped:
            if str(stopped):
                say(str(stopped))
            raise typer.Exit(128 + stopped.number) from stopped


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Distributed training experiments on Ray: how much faster, is it the same model, which judgements changed.",
)

RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of run directories.", show_default=True)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
RUNS = Path("runs")
DEBUG = False
NUMBER = rf"([-+]?[\d.,]+(e[-+]?\d+)?( ?%)?|{NOT_FINITE})?"


def version(show: bool) -> None:
    """`--version`"""
    if show:
        from rayexp import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    global DEBUG
    DEBUG = debug


def say(text: str = "") -> None:
    """One line of progress or advice, on stderr."""
    with contextlib.suppress(OSError):  # the terminal may have been closed
        print(printable(text, keep="\n"), file=sys.stderr, flush=True)


def tell(text: str = "") -> None:
    """One line of the answer, on stdout."""
    print(printable(text, keep="\n"), flush=True)


def print_json(value: Any) -> None:
    """The whole answer as strict JSON on stdout: what is not finite is null."""
    print(json.dumps(plain(value), indent=2, default=str, allow_nan=False))


def print_table(rows: list[dict[str, Any]], title: str = "") -> None:
    """A table on stdout; the first row's keys are the columns; numbers are set right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in rows[0] if rows else ():
        right = all(isinstance(r[name], int | float) or re.fullmatch(NUMBER, str(r[name] or "")) for r in rows)
        table.add_column(printable(name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    width = None if sys.stdout.isatty() else 200
    # Cells hold file names and words of a text: nothing in them is markup.
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    if title:
        console.print(printable(title), style="italic")
    console.print(table)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return figure(value, ",.4g")
    return printable(str(value))


def error_line(text: str) -> None:
    """One red line on stderr."""
    line = f"error: {printable(' '.join(text.split()))}"
    with contextlib.suppress(OSError):
        print(f"\033[31m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def main() -> None:
    """The console script."""
    from rayexp.cluster.home import ensure_home
    from rayexp.errors import FULL, RunError, Stopped, UserError, WriteError
    from rayexp.system import signals

    try:
        ensure_home(say)
        with signals.ending():
            code = app(standalone_mode=False)
    except UserError as error:
        code = _fail(error, 2)
    except RunError as error:
        code = _fail(error, 1)
    except Stopped as stopped:
        code = 128 + stopped.number
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 130
    except WriteError as error:
        code = _fail(error, 2 if error.wrong_path else 1)
    except OSError as error:
        full = error.errno in FULL and error.filename
        code = _fail(WriteError(error.errno, error.strerror, error.filename) if full else error, 1)
    except Exception as error:
        # typer's own usage errors (unknown option, missing argument) are click exceptions with an exit code of 2.
        shown = getattr(error, "format_message", None)
        if shown is None:
            if DEBUG:
                raise
            code = _fail(RuntimeError(f"{type(error).__name__}: {error} (--debug shows where)"), 1)
        else:
            code = _fail(RuntimeError(shown()), getattr(error, "exit_code", 2))
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> NoReturn:
    head = sys.modules.get("rayexp.launch.on_ray.head")
    # All is cleaned up. What still runs in the background (imports, what a lost Ray has left) would be heard of, or be
    # waited for, and Ray may crash.
    if code > 128 or (head is not None and head.forgotten):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _fail(error: BaseException, code: int) -> int:
    if DEBUG:
        import traceback

        traceback.print_exception(error)
    error_line(str(error))
    return code
