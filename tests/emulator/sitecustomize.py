"""Every process that imports PyTorch on the emulated device gets its operations; Python runs this file at its start."""

import importlib.util
import sys
from typing import Any


class AfterTorch:
    """Finds nothing: it waits for `import torch`."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_install(module: Any) -> None:
            load(module)
            import plugin

            plugin.install()

        spec.loader.exec_module = load_and_install  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AfterTorch())
