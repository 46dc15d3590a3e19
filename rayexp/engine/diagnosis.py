"""Why a validation loss makes no sense while the training loss does: what is said on the screen after such an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rayexp.display import counted, figure

ABSURD = 100.0  # nats of a cross-entropy; guessing among a million classes gives 14
MATTERS = 0.05  # a smaller share of the initial values left in running statistics explains nothing


def absurd_loss(
    epoch: int, val_loss: float, momenta: Iterable[float | None], steps: int, cross_entropy: bool = True
) -> str | None:
    """A line on a validation loss that is not finite or above ABSURD, with the likely reason; None for any other.

    (A training loss that is not finite ends the run by itself.)

    Args:
        epoch: counts from 1.
        val_loss: mean over the validation data.
        momenta: of the model's batch norms with running statistics; None: of one that averages over steps.
        steps: optimizer steps done since the beginning of the run.
        cross_entropy: whether the loss is one; any other may have any size.
    """
    if math.isfinite(val_loss) and val_loss <= (ABSURD if cross_entropy else math.inf):
        return None
    line = f"val_loss of epoch {epoch} is {figure(val_loss, '.3g')}"
    if (left := initial_share(momenta, steps)) >= MATTERS:
        return (
            f"{line}; the likely reason: evaluation normalises with running statistics, and {100 * left:.3g} % of them "
            f"are still their initial values after {counted(steps, 'step')}; "
            "more steps help (epochs, or a smaller batch_size)"
        )
    return f"{line}; the likely reason: training diverges; a smaller lr or optimizer.clip may help"


def initial_share(momenta: Iterable[float | None], steps: int) -> float:
    """The share, from 0 to 1, that the initial values (mean 0, variance 1) still have in the running statistics of the
    slowest batch norm: (1 - momentum) to the power of the steps. 0 for a model without any, and of an average (None).

    (torch.nn.BatchNorm2d: running = (1 - momentum) * running + momentum * observed.)
    """
    return max(((1 - momentum) ** steps for momentum in momenta if momentum is not None), default=0.0)
