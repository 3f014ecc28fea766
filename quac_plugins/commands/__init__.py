"""The commands of ``quac``: options in, one call, results out.

Results go to standard output, everything else to standard error. Exit codes: 0 all is well, 2 the arguments or the
files they name are wrong, 3 the results are there but some images could not be read, 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from quac_plugins.commands.evaluate import evaluate_command
from quac_plugins.commands.export import export_command
from quac_plugins.commands.fit import fit_prior_command, fit_qacon_command
from quac_plugins.commands.hub import info_command, pull_command, push_command
from quac_plugins.commands.listing import list_command
from quac_plugins.commands.predict import predict_command
from quac_plugins.commands.registry import app as registry_app
from quac_plugins.commands.restore import restore_command

__all__ = ["app"]

app = typer.Typer(
    help="Quality-adaptive activations and degradation priors: what there is, how to fit it, and how well it does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from quac_plugins import __version__

        typer.echo(f"quac {__version__}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which, and stop.")]


@app.callback()
def _quac(version: _Version = False) -> None:
    pass


app.command("evaluate")(evaluate_command)
app.command("fit-prior")(fit_prior_command)
app.command("fit-qacon")(fit_qacon_command)
app.command("predict")(predict_command)
app.command("export")(export_command)
app.command("list")(list_command)
app.command("info")(info_command)
app.command("push")(push_command)
app.command("pull")(pull_command)
app.command("restore")(restore_command)
app.add_typer(registry_app, name="registry")
