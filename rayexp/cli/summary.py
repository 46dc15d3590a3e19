"""`rayexp summary`."""

from __future__ import annotations

from typing import Annotated

import typer

from rayexp.cli._app import ConfigArgument, JsonOption, OverridesArgument, app
from rayexp.cli._output import print_json, print_table, tell


@app.command(short_help="Show a model layer by layer: sizes, parameters, FLOPs.")
def summary(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    depth: Annotated[int, typer.Option(metavar="N", min=0, help="Levels of nested modules; 0: all.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """The model layer by layer: output size, parameters, and FLOPs of a forward pass for one sample.

    Sizes of maps read height x width x channels. A multiply-add counts as two FLOPs.
    """
    import dataclasses

    from rayexp.config import load

    experiment = load(config, overrides or [])

    from rayexp import workloads
    from rayexp.engine.summary import layers

    workload = workloads.open_workload(experiment)
    *inner, whole = layers(workload)
    if as_json:
        print_json({"layers": [dataclasses.asdict(layer) for layer in inner], "total": dataclasses.asdict(whole)})
        return
    example = workload.example()[0]
    tell(f"{experiment.model.name}, input {_input(tuple(example.shape), workload.batch_dim)}")
    print_table(
        [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "output": layer.output,
                "parameters": f"{layer.parameters:,}" if layer.parameters else "",
                "FLOPs": f"{layer.flops:,}" if layer.flops else "",
            }
            for layer in inner
            if not depth or layer.depth <= depth
        ]
    )
    tell(
        f"{whole.parameters:,} parameters ({4 * whole.parameters / 1e6:.1f} MB), {whole.flops / 1e9:.3f} GFLOP "
        f"forward, about {3 * whole.flops / 1e9:.3f} with backward"
    )


def _input(shape: tuple[int, ...], batch_dim: int) -> str:
    sizes = [n for i, n in enumerate(shape) if i != batch_dim]
    return "x".join(map(str, [*sizes[1:], sizes[0]] if len(sizes) == 3 else sizes))
