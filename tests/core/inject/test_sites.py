"""Which activations a name, a glob, a regex or a list means in networks that people know."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import quac_plugins as quac
from quac_plugins import QuACConfig
from quac_plugins.core.inject.sites import find_sites
from quac_plugins.core.inject.trace import trace


def sites(model, where, example=None):
    found, _ = find_sites(model, trace(model, example), [where] if isinstance(where, str) else where)
    return found


def names(model, where, example=None):
    return [site.name for site in sites(model, where, example)]


@pytest.fixture(scope="module")
def resnet50():
    with torch.device("meta"):
        return timm.create_model("resnet50")


BLOCKS = [f"layer{stage}.{block}" for stage, count in ((1, 3), (2, 4), (3, 6), (4, 3)) for block in range(count)]


def test_places_of_resnet50(resnet50):
    assert names(resnet50, "spatial") == ["act1"] + [f"{block}.act2" for block in BLOCKS]
    assert names(resnet50, "all") == ["act1"] + [f"{block}.act{i}" for block in BLOCKS for i in (1, 2, 3)]
    assert names(resnet50, "auto") == names(resnet50, "spatial")
    (last,) = sites(resnet50, "last")
    assert (last.name, last.channels, last.channel_dim, last.after) == ("layer4", (2048,), 1, True)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("layer3.*.act2", [f"layer3.{i}.act2" for i in range(6)]),
        ("act1", ["act1"]),
        ("*.act[13]", [f"{block}.act{i}" for block in BLOCKS for i in (1, 3)]),
        (r"re:^layer[12]\.\d+\.act3$", [f"layer{s}.{b}.act3" for s, n in ((1, 3), (2, 4)) for b in range(n)]),
        (["layer4.2.act3", "act1"], ["act1", "layer4.2.act3"]),
        (["act1", "act1", "act?"], ["act1"]),
    ],
)
def test_patterns(resnet50, where, expected):
    assert names(resnet50, where) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "layer9.*",
            r"where='layer9\.\*' matches no activation of ResNet\..*act1, layer1\.0\.act1.*49 in all.*spatial",
        ),
        ("layer1.0.conv*", r"not activations: layer1\.0\.conv1, layer1\.0\.conv2.*Activations: act1"),
        ("re:nothing", r"matches no activation.*Activations: act1"),
        ("re:(", r"'re:\(' is not a regular expression"),
        (["act1", "layre1.*"], r"where='layre1\.\*'"),
        ("Spatial", r"Places: auto, spatial, all, last"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_what_there_is(resnet50, where, message):
    with pytest.raises(ValueError, match=message):
        sites(resnet50, where)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_token_networks_have_no_spatial_site_and_auto_takes_all(name):
    model = timm.create_model(name)
    with pytest.raises(
        ValueError, match=r"finds nothing: no activation of .* follows a convolution.*Activations: .*mlp\.act"
    ):
        sites(model, "spatial")
    assert names(model, "auto") == names(model, "all")
    assert all(site.name.endswith("mlp.act") for site in sites(model, "all"))


@pytest.mark.parametrize(
    ("name", "kwargs", "axes"),
    [
        ("test_resnet", {}, {1}),
        ("test_vit", {}, {-1}),
        ("test_convnext", {}, {-1}),
        ("test_convnext", {"conv_mlp": True}, {1}),
        ("test_efficientnet", {}, {1}),
        ("test_maxvit", {}, {1, -1}),
        ("test_mambaout", {}, {1, -1}),
        ("mixer_s32_224", {}, {-1}),
        ("swin_tiny_patch4_window7_224", {}, {-1}),
    ],
)
def test_channel_axis(name, kwargs, axes):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    assert {site.channel_dim for site in sites(model, "all")} == axes


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
def test_rows_that_are_patches_are_expanded(name, cheap):
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        quac.inject(model, QuACConfig(where="all", quality=cheap, norm="layer"), images)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
        for name, parameter in model.named_parameters():
            if "fc3" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        together = model(images)  # every image is activated by its own q, also where rows are patches
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ["interleave", "tile"])
@pytest.mark.parametrize("axis", [0, 1])
def test_folded_rows_take_the_q_of_their_image(order, axis, cheap):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()

        def forward(self, x):
            x = self.conv(x)
            b, c, h, w = x.shape
            if order == "interleave":
                return self.act(x.permute(0, 2, 1, 3).reshape(b * h, c, w)).reshape(b, h, c, w)
            return self.act(x.permute(2, 0, 1, 3).reshape(h * b, c, w)).reshape(h, b, c, w).transpose(0, 1)

    model = Rows().eval()
    images = torch.rand(3, 3, 6, 5)
    quac.inject(model, QuACConfig(where="all", quality=cheap, norm="layer", init="paper"), images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=1e-5)


def test_rows_that_cannot_be_told_apart_are_not_sites():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ReLU()
            self.never = nn.GELU()

        def forward(self, x):
            x = self.other(self.conv(x))
            b, c, h, w = x.shape
            return self.act(x.permute(2, 0, 3, 1).reshape(h * b * w, c))

    model = Mixed()
    found, unusable = find_sites(model, trace(model, torch.rand(1, 3, 6, 5)), ["all"])
    assert [site.name for site in found] == ["other"]
    assert "both sides" in unusable["act"]
    assert "not called" in unusable["never"]
    with pytest.raises(ValueError, match=r"Not usable: act \(.*both sides"):
        sites(Mixed(), "act", torch.rand(1, 3, 6, 5))


def test_one_relu_of_several_widths():
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    found = {site.name: site.channels for site in sites(model, "all")}
    assert found["relu"] == (64,)
    assert found["layer1.0.relu"] == (64, 256)
    assert found["layer2.0.relu"] == (128, 512)
    assert len(found) == 17


@pytest.mark.parametrize(
    ("build", "where", "count"),
    [
        (torchvision.models.mobilenet_v3_small, "spatial", 12),
        (torchvision.models.mobilenet_v3_small, "all", 33),
        (torchvision.models.swin_t, "auto", 12),
        (torchvision.models.convnext_tiny, "auto", 18),
        (torchvision.models.vit_b_16, "auto", 12),
    ],
)
def test_torchvision(build, where, count):
    with torch.device("meta"):
        model = build()
    assert len(sites(model, where)) == count


def test_gates_are_left_alone():
    model = timm.create_model("mobilenetv3_small_050")
    assert not any("gate" in name for name in names(model, "all"))


def test_a_host_without_activations_takes_one_after_its_features():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    (site,) = sites(model, "auto", torch.rand(1, 3, 16, 16))
    assert site.after
    with pytest.raises(ValueError, match="Sequential has no activation module"):
        sites(model, "all", torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="neither an activation module nor"):
        sites(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), "auto", torch.rand(1, 3, 2, 2))
