"""What can be seen of a model without a pass: wrappers, layers that are not ready, tensors of another kind than the
engine's flat buffers hold."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rayexp.engine.batch_norm import BATCH_NORMS
from rayexp.engine.checkpoint import sha
from rayexp.engine.contract.breach import Breach, named
from rayexp.engine.rng import unkeyed

# By the names of their classes, since some of them live in modules that take seconds to import.
WRAPPERS = {
    "OptimizedModule": ("is compiled, and kernels that are tuned in each process may round differently", "`compile`"),
    "DataParallel": ("cuts the batch once more", "`scaling.num_workers`"),
    "DistributedDataParallel": ("adds up gradients itself", "`scaling.num_workers`"),
    "FullyShardedDataParallel": ("adds up gradients itself", "`scaling.num_workers`"),
}


def inspect(model: nn.Module) -> tuple[list[Breach], bool]:
    """What no pass is needed for, and whether it prevents one."""
    lazy = list(_lazy(model))
    fatal = [*_wrappers(model), *lazy, *_layers(model)]
    if not lazy:
        fatal += [*_tensors(model), *_copies(model)]
    return [*fatal, *([] if lazy else _shared_memory(model)), *_batch_norms(model)], bool(fatal)


def unlike_builds(one: nn.Module, other: nn.Module) -> list[Breach]:
    """What two models that were built alike differ in."""
    first, second = one.state_dict(), other.state_dict()
    for name in dict.fromkeys([*first, *second]):
        if name not in first or name not in second or sha({"": first[name]}) != sha({"": second[name]}):
            what = f"built twice, it begins from another {name}; its initialisation draws from a generator that the "
            return [Breach("model", name, what + "seed does not set (numpy's, Python's)", "PyTorch's global generator")]
    return []


def _wrappers(model: nn.Module) -> Iterator[Breach]:
    for name, module in model.named_modules():
        if kinds := [kind.__name__ for kind in type(module).__mro__ if kind.__name__ in WRAPPERS]:
            why, key = WRAPPERS[kinds[0]]
            yield Breach(
                "model", name, f"{named(name, module)} {why}", f"the module in it, and the key {key}", "always"
            )


def _lazy(model: nn.Module) -> Iterator[Breach]:
    for name, module in model.named_modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(map(is_lazy, held)):
            what = f"{named(name, module)} does not know its size before it is called"
            yield Breach("model", name, what, "sizes that are given, or one call where the model is made", "always")


def _layers(model: nn.Module) -> Iterator[Breach]:
    for name, module in model.named_modules():
        if (found := unkeyed(module)) is not None:
            yield Breach("model", name, f"{named(name, module)} {found[0]}", found[1], "always")


def _tensors(model: nn.Module) -> Iterator[Breach]:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            way = "float32 (precision makes faster products of it)"
            if not parameter.requires_grad:
                way = "float32, or a buffer, which no training changes"
            yield Breach("model", name, f"the parameter {name} is {kind}", way, "always")


def _shared_memory(model: nn.Module) -> Iterator[Breach]:
    """Parameters that are two, and of one memory: each gets a place of its own, so they part with the first step."""
    spans = sorted(
        (parameter.data_ptr(), parameter.data_ptr() + _extent(parameter), name)
        for name, parameter in model.named_parameters()
        if parameter.numel() and parameter.device.type != "meta"
    )
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            what = f"the parameters {one} and {other} share memory, and would be trained apart"
            yield Breach("model", other, what, "one nn.Parameter under both names", "always")


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _batch_norms(model: nn.Module) -> Iterator[Breach]:
    # In training mode, since that is how replicas run; a model may keep layers out of it.
    was = {name: module.training for name, module in model.named_modules()}
    model.train()
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    for name, norm in norms:
        which = f"the batch norm {named(name, norm)}"
        if isinstance(norm, nn.SyncBatchNorm):
            what = f"{which} normalises over all workers, which have other shards with another number of them"
            yield Breach("model", name, what, "nn.BatchNorm1d, 2d or 3d, which normalises each shard")
        if not norm.training and norm.running_mean is not None:
            what = f"{which} stays in eval mode while training, and its running statistics belong to the shard then"
            yield Breach(
                "model", name, what, "a layer without statistics (torchvision.ops.FrozenBatchNorm2d)", "always"
            )
        for kind in ("running_mean", "running_var"):
            tensor = getattr(norm, kind)
            if tensor is not None and tensor.dtype != torch.float32:
                what = f"{which} has a {kind} of {str(tensor.dtype).removeprefix('torch.')}"
                yield Breach("model", name, what, "float32", "always")
                break
    for name, module in model.named_modules():
        module.training = was[name]


def _copies(model: nn.Module) -> Iterator[Breach]:
    """Every replica is a copy."""
    try:
        copy.deepcopy(model)
    except Exception as error:
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if not key.startswith("_") and not isinstance(value, nn.Module) and _fails(value):
                    what = f"{named(name, module)} cannot be copied, because of its attribute {key} ({error})"
                    yield Breach("model", name, what, "attributes that copy.deepcopy takes", "always")
                    return
        what = f"it cannot be copied ({type(error).__name__}: {' '.join(str(error).split())})"
        yield Breach("model", "", what, "what copy.deepcopy takes", "always")


def _fails(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return True
    return False
