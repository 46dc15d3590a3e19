from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from rayexp.config import ExperimentConfig, load
from rayexp.engine.runtime import Runtime
from rayexp.errors import RunError, UserError, WriteError
from rayexp.grid.plan import with_overrides
from rayexp.launch.driver import run
from rayexp.launch.screen import epoch_line
from rayexp.runs.integrity import check_unchanged
from rayexp.runs.run import Run
from rayexp.workloads.language_model.workload import LanguageModel

Tiny = Callable[..., ExperimentConfig]
Command = Callable[..., "subprocess.Popen[str]"]
Typed = Callable[..., "subprocess.CompletedProcess[str]"]


def shas(made: Run) -> list[str]:
    return [record.state_sha for record in made.records()]


def only(folder: Path) -> Run:
    (found,) = Run.all(folder)
    return found


def test_a_run_leaves_what_the_design_says_and_never_imports_ray(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(tiny().to_yaml())
    code = (
        "import sys\nfrom rayexp.config import load\nfrom rayexp.launch.driver import run\n"
        "run(load('c.yaml'), argv=['x'])\n"
        "slow = {'ray', 'torch._dynamo'} & sys.modules.keys()\nassert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    made = only(tmp_path / "runs")
    meta = made.meta()
    assert (meta["status"], meta["argv"], meta["world_size"], meta["device"]) == ("done", ["x"], 0, "cpu")
    assert meta["startup_seconds"]["to_first_step"] > 0
    assert made.epochs() == [1, 2] == [record.epoch for record in made.records()]
    for epoch in (1, 2):
        assert {file.name for file in made.checkpoint(epoch).iterdir()} == {"state.safetensors", "state.json"}
        assert made.predictions(epoch).kind == "tokens"
    assert list(made.tb.iterdir())
    assert "rank 0 of 1" in (made.logs / "rank_0.log").read_text()
    assert not list(made.root.glob(".tmp-*")) + list(made.root.glob("checkpoints/step_*"))


def test_the_runs_own_config_repeats_it(tiny: Tiny) -> None:
    first = run(tiny(), argv=[])
    assert shas(run(first.config(), argv=[])) == shas(first)


@pytest.mark.parametrize("steps", [1, 7, 12])
def test_a_stopped_run_goes_on_at_its_step(tiny: Tiny, steps: int) -> None:
    whole = run(tiny(), argv=[])
    made = run(tiny(), argv=[], max_steps=steps)
    assert made.meta()["status"] == "stopped"
    again = run(tiny(), argv=["again"], resume=made)
    assert again.root == made.root
    assert shas(again) == shas(whole)
    assert again.meta()["status"] == "done"
    assert again.meta()["resumed"] == [{"argv": ["again"], "after": "stopped"}]


def test_a_damaged_newest_checkpoint_is_passed_over(tiny: Tiny) -> None:
    whole = run(tiny(), argv=[])
    made = run(tiny(checkpoint={"every_steps": 2}), argv=[], max_steps=7)
    newest = sorted(made.checkpoints.glob("step_*"))[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert shas(run(tiny(), argv=[], resume=made)) == shas(whole)
    assert "passed over" in (made.logs / "rank_0.log").read_text()


def test_a_changed_configuration_is_refused_by_name(tiny: Tiny) -> None:
    made = run(tiny(), argv=[], max_steps=1)
    with pytest.raises(UserError, match=r"lr 1.0 -> 2.0; model.nhid 16 -> 32"):
        run(
            tiny(lr=2, model={"name": "lstm", "emsize": 16, "nhid": 32, "nlayers": 1, "dropout": 0.2}),
            argv=[],
            resume=made,
        )
    assert made.meta()["status"] == "stopped"
    check_unchanged(made, tiny(scaling={"num_workers": 2}, max_failures=7, checkpoint={"every_steps": 3}, name="other"))


def test_data_of_the_same_name_but_other_content_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for name, word in (("a", "one"), ("b", "two")):
        (tmp_path / name).mkdir()
        for split in ("train", "valid", "test"):
            (tmp_path / name / f"{split}.txt").write_text(f"{word} three four five\n" * 300)
    data = {"name": "text", "bptt": 20}
    made = run(tiny(data={**data, "root": str(tmp_path / "a")}), argv=[], max_steps=1)
    with pytest.raises(UserError, match="does not hold the data of this run"):
        run(tiny(data={**data, "root": str(tmp_path / "b")}), argv=[], resume=made)


def test_two_drivers_on_one_run_are_refused(tiny: Tiny) -> None:
    made = run(tiny(), argv=[], max_steps=1)
    with (made.root / "driver.lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            run(tiny(), argv=[], resume=made)
    run(tiny(), argv=[], resume=made)


def test_a_run_whose_lock_cannot_be_had_leaves_nothing_behind(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    made = run(tiny(), argv=[], max_steps=1)
    monkeypatch.setattr(fcntl, "flock", fail)
    for resume in (None, made):
        with pytest.raises(UserError, match=r"driver.lock: cannot be locked \(Input/output error\)"):
            run(tiny(), argv=[], resume=resume)
    assert only(tmp_path / "runs") == made
    assert made.meta()["status"] == "stopped"


def test_a_run_that_cannot_be_prepared_has_failed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(made: Run, names: Any) -> None:
        raise WriteError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(made.root / "trackers"))

    monkeypatch.setattr("rayexp.launch.driver.hand_on", full)
    with pytest.raises(WriteError):
        run(tiny(), argv=[])
    made = only(tmp_path / "runs")
    assert made.status() == "failed"
    assert "No space left on device" in made.meta()["error"]


@pytest.mark.slow
def test_a_file_system_without_flock_and_directory_fsync_will_do(
    tiny: Tiny, tmp_path: Path, faults: Callable[..., dict[str, str]]
) -> None:
    (tmp_path / "c.yaml").write_text(tiny().to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "rayexp", "train", "c.yaml"],
        cwd=tmp_path,
        env=faults(flock=errno.ENOLCK, directory_fsync=errno.EINVAL),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = only(tmp_path / "runs")
    assert made.status() == "done"
    assert shas(made) == shas(run(tiny(), argv=[]))
    assert not list(made.root.glob("*.lease"))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_full_disk_is_one_line_and_loses_nothing(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    config = tiny(storage_path=str(disk / "runs"), checkpoint={"every_steps": 3})
    try:
        (tmp_path / "c.yaml").write_text(config.to_yaml())
        process = command("train", "c.yaml")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        made = only(disk / "runs")
        begun, line, command = err.splitlines()
        assert begun == f"run: disk/runs/{made.id}"
        assert line.startswith(f"error: {made.root}/checkpoints/")
        assert "(No space left on device); free some space there" in line
        assert command == f"go on with: rayexp train --resume {made.id} --runs disk/runs"
        assert not list(made.root.rglob(".tmp-*"))
        assert made.status() in ("failed", "died")
        subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
        assert shas(run(config, argv=[], resume=made)) == shas(run(tiny(), argv=[]))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_clock_that_is_set_back_does_not_matter(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.time()
    times = itertools.count(int(began), -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    made = run(tiny(epochs=1), argv=[])
    startup = made.meta()["startup_seconds"]
    assert 0 <= startup["to_worker"] <= startup["to_first_step"] < 600
    (record,) = made.records()
    assert all(0 <= seconds < 600 for seconds in record.seconds.values())


def test_the_users_mistake_leaves_nothing_behind(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run(tiny(data={"name": "text", "root": str(tmp_path / "nowhere")}), argv=[])
    assert Run.all(tmp_path / "runs") == []


def test_a_failed_run_says_so(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(LanguageModel, "predictions", fail)
    with pytest.raises(RunError, match=r"ZeroDivisionError: by nothing .*rank_0.log"):
        run(tiny(), argv=[])
    made = only(tmp_path / "runs")
    assert made.meta()["status"] == "failed"
    assert "by nothing" in made.meta()["error"]
    assert "Traceback" in (made.logs / "rank_0.log").read_text()


def test_without_a_terminal_there_is_a_line_an_epoch(tiny: Tiny) -> None:
    text = io.StringIO()
    made = run(tiny(), argv=[], console=Console(file=text, width=300))
    assert text.getvalue().splitlines() == [f"run: {made.root}", *(epoch_line(record) for record in made.records())]


def test_bf16_without_instructions_for_it_is_warned_of(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (False, True):
        monkeypatch.setattr(Runtime, "has_bf16", lambda _, has=has: has)
        for precision in ("bf16", "fp32"):
            text = io.StringIO()
            made = run(tiny(precision=precision, epochs=1), argv=[], console=Console(file=text, width=300))
            warned = [line for line in text.getvalue().splitlines() if line.startswith("warning: precision: ")]
            assert len(warned) == (precision == "bf16" and not has)
            assert ("fp32 is many times as fast" in (made.logs / "rank_0.log").read_text()) == bool(warned)


def test_the_command_names_the_key_and_exits_with_2(tiny: Tiny, tmp_path: Path, typed: Typed) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**yaml.safe_load(tiny().to_yaml()), "epoch": 3}))
    for args, expected in (
        (["train", "c.yaml"], "unknown key epoch (did you mean epochs?)"),
        (["train"], "CONFIG"),
        (["train", "--resume", "nothing"], "no run 'nothing'"),
        (["verify", "c.yaml", "--workers", "0,x"], "--workers"),
    ):
        done = typed(*args)
        assert done.returncode == 2
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_setting_that_the_data_passes_over_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_text(tiny().to_yaml())
    (tmp_path / "images.yaml").write_text("{}")
    assert load(tmp_path / "text.yaml", ["data.image_size=64"]) == tiny()
    with pytest.raises(
        UserError, match=r"^data.max_train_samples=9: data.max_train_samples is for images .*; data.name is python_do"
    ):
        load(tmp_path / "text.yaml", ["data.max_train_samples=9"])
    with pytest.raises(UserError, match=r"data.bptt is for text \(python_docs, wikitext2, text\); data.name is shapes"):
        load(tmp_path / "images.yaml", ["data.bptt=20"])
    # A run that was made before this was refused can still be opened.
    old = tiny(data={"name": "python_docs", "max_train_tokens": 3000, "max_val_tokens": 600, "image_size": 32})
    assert Run.create(old, argv=[]).config() == old
    with pytest.raises(UserError, match=r"overrides: data.augment is for images"):
        with_overrides(load(tmp_path / "text.yaml"), {"data": {"augment": None}})


def test_an_operation_that_is_not_deterministic_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*_: Any) -> Any:
        return torch.zeros(2).put_(torch.zeros(1, dtype=torch.int64), torch.ones(1)), {}

    monkeypatch.setattr(LanguageModel, "loss", loss)
    with pytest.raises(UserError, match=r"reduction: exact takes deterministic operations only, and put_.* allowed"):
        run(tiny(), argv=[])
    assert not list((tmp_path / "runs").iterdir())


def test_a_dry_run_touches_nothing(tiny: Tiny, tmp_path: Path, typed: Typed) -> None:
    (tmp_path / "c.yaml").write_text(tiny().to_yaml())
    done = typed("train", "c.yaml", "scaling.num_workers=2", "epochs=3", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    assert shown["config"]["epochs"] == 3
    assert shown["plan"]["workers"] == 2
    assert shown["plan"]["steps"] == 3 * shown["plan"]["steps_per_epoch"]
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml"}


def test_a_run_says_what_its_workload_counts_and_aims_at(tiny: Tiny) -> None:
    made = run(tiny(epochs=1), argv=[])
    assert (made.unit(), made.kind(), made.goals()) == ("tokens", "tokens", {"ppl": "min"})
    meta = made.meta()
    assert (meta["unit"], meta["kind"], meta["goals"]) == ("tokens", "tokens", {"ppl": "min"})
    assert made.data()["kind"] == "tokens"
    made.update(unit="words", kind="samples", goals={"ppl": "max"})
    assert (made.unit(), made.kind(), made.goals()) == ("words", "samples", {"ppl": "max"})
