"""Weights to start from (`model.weights`): tensors by name, as a file, a checkpoint or torchvision's cache holds them,
and how they fit a model.

The output layer is replaced where it has another number of classes; what else does not fit is refused by name.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rayexp.errors import UserError

# What wrappers put before every name (torch.compile, DistributedDataParallel, rayexp's own checkpoints).
PREFIXES = ("model.", "module.", "_orig_mod.")
# Where scripts put the state_dict inside of what they save.
INNER = ("state_dict", "model_state_dict", "model")
COUNTER = "num_batches_tracked"  # which the engine counts itself
SHOWN = 3  # tensors that an error names
ALLOWED = "a file, RUN@EPOCH, or a name of torchvision's"  # for model.weights
OTHER = "it is damaged, or holds other objects than tensors, which are not opened"
FETCHED = "torch's cache; nothing is downloaded"


@dataclass(frozen=True, slots=True)
class Fit:
    """What a model takes of some weights; names of tensors.

    Attributes:
        taken: from the weights.
        replaced: of the output layer, which has another number of classes there: drawn anew, by the seed.
        missing: what the weights lack: drawn anew, too.
        unused: what the model lacks.
    """

    taken: tuple[str, ...]
    replaced: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} tensors taken"]
        for what, names in (("new", self.replaced), ("not in it", self.missing), ("not used", self.unused)):
            if names:
                parts.append(f"{what}: {_few(names)}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "taken": len(self.taken),
            "replaced": list(self.replaced),
            "missing": list(self.missing),
            "unused": list(self.unused),
            "summary": str(self),
        }


def read(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a file by name: of a .safetensors, or of what torch.save has written (never unpickles anything but
    tensors and plain containers).

    Args:
        data: the file's content.
        name: the file's name, for its kind and for errors.

    Raises:
        UserError: it is neither, or holds no tensors by name.
    """
    if name.endswith(".safetensors"):
        try:
            found: Any = safetensors.torch.load(data)
        except SafetensorError as error:
            raise UserError(f"model.weights: {name}: not a safetensors file ({error})") from error
    else:
        try:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
            # PyTorch would advise to unpickle whatever is in it.
            why = OTHER if isinstance(error, pickle.UnpicklingError) else first[:200]
            raise UserError(
                f"model.weights: {name}: not a state_dict of tensors ({why}); torch.save(model.state_dict(), FILE) "
                "writes one"
            ) from error
    return named(found, name)


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of tensors, in which no two share memory."""
    return safetensors.torch.save({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()})


def named(found: Any, name: str) -> dict[str, Tensor]:
    """The tensors in what a file holds (UserError where there are none); of a rayexp checkpoint those of the model."""
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        inner = next((key for key in INNER if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
    tensors = (
        {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        raise UserError(f"model.weights: {name}: holds no tensors by name")
    if any(key.startswith(("optimizer.", "carry.")) for key in tensors):  # a rayexp checkpoint
        tensors = {key: value for key, value in tensors.items() if key.startswith("model.")}
    return tensors


def cached(name: str, model: str) -> Path:
    """The file of weights that torchvision has for a model, or of that name, in torch's cache. Nothing is downloaded.

    Args:
        name: such as IMAGENET1K_V1 or resnet18-f37072fd.pth.
        model: torchvision's name of the model.

    Raises:
        UserError: torchvision has none of this name, the file is not in the cache, or it is damaged.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = name
    if "." not in name:
        file = _published(name, model)
    path = folder / file
    if not path.is_file():
        if file != name:
            raise UserError(f"model.weights: {name} of {model} is {file}, which is not in {folder} ({FETCHED})")
        raise UserError(f"model.weights: {name}: no such file, here or in {folder} ({FETCHED}); allowed: {ALLOWED}")
    stem, _, sha = path.stem.rpartition("-")
    if stem and len(sha) == 8 and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(sha):
        raise UserError(f"model.weights: {path} is damaged: its sha256 does not begin with {sha}")
    return path


def _published(name: str, model: str) -> str:
    from torchvision import models

    try:
        weights = models.get_model_weights(model)
    except ValueError:
        raise UserError(f"model.weights: {name}: no such file; allowed: a file or RUN@EPOCH") from None
    try:
        return str(weights[name].url).rpartition("/")[2]
    except KeyError:
        known = ", ".join(one.name for one in weights)
        raise UserError(
            f"model.weights: {name}: no such file; allowed: {ALLOWED}, which for {model} are: {known}"
        ) from None


def adopt(model: nn.Module, tensors: Mapping[str, Tensor], source: str, classes: int | None) -> Fit:
    """Copy weights into a model, in place.

    Args:
        model: freshly initialised.
        tensors: by name, see `read`; a prefix that a wrapper has put before every name is passed over.
        source: names them in errors.
        classes: how many the data has; only an output layer of so many outputs may differ. None: none may.

    Raises:
        UserError: a tensor has another shape, or nothing fits; the line names tensors and shapes.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}
    found = {name: tensor for name, tensor in _unwrapped(tensors, own).items() if not name.endswith(COUNTER)}
    other = [name for name in own if name in found and found[name].shape != own[name].shape]
    if other and not _is_head(other, own, found, classes):
        shown = ", ".join(f"{n} is {_shape(found[n])} there and {_shape(own[n])} here" for n in other[:SHOWN])
        more = f", and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        raise UserError(f"model.weights: {source} does not fit this model: {shown}{more}")
    taken = [name for name in own if name in found and name not in other]
    if not taken:
        raise UserError(
            f"model.weights: {source} has no tensor of this model: {_few(list(found))} there, {_few(list(own))} here"
        )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(found[name])
    missing = [name for name in own if name not in found]
    return Fit(tuple(taken), tuple(other), tuple(missing), tuple(name for name in found if name not in own))


def _unwrapped(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without the prefixes that wrappers put before every name, as far as the model has them not itself."""
    while not own.keys() & tensors.keys():
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _is_head(names: Sequence[str], own: Mapping[str, Tensor], found: Mapping[str, Tensor], classes: int | None) -> bool:
    """Whether these tensors are those of one layer with an output for each class, but for the number of classes."""
    return len({name.rpartition(".")[0] for name in names}) == 1 and all(
        own[n].ndim > 0 and own[n].ndim == found[n].ndim and own[n].shape[0] == classes
        and own[n].shape[1:] == found[n].shape[1:]
        for n in names
    )  # fmt: skip


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single value"


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
