"""After which modules of networks that people know a degradation prior can go, and which of them a name means."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from quac_plugins.core.inject.trace import trace
from quac_plugins.core.prior.sites import PriorSite, find_prior_sites


def build(name, **kwargs):
    with torch.device("meta"):
        if name.startswith("torchvision "):
            return torchvision.models.get_model(name.removeprefix("torchvision "), **kwargs)
        return timm.create_model(name, **kwargs)


def sites(model, *patterns, example=None, seen=None):
    return find_prior_sites(model, seen or trace(model, example), list(patterns))


def names(model, *patterns, **kwargs):
    return [site.name for site in sites(model, *patterns, **kwargs)]


@pytest.fixture(scope="module")
def mobilenet():
    model = build("mobilenetv2_100")
    return model, trace(model)


@pytest.fixture
def find(mobilenet):
    """The names that patterns mean in MobileNetV2."""
    model, seen = mobilenet
    return lambda *patterns: names(model, *patterns, seen=seen)


EXPECTED = {
    "mobilenetv2_100": (
        PriorSite("blocks.0", 16, "nchw", stride=2),
        ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    ),
    "resnet50": (PriorSite("layer1", 256, "nchw", stride=4), ["layer1", "layer2", "layer3", "layer4"]),
    "vgg16": (
        PriorSite("features.3", 64, "nchw", stride=1),
        ["features.3", "features.8", "features.15", "features.22", "features.29", "features.30"],
    ),
    "convnext_tiny": (PriorSite("stages.0", 96, "nchw", stride=4), [f"stages.{i}" for i in range(4)]),
    "vit_base_patch16_224": (
        PriorSite("blocks.1", 768, "tokens", 1, (14, 14), 16),
        ["blocks.1", "blocks.5", "blocks.8", "blocks.11"],
    ),
    "swin_tiny_patch4_window7_224": (
        PriorSite("layers.0", 96, "nhwc", stride=4),
        ["layers.0", "layers.1", "layers.2", "layers.3"],
    ),
    "densenet121": (
        PriorSite("features.denseblock1", 256, "nchw", stride=4),
        ["features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"],
    ),
    "efficientnet_b0": (
        PriorSite("blocks.0", 16, "nchw", stride=2),
        ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    ),
    "mobilenetv3_small_100": (
        PriorSite("blocks.0", 16, "nchw", stride=4),
        ["blocks.0", "blocks.1", "blocks.3", "blocks.5"],
    ),
    "mobilenetv4_conv_small": (
        PriorSite("blocks.0", 32, "nchw", stride=4),
        ["blocks.0", "blocks.1", "blocks.2", "blocks.4"],
    ),
    "regnety_008": (PriorSite("s1", 64, "nchw", stride=4), ["s1", "s2", "s3", "s4"]),
    # a stem of several layers is more than a first layer; one of several parallel branches is not
    "resnet50d": (PriorSite("act1", 64, "nchw", stride=2), ["act1", "layer1", "layer2", "layer3", "layer4"]),
    "repvgg_a0": (PriorSite("stages.0", 48, "nchw", stride=4), ["stages.0", "stages.1", "stages.2", "stages.3"]),
    "deit_tiny_distilled_patch16_224": (
        PriorSite("blocks.1", 192, "tokens", 2, (14, 14), 16),
        ["blocks.1", "blocks.5", "blocks.8", "blocks.11"],
    ),
    "torchvision resnet18": (PriorSite("layer1", 64, "nchw", stride=4), ["layer1", "layer2", "layer3", "layer4"]),
    "torchvision mobilenet_v2": (
        PriorSite("features.1", 16, "nchw", stride=2),
        ["features.1", "features.3", "features.6", "features.13", "features.18"],
    ),
    "torchvision vgg11": (
        PriorSite("features.4", 128, "nchw", stride=2),
        ["features.4", "features.9", "features.14", "features.19", "avgpool"],
    ),
    "torchvision squeezenet1_1": (
        PriorSite("features.3", 128, "nchw", stride=4),
        ["features.3", "features.7", "features.12"],  # not the classifier, whose layers are convolutions too
    ),
    "torchvision vit_b_16": (
        PriorSite("encoder.layers.encoder_layer_1", 768, "tokens", 1, (14, 14), 16),
        [*(f"encoder.layers.encoder_layer_{i}" for i in (1, 5, 8)), "encoder"],
    ),
    "torchvision swin_t": (
        PriorSite("features.1", 96, "nhwc", stride=4),
        ["features.1", "features.3", "features.5", "permute"],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_auto_and_stages_of_known_networks(name):
    model = build(name)
    seen = trace(model)
    site, stages = EXPECTED[name]
    assert sites(model, "auto", seen=seen) == [site]
    assert names(model, "stages", seen=seen) == stages


@pytest.mark.parametrize(
    "name",
    ["hrnet_w18_small", "coat_lite_tiny", "levit_128", "mobilevit_xxs", "xcit_nano_12_p16_224", "crossvit_tiny_240",
     "mvitv2_tiny", "pit_ti_224", "test_maxvit", "test_nfnet", "torchvision shufflenet_v2_x0_5"],
)  # fmt: skip
def test_networks_of_many_branches_have_a_site_too(name):
    model = build(name)
    seen = trace(model)
    (site,) = sites(model, "auto", seen=seen)
    stages = sites(model, "stages", seen=seen)
    assert stages[0] == site
    assert [s.stride for s in stages] == sorted({s.stride for s in stages})


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_mambaout", "test_nfnet"]
)
def test_sites_describe_what_a_real_pass_returns(name):
    model = timm.create_model(name).eval()
    height, width = timm.get_pretrained_cfg(name).input_size[1:]
    images, returned = torch.rand(2, 3, height, width), {}
    found = sites(model, "auto", "re:.")
    for site in found:
        model.get_submodule(site.name).register_forward_hook(
            lambda _, args, output, site=site: returned.update({site.name: output.shape})
        )
    with torch.no_grad():
        model(images)
    for site in found:
        batch, *sizes = returned[site.name]
        assert batch == 2
        if site.layout == "tokens":
            assert sizes == [site.prefix + site.grid[0] * site.grid[1], site.channels]
            continue
        channels = sizes.pop(0 if site.layout == "nchw" else -1)
        assert (channels, site.grid, site.prefix) == (site.channels, None, 0)
        assert round(height / sizes[0]) == site.stride
    assert list(returned) == [site.name for site in found]  # in the order of the pass


def test_cut_features_are_all_that_the_output_is_made_of():
    model = timm.create_model("test_efficientnet").eval()
    images = torch.rand(2, 3, 160, 160)
    seen = trace(model)
    cuts = {f.name: f.cut for f in seen.features if f.is_new}
    assert {True, False} == set(cuts.values())
    (usable,) = {cut for name, cut in cuts.items() if name == "blocks.1"}
    assert usable
    for name, cut in cuts.items():
        fixed = torch.rand_like(hooked(model, images, name, lambda x: x)[1])
        one = hooked(model, images, name, lambda x, fixed=fixed: fixed)[0]
        two = hooked(model, torch.rand_like(images), name, lambda x, fixed=fixed: fixed)[0]
        assert torch.equal(one, two) == cut, name


def hooked(model, images, name, change):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, args, output: seen.append(change(output)) or seen[-1]
    )
    try:
        with torch.no_grad():
            return model(images), seen[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["resnet50", "vit_base_patch16_224", "torchvision densenet121"])
def test_features_are_noted_in_order_with_their_depth(name):
    model = build(name)
    seen = trace(model)
    layers = [feature.layers for feature in seen.features]
    assert layers == sorted(layers)
    assert all(0 <= f.before <= f.layers <= seen.layers for f in seen.features)
    assert all(f.depth <= f.layers for f in seen.features)
    assert seen.image_size == (224, 224)
    kinds = (nn.Conv2d, nn.Linear)
    assert seen.layers == sum(isinstance(module, kinds) for module in model.modules())
    assert "" not in {feature.name for feature in seen.features} | set(seen.others)


class Net(nn.Module):
    """A network of one's own: a stem, a stage with a skip, a stage that is stepped down to, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.end = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 16, 2, 2))
        self.twice = nn.ReLU()
        self.pair = Pair()
        self.more = nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1) for _ in range(8)])
        self.mixed = Axes()
        self.unused = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.end(x + self.inner(x))
        x = self.twice(self.twice(self.down(x)))
        x, _ = self.pair(x)
        x = self.mixed(self.more(x))
        return self.head(x.mean((1, 3, 4)))


