"""Builds the pages of the site that are generated: tables, results, the command line, the reference.

mkdocs.yml names this file. Sources are written for GitHub, where their links work as they stand; here links to files of
the repository become links to pages.
"""

from __future__ import annotations

import posixpath
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {f"benchmarks/results/{path.name}": f"results/{path.name}" for path in tables["RESULTS"].glob("*.md")}

REFERENCE: dict[str, tuple[str, ...]] = {
    "networks": ("core.inject", "core.restore"),
    "activations": ("core.activations", "functional"),
    "quality": ("core.quality",),
    "priors": ("core.prior", "fit"),
    "sharing": ("hub", "registry", "deploy"),
}
"""Page of the reference → modules whose public names it holds. A new public name of another module is an error."""
TITLES = {
    "networks": "Put modules into a network",
    "activations": "Activations",
    "quality": "Quality functions",
    "priors": "Priors and fits",
    "sharing": "Share, load, export",
}
MODULES = {
    "evaluate": "Evaluate",
    "degradations": "Degradations",
    "detectron2": "detectron2",
    "mmengine": "MMEngine",
    "diffusers": "diffusers",
    "transformers": "transformers",
}


def reference() -> dict[str, str]:
    """The pages of the reference: every name of ``quac_plugins.__all__``, then those of the other public modules."""
    package: Any = griffe.load("quac_plugins", search_paths=[str(ROOT)], resolve_aliases=False)
    lines: dict[str, list[str]] = {page: [f"# {TITLES[page]}\n"] for page in REFERENCE}
    for name in sorted(package.exports, key=str.lower):
        member = package.members[name]
        target = member.target_path if member.is_alias else member.path
        if name in getattr(package.get_member(target.removeprefix("quac_plugins.")), "members", {}):
            target = f"{target}.{name}"  # a function in a file of its name, which griffe takes for the file
        module = target.removeprefix("quac_plugins.")
        owners = [page for page, modules in REFERENCE.items() if any(f"{module}.".startswith(f"{m}.") for m in modules)]
        if len(owners) != 1:
            raise PluginError(f"the reference has no page for {name} of quac_plugins.{module}: add it to docs/hooks.py")
        lines[owners[0]].append(f"::: {target}\n")
    pages = {f"reference/{page}.md": "\n".join(text) for page, text in lines.items()}
    for module, title in MODULES.items():
        pages[f"reference/{module}.md"] = f"# {title}\n\n::: quac_plugins.{module}\n    options:\n      members: true\n"
    return pages


def command_line() -> str:
    """Every command of ``quac`` with its arguments and options."""
    import typer

    from quac_plugins.commands import app

    lines = ["# The command line", "", "`quac COMMAND --help` tells the same; `quac --version` the version."]

    def write(command: Any, name: str) -> None:
        for key, below in getattr(command, "commands", {}).items():
            write(below, f"{name} {key}")
        if hasattr(command, "commands"):
            return
        rows = []
        for option in command.params:
            names = ", ".join(f"`{text}`" for text in (*option.opts, *option.secondary_opts))
            default = "required" if option.required else option.default
            shown = (
                ""
                if default is None or default is False or callable(default)
                else str(getattr(default, "value", default))
            )
            rows.append([names, (option.help or "").replace("\n", " "), shown])
        text = re.sub(r"\s*\n(?!\n)\s*", " ", (command.help or "").strip().replace("\n\n", "\0")).replace("\0", "\n\n")
        lines.extend(["", f"## `{name}`", "", text, "", tables["rows_of"](["name", "meaning", "default"], rows)])

    write(typer.main.get_command(app), "quac")
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages: dict[str, Callable[[], str] | str] = {
        page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()
    }
    pages |= {**reference(), "reference/cli.md": command_line()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    for image in tables["RESULTS"].glob("*.png"):
        files.append(File.generated(config, f"results/{image.name}", abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in tables and files, and point links at pages."""
    target = page.file.src_uri
    source = next((name for name, made in PAGES.items() if made == target), f"docs/{target}")
    markdown = tables["fill"](markdown)
    markdown = re.sub(r"<!-- file: (\S+) -->", _file, markdown)

    def link(match: re.Match[str]) -> str:
        path, anchor = match[2], match[3] or ""
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        wanted = PAGES.get(wanted, wanted.removeprefix("docs/"))
        return f"{match[1]}({posixpath.relpath(wanted, posixpath.dirname(target) or '.')}{anchor})"

    return re.sub(r"(\])\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def _file(match: re.Match[str]) -> str:
    path = ROOT / match[1]
    kind = {".py": "python", ".toml": "toml", ".yaml": "yaml"}.get(path.suffix, "text")
    return f'```{kind} title="{match[1]}"\n{path.read_text(encoding="utf-8").rstrip()}\n```'


def on_post_build(config: Any) -> None:
    """The site works offline: no page loads a script, style, font or picture from elsewhere."""
    away = re.compile(
        r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?(?:https?:)?//[^\s>]*"""
        r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|icon|preload))[^>]*\bhref=["']?(?:https?:)?//[^\s>]*"""
        r"""|class=["']?mermaid"""  # which the theme fetches from elsewhere to draw it
    )
    for path in sorted(Path(config["site_dir"]).rglob("*.html")):
        if found := away.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.relative_to(config['site_dir'])} loads from elsewhere: {found[0][:200]}")
    for path in sorted(Path(config["site_dir"]).rglob("*.css")):
        if re.search(r"""(?:url\(|@import )["']?(?:https?:)?//""", path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.relative_to(config['site_dir'])} loads from elsewhere")
