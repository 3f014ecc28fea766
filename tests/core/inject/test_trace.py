"""What a pass over a host shows, and that it leaves no trace of its own."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from quac_plugins.core.inject.trace import trace

HOSTS = {
    "test_resnet": lambda: timm.create_model("test_resnet"),
    "test_vit": lambda: timm.create_model("test_vit"),
    "test_maxvit": lambda: timm.create_model("test_maxvit"),
    "mobilevit": lambda: timm.create_model("mobilevit_xxs"),
    "torchvision mobilenet": lambda: torchvision.models.mobilenet_v3_small(),
    "torchvision swin": lambda: torchvision.models.swin_t(),
    "decides by values": lambda: ByValues(),
}


class ByValues(nn.Module):
    """A network that fake tensors cannot run."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.drop = nn.Dropout()

    def forward(self, x):
        x = self.drop(self.act(self.norm(self.conv(x))))
        return x * 2 if x.mean().item() > 100 else x


class Caching(nn.Module):
    """A network that keeps what it saw on itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3), nn.GELU()
        self.register_buffer("steps", torch.zeros(()))
        self.last, self.biases, self.shapes = None, {"before": 1}, []

    def forward(self, x):
        self.biases["cpu"] = x
        self.shapes.append(x.shape)
        self.steps = self.steps + 1
        self.last = self.act(self.conv(x))
        self.seen = x.shape
        return self.last


def snapshot(model):
    return {
        name: (
            module.training,
            {k: v for k, v in module.__dict__.items() if not isinstance(v, dict) and k != "training"},
            [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)],
            list(module._modules),
            [id(p) for p in module._parameters.values()] + [id(b) for b in module._buffers.values()],
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", HOSTS)
def test_leaves_the_host_and_the_random_numbers_as_they_were(name):
    torch.manual_seed(0)
    model = HOSTS[name]().train()
    for i, module in enumerate(model.modules()):  # every module in a mode of its own
        module.training = i % 3 > 0
    values = {k: v.clone() for k, v in model.state_dict().items()}
    before, state = snapshot(model), torch.get_rng_state()
    trace(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key])
    assert not any(p.grad is not None for p in model.parameters())


def test_what_a_host_keeps_of_a_pass_is_taken_back():
    model = Caching()
    trace(model)
    assert model.last is None
    assert model.steps.item() == 0
    assert not hasattr(model, "seen")
    assert model.biases == {"before": 1}
    assert model.shapes == []


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("test_resnet", "conv1.0"),
        ("test_vit", "patch_embed.proj"),
        ("test_convnext", "stem.0"),
        ("test_efficientnet", "conv_stem"),
        ("test_nfnet", "stem.conv1"),
    ],
)
def test_tap_is_the_first_layer_that_sees_the_image(name, layer):
    model = timm.create_model(name)
    assert trace(model).tap == layer
    assert isinstance(model.get_submodule(layer), nn.Conv2d)


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_vit", "test_convnext", "test_maxvit", "test_mambaout", "mobilevit_xxs", "mixer_s32_224"],
)
def test_calls_are_those_of_a_real_pass(name):
    model = timm.create_model(name).eval()
    seen = trace(model)
    size = timm.get_pretrained_cfg(name).input_size
    shapes, handles = {}, []
    for layer, module in model.named_modules():
        if layer in seen.calls:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, layer=layer: shapes.setdefault(layer, []).append(args[0].shape)
                )
            )
    with torch.no_grad():
        model(torch.rand(3, *size))
    assert shapes.keys() == seen.calls.keys()
    for layer, calls in seen.calls.items():
        for call, shape in zip(calls, shapes[layer], strict=True):
            assert call.channels == shape[call.channel_dim]
            assert call.shape[1:] == shape[1:]
            assert (call.fold is not None) == (shape[0] != 3)


class Folding(nn.Module):
    """Puts the rows or columns of an image onto the batch axis, outside or inside of the images."""

    def __init__(self, order):
        super().__init__()
        self.conv, self.act, self.order = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), order

    def forward(self, x):
        x = self.conv(x)
        b, c, h, w = x.shape
        if self.order == "interleave":
            return self.act(x.permute(0, 2, 1, 3).reshape(b * h, c, w))
        if self.order == "tile":
            return self.act(x.permute(2, 0, 1, 3).reshape(b * h, c, w))
        if self.order == "mixed":
            return self.act(x.permute(2, 0, 3, 1).reshape(h * b * w, c))
        if self.order == "back":
            return self.act(x.permute(0, 2, 1, 3).reshape(b * h, c, w).reshape(b, h, c, w).permute(0, 2, 1, 3))
        return self.act(x.permute(1, 0, 2, 3))


@pytest.mark.parametrize("order", ["interleave", "tile", "mixed"])
def test_order_of_rows_is_recognized(order):
    (call,) = trace(Folding(order), torch.rand(1, 3, 12, 10)).calls["act"]
    assert call.fold == order
    assert call.channels == 8


def test_rows_that_are_images_again_are_not_folded():
    (call,) = trace(Folding("back"), torch.rand(1, 3, 12, 10)).calls["act"]
    assert (call.fold, call.channel_dim, call.channels, call.batch_axis) == (None, 1, 8, 0)


def test_images_on_another_axis_are_seen_there():
    (call,) = trace(Folding("axis"), torch.rand(1, 3, 12, 10)).calls["act"]
    assert call.batch_axis == 1


def test_kernel_is_that_of_the_convolution_before():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 5),
        nn.Dropout(), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.SiLU(),
    )  # fmt: skip
    calls = trace(model, torch.rand(1, 3, 32, 32)).calls
    assert {name: call[0].kernel for name, call in calls.items()} == {"2": 3, "4": 1, "7": 5, "11": 1}
    assert {name: call[0].channels for name, call in calls.items()} == {"2": 8, "4": 8, "7": 8, "11": 6}


@pytest.mark.parametrize("axis", [8, 7, 32, 3])
def test_channels_are_told_from_pixels_of_the_same_number(axis):
    """Tokens, channels and rows that are all of one length."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Conv2d(3, axis, 4, 4), nn.LayerNorm(axis)
            self.first, self.fc, self.second = nn.GELU(), nn.Linear(axis, axis), nn.GELU()
            self.third = nn.GELU()

        def forward(self, x):
            x = self.first(self.embed(x))
            x = self.second(self.fc(self.norm(x.flatten(2).transpose(1, 2))))
            return self.third(x.transpose(1, 2).reshape(x.shape[0], axis, axis, axis))

    calls = trace(Tokens(), torch.rand(1, 3, 4 * axis, 4 * axis)).calls
    assert [calls[name][0].channel_dim for name in ("first", "second", "third")] == [1, -1, 1]


def test_a_host_that_does_not_run_says_how_to_give_images():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 2))
    with pytest.raises(RuntimeError, match=r"\(1, 3, 224, 224\).*example=torch\.rand\(1, C, H, W\)"):
        trace(model)
    assert trace(model, torch.rand(1, 3, 32, 32)).calls["1"][0].shape[1:] == (4, 30, 30)


def test_modes_dtypes_and_devices_of_hosts():
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).half(), timm.create_model("test_resnet").bfloat16()):
        assert trace(copy.deepcopy(model)).calls
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    assert trace(model).calls


def test_recurrent_layers_are_as_deep_on_every_device():
    class Rows(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).flatten(2).transpose(1, 2))[0]

    model = Rows(nn.Conv2d(3, 4, 3), nn.LSTM(4, 4, batch_first=True))
    images = torch.rand(1, 3, 8, 8)
    assert trace(model, images).layers == trace(copy.deepcopy(model).to("meta"), images.to("meta")).layers
