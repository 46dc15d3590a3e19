"""The figures of a device grid's report, from comparisons made of known numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from rayexp.cli import _grid_tables, app
from rayexp.config import ExperimentConfig, parse
from rayexp.errors import RunError, UserError
from rayexp.grid import measured, sentences, tables
from rayexp.grid.comparison import CellResult
from rayexp.grid.page import compare_page, write_compare_page
from rayexp.grid.report import read_report
from rayexp.runs.records import Predictions
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter
from rayexp.system.disk import now


def test_a_recorder_keeps_the_steps_of_every_epoch(tmp_path):
    run = Run.create(parse({"storage_path": str(tmp_path)}, ExperimentConfig, "x"), argv=[])
    writer = RunWriter(run)
    for epoch in (1, 2, 2):  # the second epoch comes twice: it was resumed
        record = {
            "epoch": epoch, "step": epoch, "train_loss": 1.0, "val_loss": 1.0, "acc1": 1.0, "lr": 0.1,
            "samples_per_second": 1.0, "seconds": {"total": 1.0}, "weights_sha": "a",
        }  # fmt: skip
        files = {"state.json": json.dumps({"epoch": epoch, "step": epoch, "files": {}}).encode()}
        writer.epoch(record, files, b"", {"epoch": epoch, "first": epoch == 1, "count": [4], "total": [0.5]})
    assert [line["epoch"] for line in run.steps()] == [1, 2]
    with run.steps_path.open("a") as file:
        file.write('{"epoch": 3, "cou')  # a crash in the middle of a line
    assert [line["epoch"] for line in run.steps()] == [1, 2]


def lines(comparison):
    return {line.cell.id: line for line in read_report(comparison).cells}


# ---------------------------------------------------------------------- figures


def test_rates_leave_the_first_step_out(grids):
    found = lines(grids.fill(grids.plan(), grids.rates))
    assert found["cpu-x1-exact"].rate.value == pytest.approx(50, rel=1e-5)
    assert found["cpu-x1-exact"].measured.first_step() == pytest.approx(3)
    assert found["cpu-x1-exact"].measured.startup() == pytest.approx(10)


def test_every_cell_is_measured_alike_whatever_its_steps_look_like(grids):
    """The plain script's loader hands over in bursts: most steps take nothing, every fifth waits for all of them."""
    comparison = grids.fill(grids.plan(repeats=2), {"cpu-plain": 80.0, "cpu-x1-exact": 50.0})
    for run in Run.all(comparison.cells_path):
        if "plain" in run.id:
            rows = run.steps()
            for row in rows:
                total = sum(row["total"][1:]) if row["first"] else sum(row["total"])
                waits = [total / 2 if i in (5, 9) else 1e-6 for i in range(len(row["total"]))]
                row["total"] = [row["total"][0], *waits[1:]] if row["first"] else waits
            run.steps_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, exact = read_report(comparison).cells
    assert plain.rate.value == pytest.approx(80, rel=1e-4)
    assert exact.over_plain.value == pytest.approx(50 / 80, rel=1e-4)
    for line in (plain, exact):
        tree = line.to_json()
        rates = tree["samples_per_second"]
        assert rates["value"] == pytest.approx(rates["throughput"]) == pytest.approx(np.mean(rates["repeats"]))
        assert rates["value"] * tree["step_seconds"]["value"] == pytest.approx(256)  # one measure for both


def test_what_is_not_finite_differs_from_the_reference(grids):
    comparison = grids.fill(grids.plan(repeats=1), {"cpu-x1-exact": 50.0, "cpu-x1-ddp": 50.0})
    run = next(r for r in Run.all(comparison.cells_path) if r.id.split("-cpu-x1-")[1].startswith("ddp"))
    p = run.predictions(2)
    loss = np.where(np.arange(8) < 3, np.nan, p["loss"]).astype(np.float32)
    run.predictions_path(2).write_bytes(Predictions(p.kind, p.data_sha, {**p.arrays, "loss": loss}).to_npz())
    rows = [r.to_json() | {"val_loss": None} for r in run.records()]
    run.epochs_path.write_text("".join(json.dumps(row).replace("null", "NaN") + "\n" for row in rows))
    report = read_report(comparison)
    assert next(line.differing for line in report.cells if line.cell.id == "cpu-x1-ddp") == (3, 3)
    assert next(row["val_loss"] for row in tables.results(report) if row["cell"] == "cpu-x1-ddp") == "not finite"


