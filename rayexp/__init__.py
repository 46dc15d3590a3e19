"""rayexp: distributed training experiments on Ray, with the same bits at any number of workers.

The library is the command line's equal: `rayexp.train("quickstart")` makes the run that `rayexp train quickstart`
makes. Importing it is instant; PyTorch is imported by the first call that needs it. See docs/library.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

import rayexp.diff as _package

if TYPE_CHECKING:
    from rayexp.config import ExperimentConfig as ExperimentConfig
    from rayexp.engine.workload import Workload as Workload
    from rayexp.errors import RunError as RunError
    from rayexp.errors import Stopped as Stopped
    from rayexp.errors import UserError as UserError
    from rayexp.library.checkpoints import evaluate as evaluate
    from rayexp.library.checkpoints import export as export
    from rayexp.library.checkpoints import generate as generate
    from rayexp.library.checkpoints import load_model as load_model
    from rayexp.library.checkpoints import predict as predict
    from rayexp.library.configs import load_config as load_config
    from rayexp.library.differences import diff as diff
    from rayexp.library.experiments import compare as compare
    from rayexp.library.experiments import train as train
    from rayexp.library.experiments import verify as verify
    from rayexp.runs.records import EpochRecord as EpochRecord
    from rayexp.runs.run import Run as Run

__version__ = "0.1.0"

_PLACES = {
    "EpochRecord": "runs.records",
    "ExperimentConfig": "config",
    "Run": "runs.run",
    "RunError": "errors",
    "Stopped": "errors",
    "UserError": "errors",
    "Workload": "engine.workload",
    "compare": "library.experiments",
    "diff": "library.differences",
    "evaluate": "library.checkpoints",
    "export": "library.checkpoints",
    "generate": "library.checkpoints",
    "load_config": "library.configs",
    "load_model": "library.checkpoints",
    "predict": "library.checkpoints",
    "train": "library.experiments",
    "verify": "library.experiments",
}

__all__ = [
    "EpochRecord",
    "ExperimentConfig",
    "Run",
    "RunError",
    "Stopped",
    "UserError",
    "Workload",
    "__version__",
    "compare",
    "diff",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "load_model",
    "predict",
    "train",
    "verify",
]

# The package rayexp.diff is loaded before its name is given to the function: an import binds it only the first time.
# `from rayexp.diff import churn` finds its modules; `import rayexp.diff.churn as churn` asks the function, and fails.
del _package
globals().pop("diff", None)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
