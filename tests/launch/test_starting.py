"""`model.weights` from the driver's side: where they are found, what a run keeps of them, and a resume without them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import rayexp
from rayexp.cli import main
from rayexp.config import ExperimentConfig, parse
from rayexp.engine.checkpoint import sha
from rayexp.errors import RunError, UserError
from rayexp.launch.driver import outline
from rayexp.launch.driver import run as train
from rayexp.launch.starting import find, refuse_changed, resolved
from rayexp.launch.verify import verify
from rayexp.runs.integrity import check_unchanged, examine, faults
from rayexp.runs.manifest import WEIGHTS
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter

Tiny = Callable[..., ExperimentConfig]
MODEL = {"name": "lstm", "emsize": 16, "nhid": 16, "nlayers": 1, "dropout": 0.2}


def tensors(run: Run, epoch: int) -> dict[str, torch.Tensor]:
    found = safetensors.torch.load_file(run.checkpoint(epoch) / "state.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two epochs to start from."""
    return made(tmp_path_factory.mktemp("first") / "runs", name="first")


def made(storage: Path, **changes: Any) -> Run:
    return train(config(storage, **changes), argv=[])


def config(storage: Path, **changes: Any) -> ExperimentConfig:
    tree: dict[str, Any] = {
        "name": "tiny", "workload": "language_model", "model": MODEL, "epochs": 2, "batch_size": 16, "shards": 4,
        "data": {"name": "python_docs", "max_train_tokens": 1500, "max_val_tokens": 600, "bptt": 20}, "lr": 1.0,
        "weight_decay": 0.0, "optimizer": {"momentum": 0.5, "clip": 0.25}, "tracking": [],
    }  # fmt: skip
    return parse({**tree, "storage_path": str(storage), **changes}, ExperimentConfig, "test")


def frozen_names(run: Run) -> list[str]:
    return [name for name in tensors(run, 1) if not name.startswith("decoder")]


# ---------------------------------------------------------------------- a run from weights


