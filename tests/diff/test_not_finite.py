"""A run whose numbers are not finite, in every command that reads it: it says so, and `--json` is strict JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.errors import UserError
from rayexp.pages.run_page import write_run_page

NAN = float("nan")


def invoke(*words, code=0):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert (done.exit_code, done.exception is None or isinstance(done.exception, SystemExit)) == (code, True), done
    return done.stdout


def strict(*words, code=0):
    """The command's JSON; Infinity and NaN, which Python would read, are none."""
    return json.loads(
        invoke(*words, "--json", code=code), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )


@pytest.fixture
def gate(makes, arrays):
    """BASE@1 and NAN@1 of a hundred images, 95 of class 0: what a broken model sorts first is right nearly always."""
    label = np.repeat([0, 1], [95, 5])
    nan = np.full(100, NAN)
    base = makes.images([arrays.images(label, np.where(np.arange(100) < 8, 1, 0), classes=2)], 2, name="base")
    broken = makes.images(
        [arrays.images(label, np.zeros(100), classes=2, loss=nan, confidence=nan)], 2, name="broken",
    )  # fmt: skip
    return base, broken


def test_a_broken_model_passes_no_gate(gate):
    base, broken = gate
    words = ("diff", f"{base.root}@1", f"{broken.root}@1", "--max-drop", 3)
    assert "FAIL: allowed to get worse by 3 points of acc1; 100 of the 100 judgements of B are not finite" in invoke(
        *words, code=1
    )
    tree = strict(*words, code=1)
    assert (tree["verdict"], tree["acc1"]["b"], tree["not_finite"]["b"]) == ("FAIL", 0, 100)
    assert tree["loss"]["b"] is None
    assert strict("diff", f"{broken.root}@1", f"{base.root}@1", "--max-drop", 3, code=3)["verdict"] == "INCONCLUSIVE"
    assert strict("diff", f"{broken.root}@1", f"{broken.root}@1", "--max-drop", 3, code=1)["verdict"] == "FAIL"


def test_equal_models_pass(gate):
    base, _ = gate
    words = ("diff", f"{base.root}@1", f"{base.root}@1", "--max-drop", 0.5)
    assert "PASS: allowed to get worse by 0.5 points of acc1; A and B say the same of every sample" in invoke(*words)


def test_every_command_prints_strict_json(gate, makes, arrays, tmp_path):
    _, broken = gate
    runs = ("--runs", broken.root.parent)
    strict("runs", *runs)
    strict("runs", broken.id, *runs)
    strict("diff", "--all", broken.root)
    strict("report", broken.root)
    weights = [{"fc.weight": np.array([x, np.inf], np.float32)} for x in (NAN, 1.0)]
    tokens = [0, 1] * 300
    text = makes.text([arrays.tokens(tokens, np.full(600, x)) for x in (NAN, 700.0)], ["a", "b"], weights=weights)
    tree = strict("diff", f"{text.root}@1", f"{text.root}@2", "--weights", "--html", tmp_path / "t.html")
    assert tree["ppl"]["a"] is None
    assert tree["weights"]["relative"] is None
    strict("report", text.root)


def test_no_perplexity_of_three_hundred_digits(makes, arrays, tmp_path):
    text = makes.text([arrays.tokens([0, 1] * 300, np.full(600, x)) for x in (1.0, 690.0)], ["a", "b"])
    out = invoke("diff", f"{text.root}@1", f"{text.root}@2", "--html", tmp_path / "t.html")
    assert max(map(len, out.split())) < 80
    assert "e+299" in out
    assert "e+299" in (tmp_path / "t.html").read_text()


def test_pages_show_it(gate, makes, arrays, tmp_path):
    base, broken = gate
    page = tmp_path / "page.html"
    invoke("diff", f"{base.root}@1", f"{broken.root}@1", "--html", page, "--max-drop", 1, code=1)
    text = page.read_text()
    count = '✕ not finite (<span data-count="not_finite">100</span>)'
    for words in (count, "100 of the 100 judgements of B are not finite", "100</b> (0 of A, 100 of B)"):
        assert words in text
    assert not {"nan", "inf"} & set(text.replace("<", " ").replace(">", " ").split())
    write_run_page(page, broken)
    assert "validation loss of every epoch, so none is the best" in page.read_text()
    assert "<td" in page.read_text()
    tokens = [0, 1] * 300
    losses = [np.where(np.arange(600) < x, NAN, 1.0) for x in (0, 9)]
    language = makes.text([arrays.tokens(tokens, loss) for loss in losses], ["a", "b"])
    out = invoke("diff", f"{language.root}@1", f"{language.root}@2", "--html", page)
    assert "NOT FINITE: 0 of the tokens in A, 9 in B" in out
    assert "perplexity x not finite" in out
    assert "perplexity 2.7 and not finite" in page.read_text()


def test_the_best_epoch_is_a_finite_one(makes, arrays):
    whole = arrays.images([0, 1], [0, 0], classes=2)
    broken = arrays.images([0, 1], [0, 1], classes=2, loss=[NAN, NAN], confidence=[NAN, NAN])
    assert makes.images([broken, whole, broken], 2).epoch("best") == 2
    with pytest.raises(UserError):
        makes.images([broken], 2).epoch("best")
