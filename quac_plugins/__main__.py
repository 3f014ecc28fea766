"""``python -m quac_plugins`` is the command ``quac``."""

from quac_plugins.cli import main

if __name__ == "__main__":
    main()
