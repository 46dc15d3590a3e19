"""What a reference opens, what it is called with, and how each mistake is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from rayexp.config import components, references
from rayexp.config.references import (
    arguments,
    call,
    failure,
    imported,
    load_component,
    provide,
    source_of,
    source_sha,
    travelling,
    use,
)
from rayexp.errors import UserError

Write = Callable[..., tuple[str, ...]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write files, by name, into a folder; the entries of `code` for them."""
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "cache"))
    made = []

    def write(**files: str) -> tuple[str, ...]:
        made.append(tmp_path / f"code{len(made)}")
        for name, text in files.items():
            path = made[-1] / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return (str(made[-1]),)

    return write


def test_a_file_a_module_and_an_attribute_of_it(write: Write) -> None:
    code = write(
        net="from helpers import width\nclass Net:\n    width = width\n    class Inner: ...\n", helpers="width = 3"
    )
    found = load_component("model.name", "net.py:Net", code)
    assert found.width == 3
    assert load_component("model.name", "net:Net", code) is found
    assert load_component("model.name", "net.py:Net.Inner", code) is found.Inner
    assert load_component("model.name", "json.decoder:JSONDecoder").__name__ == "JSONDecoder"


def test_two_files_of_one_name_are_never_mixed_up(write: Write) -> None:
    text = "from helpers import width\ndef net(): return width\n"
    one, two = write(net=text, helpers="width = 1"), write(net=text, helpers="width = 2")
    nets = [load_component("model.name", "net.py:net", code) for code in (one, two, one)]
    assert [net() for net in nets] == [1, 2, 1]
    use(None)
    assert "net" not in sys.modules
    with pytest.raises(
        UserError, match=r"^model.name: net:net: there is no module 'net', neither installed nor beside"
    ):
        load_component("model.name", "net:net")


def test_names_that_python_has_itself_and_names_that_are_none(write: Write) -> None:
    """A token.py of the user's is no token.py of Python's; and the other way round."""
    code = write(token="import random\ndef net(): return random.random", random="", **{"my-net": "def net(): return 4"})
    import random

    assert load_component("model.name", "token.py:net", code)() == random.random
    assert load_component("model.name", "my-net.py:net", code)() == 4
    assert sys.modules["token"].__file__ != str(Path(code[0]) / "token.py")


def test_a_module_of_pythons_own_that_is_imported_later_is_pythons(write: Write) -> None:
    sys.modules.pop("tabnanny", None)
    code = write(main="import tabnanny\ndef net(): return tabnanny.check", tabnanny="")
    assert load_component("model.name", "main.py:net", code)().__module__ == "tabnanny"


