"""``quac registry check``: comparing published files with the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quac_plugins.commands import console

app = typer.Typer(help="The registry of published models.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def registry() -> None:
    """The registry of published models."""


@app.command("check")
def check_command(
    accuracy: Annotated[bool, typer.Option("--accuracy", help="Measure each model again.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="What it is measured on: class folders, or a folder with val.npz.")
    ] = None,
    on_hub: Annotated[bool, typer.Option("--hub", help="Compare with the Hub too.")] = False,
    debug: console.Debug = False,
) -> None:
    """Compare every entry with hub/, with the Hub if asked, and its figures with a new measurement."""
    with console.plain_errors(debug):
        if accuracy != (data is not None):
            raise ValueError("--accuracy and --data go together")
        from quac_plugins.hub.check import check_registry

        wrong, name = 0, None
        for name, problems in check_registry(on_hub=on_hub, data=data):
            wrong += bool(problems)
            typer.echo(f"{name}: {'; '.join(problems) or 'ok'}")
        if name is None:
            typer.echo("the registry holds no published models yet")
        if wrong:
            raise ValueError(f"{wrong} of the registry's entries are not what they say")
