"""Adapters with a degradation prior, alone or beside QuAC; what does not fit is refused and leaves the host alone."""

import copy
import json
import shutil
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quac_plugins as quac
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
from quac_plugins.core.inject.adapter import is_fresh
from quac_plugins.core.inject.fingerprint import fingerprint, same_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROUTED = {"experts": ["fog", "contrast"], "top_k": 2}


def host(name="test_resnet", seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def fitted(model, *configs):
    """A host with what the configs say, every tensor of it moved."""
    for config in configs:
        inject(model, config)
    torch.manual_seed(1)
    for tensor in adapter_state(model).values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.1)
    return model.eval()


def untouched(model):
    """Everything a failed load must leave."""
    record = injection_of(model)
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        dict(model.named_modules()),
        [(list(m._forward_hooks.values()), list(m._forward_pre_hooks.values())) for m in model.modules()],
        (record, record.config, record.sites, record.prior) if record else None,
        {name: value for name, value in model.__dict__.items() if not name.startswith("_")},
    )


def same(one, other):
    tensors = one[0].keys() == other[0].keys() and all(torch.equal(one[0][k], other[0][k]) for k in one[0])
    return tensors and one[1:] == other[1:]


CASES = [
    ("test_resnet", [PriorConfig()]),
    ("test_vit", [PriorConfig(site="stages", fdm="ncrf", fdm_width=8)]),
    ("test_efficientnet", [PriorConfig(fdm_act="qacon", quality="brisque")]),
    ("test_mambaout", [PriorConfig(**ROUTED)]),
    ("test_resnet", [QuACConfig(), PriorConfig(**ROUTED, site="stages")]),
    ("test_resnet", [PriorConfig(site="act1"), QuACConfig(where="all", norm="layer")]),
    ("test_convnext", [QuACConfig(where="last"), PriorConfig(site="re:^stages.1$", quality="brisque", **ROUTED)]),
]


@pytest.mark.parametrize(("name", "configs"), CASES)
def test_round_trip_is_bit_equal(name, configs, tmp_path, normalized):
    plain = host(name)
    model = fitted(copy.deepcopy(plain), *configs)
    images = normalized(2, model.pretrained_cfg["input_size"][-1])
    save_adapter(model, tmp_path)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, before = model(images), plain(images)
        assert not torch.equal(expected, before)
        fresh = copy.deepcopy(plain)
        assert load_adapter(fresh, tmp_path) is fresh
        assert torch.equal(fresh.eval()(images), expected)
        again = copy.deepcopy(plain)
        for config in configs:
            inject(again, config)
        assert torch.equal(load_adapter(again, tmp_path).eval()(images), expected)
        refitted = fitted(copy.deepcopy(plain), *configs)
        assert torch.equal(load_adapter(refitted, tmp_path)(images), expected)
        for one in (fresh, again):
            record = injection_of(one)
            assert record.prior.config == injection_of(model).prior.config
            assert record.prior.sites == injection_of(model).prior.sites
            assert record.config == injection_of(model).config
            assert {n for n, p in one.named_parameters() if p.requires_grad} == {
                n for n, p in model.named_parameters() if p.requires_grad
            }
            assert torch.equal(remove(one)(images), before)
    names = set(load_file(tmp_path / WEIGHTS))
    assert names == {n for n in model.state_dict() if n not in plain.state_dict() and ".host." not in n}


def test_several_sites_of_any_name(tmp_path, cheap):
    class Net(nn.Module):
        """Its modules are called as the rules for places are."""

        def __init__(self):
            super().__init__()
            self.stages, self.auto = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.auto(self.stages(x).relu())

    model, images = Net(), torch.rand(2, 3, 16, 16)
    plain = copy.deepcopy(model)
    fitted(model, PriorConfig(site=["re:^stages$", "re:^auto$"]))
    assert [s.name for s in injection_of(model).prior.sites] == ["stages", "auto"]
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(plain, tmp_path, example=images)(images), model(images))