def test_a_folder_without_init_hides_no_installed_package(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site" / "shadowed").mkdir(parents=True)
    (tmp_path / "site" / "shadowed" / "__init__.py").write_text("value = 9")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    code = write(shadowed__notes="", main="from shadowed import value\ndef net(): return value")
    assert load_component("model.name", "main.py:net", code)() == 9
    del sys.modules["shadowed"]


def test_folders_without_init_are_packages_too_but_hide_nothing(write: Write) -> None:
    code = write(
        nets__cnn="def net(): return 5", yaml__notes="", main="from nets.cnn import net\nimport yaml\nyaml.safe_load"
    )
    assert load_component("model.name", "main.py:net", code)() == 5
    assert load_component("model.name", "nets/cnn.py:net", code) is load_component("model.name", "nets.cnn:net", code)


def test_relative_imports_in_a_package(write: Write) -> None:
    code = write(pack____init__="", pack__a="from .b import value\ndef net(): return value", pack__b="value = 6")
    assert load_component("model.name", "pack/a.py:net", code)() == 6


def test_what_was_edited_after_the_copy_changes_nothing_and_a_damaged_copy_is_made_again(write: Write) -> None:
    code = write(net="def net(): return 1")
    provide(code, {"net.py": b"def net(): return 7"})  # as a worker on another host has it
    assert load_component("model.name", "net.py:net", code)() == 7
    root = use(code)
    assert root is not None
    (root / "net.py").write_text("def net(): return 8")
    assert load_component("model.name", "net.py:net", code)() == 7


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("x = 1", "net.py:Nett", r"^model.name: net.py has no 'Nett'$"),
        (
            "class Net: ...\ndef other(): ...",
            "net.py:Nett",
            r"has no 'Nett' \(did you mean Net\?\); it has Net, other$",
        ),
        ("x = 1", "net.py:x", r"^model.name: net.py:x is int; expected a class or a function$"),
        (
            "import gone",
            "net.py:x",
            r"cannot be imported \(line 1 of .*code0/net.py: ModuleNotFoundError: No module named",
        ),
        (
            "\n\n1 / 0",
            "net.py:x",
            r"cannot be imported \(line 3 of .*code0/net.py: ZeroDivisionError: division by zero\)",
        ),
        ("\ndef f(:", "net.py:x", r"cannot be imported \(line 2 of .*code0/net.py: SyntaxError: "),
        ("\nraise SystemExit(2)", "net.py:x", r"cannot be imported \(line 2 of .*code0/net.py: SystemExit: 2\)$"),
        ("", "gone.py:x", r"gone.py does not travel with the run"),
        ("", "net.gone:x", r"there is no module 'net.gone'"),
        ("import gone", "net:x", r"cannot be imported \(line 1 of .*net.py: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_opened_is_told_in_a_line(write: Write, text: str, name: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        load_component("model.name", name, write(net=text))


def test_a_file_without_code() -> None:
    with pytest.raises(UserError, match=r"^model.name: net.py:Net: no code travels with this configuration"):
        load_component("model.name", "net.py:Net")


def test_a_component_that_ends_the_process_ends_nothing(write: Write) -> None:
    code = write(net="import sys\ndef net(): sys.exit('no weights')")
    component = load_component("model.name", "net.py:net", code)
    with pytest.raises(UserError, match=r"net.py:net cannot be made \(line 2 of .*net.py: SystemExit: no weights\)$"):
        call("model.name", "net.py:net", component, {}, code)


def test_an_error_in_a_runs_copy_names_the_file_as_it_travels(write: Write, tmp_path: Path) -> None:
    """The copy is removed with a run that does not begin."""
    Path(write(net="\n1 / 0")[0]).rename(copy := tmp_path / "code")
    with pytest.raises(UserError, match=r"cannot be imported \(line 2 of net.py: ZeroDivisionError"):
        load_component("model.name", "net.py:net", (str(copy),))


def test_an_error_outside_of_the_users_code_names_no_line(write: Write) -> None:
    load_component("model.name", "net.py:net", code := write(net="import json\ndef net(): json.loads('{')"))
    with pytest.raises(ValueError) as caught:
        load_component("model.name", "net.py:net", code)()
    assert failure(caught.value, code).startswith(f"line 2 of {code[0]}/net.py: JSONDecodeError: ")
    assert failure(ValueError("a\nb")) == "ValueError: a b"


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def offered(group: str) -> dict[str, str]:
        return {"decoder": "json.decoder:JSONDecoder"} if group == "rayexp.models" else {}

    monkeypatch.setattr(components, "entry_points", offered)
    monkeypatch.setattr(references, "entry_points", offered)
    assert components.check_name("model.name", "decoder", ()) == "decoder"
    assert load_component("model.name", "decoder").__name__ == "JSONDecoder"
    with pytest.raises(
        ValueError, match=r"unknown model 'decodr' \(did you mean decoder\?\); allowed: decoder, package"
    ):
        components.check_name("model.name", "decodr", ())
    with pytest.raises(ValueError, match="unknown data 'decoder'"):
        components.check_name("data.name", "decoder", ("shapes",))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nets.Net", " (did you mean ./nets.py:Net or nets:Net?)"),
        ("lab.nets.Net", " (did you mean ./lab/nets.py:Net or lab.nets:Net?)"),
        ("./net.py", " (did you mean ./net.py:Name, with the name of what it defines?)"),
        ("net.py", " (did you mean net.py:Name, with the name of what it defines?)"),
        ("shape", " (did you mean shapes?)"),
        ("1.5", ""),
    ],
)
def test_a_reference_without_its_colon_is_recognised(name: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        components.check_name("data.name", name, ("shapes", "folder"))
    assert str(refused.value).startswith(f"unknown data {name!r}{said}; allowed: shapes, folder, ")
    assert str(refused.value).endswith("package.module:Name or ./file.py:Name")


@pytest.mark.parametrize("name", [":Net", "a:", "a b:Net", "a:N et", "a/b:Net", "a..b:Net", "1a:Net", "a:Net:"])
def test_what_is_no_reference(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no reference; expected package.module:Name or ./file.py:Name"):
        components.check_name("workload", name, ())


# ---------------------------------------------------------------------- what a component is made of


def test_the_hash_of_a_component_covers_what_it_imports_and_nothing_else(write: Write) -> None:
    def sha(**changes: str) -> str:
        files = {
            "data": "import helpers\nclass D: ...",
            "helpers": "def f():\n    from sub import late",
            "net": "x = 1",
        }
        code = write(**files | {"sub____init__": "", "sub__late": "y = 1"} | changes)
        return source_sha(source_of(load_component("data.name", "data.py:D", code)), travelling(code))

    base = sha()
    assert sha() == base == sha(net="x = 2") == sha(new="")
    changed = [sha(data="import helpers\nclass D: y = 1"), sha(helpers="from sub import late"), sha(sub__late="y = 2")]
    assert len({base, *changed}) == 4
    installed = source_of(load_component("data.name", "json.decoder:JSONDecoder"))
    assert installed.endswith("/json/decoder.py")
    assert source_sha(installed, {}) not in ("", base)
    assert source_of(load_component("data.name", "builtins:dict")) == ""
    assert source_sha("", {"a.py": b"1"}) != source_sha("", {"a.py": b"2"})
    assert source_sha("a.py", {"a.py": b"1 +"}) != source_sha("a.py", {"a.py": b"1 -"})  # being edited


def test_the_files_that_a_file_imports() -> None:
    files = {
        "a.py": b"import b.c as d\nfrom . import e\nfrom x import y\nimport os",
        "b/__init__.py": b"", "b/c.py": b"from ..e import z\nfrom .f import g", "b/f.py": b"", "e.py": b"import a",
        "x/y.py": b"", "other.py": b"import a",
    }  # fmt: skip
    assert imported("a.py", files) == {"a.py", "b/__init__.py", "b/c.py", "b/f.py", "e.py", "x/y.py"}
    assert imported("x/y.py", files) == {"x/y.py"}


# ---------------------------------------------------------------------- options


def net(num_classes: int, width: int = 8, *, depth: int, name: str | None = None) -> None: ...


class Checked:
    class Options(BaseModel, extra="forbid"):
        width: int = Field(8, ge=1)
        kind: str = "a"

    def __init__(self, num_classes: int, **options: Any) -> None: ...


OFFERED = {"num_classes": 10, "image_size": 64}


def test_a_component_is_given_its_options_and_what_it_asks_for() -> None:
    assert arguments("model", "net", net, {"depth": 2}, OFFERED) == {"num_classes": 10, "depth": 2}
    both = arguments("model", "net", net, {"depth": "2", "width": 4, "name": "x"}, OFFERED)
    assert both == {"num_classes": 10, "depth": 2, "width": 4, "name": "x"}
    assert arguments("model", "C", Checked, {}, OFFERED) == {"num_classes": 10, "width": 8, "kind": "a"}
    assert arguments("model", "f", lambda **k: k, {"z": 1}, OFFERED, ("num_classes",)) == {"num_classes": 10, "z": 1}
    assert arguments("model", "f", lambda: 0, {}, OFFERED, ("num_classes",)) == {}


@pytest.mark.parametrize(
    ("component", "options", "line"),
    [
        (net, {}, r"^model.depth: net needs it, and it has no default$"),
        (
            net,
            {"depth": 1, "widht": 2},
            r"^unknown key model.widht \(did you mean width\?\); allowed: width, depth, name$",
        ),
        (net, {"depth": "deep"}, r"^model.depth: expected a whole number, got 'deep'$"),
        (net, {"depth": 1, "num_classes": 5}, r"^model.num_classes: rayexp gives it to net itself$"),
        (Checked, {"width": 0}, r"^model.width: "),
        (Checked, {"wide": 1}, r"^unknown key model.wide \(did you mean width\?\); allowed: width, kind$"),
    ],
)
def test_wrong_options_are_named(component: Any, options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        arguments("model", "net", component, options, OFFERED)


def test_annotations_that_mean_nothing_here_take_anything() -> None:
    class Odd:
        def __init__(self, a: "Gone", b: object = None, c: "Callable[[int], int]" = abs) -> None: ...  # noqa: F821, UP037

    assert arguments("model", "Odd", Odd, {"a": [1]}, {}) == {"a": [1]}
