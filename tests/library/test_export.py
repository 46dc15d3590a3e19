"""Checkpoints leave: files that PyTorch, torchvision and ONNX read without rayexp, and plain modules."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

import rayexp
from rayexp.config import ExperimentConfig, parse
from rayexp.errors import RunError, UserError, WriteError
from rayexp.launch.export import export
from rayexp.runs.run import Run
from rayexp.workloads.image_classification.portable import recipe
from rayexp.workloads.image_classification.workload import Options, build
from rayexp.workloads.language_model.model import LanguageNet
from rayexp.workloads.language_model.model import build as build_net
from rayexp.workloads.language_model.plain import plain

ALONE = """
import sys
sys.modules["rayexp"] = None  # whoever imports it fails
import numpy as np, torch
"""


def alone(code: str, *args: str) -> str:
    """What Python prints without rayexp."""
    done = subprocess.run([sys.executable, "-c", ALONE + code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logits(run: Run, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return rayexp.load_model(run)(images)  # type: ignore[no-any-return]


def test_a_state_dict_is_loaded_by_torchvision_alone(runs: Path, pictures: Run, tmp_path: Path) -> None:
    made = rayexp.export("pictures@best", tmp_path / "model.pt", runs=runs)
    assert made.build == (
        "from torch import nn",
        "from torchvision.models import resnet18",
        "model = resnet18(num_classes=20)",
        "model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)",
        "model.maxpool = nn.Identity()",
    )
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    load = "print(model.load_state_dict(torch.load(sys.argv[1], weights_only=True), strict=True))\n"
    run = "np.save(sys.argv[3], model.eval()(torch.from_numpy(np.load(sys.argv[2]))).detach().numpy())\n"
    printed = alone(
        "\n".join([*made.build, load, run]), str(made.path), str(tmp_path / "images.npy"), str(tmp_path / "out")
    )
    assert printed == "<All keys matched successfully>\n"
    ours = (
        logits(Run(pictures.root), images) if pictures.best() == 2 else rayexp.load_model(pictures.at("best"))(images)
    )
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), ours.detach().numpy(), rtol=1e-4, atol=1e-5)
    about = json.loads((tmp_path / "model.json").read_text())
    assert made.beside == tmp_path / "model.json"
    assert about["categories"] == pictures.data()["classes"]
    assert (about["image_size"], about["mean"], about["std"]) == (32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    record = pictures.records()[pictures.best() - 1]
    assert (about["run"], about["epoch"], about["weights_sha"]) == (pictures.id, record.epoch, record.weights_sha)
    assert about["metrics"] == {"val_loss": record.val_loss, **record.metrics}


def test_safetensors_carries_what_is_needed(runs: Path, pictures: Run, tmp_path: Path) -> None:
    made = rayexp.export("pictures@1", tmp_path / "model.safetensors", runs=runs)
    assert made.beside is None
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safetensors.safe_open(made.path, "pt") as file:
        meta, names = file.metadata(), set(file.keys())
    assert meta["architecture"] == "resnet18"
    assert json.loads(meta["categories"]) == pictures.data()["classes"]
    assert json.loads(meta["mean"]) == [0.485, 0.456, 0.406]
    assert meta["weights_sha"] == pictures.records()[0].weights_sha
    assert names == set(rayexp.load_model("pictures@1", runs=runs).state_dict())


@pytest.mark.parametrize(
    ("name", "stem", "size"),
    [
        ("resnet18", "small", 32),
        ("resnet18", "imagenet", 64),
        ("squeezenet1_1", "imagenet", 64),
        ("vit_b_32", "imagenet", 64),
        pytest.param("googlenet", "imagenet", 64, marks=pytest.mark.slow),
        pytest.param("inception_v3", "imagenet", 96, marks=pytest.mark.slow),
        pytest.param("maxvit_t", "imagenet", 224, marks=pytest.mark.slow),
    ],
)
def test_the_printed_lines_build_the_model(name: str, stem: Any, size: int, recwarn: pytest.WarningsRecorder) -> None:
    names: dict[str, Any] = {}
    with torch.device("meta"):
        exec("\n".join(recipe(name, stem, 7, size)), names)
        ours = build(name, Options(stem=stem), 7, size)
    assert len(recwarn) == 0
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (ours, names["model"])]
    assert shapes[0] == shapes[1]
    assert type(names["model"]) is type(ours)


def test_a_file_that_is_there_is_replaced_only_by_force(runs: Path, pictures: Run, tmp_path: Path) -> None:
    beside = tmp_path / "model.json"
    beside.write_text("mine")
    with pytest.raises(UserError, match=r"model.json is there already; --force replaces it"):
        rayexp.export("pictures@1", tmp_path / "model.pt", runs=runs)
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
    rayexp.export("pictures@1", tmp_path / "model.pt", force=True, runs=runs)
    with pytest.raises(UserError, match=r"model.pt is there already"):
        rayexp.export("pictures@1", tmp_path / "model.pt", runs=runs)
    rayexp.export("pictures@2", tmp_path / "model.pt", force=True, runs=runs)
    assert json.loads(beside.read_text())["epoch"] == 2


@pytest.mark.parametrize("before", [None, "mine"])
def test_where_the_second_file_cannot_be_written_the_first_is_as_before(
    runs: Path, pictures: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    from rayexp.launch import export as exporting

    if before is not None:
        (tmp_path / "model.json").write_text(before)
    write = exporting.write_atomic

    def full(path: Path, data: bytes | str) -> None:
        if path.suffix == ".pt":
            raise WriteError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(exporting, "write_atomic", full)
    with pytest.raises(WriteError, match="No space left"):
        rayexp.export("pictures@1", tmp_path / "model.pt", force=True, runs=runs)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if before is None else [before])


@pytest.mark.parametrize(
    ("to", "line"),
    [("model.bin", "model.bin ends in none of .pt, .safetensors, .onnx"), ("folder.pt", "folder.pt is a folder")],
)
def test_where_to_is_checked_first(pictures: Run, tmp_path: Path, to: str, line: str) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UserError, match=line):
        export(pictures, 99, tmp_path / to)


def test_an_epoch_without_a_checkpoint_and_a_damaged_one_are_named(pictures: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"@99: has no checkpoint .*there are: 1-2$"):
        export(pictures, 99, tmp_path / "model.pt")
    import shutil

    copy = Run(Path(shutil.copytree(pictures.root, tmp_path / pictures.id)))
    file = copy.checkpoint(1) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(RunError, match="epoch_001"):
        export(copy, 1, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.slow
def test_load_model_is_torchvisions_own_and_goes_elsewhere(pictures: Run, tmp_path: Path) -> None:
    model = rayexp.load_model(pictures.at(2))
    assert type(model).__module__ == "torchvision.models.resnet"
    assert not model.training
    torch.save(model, tmp_path / "whole.pt")
    printed = alone(
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(model.about['categories'][3][0], model(torch.zeros(1, 3, 32, 32)).shape[1])",
        str(tmp_path / "whole.pt"),
    )
    assert printed == f"{pictures.data()['classes'][3][0]} 20\n"


def test_load_model_makes_float32_whatever_is_the_default(pictures: Run) -> None:
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        model = rayexp.load_model(pictures)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), before)


MODELS = {
    "lstm": {"emsize": 12, "nhid": 16, "nlayers": 2},
    "gru": {"emsize": 16, "nhid": 16, "nlayers": 1, "tied": True},
    "rnn_tanh": {"emsize": 8, "nhid": 8, "nlayers": 1},
    "rnn_relu": {"emsize": 8, "nhid": 8, "nlayers": 2},
    "transformer": {"emsize": 16, "nhid": 24, "nlayers": 2, "nhead": 2},
    "transformer untied": {"emsize": 16, "nhid": 24, "nlayers": 1, "nhead": 4, "tied": False},
}


def net(name: str) -> LanguageNet:
    tree = {"workload": "language_model", "data": {"name": "python_docs"}, "shards": 1, "batch_size": 1}
    model = {"name": name.split()[0], **MODELS[name]}
    return build_net(parse({**tree, "model": model}, ExperimentConfig, "test"), 31).eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_language_model_gives_the_same_logits_and_goes_elsewhere(name: str, tmp_path: Path) -> None:
    ours = net(name)
    tokens = torch.randint(0, 31, (9, 3), generator=torch.Generator().manual_seed(1))
    theirs = plain(ours)
    with torch.inference_mode():
        expected = ours(tokens)[0]
        torch.testing.assert_close(theirs(tokens), expected)
        torch.testing.assert_close(theirs(tokens[:4, :1]), expected[:4, :1])
    assert set(theirs.state_dict()) == set(ours.state_dict())
    modules = {type(module).__module__.split(".")[0] for module in theirs.modules()}
    assert modules == {"torch"}
    file = io.BytesIO()
    torch.save(theirs, file)
    assert b"rayexp" not in file.getvalue()


@pytest.mark.slow
def test_a_language_model_is_loaded_elsewhere(words: Run, tmp_path: Path) -> None:
    model = rayexp.load_model(words)
    torch.save(model, tmp_path / "words.pt")
    printed = alone(
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(len(model.about['vocabulary']), model(torch.zeros(3, 2, dtype=torch.int64)).shape)",
        str(tmp_path / "words.pt"),
    )
    count = len(words.data()["vocabulary"])
    assert printed == f"{count} torch.Size([3, 2, {count}])\n"


def test_without_the_library_onnx_says_what_to_install(
    runs: Path, pictures: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r".onnx: needs onnxscript; pip install 'rayexp\[onnx\]'"):
        rayexp.export("pictures@1", tmp_path / "model.onnx", runs=runs)
    assert list(tmp_path.iterdir()) == []


def evaluated(path: Path, inputs: Any) -> Any:
    """What ONNX's reference evaluator computes."""
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(str(path))
    return session.run(None, {session.input_names[0]: inputs})[0]


