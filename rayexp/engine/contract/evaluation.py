"""Validation samples in both orders on two copies, and in batches of another size: predictions must be those of a
sample, whoever makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rayexp.engine.contract import calls
from rayexp.engine.contract.breach import Breach, module_in
from rayexp.engine.contract.calls import Calls
from rayexp.engine.contract.draws import GlobalStates
from rayexp.engine.contract.passes import FailedPassError
from rayexp.engine.contract.setting import Setting
from rayexp.engine.evaluate import on_host

Part = Mapping[str, NDArray[Any]]
ROUNDING = 1e-3
"""Relative difference of a loss in batches of two sizes that may be rounding."""


def evaluated(setting: Setting, half: Setting, states: GlobalStates) -> list[Breach]:
    """What evaluation cannot repeat.

    Args:
        half: with half as many samples in a batch.

    Raises:
        FailedPassError: an evaluation has failed.
    """
    master = setting.master()
    streams = range(min(2, setting.workload.val_streams()))
    one, other = master.eval_model(), master.eval_model()
    first = {stream: _predicted(setting, one, stream, states) for stream in streams}
    second = {stream: _predicted(setting, other, stream, states) for stream in reversed(streams)}
    for where, generators in first[0][1].drawing().items():
        if where in second[0][1].drawing():
            what = f"{where} draws from {' and '.join(generators)} global generator in evaluation"
            module = module_in(where)
            return [Breach("model", module, what, "random layers that are off in eval mode")]
    for stream in streams:
        (a, watch), (b, again) = first[stream], second[stream]
        if not _same(a, b):
            call = calls.first_unlike(watch.done, again.done)
            where = f"{call.name or 'the model'} ({call.kind})" if call else "the model"
            what = f"in evaluation, {where} makes something else of the same samples after others"
            return [Breach("model", call.name if call else "", what, "a function of its inputs")]
    if unnamed := _metrics(setting, [part for part, _ in first.values()]):
        return unnamed
    parts = [_predicted(half, one, stream, states)[0] for stream in range(min(2, half.workload.val_streams()))]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    whole = first[0][0]
    if "index" in whole and np.array_equal(joined["index"], whole["index"]):
        pair = joined["loss"].astype(np.float64), whole["loss"].astype(np.float64)
        if not np.allclose(*pair, rtol=ROUNDING, atol=ROUNDING * 0.1, equal_nan=True):
            what = "in evaluation, what it makes of a sample depends on the others in its batch, or on their number"
            return [Breach("model", "", what, "layers that take each sample by itself in eval mode")]
    return []


def _metrics(setting: Setting, parts: list[Part]) -> list[Breach]:
    """Metrics that the workload does not name as it says; they would be missed at the end of an epoch."""
    workload = setting.workload
    try:
        predictions = workload.predictions(parts)
        found = workload.metrics(predictions)
    except Exception as error:
        if len(parts) < workload.val_streams():
            return []  # it may need all of them
        what = f"its predictions or metrics fail ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        return [Breach("workload", "", what, "metrics of what `predict` returns", "always")]
    if predictions.kind != workload.kind:
        what = f"its predictions are of the kind {predictions.kind!r}, and it says {workload.kind!r}"
        return [Breach("workload", "", what, "one word for both", "always")]
    if missing := [name for name in ("val_loss", *workload.goals) if name not in found]:
        what = f"its metrics lack {', '.join(missing)}; they are {', '.join(found) or 'none'}"
        return [Breach("workload", "", what, "val_loss, and all that `goals` names", "always")]
    return []


def _predicted(setting: Setting, model: nn.Module, stream: int, states: GlobalStates) -> tuple[Part, Calls]:
    device = setting.runtime.device
    watch = Calls(model, calls.exact, device)

    def work() -> Part:
        with torch.inference_mode():
            return on_host(setting.workload.predict(model, stream, device))

    states.restore(device)
    with watch:
        try:
            return setting.runtime.run([work])[0], watch
        except Exception as error:
            raise FailedPassError(watch, error, lambda: setting.runtime.run([work])) from error


def _same(one: Part, other: Part) -> bool:
    def equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")

    return one.keys() == other.keys() and all(equal(array, other[name]) for name, array in one.items())
