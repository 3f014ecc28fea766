"""Quality functions, one file each."""

from quac_plugins.core.quality.table import (
    QualityFunction,
    quality_family,
    quality_function,
    quality_names,
    resolve_quality,
)

__all__ = ["QualityFunction", "quality_family", "quality_function", "quality_names", "resolve_quality"]
