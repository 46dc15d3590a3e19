"""Write docs/configuration.md from the configuration's own classes.

    python docs/configuration.py            # writes the page
    python docs/configuration.py --check    # exits with 1 where the page is not what the classes say

Names, types, defaults and limits come from the JSON schema of the pydantic models, meanings from the docstrings of
their fields. tests/config/test_page.py runs the check.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rayexp.config import IMAGE_DATA, TEXT_DATA, CompareConfig, ExperimentConfig
from rayexp.config.components import OPTIMIZERS, SCHEDULES, WORKLOADS
from rayexp.workloads.image_classification.workload import Options as ImageOptions
from rayexp.workloads.language_model.model import MODELS
from rayexp.workloads.language_model.recurrent import RecurrentOptions
from rayexp.workloads.language_model.transformer import TransformerOptions

PAGE = Path(__file__).with_suffix(".md")
LIMITS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
OWN = ", or [your own](your-own-model.md)"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) + OWN


# Checked by a validator, so the schema does not name them.
ALLOWED = {
    "workload": _names(WORKLOADS),
    "data.name": _names((*IMAGE_DATA, *TEXT_DATA)),
    "model.name": "a classifier of torchvision's, " + _names(MODELS),
    "optimizer.name": _names(OPTIMIZERS),
    "schedule.name": _names(SCHEDULES),
}
HEAD = """\
# Configuration

<!-- Written by docs/configuration.py; change the docstrings in rayexp/config/ and run it again. -->

A configuration is a YAML file. `KEY=VALUE` on the command line sets a dotted key on top of it
(`epochs=2 data.max_train_samples=4096 'scaling.num_workers=[1,8]'`), and `--dry-run` shows the result. Every key of
an experiment has a default. An unknown key is refused with the nearest right one; a setting that the run does not use
is warned of. `rayexp train runs/RUN/config.yaml` repeats a run.
"""
EXPERIMENT = """
## An experiment

For `rayexp train`, `verify`, `summary` and `submit`; see [configs/quickstart.yaml](../configs/quickstart.yaml).
"""
MODEL = """
### The options of a model

They stand under `model`, beside `name`, and are checked by the workload.
"""
COMPARE = """
## A device grid

For `rayexp compare`; see [configs/devices.yaml](../configs/devices.yaml).
"""


def kind_of(schema: dict[str, Any], defs: dict[str, Any]) -> tuple[str, list[str]]:
    """The type of a value in words, and the limits to it."""
    if "$ref" in schema:
        target = defs[schema["$ref"].rpartition("/")[2]]
        return ("keys", []) if "properties" in target else kind_of(target, defs)
    if "anyOf" in schema:
        parts = [kind_of(part, defs) for part in schema["anyOf"]]
        limits = dict.fromkeys(", ".join(found) for _, found in parts if found)
        return " or ".join(kind for kind, _ in parts), [" or ".join(limits)] if limits else []
    if "const" in schema or "enum" in schema:
        names = [schema["const"]] if "const" in schema else schema["enum"]
        return "text", [", ".join(f"`{name}`" for name in names)]
    limits = [text.format(_number(schema[key])) for key, text in LIMITS.items() if key in schema]
    if "pattern" in schema:
        limits.append(f"`{schema['pattern']}`")
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            kinds, found = zip(*(kind_of(part, defs) for part in schema["prefixItems"]), strict=True)
            each = dict.fromkeys(limit for part in found for limit in part)
            return f"[{', '.join(kinds)}]", [*limits, *([f"each {', '.join(each)}"] if each else [])]
        kind, found = kind_of(schema["items"], defs)
        return f"list of {kind}", [*limits, *found, *(["not empty"] if schema.get("minItems") else [])]
    if schema.get("type") == "object":
        names = kind_of(schema["propertyNames"], defs)[1] if "propertyNames" in schema else []
        values = schema.get("additionalProperties")
        kind, found = kind_of(values, defs) if isinstance(values, dict) else ("value", [])
        return f"names to {kind}", [*names, *found]
    return TYPES.get(schema.get("type", ""), "value"), limits


def _number(value: float) -> str:
    return "2⁶³" if value == 2**63 else f"{value:g}"


def _default(value: Any) -> str:
    if isinstance(value, float) and value == 4 / 3:
        return "4/3"
    if isinstance(value, list):
        return f"[{', '.join(map(_default, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def rows(schema: dict[str, Any], defs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str, str, str]]:
    """Key, type, default, allowed and meaning of every value, sections in place."""
    for name, field in schema["properties"].items():
        key = prefix + name
        kind, limits = kind_of(field, defs)
        allowed = ALLOWED.get(key) or ", ".join(limits)
        section = _section(field, defs)
        meaning = " ".join((field.get("description") or (section or {}).get("description") or "").split())
        if section is None:
            default = f"`{_default(field['default'])}`" if "default" in field else "required"
            yield f"`{key}`", kind, default, allowed, meaning
        else:
            yield f"**`{key}`**", kind, "", "", meaning
            yield from rows(section, defs, f"{key}.")


def _section(field: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of the keys under a field; None where it is a single value."""
    for part in (field, *field.get("anyOf", ())):
        found = defs.get(part.get("$ref", "").rpartition("/")[2], {})
        if "properties" in found:
            return found
    return None


def table(kind: type[BaseModel]) -> str:
    """All keys of a model as a Markdown table."""
    schema = kind.model_json_schema()
    lines = ["", "| key | type | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    for row in rows(schema, schema.get("$defs", {})):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    recurrent = ", ".join(f"`{name}`" for name in MODELS if name != "transformer")
    models = {
        "Image classification (`workload: image_classification`)": ImageOptions,
        f"{recurrent} (`workload: language_model`)": RecurrentOptions,
        "`transformer` (`workload: language_model`)": TransformerOptions,
    }
    options = "".join(f"\n{title}:\n{table(kind)}" for title, kind in models.items())
    return HEAD + EXPERIMENT + table(ExperimentConfig) + MODEL + options + COMPARE + table(CompareConfig)


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is not current")
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") != page():
            raise SystemExit(f"{PAGE} is not what the configuration's classes say; run python docs/configuration.py")
        return
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
