"""What too few repeats do not tell is not said: intervals that say nothing, a fastest cell that nothing supports."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rayexp.grid import plots, sentences, tables
from rayexp.grid.comparison import CellResult
from rayexp.grid.forecast import Link, StepModel, forecast
from rayexp.grid.page import compare_page
from rayexp.grid.report import read_report
from rayexp.grid.scaling import BY_CHANCE
from rayexp.grid.statistics import TOO_FEW, WIDEST, Estimate, quantile, telling
from rayexp.pages.plots import NARROW, WIDE
from rayexp.system.disk import now


@pytest.fixture
def measured(grids):
    """A comparison of strong scaling whose cells have these rates, one a repeat."""

    def make(rates, **grid):
        most = max(map(len, rates.values()))
        comparison = grids.plan(repeats=most, reduction=["exact"], baseline="cpu-plain" in rates, **grid)
        session = comparison.begin()
        for cell in comparison.cells():
            for repeat, rate in enumerate(rates.get(cell.id, ()), start=1):
                run = grids.run(comparison, cell, rate, "a", None, grids.parts, 2)
                comparison.add(CellResult(cell.id, repeat, "done", None, run.id, 60.0, now()), session)
        return read_report(comparison)

    return make


def two_runs(reach):
    """Two rates whose interval reaches by that factor either way."""
    apart = 2 * math.log(reach) / quantile(1)  # the standard error of two is half of what lies between them
    return [100 * math.exp(apart / 2), 100 * math.exp(-apart / 2)]


# ---------------------------------------------------------------------- the rule


def test_an_interval_over_a_factor_of_ten_is_the_widest_that_is_printed():
    wide, wider = Estimate.of(two_runs(3.16)), Estimate.of(two_runs(3.17))
    assert wide.interval == wide.bounds == pytest.approx((100 / 3.16, 316))
    assert (wide.open, wider.open) == (False, True)
    assert wider.interval is None
    assert wider.bounds == pytest.approx((100 / 3.17, 317))
    assert wider.to_json() == {"value": pytest.approx(100), "low": None, "high": None}
    assert tables.between(wide) == "100 (31.6 to 316)"
    assert tables.between(wider) == f"100 ({TOO_FEW})"
    assert tables.interval(wider) == TOO_FEW
    assert tables.percent(wide.times(0.005)) == "50 % (16 to 158)"
    assert tables.percent(wider.times(0.005)) == f"50 % ({TOO_FEW})"
    assert WIDEST == 10


def test_one_run_is_not_too_few_but_one():
    lone = Estimate.of([100.0])
    assert (lone.bounds, lone.interval, lone.open) == (None, None, False)
    assert tables.between(lone) == "100"
    assert tables.percent(lone.times(0.005)) == "50 %"


@given(st.floats(1e-6, 1e6), st.floats(1, 100).filter(lambda x: abs(x - 10) > 1e-6))
def test_the_rule_knows_no_unit(value, factor):
    assert telling((value, value * factor)) == (factor <= 10)


def test_what_reaches_down_to_nothing_says_nothing():
    assert not telling((0.0, 1.0))
    assert not telling((-1.0, 1.0))


def test_a_wide_interval_that_says_something_stays(measured):
    """Two repeats that differ by a tenth."""
    report = measured({"cpu-x1-exact": [50.0, 55.0], "cpu-x4-exact": [150.0, 170.0]})
    (_, four) = report.cells
    low, high = four.scalings[0].speedup.interval
    assert low < 2.2
    assert high > 4.3
    for rows in (tables.speed(report), tables.scaling(report, "strong")):
        assert not any(TOO_FEW in text for row in rows for text in row.values())


def test_an_absurd_interval_is_blank_with_the_reason(measured):
    """Two repeats that differ by half have an interval over powers of ten, and so has all that is made of them."""
    report = measured({"cpu-plain": [80.0, 81.0], "cpu-x1-exact": [50.0, 25.0], "cpu-x4-exact": [90.0, 91.0]})
    plain, one, four = report.cells
    assert one.rate.bounds[1] > 1000
    for estimate in (one.rate, one.over_plain, four.scalings[0].speedup, four.scalings[0].efficiency):
        assert (estimate.open, estimate.interval) == (True, None)
    assert four.scalings[0].serial.interval is None
    assert plain.rate.interval
    assert four.rate.interval
    for text in (sentences.markdown(report), compare_page(report), "\n".join(sentences.answers(report))):
        assert (
            f"2.56 ({TOO_FEW})" in text
            or f"2.56 times what cpu-x1-exact does, an efficiency of 64 % ({TOO_FEW} how sure)" in text
        )
        assert "28,4" not in text
    note = (
        f"{TOO_FEW}, since the interval would reach over more than a factor of ten: the rate of cpu-x1-exact and the "
    )
    assert [text.startswith(note) for text in report.warnings].count(True) == 1
    tree = json.loads(json.dumps(report.to_json()))
    cell = next(cell for cell in tree["cells"] if cell["cell"] == "cpu-x4-exact")
    assert (cell["efficiency"]["low"], cell["efficiency"]["high"]) == (None, None)
    assert plots.reach(one) == pytest.approx(50, rel=1e-4)


def test_an_efficiency_above_100_percent_that_may_be_chance_is_blank(measured):
    for rates in ([50.0, 25.0], [50.0]):
        report = measured({"cpu-x1-exact": rates, "cpu-x2-exact": [120.0, 121.0][: len(rates)]})
        (beside,) = report.cells[1].scalings
        assert (beside.efficiency, beside.impossible) == (None, BY_CHANCE)
    sure = measured({"cpu-x1-exact": [50.0, 50.5], "cpu-x2-exact": [120.0, 121.0]})
    assert sure.cells[1].scalings[0].impossible.startswith("more than linear")
    far = measured({"cpu-x1-exact": [5.0, 6.2], "cpu-x2-exact": [120.0, 121.0]})  # too wide, and yet all above 100 %
    assert far.cells[1].scalings[0].speedup.open
    assert far.cells[1].scalings[0].impossible.startswith("more than linear")


def test_a_serial_fraction_that_may_be_anything_has_no_interval(measured):
    report = measured({"cpu-x1-exact": [50.0, 53.0], "cpu-x2-exact": [80.0, 92.0]})
    (beside,) = report.cells[1].scalings
    assert beside.speedup.interval[0] < 1
    assert beside.speedup.interval[1] > 2
    assert beside.serial.interval is None
    assert 0 < beside.serial.value < 1


def models(*seconds):
    return [StepModel(1, s, 0.02, 0.0, 45e6, 256, Link(1e9, 0.0, "given")) for s in seconds]


def test_a_forecast_that_says_nothing_is_not_made():
    assert [one.workers for one in forecast(models(0.80, 0.81), 1.0, [2, 8], 0.0, 8)] == [2, 8]
    assert forecast(models(0.4, 0.8), 1.0, [2, 8], 0.0, 8) == []
    # A model that is off by nearly a half, and rounds that differ: together over more than a factor of ten.
    near = models(0.80, 0.94)
    assert forecast(near, 1.0, [2], 0.0, 8)
    assert forecast(near, 1.0, [2], 0.45, 8) == []


def test_forecasts_that_say_nothing_are_named(measured):
    """The rounds differ in what they share, which more workers divide, and less in what they do not."""
    report = measured({"cpu-x1-exact": [50.0, 62.3]}, interconnect={"bandwidth_gbit": 0.1, "latency_us": 5})
    (family,) = report.families
    assert family.unsaid
    assert family.forecasts
    assert {*family.unsaid} | {one.workers for one in family.forecasts} == {2, 4, 8, 16, 32}
    (said,) = sentences.links(report)
    assert said.endswith(f"workers: {TOO_FEW}.")
    assert family.to_json()["too_few_repeats_for"] == list(family.unsaid)
    report = measured({"cpu-x1-exact": [50.0, 100.0]}, interconnect={"bandwidth_gbit": 100, "latency_us": 5})
    assert sentences.links(report) == [f"{report.families[0].name}: no forecast; {TOO_FEW}."]


# ---------------------------------------------------------------------- the headline


def first(report):
    return next(iter(sentences.answers(report)))


def test_a_rate_that_was_measured_once_is_not_the_fastest(measured):
    report = measured({"cpu-plain": [100.0], "cpu-x1-exact": [101.0], "cpu-x2-exact": [102.0]})
    assert first(report) == (
        "cpu-x2-exact on 2 cores had the highest rate, 102 images per second, measured once: 1.02 times the plain "
        "script and 1.01 times cpu-x1-exact."
    )
    assert "fastest" not in " ".join(sentences.answers(report))


def test_rates_that_the_repeats_do_not_tell_apart_have_no_fastest(measured):
    report = measured({"cpu-x1-exact": [99.0, 101.0, 103.0], "cpu-x2-exact": [100.0, 102.0, 104.0]})
    assert first(report).startswith("cpu-x2-exact on 2 cores had the highest rate, 102 (")
    assert ") images per second, not told apart from cpu-x1-exact: 1.01 (" in first(report)
    many = measured({f"cpu-x{n}-exact": [99.0 + n, 103.0 - n, 101.0 + n / 10] for n in (1, 2, 4)})
    assert ", not told apart from cpu-x2-exact and cpu-x1-exact: " in first(many)


def test_the_fastest_is_so_beside_every_other(measured):
    apart = {
        "cpu-x1-exact": [50.0, 50.5, 51.0],
        "cpu-x2-exact": [90.0, 91.0, 92.0],
        "cpu-x4-exact": [150.0, 151.0, 152.0],
    }
    assert " is the fastest, " in first(measured(apart))
    near = {**apart, "cpu-x2-exact": [149.0, 151.0, 150.5]}
    assert "had the highest rate" in first(measured(near))
    once = {**apart, "cpu-x2-exact": [90.0]}  # the highest was measured thrice, and nothing is known of the other
    assert ", not told apart from cpu-x2-exact: " in first(measured(once))


def test_a_cell_alone_is_no_winner(measured):
    assert (
        first(measured({"cpu-x1-exact": [50.0]}))
        == "cpu-x1-exact on 1 core ran at 50 images per second, measured once."
    )


def test_more_than_two_are_counted():
    assert [sentences.listed(list("abcde")[:n]) for n in (1, 2, 3, 4)] == [
        "a",
        "a and b",
        "a, b and 1 other",
        "a, b and 2 others",
    ]


# ---------------------------------------------------------------------- figures


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize(
    "repeats", [[100.0], [100.0, 99.0], [100.0, 50.0], [100.0, 101.0, 99.0, 100.5, 99.5, 100.0, 100.0, 100.0, 130.0]]
)
def test_no_number_stands_on_a_line_or_a_repeat(measured, monkeypatch, width, repeats):
    """Beside every bar, behind its interval and its repeats, and within the axes."""
    report = measured(
        {"cpu-x1-exact": repeats, "cpu-x2-exact": [90.0] * len(repeats), "cpu-x4-exact": [9.0] * len(repeats)}
    )
    fills = []
    monkeypatch.setattr(plots, "draw", lambda name, height, fill, **_: fills.append(fill) or "")
    plots.rates(report, "cpu")
    figure = Figure(figsize=(width, 3), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    fills[0](ax)
    canvas.draw()
    numbers = [text for text in ax.texts if text.get_text().startswith("  ")]
    assert len(numbers) == 3
    right = ax.get_window_extent().x1
    for text in numbers:
        box, y = text.get_window_extent(), text.get_position()[1]
        ends = [ax.transData.transform((x, y))[0] for line in ax.lines for x, at in line.get_xydata() if at == y]
        assert box.x0 >= max(ends)
        assert box.x1 <= right + 2 or not width
