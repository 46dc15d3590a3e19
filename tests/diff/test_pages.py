"""The pages: offline, escaped, accessible, and working in a browser."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayexp.config import DataConfig
from rayexp.data import open_data
from rayexp.diff.churn import diff_all
from rayexp.diff.churn_page import churn_page
from rayexp.diff.images import diff_images
from rayexp.diff.images_page import image_page, thumbnails
from rayexp.diff.noise import NoiseComparison, NoiseFloor
from rayexp.diff.page import write_page
from rayexp.diff.pair import read, read_pair
from rayexp.diff.pairs import diff_pairs
from rayexp.diff.pairs_page import pairs_page
from rayexp.diff.samples import diff_samples
from rayexp.diff.samples_page import samples_page
from rayexp.diff.slices import diff_slices
from rayexp.diff.text import diff_text
from rayexp.diff.text_page import text_page
from rayexp.diff.weights import diff_weights
from rayexp.errors import UserError
from rayexp.pages.page import TEMPLATES, p_value
from rayexp.runs.run import Run

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


class Outline(HTMLParser):
    """Elements with their attributes, in order."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture(scope="module")
def shared(makes_in, tmp_path_factory):
    """Makes runs for several tests."""
    return makes_in(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def pictures(shared, arrays):
    """A run on rayexp's own images, so that the pictures are at hand: 400 validation images, 2 epochs."""
    config = DataConfig(max_val_samples=400)
    data = open_data(config)
    label, classes = data.val.labels, len(data.classes)
    rng = np.random.default_rng(2)
    made = []
    for skill in (0.4, 0.7):
        first = np.where(rng.random(400) < skill, label, rng.integers(0, classes, 400))
        made.append(arrays.images(label, first, classes=classes, confidence=rng.random(400), loss=rng.random(400)))
    tree = {"data": {"max_val_samples": 400}}
    described = {"words": [w for _, w in data.classes], "names": list(data.val.names)}
    return shared.images(made, classes, config=tree, data_sha=data.val.sha, **described)


def image_report(run, epochs=(1, 2)):
    return diff_images(*read_pair((run, epochs[0]), (run, epochs[1])))


def pairs_report(run):
    return diff_pairs([read(run, epoch) for epoch in (1, 2, 3)])


def samples_report(makes):
    rng = np.random.default_rng(0)
    loss = rng.gamma(2, 1, 300)
    run = makes.samples([loss, loss + rng.normal(0, 0.5, 300)], names=[HOSTILE + str(i) for i in range(300)])
    return diff_samples(*read_pair((run, 1), (run, 2)))


def slices_of(report, path):
    """Of every third sample, under a hostile name."""
    path.write_text(f'index,"{HOSTILE}"\n' + "".join(f"{i},{HOSTILE}\n" for i in range(0, 30, 3)))
    return diff_slices(report.a, report.b, path)


def beside_seeds(report, seeds=(0, 1, 2)):
    n, m = len(report.a.predictions), len(seeds)
    changed = np.fromfunction(lambda i, j: (i != j) * (n // 4 + i + j), (m, m)).astype(np.int64)
    values = np.linspace(1, 2, m)
    floor = NoiseFloor(
        report.a.predictions.kind, "", n, 2, 2, 0.0, seeds, tuple(f"{HOSTILE}{s}" for s in seeds), changed, values
    )  # fmt: skip
    return report.beside(NoiseComparison(floor, report.churn, 0.1, 3))


def text_report(makes, arrays, n=4000):
    words = ["<eos>", "=", "cat", "dog", "sat", HOSTILE]
    rng = np.random.default_rng(0)
    token = rng.integers(2, 6, n)
    token[::40] = 0
    loss = rng.gamma(2, 1, n)
    run = makes.text([arrays.tokens(token, loss), arrays.tokens(token, loss + rng.normal(0, 1, n))], words)
    return diff_text(*read_pair((run, 1), (run, 2)))


@pytest.fixture(scope="module")
def pages(shared, arrays, pictures, tmp_path_factory):
    """Every kind of page by name."""
    folder = tmp_path_factory.mktemp("slices")
    run = shared.random_images(
        200, 4, 3, words=[HOSTILE, "a, b", "a, b", "a, c"], names=[HOSTILE + str(i) for i in range(200)]
    )
    changed = image_report(pictures)
    text, samples = text_report(shared, arrays), samples_report(shared)
    return {
        "pictures": image_page(changed.within(1.0).by(None, diff_weights((pictures, 1), (pictures, 2)))),
        "hostile": image_page(image_report(run)),
        "nothing": image_page(image_report(run, (2, 2))),
        "text": text_page(text_report(shared, arrays).within(2.0)),
        "noise": image_page(beside_seeds(changed).by(slices_of(changed, folder / "i.csv"))),
        "text noise": text_page(beside_seeds(text).by(slices_of(text, folder / "t.csv"))),
        "samples": samples_page(samples_report(shared).within(5.0)),
        "samples noise": samples_page(beside_seeds(samples, (4, 5)).by(slices_of(samples, folder / "s.csv"))),
        "pairs": pairs_page(pairs_report(run)),
        "short text": text_page(text_report(shared, arrays, 30)),
        "churn": churn_page(diff_all(run, [1, 2, 3])),
        "one epoch": churn_page(diff_all(run, [1])),
    }


def test_every_page_is_offline_labelled_and_escaped(pages):
    for name, page in pages.items():
        outline = Outline(page)
        for _, attrs in outline.found:
            for key in ("src", "href", "xlink:href", "action", "srcset"):
                assert not attrs.get(key) or attrs[key].startswith("#"), (name, attrs)
        assert "url(" not in page, name
        assert "@import" not in page, name
        assert HOSTILE not in page, name
        assert "owned'</script>" not in page, name
        ids = [attrs["id"] for _, attrs in outline.found if "id" in attrs]
        assert len(ids) == len(set(ids)), name
        assert outline.all("html") == [{"lang": "en"}]
        assert len(outline.all("h1")) == 1
        assert len(outline.all("main")) == 1
        for attrs in outline.all("svg"):
            assert attrs.get("aria-label") or attrs.get("aria-hidden"), name
        for tag, attrs in outline.found:
            if "aria-labelledby" in attrs:
                assert attrs["aria-labelledby"] in ids, (name, tag)
        assert page.count("nan %") == 0


def test_pictures_are_those_of_the_flips(pictures):
    r = image_report(pictures)
    encoded, why_not = thumbnails(r)
    assert why_not == ""
    assert len(encoded) == r.churn > 100
    pixels = open_data(DataConfig(max_val_samples=400)).val.read(np.array([f.index for f in r.flips[:5]]))
    for i, data in enumerate(encoded[:5]):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            shown = np.asarray(image.convert("RGB"), dtype=float)
        assert shown.shape == (64, 64, 3)
        distance = [np.abs(shown - original).mean() for original in pixels]
        assert np.argmin(distance) == i
        assert distance[i] < 12


def test_lost_and_gained_come_first_where_pictures_are_many(pictures, monkeypatch):
    r = image_report(pictures)
    monkeypatch.setattr(sys.modules[thumbnails.__module__], "MAX_PICTURES", r.lost + r.gained + 1)
    encoded, _ = thumbnails(r)
    assert len(encoded) == r.churn
    assert [bool(x) for x, f in zip(encoded, r.flips, strict=True) if f.kind != "other_wrong"] == [True] * (
        r.lost + r.gained
    )
    assert sum(map(bool, encoded)) == r.lost + r.gained + 1
    assert "have pictures, lost and gained ones first" in image_page(r)


def test_pictures_not_at_hand(makes, pictures):
    assert "not those that were judged" in thumbnails(image_report(makes.random_images(50, 3, 2)))[1]
    moved = Run(Path(shutil.copytree(pictures.root, makes.storage / pictures.id)))
    text = moved.config_path.read_text()
    moved.write(
        "config.yaml", text.replace("name: shapes", "name: folder").replace("root: null", "root: /nowhere/at/all")
    )
    page = image_page(image_report(moved))
    assert "The pictures are not at hand" in page
    assert "/nowhere/at/all" in page


def test_p_value():
    assert [p_value(p) for p in (None, 1.0, 0.034, 2.13e-7, 0.0)] == ["none", "1.00", "0.034", "2.1e-07", "< 1e-300"]


def test_a_folder_is_refused(makes, tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        write_page(tmp_path, image_report(makes.random_images(20, 3, 2)))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp-")]


def test_contrast():
    """Text and signs have a contrast of 4.5 : 1 at least on both backgrounds, in light and in dark (WCAG 2.2 AA)."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = (TEMPLATES / "diff_base.html.j2").read_text()
    palettes = re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    for palette in palettes:
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", palette))
        for text, ground in itertools.product(("text", "soft", "link", "lost", "gained", "other"), ("page", "panel")):
            light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, colours)


def test_the_verdict_comes_first_then_the_picture_then_the_figures(pages):
    for name in ("pictures", "hostile", "text"):
        order = [
            pages[name].index(words) for words in ('class="lead"', 'class="stack"', 'class="span"', 'class="cards"')
        ]
        assert order == sorted(order), name


def test_the_last_epoch_is_not_called_settled(makes):
    """It is what the others are settled against, so 100 % says nothing of it."""
    page = churn_page(diff_all(makes.random_images(200, 4, 3), [1, 2, 3]))
    rows = re.findall(r'<tr><th scope="row" class="n">(\d)</th>(.*?)</tr>', page.split("<details>")[0])
    assert [epoch for epoch, _ in rows] == ["1", "2", "3"]
    cells = [re.findall(r'<td class="n">([^<]*)</td>', row) for _, row in rows]
    assert [bool(row[2]) and bool(row[3]) for row in cells] == [True, True, False]
    settled = re.search(r'class="curve settled" points="([^"]*)"', page)
    assert len(settled[1].split()) == 2
    assert "100.0" not in page.split("<details>")[0].split("<tbody>")[1]


# ---------------------------------------------------------------------- in a browser

WATCH = "<script>addEventListener('error', e => document.documentElement.dataset.error = e.message)</script>"


@pytest.fixture
def look(tmp_path, chromium):
    def look(page, state="", act=""):
        """The page's DOM after the browser opened it with `#state` and ran the script `act`."""
        path = tmp_path / "page.html"
        acting = f"<script>{act}</script></body>"
        path.write_text(page.replace("<head>", "<head>" + WATCH, 1).replace("</body>", acting))
        dom = chromium("--dump-dom", path.as_uri() + (f"#{state}" if state else ""))
        assert "data-error" not in dom.split(">", 3)[1], dom[:300]
        return dom

    return look


@pytest.mark.browser
class TestBrowser:
    def cards(self, dom):
        return [a["class"] for a in Outline(dom.split('id="grid"', 1)[1].split("</ul>", 1)[0]).all("li")]

    def test_gallery(self, pictures, look):
        r = image_report(pictures)
        dom = look(image_page(r))
        assert len(self.cards(dom)) == 120
        assert f"{r.churn} images, the first 120 shown." in dom
        images = Outline(dom).all("img")
        assert len(images) == 120
        assert images[0]["alt"] == f"{r.flips[0].name}, {r.words(r.flips[0].label)}"
        assert all(i["src"].startswith("data:image/webp;base64,") for i in images)

    def test_filters_by_address(self, pictures, look):
        r = image_report(pictures)
        label = r.flips[0].label
        expected = [f for f in r.flips if f.label == label and f.kind == "lost"]
        dom = look(image_page(r), f"filter=lost&class={label}")
        assert self.cards(dom) == ["lost"] * len(expected)
        assert expected[0].name in dom
        assert f"{expected[0].name}, label {label}<" in dom
        counts = dict(re.findall(r'data-count="(\w+)">([\d,]+)<', dom))
        ours = [f.kind for f in r.flips if f.label == label]
        assert counts == {"all": f"{len(ours)}"} | {
            kind: str(ours.count(kind)) for kind in ("lost", "gained", "other_wrong")
        }
        dom = look(image_page(r), "filter=nonsense&class=99999&sort=x&find=no-such-name")
        assert self.cards(dom) == []
        assert "No image fits this filter." in dom

    def test_filters_by_hand(self, pictures, look):
        r = image_report(pictures)
        act = "document.querySelector('input[value=gained]').click()"
        dom = look(image_page(r), act=act)
        assert self.cards(dom) == ["gained"] * min(120, r.gained)
        act = "document.getElementById('more').click(); document.title = document.activeElement.tagName"
        dom = look(image_page(r), act=act)
        assert len(self.cards(dom)) == min(240, r.churn)
        assert "<title>LI</title>" in dom  # the focus goes on where the new cards begin
        label = r.classes[0].label
        act = f"document.querySelector('button[data-class=\"{label}\"]').click(); document.title = location.hash"
        dom = look(image_page(r), act=act)
        assert len(self.cards(dom)) == sum(f.label == label for f in r.flips)
        assert f"<title>#class={label}</title>" in dom

    def test_hostile_names(self, pages, look):
        dom = look(pages["hostile"])
        assert "<title>owned" not in dom
        assert not [a for a in Outline(dom).all("img") if "onerror" in a]

    def test_all_open_without_an_error(self, pages, measured):
        faulty = pages["nothing"].replace("</body>", "<script>nothing.at.all</script></body>")
        found = measured({**pages, "faulty": faulty}, 1280, "error")
        assert "nothing is not defined" in found.pop("faulty")
        assert found == dict.fromkeys(pages, "")

    def test_passages(self, pages, look):
        shown = "document.title = [...document.querySelectorAll('.passage')].filter(p => p.offsetHeight).length"
        everything = pages["text"].count('<article class="passage')
        worse = pages["text"].count('<article class="passage worse')
        assert 0 < worse < everything
        assert f"<title>{everything}</title>" in look(pages["text"], act=shown)
        assert f"<title>{worse}</title>" in look(pages["text"], "filter=worse", act=shown)

    def test_tokens_are_read_without_pointing(self, pages, measured):
        """By touch, and by Tab and the arrow keys."""
        tokens = re.findall(r'<i(?: class="\w+")? title="([^"]+)">([^<]*)</i>', pages["text"])[:3]
        said = [f"{word}: {both}" for both, word in tokens]
        assert all("A " in line and ", B " in line for line in said)
        key = "document.querySelector('.passage .t').dispatchEvent(new KeyboardEvent('keydown', {key: '%s'}));"
        focus = "document.querySelector('.passage .t').focus();"
        both = focus + 2 * (key % "ArrowRight")
        acts = {
            "": "true|",
            "document.querySelectorAll('.passage i')[1].click();": f"false|{said[1]}",
            focus: f"false|{said[0]}",
            both: f"false|{said[2]}",
            both + key % "ArrowLeft": f"false|{said[1]}",
            both + key % "Escape": f"true|{said[2]}",
        }
        opened = {act: pages["text"].replace("</body>", f"<script>{act}</script></body>") for act in acts}
        shown = "(p => p.hidden + '|' + p.textContent)(document.getElementById('said'))"
        assert measured(opened, 1280, shown) == acts

    def test_six_thousand_flips_without_lag(self, makes, look):
        r = image_report(makes.random_images(10_000, 100, 8, seed=1), (1, 8))
        assert r.churn > 4000
        act = (
            "const t = performance.now(); for (const v of ['lost', 'gained', 'all']) {"
            "document.querySelector(`input[value=${v}]`).click(); document.body.offsetHeight }"
            "document.title = (performance.now() - t) / 3"
        )
        page = image_page(r)
        assert len(page) < 2_000_000  # without pictures
        took = float(re.search(r"<title>([\d.]+)</title>", look(page, act=act))[1])
        assert took < 500  # milliseconds a filter, layout included
        data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
        assert len(data["name"]) == r.churn


def test_foreign_names_are_escaped(makes, arrays, tmp_path):
    """Escape sequences, markup, and a Latin-1 name as the file system gives it, in names and words."""
    evil = "\x1b]0;x\x07\x1b[2J<b>caf\udce9</b>"
    label = [0, 1, 0, 1]
    run = makes.images(
        [arrays.images(label, x, classes=2) for x in ([0, 1, 1, 1], [1, 0, 0, 1])], 2,
        names=[evil + str(i) for i in range(4)], words=[evil, "=cmd"],
    )  # fmt: skip
    page = tmp_path / "page.html"
    write_page(page, diff_images(*read_pair((run, 1), (run, 2))))
    text = page.read_text(encoding="utf-8")
    assert not any(ord(c) < 32 and c not in "\n\t" for c in text)
    assert "<b>caf" not in text
    assert "\\x1b]0;x\\x07\\x1b[2J&lt;b&gt;caf\\xe9" in text  # a class in the tables
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert data["name"][0].startswith("\\x1b]0;x\\x07\\x1b[2J<b>caf\\xe9</b>")
    assert data["words"][1] == "=cmd"
