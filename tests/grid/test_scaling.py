"""Strong and weak scaling, batch sizes, communication, equal time and notes, from comparisons made of known numbers."""

from __future__ import annotations

import json

import pytest

from rayexp.cli import _grid_tables
from rayexp.grid import plots, sentences, tables
from rayexp.grid.page import compare_page
from rayexp.grid.report import read_report
from rayexp.runs.run import Run

WORKERS = [{"num_workers": n, "use_gpu": False, "cpus_per_worker": 1} for n in (1, 2, 4)]
RATES = {
    "cpu-plain": 80.0, "cpu-x1-exact": 50.0, "cpu-x2-exact": 90.0, "cpu-x4-exact": 150.0,
    "cpu-x2-exact-weak": 95.0, "cpu-x4-exact-weak": 180.0,
}  # fmt: skip


@pytest.fixture
def both(grids):
    """Strong and weak scaling in one grid."""
    comparison = grids.plan(mode=["strong", "weak"], reduction=["exact"], base={"batch_size": 64, "shards": 8})
    shas = {name: ("a" if "weak" not in name else name) for name in RATES}
    return grids.fill(comparison, RATES, sha=shas, spread=0.01)


def beside(report, cell):
    return {one.key.mode: one for entry in report.cells for one in entry.scalings if one.cell == cell}


def test_strong_and_weak_scaling_stand_on_one_page(both):
    report = read_report(both)
    assert {(f.name, len(f.fits)) for f in report.families} == {
        ("cpu, fp32, exact, strong", 2), ("cpu, fp32, exact, weak", 0)
    }  # fmt: skip
    assert set(beside(report, "cpu-x1-exact")) == {"strong", "weak"}
    strong, weak = beside(report, "cpu-x4-exact")["strong"], beside(report, "cpu-x4-exact-weak")["weak"]
    assert strong.reference == weak.reference == "cpu-x1-exact"
    assert strong.efficiency.value == pytest.approx(150 / 50 / 4, rel=0.05)
    assert weak.efficiency.value == pytest.approx(180 / 50 / 4, rel=0.05)
    assert (strong.serial is None, weak.serial is None) == (False, True)
    assert [row["cell"] for row in tables.scaling(report, "weak")] == [
        "cpu-x1-exact", "cpu-x2-exact-weak", "cpu-x4-exact-weak"
    ]  # fmt: skip
    page = compare_page(report)
    for words in ('id="fig-strong-cpu"', 'id="fig-weak-cpu"', "Strong scaling: ", "Weak scaling: ", "Gustafson"):
        assert words in page
    text = sentences.markdown(report)
    assert "| speed-up over cpu-x1-exact (95 %) |" in text  # the reference is named


def test_weak_efficiency_is_the_time_of_a_step_on_equal_devices(both):
    report = read_report(both)
    one, four = (next(e for e in report.cells if e.cell.id == name) for name in ("cpu-x1-exact", "cpu-x4-exact-weak"))
    # A step of the cell has four times the samples; the test's runs give every step 256 whatever the batch is.
    ratio = one.measured.step_seconds().value / four.measured.step_seconds().value / 4
    assert beside(report, "cpu-x4-exact-weak")["weak"].efficiency.value == pytest.approx(ratio)


def test_another_batch_is_another_model(grids):
    comparison = grids.plan(batch_size=[64, 256], scaling=WORKERS[:2], reduction=["exact"], base={"shards": 8})
    rates = {f"{name}-b{batch}": rate * batch for name, rate in list(RATES.items())[:3] for batch in (64, 256)}
    shas = {name: name[-4:] for name in rates}
    top1 = {"cpu-x2-exact-b256": [1, 1, 0, 0, 0, 0, 0, 0]}
    report = read_report(grids.fill(comparison, rates, sha=shas, top1=top1))
    assert report.equal
    assert {group.name for group in report.groups} == {
        "cpu fp32, batch 64 in 8 shards",
        "cpu fp32, batch 256 in 8 shards",
    }
    found = {entry.cell.id: entry for entry in report.cells}
    assert found["cpu-x2-exact-b256"].result == "cpu-x1-exact-b256"
    assert found["cpu-x2-exact-b256"].differing == (2, 2)
    assert found["cpu-x2-exact-b64"].differing == (0, 0)
    assert beside(report, "cpu-x2-exact-b256")["strong"].reference == "cpu-x1-exact-b256"
    assert found["cpu-x1-exact-b64"].over_plain.value == pytest.approx(
        50 / 80, rel=1e-3
    )  # the script's batch is its own
    rows = {row["cell"]: row for row in tables.scaling(report, "strong")}
    assert rows["cpu-x2-exact-b64"]["over"] == "cpu-x1-exact-b64"
    assert "fig-batches" in (plots.batches(report) or "")
    said = list(sentences.answers(report))
    assert any(line.startswith("Batch 256: cpu-x2-exact-b256 on 2 cores is the fastest") for line in said)


