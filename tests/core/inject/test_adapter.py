"""Adapters: what was put in, to a folder and back; anything else is refused and leaves the host as it was."""

import copy
import hashlib
import json
import pickle
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import quac_plugins as quac
from quac_plugins import QuACConfig, adapter_state, inject, injection_of, load_adapter, remove, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def host(name="test_resnet"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


def trained(model, **config):
    """A host with QuAC whose every parameter and statistic has been moved."""
    inject(model, QuACConfig(**config))
    torch.manual_seed(1)
    for tensor in adapter_state(model).values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.3)
        else:
            tensor.add_(3)
    return model.eval()


def untouched(model):
    """Everything a failed load must leave."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        dict(model.named_modules()),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        injection_of(model),
    )


def same(one, other):
    tensors = one[0].keys() == other[0].keys() and all(torch.equal(one[0][k], other[0][k]) for k in one[0])
    return tensors and one[1:] == other[1:]


@pytest.fixture
def saved(tmp_path):
    return save_adapter(trained(host()), tmp_path / "adapter")


CASES = [
    ("test_resnet", {}),
    ("test_resnet", {"where": "last", "norm": "none"}),
    ("test_resnet", {"where": ["act1", "layer4.*"], "activation": "qswish", "norm": "group", "reduction": 4}),
    ("test_resnet", {"activation": "acon", "where": "all"}),
    ("test_resnet", {"activation": "meta_acon"}),
    ("test_vit", {"activation": "qgelu", "norm": "layer"}),
    ("test_convnext", {"init": "paper", "mean": (0.5,), "std": (0.25,)}),
    ("test_efficientnet", {"where": "re:act$", "activation": "qprelu"}),
]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_round_trip_is_bit_equal(name, config, tmp_path, normalized):
    model = trained(host(name), **config)
    images = normalized(2, model.pretrained_cfg["input_size"][-1])
    folder = save_adapter(model, tmp_path / "new" / "adapter")
    with torch.no_grad():
        expected = model(images)
        fresh = host(name)
        assert load_adapter(fresh, folder) is fresh
        assert torch.equal(fresh.eval()(images), expected)
        again = inject(host(name), QuACConfig(**config))
        assert load_adapter(again, str(folder)) is again
        assert torch.equal(again.eval()(images), expected)
        assert torch.equal(remove(fresh)(images), host(name)(images))
    assert injection_of(again).config == injection_of(model).config
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_only_what_was_put_in_is_saved(name, config, tmp_path):
    base = host(name)
    keys = set(base.state_dict())
    model = trained(base, **config)
    saved = load_file(save_adapter(model, tmp_path) / WEIGHTS)
    added = set(model.state_dict()) - keys
    assert set(saved) == {key for key in added if ".host." not in key}
    assert saved
    for key, tensor in saved.items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_parameters_of_a_kept_activation_are_the_hosts(cheap, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8))

    config = {"quality": cheap, "norm": "layer"}
    model = trained(build(), **config)
    with torch.no_grad():
        model[1].host.weight.fill_(0.77)
    saved = load_file(save_adapter(model, tmp_path) / WEIGHTS)
    assert not any("host" in key for key in saved)
    other = load_adapter(inject(build(), QuACConfig(**config)), tmp_path)
    assert torch.equal(other[1].host.weight, torch.full((8,), 0.25))


def test_a_module_of_the_host_may_be_called_host(cheap, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.host = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
            self.inner = nn.ModuleDict({"host": nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())})

        def forward(self, x):
            return self.inner["host"](self.host(x))

    model = trained(Net(), quality=cheap, where="all")
    saved = load_file(save_adapter(model, tmp_path) / WEIGHTS)
    assert {key.rpartition(".fc1.")[0] for key in saved if ".fc1." in key} == {"host.1", "inner.host.1"}


def test_several_widths(cheap, tmp_path, normalized):
    def build():
        torch.manual_seed(0)
        return torchvision.models.resnet18(num_classes=3).eval()

    config = {"quality": cheap, "where": ["layer1.*", "layer2.*"]}
    model, images = trained(build(), **config), normalized(1, 64)
    other = load_adapter(inject(build(), QuACConfig(**config)), save_adapter(model, tmp_path))
    assert torch.equal(other.eval()(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_in_the_file_and_the_hosts_on_loading(dtype, tmp_path):
    model = trained(host()).to(dtype)
    saved = load_file(save_adapter(model, tmp_path) / WEIGHTS)
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {dtype}
    other = load_adapter(host(), tmp_path)
    assert {p.dtype for p in other.parameters()} == {torch.float32}


def test_wrapped_models(tmp_path, normalized):
    model, images = trained(host()), normalized(2, 48)
    state = adapter_state(model)
    for wrap in (nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))):
        wrapped = wrap(model)
        assert adapter_state(wrapped).keys() == state.keys()
        other = load_adapter(host(), save_adapter(wrapped, tmp_path))
        assert torch.equal(other.eval()(images), model(images))
        into = inject(host(), QuACConfig())
        load_adapter(wrap(into), tmp_path)
        assert torch.equal(into.eval()(images), model(images))


def test_a_quality_function_of_ones_own_is_put_in_first(cheap, tmp_path, normalized):
    model = trained(host(), quality=cheap)
    save_adapter(model, tmp_path)
    fresh = host()
    before = untouched(fresh)
    with pytest.raises(ValueError, match=r"channel_statistics.*inject\(model, QuACConfig\(quality=the function"):
        load_adapter(fresh, tmp_path)
    assert same(untouched(fresh), before)
    load_adapter(inject(fresh, QuACConfig(quality=cheap)), tmp_path)
    assert torch.equal(fresh.eval()(normalized(2, 48)), model(normalized(2, 48)))


# -- refusals


def damage_config(**changes):
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


def damage_tensors(change):
    def damage(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)
        damage_config(sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())(folder)

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def replace_by_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def truncate(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


KEY = "act1.p1"
SITE = {"name": "act1", "channels": [8], "channel_dim": 1, "expand_q": "error", "after": False}
DAMAGES = {
    "no folder": (lambda folder: [p.unlink() for p in folder.iterdir()] and folder.rmdir(), "no adapter at"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "no tensors": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "config is a folder": (replace_by_folder(CONFIG), CONFIG),
    "tensors are a folder": (replace_by_folder(WEIGHTS), WEIGHTS),
    "empty config": (write(CONFIG, b""), "not an adapter's config"),
    "config is no text": (write(CONFIG, bytes(range(256))), "not an adapter's config"),
    "config is a list": (write(CONFIG, b"[]"), "holds a list"),
    "config is null": (write(CONFIG, b"null"), "holds a NoneType"),
    "config without end": (truncate(CONFIG, 100), "not an adapter's config"),
    "deep config": (write(CONFIG, b"[" * 200_000), "not an adapter's config"),
    "huge config": (write(CONFIG, b" " * ((4 << 20) + 1)), "at most"),
    "another method": (damage_config(peft_type="LORA"), "'LORA', not 'QUAC'"),
    "later format": (damage_config(format=3), "format is 3; this version reads 1 and 2"),
    "format is a list": (damage_config(format=[1]), "this version reads 1 and 2"),
    "no sites": (damage_config(sites=KeyError), "lacks 'sites'"),
    "no host": (damage_config(host=KeyError), "lacks 'host'"),
    "host is a number": (damage_config(host=3), "not an adapter's config"),
    "sites are a number": (damage_config(sites=3), "not an adapter's config"),
    "a site is a string": (damage_config(sites=["act1"]), "not an adapter's config"),
    "a site's name is a list": (damage_config(sites=[{**SITE, "name": ["act1"]}]), "a site is"),
    "a site's name is a number": (damage_config(sites__0__name=3), "a site is"),
    "a site's channels are text": (damage_config(sites=[{**SITE, "channels": "8"}]), "a site is"),
    "a site's axis is text": (damage_config(sites=[{**SITE, "channel_dim": "x"}]), "a site is"),
    "a site has more fields": (damage_config(sites=[{**SITE, "more": 1}]), "more"),
    "a site on another axis": (damage_config(sites__0__channel_dim=-1), "channels on axis -1"),
    "unknown field": (damage_config(config__colour="red"), "unknown fields of QuACConfig: colour"),
    "unknown activation": (damage_config(config__activation="relu"), "unknown activation 'relu'"),
    "activation is a list": (damage_config(config__activation=["qacon"]), "activation"),
    "where is a number": (damage_config(config__where=5), "where must be"),
    "where is an object": (damage_config(config__where={"act1": 1}), "where must be"),
    "where is a list of numbers": (damage_config(config__where=[5]), "where must be"),
    "where is empty": (damage_config(config__where=[]), "where must be"),
    "reduction is text": (damage_config(config__reduction="x"), "reduction must be"),
    "reduction is zero": (damage_config(config__reduction=0), "reduction must be"),
    "reduction is true": (damage_config(config__reduction=True), "reduction must be"),
    "norm is a number": (damage_config(config__norm=3), "unknown norm 3"),
    "quality is a number": (damage_config(config__quality=3), "quality must be"),
    "quality is unknown": (damage_config(config__quality="brisk"), "unknown quality function 'brisk'"),
    "quality_grad is text": (damage_config(config__quality_grad="no"), "quality_grad must be"),
    "quality_channels is text": (damage_config(config__quality_channels="6"), "quality_channels must be"),
    "mean without std": (damage_config(config__mean=[0.5]), "go together"),
    "mean is text": (damage_config(config__mean="grey", config__std=[1.0]), "mean must be"),
    "mean is empty": (damage_config(config__mean=[], config__std=[]), "mean must be"),
    "std is not finite": (damage_config(config__mean=[0.5], config__std=[float("nan")]), "std must be"),
    "std is zero": (damage_config(config__mean=[0.5], config__std=[0.0]), "std must be positive"),
    "mean and std of two lengths": (damage_config(config__mean=[0.5], config__std=[1.0, 1.0]), "as many numbers"),
    "another architecture": (damage_config(host__architecture="resnet152"), "'resnet152', this host is 'test_resnet'"),
    "another site": (damage_config(sites__0__name="act9"), "site 'act9' is in the adapter, not in this host"),
    "empty tensors": (write(WEIGHTS, b""), "damaged or not a safetensors"),
    "tensors are garbage": (write(WEIGHTS, b"garbage" * 1000), "damaged or not a safetensors"),
    "tensors are a pickle": (write(WEIGHTS, pickle.dumps({KEY: [1.0]})), "damaged or not a safetensors"),
    "tensors cut short": (truncate(WEIGHTS, -100), "damaged or not a safetensors"),
    "header cut short": (truncate(WEIGHTS, 20), "damaged or not a safetensors"),
    "missing tensor": (damage_tensors(lambda s: s.pop(KEY)), f"missing tensor '{KEY}'"),
    "surplus tensor": (damage_tensors(lambda s: s.update(more=torch.ones(1))), "surplus tensor 'more'"),
    "a tensor of the host": (damage_tensors(lambda s: s.update({"fc.bias": torch.ones(5)})), "surplus tensor 'fc"),
    "wrong shape": (damage_tensors(lambda s: s.update({KEY: torch.ones(1, 3)})), rf"'{KEY}' has shape \(1, 3\)"),
    "wrong kind": (damage_tensors(lambda s: s.update({KEY: s[KEY].int()})), rf"'{KEY}' holds torch.int32"),
    "not a number": (damage_tensors(lambda s: s[KEY].fill_(float("nan"))), f"'{KEY}' holds NaN or infinity"),
    "infinite": (damage_tensors(lambda s: s[KEY].fill_(float("inf"))), f"'{KEY}' holds NaN or infinity"),
    "no tensor at all": (damage_tensors(lambda s: s.clear()), "missing tensor .*; and [0-9]+ more"),
}  # fmt: skip


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    folder = save_adapter(trained(host()), tmp_path_factory.mktemp("undamaged"))
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_host_left_as_it_was(damage, undamaged, tmp_path, normalized):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in undamaged.items():
        (folder / name).write_bytes(content)
    change, message = DAMAGES[damage]
    change(folder)
    for model in (host(), inject(host(), QuACConfig())):
        if damage == "quality is unknown" and injection_of(model) is not None:
            continue  # how the injected host's quality was named does not matter
        before, output = untouched(model), model.eval()(normalized(1, 48))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_adapter(model, folder)
        assert same(untouched(model), before)
        assert torch.equal(model(normalized(1, 48)), output)


def test_an_error_names_the_first_tensors_and_counts_the_rest(saved):
    damage_tensors(lambda s: [s.pop(key) for key in list(s)[:9]])(saved)
    with pytest.raises(ValueError, match=r"(missing tensor '[^']+'; ){4}missing tensor '[^']+'; and 4 more"):
        load_adapter(host(), saved)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"activation": "qswish"}, {"activation": "qgelu"}),
        ({"activation": "qswish"}, {"activation": "qprelu"}),
        ({"norm": "layer"}, {"norm": "group"}),
        ({"norm": "layer"}, {"norm": "batch"}),
        ({"init": "preserve"}, {"init": "paper"}),
        ({"where": "spatial"}, {"where": "all"}),
        ({"reduction": 16}, {"reduction": 8}),
        ({"activation": "qacon"}, {"activation": "acon"}),
    ],
)
def test_an_adapter_of_another_injection_is_refused_also_where_all_shapes_agree(there, here, tmp_path):
    save_adapter(trained(host(), **there), tmp_path)
    model = inject(host(), QuACConfig(**here))
    before = untouched(model)
    with pytest.raises(ValueError, match="does not fit this host, which was left as it was"):
        load_adapter(model, tmp_path)
    assert same(untouched(model), before)


def test_another_architecture_is_tried_only_if_asked(tmp_path, normalized):
    save_adapter(trained(host("test_resnet")), tmp_path)
    with pytest.raises(ValueError, match="'test_resnet', this host is 'test_efficientnet'"):
        load_adapter(host("test_efficientnet"), tmp_path)
    other = host("test_efficientnet")
    before = untouched(other)
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(other, tmp_path, check_host=False)
    assert same(untouched(other), before)
    renamed = host("test_resnet")
    renamed.pretrained_cfg = {**renamed.pretrained_cfg, "architecture": "my_resnet"}
    load_adapter(renamed, tmp_path, check_host=False)
    assert injection_of(renamed) is not None


@pytest.mark.parametrize("source", ["", "nothing", "a/b/c", "/nowhere/at/all", "../nothing", "~/nothing", "org/name"])
def test_no_adapter_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = host()
    before = untouched(model)
    with pytest.raises(FileNotFoundError, match=r"no adapter|'org/name'.* is not in the cache .* HF_HUB_OFFLINE"):
        load_adapter(model, source)
    assert same(untouched(model), before)


def test_a_file_is_not_an_adapter(saved):
    with pytest.raises(FileNotFoundError, match="no adapter"):
        load_adapter(host(), saved / WEIGHTS)


def test_a_host_may_call_a_layer_as_lora_does(tmp_path):
    """timm's DLA has a ``base_layer``."""
    host = torch.nn.Sequential()
    host.backbone = timm.create_model("dla46_c", num_classes=3)
    model = inject(host, QuACConfig(where="all"), torch.rand(1, 3, 64, 64))
    assert any(".base_layer." in name for name in adapter_state(model))
    assert save_adapter(model, tmp_path) == tmp_path


