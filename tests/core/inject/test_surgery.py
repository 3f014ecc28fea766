"""Putting in and taking out: the host is its own again afterwards."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import quac_plugins as quac
from quac_plugins import QuACConfig, QualityError, inject, injection_of, remove
from quac_plugins.core.activations import ACTIVATIONS
from quac_plugins.core.inject.surgery import WidthSwitch

SIZES = {"test_vit": 160, "mixer_s32_224": 224}


def build(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def drive(model):
    """Make every put-in activation depend on q."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fc3" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)


HOSTS = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet", "test_maxvit"]


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("where", ["auto", "all", "last"])
def test_host_computes_what_it_did_and_remove_restores_it(name, where, cheap, normalized):
    model = build(name)
    images = normalized(2, SIZES.get(name, 64 if "vit" not in name else 160))
    keys, modules, hooks = list(model.state_dict()), dict(model.named_modules()), hooks_of(model)
    attributes = set(model.__dict__)
    with torch.no_grad():
        before = model(images)
        assert inject(model, QuACConfig(where=where, quality=cheap)) is model
        assert list(model.state_dict()) != keys
        torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5)
        drive(model)
        assert not torch.equal(model(images), before)
        assert remove(model) is model
        assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    assert hooks_of(model) == hooks
    assert set(model.__dict__) == attributes
    assert injection_of(model) is None
    inject(model, QuACConfig(where=where, quality=cheap))  # and again


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
def test_every_activation_in_a_real_host(activation, norm, cheap, normalized):
    model, images = build("test_resnet"), normalized(2, 48)
    before = model(images)
    inject(model, QuACConfig(activation=activation, norm=norm, quality=cheap))
    torch.testing.assert_close(model(images), before, atol=1e-6, rtol=1e-6)
    record = injection_of(model)
    assert (record.tap is None) == (not ACTIVATIONS[activation].needs_quality)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not hasattr(module, "fc1"):
            module.momentum = 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(normalized(4, 48)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith(record.prefixes()))
    assert torch.isfinite(model.eval()(images)).all()


@pytest.mark.parametrize(
    "build_model",
    [torchvision.models.mobilenet_v3_small, torchvision.models.resnet50, torchvision.models.convnext_tiny],
)
def test_torchvision_hosts(build_model, cheap, normalized):
    torch.manual_seed(0)
    model = build_model(num_classes=5).eval()
    images = normalized(1, 64)
    with torch.no_grad():
        before = model(images)
        inject(model, QuACConfig(quality=cheap, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
        torch.testing.assert_close(model(images), before, atol=1e-4, rtol=1e-4)
        remove(model)
        assert torch.equal(model(images), before)


def test_one_relu_of_several_widths_becomes_one_activation_for_each(cheap, normalized):
    model = torchvision.models.resnet50(num_classes=5)
    inject(model, QuACConfig(quality=cheap, where="layer1.*"))
    switch = model.layer1[0].relu
    assert isinstance(switch, WidthSwitch)
    assert set(switch.widths) == {"64", "256"}
    model.eval()(normalized(1, 64))
    with pytest.raises(ValueError, match="no activation for 32 channels; there are: 64, 256"):
        switch(torch.rand(1, 32, 4, 4))


def test_a_module_that_hangs_at_several_places_is_one_site(cheap):
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), shared, nn.Conv2d(8, 8, 3, padding=1), shared)
    images = torch.rand(2, 3, 16, 16)
    before, keys = model(images), list(model.state_dict())
    inject(model, QuACConfig(quality=cheap, where="all", norm="layer"), images)
    assert model[1] is model[3]
    assert len(injection_of(model).sites) == 1
    torch.testing.assert_close(model(images), before)
    remove(model)
    assert model[1] is shared
    assert model[3] is shared
    assert list(model.state_dict()) == keys


def test_plain_and_token_networks(cheap):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.act = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 12), nn.GELU()
            self.conv, self.act2 = nn.Conv1d(12, 6, 3), nn.ReLU()

        def forward(self, x):
            x = self.act(self.fc(self.embed(x).flatten(2).transpose(1, 2)))
            return self.act2(self.conv(x.transpose(1, 2)))

    model, images = Tokens(), torch.rand(2, 3, 32, 32)
    before = model(images)
    inject(model, QuACConfig(quality=cheap, where="all", norm="layer"), images)
    assert [(s.name, s.channels, s.channel_dim) for s in injection_of(model).sites] == [
        ("act", (12,), -1),
        ("act2", (6,), 1),
    ]
    torch.testing.assert_close(model(images), before)
    assert injection_of(model).tap == "embed"


def test_an_image_that_enters_at_two_layers_is_seen_once(cheap):
    calls = []

    def counting(images):
        calls.append(len(images))
        return cheap(images)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 5, padding=2)
            self.act, self.other = nn.ReLU(), nn.SiLU()

        def forward(self, x):
            return self.act(self.fine(x)) + self.other(self.coarse(x))

    model, images = Two(), torch.rand(2, 3, 16, 16)
    before = model(images)
    inject(model, QuACConfig(quality=counting, quality_channels=6, where="all", norm="layer"), images)
    torch.testing.assert_close(model(images), before)
    assert calls == [2]


