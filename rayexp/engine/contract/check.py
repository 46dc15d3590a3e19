"""Try a model on a few samples before it is trained, and name everything that breaks a promise of the engine's.

The model that is trained, the global generators and the settings of the process are left as they were: every trial is
made with models of its own.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from rayexp.config import ExperimentConfig
from rayexp.config.components import GROUPS, entry_points, is_reference
from rayexp.engine.contract import batches, evaluation, passes, structure
from rayexp.engine.contract.breach import Breach, Contract, module_in, once
from rayexp.engine.contract.determinism import operation_of
from rayexp.engine.contract.draws import GlobalStates, undisturbed
from rayexp.engine.contract.passes import FailedPassError
from rayexp.engine.contract.setting import MOST, SHARDS, Setting, small
from rayexp.engine.freezing import freeze
from rayexp.engine.runtime import Runtime
from rayexp.engine.workload import Workload
from rayexp.errors import UserError

SHIPPED = ("rayexp", "torchvision")
"""Packages whose models and workloads are known to keep the contract, or are watched closely enough."""
Opener = Callable[[ExperimentConfig], Workload]


def is_shipped(config: ExperimentConfig, workload: Workload, model: nn.Module) -> bool:
    """Whether the model and the workload are rayexp's and torchvision's own, by their short names."""
    name = config.model.name
    own = is_reference(name) or name in entry_points(GROUPS["model.name"])
    packages = {type(part).__module__.partition(".")[0] for part in (workload, model)}
    return packages <= set(SHIPPED) and not own


def check(
    config: ExperimentConfig,
    open_workload: Opener,
    runtime: Runtime,
    weights: Callable[[Workload], Mapping[str, Tensor]] = lambda workload: {},
) -> Contract:
    """Try the model of a configuration on two tiny shards of its data.

    Args:
        config: as it will be trained; `reduction` decides what is refused.
        open_workload: opens the workload of a configuration.
        runtime: where to compute, as `runtime.configure` has set it up.
        weights: of an opened workload, the tensors to start from, by name; none: those that the model is built with.

    Raises:
        UserError: the configuration, the data, the weights or a pattern of `model.freeze` does not fit.
    """
    with undisturbed(runtime.device), torch.enable_grad():
        sizes = small(config), small(config, MOST // 2)
        opened = [open_workload(sized) for sized in sizes]
        tensors = weights(opened[0])
        setting, half = (Setting(*pair, runtime, tensors) for pair in zip(sizes, opened, strict=True))
        trial = _Trial(setting, half)
        trial.run()
    return Contract(config.reduction, once(trial.found), tuple(trial.checked))


class _Trial:
    """The trials, one after another, as far as each makes sense after those before."""

    def __init__(self, setting: Setting, half: Setting) -> None:
        self.setting, self.half = setting, half
        self.found: list[Breach] = []
        self.checked: list[str] = []

    def run(self) -> None:
        device = self.setting.runtime.device
        with undisturbed(device) as states:
            self.checked.append("its structure")
            try:
                model = self.setting.workload.model()
            except UserError:
                raise
            except Exception as error:
                what = f"it cannot be built ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
                self.found.append(Breach("model", "", what, "a module, freshly initialised", "always"))
                return
            freeze(model, self.setting.config.model)
            seen, fatal = structure.inspect(model)
            self.found += seen
            if fatal:
                return
            self.checked.append("two builds")
            with undisturbed(device):
                _stir()
                self.found += structure.unlike_builds(model, self.setting.workload.model())
            del model
            go_on = False
            with self._trying("a copy and the original"):
                seen, go_on = batches.copied(self.setting, states)
                self.found += seen
            if go_on:
                self._shards(states)

    def _shards(self, states: GlobalStates) -> None:
        mixed: list[Breach] = []
        with self._trying("two shards in both orders, on two copies"):
            mixed = passes.both_orders(self.setting, states)
            self.found += mixed
        if all(breach.level == "note" for breach in mixed):
            # Otherwise a difference would not be one of the batch.
            with self._trying("two shards alone and together"):
                self.found += batches.alone_and_together(self.setting, states)
        with self._trying("validation samples in both orders, and in other batches"):
            self.found += evaluation.evaluated(self.setting, self.half, states)

    @contextlib.contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        """One trial; that it fails is what it finds."""
        self.checked.append(what)
        try:
            yield
        except FailedPassError as failed:
            self.found.append(_failure(failed, self.setting))


def _stir() -> None:
    """Move the global generators, as other code in a process does."""
    torch.rand(1)
    np.random.rand()
    random.random()


def _failure(failed: FailedPassError, setting: Setting) -> Breach:
    error = failed.error
    where = failed.where or ("the loss" if failed.watch.ended else "a pass")
    module = module_in(failed.where)
    if isinstance(error, UserError):
        part, _, rest = str(error).partition(": ")
        what, _, way = rest.partition("; allowed: ")
        return Breach(part, module, what, way or "see there", "always")
    if (operation := operation_of(error)) is not None:
        what = f"{operation} in {where} has no deterministic kernel for {setting.runtime.device.type}"
        return Breach("model", module, what, "another operation, or ddp on a GPU", "always")
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    what = f"a pass over {sum(setting.workload.sizes(0, SHARDS[:1]))} samples fails in {where}: {line}"
    return Breach("model", module, what, "a forward and a loss that take the workload's batches", "always")
