"""What a dataset of the user's own is made of: its code, its options and the files below `root`. Their hash names what
is packed of it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayexp.config import DataConfig
from rayexp.config.references import arguments, call, load_component, source_of, source_sha, travelling, use
from rayexp.data.fetch import list_folder
from rayexp.errors import UserError

VERSION = 1  # of what is made of a dataset; part of the key
KEYS = ("root", "image_size")  # of `data`, which a dataset may ask for by name


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes the dataset.

    Attributes:
        name: as it stands in the configuration.
        config: the section `data`.
        code: the configuration's `code`.
    """

    name: str
    config: DataConfig
    code: tuple[str, ...] | None

    @classmethod
    def of(cls, config: DataConfig, code: Sequence[str] | None) -> Recipe:
        """The recipe of a configuration's dataset."""
        root = None if config.root is None else config.root.expanduser().absolute()
        return cls(config.name, config.model_copy(update={"root": root}), None if code is None else tuple(code))

    def component(self) -> Any:
        """The class or function."""
        return load_component("data.name", self.name, self.code)

    def make(self, split: str) -> Any:
        """The dataset of a split (UserError where it cannot be made)."""
        component = self.component()
        offered = {key: getattr(self.config, key) for key in KEYS} | {"split": split}
        given = arguments("data", self.name, component, self.config.options, offered, ("split",))
        if "split" not in given:
            raise UserError(f"data.name: {self.name} takes no `split`; it is called with split='train' and split='val'")
        if "root" in given and given["root"] is None:
            if inspect.signature(component).parameters["root"].default is inspect.Parameter.empty:
                raise UserError(f"data.root: {self.name} asks for a folder (data.root=DIR)")
            del given["root"]  # its own default
        return call("data.name", self.name, component, given, self.code)

    def ingredients(self, size: int | None) -> dict[str, Any]:
        """All that what is packed depends on and where it lies, as plain values, from which `key` follows.

        Args:
            size: of packed images, in pixels; None: text is packed.
        """
        return {
            "name": self.name,
            "source": source_of(self.component()),
            "code": None if self.code is None else list(self.code),
            "options": self.config.options,
            "size": size,
            "root": None if self.config.root is None else str(self.config.root),
        }

    def to_json(self) -> str:
        """For the pool's processes, which import the copy of the code: it may have come from another host."""
        copy = use(self.code)
        code = None if copy is None else [str(copy)]
        return json.dumps({"name": self.name, "config": self.config.model_dump(mode="json"), "code": code})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        code = fields["code"] and tuple(fields["code"])
        return cls(fields["name"], DataConfig.model_validate(fields["config"]), code)


def key(ingredients: Mapping[str, Any]) -> str:
    """sha256 of all that what is packed depends on, as it is now, without the pixels; nothing is imported.

    Raises:
        UserError: the code is not there any more, or a folder below `root` cannot be read.
    """
    root = ingredients["root"]
    files = list_folder(Path(root)) if root is not None and Path(root).is_dir() else {}
    source = source_sha(ingredients["source"], travelling(ingredients["code"]))
    parts = [VERSION, ingredients["name"], source, ingredients["options"], ingredients["size"]]
    parts += [str(root), sorted(files.items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def folder_name(ingredients: Mapping[str, Any], key: str) -> str:
    """The name of the folder in the cache that holds what is packed."""
    return f"{''.join(c if c.isalnum() or c in '_-' else '-' for c in ingredients['name'])[:40]}-{key[:16]}"


def state(ingredients: Mapping[str, Any], folder: str) -> tuple[bool, str]:
    """Whether what is packed in a folder of this name is no longer what these ingredients make, and why."""
    name, root = ingredients["name"], ingredients["root"]
    if root is not None and not Path(root).exists():
        return True, f"{root} is gone"
    try:
        now = folder_name(ingredients, key(ingredients))
    except UserError as error:
        return True, f"{name}: its code or data is no longer there ({error})"
    where = ", ".join(ingredients["code"] or ()) or ingredients["source"]
    return (False, f"for {name} of {where}") if now == folder else (True, f"{name} of {where} has changed since")
