"""How a fit begins, and how it is undone: what is put into a plain host, and what is put back after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from quac_plugins.core.inject.adapter import adapter_state, load_adapter_state
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.surgery import inject, injection_of, remove, take_prior
from quac_plugins.core.prior.config import PriorConfig


def check_fit(model: nn.Module, config: object, kind: type) -> None:
    """TypeError for a model, or a config, of another kind than a fit takes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}; timm.create_model(name) makes one")
    if config is not None and not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")


def put_in(
    model: nn.Module,
    config: QuACConfig | PriorConfig,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> None:
    """Inject into a host, by the seed alone, with this normalization unless the host says the same itself."""
    own = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    known = isinstance(own, dict) and "mean" in own and (tuple(own["mean"]), tuple(own["std"])) == (mean, std)
    if config.mean is None and not known:
        config = replace(config, mean=tuple(mean), std=tuple(std))
    with torch.random.fork_rng(), colour_images(size):
        torch.manual_seed(seed)
        inject(model, config, torch.empty(1, 3, *size))


@contextlib.contextmanager
def colour_images(size: tuple[int, int]) -> Iterator[None]:
    """Say of a host that does not run on photographs that it cannot be fitted; ValueError."""
    try:
        yield
    except RuntimeError as error:
        shape = f"(B, 3, {size[0]}, {size[1]})"
        said = str(error).partition(" Give images it takes")[0]
        raise ValueError(
            f"only hosts that take colour images, here {shape}, can be fitted (input_size gives another size): {said}"
        ) from None


@contextlib.contextmanager
def unharmed(model: nn.Module) -> Iterator[None]:
    """On any error, interruptions included, what was put in is as it was before, or out again if it was not there.

    Inside, gradients are taken and nothing is cast, whatever the caller has switched.
    """
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for kind in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            modes.enter_context(torch.autocast(kind, enabled=False))
        with _put_back(model):
            yield


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    before = injection_of(model)
    had_prior = before is not None and before.prior is not None
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()} if before is not None else {}
    try:
        yield
    except BaseException:
        now = injection_of(model)
        if now is not None and before is None:
            remove(model)
        elif now is not None:
            if now.prior is not None and not had_prior:
                take_prior(model)
            load_adapter_state(model, state)
        raise
