"""Print constraints.txt for an environment that is used as it is: nothing that it has is pinned to another version.

    python constraints.py > constraints-here.txt

A torch and a torchvision that are there are pinned to their own versions, so that pip takes what fits them; the pins of
what belongs to another build of torch are left out. `make install TORCH=system` and the Dockerfile use it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

OLDEST_TORCH = (2, 11)  # as pyproject.toml says
PARTS_OF_TORCH = re.compile(r"torch(vision)?|triton|nvidia-.*|cuda-.*")


def normal(name: str) -> str:
    """The name of a distribution as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def kept(pins: list[str], installed: Mapping[str, str]) -> list[str]:
    """The pins (`name==version`) that change nothing of what is installed (normal name -> version)."""
    has_torch = "torch" in installed
    own = [f"{name}=={installed[name]}" for name in ("torch", "torchvision") if name in installed]
    for pin in pins:
        name = normal(pin.partition("==")[0])
        if name not in installed and not (has_torch and PARTS_OF_TORCH.fullmatch(name)):
            own.append(pin)
    return own


def main() -> None:
    """Print the pins for the environment of this Python."""
    found: dict[str, str] = {}
    for one in metadata.distributions():
        found.setdefault(normal(one.metadata["Name"] or ""), one.version)  # the first on the path is the one imported
    torch = found.get("torch")
    if torch is None:
        raise SystemExit("constraints.py: there is no torch in this environment: leave TORCH=system out")
    if tuple(map(int, re.findall(r"\d+", torch)[:2])) < OLDEST_TORCH:
        raise SystemExit(f"constraints.py: torch {torch} is too old; rayexp needs {'.'.join(map(str, OLDEST_TORCH))}")
    print("\n".join(kept((Path(__file__).parent / "constraints.txt").read_text().split(), found)))


if __name__ == "__main__":
    main()
