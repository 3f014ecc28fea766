"""The progress of a run, shown on a terminal by the first of its processes."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from quac_plugins.processes import is_main_process

Show = Callable[..., None]  # called with the stage, the steps that are done, how many there are, perhaps the loss


@contextlib.contextmanager
def progress_bar(show: bool) -> Iterator[Show]:
    """Yield a function that shows the progress of a run: a bar on a terminal with rich, else nothing."""
    if show and is_main_process() and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError:
            warnings.warn("no progress bar: rich is not installed", stacklevel=4)
        else:
            bars: dict[str, Any] = {}
            with Progress(console=Console(stderr=True), transient=True) as progress:

                def step(stage: str, done: int, steps: int, loss: float | None = None) -> None:
                    bar = bars[stage] if stage in bars else bars.setdefault(stage, progress.add_task(stage))
                    text = stage if loss is None else f"{stage}: loss {loss:.3f}"
                    progress.update(bar, total=steps, completed=done, description=text)

                yield step
            return
    yield lambda *_: None