def test_a_run_starts_from_a_checkpoint_and_keeps_a_copy(
    first: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    model = {**MODEL, "weights": "first@1", "freeze": frozen_names(first)}
    storage = tmp_path / "runs"
    storage.symlink_to(first.root.parent)
    run = train(config(storage, model=model, seed=9), argv=[], console=Console(stderr=True, width=200))
    begun = tensors(first, 1)
    ended = tensors(run, 2)
    for name in frozen_names(first):
        assert torch.equal(ended[name], begun[name]), name
    assert not torch.equal(ended["decoder.weight"], begun["decoder.weight"])
    meta = run.meta()
    source = f"{first.root}@1"
    assert meta["weights"]["source"] == run.config().model.weights == source
    assert meta["weights"]["taken"] == len(begun)
    assert meta["fingerprint"]["weights"] == meta["weights"]["sha256"]
    assert meta["frozen"] + meta["parameters"] == sum(tensor.numel() for tensor in begun.values())
    err = capsys.readouterr().err
    assert f"weights: {source}: {len(begun)} tensors taken\n" in err
    assert f"frozen: {meta['frozen']:,} of " in err
    assert {f.what: f.state for f in examine(run)}[WEIGHTS] == "ok"
    assert faults(run) == []
    shutil.rmtree(run.root)


def test_a_run_goes_on_without_the_file(first: Run, tmp_path: Path) -> None:
    """Killed before its first checkpoint and after it, it ends as one that was never interrupted."""
    file = tmp_path / "own.pt"
    torch.save(tensors(first, 2), file)
    model = {**MODEL, "weights": str(file), "freeze": ["encoder.weight"]}
    whole = made(tmp_path / "runs", model=model)
    stopped = train(config(tmp_path / "runs", model=model), argv=[], max_steps=1)
    file.unlink()
    at_once = shutil.copytree(stopped.root, tmp_path / "runs" / f"{stopped.id[:-4]}ffff")
    shutil.rmtree(at_once / "checkpoints")
    for run in (stopped, Run(at_once)):
        ended = train(run.config(), argv=[], resume=run)
        assert ended.records()[-1].weights_sha == whole.records()[-1].weights_sha
    drawn = made(tmp_path / "runs", model=MODEL)
    assert drawn.records()[-1].weights_sha != whole.records()[-1].weights_sha
    # With a whole checkpoint the copy is not needed; without one there is nothing to begin with.
    again = Run(at_once)
    (again.root / WEIGHTS).write_bytes(b"damaged")
    assert [f.what for f in examine(again) if f.state == "damaged"] == [WEIGHTS]
    longer = again.config().model_copy(update={"epochs": 3})
    assert train(longer, argv=[], resume=again).status() == "done"
    shutil.rmtree(again.checkpoints)
    with pytest.raises(RunError, match=r"weights\.safetensors is missing or damaged, and no checkpoint is whole"):
        train(longer.model_copy(update={"epochs": 4}), argv=[], resume=again)


def test_another_vocabulary_is_refused_by_name(first: Run, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text("one two three four\n" * 200)
    data = {"name": "text", "root": str(folder), "bptt": 20}
    model = {**MODEL, "weights": f"{first.root}@2"}
    with pytest.raises(UserError, match=rf"^model\.weights: {first.root}@2 was trained with another vocabulary"):
        made(tmp_path / "runs", model=model, data=data)
    assert Run.all(tmp_path / "runs") == []
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors(first, 2), file)  # of a file no vocabulary is known
    with pytest.raises(UserError, match=r"does not fit this model: encoder\.weight is \d+x16 there and \d+x16 here"):
        made(tmp_path / "runs", model={**MODEL, "weights": str(file)}, data=data)
    assert Run.all(tmp_path / "runs") == []


# ---------------------------------------------------------------------- a resume that names them


def test_a_resume_may_name_the_same_weights_and_no_others(
    first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tensors(first, 2), "own.pt")
    shutil.copy("own.pt", "moved.pt")
    torch.save(tensors(first, 1), "other.pt")
    run = train(config(Path("runs"), model={**MODEL, "weights": "own.pt"}), argv=[], max_steps=1)
    assert run.config().model.weights == str(tmp_path / "own.pt")
    same = config(Path("runs"), model={**MODEL, "weights": "own.pt"})
    outline(same, resume=run)
    refuse_changed(run, same)
    outline(config(Path("runs"), model={**MODEL, "weights": "moved.pt"}), resume=run)  # the same content elsewhere
    other = config(Path("runs"), model={**MODEL, "weights": "other.pt"})
    with pytest.raises(UserError, match=r"model\.weights \S+/own\.pt -> \S+/other\.pt"):
        outline(other, resume=run)
    none = config(Path("runs"), model=MODEL)
    with pytest.raises(UserError, match=r"model\.weights \S+/own\.pt -> None"):
        check_unchanged(run, none)
    torch.save({name: tensor + 1 for name, tensor in tensors(first, 2).items()}, "own.pt")
    with pytest.raises(UserError, match=rf"^--resume {run.id}: model\.weights: own\.pt has changed since the run bega"):
        refuse_changed(run, same)
    with pytest.raises(UserError, match=r"own\.pt has changed since the run began"):
        rayexp.train(same, resume=run, progress=False)
    with pytest.raises(UserError, match=r"own\.pt has changed since the run began"):
        rayexp.train(None, {"model.weights": "own.pt"}, resume=run, progress=False)
    Path("own.pt").unlink()
    refuse_changed(run, same)
    outline(same, resume=run)


def test_the_command_goes_on_with_the_same_weights_and_no_others(
    first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tensors(first, 2), "own.pt")
    torch.save(tensors(first, 1), "other.pt")
    model = {**MODEL, "weights": "own.pt"}
    whole = made(tmp_path / "runs", model=model)
    run = train(config(tmp_path / "runs", model=model), argv=[], max_steps=1)

    def resume(word: str) -> tuple[Any, str]:
        words = ["rayexp", "train", "--resume", run.id, "--runs", str(tmp_path / "runs"), f"model.weights={word}"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err

    code, err = resume("other.pt")
    assert (code, run.status()) == (2, "stopped")
    assert re.search(rf"--resume {run.id}: model\.weights: \S*other\.pt has changed since the run began", err)
    code, err = resume("none.pt")
    assert (code, run.status()) == (2, "stopped")
    assert "model.weights: none.pt: no such file, here or in " in err
    assert resume("own.pt")[0] == 0
    assert run.records()[-1].weights_sha == whole.records()[-1].weights_sha


# ---------------------------------------------------------------------- where they are found


def test_what_is_not_there_is_one_line_and_no_run(first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    storage = tmp_path / "runs"
    for text, why in {
        "nowhere/x.pt": "nowhere/x.pt: no such file; allowed: a file, RUN@EPOCH, or a name of torchvision's",
        "x.pt": f"x.pt: no such file, here or in {tmp_path}/torch/hub/checkpoints (torch's cache; nothing is downloaded"
        "); allowed: a file, RUN@EPOCH, or a name of torchvision's",
        "nothing@best": f"no run 'nothing' in {storage}",
        f"{first.root}@7": f"{first.id}@7: no such epoch; there are 1-2",
        f"{first.root}@x": "not a checkpoint reference",
    }.items():
        asked = config(storage, model={**MODEL, "weights": text})
        for start in (lambda asked=asked: train(asked, argv=[]), lambda asked=asked: outline(asked)):
            with pytest.raises(UserError) as refused:
                start()
            assert str(refused.value).startswith("model.weights: ")
            assert why in str(refused.value)
    assert not storage.exists()


def test_a_run_without_its_epoch_gets_it(first: Run, tmp_path: Path) -> None:
    for text in ("first", str(first.root)):
        with pytest.raises(UserError, match=r"^model\.weights: .*no such file; ") as refused:
            find(config(first.root.parent, model={**MODEL, "weights": text}))
        assert str(refused.value).endswith(f" (did you mean {text}@best?)")
        find(config(first.root.parent, model={**MODEL, "weights": f"{text}@best"}))


def test_references_mean_the_same_for_ever(first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meant(text: str) -> str | None:
        return resolved(config(first.root.parent, model={**MODEL, "weights": text})).model.weights

    best = first.best()
    assert meant("first@best") == meant(f"{first.root}@best") == f"{first.root}@{best}"
    assert meant("first@last") == f"{first.root}@2"
    assert meant(f"{first.root}@2") == f"{first.root}@2"
    assert meant(str(first.checkpoint(1))) == str(first.checkpoint(1))
    assert find(config(first.root.parent, model={**MODEL, "weights": str(first.checkpoint(1))})).run == first
    monkeypatch.chdir(tmp_path)
    Path("a@1.pt").write_bytes(b"")  # a file, in spite of its name
    assert meant("a@1.pt") == str(tmp_path / "a@1.pt")
    assert meant(meant("first@1") or "") == meant("first@1")


def test_a_checkpoint_that_was_not_kept_or_is_damaged(first: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(first.root, tmp_path / first.id))
    state = run.checkpoint(2) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    for text in (f"{run.root}@2", str(run.checkpoint(2))):
        with pytest.raises(RunError, match=r"^model\.weights: \S+/epoch_002: state\.safetensors is damaged"):
            find(config(tmp_path, model={**MODEL, "weights": text}))
    shutil.rmtree(run.checkpoint(1))
    run.update(not_kept={"1": "best"})
    with pytest.raises(UserError, match=r"^model\.weights: .* was not kept \(checkpoint\.keep: best\); kept: 2$"):
        find(config(tmp_path, model={**MODEL, "weights": f"{run.root}@1"}))


def test_the_copy_is_the_tensors(first: Run, tmp_path: Path) -> None:
    from rayexp.launch.starting import read

    asked = resolved(config(first.root.parent, model={**MODEL, "weights": "first@1"}))
    found = read(asked)
    assert found is not None
    run = Run.create(asked.model_copy(update={"storage_path": tmp_path}), argv=[])
    found.keep(run)
    data, about = RunWriter(run).weights()
    assert sha({n.removeprefix("model."): t for n, t in safetensors.torch.load(data).items()}) == (
        first.records()[0].weights_sha
    )
    assert json.loads(json.dumps(about)) == about
    (run.root / WEIGHTS).write_bytes(data[:-1])
    assert RunWriter(run).weights() == (b"", {})


# ---------------------------------------------------------------------- the same bits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "text"])
def test_the_same_bits_at_any_number_of_workers(first: Run, tmp_path: Path, kind: str) -> None:
    if kind == "text":
        asked = config(first.root.parent, model={**MODEL, "weights": "first@best", "freeze": ["encoder.*"]})
    else:
        data = {"name": "shapes", "max_train_samples": 64, "max_val_samples": 16, "image_size": 32}
        start = train(
            config(
                tmp_path / "runs", name="other", workload="image_classification", model={"name": "resnet18"},
                data={**data, "max_train_samples": 32}, epochs=1,
            ),
            argv=[],
        )  # fmt: skip
        model = {
            "name": "resnet18",
            "weights": f"{start.root}@1",
            "freeze": ["conv1.*", "bn1.*", "layer1.*", "layer3.*"],
        }
        asked = config(tmp_path / "runs", workload="image_classification", model=model, data=data)
    found = verify(asked, [0, 1, 2], steps=3, launcher="processes", contrast=False)
    assert found.ok, found.sentence()
