"""Quality functions, one file each."""

from quac_plugins.core.quality.registry import (
    QualityFunction,
    quality_family,
    quality_function,
    quality_names,
    resolve_quality,
)

__all__ = ["QualityFunction", "quality_family", "quality_function", "quality_names", "resolve_quality"]
