"""Open what a reference names: import a user's code, and check the options that a component is called with.

A run's code is imported from a copy in the cache, under the hash of its content. So it is the same everywhere, a file
that was left behind is missed at once, and what is edited later changes no run that has begun. One code at a time is in
use: where another one follows, the modules of the one before are forgotten, so that two files of one name are never
mistaken for each other. (Objects that were made of them live on.)
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PydanticSchemaGenerationError, ValidationError, create_model

from rayexp.config.code import FOLDER, code_sha, read_code, sources
from rayexp.config.components import GROUPS, entry_points, is_file, is_reference, parts_of
from rayexp.config.fields import explain
from rayexp.errors import UserError, nearest
from rayexp.system.cache import cache_dir
from rayexp.system.disk import naming, write_directory
from rayexp.system.locks import locked, share

SHOWN = 8  # names listed in an error


@dataclass(slots=True)
class _InUse:
    """The code that this process imports from: `root` holds the copy, `sha` is its hash, `handle` keeps it from being
    pruned, `given` is what was provided for which entries of `code` (a worker on another host than the driver's has not
    the files themselves)."""

    root: Path | None = None
    sha: str = ""
    handle: int | None = None
    given: dict[tuple[str, ...], Mapping[str, bytes]] = field(default_factory=dict)


_IN_USE = _InUse()


class _Finder:
    """Finds top-level modules in the code that is in use.

    It comes before the other finders, so that a module of the user's wins over an installed one, as in a script; but
    not over Python's own. Folders without an `__init__.py` are found after all others.
    """

    def __init__(self, namespaces: bool) -> None:
        self.namespaces = namespaces

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """See importlib.abc.MetaPathFinder."""
        if path is not None or _IN_USE.root is None or name in sys.stdlib_module_names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, [str(_IN_USE.root)])
        return spec if spec is not None and (spec.loader is None) == self.namespaces else None

    def invalidate_caches(self) -> None:
        """See importlib.abc.MetaPathFinder."""


def provide(entries: Sequence[str], files: Mapping[str, bytes]) -> None:
    """Take these files for the entries of `code` from now on, whatever lies there."""
    _IN_USE.given[tuple(entries)] = dict(files)


def use(entries: Sequence[str] | None) -> Path | None:
    """Put the code of these entries to use; returns where the copy of it lies (None: there is no code).

    Raises:
        UserError: an entry is not there, or is too much.
        WriteError: the cache cannot be written.
    """
    files = travelling(entries)
    sha = code_sha(files)
    if not files:
        _forget()
        return None
    if sha == _IN_USE.sha and _IN_USE.root is not None and _whole(_IN_USE.root, files):
        return _IN_USE.root
    root = home() / sha[:32]
    with naming(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        with locked(root.parent / f"{root.name}.lock"):  # workers of one host begin at the same time
            if not _whole(root, files):
                write_directory(root, dict(files))
            handle = os.open(root, os.O_RDONLY)
    share(handle)
    _forget()
    _IN_USE.root, _IN_USE.sha, _IN_USE.handle = root, sha, handle
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(namespaces=False))
        sys.meta_path.append(_Finder(namespaces=True))
    importlib.invalidate_caches()
    return root


def travelling(entries: Sequence[str] | None) -> Mapping[str, bytes]:
    """The files of these entries by name: those that were provided for them, else what lies there (UserError as
    `use`)."""
    given = _IN_USE.given.get(tuple(entries or ()))
    return read_code(entries) if given is None else given


def home() -> Path:
    """The folder of the cache in which copies of code lie, each under its hash."""
    return cache_dir() / "code"


def _whole(root: Path, files: Mapping[str, bytes]) -> bool:
    """Whether the copy holds these files, and no other module (a cache of Python's does no harm)."""
    try:
        there = {
            p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts
        }
        return there == files.keys() and all((root / name).read_bytes() == data for name, data in files.items())
    except OSError:
        return False


def _forget() -> None:
    """Forget the modules that came from the code in use."""
    if _IN_USE.root is not None:
        for name, module in list(sys.modules.items()):
            if _comes_from(module, _IN_USE.root):
                del sys.modules[name]
    if _IN_USE.handle is not None:
        os.close(_IN_USE.handle)
    _IN_USE.root, _IN_USE.sha, _IN_USE.handle = None, "", None


def _comes_from(module: Any, root: Path) -> bool:
    spec = getattr(module, "__spec__", None)
    places = [getattr(module, "__file__", None), *(getattr(spec, "submodule_search_locations", None) or ())]
    return any(isinstance(place, str) and Path(place).is_relative_to(root) for place in places)


# ---------------------------------------------------------------------- opening


def load_component(key: str, name: str, code: Sequence[str] | None = None) -> Any:
    """What a reference, or an entry point, names.

    Args:
        key: the configuration's key, for errors.
        name: as it stands there.
        code: the configuration's `code`.

    Raises:
        UserError: the module does not import, or has no such name; the line says where.
    """
    reference = name if is_reference(name) else entry_points(GROUPS[key])[name]
    root = use(code)
    where, inner = parts_of(reference)
    if is_file(reference) and root is None:
        raise UserError(f"{key}: {name}: no code travels with this configuration; write the reference into its file")
    try:
        module = _file(root, where) if is_file(reference) and root is not None else importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise UserError(f"{key}: {name} cannot be imported ({failure(error, code)})") from error
        raise UserError(
            f"{key}: {name}: there is no module {error.name!r}, neither installed nor beside the configuration"
        ) from error
    except (Exception, SystemExit) as error:  # a script that ends itself ends nothing here
        raise UserError(f"{key}: {name} cannot be imported ({failure(error, code)})") from error
    found: Any = module
    for part in inner.split("."):
        if not hasattr(found, part):
            own = [each for each, value in vars(module).items() if not each.startswith("_") and callable(value)]
            more = f"; it has {', '.join(own[:SHOWN])}" if own else ""
            raise UserError(f"{key}: {where} has no {part!r}{nearest(part, own)}{more}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}: {name} is {type(found).__name__}; expected a class or a function")
    return found


def _file(root: Path, name: str) -> types.ModuleType:
    """The module of a file of the code in use: the one that an import statement gives, where one can name it."""
    path = root / name
    dotted = ".".join(Path(name).with_suffix("").parts).removesuffix(".__init__")
    if not path.is_file():
        raise FileNotFoundError(f"{name} does not travel with the run (code)")
    known = sys.modules.get(dotted)
    if known is None and dotted.split(".")[0] not in sys.stdlib_module_names and _importable(dotted):
        known = importlib.import_module(dotted)
    if known is not None and known.__spec__ is not None and known.__spec__.origin == str(path):
        return known
    # Its name is that of a module of Python's, or is none.
    private = f"rayexp_code_{_IN_USE.sha[:12]}_{dotted}"
    if private in sys.modules:
        return sys.modules[private]
    spec = importlib.util.spec_from_file_location(private, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[private]
        raise
    return module


def _importable(dotted: str) -> bool:
    return all(part.isidentifier() for part in dotted.split("."))


def failure(error: BaseException, code: Sequence[str] | None = None) -> str:
    """An error that a user's code raised, in one line: kind, message, and the line of the user's file, if any."""
    text = " ".join(str(error).split())[:300]
    shown = f"{type(error).__name__}{f': {text}' if text else ''}"
    if isinstance(error, SyntaxError) and error.filename:
        shown = f"SyntaxError: {error.msg}"
    where = place(error, code)
    return f"{where}: {shown}" if where else shown


def place(error: BaseException, code: Sequence[str] | None = None) -> str:
    """The line of the user's file at which an error was raised, `line 3 of net.py`; empty where it was elsewhere."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"line {error.lineno} of {_original(Path(error.filename), code)}"
    root, frames = _IN_USE.root, traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if root is not None and Path(frame.filename).is_relative_to(root)]
    return f"line {own[-1].lineno} of {_original(Path(own[-1].filename), code)}" if own else ""


def _original(path: Path, code: Sequence[str] | None) -> Path:
    """The user's own file of which `path` is the copy, where it is still there; else as it travels."""
    if _IN_USE.root is None or not path.is_relative_to(_IN_USE.root):
        return path
    name = path.relative_to(_IN_USE.root).as_posix()
    try:
        found = sources(code or ()).get(name, path)
    except UserError:
        found = path
    # A run's copy goes with the run, where that has not begun.
    copies = [Path(entry) for entry in code or () if Path(entry).name == FOLDER]
    return Path(name) if any(found.is_relative_to(where) for where in (_IN_USE.root, *copies)) else found


def source_of(component: Any) -> str:
    """The file in which a component is defined: of the code in use by the name under which it travels, else its
    absolute path; empty where it has none."""
    try:
        found = inspect.getsourcefile(inspect.unwrap(component))
    except TypeError:  # built in, or made by a call
        return ""
    path, root = Path(found or ""), _IN_USE.root
    if found and root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return str(path.absolute()) if found else ""


def source_sha(source: str, files: Mapping[str, bytes]) -> str:
    """A hash that changes with the code that a component is made of: its file, the files that this imports, directly or
    not, and those that are no modules. Of an installed module its file alone. Nothing is imported.

    Args:
        source: where the component is defined, see `source_of`.
        files: that travel, see `travelling`.
    """
    if source in files:
        needed = imported(source, files)
        return code_sha({name: data for name, data in files.items() if name in needed or not name.endswith(".py")})
    if Path(source).is_absolute():
        with contextlib.suppress(OSError):
            return code_sha({"": Path(source).read_bytes()})
    return code_sha(files)


def imported(name: str, files: Mapping[str, bytes]) -> set[str]:
    """The file and all those that it imports, by any import statement in it; of `files` only."""
    found, waiting = {name}, [name]
    while waiting:
        name = waiting.pop()
        try:
            tree = ast.parse(files[name])
        except (SyntaxError, ValueError):  # for a newer Python, or being edited: it imports nothing now
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                dotted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = list(Path(name).parts[: -node.level]) if node.level else []
                start = ".".join([*above, *([node.module] if node.module else [])])
                dotted = [start, *(f"{start}.{alias.name}".lstrip(".") for alias in node.names)]
            else:
                continue
            parts = [tuple(each.split(".")[: n + 1]) for each in dotted for n in range(each.count(".") + 1)]
            places = [place for part in parts for place in ("/".join(part) + ".py", "/".join((*part, "__init__.py")))]
            new = [place for place in places if place in files and place not in found]
            found.update(new)
            waiting += new
    return found


# ---------------------------------------------------------------------- options


def arguments(
    key: str,
    name: str,
    component: Any,
    options: Mapping[str, Any],
    offered: Mapping[str, Any],
    always: Iterable[str] = (),
) -> dict[str, Any]:
    """The keyword arguments that a component is called with: the configuration's options, and of what is offered all
    that its signature asks for by name.

    The options are checked by the component's own pydantic model, its attribute `Options`, or by its signature with its
    annotations.

    Args:
        key: the section that holds the options, for errors.
        name: the component's name there.
        component: a class or a function.
        options: the keys beside the name.
        offered: what rayexp has to give, by name.
        always: names of these that a component with `**kwargs` is given, too.

    Raises:
        UserError: an option is unknown, missing or not allowed.
    """
    try:
        parameters = inspect.signature(component).parameters
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}: {name} has no signature that can be read ({error})") from error
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    given = {n: value for n, value in offered.items() if n in named or (open_ended and n in always)}
    if taken := sorted(given.keys() & options.keys()):
        raise UserError(f"{key}.{taken[0]}: rayexp gives it to {name} itself")
    own = getattr(component, "Options", None)
    kind: type[BaseModel] = _model_of(component, {n: p for n, p in named.items() if n not in given}, open_ended)
    if isinstance(own, type) and issubclass(own, BaseModel):
        kind = own
    try:
        checked = kind(**options)
    except ValidationError as error:
        missing = [e for e in error.errors() if e["type"] == "missing"]
        if missing and len(missing) == error.error_count():
            raise UserError(f"{key}.{missing[0]['loc'][0]}: {name} needs it, and it has no default") from None
        raise UserError(explain(error, kind, key)) from None
    said = checked.model_fields_set | (kind.model_fields.keys() if kind is own else set())
    return given | {n: getattr(checked, n) for n in said}


def _model_of(component: Any, parameters: Mapping[str, inspect.Parameter], open_ended: bool) -> type[BaseModel]:
    """A pydantic model of the parameters, with the types that they are annotated with where pydantic knows them."""
    try:
        hints = typing.get_type_hints(component.__init__ if inspect.isclass(component) else component)
    except Exception:  # whatever an annotation that cannot be evaluated raises
        hints = {}
    settings = ConfigDict(extra="allow" if open_ended else "forbid", protected_namespaces=())
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (hints.get(name, Any), default)
        try:
            create_model("Options", __config__=settings, **{name: fields[name]})
        except PydanticSchemaGenerationError:
            fields[name] = (Any, default)
    return create_model("Options", __config__=settings, **fields)


def call(key: str, name: str, component: Any, arguments: Mapping[str, Any], code: Sequence[str] | None = None) -> Any:
    """Call a component.

    Raises:
        UserError: it raises anything but a UserError; the line says where.
    """
    try:
        return component(**arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {name} cannot be made ({failure(error, code)})") from error
