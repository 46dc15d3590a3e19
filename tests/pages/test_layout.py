"""Every page on a telephone, on a screen and on paper: nothing is cut, scrolls sideways or breaks a word, and dark is
dark."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rayexp.diff.churn import diff_all
from rayexp.diff.churn_page import churn_page
from rayexp.diff.images import diff_images
from rayexp.diff.images_page import image_page
from rayexp.diff.pair import read_pair
from rayexp.diff.text import diff_text
from rayexp.diff.text_page import text_page
from rayexp.diff.weights import diff_weights
from rayexp.pages import plots
from rayexp.pages.language import LanguageSample
from rayexp.pages.page import TEMPLATES
from rayexp.pages.run_page import write_run_page

LONG = "a_long_name_of_a_file_with_many_words_in_it"


def run_page_of(run, sample=None):
    path = run.root / "report.html"
    write_run_page(path, run, sample)
    return path.read_text()


@pytest.fixture(scope="module")
def pages(makes_in, arrays, tmp_path_factory):
    """Every page of a run and of a diff by name, with long names in it."""
    found, makes = {}, makes_in(tmp_path_factory.mktemp("pages"))
    steps = [{"epoch": e, "first": e == 1, "loss": [2.0, 1.0], "lr": [0.1, 0.1]} for e in (1, 2)]
    layers = [{f"layer{i}.0.conv1.weight": np.full((2, 2), e + i, np.float32) for i in range(4)} for e in (1, 2)]
    for classes in (8, 20, 200):
        n = 20 * classes
        run = makes.random_images(
            n, classes, 2, name=f"c{classes}", names=[f"{LONG}_{i}.JPEG" for i in range(n)],
            words=[f"{LONG[: 5 + i % 30]} {i}" for i in range(classes)], weights=layers,
        )  # fmt: skip
        run.steps_path.write_text("".join(json.dumps(line) + "\n" for line in steps))
        found[f"run of {classes} classes"] = run_page_of(run)
    found["diff of images"] = image_page(
        diff_images(*read_pair((run, 1), (run, 2))).by(None, diff_weights((run, 1), (run, 2)))
    )
    found["churn"] = churn_page(diff_all(makes.random_images(100, 4, 24, name="churn"), list(range(1, 25))))
    rng = np.random.default_rng(0)
    token, loss = rng.integers(0, 6, 4000), rng.gamma(2, 1, 4000)
    text = makes.text(
        [arrays.tokens(token, loss), arrays.tokens(token, loss + rng.normal(0, 1, 4000))],
        ["<eos>", "cat", "dog", "sat", "= = a heading = =", LONG],
    )
    found["diff of texts"] = text_page(diff_text(*read_pair((text, 1), (text, 2))).within(2.0))
    sample = LanguageSample(2, {"test_loss": 5.0, "test_ppl": 148.4}, "", f"the {LONG} of\n the {LONG * 3}", "", 40)
    found["run of a text"] = run_page_of(text, sample)
    return found


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_or_scrolls_sideways(pages, measured, width):
    assert measured(pages, width, "overflow") == {name: [] for name in pages}


@pytest.mark.browser
def test_a_list_that_goes_on_ends_in_a_shadow(makes, chromium, tmp_path):
    """Also where rows end at the edge, and where a browser hides the bars to scroll by."""
    style = re.search(r"<style>.*?</style>", run_page_of(makes.random_images(40, 4, 1)), re.S)[0]
    boxes = "".join(
        f'<div class="scroll" style="position: absolute; top: 0; left: {left}px; width: 200px; height: 100px">'
        f'<div style="height: {inside}px"></div></div>'
        for left, inside in ((0, 500), (300, 50), (600, 500))
    )
    end = "<script>document.querySelectorAll('.scroll')[2].scrollTop = 500</script>"
    (tmp_path / "page.html").write_text(f"<!doctype html>{style}{boxes}{end}")
    shot = tmp_path / "page.png"
    chromium(f"--screenshot={shot}", "--window-size=900,300", (tmp_path / "page.html").as_uri())
    ground = np.asarray(Image.open(shot).convert("L"))[95, 100:800:300]
    assert ground[0] < 235
    assert list(ground[1:]) == [255, 255]  # all is seen; scrolled to the end


@pytest.mark.browser
def test_no_word_is_broken_on_paper(pages, measured):
    paper = {name: page.replace("@media print", "@media all") for name, page in pages.items()}
    assert all(page != pages[name] for name, page in paper.items())
    assert measured(paper, 690, "broken") == {name: [] for name in pages}  # A4 within its margins


@pytest.mark.browser
def test_dark_pages_have_no_light_ground(pages, chromium, tmp_path):
    for name, page in pages.items():
        path, shot = tmp_path / "page.html", tmp_path / "page.png"
        # As a screen that prefers dark has it; without the validation images, which are what they are.
        path.write_text(re.sub(r"@media screen and \(prefers-color-scheme: dark\)", "@media all", page))
        chromium(f"--screenshot={shot}", "--window-size=1280,4000", path.as_uri())
        light = np.asarray(Image.open(shot).convert("L")) > 200
        assert light.mean() < 0.05, name  # letters and lines
        blocks = light[: len(light) // 40 * 40].reshape(len(light) // 40, 40, 32, 40).mean((1, 3))
        assert blocks.max() < 0.85, name


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_figures_stand_out_from_both_grounds():
    """Text by 4.5 : 1 and lines by 3 : 1 (WCAG 2.2); but for the yellow, the orange and the pale ones, which fill
    bars."""
    grounds = re.findall(r"--page: (#[0-9a-f]{6})", (TEMPLATES / "diff_base.html.j2").read_text())
    assert grounds == [plots.PAPER, plots.DARK[plots.PAPER]]
    light, dark = grounds
    assert contrast(plots.INK, light) >= 4.5
    assert contrast(plots.DARK[plots.INK], dark) >= 4.5
    for colour in ("#0072B2", "#009E73", "#D55E00", "#8C8C8C", "#555555"):
        assert contrast(colour, light) >= 3, colour
    for colour in {*plots.COLOURS, *plots.PHASE_COLOURS}:
        assert contrast(plots.DARK.get(colour, colour), dark) >= 3, colour


def test_figures_take_the_colours_of_the_page(makes):
    page = run_page_of(makes.random_images(3000, 200, 2))
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    for light in ("#17191e", "#d5d9e0", "#0072b2"):
        assert f"var(--ink-{light[1:]}, {light})" in drawn
        assert f"--ink-{light[1:]}: {light};" in page
    alone = re.sub(r"var\(--ink-[0-9a-f]{6}, #[0-9a-f]{6}\)", "", drawn)
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", alone)) <= {c.lower() for c in plots.COLOURS}
    assert "#ffffff" not in alone


def test_each_figure_is_drawn_for_a_screen_and_for_a_telephone(makes):
    page = run_page_of(makes.random_images(100, 4, 2))
    wide, narrow = (
        re.findall(rf'<svg role="img" aria-labelledby="([a-z-]+)" class="for-{w}"', page) for w in ("wide", "narrow")
    )
    assert wide == narrow == ["fig-curves", "fig-pace", "fig-phases"]
    assert all(page.count(f'<figcaption id="{name}">') == 1 for name in wide)


def axes_of(monkeypatch, width, panels, make):
    """The axes as `make` fills them in a figure so many inches wide."""
    fills = []
    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw", lambda name, height, fill, **_: fills.append(fill) or "")
        make()
    axes = list(Figure(figsize=(width, 3), layout="constrained").subplots(1, panels, squeeze=False).flat)
    fills[0](axes[0] if panels == 1 else axes)
    return axes


@pytest.mark.parametrize("epochs", [1, 30])
@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
def test_epochs_are_counted_in_whole_numbers(makes, monkeypatch, epochs, width):
    records = makes.random_images(20, 4, epochs).records()
    curves = axes_of(monkeypatch, width, 2, lambda: plots.curves(records, ["acc1"]))
    pace = axes_of(monkeypatch, width, 2, lambda: plots.pace(records, "images"))
    for ax in (*curves, *pace):
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("classes", [1, 17, 67])
def test_a_heat_map_names_classes_and_does_not_count_those_that_occur(monkeypatch, width, classes):
    names = [f"class {i}" for i in range(classes)]
    matrix = np.eye(classes, dtype=np.int64)
    (ax, *_) = axes_of(monkeypatch, width, 1, lambda: plots.heat_map(matrix, names))
    for axis in (ax.xaxis, ax.yaxis):
        texts = [label.get_text() for label in axis.get_ticklabels()]
        written = dict(zip(map(int, axis.get_ticklocs()), texts, strict=True))
        assert written == {i: f"class {i}" for i in written}
        assert 0 in written
        assert min(classes, 8) <= len(written) <= (16 if width == plots.NARROW else 48)


def test_losses_below_zero_are_seen(makes, monkeypatch):
    """As of a density."""
    records = [dataclasses.replace(r, val_loss=-3.0) for r in makes.random_images(20, 4, 1).records()]
    lines = [{"epoch": 1, "loss": [-5.0] * records[0].step, "lr": [0.1] * records[0].step}]
    left, *_ = axes_of(monkeypatch, plots.WIDE, 3, lambda: plots.step_curves(records, lines, "samples", "loss"))
    assert left.get_ylim()[0] < -5 < left.get_ylim()[1] < 0
    assert left.get_ylabel() == "loss"


def test_an_epoch_that_is_not_finite_is_marked(makes, arrays, monkeypatch):
    """And the axis reaches to it, as those beside do."""
    label = np.zeros(20, np.int64)
    made = [arrays.images(label, label, classes=2, loss=np.full(20, x)) for x in (1.0, np.nan, 2.0, np.inf)]
    records = makes.images(made, 2).records()
    losses, acc1 = axes_of(monkeypatch, plots.WIDE, 2, lambda: plots.curves(records, ["acc1"]))
    (marks,) = (line for line in losses.lines if line.get_label() == "not finite")
    assert list(marks.get_xdata()) == [2, 4]
    assert losses.get_xlim() == pytest.approx(acc1.get_xlim())
    whole, _ = axes_of(monkeypatch, plots.WIDE, 2, lambda: plots.curves(records[:1], ["acc1"]))
    assert "not finite" not in [line.get_label() for line in whole.lines]


def test_a_long_name_on_a_heat_map_is_cut_and_not_left_out(monkeypatch):
    """Be it one word."""
    (ax, *_) = axes_of(monkeypatch, plots.WIDE, 1, lambda: plots.heat_map(np.eye(2, dtype=np.int64), [LONG, "a " * 20]))
    assert [label.get_text() for label in ax.yaxis.get_ticklabels()] == [
        "a_long_name_of_a_file...",
        "a a a a a a a a a a a...",
    ]


def test_every_metric_has_axes_of_its_own(makes, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "draw", lambda name, height, fill, panels=1, **_: seen.append((name, panels)) or "")
    run = makes.random_images(100, 4, 2)
    plots.curves(run.records(), ["acc1", "acc5"])
    plots.curves(run.records(), [])
    plots.curves(run.records(), list("abcdefg"))
    assert [panels for _, panels in seen] == [3, 1, 6]


def test_no_number_is_parted_from_its_unit(pages):
    """In all that is read; code, which is copied, and what stands in the script stay as they are."""
    for name, page in pages.items():
        text = re.sub(r"<(script|style|pre|code|svg)\b.*?</\1>|<[^>]*>", "|", page, flags=re.DOTALL)
        assert re.findall(r"\d (?:%|s|ms|GB)(?!\w)", text) == [], name
        assert re.search(r"\d\u00a0(?:%|s)(?!\w)", text), name
        kept = "".join(re.findall(r"<(?:script|code|pre)\b.*?</(?:script|code|pre)>", page, flags=re.DOTALL))
        assert "\u00a0" not in kept, name