def test_a_quality_function_of_ones_own_is_put_in_first(cheap, tmp_path, normalized):
    config = PriorConfig(quality=cheap, **ROUTED)
    model = fitted(host(), config)
    save_adapter(model, tmp_path)
    fresh = host()
    before = untouched(fresh)
    with pytest.raises(ValueError, match=r"channel_statistics.*inject\(model, PriorConfig\(quality=the function"):
        load_adapter(fresh, tmp_path)
    assert same(untouched(fresh), before)
    assert torch.equal(
        load_adapter(inject(fresh, config), tmp_path).eval()(normalized(2, 48)), model(normalized(2, 48))
    )


def test_wrapped_models(tmp_path, normalized):
    model = fitted(host(), PriorConfig())
    other = host()
    load_adapter(nn.DataParallel(other), save_adapter(nn.DataParallel(model), tmp_path))
    assert torch.equal(other(normalized(2, 48)), model(normalized(2, 48)))


# -- which host


@pytest.mark.parametrize("configs", [[PriorConfig()], [QuACConfig(), PriorConfig()]])
def test_a_host_with_other_weights_is_refused(configs, tmp_path):
    save_adapter(fitted(host(), *configs), tmp_path)
    other = host(seed=3)
    before, saved = untouched(other), json.loads((tmp_path / CONFIG).read_text())["host"]["fingerprint"]
    assert saved == fingerprint(host())
    with pytest.raises(ValueError, match=rf"{saved}.*{fingerprint(other)}.*check_host=False"):
        load_adapter(other, tmp_path)
    assert same(untouched(other), before)
    load_adapter(other, tmp_path, check_host=False)
    assert injection_of(other).prior is not None


def test_quac_alone_is_only_warned_of_other_weights(tmp_path):
    save_adapter(fitted(host(), QuACConfig()), tmp_path)
    with pytest.warns(UserWarning, match="other weights than this host has") as caught:
        load_adapter(host(seed=3), tmp_path)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(host(), tmp_path)
        load_adapter(host(seed=3), tmp_path, check_host=False)


def test_another_architecture_is_refused(tmp_path):
    save_adapter(fitted(host(), PriorConfig()), tmp_path)
    with pytest.raises(ValueError, match="made for 'test_resnet', this host is 'test_efficientnet'"):
        load_adapter(host("test_efficientnet"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_does_not_make_another_host(dtype, tmp_path):
    model = fitted(host(), PriorConfig())
    save_adapter(model, tmp_path / "wide")
    save_adapter(copy.deepcopy(model).to(dtype), tmp_path / "narrow")
    narrow = load_adapter(host().to(dtype), tmp_path / "wide")
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    load_adapter(host(), tmp_path / "narrow")
    with pytest.raises(ValueError, match="other weights"):
        load_adapter(host(seed=3).to(dtype), tmp_path / "wide")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_a_host_with_other_classes_is_the_same_one(name, tmp_path):
    model = fitted(host(name), PriorConfig())
    save_adapter(model, tmp_path)
    other = host(name, seed=3)
    own = {k: v for k, v in model.state_dict().items() if k in other.state_dict()}
    other.load_state_dict(own)
    for classes in (7, 0):
        one = copy.deepcopy(other)
        one.reset_classifier(classes)
        assert injection_of(load_adapter(one, tmp_path)).prior is not None
    one = copy.deepcopy(other)
    with torch.no_grad():
        next(one.parameters()).mul_(1.1)
    with pytest.raises(ValueError, match="other weights"):
        load_adapter(one, tmp_path)


def test_fingerprints_are_of_the_hosts_own_weights(cheap):
    model = host()
    plain = fingerprint(model)
    fitted(
        model, PriorConfig(site="act1", quality=cheap, **ROUTED), QuACConfig(quality=cheap, where="all", norm="layer")
    )
    assert fingerprint(model) == plain
    assert fingerprint(remove(model)) == plain
    kept = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4))
    before = fingerprint(kept)
    inject(kept, QuACConfig(quality=cheap, norm="layer"), torch.rand(1, 3, 8, 8))
    assert fingerprint(kept) == before
    with torch.no_grad():
        kept[1].host.weight.add_(1)
    assert not same_weights(fingerprint(kept), before)
    assert fingerprint(host().to("meta")) is None
    assert same_weights(None, before)


# -- what the host holds already


