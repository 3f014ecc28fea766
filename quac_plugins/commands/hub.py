"""``quac push``, ``quac pull`` and ``quac info``: adapters and models on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quac_plugins.commands import console

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace other files of the same names in --out.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]


def push_command(
    folder: Annotated[
        Path | None, typer.Argument(help="An adapter (quac fit-prior --out) or a model that timm saved.")
    ] = None,
    repo_id: Annotated[str | None, typer.Argument(help="org/name.")] = None,
    everything: Annotated[
        str | None,
        typer.Option("--all", metavar="ORG", help="In place of both: send all models of the package to ORG/NAME.TAG."),
    ] = None,
    metrics: Annotated[
        list[Path] | None, typer.Option(help="JSON of quac evaluate, one for each seed. May be repeated.")
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option(
            help="JSON of quac fit-prior or fit-qacon, for the card. By default that in the adapter's folder."
        ),
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="The host's weights on the Hub, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the weights, such as apache-2.0.")] = None,
    description: Annotated[str | None, typer.Option(help="A paragraph for the card.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it does not exist.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write what would be sent to a folder instead.")] = False,
    out: Annotated[Path | None, typer.Option(help="That folder. By default ./push/ORG/NAME.")] = None,
    overwrite: Overwrite = False,
    debug: console.Debug = False,
) -> None:
    """Send an adapter or a model to the Hub in one commit, with a card written from what was measured."""
    with console.plain_errors(debug):
        if out is not None and not dry_run:
            raise ValueError("--out goes with --dry-run")
        from quac_plugins.hub.push import push, push_all

        if everything is not None:
            if folder is not None or dry_run or metrics:
                raise ValueError("--all sends the models of the package as they are: give no folder and no figures")
            for sent in push_all(everything, private=private):
                typer.echo(str(sent))
            return
        if folder is None or repo_id is None:
            raise ValueError("give a folder and org/name, or --all ORG")
        pushed = push(
            folder, repo_id, metrics=metrics, fit=fit, base_model=base_model, license=license,
            description=description, private=private, revision=revision, commit_message=message,
            dry_run=(out or Path("push", *repo_id.split("/"))) if dry_run else None,
            overwrite=overwrite,
        )  # fmt: skip
        typer.echo(str(pushed))


def pull_command(
    repo_id: Annotated[str, typer.Argument(help="org/name.")],
    out: Annotated[Path | None, typer.Option(help="Copy it here; else it stays in the Hub's cache.")] = None,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what the cache has.")] = False,
    overwrite: Overwrite = False,
    debug: console.Debug = False,
) -> None:
    """Fetch an adapter or a model from the Hub, verify it, and print its folder."""
    with console.plain_errors(debug):
        from quac_plugins.hub.fetch import pull

        typer.echo(str(pull(repo_id, out, revision=revision, force=force, overwrite=overwrite)))


def info_command(
    name: Annotated[str, typer.Argument(help="A published NAME.TAG, a folder, or org/name of the Hub.")],
    revision: Revision = None,
    json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    debug: console.Debug = False,
) -> None:
    """Describe a published model or an adapter: host, modules and places, figures, licence."""
    with console.plain_errors(debug):
        facts = _info(name, revision)
        if json_output:
            typer.echo(json.dumps(facts, indent=1))
            return
        for key, value in facts.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            shown = ", ".join(f"{k}={v}" for k, v in shown.items()) if isinstance(shown, dict) else shown
            typer.echo(f"{key + ':':14}{shown}")


def _info(name: str, revision: str | None) -> dict[str, Any]:
    from quac_plugins.core.inject.adapter_files import CONFIG_NAME
    from quac_plugins.hub.fetch import model_config, pull
    from quac_plugins.hub.published import find_published

    facts: dict[str, Any] = {"name": name}
    published = find_published(name, known_to_host=True) or find_published(name, known_to_host=True, door="diffusers")
    if published is not None:
        entry = published.entry
        assert entry is not None
        facts |= {"kind": entry.kind, "license": entry.license, "size": entry.size, "sha256": entry.sha256}
        facts |= {"source": f"{entry.repo}@{entry.revision}" if entry.repo else "embedded"}
        facts |= {"base": entry.base, "metrics": entry.metrics, "model_args": entry.model_args}
        facts = {key: value for key, value in facts.items() if value}
        folder = published.folder()
        if published.kind == "pipeline":
            return facts
    elif Path(name).is_dir():
        folder = Path(name)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = pull(name, revision=revision)
    else:
        return _of_timm(name)
    config = folder / CONFIG_NAME
    if config.is_file():
        from quac_plugins.core.inject.adapter import describe_adapter

        facts |= {"kind": "adapter", **describe_adapter(folder)}
    elif (folder / "config.json").is_file():
        values = model_config(folder)
        facts |= {"kind": "model", "architecture": values.get("architecture"), "classes": values.get("num_classes")}
    else:
        raise FileNotFoundError(f"{folder} holds neither an adapter nor a model")
    return facts


def _of_timm(name: str) -> dict[str, Any]:
    """Describe a name of timm under which this project has published nothing."""
    import timm

    from quac_plugins.core.naming import split_name

    if not timm.is_model(name):
        raise ValueError(f"{name!r} is no model of timm, no folder and no org/name; quac list PATTERN lists names")
    host = split_name(name)[0]
    cfg = timm.get_pretrained_cfg(host, allow_unregistered=True)
    facts: dict[str, Any] = {"name": name, "kind": "architecture", "host": host}
    if cfg is not None and cfg.has_weights:
        facts |= {"weights": cfg.hf_hub_id or cfg.url, "license": cfg.license or "not told"}
    return facts
