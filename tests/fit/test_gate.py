"""The gate of a routed prior: shipped where it knows the degradations, else learned; what is told of it is true."""

import warnings

import numpy as np
import pytest
import timm
import torch

import quac_plugins as quac
from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.inject.surgery import injection_of
from quac_plugins.core.prior.routed import Gate
from quac_plugins.core.quality.degradation import KINDS
from quac_plugins.fit.data import Data
from quac_plugins.fit.gate import _raise_of_identity, draw
from quac_plugins.fit.photographs import Photographs
from quac_plugins.fit.report import FitReport

EXPERTS = ["fog", "gaussian_noise"]


@pytest.fixture(scope="module")
def large(photographs):
    return (photographs(8, 128) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture
def few(quick):
    return {**quick, "input_size": 128, "steps": 2, "draws": 1}


def told(*experts):
    return [experts.index(kind) + 1 if kind in experts else 0 for kind in KINDS]


def sent(model, pictures):
    """The choices of the prior inside a model for pictures, uint8 (N, h, w, 3)."""
    prior = model.get_submodule(f"{injection_of(model).prior.sites[0].name}.{PRIOR_NAME}")
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    found = []
    handle = prior.register_forward_hook(lambda module, args, _: found.append(module.weights(args[0]).argmax(1)))
    with torch.no_grad():
        model.eval()((torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std)
    handle.remove()
    return found[0].numpy()


# -- what a gate says before any fit


def test_an_expert_gets_the_probability_of_its_degradation_and_the_identity_the_rest():
    gate = Gate(17, 3, told(*EXPERTS))
    q = torch.full((4, 17), 1e-4)
    for row, kind in enumerate(("clean", "fog", "gaussian_noise", "motion_blur")):
        q[row, KINDS.index(kind)] = 0.99
    assert gate(q).argmax(1).tolist() == [0, 1, 2, 0]
    assert not gate.needs_fit
    # between an expert and a degradation without one, the expert is what the user expects
    q = torch.full((1, 17), 1e-4)
    q[0, KINDS.index("gaussian_noise")], q[0, KINDS.index("shot_noise")] = 0.3, 0.69
    assert gate(q).argmax(1).tolist() == [2]
    assert gate.is_fresh
    assert Gate(17, 4, told("fog", "rain")).needs_fit
    assert Gate(6, 3).needs_fit


# -- calibration


@pytest.mark.parametrize("seed", range(4))
def test_clean_pictures_are_kept_and_no_expert_is_starved_for_it(seed):
    torch.manual_seed(seed)
    target = torch.arange(600) % 3
    logits = torch.randn(600, 3) + 1.5 * torch.nn.functional.one_hot(target, 3)
    before = logits.argmax(1)
    raised = logits.clone()
    raised[:, 0] += _raise_of_identity(logits, target)
    after = raised.argmax(1)
    clean = float((after[target == 0] == 0).float().mean())
    own = [[float((a[target == e] == e).float().mean()) for e in (1, 2)] for a in (before, after)]
    for share, left in zip(*own, strict=True):
        assert left >= min(0.6, 0.84 * share) or clean <= 0.91
    assert clean >= 0.98 or (clean >= 0.9 and any(left <= 0.62 for left in own[1]))
    assert clean >= float((before[target == 0] == 0).float().mean())


# -- fits


def test_the_shipped_gate_serves_few_photographs_and_the_report_is_of_what_is_saved(large, few, build, tmp_path):
    model = build("test_resnet_ddp", experts=EXPERTS)
    report = quac.fit_prior(model, list(large), severities=3, **few)
    assert report.gate.choices == ["identity", *EXPERTS]
    assert report.gate.held_out
    assert report.gate.starved == []
    assert report.gate.share("clean") > 0.7
    # the same pictures, through the model that is saved and loaded
    loaded = quac.load_adapter(build("test_resnet"), quac.save_adapter(model, tmp_path / "adapter"))
    for kind in ("clean", *EXPERTS):
        counted = np.zeros(3, int)
        for row in report.gate.counts[kind].values():
            counted += row
        assert counted.sum() == report.agreement[kind]["n"]
    data = Data(images=list(large), corruptions=EXPERTS, views=1, input_size=128)
    read = Photographs(loaded, data, injection_of(loaded).prior.config, wanted=240)
    drawn = draw(read, EXPERTS, read.held, 60)
    answers = sent(loaded, drawn.pictures)
    for kind, level, row in report.gate.rows():
        here = answers[(drawn.kind == kind) & (drawn.severity == int(level))]
        assert np.bincount(here, minlength=3).tolist() == row, (kind, level)
    text = str(report)
    assert "gate, on pictures held out, of all severities:" in text
    assert "fog: " in text
    report.to_json(tmp_path / "fit.json")
    assert FitReport.from_json(tmp_path / "fit.json") == report
    report.plot(tmp_path / "fit.png")


def test_degradations_of_ones_own_get_experts_and_are_learned(large, few, build):
    def red(image):
        return np.stack([image[..., 0] // 2 + 120, image[..., 1] // 4, image[..., 2] // 4], -1)

    model = build("test_resnet_ddp", experts=["fog", "red"])
    options = {**few, "degrade": {"red": red}}
    report = quac.fit_prior(model, list(large), corruptions="fog", **options)
    assert list(report.stages) == ["fog", "red"]
    assert report.gate.share("red") > 0.8
    assert report.gate.share("fog", "5") > 0.5
    with pytest.raises(ValueError, match="expert for 'red', fitted before on a degradation of your own"):
        quac.fit_prior(model, list(large), corruptions="fog", **few)
    with pytest.raises(ValueError, match=r"'fog'.*this name is taken"):
        quac.fit_prior(model, list(large), degrade={"fog": red}, **few)


def test_an_expert_for_what_cannot_be_told_from_clean_is_warned_of(large, few, build):
    model = build("test_resnet_ddp", experts=["fog", "nothing"])
    options = {**few, "degrade": {"nothing": lambda image: image}}
    fault = r"the gate .* only \d+ % of the held-out (clean pictures|pictures of nothing)"
    with pytest.warns(UserWarning, match=fault):
        report = quac.fit_prior(model, list(large), corruptions="fog", **options)
    assert report.gate.warnings()


def test_several_degradations_in_a_plain_host_are_routed_by_default(large, few, build):
    model = build("test_resnet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quac.fit_prior(model, list(large[:2]), corruptions="fog,contrast", **few)
    assert injection_of(model).prior.config.experts == ["fog", "contrast"]


def test_what_cannot_be_fitted_is_said_before_the_work(large, few, build):
    own = {"rain": lambda image: image}
    for model, options, message in (
        (build("test_resnet_ddp", experts=["fog", "rain"]), {}, "expert for 'rain' is for no corruption.*degrade="),
        (build("test_resnet_ddp", experts=["fog"]), {"degrade": own}, "cannot be fitted on rain"),
        (build("test_resnet"), {"corruptions": "fog,snow", "clean_share": 0.2}, "clean_share is for one FDM"),
        (build("test_resnet"), {"degrade": {"../rain": own["rain"]}}, "a name has letters"),
    ):
        with pytest.raises(ValueError, match=message):
            quac.fit_prior(model, list(large[:2]), **{**few, **options})


def test_half_hosts_and_unfitted_experts_are_judged_as_they_are_saved(large, few, build):
    model = build("test_resnet_ddp", experts=["fog", "contrast"]).bfloat16()
    report = quac.fit_prior(model, list(large), corruptions="fog", severities=3, **few)
    assert set(report.gate.counts) == {"clean", "fog"}
    assert report.gate.share("clean", choice="contrast") == 0  # it is the identity, wherever the gate sends it
    prior = model.get_submodule(f"{injection_of(model).prior.sites[0].name}.{PRIOR_NAME}")
    assert prior.gate.fc2.bias.dtype == torch.bfloat16


def test_networks_without_logits_have_no_agreement(large, few, build):
    report = quac.fit_prior(build("test_resnet_ddp", num_classes=0), list(large[:3]), corruptions="fog", **few)
    assert report.agreement == {}
