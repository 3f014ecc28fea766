"""Measuring how well a network classifies clean images and images under the corruptions of ImageNet-C."""

from quac_plugins.evaluate.report import EvaluationReport
from quac_plugins.evaluate.runner import evaluate

__all__ = ["EvaluationReport", "evaluate"]
