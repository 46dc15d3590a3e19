"""`rayexp check`."""

from __future__ import annotations

import typer

from rayexp.cli._app import ConfigArgument, JsonOption, OverridesArgument, app
from rayexp.cli._output import print_json, say, tell
from rayexp.display import counted


@app.command(short_help="Try your own model for what training cannot keep.")
def check(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Try a configuration's model on a few samples of its data, and name everything that training could not keep.

    Takes seconds, needs no Ray, trains and writes nothing. Two tiny shards go through copies of the model in both
    orders, alone and together, and validation samples likewise. Exits with 0 where the configuration can be trained,
    and with 1 where something is refused; a model of your own is also checked before its first step.
    """
    from rayexp.config import load

    experiment = load(config, overrides or [])

    from rayexp.launch.check import check as examine

    contract = examine(experiment)
    if as_json:
        print_json(contract.to_json())
        raise typer.Exit(1 if contract.refused else 0)
    for breach in contract.refused:
        tell(str(breach))
    for breach in contract.warnings:
        say(f"warning: {breach}")
    tried = ", ".join(contract.checked)
    if contract.refused:
        tell(
            f"REFUSED with reduction {contract.reduction}: {counted(len(contract.refused), 'breach')} (tried: {tried})"
        )
    else:
        tell(f"kept: {experiment.subject} can be trained with reduction {contract.reduction} (tried: {tried})")
    raise typer.Exit(1 if contract.refused else 0)