class Pair(nn.Module):
    def forward(self, x):
        return x * 1, x


class Axes(nn.Module):
    def forward(self, x):
        return x[:, None]


SMALL = torch.rand(1, 3, 32, 48)


def test_a_network_of_ones_own():
    assert sites(Net(), "auto", example=SMALL) == [PriorSite("end", 8, "nchw", stride=2)]
    assert names(Net(), "stages", example=SMALL) == ["end", "more"]
    assert names(nn.Sequential(nn.Identity(), Net()), "stages", example=SMALL) == ["1.end", "1.more"]


def test_a_network_that_must_run_for_real():
    class ByValues(Net):
        def forward(self, x):
            return super().forward(x * 2 if x.mean().item() > 100 else x)

    assert sites(ByValues(), "stages", example=SMALL) == sites(Net(), "stages", example=SMALL)


def test_a_pass_that_is_begun_anew_is_counted_once():
    class Headless(Net):
        """Its own forward_features is of no use."""

        def forward_features(self, x):
            self.stem(x)
            raise NotImplementedError

    begun, straight = trace(Headless(), SMALL), trace(Net(), SMALL)
    assert [(f.name, f.layers) for f in begun.features] == [(f.name, f.layers) for f in straight.features]
    assert begun.layers == straight.layers == 13
    assert names(Headless(), "stages", example=SMALL) == ["end", "more"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("twice", r"site='twice' cannot be used in Net\. twice: is called 2 times in one pass\. Usable: stem"),
        ("pair", r"pair: returns a tuple"),
        ("mixed", r"mixed: its output \(B, 1, 16, 8, 12\) is not a feature map \(4-D or tokens\)"),
        ("head", r"head: its output \(B, 5\) is not a feature map"),
        ("unused", r"unused: is never called with what depends on the image"),
        ("mor", r"matches no module of Net.*Did you mean 'more'"),
        ("stage", r"Did you mean 'stages'"),
        (
            "nothing.*",
            r"Usable: .* stem \(8 channels, stride 2\), .*more \(16 channels, stride 4\).* Places: auto, stages",
        ),
        ("re:(", r"'re:\(' is not a regular expression"),
        ("re:nothing", r"site='re:nothing' matches no module"),
    ],
)
def test_a_pattern_that_matches_nothing_says_why_and_what_there_is(pattern, message):
    with pytest.raises(ValueError, match=message):
        names(Net(), pattern, example=SMALL)


