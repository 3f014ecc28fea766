"""What an injection and a fit knew of the host's images, a load knows: normalization, size, crop, the traced shape."""

import json

import pytest
import timm
import torch
import torchvision
from timm.models import save_for_hf
from torch import nn

import quac_plugins as quac
from quac_plugins import PriorConfig, load_adapter, save_adapter
from quac_plugins.core.inject.images import Images
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.evaluate.building import build_model
from quac_plugins.evaluate.preprocessing import data_config, sources_of

CONFIG = "adapter_config.json"
OTHER = {"mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2)}
FIT = {"corruptions": "contrast,fog", "input_size": 48, "crop_pct": 0.9, "interpolation": "bilinear"}


def resnet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5, **kwargs).eval()


def other(**kwargs):
    return resnet(pretrained_cfg_overlay=OTHER, **kwargs)


def of_torchvision():
    torch.manual_seed(0)
    return torchvision.models.shufflenet_v2_x0_5(num_classes=5).eval()


def undone(model):
    return {(tap.mean, tap.std) for tap in model.modules() if isinstance(tap, QualityTap)}


def seen(model):
    config = data_config(model)
    return {key: config[key] for key in ("mean", "std", "input_size", "crop_pct", "interpolation")}


SEEN = {**OTHER, "input_size": (3, 48, 48), "crop_pct": 0.9, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def fitted(photos, tmp_path_factory):
    """Adapters of hosts: one that says OTHER and is fitted, one that says something else, one that says nothing."""
    quick = {"views": 1, "draws": 1, "steps": 1, "batch_size": 4, "near_batch": 4, "deep": None, "progress": False}
    hosts = {"said": other(), "given": resnet(), "nothing said": of_torchvision()}
    experts = ["contrast", "fog"]
    quac.fit_prior(hosts["said"], photos, config=PriorConfig(site="auto", experts=experts), **FIT, **quick)
    quac.inject(hosts["given"], PriorConfig(site="auto", experts=experts, **OTHER))
    quac.inject(hosts["nothing said"], PriorConfig(site="conv1", experts=experts, **OTHER))
    folder = tmp_path_factory.mktemp("fitted")
    for name, host in hosts.items():
        assert undone(host) == {(OTHER["mean"], OTHER["std"])}
        save_adapter(host, folder / name)
    return {name: folder / name for name in hosts}


@pytest.mark.parametrize(("name", "host"), [("said", other), ("given", resnet), ("nothing said", of_torchvision)])
def test_the_same_host_sees_as_the_fitted_one(name, host, fitted, tmp_path):
    model = load_adapter(host(), fitted[name])
    assert undone(model) == {(OTHER["mean"], OTHER["std"])}
    expected = SEEN if name == "said" else {**seen(host()), **OTHER}
    assert seen(model) == expected
    again = load_adapter(host(), save_adapter(model, tmp_path))
    assert (undone(again), seen(again)) == (undone(model), expected)
    origin = {"said": "adapter", "given": "network", "nothing said": "timm"}[name]
    assert sources_of(model, {"crop_pct": None, "mean": 0.4}) == {"crop_pct": origin, "mean": "given"}
    with pytest.raises(ValueError, match=r"normalized with mean \(0\.1.* the tap of the model undoes mean \(0\.4"):
        data_config(model, mean=0.1, std=0.3)


def test_another_host_is_an_error_that_names_both(fitted):
    torch.manual_seed(0)
    for host in (timm.create_model("test_resnet_ddp", num_classes=5), resnet()):
        before = host.state_dict().keys()
        with pytest.raises(ValueError, match=r"with mean \(0\.4.*this host says mean \(0\.5.*pretrained_cfg_overlay"):
            load_adapter(host, fitted["said"])
        assert host.state_dict().keys() == before
    assert undone(load_adapter(resnet(), fitted["said"], check_host=False)) == {(OTHER["mean"], OTHER["std"])}


def test_an_earlier_adapter_says_nothing_of_images_and_is_loaded_as_before(fitted, tmp_path):
    values = json.loads((fitted["said"] / CONFIG).read_text())
    assert values.pop("images")["normalization"] == [list(OTHER["mean"]), list(OTHER["std"])]
    values.pop("sha256")
    (tmp_path / CONFIG).write_text(json.dumps(values))
    (tmp_path / "adapter_model.safetensors").symlink_to(fitted["said"] / "adapter_model.safetensors")
    model = load_adapter(resnet(), tmp_path)
    assert undone(model) == {(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])}


def test_the_command_line_builds_the_host_for_the_adapters_images(fitted):
    for options in ({}, OTHER):
        model = _built(fitted["said"], **options)
        assert undone(model) == {(OTHER["mean"], OTHER["std"])}
        assert seen(model) == SEEN
    with pytest.raises(ValueError, match=r"mean \(0\.4.* this host says mean \(0\.3"):
        _built(fitted["said"], mean=0.3, std=0.3)