def test_rates_leave_the_first_step_of_every_process_out(grids):
    comparison = grids.fill(grids.plan(), grids.rates)
    row = next(row for row in comparison.rows() if row.cell == "cpu-x1-exact")
    run = comparison.run(row)
    rows = run.steps()
    rows[1]["first"], rows[1]["total"][0] = True, 7.0  # resumed here
    run.steps_path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    found = measured.read_repeat(run, 60)
    assert len(found.steps["total"]) == 2 * grids.steps - 2
    assert found.throughput == pytest.approx(50, rel=1e-5)
    assert (found.first_step, found.startup) == (7.0, 13.0 - 7.0)
    for line in rows:
        for name in ("count", "total", *measured.STEP_PHASES):
            line[name] = line[name][:1]
    run.steps_path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    assert list(measured.read_repeat(run, 60).steps["total"]) == [3.0, 7.0]  # there are no others


def test_speedup_efficiency_and_what_they_are_against(grids):
    found = lines(grids.fill(grids.plan(), grids.rates))
    four = found["cpu-x4-exact"]
    (beside,) = four.scalings
    assert beside.reference == "cpu-x1-exact"
    assert beside.speedup.value == pytest.approx(3, rel=1e-4)
    assert beside.efficiency.value == pytest.approx(0.75, rel=1e-4)
    assert beside.serial.value == pytest.approx((1 / 3 - 1 / 4) / (1 - 1 / 4), rel=1e-3)
    assert four.over_plain.value == pytest.approx(150 / 80, rel=1e-4)
    assert four.over_ddp.value == pytest.approx(150 / 160, rel=1e-4)
    assert found["cpu-x4-ddp"].scalings[0].reference == "cpu-x1-ddp"
    assert found["cpu-x4-ddp"].over_ddp is None
    assert found["cpu-plain"].scalings == ()
    assert found["cpu-plain"].over_plain is None


def test_an_epoch_counts_an_ordinary_step_for_the_first(grids):
    found = lines(grids.fill(grids.plan(), grids.rates))["cpu-x1-exact"]
    assert found.epoch.value == pytest.approx(grids.steps * 256 / 50 + 0.8, rel=1e-4)
    assert found.measured.phases()["reduce"] == pytest.approx(0.2 * grids.steps * 256 / 50, rel=1e-4)
    # four epochs of the base experiment, though the cells trained two
    assert found.schedule_seconds == pytest.approx(10 + 4 * (grids.steps * 256 / 50 + 0.8), rel=1e-4)


def test_phases_and_the_rest_add_up_to_the_wall_clock(grids):
    repeat = lines(grids.fill(grids.plan(), grids.rates))["cpu-x1-exact"].measured.repeats[0]
    assert repeat.unaccounted() < 1e-6
    assert repeat.startup + repeat.training + repeat.shutdown == pytest.approx(60)


def test_phases_that_do_not_add_up_are_seen(grids):
    short = {**grids.parts, "compute": 0.5}  # a tenth of every step is in no phase
    comparison = grids.plan()
    grids.fill(comparison, {"cpu-x1-exact": 50.0}, parts=short)
    for run in Run.all(comparison.cells_path):
        rows = [r.to_json() for r in run.records()]
        for row in rows:
            row["seconds"]["total"] /= 0.9
        run.epochs_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_report(comparison).cells[0].measured.repeats[0].unaccounted() > 0.05


def test_cost_energy_and_time_to_a_target(grids):
    comparison = grids.plan(price_per_device_hour={"cpu": 0.36}, target={"acc1": 20, "val_loss": 0.5})
    found = lines(grids.fill(comparison, grids.rates, energy=120.0))["cpu-x4-exact"]
    epoch = grids.steps * 256 / 150 + 0.8
    assert found.cost == pytest.approx(4 * 0.36 * epoch / 3600, rel=1e-4)
    assert found.measured.energy() == 120
    # acc1 is 20 after the second epoch, whose predecessor held the slow first step
    assert found.target_seconds["acc1"] == pytest.approx(10 + 2 * epoch - 256 / 150 + 3, rel=1e-4)
    assert found.target_seconds["val_loss"] is None
    assert "not reached" in sentences.markdown(read_report(comparison))


def test_spread_between_repeats_widens_the_interval(grids, tmp_path):
    calm = lines(grids.fill(grids.plan(), grids.rates))["cpu-x4-exact"].rate.interval
    others = type(grids)(tmp_path / "wild")
    wild = lines(others.fill(others.plan(), grids.rates, spread=0.1))
    low, high = wild["cpu-x4-exact"].rate.interval
    assert calm[1] - calm[0] < 0.01
    assert high - low > 3


# ---------------------------------------------------------------------- equal results


def test_equal_weights_are_said_with_their_hash(grids):
    report = read_report(grids.fill(grids.plan(), grids.rates))
    assert report.equal
    (group,) = report.groups
    assert group.cells == ("cpu-x1-exact", "cpu-x2-exact", "cpu-x4-exact")
    assert group.runs == 9
    assert group.sentence() == "cpu fp32: 9 exact runs of 3 cells ended with the same weights (a)"


