"""Two tiny shards go through two copies of a model in both orders, as they do in training: the bits must be the same,
and nothing but gradients may be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayexp.engine.checkpoint import sha
from rayexp.engine.contract import calls
from rayexp.engine.contract.breach import Breach, module_in
from rayexp.engine.contract.calls import Call, Calls
from rayexp.engine.contract.determinism import module_of, operation_of
from rayexp.engine.contract.draws import GlobalStates
from rayexp.engine.contract.first_step import FirstStep
from rayexp.engine.contract.setting import SHARDS, Setting
from rayexp.engine.gradients import ParameterLayout
from rayexp.engine.passes import Passes


@dataclass(frozen=True)
class ShardPass:
    """What a pass over one shard has come to.

    Attributes:
        buffer: fp32[R], the gradient buffer.
        state: hashes of the recurrent state after it, by name.
        calls: of the modules.
        drew: module (or the loss) -> global generators from which it has drawn.
    """

    buffer: Tensor
    state: Mapping[str, str]
    calls: Sequence[Call]
    drew: Mapping[str, Sequence[str]]


class FailedPassError(Exception):
    """A pass has ended with an error.

    Attributes:
        watch: the modules' calls until then.
        error: what was raised.
        where: `middle.1 (Functional)`, the module in which it was; empty where it is not known.

    Args:
        again: makes the pass once more.
    """

    def __init__(self, watch: Calls, error: Exception, again: Callable[[], object]) -> None:
        super().__init__(str(error))
        self.watch, self.error = watch, error
        self.where = module_of(watch.model, again) if operation_of(error) else watch.inside


def both_orders(setting: Setting, states: GlobalStates) -> list[Breach]:
    """What the order of shards, or the copy that computes them, changes, and what passes write.

    Args:
        states: the global generators begin every pass like this.

    Raises:
        FailedPassError: a pass has failed.
    """
    master = setting.master()
    layout = master.layout
    one, other = (Passes(setting.config, setting.workload, master, setting.runtime, SHARDS) for _ in range(2))
    known = {slot.name for slot in layout.stats}
    modules = [each.replicas[0].model.module for each in (one, other)]
    watching = FirstStep(modules[0], known)
    before = [_Held(module) for module in modules]

    first = [_pass(one, setting, states, shard, shard == 0) for shard in SHARDS]
    again = _pass(one, setting, states, 0, True)
    ahead = _pass(one, setting, states, 0, True, ahead=True)
    second = [_pass(other, setting, states, shard, shard == len(SHARDS) - 1) for shard in reversed(SHARDS)][::-1]

    found = [*watching.found(), *(breach for held in before[:1] for breach in held.changes())]
    found += _draws(first[0], second[0])
    for a, b in [*zip(first, second, strict=True), (first[0], again)]:
        if (differs := _difference(a, b, layout)) is not None:
            found.append(_depends(calls.first_unlike(a.calls, b.calls), differs, setting))
            break
    replica = one.replicas[0]
    if replica.shares_buffer and not found:
        found += _in_parts(one, setting, states, first, layout)
    if _difference(first[0], again, layout) is None and (differs := _difference(first[0], ahead, layout)):
        found.append(_of_feed(differs, setting))
    found += before[0].counters()
    return found


def _pass(
    passes: Passes, setting: Setting, states: GlobalStates, shard: int, anew: bool, ahead: bool = False
) -> ShardPass:
    """A pass over one shard; `anew`: a step begins; `ahead`: the run's last batch has been fed meanwhile."""
    device, replica, inputs = setting.runtime.device, passes.replicas[0], setting.inputs()
    if anew:
        passes.begin(1, 0, inputs)
    if ahead:
        setting.workload.feed(setting.config.epochs, setting.workload.steps() - 1, SHARDS)
    watch = Calls(replica.model.module, calls.exact, device)

    def work() -> Tensor:
        buffer = replica.take(())
        passes.one(replica, buffer, inputs, range(shard, shard + 1))
        made = buffer.tensor.clone()
        replica.give(buffer)
        return made

    states.restore(device)
    with passes.fixed_weights(), watch:
        try:
            buffer = setting.runtime.run([work])[0]
        except Exception as error:
            raise FailedPassError(watch, error, lambda: setting.runtime.run([work])) from error
    drew: dict[str, Sequence[str]] = dict(watch.drawing())
    if not drew and (moved := GlobalStates.now(device).moved(states)):
        drew["the loss"] = moved
    state = {name: sha({name: tensor}) for name, tensor in passes.states()[shard].items()}
    return ShardPass(buffer, state, watch.done, drew)


