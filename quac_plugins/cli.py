"""The command ``quac``: its entry, which works without the packages that the commands need."""

from __future__ import annotations

import sys

__all__ = ["main"]

_NEEDED = {"typer", "click", "rich"}


def main() -> None:
    """Run the command; without typer or rich, say how to install them."""
    try:
        from quac_plugins.commands import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        sys.exit(f'the command quac needs {package}: pip install "quac-plugins[evaluate]"')
    app(prog_name="quac")


if __name__ == "__main__":
    main()