def test_unequal_weights_fail_loudly(grids):
    comparison = grids.plan()
    grids.fill(comparison, grids.rates, sha={**dict.fromkeys(grids.rates, "a"), "cpu-x4-exact": "b"})
    report = read_report(comparison)
    assert not report.equal
    assert "2 DIFFERENT weights" in report.groups[0].sentence()
    assert "DIFFERENT" in compare_page(report)
    result = CliRunner().invoke(app, ["compare", "--resume", str(comparison.root)])
    assert isinstance(result.exception, RunError)
    assert "DIFFERENT" in str(result.exception)


def test_repeats_of_one_exact_cell_must_agree_too(grids):
    comparison = grids.plan(repeats=2)
    grids.fill(comparison, {"cpu-x1-exact": 50.0}, sha="a", repeats=1)
    session = comparison.begin()
    cell = next(c for c in comparison.cells() if c.id == "cpu-x1-exact")
    run = grids.run(comparison, cell, 50.0, "b", None, grids.parts, 2)
    comparison.add(CellResult(cell.id, 2, "done", None, run.id, 60.0, now()), session)
    assert not read_report(comparison).equal


def test_ddp_may_differ_and_its_predictions_are_counted(grids):
    top1 = {"cpu-x2-ddp": [1, 1, 1, 0, 0, 0, 0, 0]}
    shas = {**dict.fromkeys(grids.rates, "a"), "cpu-x1-ddp": "c", "cpu-x2-ddp": "d", "cpu-x4-ddp": "e"}
    report = read_report(grids.fill(grids.plan(), grids.rates, sha=shas, top1=top1))
    assert report.equal
    assert {line.result for line in report.cells if line.cell.reduction != "plain"} == {"cpu-x1-exact"}
    found = {line.cell.id: line.differing for line in report.cells}
    assert found["cpu-x2-ddp"] == (3, 3)
    assert found["cpu-x4-ddp"] == (0, 0)
    row = next(row for row in tables.results(report) if row["cell"] == "cpu-x2-ddp")
    assert row["differ"] == "3 of 8"


def test_tokens_differ_where_the_probability_doubles_or_halves(grids):
    base = {
        "workload": "language_model", "data": {"name": "python_docs"}, "model": {"name": "lstm"}, "batch_size": 16,
        "shards": 4,
    }  # fmt: skip
    comparison = grids.plan(base=base)
    nudged = {"cpu-x1-ddp": [0.0, 0.6, 0.7, -0.7, -0.6, 0, 0, 2]}
    report = read_report(grids.fill(comparison, grids.rates, top1=nudged, kind="tokens"))
    assert report.unit == "tokens"
    assert next(line.differing for line in report.cells if line.cell.id == "cpu-x1-ddp") == (3, 3)
    assert "ppl" in tables.results(report)[0]


def test_weak_scaling_compares_no_weights_across_sizes(grids):
    comparison = grids.plan(mode="weak")
    shas = {name: name if "exact" in name else "x" for name in grids.rates}
    report = read_report(grids.fill(comparison, grids.rates, sha=shas))
    assert report.equal
    assert len(report.groups) == 3
    assert all(one.serial is None for line in report.cells for one in line.scalings)
    assert not any(family.fits for family in report.families)


# ---------------------------------------------------------------------- laws and forecasts


def test_three_counts_carry_amdahl_but_not_usl(grids):
    report = read_report(grids.fill(grids.plan(), grids.rates, spread=0.005))
    family = next(f for f in report.families if f.name == "cpu, fp32, exact")
    law, usl = family.fits
    assert law.refused is None
    assert 0 < law.parameters["sigma"][0] < 0.3
    assert "at least 4 device counts" in usl.refused


def test_forecast_is_refused_without_a_link(grids):
    report = read_report(grids.fill(grids.plan(), {"cpu-x1-exact": 50.0}))
    (family,) = report.families
    assert not family.forecasts
    assert "interconnect.bandwidth_gbit" in family.why_not


def test_forecast_from_a_given_link(grids):
    comparison = grids.plan(interconnect={"bandwidth_gbit": 100, "latency_us": 5})
    alone = {**grids.parts, "compute": 0.8, "reduce": 0.0}
    report = read_report(grids.fill(comparison, {"cpu-x1-exact": 50.0}, parts=alone))
    (family,) = report.families
    eight = next(one for one in family.forecasts if one.workers == 8)
    step = 256 / 50
    expected = 0.9 * step / 8 + 0.1 * step + 2 * 7 / 8 * 4e6 / (100e9 / 8) + 14 * 5e-6
    assert eight.rate == pytest.approx(256 / expected, rel=1e-3)
    assert all(row["FORECAST, not measured"] for row in tables.forecasts(report))