def test_weak_scaling_of_one_batch_is_not_grouped_with_strong_scaling_of_another(grids):
    """Both have batches of 128, cut into other shards."""
    comparison = grids.plan(
        mode=["strong", "weak"], batch_size=[64, 128], scaling=WORKERS[1:2], reduction=["exact"], baseline=False
    )  # fmt: skip
    rates = dict.fromkeys([cell.id for cell in comparison.cells()], 50.0)
    report = read_report(grids.fill(comparison, rates, sha={name: name for name in rates}))
    assert report.equal
    assert len(report.groups) == 4


# ---------------------------------------------------------------------- what cannot be


def test_an_efficiency_above_what_noise_allows_is_left_empty_and_said(grids):
    rates = {"cpu-x1-exact": 50.0, "cpu-x2-exact": 130.0, "cpu-x4-exact": 150.0}
    report = read_report(grids.fill(grids.plan(reduction=["exact"], baseline=False), rates, spread=0.01))
    two, four = beside(report, "cpu-x2-exact")["strong"], beside(report, "cpu-x4-exact")["strong"]
    assert (two.efficiency, two.serial) == (None, None)
    assert four.efficiency is not None
    assert two.to_json()["efficiency"] is None
    assert any(note.startswith("no efficiency for cpu-x2-exact: more than linear") for note in report.warnings)
    assert (
        next(row for row in tables.scaling(report, "strong") if row["cell"] == "cpu-x2-exact")["efficiency (95 %)"]
        == ""
    )


def test_an_efficiency_above_1_within_the_noise_stands(grids):
    rates = {"cpu-x1-exact": 50.0, "cpu-x2-exact": 101.5}
    report = read_report(grids.fill(grids.plan(reduction=["exact"], baseline=False), rates, spread=0.02))
    two = beside(report, "cpu-x2-exact")["strong"]
    low, high = two.efficiency.interval
    assert low < 1 < two.efficiency.value < high
    assert two.serial is None  # its value would be below 0
    assert two.impossible is None


def test_a_rate_that_falls_has_no_serial_fraction(grids):
    rates = {"cpu-x1-exact": 50.0, "cpu-x4-exact": 40.0}
    report = read_report(grids.fill(grids.plan(reduction=["exact"], baseline=False), rates))
    assert beside(report, "cpu-x4-exact")["strong"].serial is None


# ---------------------------------------------------------------------- one repeat


def test_one_repeat_has_no_interval_and_no_forecast_and_is_said_once(grids, capsys):
    rates = {name: grids.rates[name] for name in ("cpu-plain", "cpu-x1-exact", "cpu-x4-exact")}
    report = read_report(grids.fill(grids.plan(repeats=1), rates))
    assert all(f.forecasts == () and "take several" in f.why_not for f in report.families)
    assert all("take several" in fit.refused for f in report.families for fit in f.fits)
    tree = json.loads(json.dumps(report.to_json()))
    cell = next(cell for cell in tree["cells"] if cell["cell"] == "cpu-x4-exact")
    for name in ("samples_per_second", "speedup", "efficiency", "karp_flatt", "speedup_over_plain", "epoch_seconds"):
        assert cell[name]["value"] > 0
        assert (cell[name]["low"], cell[name]["high"]) == (None, None)
    text, page = sentences.markdown(report), compare_page(report)
    assert " to " not in tables.speed(report)[1][f"{report.unit}/s (95 %)"]
    note = "no intervals and no forecasts: one repeat says nothing of what differs between runs; take several"
    _grid_tables.show(report)
    for where in (text, page, capsys.readouterr().out.replace("\n", " ")):
        assert note in where
        assert where.count("take several") == where.count("one repeat says") == 1
        assert "no forecast;" not in where
    assert "Laws and forecasts" not in page + text


def test_a_cell_whose_repeats_failed_is_named(grids):
    comparison = grids.plan(repeats=2)
    grids.fill(comparison, {"cpu-x1-exact": 50.0})
    grids.fill(comparison, {"cpu-x2-exact": 90.0}, repeats=1)
    report = read_report(comparison)
    assert any(note.startswith("no intervals and no forecasts for cpu-x2-exact: ") for note in report.warnings)


