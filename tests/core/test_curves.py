"""The curve of an activation is what the activation computes."""

import pytest
import timm
import torch

import quac_plugins as quac
from quac_plugins.core.curves import activation_curves

X = torch.linspace(-3, 3, 13)


@pytest.mark.parametrize("activation", ["qacon", "meta_acon", "acon", "qswish", "qprelu"])
@pytest.mark.parametrize("init", ["paper", "preserve"])
def test_it_is_what_the_activation_computes(activation, init, cheap, photographs):
    torch.manual_seed(0)
    config = quac.QuACConfig(activation=activation, init=init, quality=cheap, where="all", norm="layer")
    model = quac.inject(timm.create_model("test_resnet"), config).eval()
    with torch.no_grad():
        for tensor in quac.adapter_state(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    layer, images, seen = quac.injection_of(model).sites[1].name, photographs(2, 64), []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    curves = activation_curves(model, [layer], lambda: model(images), X)[layer]
    handle.remove()
    given, returned = seen[0]
    assert curves.shape[1:] == (given.shape[1], len(X))
    for image in range(2):
        curve = curves[min(image, len(curves) - 1)]
        for channel in range(given.shape[1]):
            inside = given[image, channel].abs() <= 3
            at = given[image, channel][inside]
            if len(at):
                near = ((at[:, None] - X).abs()).argmin(dim=1)
                close = (at - X[near]).abs() < 0.05
                found = returned[image, channel][inside][close]
                torch.testing.assert_close(found, curve[channel, near[close]], rtol=0, atol=0.15)


def test_other_modules_are_refused():
    model = timm.create_model("test_resnet_qacon")
    with pytest.raises(TypeError, match="'conv1' is a Sequential, no activation"):
        activation_curves(model, ["conv1"], lambda: None, X)