def test_an_activation_that_sees_the_image_first_is_both_tap_and_site(cheap):
    model, images = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(2, 3, 8, 8)
    before = model(images)
    inject(model, QuACConfig(quality=cheap, where="all", norm="layer"), images)
    torch.testing.assert_close(model(images), before)
    remove(model)
    assert torch.equal(model(images), before)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("where", [["all", "last"], ["last", "all"], ["2", "last"]])
def test_an_activation_that_is_also_the_last_module_is_replaced_and_followed(where, cheap):
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.rand(2, 3, 8, 8)
    before, keys = model(images), list(model.state_dict())
    inject(model, QuACConfig(quality=cheap, where=where, norm="layer"), images)
    assert [(site.name, site.after) for site in injection_of(model).sites] == [("2", False), ("2", True)]
    torch.testing.assert_close(model(images), before)
    remove(copy.deepcopy(model))
    remove(model)
    assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys
    assert hooks_of(model) == 0


def test_a_host_that_normalizes_its_images_itself_is_tapped_as_a_whole(cheap):
    class Normalizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.conv((x - 0.5) / 0.25))

    model, images = Normalizing(), torch.rand(2, 3, 8, 8)
    before = model(images)
    inject(model, QuACConfig(quality=cheap, norm="layer"), images)
    assert injection_of(model).tap == ""
    torch.testing.assert_close(model(images), before)
    remove(model)
    assert hooks_of(model) == 0


def test_hosts_that_need_an_example(cheap):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 2))
    with pytest.raises(RuntimeError, match="example="):
        inject(model, QuACConfig(quality=cheap))
    assert injection_of(model) is None
    inject(model, QuACConfig(quality=cheap), example=torch.rand(1, 1, 28, 28))
    model(torch.rand(2, 1, 28, 28))


def test_twice_is_an_error_that_leaves_the_first(cheap, normalized):
    model = inject(build("test_resnet"), QuACConfig(quality=cheap))
    record, before = injection_of(model), model(normalized(2, 48))
    with pytest.raises(ValueError, match="already holds QuAC"):
        inject(model, QuACConfig(quality=cheap))
    assert injection_of(model) is record
    assert torch.equal(model(normalized(2, 48)), before)


def test_nothing_to_remove():
    with pytest.raises(ValueError, match="ResNet holds no QuAC"):
        remove(build("test_resnet"))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"where": "nowhere"}, ValueError),
        ({"quality": "brisk"}, ValueError),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, ValueError),
        ({"quality": lambda images: images}, ValueError),
    ],
)
def test_a_refused_injection_leaves_the_host_as_it_was(config, error, normalized):
    model = build("test_resnet")
    before, modules = model(normalized(2, 48)), dict(model.named_modules())
    with pytest.raises(error):
        inject(model, QuACConfig(**config))
    assert dict(model.named_modules()) == modules
    assert hooks_of(model) == 0
    assert injection_of(model) is None
    assert torch.equal(model(normalized(2, 48)), before)
    with pytest.raises(TypeError, match="QuACConfig"):
        inject(model, {"where": "all"})


@pytest.mark.parametrize("where", ["auto", "last"])
def test_remove_on_a_copy_leaves_the_original(where, cheap, normalized):
    model, images = build("test_resnet"), normalized(2, 48)
    plain = model(images)
    inject(model, QuACConfig(quality=cheap, where=where, norm="layer"))
    drive(model)
    driven, keys = model(images), list(model.state_dict())
    other = remove(copy.deepcopy(model))
    assert torch.equal(other(images), plain)
    assert hooks_of(other) == 0
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images), driven)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def test_modes_follow_the_host_in_and_out(cheap):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.RReLU()).train(), torch.rand(2, 3, 16, 16)
    inject(model, QuACConfig(quality=cheap, norm="layer"), images)
    assert model[1].training
    model.eval()
    expected = model(images)
    remove(model)
    assert not model[1].training  # else its slopes would be drawn at random
    torch.testing.assert_close(model(images), expected)


def test_parameters_of_the_host_stay_its_own(cheap):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8))
    prelu, images = model[1], torch.rand(2, 3, 16, 16)
    inject(model, QuACConfig(quality=cheap, norm="layer"), images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(images).sum().backward()
    optimizer.step()
    trained = prelu.weight.detach().clone()
    assert not torch.equal(trained, torch.full((8,), 0.25))
    remove(model)
    assert model[1] is prelu
    assert torch.equal(model[1].weight, trained)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_of_the_host(dtype, cheap, normalized):
    model, images = build("test_resnet").to(dtype), normalized(2, 48).to(dtype)
    before = model(images)
    inject(model, QuACConfig(quality=cheap))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model(images), before)
    assert model(images).dtype == dtype