# ---------------------------------------------------------------------- forecasts


def test_a_forecast_is_checked_by_leaving_out_the_largest_count(grids):
    """A fifth of the one worker's step does not shrink; the model of one and two workers finds that and hits four."""
    comparison = grids.plan(reduction=["exact"], baseline=False)
    for n in (1, 2, 4):
        work, exchange = 4.0 / n + 1.0, 2 * (n - 1) / n * 4e-3
        step = work + 0.1 + exchange
        parts = {"data": 0.0, "transfer": 0.0, "compute": work, "reduce": exchange, "optimizer": 0.1}
        shares = {name: part / step for name, part in parts.items()}
        grids.fill(comparison, {f"cpu-x{n}-exact": 256 / step}, parts=shares)
    (family,) = read_report(comparison).families
    assert family.left_out == 4
    assert abs(family.miss) < 1e-3
    eight = next(one for one in family.forecasts if one.workers == 8)
    assert eight.floor_seconds == pytest.approx(1.1, rel=1e-3)
    assert eight.rate == pytest.approx(256 / (0.5 + 1.1 + 2 * 7 / 8 * 4e-3), rel=1e-3)
    assert "made without 4 workers, it is off by" in sentences.forecast_source(family)


# ---------------------------------------------------------------------- communication, time, notes


def test_compute_against_communication(grids):
    report = read_report(grids.fill(grids.plan(), grids.rates))
    four = next(e for e in report.cells if e.cell.id == "cpu-x4-exact").communication
    step = 256 / 150
    assert (four.volume, four.sent) == (4e6, pytest.approx(2 * 3 / 4 * 4e6))
    assert four.bare == pytest.approx(2 * 3 / 4 * 4e-3)
    assert four.bandwidth == pytest.approx(1e9)
    assert four.ring == pytest.approx(four.bare, rel=0.01)
    assert (four.waited, four.compute) == (pytest.approx(0.2 * step, rel=1e-3), pytest.approx(0.8 * step, rel=1e-3))
    assert four.share == pytest.approx(0.2)
    assert four.hidden == 0  # waited far longer than the bare sum takes
    assert {row["cell"] for row in tables.communication(report)} == {
        f"cpu-x{n}-{kind}" for n in (2, 4) for kind in ("exact", "ddp")
    }
    assert tables.communication(report)[0]["effective"] == "1 GB/s"


def test_old_runs_without_a_measured_link_have_no_bandwidth(grids):
    comparison = grids.fill(grids.plan(baseline=False), {"cpu-x2-exact": 90.0})
    for run in Run.all(comparison.cells_path):
        run.update(link=None)
    found = read_report(comparison).cells[0].communication
    assert (found.bare, found.bandwidth, found.ring, found.hidden) == (None, None, None, None)
    assert tables.communication(read_report(comparison))[0]["effective"] == ""


def test_what_each_had_reached_when_the_first_was_done(grids):
    """Epochs of 2560 samples: at 160/s 16 s, at 50/s 51 s; the start-up is 10 s, the first step takes 3 s."""
    report = read_report(grids.fill(grids.plan(), grids.rates))
    ends = {entry.cell.id: entry.measured.repeats[0].elapsed() for entry in report.cells}
    assert report.moment == pytest.approx(min(times[-1] for times in ends.values()))
    assert report.moment == pytest.approx(ends["cpu-x4-ddp"][-1])
    rows = {row["cell"]: row for row in tables.results(report)}
    (column,) = (name for name in rows["cpu-plain"] if name.startswith("acc1 at "))
    assert rows["cpu-x4-ddp"][column] == "20"
    assert rows["cpu-x2-exact"][column] == "10"
    assert rows["cpu-x1-exact"][column] == "no epoch yet"
    tree = {cell["cell"]: cell["at_equal_time"] for cell in report.to_json()["cells"]}
    assert (tree["cpu-x4-ddp"]["acc1"], tree["cpu-x1-exact"]["acc1"]) == (20, None)


def test_the_schedule_has_a_price(grids):
    report = read_report(grids.fill(grids.plan(price_per_device_hour={"cpu": 0.36}), {"cpu-x4-exact": 150.0}))
    four = next(e for e in report.cells if e.cell.id == "cpu-x4-exact")
    assert four.schedule_cost == pytest.approx(4 * 0.36 * four.schedule_seconds / 3600)
    assert "USD/4 epochs" in tables.time_and_cost(report)[0]


