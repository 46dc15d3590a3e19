"""The plan of a device grid: its cells, what is skipped and why, the base and what the grid overrides."""

from __future__ import annotations

import pytest

from rayexp.config import CompareConfig, ExperimentConfig, load, parse
from rayexp.errors import UserError
from rayexp.grid.plan import base_of, plan, with_overrides
from rayexp.launch.placement import Node

LAPTOP = [Node("here", 2, 0)]
CLUSTER = [Node("a", 16, 4), Node("b", 16, 4)]


def experiment(**tree):
    return parse({"name": "base", **tree}, ExperimentConfig, "base")


def grid_of(*scaling, **tree):
    return parse({"base": "base.yaml", "scaling": list(scaling), **tree}, CompareConfig, "grid")


def cpu(workers, **more):
    return {"num_workers": workers, "use_gpu": False, **more}


def gpu(workers, **more):
    return {"num_workers": workers, "use_gpu": True, **more}


def by_id(config, nodes=LAPTOP, **base):
    return {cell.id: cell for cell in plan(config, experiment(**base), nodes)}


def test_gpus_that_are_not_there_are_skipped_with_the_reason():
    cells = by_id(grid_of(cpu(1), gpu(8)))
    assert cells["cpu-x1-exact"].skip is None
    assert cells["gpu-x8-exact"].skip == "8 GPUs asked, this machine has 0"
    assert cells["gpu-plain"].skip == "1 GPU asked, this machine has 0"


def test_a_cluster_with_gpus_runs_them_all():
    cells = by_id(grid_of(gpu(1), gpu(2), gpu(8), gpu(16)), CLUSTER, shards=16)
    assert [c.skip for c in cells.values() if c.workers in (0, 1, 2, 8)] == [None] * 4
    assert cells["gpu-x16-exact"].skip == "16 GPUs asked, the 2 machines have 8"
    assert cells["gpu-x8-exact"].devices == 8
    assert cells["gpu-x8-exact"].config["scaling"]["use_gpu"] is True


def test_cores_that_are_not_there_are_skipped():
    cells = by_id(grid_of(cpu(1, cpus_per_worker=1), cpu(4, cpus_per_worker=1), cpu(4)))
    assert cells["cpu-x4-exact"].skip == "4 CPU cores asked, this machine has 2"
    assert cells["cpu-x1-exact"].devices == 1


def test_workers_that_do_not_divide_the_shards_are_skipped():
    cells = by_id(grid_of(cpu(3, cpus_per_worker=0.5)))
    assert "3 does not divide shards 8" in cells["cpu-x3-exact"].skip


@pytest.mark.parametrize("asked", [["auto"], ["fp32", "auto"], ["auto", "fp32"]])
def test_on_a_cpu_auto_is_fp32_and_no_second_cell(asked):
    cells = by_id(grid_of(cpu(1), precision=asked))
    assert {(cell.precision, cell.config["precision"]) for cell in cells.values()} == {("fp32", "fp32")}
    assert len(cells) == 2  # the plain script and the one worker
    assert {cell.skip for cell in cells.values()} == {None}


def test_on_a_gpu_the_run_decides():
    cells = by_id(grid_of(gpu(1), precision=["fp32", "auto"]), CLUSTER)
    assert sorted(cell.precision for cell in cells.values()) == ["auto", "auto", "fp32", "fp32"]
    assert by_id(grid_of(cpu(1), baseline=False), precision="auto")["cpu-x1-exact"].precision == "fp32"


def test_a_compiled_model_is_not_run_exactly():
    cells = by_id(grid_of(cpu(1), reduction=["exact", "ddp"], baseline=False), compile=True, reduction="ddp")
    assert cells["cpu-x1-exact"].skip.startswith("compile: for reduction ddp only; exact refuses it")
    assert cells["cpu-x1-ddp"].skip is None


def test_auto_is_a_gpu_where_there_are_enough():
    config = grid_of({"num_workers": 8}, baseline=False)
    assert set(by_id(config, CLUSTER)) == {"gpu-x8-exact"}
    assert set(by_id(config, [Node("big", 64, 4)])) == {"cpu-x8-exact"}


def test_in_process_counts_the_cores_that_it_uses():
    cells = by_id(grid_of(cpu(0), cpu(0, lanes=1)), reduction="exact")
    assert cells["cpu-inprocess-exact"].devices == 2
    assert cells["cpu-inprocess-exact-1cores"].devices == 1
    assert cells["cpu-plain"].devices == 2


