import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import quac_plugins as quac
from quac_plugins.core.inject.surgery import injection_of
from quac_plugins.degradations import corrupt


class Labelled(Dataset):
    def __init__(self, photos, labels):
        self.photos, self.labels = photos, labels

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, index):
        return self.photos[index], self.labels[index]


@pytest.fixture
def quick(quick):
    return {**quick, "draws": 3}


def drivers(model):
    return [m for m in model.modules() if isinstance(m, quac.QACON)]


@pytest.mark.parametrize("name", ["test_resnet_qacon", "test_vit_qacon", "test_resnet_qacon_ddp"])
def test_only_the_activations_change(photos, quick, build, snapshot, put_in, equal, name):
    model = build(name, **({"img_size": 64} if "vit" in name else {})).train()
    before, start = snapshot(model), put_in(model)
    options = {**quick, "steps": 24, "lr": 2e-2, "held_out": 0.25}
    report = quac.fit_qacon(model, photos, corruptions="contrast,fog", severities=4, **options)
    before.check()
    now = put_in(model)
    prior = [{n: t for n, t in tensors.items() if "quac_prior" in n} for tensors in (now, start)]
    assert equal(*prior)
    losses = [entry["loss"] for entry in report.stages["qacon"]["curve"][1:]]
    assert losses[-1] < losses[0]
    stage = report.stages["qacon"]
    assert stage["best"] <= stage["first"] * (1 + 1e-6)  # summed in another order
    assert report.kinds == ["contrast", "fog"]
    assert report.sites == [site.name for site in injection_of(model).sites]
    buffers = {n for n, _ in model.named_buffers()}
    changed = {n for n in now if not torch.equal(now[n], start[n])}
    assert {n for n in now if n in buffers and "bn" in n} <= changed  # calibrated
    if stage["best_step"]:
        assert any(n.endswith("fc3.weight") for n in changed)


def test_batch_norms_are_calibrated_once_and_as_a_plain_mean(photos, quick, build):
    model = build("test_resnet_qacon")
    module = drivers(model)[0]
    seen = []

    def see(norm, args):
        if norm.training:
            seen.append(args[0].detach().clone())

    handle = module.bn1.register_forward_pre_hook(see)
    quac.fit_qacon(model, photos, corruptions="contrast", **quick)
    assert len(seen) >= 1
    means = torch.stack([z.mean((0, 2, 3)) for z in seen]).mean(0)
    assert torch.allclose(module.bn1.running_mean, means, atol=1e-5)
    assert module.bn1.momentum == 0.1
    seen.clear()
    quac.fit_qacon(model, photos, corruptions="contrast", **quick)
    assert not seen
    handle.remove()


def test_with_the_prior_both_change(photos, quick, build, put_in):
    model = build("test_resnet_qacon_ddp")
    start = put_in(model)
    options = {**quick, "steps": 24, "lr": 1e-2}
    report = quac.fit_qacon(model, photos, corruptions="contrast", with_prior=True, **options)
    now = put_in(model)
    for part in ("quac_prior.mean", "bn1.running_mean"):
        assert any(part in n and not torch.equal(now[n], start[n]) for n in now)
    if report.stages["qacon"]["best_step"]:
        for part in ("quac_prior.body", "fc3.weight"):
            assert any(part in n and not torch.equal(now[n], start[n]) for n in now)
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_labels(photos, quick, build):
    data = Labelled(photos, [0, 1, 2, 3])
    with_labels = quac.fit_qacon(build("test_resnet_qacon"), data, corruptions="fog", label_weight=1.0, **quick)
    without = quac.fit_qacon(build("test_resnet_qacon"), data, corruptions="fog", **quick)
    extra = with_labels.stages["qacon"]["first"] - without.stages["qacon"]["first"]
    assert extra == pytest.approx(np.log(5), rel=0.2)  # cross-entropy of a network that knows nothing
    for wrong, message in (
        (photos, "label_weight=1.0 needs labels"),
        (Labelled(photos, [0, 1, 2, 5]), "labels must be from 0 to 4"),
        (Labelled(photos, ["a"] * 4), "needs labels"),
    ):
        with pytest.raises(ValueError, match=message):
            quac.fit_qacon(build("test_resnet_qacon"), wrong, corruptions="fog", label_weight=1.0, **quick)