@pytest.mark.parametrize(("cores", "warned"), [(1.9, False), (2.1, True)])
def test_a_busy_machine_is_said(grids, cores, warned):
    comparison = grids.fill(grids.plan(), {"cpu-x1-exact": 50.0})
    comparison.update(others=[{"cores": 0.1, "of": 8}, {"cores": cores, "of": 8}])
    notes = " ".join(read_report(comparison).warnings)
    assert ("busy with other work when the comparison began: 2.1 of its 8 cores" in notes) is warned


def test_a_load_average_is_no_sign_of_others(grids):
    """Comparisons of before have one; it may be that of the training that came before in the same process."""
    comparison = grids.fill(grids.plan(), {"cpu-x1-exact": 50.0})
    comparison.update(load=[7.5])
    assert "busy" not in " ".join(read_report(comparison).warnings)


def test_repeats_that_differ_are_said(grids):
    calm = read_report(grids.fill(grids.plan(), grids.rates, spread=0.01))
    assert calm.warnings == ()
    wild = read_report(grids.fill(grids.plan(), {"cpu-x1-exact": 50.0}, spread=0.3))
    assert any(
        note.startswith("repeats differ, so something disturbed them: cpu-x1-exact by ") for note in wild.warnings
    )


@pytest.mark.parametrize(("share", "warned"), [(0.49, True), (0.51, False)])
def test_devices_that_idle_are_said(grids, share, warned):
    comparison = grids.fill(grids.plan(), {"cpu-x1-exact": 50.0, "cpu-x2-exact": 90.0})
    for run in Run.all(comparison.cells_path):
        if "x2" in run.id:
            rows = [record.to_json() | {"busy": share} for record in run.records()]
            run.epochs_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = read_report(comparison)
    said = "devices idle more than half of the time (by CPU time): cpu-x2-exact 51 %"
    assert (said in report.warnings) is warned
    assert [row["busy"] for row in tables.speed(report)] == ["", f"{100 * share:.0f} %"]


def test_a_gpu_that_nvml_does_not_tell_of_is_busy_while_its_clocks_run(grids):
    gpu = [{"num_workers": 1, "use_gpu": True}]
    comparison = grids.plan(gpus=1, scaling=gpu, reduction=["exact"], baseline=False)
    parts = {"data": 0.7, "transfer": 0.05, "compute": 0.15, "reduce": 0.0, "optimizer": 0.1}
    report = read_report(grids.fill(comparison, {"gpu-x1-exact": 50.0}, parts=parts))
    (entry,) = report.cells
    assert entry.busy == (pytest.approx(0.3, rel=0.05), "the step's clocks")
    assert any("idle" in note for note in report.warnings)


def test_the_fastest_is_set_beside_the_plain_script_and_one_device(grids):
    report = read_report(grids.fill(grids.plan(), grids.rates))
    said = next(iter(sentences.answers(report)))
    assert said == (
        "cpu-x4-ddp on 4 cores is the fastest, 160 (160 to 160) images per second: 2 (2 to 2) times the plain script "
        "and 2.67 (2.67 to 2.67) times cpu-x1-ddp."
    )


@pytest.mark.parametrize(("lanes", "weak"), [(None, False), (1, True)])
def test_all_cores_with_one_worker_s_batch_are_no_point_of_weak_scaling(grids, lanes, weak):
    scaling = [{"num_workers": 0, "use_gpu": False, "lanes": lanes}, *WORKERS[:2]]
    comparison = grids.plan(scaling=scaling, reduction=["exact"], mode=["strong", "weak"], baseline=False)
    rates = {"cpu-inprocess-exact": 100.0, "cpu-x1-exact": 50.0, "cpu-x2-exact": 90.0, "cpu-x2-exact-weak": 95.0}
    report = read_report(
        grids.fill(comparison, rates, sha={name: "w" if name[-4:] == "weak" else "a" for name in rates})
    )
    assert ("weak" in beside(report, "cpu-inprocess-exact")) is weak
    assert "strong" in beside(report, "cpu-inprocess-exact")
    rows = {row["cell"]: row for row in tables.scaling(report, "strong")}
    reference = "cpu-inprocess-exact" if weak else "cpu-x1-exact"
    assert list(rows[reference].values())[4] == "1"
    assert rows[reference]["efficiency (95 %)"] == "100 %"
