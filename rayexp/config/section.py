"""What the parts of a configuration have in common: they are frozen, and refuse keys and values that nobody reads."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from rayexp.config.fields import alternatives


class Section(BaseModel):
    """A part of a configuration; it is frozen and refuses unknown keys. The text under a field is its description
    (`model_fields[...].description`), from which docs/configuration.md is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers; pydantic would read true as 1."""
        field = cls.model_fields[info.field_name].annotation if info.field_name else Any
        if isinstance(value, bool) and not {bool, Any} & set(alternatives(field)):
            raise ValueError("true and false are not allowed here")
        return value


class OpenSection(Section):
    """A section whose further keys are the options of a component (see components.py). Whoever opens the component
    checks them; ExperimentConfig refuses them where it takes none."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})