@pytest.mark.slow
def test_onnx_computes_the_same_for_any_batch(runs: Path, pictures: Run, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    made = rayexp.export("pictures@2", tmp_path / "model.onnx", runs=runs)
    meta = {prop.key: prop.value for prop in onnx.load(made.path).metadata_props}
    assert json.loads(meta["categories"]) == pictures.data()["classes"]
    assert meta["weights_sha"] == pictures.records()[1].weights_sha
    for count in (1, 3):
        images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        np.testing.assert_allclose(evaluated(made.path, images.numpy()), logits(pictures, images), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "transformer"])
def test_onnx_reads_language_models(name: str, tmp_path: Path) -> None:
    """A transformer reads texts of any length, a recurrent one those of its window; both any number of columns."""
    pytest.importorskip("onnxscript")
    from rayexp.engine.portable import to_onnx
    from rayexp.workloads.language_model.workload import LanguageModel

    ours = net(name)
    tree = {"workload": "language_model", "data": {"name": "python_docs", "bptt": 7}, "shards": 1, "batch_size": 1}
    config = parse({**tree, "model": {"name": name, **MODELS[name]}}, ExperimentConfig, "test")
    made = LanguageModel.portable(config, {"vocabulary": [str(n) for n in range(31)]}, ours.state_dict())
    assert made.about.get("onnx") == (None if name == "transformer" else "time is 7 in .onnx")
    (tmp_path / "model.onnx").write_bytes(to_onnx(made))
    time = 5 if name == "transformer" else 7
    tokens = torch.randint(0, 31, (time, 3), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = ours(tokens)[0].numpy()
    np.testing.assert_allclose(evaluated(tmp_path / "model.onnx", tokens.numpy()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_size_that_onnx_would_fix_in_silence_is_an_error() -> None:
    pytest.importorskip("onnxscript")
    from rayexp.engine.portable import Portable, to_onnx

    ours = net("rnn_relu")
    example, axes = torch.zeros(7, 2, dtype=torch.int64), ({0: "time", 1: "columns"},)
    with pytest.raises(RunError, match=r"\.onnx: .*time"):
        to_onnx(Portable(plain(ours), ours.state_dict(), (example,), axes, (), {}))
