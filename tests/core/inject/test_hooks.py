"""What hangs on a module of the host hangs on what takes its place, in order, and comes back."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from quac_plugins import PriorConfig, QuACConfig, inject, remove

PICTURES = torch.rand(2, 3, 32, 32, requires_grad=True)


class Tagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.inside = nn.ModuleDict({"first": self.act, "last": nn.Conv2d(8, 8, 3, padding=1)})

    def forward(self, x):
        return self.inside["last"](self.act(self.stem(x)))


def hang(module, heard):
    """One hook of every kind that torch has; returns their handles."""

    def hear(kind):
        return lambda *_, **__: heard.append(kind)

    return [
        module.register_forward_pre_hook(hear("pre")),
        module.register_forward_pre_hook(hear("pre with kwargs"), with_kwargs=True),
        module.register_forward_hook(hear("forward")),
        module.register_forward_hook(hear("forward with kwargs"), with_kwargs=True, prepend=True),
        module.register_forward_hook(hear("always"), always_call=True),
        module.register_full_backward_pre_hook(hear("backward pre")),
        module.register_full_backward_hook(hear("backward")),
        module.register_state_dict_pre_hook(hear("state pre")),
        module.register_state_dict_post_hook(hear("state")),
        module.register_load_state_dict_pre_hook(hear("load pre")),
        module.register_load_state_dict_post_hook(hear("load")),
    ]


def use(model, heard):
    """What is heard in a training step, a save and a load."""
    heard.clear()
    model(PICTURES).sum().backward()
    model.load_state_dict(model.state_dict())
    return list(heard)


@pytest.mark.parametrize(
    "configs",
    [[QuACConfig(where="all", quality="brisque")], [PriorConfig(site="act")], [PriorConfig(site="act"), QuACConfig()]],
)
def test_hooks_and_attributes_move_and_come_back(configs):
    torch.manual_seed(0)
    model, heard = Tagged(), []
    handles = hang(model.act, heard)
    model.act.tag, model.act._quac_of_a_framework, model.act._old_forward = 1, "kept", model.act.forward
    expected, names = use(model, heard), dict(model.act.__dict__)
    assert len(set(expected)) == len(handles)
    for config in configs:
        inject(model, config, PICTURES)
    assert model.inside["first"] is model.act
    assert use(model, heard) == expected  # once each, in this order
    assert (model.act.tag, model.act._quac_of_a_framework) == (1, "kept")
    if isinstance(configs[-1], QuACConfig):
        assert not hasattr(model.act, "_old_forward")  # of the module itself: of no use to another
    handles.pop(2).remove()
    expected = [kind for kind in expected if kind != "forward"]
    model.act.later = 2
    later = model.act.register_forward_hook(lambda *_: heard.append("later"))
    assert use(model, heard).count("later") == 1
    remove(model)
    assert model.inside["first"] is model.act
    assert set(model.act.__dict__) == {*names, "later"}
    assert use(model, heard).count("later") == 1
    later.remove()
    assert use(model, heard) == expected
    for handle in handles:
        handle.remove()
    assert use(model, heard) == []


class Noted:
    """A hook that can be pickled."""

    def __init__(self):
        self.shapes = []

    def __call__(self, module, args, output):
        self.shapes.append(tuple(output.shape))


def test_copies_and_pickles_have_the_hooks():
    model = Tagged()
    model.act.register_forward_hook(Noted())
    inject(model, QuACConfig(where="all"), PICTURES)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        one(PICTURES)
        (hook,) = (hook for hook in one.act._forward_hooks.values() if isinstance(hook, Noted))  # beside our own
        assert hook.shapes[-1] == (2, 8, 32, 32)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("config", [QuACConfig(where="last", init="paper"), PriorConfig(site="1")])
def test_hooks_of_others_see_what_is_put_behind_a_layer(config, before):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    seen = []
    if before:
        model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    inject(model, config, PICTURES)
    if not before:
        model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    if isinstance(config, PriorConfig):
        nn.init.ones_(model[1].quac_prior.body[-1].bias)
    assert torch.equal(model(PICTURES), seen[-1])


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {"feature_cls": "hook"}), ("xception41p", {}), ("test_efficientnet", {"feature_cls": "hook"})],
)
def test_features_are_as_many_as_the_bases_and_the_same(name, options):
    """timm hangs its hooks on activations, or on what is in front of them."""
    base = timm.create_model(name, features_only=True, **options).eval()
    model = timm.create_model(f"{name}_qacon", features_only=True, where="all", **options).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        expected, found = base(PICTURES), model(PICTURES)
        assert len(found) == len(expected) == len(base.feature_info)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert len(remove(model)(PICTURES)) == len(expected)
