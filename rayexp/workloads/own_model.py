"""A model of the user's own, named by reference or offered by an installed package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rayexp.config import ExperimentConfig
from rayexp.config.components import GROUPS, entry_points, is_reference, parts_of
from rayexp.config.references import arguments, call, load_component
from rayexp.errors import UserError


def is_own(key: str, name: str, shipped: Callable[[], Sequence[str]]) -> bool:
    """Whether a name is none of those that come with rayexp (which may cost time to list)."""
    return is_reference(name) or (name in entry_points(GROUPS[key]) and name not in shipped())


@dataclass(frozen=True, slots=True)
class OwnModel:
    """A class or a function that makes a model from options.

    Attributes:
        name: as it stands in the configuration.
        component: the class or function.
        options: the keys beside `model.name`.
        code: the configuration's `code`.
        channels_last: its attribute of that name: whether weights and images are laid out so. False: as PyTorch does.
    """

    name: str
    component: Any
    options: Mapping[str, Any]
    code: tuple[str, ...] | None

    @classmethod
    def open(cls, config: ExperimentConfig, offered: Sequence[str]) -> OwnModel:
        """The model that `model.name` names, with its options checked.

        Args:
            offered: what it may ask for by name beside them.

        Raises:
            UserError: it cannot be imported, or an option is unknown, missing or not allowed.
        """
        name = config.model.name
        component = load_component("model.name", name, config.code)
        own = cls(name, component, config.model.options, config.code)
        arguments("model", name, component, own.options, dict.fromkeys(offered), offered[:1])
        return own

    @property
    def channels_last(self) -> bool:
        """See the class."""
        return bool(getattr(self.component, "channels_last", False))

    def build(self, **offered: Any) -> nn.Module:
        """A new model.

        Args:
            offered: what it may ask for by name; a function with `**kwargs` is given the first.

        Raises:
            UserError: it fails, or makes something else than a model.
        """
        given = self._given(offered)
        model = call("model.name", self.name, self.component, given, self.code)
        if not isinstance(model, nn.Module):
            raise UserError(f"model.name: {self.name} makes a {type(model).__name__}; expected a torch.nn.Module")
        return model

    def lines(self, **offered: Any) -> list[str]:
        """Lines of Python that build the same model where its code lies (the run keeps a copy of that)."""
        where, inner = parts_of(self.name if is_reference(self.name) else entry_points(GROUPS["model.name"])[self.name])
        module = where.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        given = ", ".join(f"{key}={value!r}" for key, value in self._given(offered).items())
        first = inner.partition(".")[0]
        return [f"from {module} import {first}", f"model = {inner}({given})"]

    def _given(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        return arguments("model", self.name, self.component, self.options, offered, list(offered)[:1])
