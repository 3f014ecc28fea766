"""Putting a degradation prior in and taking it out, alone and beside QuAC: the host is its own again afterwards."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from outcomes import REFUSED, RIGHT, held_to
from passes import gradients, one_forward, two_forwards
from small_hosts import small_host
from timm.layers import set_reentrant_ckpt
from torch import nn

import quac_plugins as quac
from quac_plugins import PriorConfig, QuACConfig, inject, injection_of, remove, use_q
from quac_plugins.core.inject.surgery import take_prior
from quac_plugins.core.prior.fdm import FDM
from quac_plugins.core.prior.routed import RoutedFDM
from quac_plugins.core.quality.given import contexts_of
from quac_plugins.core.quality.tap import QualityTap

HOSTS = ["test_resnet", "test_vit", "test_efficientnet", "test_mambaout", "test_nfnet", "test_byobnet", "swin"]
ROUTED = {"experts": ["fog", "contrast", "snow"]}


def build(name="test_resnet", **kwargs):
    torch.manual_seed(0)
    if name == "swin":  # features (B, H, W, C)
        small = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)}
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **small, **kwargs).eval()
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def size_of(model):
    fixed = "vit" in model.pretrained_cfg["architecture"] or "swin" in model.pretrained_cfg["architecture"]
    return model.pretrained_cfg["input_size"][-1] if fixed else 65  # odd sizes where the host takes them


def moved(model):
    """What was put in, away from its initialization, so that it depends on q where it can."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in quac.adapter_state(model).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.2)
    return model.eval()


