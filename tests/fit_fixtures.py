import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data

from quac_plugins.core.inject.surgery import Injection, injection_of

SOURCES = ("astronaut", "chelsea", "coffee", "rocket")
QUICK = {
    "input_size": 64, "views": 1, "draws": 4, "steps": 8, "near": 0.5, "check_every": 2, "batch_size": 4,
    "near_batch": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def photos():
    """Four photographs, uint8 (80, 90, 3)."""
    found = [Image.fromarray(getattr(data, source)()).convert("RGB").resize((90, 80)) for source in SOURCES]
    return [np.asarray(image) for image in found]


@pytest.fixture(scope="session")
def folder(photos, tmp_path_factory):
    """The same as files."""
    root = tmp_path_factory.mktemp("photographs")
    for name, pixels in zip(SOURCES, photos, strict=True):
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


@pytest.fixture
def quick():
    return dict(QUICK)


@pytest.fixture
def build():
    def create(name, seed=0, **kwargs):
        torch.manual_seed(seed)
        return timm.create_model(name, **{"num_classes": 5, **kwargs})

    return create


class Snapshot:
    """All of a model and of the generators that a fit must leave as it was."""

    def __init__(self, model):
        self.model = model
        record = injection_of(model) or Injection()
        self.host = {n: t.clone() for n, t in model.state_dict().items() if record.name_in_host(n) is not None}
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.wanted = {name: (p.requires_grad, p.device, p.grad) for name, p in model.named_parameters()}
        self.hooks = self._hooks()
        self.states = self._generators()

    def _hooks(self):
        return [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in self.model.named_modules()]

    @staticmethod
    def _generators():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    def check(self):
        now = self.model.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in self.host.items())
        assert {name: module.training for name, module in self.model.named_modules()} == self.modes
        for name, p in self.model.named_parameters():
            wanted, device, grad = self.wanted[name]
            assert (p.requires_grad, p.device) == (wanted, device), name
            assert p.grad is grad, name
        assert self._hooks() == self.hooks
        assert self._generators() == self.states


@pytest.fixture
def snapshot():
    return Snapshot


@pytest.fixture
def put_in():
    """The tensors that were put into a model."""

    def tensors(model):
        record = injection_of(model)
        return {n: t.clone() for n, t in model.state_dict().items() if record.name_in_host(n) is None}

    return tensors


@pytest.fixture
def equal():
    def same(one, other):
        return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    return same


@pytest.fixture
def interrupt(monkeypatch):
    """Let the fit be interrupted in a step, counted from 1 over all its stages."""
    from quac_plugins.fit.training import Fit

    usual = Fit._one_step

    def at(step, error=KeyboardInterrupt):
        done = [0]

        def one_step(self):
            done[0] += 1
            if done[0] == step:
                raise error
            return usual(self)

        monkeypatch.setattr(Fit, "_one_step", one_step)
        return lambda: monkeypatch.setattr(Fit, "_one_step", usual)

    return at