@pytest.mark.parametrize(
    ("cells", "threads"),
    [
        ([cpu(0), cpu(2), cpu(8)], 2),  # each has all 16 cores
        ([cpu(0), cpu(1, cpus_per_worker=8)], 1),
        ([cpu(0), cpu(0, lanes=4)], 1),
        ([cpu(0), cpu(3, cpus_per_worker=0.5)], 2),  # three workers do not divide the shards
    ],
)
def test_all_cells_on_cpus_have_one_number_of_threads(cells, threads):
    """As many as the smallest that runs has cores for: no cell uses more cores than it says."""
    planned = by_id(grid_of(*cells, baseline=False), [Node("here", 16, 0)]).values()
    found = {cell.config["threads_per_shard"] for cell in planned if not cell.skip}
    assert found == {threads}
    planned = by_id(grid_of(*cells, baseline=False), [Node("here", 16, 0)], threads_per_shard=5).values()
    assert {cell.config["threads_per_shard"] for cell in planned} == {5}


def test_cores_are_settled_in_the_plan():
    cells = by_id(grid_of(cpu(2)), [Node("here", 8, 0)])
    assert cells["cpu-x2-exact"].config["scaling"]["cpus_per_worker"] == 4
    assert cells["cpu-x2-exact"].devices == 8


def test_weak_scaling_multiplies_batch_and_shards():
    cells = by_id(grid_of(cpu(0), cpu(2), mode="weak"), batch_size=64, shards=2)
    assert cells["cpu-x2-exact"].config["batch_size"] == 128
    assert cells["cpu-x2-exact"].config["shards"] == 4
    assert cells["cpu-inprocess-exact"].config["batch_size"] == 64


def test_tf32_needs_a_gpu():
    cells = by_id(grid_of(cpu(1), precision=["fp32", "tf32"]))
    assert cells["cpu-x1-exact-tf32"].skip == "tf32 is a format of NVIDIA GPUs"
    assert cells["cpu-x1-exact-fp32"].skip is None


@pytest.mark.parametrize("model", [{"freeze": ["conv1.*"]}, {"weights": "IMAGENET1K_V1"}])
def test_the_plain_script_is_skipped_where_it_would_train_something_else(model):
    cells = by_id(grid_of(cpu(0)), model={"name": "resnet18", **model})
    assert cells["cpu-plain"].skip == (
        "the plain script draws all weights and trains all: it has no model.weights and no model.freeze"
    )
    assert cells["cpu-inprocess-exact"].skip is None
    assert by_id(grid_of(cpu(0)))["cpu-plain"].skip is None


def test_every_model_has_a_plain_script():
    text = {"workload": "language_model", "data": {"name": "python_docs"}, "batch_size": 16}
    for name in ("lstm", "transformer"):
        assert by_id(grid_of(cpu(1)), **text, model={"name": name})["cpu-plain"].skip is None
    assert "cpu-plain" not in by_id(grid_of(cpu(1), baseline=False))


def test_strong_and_weak_scaling_in_one_grid():
    """One worker has the same batch either way, so its cell is a point of both."""
    cells = by_id(grid_of(cpu(0), cpu(1), cpu(2), mode=["strong", "weak"]), batch_size=64, shards=2)
    found = {name: (c.config["batch_size"], c.config["shards"], c.modes) for name, c in cells.items()}
    both = ("strong", "weak")
    assert found == {
        "cpu-plain": (64, 2, ()),
        "cpu-inprocess-exact": (64, 2, both),
        "cpu-x1-exact": (64, 2, both),
        "cpu-x2-exact": (64, 2, ("strong",)),
        "cpu-x2-exact-weak": (128, 4, ("weak",)),
    }
    assert {cell.batch for cell in cells.values()} == {64}
    assert by_id(grid_of(cpu(2), mode="weak"))["cpu-x2-exact"].modes == ("weak",)