def test_another_adapter_inside_is_refused_when_it_is_saved(tmp_path):
    """LoRA keeps the layer it goes around as ``base_layer``: under these names nothing could be loaded."""

    class Lora(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

    model = timm.create_model("test_resnet_qacon")
    site = model.get_submodule(quac.injection_of(model).sites[0].name)
    name = next(name for name, module in site.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)))
    site.set_submodule(name, Lora(site.get_submodule(name)))
    with pytest.raises(ValueError, match=r"base_layer.*another adapter's \(LoRA\); merge or unload that one first"):
        quac.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_to_save(tmp_path):
    for function in (adapter_state, lambda model: save_adapter(model, tmp_path / "adapter")):
        with pytest.raises(ValueError, match="ResNet holds no QuAC"):
            function(host())
    assert not (tmp_path / "adapter").exists()


def test_a_save_that_fails_leaves_the_earlier_adapter(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = copy.deepcopy(trained(host())).to("meta")  # has no numbers to save
    with pytest.raises(ValueError, match="meta device"):
        save_adapter(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


SAVER = """
import sys, timm, torch, quac_plugins as quac
model = timm.create_model("test_resnet_qacon", num_classes=5)
print("ready", flush=True)
while True:
    with torch.no_grad():
        model.act1.p1.add_(1)
    quac.save_adapter(model, sys.argv[1])
"""


def test_a_save_that_is_killed_leaves_a_whole_adapter(saved):
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(saved)], stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"ready"
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    model = load_adapter(host(), saved)
    assert float(model.act1.p1.detach().max()) >= 1


def test_public_functions_find_the_same_adapter(saved):
    assert quac.load_adapter(host(), saved).act1.p1.equal(load_adapter(host(), str(saved)).act1.p1)


def test_paths_of_this_machine_are_not_saved(tmp_path, monkeypatch):
    checkpoint = tmp_path / "contrique.tar"
    torch.save({"a": torch.zeros(1)}, checkpoint)
    with pytest.raises(ValueError, match=r"contrique\.tar"):
        timm.create_model("test_resnet_qacon", quality=f"contrique:{checkpoint}")
    assert quac.QuACConfig(quality=f"contrique:{checkpoint}").to_dict()["quality"] == "contrique"


def test_an_adapter_for_another_normalization_is_refused(cheap, tmp_path):
    own = {"quality": cheap, "norm": "layer"}
    there = quac.inject(timm.create_model("test_resnet"), quac.QuACConfig(mean=(0.4,), std=(0.2,), **own))
    quac.save_adapter(there, tmp_path)
    here = quac.inject(timm.create_model("test_resnet"), quac.QuACConfig(mean=(0.5,), std=(0.2,), **own))
    with pytest.raises(ValueError, match="mean"):
        quac.load_adapter(here, tmp_path)
