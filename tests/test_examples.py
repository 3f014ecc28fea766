"""The examples of the site's task pages run on small real pictures, and say what they show."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

import quac_plugins as quac
from quac_plugins.core.quality import registry

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run examples/NAME.py with arguments, in an empty folder; what it printed."""

    def example(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return example


def test_robust_fits_and_judges_a_network_and_writes_what_it_says(run, tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    few = ("--crops", 1, "--draws", 1, "--corruptions", "contrast")
    said = run("robust", "--model", "test_resnet", "--checkpoint", "weights.safetensors", *few)
    assert "contrast/4: " in said
    written = tmp_path / "robust-output"
    assert json.loads((written / "report.json").read_text())["corruptions"]["contrast"]["4"]["n"] == 2
    assert (written / "adapter/adapter_model.safetensors").is_file()
    assert (written / "robust.png").is_file()


def test_own_parts_keep_the_host_and_are_found_again_by_name(run, monkeypatch):
    for known in (quac.ACTIVATIONS, quac.FDMS, registry._TABLE):
        for name in ("qsoft", "tiny", "contrast"):
            monkeypatch.setitem(known, name, None)
            monkeypatch.delitem(known, name)  # after the test it is not there either
    said = run("own_parts")
    assert "the host's answers, kept: True" in said
    assert "QSoft" in said
    assert "Tiny" in said


@pytest.mark.parametrize("repo", [None, "me/my-adapter"])
def test_share_sends_and_loads_what_gives_the_same_answers(run, repo, request):
    if repo:
        request.getfixturevalue("hub")
    assert "the same answers: True" in run("share", *(("--repo", repo) if repo else ()))


def test_deploy_writes_a_file_that_runs_without_this_package(run):
    assert "(2, 1000) without this package: True" in run("deploy", "--format", "torchscript")


@pytest.mark.parametrize("loop", ["plain", "trainer", "lightning"])
def test_train_learns_the_folder_and_its_weights_load(run, tmp_path, loop):
    said = run("train", "--epochs", 2, "--corruptions", "contrast", "--loop", loop).splitlines()
    epochs = [line for line in said if line.startswith("epoch")]
    assert float(epochs[-1].split()[-1]) < float(epochs[0].split()[-1])
    model = timm.create_model("test_resnet_qacon", num_classes=3)
    model.load_state_dict(load_file(tmp_path / "train-output/model.safetensors"))
    if loop == "trainer":
        from transformers import AutoModelForImageClassification

        saved = AutoModelForImageClassification.from_pretrained(tmp_path / "train-output/trainer")
        assert type(quac.injection_of(saved.timm_model).config) is quac.QuACConfig
        assert all(torch.equal(saved.timm_model.state_dict()[n], t) for n, t in model.state_dict().items())


def test_restore_brings_a_rainy_photograph_nearer_to_the_clean_one(run, tmp_path):
    words = run("restore", "--side", 96).split()
    assert float(words[6]) > float(words[3]) + 3
    assert (tmp_path / "restore-output/restored.png").is_file()


@pytest.mark.parametrize("network", ["unet", "fcn", "fpn"])
def test_segment_trains_a_network_of_each_framework_and_draws_what_it_finds(run, tmp_path, network):
    said = run("segment", "--network", network, "--steps", 2, "--batch", 2, "--corruptions", "contrast")
    assert [line.split(":")[0] for line in said.splitlines()] == [f"{network}, clean", f"{network}, contrast"]
    assert Image.open(tmp_path / "segment-output/segmented.png").size == (192, 192)


@pytest.mark.parametrize("framework", ["torchvision", "detectron2"])
def test_detect_puts_margins_into_a_trained_detector_and_judges_it(run, tmp_path, framework):
    few = ("--steps", 1, "--fit-steps", 0, "--limit", 2, "--draws", 1, "--corruptions", "contrast")
    said = run("detect", "--framework", framework, *few).splitlines()
    assert [line.split(":")[0] for line in said if line.startswith("AP50")] == [
        "AP50, the detector",
        "AP50, with margins",
    ]
    kept = json.loads((tmp_path / "detect-output/adapter/adapter_config.json").read_text())
    assert kept["prior"]["config"]["experts"] == ["contrast"]
    assert Image.open(tmp_path / "detect-output/detected.png").size == (256, 256)


def test_report_tells_of_a_picture_and_of_many(run, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the host's weights are those of a package
    said = run("report", "--model", "tf_efficientnet_lite0_ddp.in1k_weather", "--crops", 1)
    assert "with the adapter: espresso" in said
    assert "contrast/4: +100.0 points" in said
    written = tmp_path / "report-output"
    assert json.loads((written / "adapter.json").read_text())["corruptions"]["contrast"]["4"]["n"] == 2
    assert (written / "both.png").is_file()