def _built(adapter, **options):
    torch.manual_seed(0)
    return build_model("test_resnet_ddp", adapter=adapter, num_classes=5, pretrained=False, **options)


@pytest.mark.parametrize(("name", "overlay"), [("said", OTHER), ("given", {})])
def test_a_whole_model_sees_as_the_fitted_one(name, overlay, fitted, tmp_path):
    torch.manual_seed(0)
    options = {"experts": ["contrast", "fog"], "site": "auto", "pretrained_cfg_overlay": overlay}
    model = load_adapter(timm.create_model("test_resnet_ddp", num_classes=5, **options), fitted[name])
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    whole = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert undone(whole) == {(OTHER["mean"], OTHER["std"])}
    assert seen(whole) == (SEEN if name == "said" else {**seen(resnet()), **OTHER})
    host = quac.remove(model)
    assert host.pretrained_cfg["input_size"] == resnet().pretrained_cfg["input_size"]


class Sized(nn.Module):
    """Takes images of one size alone, as the vision transformers of transformers do."""

    def __init__(self, size=64):
        super().__init__()
        torch.manual_seed(0)
        self.size, self.stem, self.act, self.head = size, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, images):
        if images.shape[-1] != self.size:
            raise ValueError(f"Input image size ({images.shape[-1]}) doesn't match model ({self.size}).")
        return self.head(self.act(self.stem(images)).mean((2, 3)))


def test_a_host_of_another_size_is_told_in_one_sentence_and_the_adapter_keeps_the_shape(cheap, tmp_path):
    config = quac.QuACConfig(activation="acon", where="all")
    with pytest.raises(RuntimeError, match=r"^Sized does not run on images of shape \(1, 3, 224, 224\)") as error:
        quac.inject(Sized(), config)
    assert error.value.__suppress_context__
    assert "inject(model, config, example=" in str(error.value)
    save_adapter(quac.inject(Sized(), config, torch.rand(2, 3, 64, 64)), tmp_path)
    assert quac.injection_of(load_adapter(Sized(), tmp_path)).images.shape == (3, 64, 64)
    with pytest.raises(RuntimeError, match=r"Input image size \(224\).*load_adapter\(model, source, example=") as error:
        load_adapter(Sized(32), tmp_path, check_host=False)
    assert error.value.__suppress_context__
    load_adapter(Sized(32), tmp_path, example=torch.rand(1, 3, 32, 32))


def test_what_transformers_says_of_its_size_is_read():
    host = Sized()
    host.config = type("Config", (), {"image_size": 64, "num_channels": 3})()
    assert quac.injection_of(quac.inject(host, quac.QuACConfig("acon"))).images.shape == (3, 64, 64)


@pytest.mark.parametrize(
    "damage",
    [
        {"shape": [3, 64]},
        {"shape": [3, 64, "64"]},
        {"shape": [3, 1 << 40, 64]},
        {"normalization": [[0.5], [0.0]]},
        {"normalization": [[0.5]]},
        {"normalization": "none"},
        {"host": [["x"], [1.0]]},
        {"shape": [3, 65535, 65535]},
        {"settings": {"input_size": [64]}},
        {"settings": {"crop_pct": 2}},
        {"settings": {"interpolation": 3}},
        {"settings": {"file": "/etc/passwd"}},
        {"settings": None},
    ],
)
def test_what_a_file_says_of_images_can_be_refused_and_no_more(damage):
    with pytest.raises((ValueError, TypeError)):
        Images.from_dict({**Images().to_dict(), **damage})


def test_what_one_adapter_said_of_images_is_not_left_to_the_next(fitted, tmp_path):
    options = {"experts": ["contrast", "fog"], "site": "auto"}
    plain = save_adapter(quac.inject(other(), PriorConfig(**options)), tmp_path / "plain")
    model = timm.create_model("test_resnet_ddp", num_classes=5, pretrained_cfg_overlay=OTHER, **options).eval()
    whole = dict(model.pretrained_cfg)
    load_adapter(model, fitted["said"], check_host=False)
    assert data_config(model)["input_size"][-2:] == (48, 48)
    load_adapter(model, plain, check_host=False)
    assert model.pretrained_cfg == whole


def test_an_activation_that_is_called_as_a_rule_is(tmp_path, photographs):
    def host():
        torch.manual_seed(0)
        layers = {"first": nn.Conv2d(3, 8, 3), "all": nn.ReLU(), "conv": nn.Conv2d(8, 8, 3), "last": nn.ReLU()}
        model = nn.Sequential()
        for name, layer in layers.items():
            model.add_module(name, layer)
        return model.eval()

    model = quac.inject(host(), quac.QuACConfig(where="re:^last$"), torch.rand(1, 3, 32, 32))
    with torch.no_grad():
        model.last.p1.add_(1)
    loaded = load_adapter(host(), save_adapter(model, tmp_path))
    assert [site.name for site in quac.injection_of(loaded).sites] == ["last"]
    assert torch.equal(loaded(photographs(2, 32)), model(photographs(2, 32)))
