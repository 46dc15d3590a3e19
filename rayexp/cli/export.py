"""`rayexp export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayexp.cli import _complete
from rayexp.cli._app import RUNS, JsonOption, RunsOption, app
from rayexp.cli._output import print_json, say, tell


@app.command(short_help="Write a checkpoint's model to a file that needs no rayexp.")
def export(
    ref: Annotated[
        str,
        typer.Argument(metavar="RUN@EPOCH", autocompletion=_complete.runs, help="RUN@7, RUN@best, RUN@last."),
    ],
    to: Annotated[Path, typer.Option(metavar="FILE", help="FILE.pt, FILE.safetensors or FILE.onnx.")],
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint's model to a file that needs no rayexp.

    .pt is a plain state_dict under torchvision's names, with a JSON file beside it that says what is needed to use it:
    the classes (or the vocabulary), how pixels are normalised, where the weights come from. .safetensors and .onnx have
    the same in their metadata; .onnx takes `pip install 'rayexp[onnx]'`.
    """
    from rayexp.display import short
    from rayexp.runs.run import resolve

    run, epoch = resolve(ref, runs)

    from rayexp.launch.export import export as write

    made = write(run, epoch, to, force)
    if as_json:
        print_json(made.to_dict())
        return
    tell(str(made.path))
    about = made.about
    say(f"{run.id}@{epoch}, weights {short(about['weights_sha'])}: {about['architecture']}")
    say(f"input: {about['input']}")
    say(f"output: {about['output']}")
    for key in ("mean", "std"):
        if key in about:
            say(f"{key}: {', '.join(f'{value:g}' for value in about[key])}")
    inside = made.beside or "the file's metadata"
    say(f"classes, vocabulary and the rest: {inside}")
    if made.build:
        load = "torch.load(FILE, weights_only=True)" if made.beside else "safetensors.torch.load_file(FILE)"
        say("\n".join([*made.build, f"model.load_state_dict({load})"]))
