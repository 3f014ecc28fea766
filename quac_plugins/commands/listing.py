"""``quac list``: all known names."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from quac_plugins.commands import console


class What(str, Enum):
    """The kinds of names that ``quac list`` lists."""

    models = "models"
    quality = "quality"
    activations = "activations"
    priors = "priors"
    corruptions = "corruptions"
    pipelines = "pipelines"


def list_command(
    pattern: Annotated[str, typer.Argument(help="Wildcards * and ?; without them, a part of the name.")] = "*",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Only models with weights, with their tags.")
    ] = False,
    what: Annotated[What, typer.Option(help="What to list.")] = What.models,
    debug: console.Debug = False,
) -> None:
    """List names, one a line: models, quality functions, activations, priors, corruptions, restoration pipelines."""
    from quac_plugins.parsing import matching

    with console.plain_errors(debug):
        names = matching(_names(what, pretrained), pattern)
        typer.echo("".join(f"{name}\n" for name in names), nl=False)
        if not names:
            typer.echo(f"no {what.value} match {pattern!r}", err=True)


def _names(what: What, pretrained: bool) -> list[str]:
    if what is What.corruptions:
        from quac_plugins.degradations import CORRUPTIONS, EXTRA_CORRUPTIONS

        return [*CORRUPTIONS, *EXTRA_CORRUPTIONS]
    import quac_plugins

    if what is What.pipelines:
        return list(quac_plugins.registry.published("diffusers"))
    if what is What.quality:
        return quac_plugins.quality_names()
    if what is What.activations:
        return sorted(quac_plugins.ACTIVATIONS)
    if what is What.priors:
        return sorted(quac_plugins.FDMS)
    import timm

    from quac_plugins.core.naming import split_name

    ours = quac_plugins.registry.published()
    return [name for name in timm.list_models(pretrained=pretrained) if split_name(name)[1] or name in ours]
