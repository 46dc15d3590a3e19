from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from PIL import Image
from torchvision.transforms.functional import normalize

from rayexp.config import ExperimentConfig
from rayexp.engine import checkpoint
from rayexp.errors import RunError, UserError
from rayexp.launch.driver import run
from rayexp.launch.evaluate import evaluate, predict
from rayexp.launch.local import on_gpu
from rayexp.runs.integrity import faults
from rayexp.runs.records import Predictions
from rayexp.workloads import open_workload
from rayexp.workloads.image_classification.workload import ImageClassification, Mirrored
from rayexp.workloads.language_model import generate as text

Tiny = Callable[..., ExperimentConfig]
Typed = Callable[..., "subprocess.CompletedProcess[str]"]
IMAGES = {
    "workload": "image_classification",
    "data": {"name": "shapes", "max_train_samples": 64, "max_val_samples": 72},
    "model": {"name": "squeezenet1_1"},
    "epochs": 1,
    "lr": 0.01,
}


@pytest.mark.parametrize("changes", [{}, IMAGES], ids=["text", "images"])
def test_a_checkpoint_says_again_what_training_stored(tiny: Tiny, changes: dict[str, object]) -> None:
    made = run(tiny(**changes), argv=[])
    stored = made.predictions(1)
    found = evaluate(made, 1)
    assert found.equal
    assert not found.stored
    record = made.records()[0]
    assert found.metrics["val_loss"] == record.val_loss
    assert record.metrics.items() <= found.metrics.items()
    assert found.weights_sha == record.weights_sha
    made.predictions_path(1).unlink()
    again = predict(made, 1)
    for name, array in stored.arrays.items():
        np.testing.assert_array_equal(again[name], array)
    assert made.predictions_path(1).exists()


