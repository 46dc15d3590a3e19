"""The typer app that the commands join, options that several of them take, and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
import typer.core

from rayexp.cli import _complete
from rayexp.cli._output import error_line, only_json, say

UNREAD = 128 + signal.SIGPIPE  # exit code where nobody reads the output any more
CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class Command(typer.core.TyperCommand):
    """A command whose help calls each argument by its metavar alone, without the type that it has in Python, and which
    prints nothing but JSON on stdout where it is asked to."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """See click: `[OPTIONS] CONFIG [KEY=VALUE]...`."""
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return [*([self.options_metavar] if self.options_metavar else []), *map(_usage, arguments)]

    def invoke(self, ctx: Any) -> Any:
        """See click. With --json, only the answer is printed on stdout."""
        with only_json() if ctx.params.get("as_json") else contextlib.nullcontext():
            return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """See click."""
        rows: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                kind = param.param_type_name
                rows[kind].append((_metavar(param) if kind == "argument" else record[0], record[1]))
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            if rows[kind]:
                with formatter.section(title):
                    formatter.write_dl(rows[kind])


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _usage(argument: Any) -> str:
    name = _metavar(argument)
    if not argument.required and not name.startswith("["):
        name = f"[{name}]"
    return name if argument.nargs == 1 or name.endswith("...") else f"{name}..."


class App(typer.Typer):
    """A typer app whose commands are `Command`s."""

    def command(self, name: str | None = None, *, cls: Any = Command, **fields: Any) -> Callable[[CommandT], CommandT]:
        """See typer."""
        return super().command(name, cls=cls, **fields)


class Group(typer.core.TyperGroup):
    """Commands under one name; the name alone shows them."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """See click, which would raise the help as an error. A command is missing: exit code 2, help on stderr."""
        if not args and not ctx.resilient_parsing:
            say(ctx.get_help())
            raise typer.Exit(2)
        return super().parse_args(ctx, args)


class _Commands(Group):
    def invoke(self, ctx: Any) -> Any:
        """See click; typer itself ends every interruption as Ctrl-C."""
        from rayexp.errors import Stopped, last_words
        from rayexp.system import signals

        try:
            with signals.ending():
                return super().invoke(ctx)
        except Stopped as stopped:
            if str(stopped):
                say("\n".join(last_words(str(stopped))))
            raise typer.Exit(128 + stopped.number) from stopped
        except BrokenPipeError as error:  # click would end with 1, as if something had failed
            raise typer.Exit(UNREAD) from error


app = App(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distributed training experiments on Ray: how much faster, is it the same model, which judgements changed.",
)


def folder(text: str | Path) -> Path:
    """The folder that an option names (typer also passes an option's default).

    Raises:
        UserError: it is a URI.
    """
    if "://" in str(text):
        from rayexp.config.experiment import NO_URI
        from rayexp.errors import UserError

        raise UserError(f"{text}: {NO_URI}")
    with contextlib.suppress(RuntimeError):  # no such user
        return Path(text).expanduser()
    return Path(text)


def moved_data(overrides: list[str], command: str) -> Path | None:
    """DIR of `data.root=DIR`, the one key that can be set where a run is read; None: it is not set.

    Raises:
        UserError: another key is set.
    """
    from rayexp.errors import UserError

    root = None
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "data.root" or not value:
            raise UserError(f"{override!r}: {command} takes data.root=DIR only; all else is as the run was trained")
        root = Path(value)
    return root


KEY_VALUE = "KEY=VALUE"
RunsOption = Annotated[
    Path, typer.Option("--runs", metavar="DIR", parser=folder, help="Folder of run directories.", show_default=True)
]
ConfigArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="YAML of the experiment, or a name that `rayexp configs` lists.",
        autocompletion=_complete.configs,
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar=KEY_VALUE,
        help="Set a key of the configuration; dotted where it is nested.",
        autocompletion=_complete.keys,
        show_default=False,
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Join this Ray. [default: RAY_ADDRESS, else one that runs here, else a new one]",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
RUNS = Path("runs")
BEGAN = "rayexp.began"  # in a context's `meta`: time.monotonic() at which a command began later than its process
DEBUG = False


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


def main() -> None:
    """The console script."""
    from rayexp.cluster.home import ensure_home
    from rayexp.errors import FULL, RunError, Stopped, UserError, WriteError
    from rayexp.system import signals
    from rayexp.system.threads import PATIENT

    for variable, value in PATIENT.items():
        os.environ.setdefault(variable, value)
    try:
        ensure_home(say)
        with signals.ending():
            code = app(prog_name="rayexp", standalone_mode=False)
            sys.stdout.flush()
    except BrokenPipeError:  # as behind `| head`
        code = UNREAD
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
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} -h)" if context else ""
            line = f"{shown().rstrip('.')}{_key_meant(error)}{hint}"
            code = _fail(RuntimeError(line), getattr(error, "exit_code", 2))
    _leave(code if isinstance(code, int) else 0)


def _key_meant(error: Any) -> str:
    """How to set the key of a configuration that was typed as an option (`--epochs 3`)."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if not option or not context or all(param.metavar != KEY_VALUE for param in context.command.params):
        return ""
    name = option.lstrip("-").replace("-", "_")
    found = [key for key in _complete.keys(context, "") if f".{key}".endswith(f".{name}=")]
    return f"; as a key of the configuration it is {' or '.join(f'{key}VALUE' for key in found)}" if found else ""


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
    from rayexp.errors import last_words

    fault, *command = last_words(str(error))
    error_line(fault)
    for line in command:
        say(line)
    return code