def test_a_long_list_is_cut_and_begins_with_the_outermost(find):
    with pytest.raises(ValueError, match=r"Did you mean 'blocks\.6'") as error:
        find("blocks.9")
    listing = str(error.value)
    assert listing.count("stride") == 20
    assert "blocks.2 (32 channels, stride 8)" in listing
    assert "conv_dw" not in listing


def test_a_host_without_features_says_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, 4))
    for pattern in ("auto", "stages", "0"):
        with pytest.raises(
            ValueError, match=r"finds nothing.*no module of Sequential does: 0 \(its output \(B, 4608\)"
        ):
            names(model, pattern, example=SMALL)


def test_names_globs_regexes_and_lists(find):
    assert find("blocks.1") == ["blocks.1"]
    assert find("blocks.?") == [f"blocks.{i}" for i in range(7)]
    assert find(r"re:^blocks\.[12]$") == ["blocks.1", "blocks.2"]
    assert find("blocks.4", "auto", "conv_stem") == ["conv_stem", "blocks.0", "blocks.4"]
    assert find("auto", "blocks.0", "blocks.[0]") == ["blocks.0"]
    # the last module of a block returns what the block returns: one place, by its outermost name
    inside = find(r"re:^blocks\.0\.")
    assert inside[0] == "blocks.0.0.conv_dw"
    assert inside[-1] == "blocks.0.0"
    assert "blocks.0.0.bn2" not in inside
    assert find("blocks.0.0.bn2") == ["blocks.0.0.bn2"]