def test_predictions_made_on_another_device_are_not_damaged(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(tiny(), argv=[])
    trained = [made.predictions_path(epoch).read_bytes() for epoch in (1, 2)]
    made.predictions_path(1).unlink()
    evaluate(made, 1)
    assert made.predictions_path(1).read_bytes() == trained[0]
    made.predictions_path(1).unlink()
    to_npz = Predictions.to_npz

    def rounded_differently(self: Predictions) -> bytes:
        loss = np.nextafter(self["loss"], np.float32(9))
        return to_npz(Predictions(self.kind, self.data_sha, {**self.arrays, "loss": loss}))

    monkeypatch.setattr(Predictions, "to_npz", rounded_differently)
    evaluate(made, 1)
    later = made.predictions_path(1).read_bytes()
    assert not made.predictions(1).same_as(Predictions.from_npz(trained[0], "trained"))
    assert faults(made) == []
    for at in (100, len(later) // 2, len(later) - 140, len(later) - 1):
        made.predictions_path(1).write_bytes(later[:at] + bytes([later[at] ^ 1]) + later[at + 1 :])
        assert [line.partition(":")[0] for line in faults(made)] == ["predictions/epoch_001.npz"]
    made.predictions_path(1).write_bytes(later)
    made.predictions_path(2).write_bytes(later)  # of another epoch's weights
    assert [line.partition(":")[0] for line in faults(made)] == ["predictions/epoch_002.npz"]


@pytest.mark.parametrize(
    ("asked", "there", "found"),
    [(True, 0, False), ("auto", 0, False), (True, 2, True), ("auto", 1, True), (False, 1, False)],
)
def test_a_run_that_had_gpus_is_judged_where_there_are_none(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, asked: object, there: int, found: bool
) -> None:
    monkeypatch.setattr("rayexp.engine.runtime.gpus", lambda: there)
    for workers in (0, 2):
        assert on_gpu(tiny(scaling={"num_workers": workers, "use_gpu": asked})) is found


def test_a_run_that_asked_for_a_gpu_is_judged_on_this_cpu(tiny: Tiny) -> None:
    made = run(tiny(epochs=1, scaling={"use_gpu": False}), argv=[])
    asked = made.config().model_copy(update={"scaling": made.config().scaling.model_copy(update={"use_gpu": True})})
    made.write("config.yaml", asked.to_yaml())
    assert evaluate(made, 1).equal


def test_batches_come_in_their_order(tiny: Tiny) -> None:
    made = run(tiny(scaling={"lanes": 2}, shards=4, epochs=1), argv=[])
    seen: list[int] = []
    evaluate(made, 1, lambda batches: seen.append(-batches), lambda batch, part: seen.append(batch))
    assert seen == [-4, 0, 1, 2, 3]


def test_what_is_damaged_or_missing_is_named(tiny: Tiny) -> None:
    made = run(tiny(), argv=[])
    with pytest.raises(UserError, match="no checkpoint"):
        predict(made, 3)
    file = made.checkpoint(2) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"state\.safetensors is damaged"):
        predict(made, 2)


def test_the_lines_are_those_of_pytorchs_example(tiny: Tiny, tmp_path: Path, typed: Typed) -> None:
    made = run(tiny(**IMAGES, batch_size=32), argv=[])
    done = typed("evaluate", f"{made.id}@last", "--print-freq", "2")
    lines, err = done.stdout.splitlines(), done.stderr
    assert [line.split("\t")[0] for line in lines[:2]] == ["Test: [1/3]", "Test: [3/3]"], err
    assert err.splitlines()[0] == f"judging with {made.id}@1"  # which one `@last` was
    assert [part.split()[0] for part in lines[0].split("\t")] == ["Test:", "Time", "Loss", "Acc@1", "Acc@5"]
    metrics = made.records()[0].metrics
    assert lines[2] == f" * Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f}"
    means = lines[1].split("\t")
    assert means[3].endswith(f"({metrics['acc1']:6.2f})")
    tree = json.loads(typed("evaluate", f"{made.id}@1", "--json").stdout)
    assert (tree["acc1"], tree["mirrored"]) == (metrics["acc1"], False)


def test_mirrored_predictions_are_the_mean_of_both_and_are_not_stored(tiny: Tiny) -> None:
    """Against the mean of two softmaxes in float64, over pixels that numpy mirrors."""
    made = run(tiny(**IMAGES, batch_size=32), argv=[])
    stored = made.predictions_path(1).read_bytes()
    found = evaluate(made, 1, mirror=True)
    assert (found.mirrored, found.stored, found.equal) == (True, False, None)
    assert made.predictions_path(1).read_bytes() == stored

    work = open_workload(made.config())
    assert isinstance(work, ImageClassification)
    model = checkpoint.load_model(work, {file.name: file.read_bytes() for file in made.checkpoint(1).iterdir()})
    pixels = work.data.val.read(np.arange(72))
    both = []
    for each in (pixels, pixels[:, :, ::-1].copy()):
        planes = torch.from_numpy(each).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            logits = model(normalize(planes, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        both.append(scipy.special.softmax(logits.double().numpy(), axis=1))
    mean = (both[0] + both[1]) / 2
    labels = work.data.val.labels
    np.testing.assert_allclose(found.predictions["confidence"], mean.max(1), rtol=1e-4)
    np.testing.assert_allclose(found.predictions["loss"], -np.log(mean[np.arange(72), labels]), rtol=1e-4)
    assert not np.allclose(found.predictions["loss"], -np.log(both[0][np.arange(72), labels]), rtol=1e-3)
    assert np.array_equal(found.predictions["top5"][:, 0], mean.argmax(1))
    assert found.metrics["acc1"] == pytest.approx(100 * (mean.argmax(1) == labels).mean())
    made.predictions_path(1).unlink()
    assert not evaluate(made, 1, mirror=True).stored
    assert not made.predictions_path(1).exists()
    assert evaluate(made, 1).stored
    assert made.predictions_path(1).read_bytes() == stored


def test_mirroring_keeps_what_is_unlikely_finite() -> None:
    """Softmax in float32 would make it zero, and its loss infinite."""
    logits = torch.tensor([[0.0, -300.0, 5.0]])
    model = Mirrored(torch.nn.Module())
    model.model.forward = lambda x: logits  # type: ignore[method-assign]
    torch.testing.assert_close(model(torch.zeros(1, 3, 2, 2)), torch.log_softmax(logits, 1))


def test_mirrored_figures_are_labelled(tiny: Tiny, typed: Typed) -> None:
    made = run(tiny(**IMAGES, batch_size=64), argv=[])
    done = typed("evaluate", f"{made.id}@1", "--mirror")
    lines, err = done.stdout.splitlines(), done.stderr
    assert lines[0].startswith("Test mirrored: [1/2]\t"), err
    assert lines[-1].startswith(" * Acc@1 ")
    assert lines[-1].endswith(" (mirrored)")
    assert "differ from the predictions" not in err
    tree = json.loads(typed("evaluate", f"{made.id}@1", "--mirror", "--json").stdout)
    assert (tree["mirrored"], tree["predictions"], tree["stored"], tree["equal"]) == (True, None, False, None)
    assert tree["val_loss"] != made.records()[0].val_loss


def test_words_are_not_mirrored(tiny: Tiny) -> None:
    made = run(tiny(epochs=1), argv=[])
    with pytest.raises(UserError, match=r"^--mirror: language_model, which .* is of, mirrors nothing; .* images$"):
        evaluate(made, 1, mirror=True)


@pytest.mark.slow
def test_a_model_that_is_not_finite_is_said_and_compared(tiny: Tiny, typed: Typed) -> None:
    made = run(tiny(**{**IMAGES, "lr": 1e30, "batch_size": 64}), argv=[])  # one step, and its loss is finite
    found = evaluate(made, 1)
    assert found.not_finite == len(found.predictions) == 72
    assert found.equal
    assert (found.metrics["acc1"], found.metrics["acc5"]) == (0, 0)
    done = typed("evaluate", f"{made.id}@1")
    assert "NOT FINITE: the model's output for 72 of 72 samples" in done.stderr
    assert "another device" not in done.stderr
    assert "Loss not finite (not finite)" in done.stdout
    out = typed("evaluate", f"{made.id}@1", "--json").stdout
    tree = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (tree["val_loss"], tree["not_finite"], tree["equal"]) == (None, 72, True)


def test_a_language_model_that_is_not_finite(tiny: Tiny) -> None:
    one_step = {"name": "python_docs", "max_train_tokens": 336, "max_val_tokens": 600, "bptt": 20}
    made = run(tiny(lr=1e30, optimizer={"clip": None}, data=one_step, epochs=1, model={"name": "rnn_relu"}), argv=[])
    found = evaluate(made, 1)
    assert found.not_finite == len(found.predictions)
    assert found.equal
    assert not math.isfinite(found.metrics["ppl"])
    with pytest.raises(RunError, match="not finite"):
        list(text.generate(text.open_generator(made, 1).net, [0], 3))


def picture_folder(root: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for part, count in (("train", 8), ("val", 6)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_data_that_has_moved_is_taken_by_its_hash(tiny: Tiny, tmp_path: Path, typed: Typed) -> None:
    old, new = picture_folder(tmp_path / "old", 0), tmp_path / "new"
    data = {"name": "folder", "root": str(old), "image_size": 32}
    made = run(tiny(**{**IMAGES, "data": data, "batch_size": 8, "shards": 2}), argv=[])
    shutil.move(old, new)
    other = picture_folder(tmp_path / "other", 1)
    with pytest.raises(UserError, match=r"old.*; `rayexp evaluate .*@1 data\.root=DIR` takes the data from where"):
        evaluate(made, 1)
    assert evaluate(made, 1, root=new).equal
    with pytest.raises(UserError, match=r"^data\.root: the validation data in .*other is not that of"):
        evaluate(made, 1, root=other)
    (new / "val" / "cat").rename(new / "val" / "x")
    (new / "train" / "cat").rename(new / "train" / "x")
    with pytest.raises(UserError, match=r"^data\.root: "):
        evaluate(made, 1, root=new)
    (new / "val" / "x").rename(new / "val" / "cat")
    (new / "train" / "x").rename(new / "train" / "cat")
    assert json.loads(typed("evaluate", f"{made.id}@1", f"data.root={new}", "--json").stdout)["equal"] is True
    refused = typed("evaluate", f"{made.id}@1", "lr=3")
    assert "data.root=DIR only" in refused.stderr
    assert refused.returncode == 2