def test_meta_hosts_are_materialized_later(cheap, normalized):
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=5)
    inject(model, QuACConfig(quality=cheap))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    whole = inject(build("test_resnet"), QuACConfig(quality=cheap))
    model.load_state_dict(whole.state_dict(), assign=True)
    torch.testing.assert_close(model.eval()(normalized(2, 48)), whole(normalized(2, 48)))


def test_wrapped_models(cheap, normalized):
    model = inject(build("test_resnet"), QuACConfig(quality=cheap))
    for wrapped in (nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))):
        assert injection_of(wrapped) is injection_of(model)
    wrapped = nn.DataParallel(model)
    before = model(normalized(2, 48))
    assert remove(wrapped) is wrapped
    assert torch.equal(wrapped(normalized(2, 48)), before)
    assert injection_of(model) is None


def test_a_multiple_of_the_batch_is_expanded_only_as_the_config_says(cheap):
    class Guided(nn.Module):
        """Doubles its batch by hand after the first layer, where a pass on one image cannot show it."""

        def __init__(self):
            super().__init__()
            self.conv, self.act, self.double = nn.Conv2d(3, 4, 3), nn.ReLU(), False

        def forward(self, x):
            x = self.conv(x)
            return self.act(torch.cat((x, x)) if self.double else x)

    images = torch.rand(3, 3, 8, 8)
    for policy in ("error", "tile", "interleave"):
        torch.manual_seed(0)
        model = Guided()
        config = QuACConfig(quality=cheap, where="all", norm="layer", init="paper", expand_q=policy)
        inject(model, config, images)
        single = model(images)
        model.double = True
        if policy == "error":
            with pytest.raises(QualityError, match=r"'act' got 6 rows"):
                model(images)
        else:
            first, second = model(images).chunk(2)
            assert torch.allclose(first, single) == torch.allclose(second, single) == (policy == "tile")


def test_public_names_are_there():
    assert all(hasattr(quac, name) for name in quac.__all__)


# -- the tap


def test_a_tapped_layer_that_was_replaced_is_an_error_and_not_the_last_images_quality(cheap, photographs):
    model = timm.create_model("test_resnet").eval()
    quac.inject(model, quac.QuACConfig(quality=cheap, init="paper", norm="layer"))
    model(photographs(2, 64))
    first = model.conv1[0]
    model.conv1[0] = nn.Conv2d(3, first.out_channels, first.kernel_size, first.stride, first.padding)
    del first
    with pytest.raises(quac.QualityError, match=r"'conv1\.0'.*replaced"):
        model(photographs(2, 64))


def test_images_given_by_name(cheap, photographs):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, pixels):
            return self.act(self.conv(input=pixels))

    class Scaled(Named):
        def forward(self, pixels):
            return self.act(self.conv((pixels - 0.45) / 0.22))

    for host in (Named().eval(), Scaled().eval()):
        images = photographs(2, 32)
        before = host(images)
        quac.inject(host, quac.QuACConfig(quality=cheap, mean=(0.0,), std=(1.0,)))
        assert torch.equal(host(pixels=images), before)
        assert torch.equal(host(images), before)


def test_what_is_put_into_a_frozen_part_is_frozen_with_it(cheap):
    model = timm.create_model("test_resnet").train()
    model.layer1.eval()
    quac.inject(model, quac.QuACConfig(quality=cheap, where="all"))
    assert not any(m.training for m in model.layer1.modules())
    assert all(m.training for m in model.layer2.modules())


def test_a_host_that_takes_more_than_images_says_why(cheap):
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x, t):
            return self.act(self.conv(x)) + t

    with pytest.raises(RuntimeError, match="'t'"):
        quac.inject(Timed(), quac.QuACConfig(quality=cheap))
    with pytest.raises(ValueError, match="example"):
        quac.inject(Timed(), quac.QuACConfig(quality=cheap), example=torch.rand(3, 8, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: quac.inject(nn.ReLU(), where="all"), r"options in a config: inject\(model, QuACConfig\(where='all'\)"),
        (lambda: quac.inject(nn.ReLU(), site="auto"), r"inject\(model, PriorConfig\(site='auto'\)\)"),
        (lambda: quac.inject(nn.ReLU(), "all"), r"a QuACConfig or a PriorConfig, got str: inject\(model, QuACConfig"),
        (lambda: quac.QuACConfig(wher="all"), "QuACConfig: 'wher'; did you mean 'where'"),
        (lambda: timm.create_model("test_resnet_qacon", wher="all"), "takes no 'wher'; did you mean 'where'"),
        (lambda: timm.create_model("test_resnet_qacon", site="auto"), "'site': that is an option of test_resnet_ddp"),
    ],
)
def test_options_that_are_none_are_answered_with_those_that_are(wrong, message):
    with pytest.raises(TypeError, match=message):
        wrong()
