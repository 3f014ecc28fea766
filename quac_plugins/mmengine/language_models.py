"""Importing mmpretrain without its language models, where the installed transformers is too new for them.

To build one model mmpretrain imports all that it has, and its language models import names that transformers 4.50 took
away, while pyiqa wants transformers 5. A backbone needs neither, so it shall not fail for them.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_LANGUAGE_MODELS = "mmpretrain.models.multimodal"


def leave_out_broken_language_models() -> None:
    """Let imports of mmpretrain succeed, without its language models, where those fail."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """A finder of one package, whose loader tolerates failures."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _LANGUAGE_MODELS else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: Any) -> None:
        try:
            super().exec_module(module)
        except Exception as error:  # a name that is None where a class is expected is a TypeError
            module.__all__ = []  # for mmpretrain.models, which takes all names from here
            warnings.warn(
                f"mmpretrain {_version('mmpretrain')} is here without its language models ({_LANGUAGE_MODELS}), which "
                f"fail beside transformers {_version('transformers')} ({type(error).__name__}: {error}); its other "
                'models are whole. Whoever needs them: pip install "transformers<4.50", in an environment without '
                "pyiqa, which wants transformers 5",
                stacklevel=2,
            )


def _version(package: str) -> str:
    """Return the version of a package; "?" if it is missing, or installed under a fork's name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
