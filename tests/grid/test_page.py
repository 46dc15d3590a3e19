"""The pages of a device grid and of a run, and the commands that write them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.config import ExperimentConfig, parse
from rayexp.errors import UserError
from rayexp.grid import sentences
from rayexp.grid.page import compare_page
from rayexp.grid.report import read_report
from rayexp.pages.run_page import write_run_page
from rayexp.runs.run import Run


@pytest.fixture(scope="module")
def comparison(grids_in, tmp_path_factory):
    """An ordinary one, whose repeats differ a little."""
    grids = grids_in(tmp_path_factory.mktemp("ordinary"))
    return grids.fill(grids.plan(), grids.rates, spread=0.01)


@pytest.fixture(scope="module")
def page(comparison):
    return compare_page(read_report(comparison))


def test_the_page_is_one_offline_file(page):
    assert page.count("<svg") >= 4
    assert "a &lt;processor&gt; &amp; more" in page
    # Nothing is fetched: the only addresses are names of XML namespaces and licences inside the SVG.
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*:', page.replace('xlink:href="#', 'xlink:href="#'))
    assert "@import" not in page
    assert "url(http" not in page
    ids = re.findall(r'<figcaption id="(fig-[a-z0-9_-]+)"', page)
    assert len(ids) == len(set(ids)) >= 5
    assert page.count("<svg") == 2 * len(ids)  # for a screen and for a telephone


def test_the_same_comparison_gives_the_same_figures(comparison, page):
    again = compare_page(read_report(comparison))
    assert page == again or re.sub(r"Made by.*", "", page) == re.sub(r"Made by.*", "", again)


def test_markdown_is_a_table(grids):
    text = sentences.markdown(read_report(grids.fill(grids.plan(), grids.rates)))
    rows = [line for line in text.splitlines() if line.startswith("| cpu-")]
    # Speed, time and results of all; scaling of all but the plain script; communication of those with workers.
    assert len(rows) == 3 * 7 + 6 + 4
    lines = text.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("|") and "speed-up" in line)
    body = lines[header + 2]
    assert body.startswith("| cpu-x1-exact")
    assert lines[header].count("|") == body.count("|")


def test_report_command_prints_json_only(grids, typed):
    comparison = grids.fill(grids.plan(), grids.rates)
    done = typed("report", comparison.id, "--runs", grids.storage, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal_weights"] is True
    assert {cell["cell"] for cell in found["cells"]} == set(grids.rates)
    assert (comparison.root / "report.html").is_file()


def test_resume_of_a_finished_comparison_only_reports(grids):
    comparison = grids.fill(grids.plan(), grids.rates)
    result = CliRunner().invoke(app, ["compare", "--resume", str(comparison.root)])
    assert result.exception is None
    assert "cpu-x4-exact" in result.output
    assert "the same weights" in result.output
    assert comparison.meta()["status"] == "done"
    assert (comparison.root / "report.md").read_text().startswith(f"# {comparison.id}")


def test_report_of_a_run(grids, tmp_path):
    comparison = grids.fill(grids.plan(), {"cpu-x1-exact": 50.0})
    run = Run.all(comparison.cells_path)[0]
    (run.root / "diff_1_2.html").write_text("<p>")
    out = tmp_path / "page.html"
    write_run_page(out, run)
    page = out.read_text()
    assert page.count("<figcaption") == 3
    assert "diff_1_2.html" in page
    assert "20.00" in page  # acc1 of the second epoch


def test_report_of_a_run_without_epochs_is_refused(tmp_path):
    run = Run.create(parse({"storage_path": str(tmp_path)}, ExperimentConfig, "x"), argv=[])
    with pytest.raises(UserError, match="no epoch has finished"):
        write_run_page(tmp_path / "page.html", run)


@pytest.fixture(scope="module")
def large(grids_in, tmp_path_factory):
    """The page of a grid with thirty-two cells of long names."""
    grids = grids_in(tmp_path_factory.mktemp("large"))
    scaling = [
        {"num_workers": n, "use_gpu": False, "cpus_per_worker": c, "lanes": 1} for n in (1, 2, 4, 8) for c in (1, 2)
    ]
    comparison = grids.plan(
        cpus=16, scaling=scaling, precision=["fp32", "bf16"], baseline=False, name="a-grid-with-quite-a-long-name",
        price_per_device_hour={"cpu": 0.04}, target={"acc1": 15}, base={"name": "an_experiment_of_a_long_name"},
    )  # fmt: skip
    rates = {cell.id: 50.0 + 11 * i for i, cell in enumerate(comparison.cells())}
    assert len(rates) == 32
    return compare_page(read_report(grids.fill(comparison, rates, spread=0.01)))


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_thirty_cells_fit_a_telephone_and_a_screen(large, measured, width):
    assert measured({"page": large}, width, "overflow") == {"page": []}


@pytest.mark.browser
def test_thirty_cells_break_no_word_on_paper(large, measured):
    assert measured({"page": large.replace("@media print", "@media all")}, 690, "broken") == {"page": []}


def test_the_verdict_comes_first_then_pictures_then_tables(large):
    order = [large.index(words) for words in ('class="lead"', 'class="plot"', "<table>")]
    assert order == sorted(order)


@pytest.mark.browser
def test_the_page_renders(page, tmp_path, chromium):
    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(page, encoding="utf-8")
    chromium(f"--screenshot={shot}", "--window-size=1200,6000", path.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    # The phases' colours are on the page: the figures were drawn.
    for colour in ((0x00, 0x9E, 0x73), (0xD5, 0x5E, 0x00)):
        assert (np.abs(pixels.astype(int) - colour).sum(-1) < 6).sum() > 500
