"""Tiny shards alone and together, through plain copies of a model: a sum over shards must be the sum of all samples,
and a copy must compute what the original computes.

Batch norms normalise each shard by itself here, as `ddp` has it, and shards together drop nothing. Where a model allows
it they are computed in float64, so that what is left of a difference is no rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayexp.engine.average_pooling import add_in_order
from rayexp.engine.batch_norm import BATCH_NORMS, per_shard
from rayexp.engine.contract import calls
from rayexp.engine.contract.breach import Breach, named
from rayexp.engine.contract.calls import Calls
from rayexp.engine.contract.draws import GlobalStates
from rayexp.engine.contract.passes import FailedPassError
from rayexp.engine.contract.setting import SHARDS, Setting
from rayexp.engine.rng import Draws, Dropout, StochasticDepth, adopt, seeded
from rayexp.engine.workload import Batch

TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-2}
"""Relative difference of a parameter's gradient that is more than rounding, by what is computed in. What the size of a
batch enters is tens of per cent."""
NOISE = 0.02
"""Standard deviation of what is added to every weight: one that begins at zero would hide what comes before it."""
COPIED = "no lambda or hook that refers to the module: they are not copied with it"


@dataclass(frozen=True)
class PlainPass:
    """What a pass over some shards has come to.

    Attributes:
        loss: the sum over the samples.
        gradients: by parameter name; None where the parameter was not used.
        watch: the modules' calls, and what the model returned.
    """

    loss: float
    gradients: Mapping[str, Tensor | None]
    watch: Calls


class _Plain:
    """A model, prepared for passes of its own."""

    def __init__(self, setting: Setting, model: nn.Module) -> None:
        self.setting, self.device = setting, setting.runtime.device
        self.model, self.draws = model.to(self.device).train(), Draws()
        adopt(model, self.draws, setting.workload.batch_dim)
        per_shard(model, self.draws)
        if self.device.type == "cuda" and setting.config.reduction == "exact":
            add_in_order(model)  # as a Replica does
        self.keyed: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, BATCH_NORMS):
                module.momentum, module.num_batches_tracked = 1.0, None
            if isinstance(module, Dropout | StochasticDepth) and module.p > 0:
                self.keyed.append(name)
        self.type = torch.float32

    def drop_nothing(self) -> _Plain:
        """Without dropout, whose masks need not be those of samples along the first dimension; returns itself."""
        for name in self.keyed:
            self.model.get_submodule(name).p = 0.0  # type: ignore[assignment]
        return self

    def double(self, noise: bool) -> None:
        """Compute in float64, with weights that are moved a little."""
        self.type = torch.float64
        self.model.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(drawn.to(parameter.device), alpha=NOISE if noise else 0.0)

    def go(self, shards: range, digest: calls.Digest, states: GlobalStates) -> PlainPass:
        """A pass over consecutive shards of the first batch."""
        workload = self.setting.workload
        batch = workload.batch(1, 0, shards, self.device)
        self.draws.begin(seeded(shards, self.device), batch.sizes)
        state = {name: self._cast(t) for name, t in workload.initial_state(sum(batch.sizes), self.device).items()}
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        watch = Calls(self.model, digest, self.device)

        def work() -> PlainPass:
            loss, _ = workload.loss(self.model, self._casting(batch), state)
            watch.backward = True
            total = float(loss.detach())
            if not loss.requires_grad or not trained:
                return PlainPass(total, dict.fromkeys(trained), watch)
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            return PlainPass(total, dict(zip(trained, found, strict=True)), watch)

        states.restore(self.device)
        with watch:
            try:
                return self.setting.runtime.run([work])[0]
            except Exception as error:
                raise FailedPassError(watch, error, lambda: self.setting.runtime.run([work])) from error

    def _casting(self, batch: Batch) -> Batch:
        inputs = tuple(self._cast(each) for each in batch.inputs)
        return dataclasses.replace(batch, inputs=inputs, targets=self._cast(batch.targets))

    def _cast(self, value: Any) -> Any:
        return value.to(self.type) if isinstance(value, Tensor) and value.is_floating_point() else value


# ---------------------------------------------------------------------- a copy and the original


def copied(setting: Setting, states: GlobalStates) -> tuple[list[Breach], bool]:
    """What a copy computes otherwise than the original, what the model returns, and which parameters it does not use;
    and whether further passes make sense.

    Raises:
        FailedPassError: a pass has failed.
    """
    original = setting.model()
    replica = copy.deepcopy(original)
    plain, source = _Plain(setting, replica), _Plain(setting, original)
    try:
        found = plain.go(SHARDS[:1], calls.exact, states)
    except FailedPassError as failed:
        if failed.watch.ended and (wrong := _output(failed.watch.output, setting)):
            return [wrong], False
        raise
    if wrong := _output(found.watch.output, setting):
        return [wrong], False
    first = source.go(SHARDS[:1], calls.exact, states)
    if all(gradient is None for gradient in found.gradients.values()):
        what, way = "no gradient reaches any parameter", "a loss that follows from them"
        if any(gradient is not None for gradient in first.gradients.values()):
            what = "a copy uses none of its parameters, since something in it holds the original's"
            way = COPIED
        return [Breach("model", "", what, way, "always")], False
    if sparse := [name for name, each in found.gradients.items() if each is not None and each.layout != torch.strided]:
        what, way = "the gradient of {} is sparse, and gradients are added up in one buffer", "sparse=False there"
        return [Breach("model", name, what.format(name), way, "always") for name in sparse], False
    breaches = list(_rerun(found.watch, plain.keyed, replica))
    for name, gradient in found.gradients.items():
        expected = first.gradients[name]
        if gradient is None and expected is not None:
            what = f"a copy does not use its parameter {name}, since something in it holds the original's"
            breaches.append(Breach("model", name, what, COPIED, "always"))
        elif gradient is None:
            what = f"the parameter {name} gets no gradient: it stays what it is, but for weight decay"
            breaches.append(Breach("model", name, what, "requires_grad False, where nothing should change it", "note"))
        elif expected is None or calls.exact(gradient) != calls.exact(expected):
            what = f"a copy computes another gradient of {name}: hooks of parameters are not copied"
            breaches.append(Breach("model", name, what, "hooks of modules, or the same in the forward pass", "always"))
    return breaches, True


def _output(output: Any, setting: Setting) -> Breach | None:
    """What is wrong with what a model returns of images; None: nothing, or the workload alone knows."""
    classes = setting.workload.describe().get("classes")
    if classes is None:
        return None
    size = sum(setting.workload.sizes(0, SHARDS[:1]))
    if isinstance(output, Tensor) and output.is_floating_point() and output.shape == (size, len(classes)):
        return None
    what = f"it returns {_described(output)} of {size} images and {len(classes)} classes"
    return Breach("model", "", what, f"float32 [{size}, {len(classes)}], a number for each class", "always")


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"{str(output.dtype).removeprefix('torch.')} {list(output.shape)}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def _rerun(watch: Calls, keyed: list[str], model: nn.Module) -> Iterator[Breach]:
    modules = dict(model.named_modules())
    for name in dict.fromkeys(name for name in watch.again if name in keyed):
        what = (
            f"{named(name, modules[name])} runs again in the backward pass (activation checkpointing), with other draws"
        )
        yield Breach("model", name, what, "checkpointing of parts without random layers", "always")


# ---------------------------------------------------------------------- alone and together


def alone_and_together(setting: Setting, states: GlobalStates) -> list[Breach]:
    """What two shards together come to, and not each by itself.

    Raises:
        FailedPassError: a pass has failed.
    """
    plain = _Plain(setting, setting.model()).drop_nothing()
    exact = copy.deepcopy(plain.model.state_dict())
    for noise in (True, False):
        plain.model.double().load_state_dict(exact)
        plain.double(noise)
        try:
            passes = _passes(plain, states)
        except FailedPassError:
            break  # something in it takes float32 only
        if all(torch.isfinite(torch.tensor(one.loss)) for one in passes):
            return _mixing(passes, TOLERANCE[torch.float64])
    single = _Plain(setting, setting.model()).drop_nothing()
    return _mixing(_passes(single, states), TOLERANCE[torch.float32])


def _passes(plain: _Plain, states: GlobalStates) -> list[PlainPass]:
    return [plain.go(shards, calls.sums, states) for shards in (SHARDS[:1], SHARDS[1:], SHARDS)]


def _mixing(passes: list[PlainPass], tolerance: float) -> list[Breach]:
    one, other, both = passes
    total = sum(float(g.norm()) ** 2 for g in both.gradients.values() if g is not None) ** 0.5
    unlike = abs(both.loss - one.loss - other.loss) > tolerance * (abs(one.loss) + abs(other.loss))
    for name, gradient in both.gradients.items():
        parts = [each.gradients[name] for each in (one, other)]
        if gradient is None or any(part is None for part in parts):
            continue
        difference = float((gradient - sum(parts)).norm())  # type: ignore[arg-type]
        unlike = unlike or difference > tolerance * (float(gradient.norm()) + 0.01 * total)
    if not unlike:
        return []
    alone = [one.watch.done, other.watch.done]
    if (call := calls.first_mixing(alone, both.watch.done, 1e-6 if tolerance < 1e-3 else 1e-3)) is not None:
        where = f"{call.name or 'the model'} ({call.kind})"
        what = f"what {where} makes of a sample depends on the others in its batch, or on their number"
        return [Breach("model", call.name, what, "nn.BatchNorm, which sees one shard; LayerNorm, GroupNorm")]
    if one.watch.done and _ends_alike(one, other, both):
        what = "its loss of a batch is not the sum of the samples' losses (their mean?)"
        return [Breach("workload", "", what, "a sum over samples, without weights that depend on the batch")]
    what = "what it makes of a sample depends on the others in its batch, or on their number"
    return [Breach("model", "", what, "nn.BatchNorm, which sees one shard; LayerNorm, GroupNorm")]


def _ends_alike(one: PlainPass, other: PlainPass, both: PlainPass) -> bool:
    """Whether the models' outputs, at least, are those of each shard."""
    last = [each.watch.done[-1] for each in (one, other, both)]
    return all(call.name == "" for call in last) and calls.first_mixing([[last[0]], [last[1]]], [last[2]], 1e-4) is None
