"""A model, data and a workload of one's own, from training to whatever is done with the run afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.cluster import package
from rayexp.cluster.collect import collect
from rayexp.cluster.sources import Storage
from rayexp.config import load
from rayexp.data.describe import describe
from rayexp.errors import UserError
from rayexp.launch.driver import outline, run
from rayexp.launch.evaluate import evaluate
from rayexp.launch.export import export
from rayexp.pages.run_page import write_run_page
from rayexp.runs.integrity import examine
from rayexp.runs.run import Run
from rayexp.workloads import open_workload
from rayexp.workloads.language_model.generate import open_generator

EXAMPLES = Path(__file__).parents[2] / "examples"
# Of examples/own_dataset.yaml and own_workload.yaml: smaller.
IMAGES = (
    "data.count=64",
    "data.image_size=16",
    "data.side=16",
    "model.width=2",
    "model.depth=2",
    "batch_size=16",
    "shards=2",
)
NUMBERS = ("data.samples=64", "model.hidden=4", "batch_size=16", "shards=2", "epochs=2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A copy of the examples, outside of the checkout."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "mine", ignore=shutil.ignore_patterns("*.ipynb", "__pycache__")))


def shas(made: Run) -> list[str]:
    return [record.state_sha for record in made.records()]


def test_a_run_with_own_model_and_data_opens_without_their_files(mine: Path, tmp_path: Path) -> None:
    config = load(mine / "own_dataset.yaml", [*IMAGES, "epochs=1"])
    made = run(config, argv=[])
    assert made.meta()["code"]["files"].keys() == {path.name for path in mine.glob("*.py")}
    assert made.records()[0].metrics.keys() == {"acc1", "acc5"}
    assert made.data()["classes"][0] == ["one spot", "one spot"]
    assert {finding.state for finding in examine(made)} == {"ok"}
    shutil.rmtree(mine)
    shutil.rmtree(tmp_path / "cache")
    found = evaluate(made, 1)
    assert found.equal
    assert found.weights_sha == made.records()[0].weights_sha
    again = run(load(made.config_path, ["storage_path=again"]), argv=[])
    assert shas(again) == shas(made)


def test_a_collected_run_brings_its_code(mine: Path, tmp_path: Path) -> None:
    made = run(load(mine / "own_workload.yaml", NUMBERS), argv=[])
    shutil.rmtree(mine)
    got = collect(Storage(str(made.root)), made.id, tmp_path / "home").run
    shutil.rmtree(made.root)
    assert evaluate(got, 2).equal
    (got.root / "code" / "own_workload.py").write_text("# another\n")
    assert "code/own_workload.py: not what the run wrote" in "; ".join(map(str, examine(got)))
    with pytest.raises(UserError, match=r"code/own_workload.py: not what the run wrote \(sha256"):
        evaluate(got, 2)
    with pytest.raises(UserError, match=r"code/own_workload.py: not what the run wrote"):
        run(got.config().model_copy(update={"epochs": 3}), argv=[], resume=got)


def test_a_workload_is_not_called_by_a_model_that_it_does_not_have(mine: Path, tmp_path: Path) -> None:
    """`model.name` has a default, which says nothing of a workload of one's own."""
    made = run(load(mine / "own_workload.yaml", [*NUMBERS, "epochs=1"]), argv=[])
    assert export(made, 1, tmp_path / "model.pt").about["architecture"] == "own_workload.py:Regression"
    with pytest.raises(UserError, match=r"generate needs .* this run is of own_workload.py:Regression$"):
        open_generator(made, 1)
    write_run_page(tmp_path / "page.html", made)
    assert "nats" not in (tmp_path / "page.html").read_text()


def test_a_loss_of_ones_own_may_be_large(mine: Path) -> None:
    """Prices, say; of a cross-entropy the screen would say that training diverges."""
    text = (mine / "own_workload.py").read_text()
    (mine / "own_workload.py").write_text(text.replace("y = np.sin", "y = 1000 + np.sin"))
    made = run(load(mine / "own_workload.yaml", [*NUMBERS, "epochs=1", "lr=1e-9"]), argv=[])
    assert made.records()[0].val_loss > 1e5
    assert not made.meta().get("warnings")


def test_a_damaged_file_of_code_is_not_collected(mine: Path, tmp_path: Path) -> None:
    made = run(load(mine / "own_workload.yaml", [*NUMBERS, "epochs=1"]), argv=[])
    (made.root / "code" / "own_model.py").write_text("evil")
    with pytest.raises(Exception, match=r"code/own_model.py: .* is damaged \(sha256"):
        collect(Storage(str(made.root)), made.id, tmp_path / "home")
    assert not (tmp_path / "home" / made.id / "code" / "own_model.py").exists()


