"""`model.weights`: what files hold, how it fits a model, and what is refused by name."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from rayexp.engine.starting import OTHER, adopt, cached, read, to_bytes
from rayexp.errors import UserError


def net(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, classes))


def weights(classes: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(tensor.float()) for name, tensor in net(classes).state_dict().items()}


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# ---------------------------------------------------------------------- files


def test_what_files_hold() -> None:
    tensors = weights()
    other = {"optimizer.momentum_buffer.3.weight": torch.ones(1), "carry.0.h": torch.ones(1)}
    for data, name in (
        (safetensors.torch.save(tensors), "x.safetensors"),
        (saved(tensors), "x.pt"),
        (saved({"epoch": 3, "state_dict": tensors}), "x.pth"),
        (saved({"model": {"state_dict": tensors}, "args": [1]}), "x.bin"),
        (to_bytes(tensors), "x.safetensors"),
    ):
        found = read(data, name)
        assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in tensors.items()}
    checkpoint = {f"model.{name}": tensor for name, tensor in tensors.items()} | other
    assert read(safetensors.torch.save(checkpoint), "state.safetensors").keys() == {f"model.{n}" for n in tensors}


def test_tensors_that_share_memory_are_written_apart() -> None:
    one = torch.arange(6.0)
    again = read(to_bytes({"a": one, "b": one.view(2, 3).t()}), "x.safetensors")
    assert again["b"].tolist() == one.view(2, 3).t().tolist()


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/rayexp-unpickled"),))


@pytest.mark.parametrize(
    ("data", "name", "why"),
    [
        (b"", "x.safetensors", "not a safetensors file"),
        (b"no", "x.pt", f"not a state_dict of tensors \\({OTHER}\\); torch.save"),
        (pickle.dumps({"a": Evil()}), "x.pt", f"not a state_dict of tensors \\({OTHER}\\); torch.save"),
        (saved({"a": Evil()}), "x.pt", f"not a state_dict of tensors \\({OTHER}\\); torch.save"),
        (saved({"a": torch.ones(9)})[:300], "x.pt", r"not a state_dict of tensors \([^.]*\); torch.save"),
        (saved({"a": 1}), "x.pt", "holds no tensors by name"),
        (saved([torch.ones(1)]), "x.pt", "holds no tensors by name"),
        (safetensors.torch.save({}), "x.safetensors", "holds no tensors by name"),
    ],
    ids=["empty", "text", "pickle", "pickle in a zip", "cut off", "no tensors", "no names", "no tensors at all"],
)
def test_anything_else_is_one_line(data: bytes, name: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.weights: {name}: {why}") as refused:
        read(data, name)
    assert "\n" not in str(refused.value)
    assert not Path("/tmp/rayexp-unpickled").exists()


# ---------------------------------------------------------------------- torch's cache


def test_the_cache_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("something is downloaded"))
    folder = tmp_path / "hub" / "checkpoints"
    with pytest.raises(UserError) as refused:
        cached("IMAGENET1K_V1", "resnet18")
    assert str(refused.value) == (
        f"model.weights: IMAGENET1K_V1 of resnet18 is resnet18-f37072fd.pth, which is not in {folder} "
        "(torch's cache; nothing is downloaded)"
    )
    with pytest.raises(
        UserError, match=rf"^model\.weights: own\.pt: no such file, here or in {folder} \(torch's cache"
    ):
        cached("own.pt", "resnet18")
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").write_bytes(b"damaged")
    for name in ("IMAGENET1K_V1", "DEFAULT", "resnet18-f37072fd.pth"):
        with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth is damaged: its sha256 does not begin with f370"):
            cached(name, "resnet18")
    sha = hashlib.sha256(b"whole").hexdigest()[:8]
    (folder / f"own-{sha}.pth").write_bytes(b"whole")
    assert cached(f"own-{sha}.pth", "resnet18").read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("name", "model", "why"),
    [
        ("IMAGENET1K_V9", "resnet18", "a file, RUN@EPOCH, or .* torchvision's, which for resnet18 are: IMAGENET1K_V1$"),
        ("weights", "lstm", "a file or RUN@EPOCH$"),
    ],
)
def test_names_that_torchvision_has_not(name: str, model: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.weights: {name}: no such file; allowed: {why}"):
        cached(name, model)


# ---------------------------------------------------------------------- fitting


def test_all_is_taken() -> None:
    model, tensors = net(), weights()
    fit = adopt(model, tensors, "x", 3)
    assert (len(fit.taken), fit.replaced, fit.missing, fit.unused) == (8, (), (), ())
    assert str(fit) == "8 tensors taken"
    for name, tensor in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_passed_over(prefix: str) -> None:
    model = net()
    assert len(adopt(model, {f"{prefix}{n}": t for n, t in weights().items()}, "x", 3).taken) == 8
    wrapped = nn.ModuleDict({"model": net()})  # has the prefix itself
    assert len(adopt(wrapped, {f"model.{n}": t for n, t in weights().items()}, "x", 3).taken) == 8


def test_the_output_layer_is_drawn_anew_where_classes_differ() -> None:
    model = net(5)
    drawn = model[3].weight.clone()
    fit = adopt(model, weights(3), "x", 5)
    assert fit.replaced == ("3.weight", "3.bias")
    assert torch.equal(model[3].weight, drawn)
    assert torch.equal(model[0].weight, weights()["0.weight"])
    assert str(fit) == "6 tensors taken; new: 3.weight, 3.bias"
    lists = {"replaced": ["3.weight", "3.bias"], "missing": [], "unused": []}
    assert fit.to_json() == {"taken": 6, **lists, "summary": str(fit)}


def test_what_lacks_and_what_is_not_used_is_named() -> None:
    tensors = weights()
    del tensors["1.running_mean"], tensors["1.num_batches_tracked"]
    fit = adopt(net(), {**tensors, "aux.weight": torch.ones(1), "aux.bias": torch.ones(1)}, "x", 3)
    assert fit.missing == ("1.running_mean",)
    assert fit.unused == ("aux.weight", "aux.bias")
    assert str(fit) == "7 tensors taken; not in it: 1.running_mean; not used: aux.weight, aux.bias"


@pytest.mark.parametrize(
    ("classes", "change", "named"),
    [
        (4, {}, "3.weight is 3x2 there and 5x2 here, 3.bias is 3 there and 5 here"),  # no class count
        (None, {}, "3.weight is 3x2 there and 5x2 here"),
        (5, {"0.weight": torch.ones(2, 1, 1, 1)}, "0.weight is 2x1x1x1 there and 2x1x3x3 here, 3.weight"),
        (5, {"3.weight": torch.ones(3, 7)}, "3.weight is 3x7 there and 5x2 here"),
        (5, {"1.bias": torch.ones(())}, "1.bias is a single value there and 2 here"),
    ],
)
def test_other_shapes_are_refused_by_name(classes: int | None, change: dict[str, Tensor], named: str) -> None:
    model = net(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as refused:
        adopt(model, {**weights(3), **change}, "x.pt", classes)
    assert str(refused.value).startswith(f"model.weights: x.pt does not fit this model: {named}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        adopt(net(), {"a": torch.ones(1), "b": torch.ones(1)}, "x.pt", 3)
    assert str(refused.value) == (
        "model.weights: x.pt has no tensor of this model: a, b there, 0.weight, 0.bias, 1.weight and 5 more here"
    )


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "densenet121", "googlenet"])
def test_the_output_layers_of_torchvision(name: str) -> None:
    from torchvision import models

    def make(classes: int) -> nn.Module:
        extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        with torch.device("meta"):
            made: nn.Module = models.get_model(name, num_classes=classes, **extra)
        return made.to_empty(device="cpu")

    fit = adopt(make(7), make(11).state_dict(), "x", 7)
    assert fit.missing == fit.unused == ()
    assert len({tensor.rpartition(".")[0] for tensor in fit.replaced}) == 1
    assert len(fit.replaced) == 2
