"""Every way through a network of timm sees a prior alike; benchmarks/timm_paths.py tries the other families."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch
from cheap_quality import channel_statistics
from timm.models import FeatureGraphNet
from timm.models._features import FeatureGetterNet
from timm.models.xception_aligned import PreXceptionModule, XceptionAligned
from torch import nn

from quac_plugins import (
    PriorConfig,
    QuACConfig,
    adapter_state,
    inject,
    injection_of,
    load_adapter,
    remove,
    save_adapter,
)
from quac_plugins.core.inject.sites import usable_sites
from quac_plugins.core.inject.surgery import inject_at

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from timm_paths import check

WAYS = ["forward", "forward_features", "forward_intermediates", "features_only getter", "FeatureGetterNet"]


@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet", "test_vit", "test_resnet"])
def test_every_way_sees_the_prior(name):
    row = check(name)
    assert row["problems"] == []
    assert {*WAYS, "FeatureGraphNet", "features_only fx", "checkpointing"} <= set(row["ways"])


def test_every_way_sees_the_activations():
    row = check("test_resnet", "_qacon")
    assert row["problems"] == []
    assert {*WAYS, "FeatureListNet", "features_only fx", "checkpointing"} <= set(row["ways"])


def test_an_adapter_of_the_container_still_loads(tmp_path, normalized):
    """As they were saved when the last stage's site was the list of all stages."""
    torch.manual_seed(0)
    host = timm.create_model("test_byobnet").eval()
    state, images = host.state_dict(), normalized(1, 64)
    inject(host, PriorConfig(site=["stages.0", r"re:^stages\Z"]))
    assert [site.name for site in injection_of(host).prior.sites] == ["stages.0", "stages"]
    with torch.no_grad():
        host.stages.quac_prior.body[-1].bias.fill_(0.3)
        expected = host(images)
    save_adapter(host, tmp_path)
    for name in ("test_byobnet", "test_byobnet_ddp"):
        fresh = timm.create_model(name).eval()
        fresh.load_state_dict(state, strict=False)
        load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(images), expected)


def test_the_last_place_is_none_that_a_path_goes_past(tmp_path, normalized):
    torch.manual_seed(0)
    host, images = timm.create_model("test_mambaout").eval(), normalized(1, 64)
    config = QuACConfig(where="last", quality="brisque", init="paper", norm="none")
    model = inject(copy.deepcopy(host), config)
    assert [site.name for site in injection_of(model).sites] == ["stages.3"]
    assert torch.equal(model.forward_intermediates(images)[0], model.forward_features(images))
    # an adapter as they were saved when it was the list of all stages
    model = inject_at(copy.deepcopy(host), config, lambda host, _, seen: usable_sites(host, seen)[-1:])
    save_adapter(model, tmp_path)
    loaded = load_adapter(host, tmp_path)
    assert [site.name for site in injection_of(loaded).sites] == ["stages"]
    assert torch.equal(loaded(images), model(images))


def not_the_identity(model):
    with torch.no_grad():
        for name, tensor in adapter_state(model).items():
            if name.endswith(("bias", "p1", "p2")):
                tensor.add_(0.3)
    return model


def xception():
    """Whose forward_intermediates calls a method of its blocks that runs no hook."""
    torch.manual_seed(0)
    widths = [(64, 8, 2), (8, 16, 2), (16, 16, 1)]
    blocks = [{"in_chs": one, "out_chs": other, "stride": stride} for one, other, stride in widths]
    return XceptionAligned(blocks, preact=True, norm_layer=nn.BatchNorm2d, num_classes=2).eval()


def test_blocks_that_are_called_past_their_hooks_have_the_prior():
    images, host = torch.rand(2, 3, 64, 64), xception()
    with torch.no_grad():
        plain = host.forward_intermediates(images)[1]
        model = not_the_identity(inject(host, PriorConfig(site=["blocks.0", "blocks.1"]), images))
        for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            last, found = one.forward_intermediates(images)
            assert torch.equal(last, one.forward_features(images))
            assert [torch.equal(*pair) for pair in zip(found, plain, strict=True)] == [True, False, False]
            assert torch.equal(FeatureGetterNet(copy.deepcopy(one), [1]).eval()(images)[0], found[1])
        getter = inject(FeatureGetterNet(xception(), [0, 1, 2]).eval(), PriorConfig(site="model.blocks.0"), images)
        assert not torch.equal(not_the_identity(getter)(images)[1], plain[1])
        assert torch.equal(remove(model).forward_intermediates(images)[1][2], plain[2])


@pytest.mark.parametrize("config", [PriorConfig(site="1"), QuACConfig(where="last", quality=channel_statistics)])
def test_every_call_of_a_layer_runs_what_is_behind_it(config):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16)
    block = PreXceptionModule(8, 8, norm_layer=nn.BatchNorm2d)
    model = inject(nn.Sequential(nn.Conv2d(3, 8, 3), block).eval(), config, images)
    with torch.no_grad():
        expected, x = not_the_identity(model)(images), model[0](images)
        assert torch.equal(block.forward_with_tap(x)[0], expected)
        remove(model)
        assert torch.equal(block.forward_with_tap(x)[0], block(x))
        assert not torch.equal(block(x), expected)


@pytest.mark.parametrize(
    ("name", "feature_cls", "missing"),
    [
        ("test_resnet", "fx", []),
        ("efficientvim_m1", "hook", []),
        ("selecsls42", "list", ["head.3"]),
        ("hrnet_w18_small", "getter", ["final_layer"]),
    ],
)
def test_networks_of_features_have_the_places_of_the_whole_network(name, feature_cls, missing):
    with torch.device("meta"):
        whole = timm.create_model(f"{name}_ddp")
        features = timm.create_model(f"{name}_ddp", features_only=True, feature_cls=feature_cls)
    expected = [site for site in injection_of(whole).prior.sites if site.name not in missing]
    found = injection_of(features).prior.sites
    assert [(s.channels, s.layout, s.stride) for s in found] == [(s.channels, s.layout, s.stride) for s in expected]


def test_a_network_of_features_without_any_of_the_places():
    with pytest.raises(ValueError, match=r"FeatureListNet has none of the places .* \(layer4\): take more features"):
        timm.create_model("test_resnet_qacon", where="last", features_only=True, out_indices=(0, 1))
    model = timm.create_model("test_resnet_ddp", site=["auto", "layer3"], features_only=True)
    assert [site.name for site in injection_of(model).prior.sites] == ["act1", "layer3"]


def test_a_graph_is_saved_and_built_again(tmp_path, normalized):
    options = {"features_only": True, "feature_cls": "fx", "out_indices": (1, 2)}
    model = not_the_identity(timm.create_model("test_vit_ddp", **options).eval())
    assert type(model) is FeatureGraphNet
    assert model._model_args == {**options, **model._model_args}
    save_adapter(model, tmp_path)
    again = timm.create_model("test_vit_ddp", **options).eval()
    again.load_state_dict(model.state_dict())
    load_adapter(again, tmp_path)
    images = normalized(1, 160)
    with torch.no_grad():
        expected = model(images)
        for one in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(*pair) for pair in zip(one(images), expected, strict=True))