def test_changed_code_is_refused_by_name_and_the_runs_own_goes_on(mine: Path) -> None:
    config = load(mine / "own_workload.yaml", NUMBERS)
    whole = shas(run(config, argv=[]))
    made = run(config, argv=[], max_steps=3)
    text = (mine / "own_workload.py").read_text()
    (mine / "plot.py").write_text("# new, and no part of the run\n")
    (mine / "own_workload.py").write_text(text.replace("nn.Tanh()", "nn.ReLU()"))
    (mine / "own_model.py").unlink()
    for start in (run, lambda config, argv, resume: outline(config, resume=resume)):
        with pytest.raises(UserError) as caught:
            start(load(mine / "own_workload.yaml", NUMBERS), argv=[], resume=made)
        assert str(caught.value) == (
            f"--resume {made.id}: the code has changed: own_model.py is gone, own_workload.py has changed; put the "
            "run's own back, or leave CONFIG out to go on with the copy that the run keeps"
        )
    shutil.rmtree(mine)
    assert shas(run(load(made.config_path), argv=[], resume=made)) == whole
    assert [f for f in examine(made) if f.state == "damaged"] == []


def test_unchanged_code_goes_on_as_the_runs_own(mine: Path) -> None:
    config = load(mine / "own_workload.yaml", NUMBERS)
    whole = shas(run(config, argv=[]))
    made = run(config, argv=[], max_steps=3)
    again = run(load(mine / "own_workload.yaml", NUMBERS), argv=[], resume=made)
    assert shas(again) == whole
    assert again.config().code == (str(again.root / "code"),)


def test_a_run_of_an_own_workload_says_what_it_is(mine: Path) -> None:
    made = run(load(mine / "own_workload.yaml", NUMBERS), argv=[])
    assert (made.unit(), made.kind(), list(made.goals().items())) == (
        "samples",
        "samples",
        [("rmse", "min"), ("r2", "max")],
    )
    predictions = made.predictions(2)
    assert predictions.arrays.keys() == {"index", "loss", "output", "target"}
    assert made.data()["val_names"][:2] == ["val-0", "val-1"]
    best = min(made.records(), key=lambda record: record.metrics["rmse"])
    assert made.best() == best.epoch
    assert outline(load(mine / "own_workload.yaml", NUMBERS))["samples_per_worker"] == 16


def test_what_is_sent_holds_the_code(mine: Path, tmp_path: Path) -> None:
    config = load(mine / "own_dataset.yaml", IMAGES)
    packed = package.pack(config, tmp_path / "package")
    shutil.rmtree(mine)
    assert {name for name in packed.files if name.startswith("code/")} == {
        "code/own_dataset.py", "code/own_model.py", "code/own_workload.py",
    } | {name for name in packed.files if name.startswith("code/library")}  # fmt: skip
    there = load(tmp_path / "package" / "config.yaml")
    assert there.model_copy(update={"code": config.code}) == config
    assert len(open_workload(there).describe()["classes"]) == 3