def test_windows_and_heads_are_no_features():
    model = build("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0\.attn: its output has other things than images"):
        names(model, "layers.0.blocks.0.attn")
    model = build("vit_base_patch16_224", qk_norm=True)
    with pytest.raises(ValueError, match=r"q_norm: its output \(B, 12, 197, 64\) is not a picture"):
        names(model, "blocks.0.attn.q_norm")


@pytest.mark.parametrize("order", ["first", "channels"])
def test_tokens_need_a_grid_and_channels_last(order):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.swap = nn.Conv2d(3, 50, 8, 8), nn.LayerNorm(50), nn.Linear(24, 24)

        def forward(self, x):
            x = self.embed(x).flatten(2)
            return self.swap(x) if order == "channels" else self.norm(x.transpose(1, 2)[:, :21])

    name = "swap" if order == "channels" else "norm"
    with pytest.raises(ValueError, match=r"swap: its output|norm: .* 21 tokens, which are no grid .* 32×48"):
        names(Tokens(), name, example=SMALL)


def test_registers_and_oblong_grids():
    (site,) = sites(build("vit_small_patch14_reg4_dinov2", img_size=(98, 196)), "blocks.3")
    assert (site.prefix, site.grid, site.stride) == (5, (7, 14), 14)


class Prior(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


def test_what_was_put_in_is_no_part_of_the_host(mobilenet, find):
    model = build("mobilenetv2_100")
    layer = model.get_submodule("blocks.0")
    layer.quac_prior = Prior(16).to("meta")
    layer.register_forward_hook(lambda layer, args, output: layer.quac_prior(output))
    seen = trace(model)
    assert seen.layers == mobilenet[1].layers
    assert names(model, "stages", seen=seen) == find("stages")
    assert not any("quac_" in name for name in names(model, "re:.", seen=seen))
    with pytest.raises(ValueError, match=r"blocks\.0\.quac_prior\.conv: belongs to what was put in"):
        names(model, "blocks.0.quac_prior.conv", seen=seen)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_quality_driven_activations_do_not_move_the_sites(name):
    host, driven = timm.create_model(name), timm.create_model(f"{name}_qacon").eval()
    before, after = trace(host), trace(driven)
    assert names(driven, "stages", seen=after) == names(host, "stages", seen=before)
    assert after.layers == before.layers
    with torch.no_grad():  # and the pass leaves nothing behind that a real one minds
        assert torch.isfinite(driven(torch.rand(2, 3, *before.image_size))).all()


def test_hosts_that_return_several_features():
    assert names(build("resnet18", features_only=True), "stages") == ["layer1", "layer2", "layer3", "layer4"]
    plain = names(build("ghostnet_050"), "stages")
    assert names(build("ghostnet_050", features_only=True), "stages") == [name.replace(".", "_") for name in plain]
    segmentation = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    assert names(segmentation, "auto") == ["backbone.layer1"]


def test_the_end_of_a_network_inside_is_no_place_since_its_forward_intermediates_goes_past_it():
    inside = build("test_resnet", num_classes=0, global_pool="")
    host = nn.Sequential(inside, nn.Flatten(2), nn.Linear(49, 2, device="meta"))
    assert names(host, "stages") == [f"0.{name}" for name in names(inside, "stages")]
    assert names(host, "0") == ["0"]