@pytest.mark.parametrize("there", [PriorConfig(site="layer2", fdm="ncrf"), PriorConfig(**ROUTED), PriorConfig()])
@pytest.mark.parametrize("here", [PriorConfig(), PriorConfig(site="stages", fdm_act="qacon", freeze=False)])
def test_a_prior_that_was_never_fitted_makes_room(there, here, tmp_path, normalized):
    model = fitted(host(), there)
    save_adapter(model, tmp_path)
    other = inject(host(), here)
    assert is_fresh(other)
    load_adapter(other, tmp_path)
    assert not is_fresh(other)
    assert injection_of(other).prior.config == there
    assert torch.equal(other.eval()(normalized(2, 48)), model(normalized(2, 48)))
    plain = host()
    remove(other)
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        ([PriorConfig()], [PriorConfig(fdm="ncrf")], "fdm is 'ncrf' in the adapter, 'light' in this host"),
        ([PriorConfig()], [PriorConfig(fdm_width=8)], "fdm_width is 8 in the adapter, None"),
        ([PriorConfig(site="layer1")], [PriorConfig(site="layer2")], "site 'layer2' is in the adapter, not in this"),
        ([PriorConfig(**ROUTED)], [PriorConfig(experts=["contrast", "fog"])], "experts is"),
        ([PriorConfig(**ROUTED)], [PriorConfig(quality="brisque", **ROUTED)], "quality is 'brisque'"),
        ([PriorConfig()], [QuACConfig()], "activations: in the adapter only"),
        ([QuACConfig()], [PriorConfig()], "a prior: in the adapter only"),
        ([PriorConfig()], [QuACConfig(), PriorConfig()], "activations: in the adapter only"),
        ([QuACConfig(), PriorConfig()], [QuACConfig()], "a prior: in the host only"),
        ([QuACConfig(), PriorConfig()], [QuACConfig(norm="layer"), PriorConfig()], "norm is 'layer'"),
    ],
)
def test_a_fitted_one_that_differs_is_refused(here, there, message, tmp_path, normalized):
    save_adapter(fitted(host(), *there), tmp_path)
    model = fitted(host(), *here)
    before, output = untouched(model), model(normalized(1, 48))
    with pytest.raises(ValueError, match=f"does not fit this host, which was left as it was: .*{message}"):
        load_adapter(model, tmp_path)
    assert same(untouched(model), before)
    assert torch.equal(model(normalized(1, 48)), output)


def test_other_settings_of_use_are_the_hosts_own(tmp_path):
    """How many experts an image is sent to and whether the host is frozen do not change what the tensors mean."""
    save_adapter(fitted(host(), PriorConfig(experts=["fog", "snow"], top_k=1)), tmp_path)
    model = inject(host(), PriorConfig(experts=["fog", "snow"], top_k=2, freeze=False))
    with pytest.warns(UserWarning, match="saved with top_k=1; the prior of this host keeps its own, 2"):
        load_adapter(model, tmp_path)
    assert model.act1.quac_prior.top_k == 2
    assert model.conv1[0].weight.requires_grad


