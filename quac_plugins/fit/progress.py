"""Where a fit is, shown on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from quac_plugins.processes import is_main_process

Show = Callable[[str, int, int, float], None]
"""Called with the stage, the step, how many steps it has, and the loss."""


@contextlib.contextmanager
def progress_bar(show: bool) -> Iterator[Show]:
    """A function that shows where a fit is: a bar on a terminal with rich, else nothing."""
    if not show or not is_main_process() or not sys.stderr.isatty():
        yield lambda stage, step, steps, loss: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda stage, step, steps, loss: None
        return
    tasks: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:

        def show_step(stage: str, step: int, steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=steps)
            bar.update(tasks[stage], completed=step, description=f"{stage}: loss {loss:.3f}")

        yield show_step
