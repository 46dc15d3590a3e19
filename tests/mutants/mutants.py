"""Mutants of the package: slips that somebody named (slips/*.toml), and mechanical ones (syntax tree, a fixed sample).

Both are whole new texts of one file. A listed slip replaces text that must occur exactly once. Mechanical operators:

    compare   a < b  ->  a <= b, == -> !=, is -> is not, in -> not in
    binary    + <-> -, * <-> /, // and ** -> *, << <-> >>, ^ -> &
    logic     and <-> or, not a -> a, if a -> if not (a)
    constant  n -> n + 1, True <-> False
    drop      a call, an augmented assignment, an assignment to an attribute or an item, a raise
    return    return a -> return None
"""

from __future__ import annotations

import ast
import hashlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED = "1"
SAMPLE = 12
"""Mechanical mutants of a file; slips/*.toml may say otherwise (`sample`)."""

COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitXor: ast.BitAnd,
}  # fmt: skip
# Words for people: what they say is not mathematics.
UNSEEN = {"extra_repr", "__repr__", "__str__", "describe"}


class StaleError(Exception):
    """A listed slip does not fit the code any more."""


@dataclass(frozen=True)
class Target:
    """A file of the package, the tests that must notice (fastest first), and how many mechanical mutants it gets."""

    file: str
    tests: tuple[str, ...]
    sample: int = SAMPLE


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    Attributes:
        name: stays while the changed piece of code stays, whatever lies around it.
        text: the whole file.
        tests: those that must notice.
        listed: somebody named it; else mechanical.
    """

    file: str
    name: str
    text: str
    tests: tuple[str, ...]
    listed: bool

    @property
    def id(self) -> str:
        """Unique, and in survivors.toml."""
        return f"{self.file}: {self.name}"


def targets(folder: Path = HERE / "slips") -> dict[str, Target]:
    """By file."""
    found = _entries(folder, "target")
    return {t["file"]: Target(t["file"], tuple(t["tests"]), t.get("sample", SAMPLE)) for t in found}


def listed(root: Path, folder: Path = HERE / "slips") -> list[Mutant]:
    """The named slips, applied.

    Raises:
        StaleError: text that should be there once is not, or is there twice; or two slips have one name.
    """
    known, found = targets(folder), []
    for slip in _entries(folder, "slip"):
        file, name, old = slip["file"], slip["name"], slip["old"]
        text = (root / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise StaleError(f"{file}: {name}: {old!r} occurs {text.count(old)} times, not once")
        changed = text.replace(old, slip["new"])
        compile(changed, file, "exec")
        found.append(Mutant(file, name, changed, known[file].tests, True))
    ids = [mutant.id for mutant in found]
    if len(set(ids)) != len(ids):
        raise StaleError(f"two slips of one name: {sorted({i for i in ids if ids.count(i) > 1})}")
    return found


def _entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.toml"))
    return [entry for path in files for entry in tomllib.loads(path.read_text(encoding="utf-8")).get(kind, [])]


def mechanical(root: Path, target: Target) -> list[Mutant]:
    """A sample of a file's mechanical mutants: those whose names have the smallest hashes, so that a change of the
    code elsewhere leaves the sample as it is."""
    text = (root / target.file).read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for where, node, new in _Sites(ast.parse(text)):
        old = ast.unparse(node)
        name = f"{where}: {_short(old)} -> {_short(new)}"
        if name in found:
            continue  # the same piece of code twice in one function: the first stands for both
        changed = _replace(text, node, new)
        try:
            compile(changed, target.file, "exec")
        except SyntaxError:
            continue
        found[name] = changed
    chosen = sorted(found, key=lambda n: hashlib.sha256(f"{SEED} {target.file} {n}".encode()).digest())
    return [Mutant(target.file, n, found[n], target.tests, False) for n in sorted(chosen[: target.sample])]


def _short(source: str) -> str:
    line = " ".join(source.split())
    return line if len(line) <= 70 else f"{line[:50]}...{hashlib.sha256(line.encode()).hexdigest()[:6]}"


def _replace(text: str, node: ast.AST, new: str) -> str:
    lines = text.encode().splitlines(keepends=True)  # columns count bytes
    place: Any = node
    first, last = place.lineno - 1, place.end_lineno - 1
    before = b"".join(lines[:first]) + lines[first][: place.col_offset]
    after = lines[last][place.end_col_offset :] + b"".join(lines[last + 1 :])
    return (before + new.encode() + after).decode()


class _Sites:
    """What can be changed in a module: (function's dotted name, node, new source of that node)."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree

    def __iter__(self) -> Iterator[tuple[str, ast.AST, str]]:
        return self._visit(self.tree, ())

    def _visit(self, node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[str, ast.AST, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name in UNSEEN:
                return
            path = (*path, node.name)
        where = ".".join(path) or "module"
        for new in self._changes(node):
            if not (path and path[-1] == "__init__" and isinstance(node, ast.Assign)):  # nothing runs without it
                yield where, node, new
        if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.UnaryOp | ast.BoolOp):
            yield where, node.test, f"(not {ast.unparse(node.test)})"
        for child in self._children(node):
            yield from self._visit(child, path)

    @staticmethod
    def _children(node: ast.AST) -> Iterator[ast.AST]:
        """Without annotations, decorators, docstrings, imports, and what is said in errors and texts."""
        if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Raise | ast.Assert):
            return
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return  # of zip: it guards what is so by construction
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name[0].isupper() and not name.isupper():
                return  # a type
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                doc = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if isinstance(child, ast.AST) and not doc:
                    yield child

    @staticmethod
    def _changes(node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Compare(ops=[op]) if type(op) in COMPARE:
                yield f"({ast.unparse(ast.Compare(node.left, [COMPARE[type(op)]()], node.comparators))})"
            case ast.BinOp(op=op) if type(op) in BINARY and not _texts(node.left, node.right):
                yield f"({ast.unparse(ast.BinOp(node.left, BINARY[type(op)](), node.right))})"
            case ast.BoolOp(op=op):
                other = ast.Or() if isinstance(op, ast.And) else ast.And()
                yield f"({ast.unparse(ast.BoolOp(other, node.values))})"
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield f"({ast.unparse(node.operand)})"
            case ast.Constant(value=bool(value)):
                yield str(not value)
            case ast.Constant(value=int(value) | float(value)):
                yield f"({value + 1})"
            case ast.IfExp():
                yield f"({ast.unparse(ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse))})"
            case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
                yield "pass"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield "pass"
            case ast.Return(value=value) if value is not None and not _nothing(value):
                yield "return None"


def _texts(*nodes: ast.AST) -> bool:
    return any(
        isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and isinstance(n.value, str)) for n in nodes
    )


def _nothing(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
