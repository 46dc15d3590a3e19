"""`rayexp summary`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rayexp.cli._app import ConfigArgument, JsonOption, OverridesArgument, app
from rayexp.cli._output import print_json, print_table, say, tell

if TYPE_CHECKING:
    from rayexp.config import ExperimentConfig
    from rayexp.engine.workload import Workload


@app.command(short_help="Show a model layer by layer: sizes, parameters, FLOPs.")
def summary(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    depth: Annotated[int, typer.Option(metavar="N", min=0, help="Levels of nested modules; 0: all.")] = 2,
    classes: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="How many classes (text: words); the data is then not opened."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The model layer by layer: output size, parameters, and FLOPs of a forward pass for one sample.

    Sizes of maps read height x width x channels. A multiply-add counts as two FLOPs. The data need not be there:
    published datasets have a known number of classes or words, and --classes gives that of your own.
    """
    import dataclasses

    from rayexp.config import load

    experiment = load(config, overrides or [])

    from rayexp.engine.summary import layers

    workload = _open(experiment, classes)
    *inner, whole = layers(workload, experiment.model)
    if as_json:
        print_json({"layers": [dataclasses.asdict(layer) for layer in inner], "total": dataclasses.asdict(whole)})
        return
    example = workload.example()[0]
    tell(f"{experiment.subject}, input {_input(tuple(example.shape), workload.batch_dim)}")
    print_table(
        [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "output": layer.output,
                "parameters": f"{layer.parameters:,}" if layer.parameters else "",
                **({"frozen": f"{layer.frozen:,}" if layer.frozen else ""} if whole.frozen else {}),
                "FLOPs": f"{layer.flops:,}" if layer.flops else "",
            }
            for layer in inner
            if not depth or layer.depth <= depth
        ]
    )
    frozen = f", {whole.frozen:,} of them frozen" if whole.frozen else ""
    tell(
        f"{whole.parameters:,} parameters ({4 * whole.parameters / 1e6:.1f} MB){frozen}, {whole.flops / 1e9:.3f} GFLOP "
        f"forward, about {3 * whole.flops / 1e9:.3f} with backward"
    )


def _open(config: ExperimentConfig, classes: int | None) -> Workload:
    """The workload, with its data only where that is needed to know the number of classes or words."""
    from rayexp import workloads
    from rayexp.config import IMAGE_DATA
    from rayexp.config.components import WORKLOADS
    from rayexp.data.outline import OUTPUTS, outline
    from rayexp.errors import UserError

    root, name = config.data.root, config.data.name
    if (
        classes is None
        and name in OUTPUTS
        and config.workload in WORKLOADS
        and not (root and root.expanduser().exists())
    ):
        classes = OUTPUTS[name]
        if root:
            say(f"{root} is not there: {classes:,} {'classes' if name in IMAGE_DATA else 'words'}, as {name} has")
    if classes is not None:
        return workloads.open_workload(config, outline(config, classes))
    try:
        return workloads.open_workload(config)
    except UserError as error:
        if root and not root.expanduser().exists():
            raise UserError(error, "; --classes N shows the model without the data") from error
        raise


def _input(shape: tuple[int, ...], batch_dim: int) -> str:
    sizes = [n for i, n in enumerate(shape) if i != batch_dim]
    return "x".join(map(str, [*sizes[1:], sizes[0]] if len(sizes) == 3 else sizes))
