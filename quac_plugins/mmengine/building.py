"""Where every model passes that MMEngine builds from a config: checked before, finished after.

Options of ours, and whether the backbones have the sites that they ask for, are checked before anything is built, and
an error begins with their path in the config. MMEngine has no place to hook into there, so ``Registry.build`` is
wrapped. A config in new style (pure Python) imports this package only when a part of the model is built, in the midst
of a call that is not wrapped yet: its config is found on the stack and checked at once, and the runner, which wraps
each model after it has built it, finishes it.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.registry import Registry
from mmengine.runner import Runner
from mmengine.runner._flexible_runner import BaseStrategy
from torch import nn

from quac_plugins.core.quality.table import in_use
from quac_plugins.mmengine.checking import SiteError, check_config, path_of
from quac_plugins.mmengine.finishing import finish
from quac_plugins.mmengine.preprocessing import note_config

_MARK = "_quac_looks_over"


class _Depth(threading.local):
    """How deep in building this thread is: a model is looked over when all of it is there."""

    value = 0


_depth = _Depth()
_own_build = Registry.build  # MMEngine's


def look_over_models(check_sites: Callable[[Any, str], None]) -> None:
    """Let registries of models check and :func:`finish` what they build.

    Args:
        check_sites: is given every config with its path, and raises ValueError that begins with a path.
    """
    if getattr(Registry.build, _MARK, False):
        return

    @functools.wraps(_own_build)
    @in_use()  # quality functions that are named at several places, and to be checked
    def build(self: Registry, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if self.name != "model":
            return _own_build(self, cfg, *args, **kwargs)
        outermost = _depth.value == 0 and not _unfinished_builds()
        if outermost:
            check_config(cfg, "model")
        _depth.value += 1
        try:
            if outermost:
                check_sites(cfg, "model")
            built = _own_build(self, cfg, *args, **kwargs)
        except SiteError as error:
            if not outermost:
                raise
            raise ValueError(f"{path_of(cfg, error.given, 'model') or 'model'}.{error.key}: {error}") from error
        finally:
            _depth.value -= 1
        note_config(built, cfg)
        return finish(built) if outermost and isinstance(built, nn.Module) else built

    setattr(build, _MARK, True)
    Registry.build = build
    for cls, name in ((Runner, "wrap_model"), (BaseStrategy, "_init_model_weights")):
        setattr(cls, name, _finishing(getattr(cls, name)))


def check_unfinished_builds(check_sites: Callable[[Any, str], None]) -> None:
    """Check the config of a model that is being built while this package is imported.

    Raises:
        ValueError: the message begins with the path of what is wrong.
    """
    frames = _unfinished_builds()
    if not frames:
        return
    cfg = frames[-1].f_locals["cfg"]
    check_config(cfg, "model")
    check_sites(cfg, "model")
    if not _stack(lambda frame: frame.f_code in (Runner.build_model.__code__, BaseStrategy.build_model.__code__)):
        warnings.warn(
            "quac_plugins.mmengine is imported by the config of a model that is being built already, so what is built "
            "is not finished: import quac_plugins.mmengine before MODELS.build, or call "
            "quac_plugins.mmengine.finish(model) before the model is used",
            stacklevel=2,
        )


def _unfinished_builds() -> list[Any]:
    """The calls of MMEngine's own ``Registry.build`` of models that were not wrapped, the innermost first."""

    def plain(frame: Any) -> bool:
        of_model = frame.f_code is _own_build.__code__ and frame.f_locals["self"].name == "model"
        return of_model and frame.f_back.f_code.co_filename != __file__

    return _stack(plain)


def _stack(wanted: Callable[[Any], bool]) -> list[Any]:
    found, frame = [], sys._getframe()
    while frame is not None:
        if wanted(frame):
            found.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _finishing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a runner that is given a model it has just built, which is finished before."""

    @functools.wraps(method)
    def finishing(self: Any, *args: Any, **kwargs: Any) -> Any:
        for model in (one for one in (*args, *kwargs.values()) if isinstance(one, nn.Module)):
            cfg = getattr(self, "cfg", {})
            for part in (cfg, cfg.get("model")):
                if isinstance(part, Mapping):
                    note_config(getattr(model, "data_preprocessor", None), part.get("data_preprocessor"))
            finish(model)
        return method(self, *args, **kwargs)

    return finishing