def test_files_with_labels(folder, quick, build):
    samples = [(str(path), index) for index, path in enumerate(sorted(folder.glob("*.png")))]
    report = quac.fit_qacon(build("test_resnet_qacon"), samples, corruptions="fog", label_weight=0.5, **quick)
    plain = quac.fit_qacon(build("test_resnet_qacon"), folder, corruptions="fog", **quick)
    assert report.stages["qacon"]["first"] > plain.stages["qacon"]["first"] + 0.5
    with pytest.raises(TypeError, match="holds a str too"):
        quac.fit_qacon(build("test_resnet_qacon"), [*samples, "x.png"], corruptions="fog", **quick)


def test_plain_hosts_and_configs(photos, quick, build, snapshot):
    model = build("test_resnet")
    config = quac.QuACConfig(activation="qswish", where="all", norm="layer")
    report = quac.fit_qacon(model, photos, corruptions="contrast", config=config, **quick)
    assert injection_of(model).config == config
    assert all(p.requires_grad for p in model.parameters())
    assert report.parameters > 0
    with pytest.raises(ValueError, match="holds QuAC already"):
        quac.fit_qacon(model, photos, config=config, **quick)
    for model, options, message in (
        (build("test_resnet"), {"with_prior": True}, "the model holds no prior"),
        (build("test_resnet_ddp"), {}, "a prior, but no activations to fit"),
        (build("test_resnet_qacon_ddp", experts=["fog"]), {"with_prior": True}, "call fit_prior first"),
        (build("test_resnet"), {"corruptions": "fogg"}, "Did you mean fog"),
        (build("test_resnet"), {"config": quac.QuACConfig(where="no_such")}, "no_such"),
        (build("test_resnet"), {"deep": None, "logits_weight": 0.0}, "nothing to compare"),
        (build("test_resnet"), {"degrade": {"fog": np.negative}}, "this name is taken"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            quac.fit_qacon(model, photos, **{"corruptions": "contrast", **quick, **options})
        before.check()
        assert model.state_dict().keys() >= before.host.keys()


def test_a_backbone_without_logits(photos, quick, build, snapshot):
    torch.manual_seed(0)
    model = build("test_resnet_qacon", features_only=True, num_classes=0)
    before = snapshot(model)
    report = quac.fit_qacon(model, photos, corruptions="contrast", **quick)
    before.check()
    assert report.stages["qacon"]["curve"][-1]["held_out"] > 0
    with pytest.raises(ValueError, match="nothing to compare"):
        quac.fit_qacon(model, photos, corruptions="contrast", deep=None, **quick)


def test_pairs_and_own_degradations(photos, quick, build):
    degraded = [corrupt(photo, "fog", 3) for photo in photos]
    assert quac.fit_qacon(build("test_resnet_qacon"), pairs=(degraded, photos), **quick).kinds == ["pairs"]
    report = quac.fit_qacon(build("test_resnet_qacon"), photos, degrade=lambda image: image // 3, **quick)
    assert report.kinds == ["degrade"]


@pytest.mark.parametrize("name", ["test_resnet_qacon", "test_resnet"])
def test_errors_and_interruptions(photos, quick, build, snapshot, equal, put_in, interrupt, tmp_path, name):
    options = {**quick, "corruptions": "contrast", "checkpoint": tmp_path, "lr": 2e-2}
    whole = build(name)
    expected = quac.fit_qacon(whole, photos, **{**options, "checkpoint": None})
    model = build(name)
    before, start = snapshot(model), {n: t.clone() for n, t in model.state_dict().items()}
    go_on = interrupt(6)
    with pytest.raises(KeyboardInterrupt):
        quac.fit_qacon(model, photos, **options)
    before.check()
    assert equal(model.state_dict(), start)
    go_on()
    again = build(name, seed=0)
    if injection_of(again) is not None:  # drawn otherwise, as in another process; it changes nothing yet
        torch.manual_seed(9)
        for driver in drivers(again):
            nn.init.normal_(driver.fc1.weight)
    report = quac.fit_qacon(again, photos, **options)
    assert report.stages == expected.stages
    assert equal(put_in(again), put_in(whole))


def test_an_adapter_of_what_was_fitted(photos, quick, build, tmp_path):
    model = build("test_resnet_qacon_ddp")
    quac.fit_qacon(model, photos, corruptions="contrast", with_prior=True, **{**quick, "lr": 2e-2})
    for driver in drivers(model):
        nn.init.normal_(driver.fc3.weight, std=0.3)
    quac.save_adapter(model, tmp_path)
    images = torch.stack([torch.from_numpy(corrupt(p, "contrast", 4)).permute(2, 0, 1) / 127.5 - 1 for p in photos])
    with torch.no_grad():
        expected = model.eval()(images)
        fresh = build("test_resnet").eval()
        assert not torch.allclose(fresh(images), expected)
        assert torch.equal(quac.load_adapter(fresh, tmp_path).eval()(images), expected)