def state_of(model):
    """Everything that remove must bring back."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        dict(model.named_modules()),
        [(list(m._forward_hooks.values()), list(m._forward_pre_hooks.values())) for m in model.modules()],
        set(model.__dict__),
    )


def same(one, other):
    return all(torch.equal(one[0][name], other[0][name]) for name in one[0]) and (
        (one[0].keys(), *one[1:]) == (other[0].keys(), *other[1:])
    )


def priors(model):
    return {name: m for name, m in model.named_modules() if name.endswith("quac_prior")}


# -- in and out


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("config", [{}, {"site": "stages", "fdm": "ncrf"}, ROUTED, {"fdm_act": "qacon"}])
def test_host_computes_what_it_did_and_remove_restores_it(name, config, cheap, normalized):
    model = build(name)
    before, images = state_of(model), normalized(2, size_of(model))
    with torch.no_grad():
        expected = model(images)
        last = images.to(memory_format=torch.channels_last)
        expected_last = model(last)
        assert inject(model, PriorConfig(quality=cheap, **config)) is model
        assert torch.equal(model(images), expected)
        assert torch.equal(model(last), expected_last)
        assert not any(p.requires_grad for n, p in model.named_parameters() if "quac_prior" not in n)
        assert {n: t for n, t in model.state_dict().items() if n in before[0]}.keys() == before[0].keys()
        assert not torch.equal(moved(model)(images), expected)
        assert remove(model) is model
        assert torch.equal(model(images), expected)
    assert same(state_of(model), before)
    inject(model, PriorConfig(quality=cheap, **config))  # and again


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout"])
@pytest.mark.parametrize("config", [{"site": "stages"}, {"fdm_act": "qswish"}, ROUTED])
def test_backward_reaches_what_was_put_in_and_nothing_else(name, config, cheap, normalized):
    model = inject(build(name), PriorConfig(quality=cheap, **config))
    for module in priors(model).values():
        module.soft = True  # of a routed prior: all experts
    model(normalized(2, size_of(model))).square().mean().backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    assert missing == {name for name in missing if "quac_prior" not in name}
    assert not any(p.grad is not None for name, p in model.named_parameters() if "quac_prior" not in name)


def test_the_site_repairs_what_comes_after_it(normalized):
    model, images, seen = inject(build(), PriorConfig(site="layer1")), normalized(2, 64), []
    model.layer2.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    model(images)
    prior = model.layer1.quac_prior
    std = torch.arange(prior.site.channels) + 1.0
    with torch.no_grad():
        prior.body[-1].bias.fill_(0.5)
        prior.std.copy_(std)
    model(images)
    torch.testing.assert_close(seen[1], seen[0] + 0.5 * std.view(1, -1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [{}, ROUTED])
def test_dtype_of_the_host(dtype, config, cheap, normalized):
    model, images = build().to(dtype), normalized(2, 49).to(dtype)
    expected = model(images)
    inject(model, PriorConfig(quality=cheap, **config))
    assert {t.dtype for t in quac.adapter_state(model).values()} == {dtype}
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "swin"])
def test_autocast(name, cheap, normalized):
    model = build(name)
    images = normalized(2, size_of(model))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(images)
        inject(model, PriorConfig(quality=cheap, fdm_act="qacon"))
        assert torch.equal(model(images), expected)


def test_in_place_activations_behind_the_site_and_at_it(cheap):
    for site in ("0", "1", "3"):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.Sequential(nn.ReLU(inplace=True))
        )
        images = torch.rand(2, 3, 17, 19)
        expected = model(images)
        inject(model, PriorConfig(site=site), images)
        assert torch.equal(model(images), expected)
        model(images).square().mean().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "quac_prior" in n)


def test_a_frozen_part_of_the_host_stays_frozen_after_remove_and_what_is_new_is_left_alone():
    model = build()
    model.conv1.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    inject(model, PriorConfig())
    model.reset_classifier(7)
    assert all(p.requires_grad for p in model.fc.parameters())
    remove(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    inject(model, PriorConfig(freeze=False))
    assert {n: p.requires_grad for n, p in model.named_parameters() if "quac_prior" not in n} == before


def test_what_is_put_into_a_frozen_part_has_its_mode():
    model = build().train()
    model.layer1.eval()
    inject(model, PriorConfig(site=["layer1", "layer2"]))
    assert [m.training for m in priors(model).values()] == [False, True]


def test_without_q_nothing_is_tapped(cheap, normalized):
    model = inject(build(), PriorConfig(quality=cheap))
    assert injection_of(model).prior.tap is None
    assert not any(isinstance(m, QualityTap) for m in model.modules())
    with (
        pytest.raises(ValueError, match="no QuAC inside that reads q"),
        use_q(model, torch.rand(2, 6)),
    ):
        pass


def test_meta_hosts_are_materialized_later(normalized):
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=5)
    inject(model, PriorConfig())
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    whole = moved(inject(build(), PriorConfig()))
    model.load_state_dict(whole.state_dict(), assign=True)
    torch.testing.assert_close(model.eval()(normalized(2, 48)), whole(normalized(2, 48)))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (PriorConfig(site="nowhere"), ValueError),
        (PriorConfig(quality="brisk", experts=["fog"]), ValueError),
        (PriorConfig(mean=(0.5, 0.5), std=(0.5, 0.5), experts=["fog"]), ValueError),
        ({"site": "layer1"}, TypeError),
    ],
)
def test_a_refused_injection_leaves_the_host_as_it_was(config, error):
    for model in (build(), inject(build(), QuACConfig())):
        before, record = state_of(model), copy.copy(injection_of(model))
        with pytest.raises(error):
            inject(model, config)
        assert same(state_of(model), before)
        assert injection_of(model) == record


def test_twice_is_an_error_that_leaves_the_first(cheap, normalized):
    model = moved(inject(build(), PriorConfig()))
    expected = model(normalized(2, 48))
    with pytest.raises(ValueError, match=r"already holds a prior; call quac_plugins\.remove"):
        inject(model, PriorConfig())
    assert torch.equal(model(normalized(2, 48)), expected)


# -- beside QuAC


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize(("first", "config"), [("prior", ROUTED), ("quac", {"site": "stages", "fdm_act": "qacon"})])
def test_beside_quac_in_either_order(name, first, config, cheap, normalized):
    model = build(name)
    before, images = state_of(model), normalized(2, size_of(model))
    sites = [s.name for s in injection_of(inject(copy.deepcopy(model), PriorConfig(**config))).prior.sites]
    configs = [PriorConfig(quality=cheap, **config), QuACConfig(quality=cheap, where="all", norm="layer")]
    with torch.no_grad():
        expected = model(images)
        for one in configs if first == "prior" else configs[::-1]:
            inject(model, one)
        record = injection_of(model)
        assert [s.name for s in record.prior.sites] == sites
        assert not any("quac_prior" in s.name for s in record.sites)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert names == {n for n in quac.adapter_state(model) if n in dict(model.named_parameters())}
        other = moved(copy.deepcopy(model))
        assert not torch.equal(other(images), expected)
        for one in (other, model):
            assert torch.equal(remove(one)(images), expected)
    assert same(state_of(model), before)


@pytest.mark.parametrize(
    ("name", "site", "where"),
    [
        ("test_resnet", "act1", "all"),  # QuAC replaces the module that the prior comes after
        ("test_vit", "norm", "last"),  # both come after one module
        ("test_byobnet", ["auto", "stages"], "all"),
    ],
)
def test_both_orders_compute_the_same(name, site, where, cheap, normalized):
    configs = [PriorConfig(site=site, quality=cheap), QuACConfig(quality=cheap, where=where, norm="layer")]
    outputs, states = [], []
    for order in (configs, configs[::-1]):
        model = build(name)
        keys = set(model.state_dict())
        for config in order:
            inject(model, config)
        states.append(quac.adapter_state(moved(model)))
        assert set(states[-1]) == {key for key in model.state_dict() if key not in keys and ".host." not in key}
        model.load_state_dict(states[0], strict=False)
        outputs.append(model(normalized(2, size_of(model))))
    assert torch.equal(*outputs)


def counting(calls, width=6):
    def count(images):
        calls.append(len(images))
        return torch.cat((images.mean((2, 3)), images.flatten(2).std(2)), dim=1)[:, :width]

    return count


@pytest.mark.parametrize("first", ["prior", "quac"])
def test_one_quality_function_is_computed_once_for_both(first, normalized):
    calls = []
    function = counting(calls)
    configs = [PriorConfig(quality=function, **ROUTED), QuACConfig(quality=function)]
    model = build()
    for config in configs if first == "prior" else configs[::-1]:
        inject(model, config)
    assert len(contexts_of(model)) == 1
    assert sum(isinstance(m, QualityTap) for m in model.modules()) == 1
    calls.clear()
    model(normalized(2, 48))
    assert calls == [2]
    take_prior(model)  # and QuAC keeps it
    model(normalized(2, 48))
    assert calls == [2, 2]
    assert model.conv1[0].quac_tap is not None


@pytest.mark.parametrize("first", ["prior", "quac"])
def test_two_quality_functions_have_a_tap_each(first, normalized):
    calls, others = [], []
    configs = [PriorConfig(quality=counting(calls), **ROUTED), QuACConfig(quality=counting(others, 3))]
    model = build()
    for config in configs if first == "prior" else configs[::-1]:
        inject(model, config)
    assert [c.channels for c in contexts_of(model)].count(6) == 1
    images = normalized(2, 48)
    moved(model)
    calls.clear(), others.clear()
    expected = model(images)
    assert (calls, others) == ([2], [2])
    with use_q(model, torch.full((2, 3), 9.0)):  # goes to those of its width
        assert not torch.equal(model(images), expected)
    assert (calls, others) == ([2, 2], [2])
    with use_q(model, torch.rand(2, 6)), use_q(model, torch.rand(2, 3)):
        model(images)
    assert (calls, others) == ([2, 2], [2])
    assert torch.equal(model(images), expected)
    with (
        pytest.raises(ValueError, match=r"\(B, 6\) or \(B, 3\)|\(B, 3\) or \(B, 6\)"),
        use_q(model, torch.rand(2, 5)),
    ):
        pass


def test_other_normalizations_have_a_tap_each(cheap):
    model = inject(build(), QuACConfig(quality=cheap, mean=(0.5,), std=(0.5,)))
    inject(model, PriorConfig(quality=cheap, **ROUTED))
    assert len(contexts_of(model)) == 2


def test_the_prior_alone_can_be_taken_and_put_back(cheap, normalized):
    for configs in (
        [PriorConfig(quality=cheap, **ROUTED), QuACConfig(quality=cheap, norm="layer", where="all")],
        [QuACConfig(quality="brisque"), PriorConfig(quality=cheap, **ROUTED)],
        [PriorConfig(site="stages")],
    ):
        model = build()
        for config in configs:
            inject(model, config)
        moved(model)
        images, record = normalized(2, 48), injection_of(model)
        before, held, prior = state_of(model), priors(model), record.prior
        expected = model(images)
        put_back = take_prior(model)
        assert not priors(model)
        assert record.prior is None
        assert not torch.equal(model(images), expected)
        put_back()
        assert priors(model) == held
        assert injection_of(model).prior is prior
        assert torch.equal(model(images), expected)
        after = state_of(model)
        assert same(after[:3], before[:3])


# -- copies, threads, graphs


@pytest.mark.parametrize("config", [{"fdm_act": "qacon", "site": "stages"}, {**ROUTED, "top_k": 2}])
def test_copies_are_independent(config, cheap, normalized):
    model = inject(build(), QuACConfig(quality="brisque"))
    model = moved(inject(model, PriorConfig(quality=cheap, **config)))
    images = normalized(2, 48)
    expected = model(images)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert not {id(c) for c in contexts_of(other)} & {id(c) for c in contexts_of(model)}
        with use_q(other, torch.full((2, 6), 9.0)):
            assert torch.equal(model(images), expected)
        with torch.no_grad():
            next(iter(priors(other).values())).state_dict()
            for parameter in other.parameters():
                parameter.add_(1)
        assert torch.equal(model(images), expected)
        remove(other)
        assert not priors(other)
        assert torch.equal(model(images), expected)


def test_eight_threads_are_bit_equal_to_one(cheap, photographs):
    model = moved(inject(build(), PriorConfig(site="layer1", quality=cheap, mean=(0.0,), std=(1.0,), **ROUTED)))
    images = [photographs(4, 48)[i % 4 : i % 4 + 1] * (0.2 + 0.1 * i) for i in range(8)]
    gate, q = model.layer1.quac_prior.gate, torch.cat([cheap(image) for image in images])
    with torch.no_grad():
        gate.mean.copy_(q.mean(0))
        gate.std.copy_(q.std(0))
        for layer in (gate.fc1, gate.fc2):
            layer.weight.normal_()
        assert len(set(gate(q).argmax(1).tolist())) > 1
        serial = [model(image) for image in images]

        def work(i):
            torch.set_num_threads(1)
            with torch.no_grad():
                return [model(images[i]) for _ in range(5)]

        with ThreadPoolExecutor(8) as pool:
            for i, outputs in enumerate(pool.map(work, range(8))):
                assert all(torch.equal(output, serial[i]) for output in outputs)


@pytest.mark.parametrize(
    ("name", "config"),
    [("convolutions", {"site": "layer1", "fdm_act": "qacon"}), ("tokens", {"site": "blocks.0", **ROUTED})],
)
def test_compiled_and_exported_whole(name, config, cheap, photographs):
    images = photographs(3, 32)
    model = moved(inject(small_host(name), PriorConfig(quality=cheap, **config), images))
    other = QuACConfig(quality=lambda images: cheap(images)[:, :3], quality_channels=3, norm="layer", where="all")
    inject(model, other, images)
    torch._dynamo.reset()
    dynamic = {0: torch.export.Dim("images", min=2, max=16)}
    exported = torch.export.export(model, (images,), dynamic_shapes=(dynamic,), strict=False).module()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for run, x in ((compiled, images), (compiled, images * 0.3), (exported, images), (exported, images[:2] * 0.3)):
            torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=1e-4)


# -- activation checkpointing


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        tolerance = 1e-4 * float(wanted.abs().max()) + 1e-7
        torch.testing.assert_close(found[name], wanted, atol=tolerance, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("freeze", "reentrant"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("config", [{"fdm_act": "qacon"}, {**ROUTED, "top_k": 9}])
@pytest.mark.parametrize("site", ["act1", "layer2", "layer2.0", "layer2.0.conv1"])
def test_checkpointed_it_is_right_or_refused(site, config, freeze, reentrant, cheap, photographs):
    model = build().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # a recomputation would move the statistics a second time
    moved(inject(model, PriorConfig(site=site, quality=cheap, freeze=freeze, **config))).train()
    one, two = one_forward(photographs), two_forwards(photographs)
    expected_one, expected_two = gradients(model, one), gradients(model, two)
    set_reentrant_ckpt(reentrant)
    try:
        model.set_grad_checkpointing(True)
        close(gradients(model, one), expected_one)
        # two passes under way: act1 is in no checkpoint, and without reentrance the graph tells which pass it is
        with held_to(RIGHT if site == "act1" or not (freeze or reentrant) else REFUSED):
            close(gradients(model, two), expected_two)
        close(gradients(model, one), expected_one)  # also after a refusal
    finally:
        set_reentrant_ckpt(False)


# -- paths through a network


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "swin"])
def test_every_entry_passes_the_prior(name, cheap, normalized):
    model = build(name)
    images = normalized(2, size_of(model))
    with torch.no_grad():
        plain = model.forward_features(images)
        moved(inject(model, PriorConfig(quality=cheap, **ROUTED)))
        features = model.forward_features(images)
        assert not torch.allclose(features, plain)
        torch.testing.assert_close(model.forward_head(features), model(images))
        last, maps = model.forward_intermediates(images)
        torch.testing.assert_close(last, features)
        for one, two in zip(maps, model.forward_intermediates(images, intermediates_only=True), strict=True):
            assert torch.equal(one, two)


def test_kinds_of_modules():
    assert all(isinstance(m, FDM) for m in priors(inject(build(), PriorConfig(site="stages"))).values())
    assert all(isinstance(m, RoutedFDM) for m in priors(inject(build(), PriorConfig(**ROUTED))).values())


@pytest.mark.parametrize("config", [PriorConfig(), QuACConfig()])
def test_what_a_part_or_the_whole_around_it_holds_is_not_put_in_twice(config, normalized):
    """The second would take the place of the first, whose record would then be of nothing."""
    inner = moved(inject(build(), config))
    before, output = state_of(inner), inner(normalized(1, 65))
    for whole in (nn.Sequential(inner), quac.restore_then(inner, lambda images: images)):
        with pytest.raises(ValueError, match=r"the part '(0|model)' of \w+ already holds .*: give that module"):
            inject(whole, config)
        assert same(state_of(inner), before)
    assert torch.equal(inner(normalized(1, 65)), output)
    whole = inject(nn.Sequential(build()), config)
    with pytest.raises(ValueError, match="is a part of a model that already holds"):
        inject(whole[0], config)
    remove(whole)
    inject(whole[0], config)
