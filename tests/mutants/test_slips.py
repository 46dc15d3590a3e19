"""The list of slips fits the code, and mechanical mutants are what they are said to be."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def load(name: str) -> ModuleType:
    """A script that lies here; this folder is no package."""
    spec = importlib.util.spec_from_file_location(f"_{name}_for_tests", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


mutants = load("mutants")
CODE = '''"""Says (1 + 2)."""
from __future__ import annotations

LIMIT: tuple[int, int] = (3, 4)

def f(a: int = 5, é: str = "x" | None) -> int:
    """a - b"""
    if a < LIMIT[0] and not é:
        raise ValueError(f"{a + 1}")
    g(é, a * 2)
    self.x = True
    return a - 1
'''


def test_every_listed_slip_applies() -> None:
    """Exactly one place each. Where the code has changed, change the slip with it: it stands for a kind of mistake."""
    found = mutants.listed(ROOT)
    assert len(found) > 150
    for mutant in found:
        assert mutant.text != (ROOT / mutant.file).read_text(encoding="utf-8"), mutant.id


def test_every_target_and_its_tests_are_there() -> None:
    for target in mutants.targets().values():
        assert (ROOT / target.file).is_file()
        assert target.tests
        for test in target.tests:
            path, _, name = test.partition("::")
            assert (ROOT / path).is_file(), test
            assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text(encoding="utf-8"), test


def test_mechanical_mutants(tmp_path: Path) -> None:
    """Signs, constants, conditions, statements; no annotation, docstring or message; another line changes no name."""
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    everything = mutants.mechanical(tmp_path, mutants.Target("code.py", ("t",), 100))
    names = {mutant.name for mutant in everything}
    assert names == {
        "module: 3 -> (4)", "module: 4 -> (5)", "f: 5 -> (6)", "f: 0 -> (1)", "f: 2 -> (3)", "f: 1 -> (2)",
        "f: a < LIMIT[0] -> (a <= LIMIT[0])", "f: not é -> (é)",
        "f: a < LIMIT[0] and (not é) -> (a < LIMIT[0] or not é)",
        "f: raise ValueError(f'{a + 1}') -> pass", "f: g(é, a * 2) -> pass", "f: a * 2 -> (a / 2)",
        "f: self.x = True -> pass", "f: True -> False", "f: return a - 1 -> return None", "f: a - 1 -> (a + 1)",
    }  # fmt: skip
    for mutant in everything:
        old, new = CODE.splitlines(), mutant.text.splitlines()
        assert sum(a != b for a, b in zip(old, new, strict=True)) == 1, mutant.name
    few = mutants.mechanical(tmp_path, mutants.Target("code.py", ("t",), 5))
    (tmp_path / "code.py").write_text(f"# a line\n{CODE}", encoding="utf-8")
    assert [m.name for m in mutants.mechanical(tmp_path, mutants.Target("code.py", ("t",), 5))] == [m.name for m in few]


@pytest.mark.parametrize(("old", "words"), [("a * 3", "0 times"), ("a", "times, not once")])
def test_a_stale_slip_is_named(tmp_path: Path, old: str, words: str) -> None:
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "some.toml").write_text(
        f'target = [{{file = "code.py", tests = ["t"]}}]\n'
        f'slip = [{{file = "code.py", name = "some slip", old = "{old}", new = "b"}}]\n'
    )
    with pytest.raises(mutants.StaleError, match=f"some slip.*{words}"):
        mutants.listed(tmp_path, tmp_path)
