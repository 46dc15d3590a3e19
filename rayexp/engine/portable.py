"""A trained model outside of rayexp: a plain PyTorch module, what is needed to use it, and the files that hold it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rayexp.errors import RunError, UserError

EXTRA = "pip install 'rayexp[onnx]'"


@dataclass(frozen=True)
class Portable:
    """A trained model for others.

    Attributes:
        model: in eval mode on the CPU. It is made of PyTorch's, torchvision's or the user's own classes alone, so that
            `torch.save` and a process without rayexp can handle it.
        weights: its tensors, under the names of the checkpoint (torchvision's, where it has the model).
        inputs: arguments of its forward, for example.
        axes: of each input, the dimensions that may have any size, with a name each.
        build: lines of Python that build a `model` into which `weights` fit, without rayexp; may be empty.
        about: what a user must know: classes or vocabulary, how inputs are prepared, where it comes from. Plain values.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    axes: tuple[Mapping[int, str], ...]
    build: tuple[str, ...]
    about: Mapping[str, Any]


def to_pt(portable: Portable) -> bytes:
    """The weights as a plain state_dict, which `torch.load(FILE, weights_only=True)` reads."""
    file = io.BytesIO()
    torch.save(_plain(portable.weights), file)
    return file.getvalue()


def to_safetensors(portable: Portable) -> bytes:
    """The weights, with `about` in the metadata: text as it is, all else as JSON."""
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in portable.about.items()}
    return safetensors.torch.save(_plain(portable.weights), metadata)


def to_onnx(portable: Portable) -> bytes:
    """The model as ONNX with `about` in its metadata, as above; weights are inside, and `axes` are dynamic.

    Raises:
        UserError: the libraries are not installed.
        RunError: PyTorch cannot export this model.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f".onnx: needs {error.name or 'onnx'}; {EXTRA} (or export to .pt or .safetensors)") from None
    shapes = tuple({at: torch.export.Dim(name) for at, name in axes.items()} for axes in portable.axes)
    names = [f"input_{at}" if at else "input" for at in range(len(portable.inputs))]
    with _silent(), tempfile.TemporaryDirectory(prefix="rayexp-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            program = torch.onnx.export(
                portable.model,
                portable.inputs,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=["output"],
                dynamic_shapes=shapes,
            )
        except Exception as error:  # the exporter raises errors of many kinds
            why = " ".join(str(error.__cause__ or error).split())[:300]
            raise RunError(f".onnx: PyTorch cannot export this model ({type(error).__name__}: {why})") from error
        assert program is not None
        for given, axes in zip(program.model.graph.inputs, portable.axes, strict=True):
            sizes = given.shape
            if fixed := [name for at, name in axes.items() if sizes is None or isinstance(sizes[at], int)]:
                raise RunError(f".onnx: PyTorch can export this model for one size of {', '.join(fixed)} only")
        for key, value in portable.about.items():
            program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
        program.save(path, external_data=False)
        return path.read_bytes()


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter warns of its own affairs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
