"""The wrapper of MMEngine's building of models: it checks a config before, and finishes the model after.

Options of ours are checked before anything is built, sites when their backbone is there; an error begins with its path
in the config. MMEngine has no place to hook into there, so ``Registry.build`` is wrapped. A config in new style (pure
Python) imports this package only when a part of its first model is built, in the midst of a call that is not wrapped
yet: there a path begins at that part (``custom_imports`` in the config gives whole ones), and the runner, which wraps
each model after it has built it, finishes it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.registry import Registry
from mmengine.runner import Runner
from mmengine.runner._flexible_runner import BaseStrategy
from torch import nn

from quac_plugins.core.inject.trace import DoesNotRun
from quac_plugins.core.quality.registry import in_use
from quac_plugins.mmengine.activations import PLANNED
from quac_plugins.mmengine.checking import SiteError, check_config, name_of, path_of
from quac_plugins.mmengine.finishing import finish
from quac_plugins.mmengine.preprocessing import note_config

_MARK = "_quac_looks_over"


class _Building(threading.local):
    """The state of a thread that builds a model, which is finished when all of it is built."""

    now = False


_building = _Building()


def is_building() -> bool:
    """Return whether this thread builds a model that will be finished."""
    return _building.now


def look_over_models() -> None:
    """Let the registries of models check configs and :func:`finish` models."""
    if getattr(Registry.build, _MARK, False):
        return
    own_build = Registry.build

    @functools.wraps(own_build)
    @in_use()  # quality functions that are named at several places, and to be checked
    def build(self: Registry, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if self.name != "model":
            return own_build(self, cfg, *args, **kwargs)
        if is_building():
            built = own_build(self, cfg, *args, **kwargs)
            note_config(built, cfg)
            return built
        path = "act_cfg" if isinstance(cfg, Mapping) and name_of(cfg) in PLANNED else "model"
        check_config(cfg, path)
        _building.now = True
        try:
            built = own_build(self, cfg, *args, **kwargs)
        except SiteError as error:
            raise ValueError(f"{path_of(cfg, error.options, path) or path}.{error}") from error
        finally:
            _building.now = False
        note_config(built, cfg)
        if isinstance(built, nn.Module):
            # a part that takes no images waits for the model that a config in new style is building around it
            with contextlib.nullcontext() if hasattr(built, "data_preprocessor") else contextlib.suppress(DoesNotRun):
                finish(built)
        return built

    setattr(build, _MARK, True)
    Registry.build = build
    for cls, name in ((Runner, "wrap_model"), (BaseStrategy, "_init_model_weights")):
        setattr(cls, name, _finishing(getattr(cls, name)))


def _finishing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a runner's method that takes a newly built model: the model is finished before."""

    @functools.wraps(method)
    def finishing(self: Any, *args: Any, **kwargs: Any) -> Any:
        for model in (item for item in (*args, *kwargs.values()) if isinstance(item, nn.Module)):
            cfg = getattr(self, "cfg", {})
            for part in (cfg, cfg.get("model")):
                if isinstance(part, Mapping):
                    note_config(getattr(model, "data_preprocessor", None), part.get("data_preprocessor"))
            finish(model)
        return method(self, *args, **kwargs)

    return finishing