def test_workers_of_the_same_and_of_another_host_have_the_code_from_the_run(mine: Path) -> None:
    """What a worker asks the run's writer for is what the run keeps, whatever lies where the files were."""
    from rayexp.runs.writer import RunWriter

    made = run(load(mine / "own_workload.yaml", NUMBERS), argv=[], max_steps=1)
    kept = {path.name: path.read_bytes() for path in mine.glob("*.py")}
    shutil.rmtree(mine)
    assert RunWriter(made).code() == kept


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def W(config): ...", r"^workload: w.py:W is a function; expected a class"),
        (
            "class W:\n    unit = 'x'",
            r"^workload: w.py:W lacks kind, goals, batch_unit, .*; a child of SampleWorkload has them",
        ),
        (
            "from rayexp.workloads.samples import SampleWorkload\nclass W(SampleWorkload):\n    kind = 'numbers'",
            r"^workload: w.py:W.kind is 'numbers'; allowed: images, tokens, samples$",
        ),
        (
            "from rayexp.workloads.samples import SampleWorkload\nclass W(SampleWorkload):\n    goals = {'a': 'up'}",
            r"^workload: w.py:W.goals has 'up'; allowed: max, min$",
        ),
        (
            "from rayexp.workloads.samples import SampleWorkload\nclass W(SampleWorkload):\n"
            "    def __init__(self, config):\n        1 / 0",
            r"^workload: w.py:W cannot be made \(line 4 of .*w.py: ZeroDivisionError: division by zero\)$",
        ),
    ],
)
def test_what_is_no_workload_is_told_in_a_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "w.py").write_text(text)
    (tmp_path / "c.yaml").write_text("workload: w.py:W\n")
    with pytest.raises(UserError, match=line):
        open_workload(load(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "mine/own_model.yaml", "--dry-run"], "own_model.py:SmallNet"),
        (["summary", "mine/own_model.yaml"], "features.0"),
        (["summary", "mine/own_model.yaml", "--classes", "7"], "231"),
        (["summary", "mine/own_workload.yaml"], "own_workload.py:Regression, input 3"),
        (["data", "info", "mine/own_dataset.py:Spots"], "600 train and 150 val images of 3 classes"),
        (["data", "info", "mine/own_dataset.py:Spots", "data.count=60"], "60 train and 15 val images of 3 classes"),
    ],
)
@pytest.mark.usefixtures("shared_cache")
def test_commands_that_only_look(mine: Path, words: list[str], shown: str) -> None:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert shown in result.output
    assert not (mine.parent / "runs").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["shapes", "data.root=x"], "'data.root=x': data.KEY=VALUE is for a dataset of your own, ./FILE.py:NAME"),
        (["mine/own_dataset.py:Spots", "epochs=3"], "'epochs=3': expected data.KEY=VALUE"),
        (["mine/own_dataset.py:Spots", "data.cuont=3"], "unknown key data.cuont .did you mean count"),
        (["mine/own_dataset.py:Spots", "data.count=few"], "data.count: expected a whole number, got 'few'"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_options_of_a_dataset_that_are_refused(words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        CliRunner().invoke(app, ["data", "info", *words], catch_exceptions=False)


@pytest.fixture
def shared_cache(cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images that rayexp draws lie in the cache that others have filled."""
    monkeypatch.delenv("RAYEXP_CACHE")


@pytest.mark.ray
@pytest.mark.slow
def test_every_number_of_workers_has_the_same_bits(mine: Path) -> None:
    config = load(mine / "own_dataset.yaml", [*IMAGES, "epochs=1", "scaling.use_gpu=false"])
    alone = run(config, argv=[])
    two = config.scaling.model_copy(update={"num_workers": 2, "cpus_per_worker": 0.5})
    made = run(config.model_copy(update={"scaling": two}), argv=[])
    assert shas(made) == shas(alone)
    assert json.loads((made.root / "run.json").read_text())["world_size"] == 2


@pytest.mark.usefixtures("shared_cache")
def test_the_examples_train(mine: Path) -> None:
    for name, overrides in (
        ("own_model", ("data.max_train_samples=64", "data.max_val_samples=16", "epochs=1")),
        ("own_workload", ("epochs=2",)),
    ):
        made = run(load(mine / f"{name}.yaml", overrides), argv=[])
        assert made.status() == "done"


def test_where_the_code_is_gone_no_run_is_begun(mine: Path, tmp_path: Path) -> None:
    config = load(mine / "own_workload.yaml", NUMBERS)
    shutil.rmtree(mine)
    with pytest.raises(UserError, match=r"^code: .*mine/\*\*/\*.py: no such file or folder"):
        run(config, argv=[])
    assert not (tmp_path / "runs").exists()


WORDS = """
from torch import nn

class Bag(nn.Module):
    '''Predicts the next word from the present one.'''
    def __init__(self, vocabulary, width: int = 4):
        super().__init__()
        self.into, self.drop, self.out = nn.Embedding(vocabulary, width), nn.Dropout(0.1), nn.Linear(width, vocabulary)

    def forward(self, words):
        return self.out(self.drop(self.into(words)))

class Wrong(Bag):
    def forward(self, words):
        return super().forward(words)[:, :, :2]

def Lines(split, n: int = 60):
    return [f"{'abc'[i % 3]} {'xyz'[i % 2]} end" for i in range(n)]
"""


def test_a_language_model_and_a_text_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(WORDS)
    (tmp_path / "c.yaml").write_text(
        "workload: language_model\nmodel: {name: words.py:Bag}\ndata: {name: words.py:Lines, n: 90, bptt: 5}\n"
        "batch_size: 8\nshards: 2\nlr: 0.5\nepochs: 2\nscaling: {use_gpu: false}\n"
    )
    made = run(load(tmp_path / "c.yaml"), argv=[])
    assert (made.kind(), made.goals()) == ("tokens", {"ppl": "min"})
    assert made.records()[1].val_loss < made.records()[0].val_loss
    assert describe(f"{tmp_path}/words.py:Lines", options=["data.n=90"])["tokens"] == {
        "train": 360,
        "valid": 360,
        "test": 360,
    }
    (tmp_path / "words.py").unlink()
    assert evaluate(made, 2).equal
    result = CliRunner().invoke(app, ["generate", made.id], catch_exceptions=True)
    assert isinstance(result.exception, UserError)
    assert "generate needs a language_model (" in str(result.exception)
    (tmp_path / "words.py").write_text(WORDS)
    with pytest.raises(
        UserError, match=r"words.py:Wrong gives \(5, 4, 2\) for words \(5, 4\); expected logits, \(5, 4, "
    ):
        run(load(tmp_path / "c.yaml", ["model.name=words.py:Wrong"]), argv=[])