def test_batch_sizes_are_an_axis_and_keep_the_shards_where_they_can():
    cells = by_id(grid_of(cpu(0), cpu(4, cpus_per_worker=0.5), batch_size=[64, 6, 256]), batch_size=32, shards=8)
    found = {name: (c.config["batch_size"], c.config["shards"]) for name, c in cells.items()}
    assert found == {
        f"cpu-{what}-b{batch}": (batch, shards)
        for batch, shards in ((64, 8), (6, 2), (256, 8))
        for what in ("plain", "inprocess-exact", "x4-exact")
    }
    skipped = {name: cell.skip for name, cell in cells.items() if cell.skip}
    assert list(skipped) == ["cpu-x4-exact-b6"]
    assert "4 does not divide shards 2" in skipped["cpu-x4-exact-b6"]
    assert set(by_id(grid_of(cpu(0), batch_size=128))) == {"cpu-plain", "cpu-inprocess-exact"}
    assert by_id(grid_of(cpu(0), batch_size=128))["cpu-plain"].config["batch_size"] == 128


def test_a_sweep_of_batches_scales_weakly_too():
    cells = by_id(grid_of(cpu(2), mode=["weak", "strong"], batch_size=[16, 32], baseline=False), shards=8)
    found = {name: (c.config["batch_size"], c.config["shards"], c.batch) for name, c in cells.items()}
    assert found == {
        "cpu-x2-exact-weak-b16": (32, 16, 16),
        "cpu-x2-exact-weak-b32": (64, 16, 32),
        "cpu-x2-exact-b16": (16, 8, 16),
        "cpu-x2-exact-b32": (32, 8, 32),
    }


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"mode": []}, "mode: expected at least 1 value, got 0"),
        ({"mode": "both"}, "mode.0: expected strong or weak, got 'both'"),
        ({"mode": ["weak", "weak"]}, "mode: weak stands there twice"),
        ({"batch_size": [64, 64]}, "batch_size: 64 stands there twice"),
        ({"batch_size": [64, 0]}, "batch_size.1: expected a value above 0, got 0"),
    ],
)
def test_axes_that_make_no_sense_are_refused(tree, message):
    with pytest.raises(UserError, match=message):
        grid_of(cpu(0), **tree)


def test_one_value_of_an_axis_needs_no_list(tmp_path):
    (tmp_path / "grid.yaml").write_text("base: base.yaml\nscaling: [{num_workers: 0}]\nmode: weak\nbatch_size: 64")
    config = load(tmp_path / "grid.yaml", [], CompareConfig)
    assert (config.mode, config.batch_size) == (("weak",), (64,))
    config = load(tmp_path / "grid.yaml", ["mode=[strong, weak]", "batch_size=[16, 32]"], CompareConfig)
    assert (config.mode, config.batch_size) == (("strong", "weak"), (16, 32))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (grid_of({"num_workers": [1, 4]}), "elastic"),
        (grid_of(cpu(1), cpu(1)), "cpu-x1-exact twice"),
        (grid_of(cpu(1), reduction=["ddp", "ddp"]), "twice"),
        (grid_of(cpu(1), target={"acc9": 3}), "acc9.*allowed: acc1, acc5"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        plan(config, experiment(), LAPTOP)


# ---------------------------------------------------------------------- base and overrides


def test_overrides_nested_and_dotted():
    base = experiment(epochs=20, data={"name": "shapes", "max_train_samples": 64})
    changed = with_overrides(base, {"data.max_val_samples": 32, "data": {"max_train_samples": 16}, "epochs": 1})
    assert changed.data.max_train_samples == 16
    assert changed.data.max_val_samples == 32
    assert changed.epochs == 1


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "grid.yaml").write_text(
        "base: base.yaml\nscaling: [{num_workers: 0}]\noverrides: {data.max_train_samples: 64}"
    )
    config = load(tmp_path / "grid.yaml", ["overrides.data.max_train_samples=32", "repeats=1"], CompareConfig)
    assert config.repeats == 1
    assert with_overrides(experiment(), config.overrides).data.max_train_samples == 32


def test_overrides_may_switch_a_section_off():
    assert with_overrides(experiment(), {"data.augment": None}).data.augment is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scaling.num_workers": 2}, "the grid itself says scaling"),
        ({"reduction": "ddp"}, "the grid itself says reduction"),
        ({"data.rot": "x"}, "unknown key data.rot"),
        ({"shards": 3}, "does not divide batch_size"),
    ],
)
def test_overrides_that_are_wrong_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        with_overrides(experiment(), overrides)


def test_the_base_lies_beside_the_grid(tmp_path):
    (tmp_path / "base.yaml").write_text("name: beside")
    assert base_of(grid_of(cpu(0)), tmp_path).name == "beside"
    with pytest.raises(UserError, match="no such file"):
        base_of(grid_of(cpu(0)), tmp_path / "elsewhere")
