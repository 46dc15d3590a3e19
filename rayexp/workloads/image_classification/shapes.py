"""Whether a model takes images of a size, found out before a run begins: by a training pass on PyTorch's meta device,
where tensors have a shape and no values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rayexp.config.references import failure
from rayexp.errors import UserError
from rayexp.workloads.own_model import OwnModel

TRIED = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # pixels; the nearest that works is named


def check_size(make: Callable[[int], nn.Module], name: str, size: int) -> None:
    """Refuse a model that cannot be built for images of this size, or fails on them.

    Args:
        make: makes the model for images of a size, in pixels.
        name: the model's, for the error.
        size: in pixels.

    Raises:
        UserError: it names a size that the model takes.
    """
    if (fault := _fault(make, size)) is None:
        return
    nearest = sorted(TRIED, key=lambda other: abs(other - size))
    good = next((other for other in nearest if other != size and _fault(make, other) is None), None)
    advice = f"; it takes {good} px: data.image_size={good}" if good else ""
    raise UserError(f"model.name: {name} takes no images of {size} px ({fault}){advice}")


def _fault(make: Callable[[int], nn.Module], size: int) -> str | None:
    """Why the model does not take two images of this size in training, or None; None too where that needs values, which
    the meta device does not have."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            make(size).train()(torch.empty(2, 3, size, size))
    except NotImplementedError:
        return None
    except UserError as error:
        if error.__cause__ is None:
            raise  # of the options, not of the size
        return None if isinstance(error.__cause__, NotImplementedError) else _line(error.__cause__)
    except (ValueError, TypeError, RuntimeError, AssertionError, IndexError) as error:
        return _line(error)
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".!") or type(error).__name__


def check_own(make: Callable[[], nn.Module], own: OwnModel, size: int, classes: int) -> None:
    """Refuse a model of the user's own that fails on images of this size, or gives no logits. It is tried on the meta
    device and, since it may not be made for that, on the CPU where that fails.

    Args:
        make: makes the model.
        own: where it comes from, for errors.
        size: in pixels.
        classes: how many logits it must give for each image.

    Raises:
        UserError: it names the line of the user's file.
    """
    try:
        out = _logits(make, size, "meta")
    except Exception:
        try:
            out = _logits(make, size, "cpu")
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"model.name: {own.name} fails on images of {size} px ({failure(error, own.code)})"
            ) from error
    if not isinstance(out, torch.Tensor) or not out.is_floating_point() or tuple(out.shape) != (2, classes):
        got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise UserError(
            f"model.name: {own.name} gives {got} for 2 images and {classes} classes; expected logits, (2, {classes})"
        )


def _logits(make: Callable[[], nn.Module], size: int, device: str) -> object:
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
        return make().train()(torch.zeros(2, 3, size, size))