def _draws(one: ShardPass, other: ShardPass) -> list[Breach]:
    """What draws from global generators; in both passes, since another thread may draw at any time."""
    found = []
    for where in one.drew:
        if generators := sorted(set(one.drew[where]) & set(other.drew.get(where, ()))):
            module = module_in(where)
            whose = " and ".join(generators)
            what = f"{where} draws from {whose} global generator, whose numbers depend on who computes a shard"
            found.append(Breach("model", module, what, "nn.Dropout and StochasticDepth, which draw per shard"))
    return found


def _difference(one: ShardPass, other: ShardPass, layout: ParameterLayout) -> str | None:
    """What differs between two passes over the same shard, in words; None: nothing does."""
    if one.state != other.state:
        return "the recurrent state"
    return _unlike(one.buffer, other.buffer, layout)


def _unlike(one: Tensor, other: Tensor, layout: ParameterLayout) -> str | None:
    """The first part of two gradient buffers that differs; None: they have the same bits."""
    unlike = torch.ne(one.view(torch.int32), other.view(torch.int32))
    if not bool(unlike.any()):
        return None
    if bool(layout.scalars(unlike).any()):
        return "the loss"
    views = [(slot.name, slot.view(layout.gradient(unlike))) for slot in layout.params]
    return next((f"the gradient of {name}" for name, view in views if bool(view.any())), "a batch statistic")


def _depends(call: Call | None, differs: str, setting: Setting) -> Breach:
    """The breach of a result that is another one when other shards were computed before, or by another copy."""
    where = f"{call.name or 'the model'} ({call.kind})" if call else "the model"
    what = (
        f"{where} makes something else of the same samples after others ({differs} differs): it keeps something "
        "between calls, or draws from a generator of its own"
    )
    way = "a function of its inputs; what a sample hands to the next is the workload's recurrent state"
    return Breach("model", call.name if call else "", what, way)


def _of_feed(differs: str, setting: Setting) -> Breach:
    """The breach of a result that is another one when a later batch has been fed."""
    what = (
        f"feed changes what becomes of an earlier batch ({differs} differs); on a GPU it is called some steps ahead, "
        "and a captured step sees nothing that changes but what it gives"
    )
    way = "arrays of feed's own, by name, for all that changes from step to step"
    return Breach("workload", "", what, way, "exact" if setting.runtime.device.type == "cuda" else "note")


def _in_parts(
    passes: Passes, setting: Setting, states: GlobalStates, alone: Sequence[ShardPass], layout: ParameterLayout
) -> list[Breach]:
    """Whether two shards that share a gradient buffer come to the sum of both: a gradient that is added to the buffer
    in two parts does not."""
    replica, inputs = passes.replicas[0], setting.inputs()
    passes.begin(1, 0, inputs)

    def work() -> Tensor:
        buffer = replica.take(())
        for shard in SHARDS:
            passes.one(replica, buffer, inputs, range(shard, shard + 1))
        made = buffer.tensor.clone()
        replica.give(buffer)
        return made

    states.restore(setting.runtime.device)
    with passes.fixed_weights():
        together = setting.runtime.run([work])[0]
    differs = _unlike(together, alone[0].buffer + alone[1].buffer, layout)
    if differs is None:
        return []
    what = f"{differs} is added in several parts, between which another shard's comes"
    return [Breach("model", differs.removeprefix("the gradient of "), what, "backward passes that autograd adds up")]


class _Held:
    """What a module holds before passes, to compare with what it holds after them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.hashes = {name: sha({"": parameter}) for name, parameter in self.parameters.items()}
        self.numbers = self._numbers()

    def changes(self) -> list[Breach]:
        """Parameters that passes have changed, replaced or made."""
        found = []
        now = dict(self.module.named_parameters(remove_duplicate=False))
        for name in dict.fromkeys([*self.parameters, *now]):
            if name not in self.parameters:
                what = f"a pass makes the parameter {name}, which nobody trains"
                way = "parameters that are there from the start"
            elif now.get(name) is not self.parameters[name]:
                what = f"a pass replaces the parameter {name}, and what it puts there is not trained"
                way = "the same nn.Parameter throughout"
            elif sha({"": now[name]}) != self.hashes[name]:
                what = f"a pass changes the parameter {name}, which all replicas share"
                way = "a parametrization (torch.nn.utils.parametrize), which computes with another value"
            else:
                continue
            found.append(Breach("model", name, what, way, "always"))
        return found

    def counters(self) -> list[Breach]:
        """Numbers among the attributes of modules that passes have changed."""
        found = []
        for (module, key), value in self._numbers().items():
            before = self.numbers.get((module, key), value)
            if before != value:
                name = f"{module}.{key}".lstrip(".")
                what = f"passes change the attribute {name} ({before} -> {value}), which no checkpoint holds"
                found.append(Breach("model", name, what, "as long as no result depends on it", "note"))
        return found

    def _numbers(self) -> dict[tuple[str, str], Any]:
        return {
            (name, key): value
            for name, module in self.module.named_modules()
            for key, value in vars(module).items()
            if type(value) in (int, float, bool)
        }
