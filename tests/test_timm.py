"""The timm door: NAME_qacon, NAME_ddp and NAME_qacon_ddp are timm's NAME in all that timm's factory and savers do."""

import copy
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_notrace_functions, get_notrace_modules, save_for_hf
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import quac_plugins as quac
from quac_plugins import injection_of
from quac_plugins.core.naming import split_name
from quac_plugins.hub.verify import sha256_of
from quac_plugins.registry import Entry, published

BASES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"]
SUFFIXES = ("_qacon", "_ddp", "_qacon_ddp")


def size_of(name):
    return timm.get_pretrained_cfg(name).input_size[-1]


def moved(model):
    """Away from every initialization, statistics of norms included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.05)
    return model.eval()


# -- names


def test_every_architecture_has_its_names():
    names = set(timm.list_models())
    bases = {name for name in names if not name.endswith(SUFFIXES)}
    assert len(bases) > 1000
    assert {base + suffix for base in bases for suffix in SUFFIXES} == names - bases
    assert set(timm.list_models("*_qacon")) == {f"{base}_qacon" for base in bases}
    assert set(timm.list_models("*_ddp")) == {f"{base}{suffix}" for base in bases for suffix in ("_ddp", "_qacon_ddp")}
    assert all(timm.is_model(f"resnet50{suffix}") for suffix in SUFFIXES)
    assert not any(timm.is_model(f"resnet50{suffix}_qacon") for suffix in SUFFIXES)
    assert not any(timm.is_model(f"resnet50{suffix}_ddp") for suffix in ("_ddp", "_qacon_ddp"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("base", ["resnet50", "vit_base_patch16_224", "test_resnet", "convnextv2_atto"])
def test_pretrained_configs_are_the_bases(base, suffix):
    ours, theirs = timm.get_pretrained_cfg(f"{base}{suffix}"), timm.get_pretrained_cfg(base)
    assert ours.architecture == f"{base}{suffix}"
    for field in ("hf_hub_id", "url", "tag", "mean", "std", "input_size", "num_classes", "interpolation", "crop_pct"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.hf_hub_id == f"timm/{base}.{ours.tag}"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tags(suffix):
    tags = [name.partition(".")[2] for name in timm.list_pretrained("resnet50.*")]
    assert len(tags) > 10
    assert sorted(timm.list_pretrained(f"resnet50{suffix}.*")) == sorted(f"resnet50{suffix}.{tag}" for tag in tags)
    cfg = timm.get_pretrained_cfg(f"resnet50{suffix}.a1_in1k")
    assert (cfg.tag, cfg.hf_hub_id) == ("a1_in1k", "timm/resnet50.a1_in1k")
    model = timm.create_model(f"test_resnet{suffix}.r160_in1k")
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    assert model.pretrained_cfg["architecture"] == f"test_resnet{suffix}"
    with pytest.raises(RuntimeError, match="nothing_in1k"):
        timm.create_model(f"test_resnet{suffix}.nothing_in1k")


def test_configs_of_all_names_are_the_bases_and_their_own():
    for name in timm.list_models():
        suffix = next((suffix for suffix in SUFFIXES[::-1] if name.endswith(suffix)), "")
        ours, theirs = (timm.get_pretrained_cfg(n) for n in (name, name.removesuffix(suffix)))
        if suffix and theirs is not None:
            assert ours.architecture == name
            assert ours.to_dict() == {**theirs.to_dict(), "architecture": name}


def test_registering_again_adds_nothing():
    from quac_plugins import timm as door

    names = list(door.__all__)
    assert door.register() == []
    assert door.__all__ == names
    assert {"resnet50_qacon", "resnet50_ddp"} < set(names)


def test_published_weights_are_tags_behind_those_of_timm_and_its_entrypoints_stay():
    names = published()
    assert set(names) <= set(timm.list_models(pretrained=True))
    for name, entry in names.items():
        base = split_name(entry.architecture)[0]
        assert timm.get_pretrained_cfg(name).tag == entry.tag
        assert timm.get_pretrained_cfg(entry.architecture).tag == timm.get_pretrained_cfg(base).tag != entry.tag
        assert timm.model_entrypoint(base).__module__.startswith("timm.models.")
        assert timm.models.is_model_in_modules(base, timm.model_entrypoint(base).__module__.rpartition(".")[2])


def test_a_name_that_is_registered_later_is_found(monkeypatch):
    code = (
        "import sys, timm, quac_plugins\nfrom quac_plugins import timm as door\n"
        "def later(pretrained=False, **kwargs):\n    return timm.create_model('test_resnet', **kwargs)\n"
        "timm.models.register_model(later)\n"
        "print(*door.register(), 'later_ddp' in door.__all__, 'resnet50_ddp' in door.__all__)\n"
        "print(timm.create_model('later_qacon_ddp', num_classes=3).pretrained_cfg['architecture'])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["later_qacon later_ddp later_qacon_ddp True True", "later_qacon_ddp"]


# -- the factory's options


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("base", BASES)
def test_logits_are_the_bases(base, suffix, normalized):
    torch.manual_seed(0)
    plain = moved(timm.create_model(base, num_classes=7))
    model = timm.create_model(base + suffix, num_classes=7).eval()
    record = injection_of(model)
    assert bool(record.sites) == ("_qacon" in suffix)
    assert (record.prior is not None) == ("_ddp" in suffix)
    model.load_state_dict(plain.state_dict(), strict=False)
    images = normalized(2, size_of(base))
    torch.testing.assert_close(model(images), plain(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "kwargs", "images"),
    [
        ("test_resnet", {"in_chans": 1}, (2, 1, 64, 64)),
        ("test_resnet", {"in_chans": 5}, (2, 5, 64, 64)),
        ("test_vit", {"in_chans": 2}, (2, 2, 160, 160)),
        ("test_vit", {"img_size": 96}, (2, 3, 96, 96)),
        ("test_vit", {"img_size": (96, 64), "global_pool": "avg"}, (2, 3, 96, 64)),
        ("test_vit", {"dynamic_img_size": True}, (2, 3, 112, 80)),
        ("test_resnet", {"global_pool": "max"}, (2, 3, 64, 64)),
        ("test_resnet", {"num_classes": 0}, (2, 3, 64, 64)),
        ("test_resnet", {"num_classes": 0, "global_pool": ""}, (2, 3, 64, 64)),
        ("test_convnext", {"drop_path_rate": 0.3, "drop_rate": 0.1}, (2, 3, 64, 64)),
        ("test_efficientnet", {"norm_layer": nn.BatchNorm2d, "act_layer": nn.ELU}, (2, 3, 64, 64)),
        ("test_resnet", {"output_stride": 16}, (2, 3, 64, 64)),
    ],
)
@pytest.mark.parametrize(("suffix", "own"), [("_qacon", {"norm": "layer"}), ("_ddp", {"experts": ["fog"]})])
def test_options_of_the_factory(base, kwargs, images, suffix, own):
    kwargs = {"num_classes": 4, **kwargs}
    torch.manual_seed(0)
    plain = timm.create_model(base, **kwargs).eval()
    model = timm.create_model(base + suffix, **own, **kwargs).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(images)
    expected = plain(x)
    assert model(x).shape == expected.shape
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_class_of_the_model_and_its_methods(normalized):
    model = timm.create_model("test_resnet_qacon", num_classes=4).eval()
    assert type(model) is type(timm.create_model("test_resnet"))
    model.reset_classifier(9, "max")
    assert model(normalized(2, 48)).shape == (2, 9)
    assert model.num_classes == 9
    assert "fc3" in " ".join(dict(model.named_parameters()))
    groups = param_groups_weight_decay(model)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert model.group_matcher()


def test_config_given_as_a_dictionary_or_an_overlay():
    cfg = {"input_size": (3, 80, 80), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "num_classes": 3}
    model = timm.create_model("test_resnet_qacon", pretrained_cfg=cfg, num_classes=3)
    assert (model.conv1[0].quac_tap.mean, model.conv1[0].quac_tap.std) == (cfg["mean"], cfg["std"])
    model = timm.create_model("test_resnet_qacon", pretrained_cfg_overlay={"mean": (0.3, 0.3, 0.3)})
    assert model.conv1[0].quac_tap.mean == (0.3, 0.3, 0.3)
    assert model.pretrained_cfg["architecture"] == "test_resnet_qacon"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": "relu"}, "unknown activation 'relu'.*qacon"),
        ({"where": "layer9"}, "where='layer9' matches no activation"),
        ({"quality": "brisk"}, "did you mean 'brisque'"),
        ({"init": "random"}, "unknown init 'random'.*paper, preserve"),
        ({"norm": "instance"}, "unknown norm 'instance'.*batch, layer, group, none"),
        ({"reduction": 0}, "reduction must be a whole number"),
        ({"pretrained": True, "init": "paper"}, "pretrained=True with init='paper'.*preserve"),
    ],
)
def test_unknown_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_resnet_qacon", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"site": "layer9"}, "'layer9' matches no module"),
        ({"fdm": "lite"}, "did you mean 'light'"),
        ({"fdm_width": 0}, "fdm_width must be"),
        ({"fdm_act": "rely"}, "unknown fdm_act 'rely'"),
        ({"experts": "fog"}, "experts must be a list"),
        ({"experts": ["fog"], "quality": "brisk"}, "did you mean 'brisque'"),
        ({"top_k": 0}, "top_k must be"),
        ({"freeze": 1}, "freeze must be"),
    ],
)
@pytest.mark.parametrize("suffix", ["_ddp", "_qacon_ddp"])
def test_unknown_options_of_a_prior(kwargs, message, suffix):
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"test_resnet{suffix}", **kwargs)


def test_options_reach_the_injection():
    options = {"activation": "qswish", "where": "layer2.*", "init": "paper", "norm": "group", "reduction": 8}
    config = injection_of(timm.create_model("test_resnet_qacon", **options)).config
    assert {key: getattr(config, key) for key in options} == options
    own = {"site": ["layer1", "layer2"], "fdm": "ncrf", "fdm_width": 8, "experts": ["fog"], "top_k": 2, "freeze": False}
    record = injection_of(timm.create_model("test_resnet_qacon_ddp", fdm_act="gelu", **own, **options))
    assert {key: getattr(record.prior.config, key) for key in own} == own
    assert {key: getattr(record.config, key) for key in options} == options


def test_one_quality_for_both_or_each_its_own():
    for kwargs, expected in (({}, ("brisque", "degradation")), ({"quality": "brisque"}, ("brisque", "brisque"))):
        record = injection_of(timm.create_model("test_resnet_qacon_ddp", fdm_act="qacon", **kwargs))
        assert (record.quality.name, record.prior.quality.name) == expected


@pytest.mark.parametrize(
    ("suffix", "option"),
    [("_qacon", "colour"), ("_ddp", "colour"), ("_qacon_ddp", "colour"), ("_qacon", "site"), ("_ddp", "where")],
)
def test_an_option_that_nobody_knows_is_an_error_as_in_timm(suffix, option):
    with pytest.raises(TypeError, match=option):
        timm.create_model(f"test_resnet{suffix}", **{option: "red"})


@pytest.mark.parametrize("suffix", ["_ddp", "_qacon_ddp"])
def test_the_host_of_a_prior_is_frozen_and_what_was_put_in_is_not(suffix):
    model = timm.create_model(f"test_resnet{suffix}")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(quac.adapter_state(model)) & set(dict(model.named_parameters()))
    assert all(p.requires_grad for p in timm.create_model(f"test_resnet{suffix}", freeze=False).parameters())


# -- weights


@pytest.fixture
def weights(tmp_path):
    """Weights of test_resnet in a file, and the model that has them."""
    torch.manual_seed(3)
    model = moved(timm.create_model("test_resnet"))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors", model


@pytest.mark.parametrize("suffix", [*SUFFIXES, "_qacon.r160_in1k", "_ddp.r160_in1k"])
def test_pretrained_weights_of_the_base_give_its_logits(suffix, weights, normalized):
    file, base = weights
    name = f"test_resnet{suffix}"
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}).eval()
    assert torch.equal(model(normalized(2, 64)), base(normalized(2, 64)))
    assert injection_of(model) is not None


def test_pretrained_weights_adapt_to_classes_and_channels(weights):
    file, _ = weights
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}, "num_classes": 3, "in_chans": 1}
    torch.manual_seed(0)
    plain, images = timm.create_model("test_resnet", **kwargs).eval(), torch.randn(2, 1, 64, 64)
    for suffix in SUFFIXES:
        model = timm.create_model(f"test_resnet{suffix}", **kwargs).eval()
        assert torch.equal(model.forward_features(images), plain.forward_features(images))


def test_checkpoint_of_the_whole_model(tmp_path, normalized):
    model = moved(timm.create_model("test_resnet_qacon", num_classes=4, norm="layer"))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    again = timm.create_model(
        "test_resnet_qacon", num_classes=4, norm="layer", checkpoint_path=str(tmp_path / "model.pth")
    )
    assert torch.equal(again.eval()(normalized(2, 64)), model(normalized(2, 64)))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    ("base", "kwargs"),
    [
        ("test_resnet", {}),
        ("test_resnet", {"where": ["act1", "layer4.*"], "activation": "qswish", "norm": "group", "reduction": 4}),
        ("test_resnet", {"init": "paper", "norm": "none", "where": "last", "in_chans": 1}),
        ("test_vit", {"activation": "qgelu", "img_size": 96}),
        ("test_convnext", {"activation": "acon"}),
    ],
)
def test_saved_as_for_the_hub_and_created_again(base, kwargs, safe, tmp_path):
    model = moved(timm.create_model(f"{base}_qacon", num_classes=6, **kwargs))
    save_for_hf(model, tmp_path, model_args={"num_classes": 6, **kwargs}, safe_serialization=safe)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert injection_of(again).config == injection_of(model).config
    side = kwargs.get("img_size", 64 if "vit" not in base else 160)
    images = torch.randn(2, kwargs.get("in_chans", 3), side, side)
    assert torch.equal(again(images), model(images))
    fresh = timm.create_model(f"local-dir:{tmp_path}").eval()  # without weights: the same network, as initialized
    assert fresh.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet_ddp", {}),
        ("test_resnet_ddp", {"site": ["layer1", "layer2"], "fdm": "ncrf", "fdm_width": 8, "in_chans": 1}),
        ("test_resnet_ddp", {"experts": ["fog", "snow"], "top_k": 2, "quality": "brisque", "freeze": False}),
        ("test_vit_ddp", {"fdm_act": "qacon", "img_size": 96}),
        ("test_convnext_qacon_ddp", {}),
        ("test_resnet_qacon_ddp", {"norm": "layer", "experts": ["fog"], "quality": "brisque_tone"}),
        ("test_resnet_qacon_ddp", {"experts": ["fog"], "quality": "brisque_tone", "prior_quality": "brisque"}),
    ],
)
def test_a_prior_is_saved_with_its_options_and_created_again(name, kwargs, tmp_path):
    model = moved(timm.create_model(name, num_classes=6, **kwargs))
    assert json.loads(json.dumps(model._model_args)) == model._model_args
    save_for_hf(model, tmp_path, model_args=model._model_args)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    record, other = injection_of(model), injection_of(again)
    assert (other.config, other.prior.config) == (record.config, record.prior.config)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    side = kwargs.get("img_size", 64)
    images = torch.randn(2, kwargs.get("in_chans", 3), side, side)
    assert torch.equal(again(images), model(images))


def test_whole_models_of_earlier_versions_have_the_defaults_of_their_time(tmp_path):
    options = {"experts": ["fog"], "prior_quality": "brisque_tone", "num_classes": 6}
    model = moved(timm.create_model("test_resnet_qacon_ddp", **options))
    save_for_hf(model, tmp_path, model_args=model._model_args)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("quality", "prior_quality"):
        del config["model_args"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))


def test_an_adapter_that_replaces_the_prior_is_saved_as_it_is(tmp_path):
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=6)
    there = quac.inject(copy.deepcopy(base), quac.PriorConfig(site="layer2", fdm="ncrf", fdm_width=8))
    quac.save_adapter(moved(there), tmp_path / "adapter")
    model = timm.create_model("test_resnet_ddp", num_classes=6, site="auto")
    model.load_state_dict(there.state_dict(), strict=False)
    quac.load_adapter(model, tmp_path / "adapter")
    save_for_hf(model, tmp_path / "whole", model_args=model._model_args)
    again = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), there(images))
    assert quac.remove(model).pretrained_cfg == base.pretrained_cfg
    assert model._model_args == base._model_args


def test_options_are_saved_without_being_named_again(tmp_path):
    model = timm.create_model("test_resnet_qacon", num_classes=6, where="layer2.*", norm="layer")
    assert model._model_args.items() >= {"where": "layer2.*", "norm": "layer", "activation": "qacon"}.items()
    save_for_hf(model, tmp_path, model_args=model._model_args)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert injection_of(again).config == injection_of(model).config


def test_adapter_over_pretrained_weights(weights, tmp_path, normalized):
    file, _ = weights
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    model = timm.create_model("test_resnet_qacon", **kwargs)
    for tensor in quac.adapter_state(model).values():
        if tensor.is_floating_point():
            tensor.add_(0.1)
    quac.save_adapter(model, tmp_path / "adapter")
    images = normalized(2, 64)
    for host in ("test_resnet", "test_resnet_qacon"):
        again = quac.load_adapter(timm.create_model(host, **kwargs), tmp_path / "adapter")
        assert torch.equal(again.eval()(images), model.eval()(images))


def test_an_adapter_that_the_registry_names_goes_over_the_bases_weights(
    weights, tmp_path, normalized, monkeypatch, publish
):
    file, base = weights
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    model = moved(timm.create_model("test_resnet_qacon", where="all", norm="layer", **kwargs))
    quac.save_adapter(model, tmp_path / "adapter")
    weights_file = tmp_path / "adapter/adapter_model.safetensors"
    known = {
        "kind": "adapter",
        "sha256": sha256_of(weights_file),
        "size": weights_file.stat().st_size,
        "license": "mit",
    }
    names = {"test_resnet_qacon.r160_in1k": None, "test_resnet_qacon.own": "r160_in1k"}
    table = {name: Entry(name, **known, base=tag) for name, tag in names.items()}
    monkeypatch.setattr("quac_plugins.hub.published.published", lambda door="timm": table)
    monkeypatch.setattr(Entry, "folder", tmp_path / "adapter")
    publish(*table.values())
    images, state = normalized(2, 64), quac.adapter_state(model)
    assert len(state) > 10
    for name in ("test_resnet_qacon", "test_resnet_qacon.r160_in1k", "test_resnet_qacon.own"):
        again = timm.create_model(name, **kwargs).eval()
        assert all(torch.equal(state[key], tensor) for key, tensor in quac.adapter_state(again).items())
        assert again._model_args["norm"] == "layer"
        assert not torch.equal(again(images), base(images))
    with pytest.raises(ValueError, match="norm is 'layer' in the adapter, 'none' in this host"):
        timm.create_model("test_resnet_qacon", norm="none", **kwargs)


def test_no_network_says_what_was_looked_for_and_how_to_give_a_file(tmp_path):
    code = (
        "import sys, timm, quac_plugins\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        timm.create_model(name, pretrained=True)\n"
        "    except RuntimeError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    names = ("test_resnet_qacon", "resnet50_ddp.a1_in1k", "resnet50_qacon_ddp.a1_in1k")
    command = [sys.executable, "-c", code, *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for name, line, tag in zip(names, run.stdout.splitlines(), ("r160_in1k", "a1_in1k", "a1_in1k"), strict=True):
        base = name.partition("_qacon")[0].partition("_ddp")[0]
        assert f"looked for hf_hub_id='timm/{base}.{tag}'" in line
        assert f"timm.create_model('{name.partition('.')[0]}', pretrained=True, pretrained_cfg_overlay=dict(f" in line


# -- importing


def test_importing_the_package_imports_no_other_framework():
    code = "import sys, quac_plugins; from quac_plugins.core.quality.registry import quality_names"
    code += "; assert 'pyiqa[:…]' in quality_names(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "timm" in loaded
    assert not loaded & {"detectron2", "mmengine", "diffusers", "matplotlib", "cv2", "pyiqa", "imagecorruptions"}


# -- training on several processes


def network():
    torch.manual_seed(0)
    model = timm.create_model("test_vit_qacon", num_classes=4, img_size=48, norm="layer", init="paper", where="all")
    return model.train()


def step(model, images, labels):
    nn.functional.cross_entropy(model(images), labels).backward()


def worker(rank, port, images, labels, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(network())
    half = slice(rank * 2, rank * 2 + 2)
    for _ in range(2):
        model.zero_grad()
        step(model, images[half], labels[half])
    torch.save({name: p.grad for name, p in model.module.named_parameters()}, f"{folder}/{rank}.pth")
    if rank == 0:
        quac.save_adapter(model, f"{folder}/adapter")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(normalized, tmp_path, free_port):
    images, labels = normalized(4, 48), torch.arange(4)
    torch.multiprocessing.spawn(worker, (free_port, images, labels, str(tmp_path)), nprocs=2)
    model = network()
    step(model, images, labels)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pth")
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)
    other = copy.deepcopy(model)
    quac.load_adapter(other, tmp_path / "adapter")
    assert quac.adapter_state(other).keys() == quac.adapter_state(model).keys()


# -- feature extraction


@pytest.mark.parametrize("suffix", ["_qacon", "_qacon_ddp"])
@pytest.mark.parametrize("name", ["nf_resnet26", "hrnet_w18_small", "test_resnet"])
def test_features_of_networks_whose_stem_or_wrapper_is_special(name, suffix, normalized):
    model = timm.create_model(f"{name}{suffix}", features_only=True).eval()
    with torch.no_grad():
        features = model(normalized(2, 64))
    assert [f.shape[1] for f in features] == model.feature_info.channels()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {}),
        ("test_efficientnet", {"feature_cls": "hook"}),
        ("test_resnet", {"feature_cls": "fx", "out_indices": (1, 2, 3)}),
        ("test_resnet", {"feature_cls": "getter", "out_indices": (1, 2, 3)}),
        ("test_vit", {}),
        ("test_convnext", {"out_indices": (1, 3)}),
        ("test_mambaout", {}),
    ],
)
def test_features_only_are_those_behind_the_prior(name, kwargs, normalized):
    torch.manual_seed(0)
    base = timm.create_model(name, features_only=True, **kwargs).eval()
    model = timm.create_model(f"{name}_ddp", features_only=True, site="auto", experts=["fog"], top_k=2, **kwargs).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    images = normalized(2, size_of(name))
    with torch.no_grad():
        plain, features = base(images), model(images)
        assert all(torch.equal(one, other) for one, other in zip(plain, features, strict=True))
        for tensor in quac.adapter_state(model).values():
            tensor.add_(torch.rand_like(tensor) * 0.1)
        repaired = model(images)
        assert not torch.equal(repaired[-1], plain[-1])
        (site,) = injection_of(model).prior.sites
        behind = [info["module"] for info in model.feature_info.get_dicts(keys=["module"])]
        if site.name.replace("_", ".") in behind:  # what comes out at the site itself is repaired too
            index = behind.index(site.name.replace("_", "."))
            assert not torch.equal(repaired[index], plain[index])


@pytest.mark.parametrize(("site", "first"), [("act1", 0), ("layer1", 1), ("layer1.0", 1), ("layer2.0", 2)])
@pytest.mark.parametrize("feature_cls", ["hook", "list"])
def test_features_at_the_site_itself_are_repaired(site, first, feature_cls, normalized):
    site = f"body.{site}" if feature_cls == "hook" else site
    kwargs = {"features_only": True, "feature_cls": feature_cls, "out_indices": (0, 1, 2)}
    model, images = timm.create_model("test_resnet_ddp", site=site, **kwargs).eval(), normalized(2, 64)
    with torch.no_grad():
        before = model(images)
        for tensor in quac.adapter_state(model).values():
            tensor.add_(torch.rand_like(tensor) * 0.1)
        same = [torch.equal(one, other) for one, other in zip(before, model(images), strict=True)]
    assert same == [index < first for index in range(3)]


@pytest.mark.parametrize("options", [{"site": "layer1.0"}, {"site": "act1", "experts": ["fog"]}, {"fdm_act": "qacon"}])
def test_torch_fx_keeps_the_prior(options, normalized):
    model = moved(timm.create_model("test_resnet_ddp", **options))
    leaves = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    _, nodes = get_graph_node_names(model, tracer_kwargs=leaves)
    traced = create_feature_extractor(model, return_nodes=[nodes[-1]], tracer_kwargs=leaves).eval()
    for images in (normalized(2, 64), normalized(2, 64) * 0.3):
        assert torch.equal(traced(images)[nodes[-1]], model(images))


@pytest.mark.parametrize("name", ["nf_resnet26", "test_resnet"])
def test_torch_fx_keeps_the_tap_and_the_activations(name, normalized):
    torch.manual_seed(0)
    model = timm.create_model(f"{name}_qacon", init="paper", norm="layer").eval()
    leaves = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    _, nodes = get_graph_node_names(model, tracer_kwargs=leaves)
    traced = create_feature_extractor(model, return_nodes=[nodes[-1]], tracer_kwargs=leaves).eval()
    images = normalized(2, 64)
    for x in (images, images * 0.3):
        assert torch.equal(traced(x)[nodes[-1]], model(x))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_removed_it_is_timms_own_model_again(suffix):
    base = timm.create_model("test_resnet", num_classes=3)
    model = quac.remove(timm.create_model(f"test_resnet{suffix}", num_classes=3))
    assert model.pretrained_cfg == base.pretrained_cfg
    assert model.default_cfg == base.default_cfg
    assert model._model_args == base._model_args
    assert model.state_dict().keys() == base.state_dict().keys()
    assert set(model.__dict__) == set(base.__dict__)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("name", "options"), [("test_resnet_qacon", {}), ("test_resnet_ddp", {"fdm_act": "qacon"})])
def test_optimizers_of_timm_leave_the_slopes_out_of_weight_decay(name, options):
    model = timm.create_model(name, **options)
    slopes = {id(p) for name, p in model.named_parameters() if name.endswith((".p1", ".p2"))}
    assert slopes
    for group in param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay()):
        assert group["weight_decay"] == 0 or not slopes & {id(p) for p in group["params"]}
    assert create_optimizer_v2(copy.deepcopy(model), opt="adamw", weight_decay=0.1)
    assert not hasattr(quac.remove(model), "no_weight_decay")
