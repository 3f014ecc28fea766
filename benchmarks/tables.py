"""What the benchmarks' tables share."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def write_tables(out: Path, found: Any, text: str) -> None:
    """Write ``out.json`` and ``out.md``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
