"""Whether a model takes images of a size, found out before a run begins: by a training pass on PyTorch's meta device,
where tensors have a shape and no values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rayexp.errors import UserError

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
