"""Margins at the norms and FDMs at stages in one prior: one gate, one adapter, clean pictures as they were."""

import copy

import pytest
import timm
import torch
from cheap_quality import channel_statistics
from torch import nn

import quac_plugins as quac
from quac_plugins.core.inject.record import modules_inside
from quac_plugins.core.prior.fdm import Light
from quac_plugins.core.prior.margins import Margin, margins_inside
from quac_plugins.core.quality.degradation import KINDS

EXPERTS = ["fog", "contrast"]
HOSTS = ["test_resnet", "test_efficientnet", "test_vit"]


def told(*kinds, severity=3.0):
    q = torch.zeros(len(kinds), len(KINDS) + 1)
    for row, kind in enumerate(kinds):
        q[row, KINDS.index(kind)], q[row, -1] = 1, severity if kind != "clean" else 0
    return q


def both(name, experts=EXPERTS, **options):
    """A host with FDMs and margins that all do something, and what the host alone gives."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        expected = model(images)
        quac.inject(model, quac.PriorConfig(fdm="light", experts=experts, margins=True, **options))
        fresh = model(images)
        inside = [m for module in modules_inside(model).values() for m in module.modules()]
        for module in inside:
            if isinstance(module, Margin):
                nn.init.normal_(module.table, std=0.1)
            elif isinstance(module, Light):
                nn.init.normal_(module.body[-1].weight, std=0.05)
    assert torch.equal(fresh, expected)
    return model, images, expected


@pytest.fixture(scope="module", params=HOSTS)
def host(request):
    return both(request.param)


@pytest.fixture(scope="module")
def resnet():
    return both("test_resnet")


def test_clean_pictures_stay_and_others_are_changed_by_both(host):
    model, images, expected = host
    inside = modules_inside(model)
    assert "prior light and margins for 2 degradations at" in str(quac.injection_of(model))
    kinds = {type(module) for module in inside.values()}
    assert kinds == {Margin, Light}
    with torch.no_grad():
        with quac.use_q(model, told("clean", "fog")):
            y = model(images)
        torch.testing.assert_close(y[:1], expected[:1], atol=1e-4, rtol=1e-4)
        changed = [y]
        for drop in (Margin, Light):
            other = copy.deepcopy(model)
            for module in modules_inside(other).values():
                if isinstance(module, drop):
                    for parameter in [module.table] if drop is Margin else module.body[-1].parameters():
                        parameter.zero_()
                    for margin in margins_inside(module):
                        margin.table.zero_()
            with quac.use_q(other, told("clean", "fog")):
                changed.append(other(images))
    a, b, c = (y[1] for y in changed)
    assert not torch.allclose(a, b, atol=1e-4)
    assert not torch.allclose(a, c, atol=1e-4)


def test_one_adapter_holds_both(host, tmp_path):
    model, images, expected = host
    with torch.no_grad():
        y = model(images)
        quac.save_adapter(model, tmp_path)
        plain = quac.remove(copy.deepcopy(model))
        assert torch.equal(plain(images), expected)
        assert torch.equal(quac.load_adapter(plain, tmp_path)(images), y)
    assert quac.injection_of(plain).prior.config == quac.injection_of(model).prior.config


def test_an_exported_graph_computes_the_same():
    model, images, _ = both("test_resnet", quality=channel_statistics, site="auto")
    with torch.no_grad():
        expected = model(images)
        program = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(program(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("experts", [EXPERTS, []])
def test_the_margins_of_one_degradation_are_folded_and_its_fdms_stay(experts, tmp_path):
    model, images, _ = both("test_resnet", experts)
    with torch.no_grad():
        if experts:
            with quac.use_q(model, told("fog", "fog", severity=2.5)):
                expected = model(images)
        else:
            expected = model(images)
        quac.fuse(model, *["fog"] * bool(experts), severity=2.5)
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
        prior = quac.injection_of(model).prior
        assert not prior.config.needs_quality
        assert not any(isinstance(module, Margin) for module in model.modules())
        quac.save_adapter(model, tmp_path)
        plain = quac.load_adapter(quac.remove(copy.deepcopy(model)), tmp_path)
        assert torch.equal(plain(images), model(images))


def test_with_quality_adaptive_activations_in_one_adapter_too(tmp_path):
    model, images, expected = both("test_efficientnet")
    with torch.no_grad():
        y = model(images)
        quac.inject(model, quac.QuACConfig(where="spatial", quality="degradation", init="preserve"))
        torch.testing.assert_close(model(images), y, atol=1e-4, rtol=1e-4)
        for name, parameter in model.named_parameters():
            if "fc3" in name:
                nn.init.normal_(parameter, std=0.1)
        z = model(images)
        quac.save_adapter(model, tmp_path)
        assert len([name for name in model.state_dict() if name.endswith("gate.fc1.weight")]) == 1
        plain = quac.remove(copy.deepcopy(model))
        assert torch.equal(plain(images), expected)
        assert torch.equal(quac.load_adapter(plain, tmp_path)(images), z)
    assert not torch.allclose(y, z, atol=1e-4)


def test_an_adapter_that_says_otherwise_is_refused(resnet, tmp_path):
    model, _, _ = resnet
    quac.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    other = timm.create_model("test_resnet", num_classes=10).eval()
    quac.inject(other, quac.PriorConfig(fdm="light", experts=EXPERTS))
    other.get_submodule("layer1.quac_prior.experts.0").mean.fill_(1)
    with pytest.raises(ValueError, match="margins is True in the adapter, False in this host"):
        quac.load_adapter(other, tmp_path)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="margins must be True or False, got 1"):
        quac.PriorConfig(margins=1)
    with pytest.raises(ValueError, match="margins alone"):
        quac.PriorConfig(fdm="margin", margins=True)
    with pytest.raises(ValueError, match="no norm of ResNet where there is no FDM already"):
        quac.inject(timm.create_model("test_resnet"), quac.PriorConfig(site="norms", fdm="light", margins=True))
    driven = quac.PriorConfig(fdm_act="qacon", experts=EXPERTS, margins=True)  # one FDM for all, which may read q too
    assert driven.needs_quality