def test_other_weights_of_the_quality_function_are_told(tmp_path):
    save_adapter(fitted(host(), PriorConfig(experts=["fog", "snow"])), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    own = quac.resolve_quality("degradation").weights
    assert config["qualities"] == {"degradation": own}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(host(), tmp_path)
    config["qualities"] = {"degradation": "0123456789abcdef"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=f"other weights of the quality function .*0123456789abcdef, here {own}"):
        load_adapter(host(), tmp_path)


def test_a_fresh_prior_and_quac_beside_it(tmp_path, normalized):
    model = fitted(host(), QuACConfig(), PriorConfig(site="layer2", fdm="ncrf", quality="brisque"))
    save_adapter(model, tmp_path)
    other = inject(inject(host(), QuACConfig()), PriorConfig())
    load_adapter(other, tmp_path)
    assert torch.equal(other.eval()(normalized(2, 48)), model(normalized(2, 48)))
    third = inject(inject(host(), PriorConfig()), QuACConfig(reduction=4))
    before = untouched(third)
    with pytest.raises(ValueError, match="reduction is 16 in the adapter, 4 in this host"):
        load_adapter(third, tmp_path)  # after the fresh prior has made room
    assert same(untouched(third), before)


# -- files


def test_adapters_of_the_first_format_still_load(tmp_path, normalized):
    model = fitted(host(), QuACConfig(norm="layer"))
    save_adapter(model, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["format"] == 1
    assert "prior" not in values
    first = {  # as it was written then
        "peft_type": "QUAC",
        "format": 1,
        "config": values["config"],
        "sites": values["sites"],
        "tap": "conv1.0",
        "host": {"architecture": "test_resnet", "tag": "r160_in1k"},
    }
    (tmp_path / CONFIG).write_text(json.dumps(first, indent=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_adapter(host(), tmp_path)
    assert torch.equal(loaded.eval()(normalized(2, 48)), model(normalized(2, 48)))
    assert injection_of(loaded).prior is None


def put(**changes):
    """Set fields of the config; ``a__b`` is b in a, and KeyError takes it out."""

    def change(folder):
        values = json.loads((folder / CONFIG).read_text())
        for path, value in changes.items():
            *parents, last = path.split("__")
            target = values
            for key in parents:
                target = target[int(key) if key.isdigit() else key]
            if value is KeyError:
                del target[last]
            else:
                target[last] = value
        (folder / CONFIG).write_text(json.dumps(values))

    return change


def tensors(change):
    def damage(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)
        put(sha256=KeyError)(folder)

    return damage


SITE = {"name": "act1", "channels": 32, "layout": "nchw", "prefix": 0, "grid": None, "stride": 2}
KEY = "act1.quac_prior.experts.0.body.0.weight"
CONFIG_DAMAGES = {
    "nothing inside": (put(prior=None), "neither activations nor a prior"),
    "prior is a list": (put(prior=[]), ""),
    "prior is text": (put(prior="light"), ""),
    "prior is a number": (put(prior=3), ""),
    "prior is empty": (put(prior={}), "lacks 'sites'"),
    "no config": (put(prior__config=KeyError), "lacks 'config'"),
    "config is null": (put(prior__config=None), ""),
    "config is a list": (put(prior__config=["fog"]), "unknown fields of PriorConfig: fog"),
    "unknown field": (put(prior__config__colour="red"), "unknown fields of PriorConfig: colour"),
    "no sites": (put(prior__sites=[]), "sites of the prior must be at least one"),
    "sites are null": (put(prior__sites=None), ""),
    "sites are a number": (put(prior__sites=3), ""),
    "sites are text": (put(prior__sites="act1"), ""),
    "a site is null": (put(prior__sites=[None]), ""),
    "a site is text": (put(prior__sites=["act1"]), ""),
    "a site is a list": (put(prior__sites=[["act1"]]), ""),
    "a site twice": (put(prior__sites=[SITE, SITE]), "different ones"),
    "a site without a name": (put(prior__sites__0__name=KeyError), "'name'"),
    "a site without channels": (put(prior__sites__0__channels=KeyError), "'channels'"),
    "a site without a grid": (put(prior__sites__0__grid=KeyError), "'grid'"),
    "a site has more fields": (put(prior__sites__0__more=1), "more"),
    "a site's name is a number": (put(prior__sites__0__name=3), "a site of the prior is"),
    "a site's layout is unknown": (put(prior__sites__0__layout="nhcw"), "a site of the prior is"),
    "a site's layout is a list": (put(prior__sites__0__layout=["nchw"]), ""),
    "a site's channels are text": (put(prior__sites__0__channels="32"), "a site of the prior is"),
    "a site's channels are true": (put(prior__sites__0__channels=True), "a site of the prior is"),
    "a site without any channel": (put(prior__sites__0__channels=0), "a site of the prior is"),
    "a site's channels are huge": (put(prior__sites__0__channels=10**18), "a site of the prior is"),
    "a site's channels are broken": (put(prior__sites__0__channels=32.5), "a site of the prior is"),
    "a site's prefix is negative": (put(prior__sites__0__prefix=-1), "a site of the prior is"),
    "a site's stride is huge": (put(prior__sites__0__stride=1 << 40), "a site of the prior is"),
    "a grid of one number": (put(prior__sites__0__grid=[7]), "a site of the prior is"),
    "a grid of three": (put(prior__sites__0__grid=[7, 7, 7]), "a site of the prior is"),
    "a grid of text": (put(prior__sites__0__grid="77"), "a site of the prior is"),
    "a grid of nothing": (put(prior__sites__0__grid=[0, 7]), "a site of the prior is"),
    "a grid is a number": (put(prior__sites__0__grid=7), ""),
    "a grid is an object": (put(prior__sites__0__grid={"h": 7, "w": 7}), "a site of the prior is"),
    "tokens without a grid": (put(prior__sites__0__layout="tokens"), "a site of the prior is"),
    "site is a number": (put(prior__config__site=5), "site must be"),
    "site is empty": (put(prior__config__site=[]), "site must be"),
    "site is a list of numbers": (put(prior__config__site=[5]), "site must be"),
    "fdm is unknown": (put(prior__config__fdm="lite"), "unknown FDM 'lite'"),
    "fdm is a list": (put(prior__config__fdm=["light"]), "unknown FDM"),
    "fdm_width is zero": (put(prior__config__fdm_width=0), "fdm_width must be"),
    "fdm_width is text": (put(prior__config__fdm_width="32"), "fdm_width must be"),
    "fdm_width is huge": (put(prior__config__fdm_width=10**18), "fdm_width must be"),
    "fdm_act is unknown": (put(prior__config__fdm_act="swish"), "unknown fdm_act 'swish'"),
    "fdm_act is an object": (put(prior__config__fdm_act={}), "unknown fdm_act"),
    "fdm_act reads q": (put(prior__config__fdm_act="qacon"), "fdm_act='qacon' needs q"),
    "experts are text": (put(prior__config__experts="fog"), "experts must be a list"),
    "experts are a number": (put(prior__config__experts=2), "experts must be a list"),
    "experts are null": (put(prior__config__experts=None), "experts must be a list"),
    "experts are numbers": (put(prior__config__experts=[1, 2]), "experts must be a list"),
    "too many experts": (put(prior__config__experts=[str(i) for i in range(300)]), "at most 256"),
    "top_k is zero": (put(prior__config__top_k=0), "top_k must be"),
    "top_k is text": (put(prior__config__top_k="all"), "top_k must be"),
    "freeze is text": (put(prior__config__freeze="no"), "freeze must be"),
    "quality is a number": (put(prior__config__quality=3), "quality must be"),
    "quality_grad is text": (put(prior__config__quality_grad="no"), "quality_grad must be"),
    "quality_channels is text": (put(prior__config__quality_channels="47"), "quality_channels must be"),
    "channel_order is a list": (put(prior__config__channel_order=["rgb"]), "unknown channel_order"),
    "mean without std": (put(prior__config__mean=[0.5]), "go together"),
    "mean is text": (put(prior__config__mean="12", prior__config__std=[1.0]), "mean must be"),
    "mean is huge": (put(prior__config__mean=[10**400], prior__config__std=[1.0]), "mean must be"),
    "std is not a number": (put(prior__config__mean=[0.5], prior__config__std=[float("nan")]), "std must be"),
    "std is zero": (put(prior__config__mean=[0.5], prior__config__std=[0]), "std must be positive"),
}  # fmt: skip
FIT_DAMAGES = {
    "an unknown site": (put(prior__sites__0__name="act9"), "site 'act9' is in the adapter, not in this host"),
    "a site without features": (put(prior__sites__0__name="fc"), "fc"),
    "a site that is a pattern": (put(prior__sites__0__name="re:(a+)+$"), r"site 're:\(a\+\)\+\$' is in the adapter"),
    "a site that is a rule": (put(prior__sites__0__name="auto"), "site 'auto' is in the adapter, not in this host"),
    "another layout": (put(prior__sites__0__layout="nhwc"), "layout"),
    "quality is unknown": (put(prior__config__quality="brisk"), "unknown quality function 'brisk'"),
    "quality has another width": (put(prior__config__quality="brisque"), "gate.*expected"),
    "mean of two numbers": (put(prior__config__mean=[0, 0], prior__config__std=[1, 1]), "mean and std have 2 numbers"),
    "another fdm": (put(prior__config__fdm="ncrf"), "missing tensor"),
    "a larger width": (put(prior__config__fdm_width=60000), "has shape"),
    "more channels": (put(prior__sites__0__channels=1 << 19), "has shape"),
    "more experts": (put(prior__config__experts=[str(i) for i in range(200)]), "missing tensor"),
    "fewer experts": (put(prior__config__experts=["fog"]), "tensor"),
    "missing tensor": (tensors(lambda s: s.pop(KEY)), f"missing tensor '{KEY}'"),
    "surplus tensor": (tensors(lambda s: s.update(more=torch.ones(1))), "surplus tensor 'more'"),
    "a tensor of the host": (tensors(lambda s: s.update({"fc.bias": torch.ones(5)})), "surplus tensor 'fc.bias'"),
    "wrong shape": (tensors(lambda s: s.update({KEY: torch.ones(1, 3)})), rf"'{KEY}' has shape \(1, 3\)"),
    "wrong kind": (tensors(lambda s: s.update({KEY: s[KEY].int()})), rf"'{KEY}' holds torch.int32"),
    "not a number": (tensors(lambda s: s[KEY].fill_(float("nan"))), f"'{KEY}' holds NaN or infinity"),
}  # fmt: skip


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    return save_adapter(fitted(host(), PriorConfig(**ROUTED)), tmp_path_factory.mktemp("undamaged"))


@pytest.fixture(scope="module")
def hosts():
    """A plain host, one with another prior that was never fitted, one with a fitted one, one with QuAC."""
    return [
        host(),
        inject(host(), PriorConfig(site="layer2")),
        fitted(host(), PriorConfig(**ROUTED)),
        inject(inject(host(), QuACConfig()), PriorConfig()),
    ]


@pytest.mark.parametrize("damage", [*CONFIG_DAMAGES, *FIT_DAMAGES])
def test_a_damaged_adapter_is_refused_and_the_host_left_as_it_was(damage, undamaged, hosts, tmp_path, normalized):
    change, message = {**CONFIG_DAMAGES, **FIT_DAMAGES}[damage]
    folder = tmp_path / "adapter"
    shutil.copytree(undamaged, folder)
    change(folder)
    where = str(folder / CONFIG) if damage in CONFIG_DAMAGES else str(folder)
    for model in hosts if damage in FIT_DAMAGES else hosts[:1]:
        if model is hosts[2] and damage in ("quality is unknown", "mean of two numbers", "more channels"):
            continue  # the host has what is at fault in the file, and its own is used
        before, output = untouched(model), model.eval()(normalized(1, 48))
        with pytest.raises(ValueError, match=message if model in hosts[:2] else "does not fit") as caught:
            load_adapter(model, folder)
        assert where in str(caught.value)
        assert same(untouched(model), before)
        assert torch.equal(model(normalized(1, 48)), output)


def test_numbers_that_the_hosts_dtype_cannot_hold(undamaged, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(undamaged, folder)
    tensors(lambda s: s[KEY].fill_(1e6))(folder)
    load_adapter(host(), folder)
    with pytest.raises(ValueError, match=rf"'{KEY}' holds NaN or infinity \(as torch.float16\)"):
        load_adapter(host().half(), folder)


def test_a_host_whose_injection_fails_is_left_as_it_was(undamaged, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError

    for model in (host(), inject(host(), PriorConfig(site="layer2")), inject(host(), QuACConfig())):
        before = untouched(model)
        with monkeypatch.context() as patch:
            patch.setattr("quac_plugins.core.inject.adapter._check", broken)
            with pytest.raises(MemoryError):
                load_adapter(model, undamaged)
        assert same(untouched(model), before)


def test_public_names(undamaged):
    assert quac.load_adapter(host(), undamaged) is not None


def test_deviations_that_are_not_positive_are_refused(tmp_path):
    save_adapter(fitted(host(), PriorConfig()), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    name = next(name for name in state if name.endswith(".quac_prior.std"))
    state[name][3] = 0
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    put(sha256=KeyError)(tmp_path)
    with pytest.raises(ValueError, match=r"quac_prior\.std' holds deviations that are not positive"):
        load_adapter(host(), tmp_path)