def test_the_link_is_measured_between_the_workers(grids):
    report = read_report(grids.fill(grids.plan(), grids.rates))
    for family in report.families:
        assert family.link.to_json()["bandwidth_gbit"]["value"] == pytest.approx(8, rel=0.01)
        assert family.link.source == "measured between 2, 4 workers"


def test_forecast_is_refused_where_the_model_fails_at_measured_counts(grids):
    rates = {"cpu-x1-exact": 50.0, "cpu-x2-exact": 20.0, "cpu-x4-exact": 10.0}
    report = read_report(grids.fill(grids.plan(), rates))
    (family,) = report.families
    assert not family.forecasts
    assert (family.left_out, family.miss > 0.5) == (4, True)
    assert family.why_not.startswith("made without 4 workers, the model is off by +")


# ---------------------------------------------------------------------- what did not run


def test_failed_and_skipped_cells_are_in_the_report(grids):
    comparison = grids.plan(cpus=2)
    grids.fill(comparison, {"cpu-x1-exact": 50.0})
    comparison.add(CellResult("cpu-x2-ddp", 1, "failed", "it <broke>", None, 1.0, now()), comparison.begin())
    report = read_report(comparison)
    assert ("cpu-x4-exact", "4 CPU cores asked, this machine has 2") in report.skipped
    assert report.failed == (("cpu-x2-ddp", 1, "it <broke>"),)
    page = compare_page(report)
    assert "it &lt;broke&gt;" in page
    assert "4 CPU cores asked" in page
    assert "still missing" in page
    assert report.missing > 0


def test_a_run_directory_that_is_gone_counts_as_failed(grids):
    comparison = grids.fill(grids.plan(repeats=2), {"cpu-x1-exact": 50.0})
    (comparison.cells_path / comparison.rows()[0].run / "run.json").unlink()
    report = read_report(comparison)
    assert len(report.cells[0].measured.repeats) == 1
    assert report.failed == (("cpu-x1-exact", 1, "its run directory is gone"),)


def test_nothing_measured_is_no_report(grids, tmp_path):
    comparison = grids.plan()
    with pytest.raises(UserError, match="no cell has been measured"):
        write_compare_page(tmp_path / "page.html", read_report(comparison))
    assert not (tmp_path / "page.html").exists()


# ---------------------------------------------------------------------- pages and commands


def test_gpus_are_set_beside_the_fastest_cell_without_one(grids):
    devices = [{"num_workers": n, "use_gpu": False, "cpus_per_worker": 1} for n in (1, 2)]
    devices += [{"num_workers": n, "use_gpu": True} for n in (1, 4, 8)]
    comparison = grids.plan(gpus=8, scaling=devices, baseline=False, reduction=["exact"])
    rates = {
        "cpu-x1-exact": 50.0, "cpu-x2-exact": 100.0,
        "gpu-x1-exact": 1000.0, "gpu-x4-exact": 3600.0, "gpu-x8-exact": 6000.0,
    }  # fmt: skip
    shas = {name: name[:3] for name in rates}
    report = read_report(grids.fill(comparison, rates, sha=shas))
    assert report.equal  # across kinds of device, weights need not agree
    assert {group.name for group in report.groups} == {"cpu fp32", "gpu fp32"}
    text = " ".join(sentences.answers(report))
    assert "gpu-x1-exact on 1 GPU: 10 (10 to 10) times cpu-x2-exact" in text
    assert "gpu-x8-exact on 8 GPUs: 60 (60 to 60) times cpu-x2-exact" in text
    page = compare_page(report)
    assert 'id="fig-strong-cpu"' in page
    assert 'id="fig-strong-gpu"' in page


def test_a_column_is_added_in_one_place(grids, monkeypatch, capsys):
    report = read_report(grids.fill(grids.plan(), grids.rates))
    known = tables._speed
    monkeypatch.setattr(tables, "_speed", lambda r: [*known(r), tables.Column("tries", lambda e: "7 of 9")])
    _grid_tables.show(report)
    assert capsys.readouterr().out.count("7 of 9") == len(report.cells)
    assert sentences.markdown(report).count("| 7 of 9 |") == len(report.cells)
    assert compare_page(report).count("7 of 9") == len(report.cells)


def test_a_narrow_terminal_shows_fewer_columns(grids, monkeypatch, capsys):
    report = read_report(grids.fill(grids.plan(), grids.rates))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for columns in (200, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        _grid_tables.show(report)
        out = capsys.readouterr().out
        assert "speed-up" in out
        assert ("(95 %)" in out) == ("median" in out) == ("ring model" in out) == (columns == 200)
        assert ("as run" in out) == ("peak memory" in out) == ("repeats" in out) == (columns == 200)
    left_out = set(tables.forecasts(report)[0]) - set(tables.forecasts(report, narrow=True)[0])
    assert left_out == {"note", "shared work", "floor", "exchange"}
