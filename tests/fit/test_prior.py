import contextlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import quac_plugins as quac
from quac_plugins.core.inject.surgery import injection_of
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.degradations import corrupt
from quac_plugins.fit.sources import few_images

pytestmark = pytest.mark.filterwarnings("ignore:.*given normalization:UserWarning")


def prior_of(model):
    return [m for name, m in model.named_modules() if name.endswith("quac_prior")]


# What a fit does


def test_it_repairs_and_leaves_the_host_alone(photos, quick, build, snapshot, put_in):
    model = build("test_convnext_ddp").train()
    model.stages[1].eval()
    before, start = snapshot(model), put_in(model)
    settings = {**quick, "steps": 40, "check_every": 10, "draws": 6, "lr": 1e-2}
    report = quac.fit_prior(model, photos, corruptions=["contrast"], severities=4, **settings)
    before.check()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in put_in(model).items())
    stage = report.stages["prior"]
    losses = [entry["loss"] for entry in stage["curve"][1:]]
    assert losses[1] < 0.9 * losses[0]
    assert stage["best"] == min(entry["held_out"] for entry in stage["curve"]) <= stage["first"]
    assert (report.what, report.sites[0], report.kinds) == ("prior", "stages.0", ["contrast"])
    assert report.images == {"all": 4, "held": 1}
    assert report.stopped == report.unreadable == []
    assert 0 < report.multiply_adds < 1


@pytest.mark.parametrize("corruption", ["fog", "contrast"])
def test_the_loss_on_photographs_falls(photos, quick, build, corruption):
    settings = {**quick, "steps": 60, "check_every": 10, "lr": 1e-2, "near": 0.5, "draws": 6}
    report = quac.fit_prior(build("test_efficientnet_ddp"), photos, corruptions=corruption, severities=4, **settings)
    losses = [entry["loss"] for entry in report.stages["prior"]["curve"][1:]]
    assert losses[2] < 0.85 * losses[0]  # near
    assert losses[5] < losses[3]  # deep


@pytest.mark.parametrize(
    ("name", "options", "kwargs"),
    [
        ("test_vit_ddp", {}, {"img_size": 64}),
        ("test_mambaout_ddp", {}, {}),
        ("test_resnet_ddp", {}, {"site": "stages"}),
        ("test_resnet_ddp", {}, {"site": "layer2", "fdm_act": "qacon"}),
        ("test_resnet_ddp", {"deep": None}, {}),
        ("test_resnet_ddp", {"deep": ["layer2", "layer4"]}, {}),
        ("test_resnet_ddp", {"deep_weight": 0.0, "logits_weight": 0.0}, {}),
        ("test_resnet_ddp", {"amp": "bf16"}, {}),
        ("test_resnet_ddp", {"pairs": True}, {}),
        ("test_resnet_ddp", {"severities": (1, 5), "corruptions": "contrast,pixelate"}, {}),
        ("test_resnet_ddp", {}, {"features_only": True, "num_classes": None}),
        ("test_resnet_qacon_ddp", {}, {}),
    ],
)
def test_kinds_of_hosts_and_options(photos, quick, build, snapshot, equal, put_in, name, options, kwargs):
    kwargs = {key: value for key, value in kwargs.items() if value is not None or key != "num_classes"}
    model = build(name, **kwargs)
    before, start = snapshot(model), put_in(model)
    source = {"images": photos, "corruptions": "contrast"}
    if options.pop("pairs", False):
        source = {"pairs": ([corrupt(photo, "fog", 4) for photo in photos], photos)}
    report = quac.fit_prior(model, **{**source, **quick, **options})
    before.check()
    now = put_in(model)
    assert any(not torch.equal(now[n], start[n]) for n in now if "quac_prior" in n)  # standardized, if nothing else
    assert equal(*({n: t for n, t in ts.items() if "quac_prior" not in n} for ts in (now, start)))
    assert all(torch.isfinite(t).all() for t in now.values())
    stage = report.stages["prior"]
    assert stage["best"] <= stage["first"]
    assert len(stage["curve"]) == 5


def test_a_plain_host_gets_a_prior(photos, quick, build):
    model = build("test_resnet")
    config = quac.PriorConfig(site="layer1", fdm="ncrf")
    report = quac.fit_prior(model, photos, corruptions="contrast", config=config, **quick)
    assert report.sites == ["layer1"]
    assert injection_of(model).prior.config == config
    assert not model.conv1[0].weight.requires_grad  # frozen, as the config says
    with pytest.raises(ValueError, match="holds a prior already"):
        quac.fit_prior(model, photos, corruptions="contrast", config=config, **quick)


def test_what_is_fitted_is_a_function_of_the_seed(photos, quick, build, put_in, equal):
    """Not of what the generators were: a plain host, then one whose prior was put in before."""
    results = []
    for seed, before in ((3, 1), (3, 2), (4, 1)):
        model = build("test_resnet")
        torch.manual_seed(before)
        config = quac.PriorConfig()
        report = quac.fit_prior(model, photos, corruptions="gaussian_noise", seed=seed, config=config, **quick)
        results.append((report.stages, put_in(model)))
    assert results[0][0] == results[1][0] != results[2][0]
    assert equal(results[0][1], results[1][1])
    assert not equal(results[0][1], results[2][1])
    models = [build("test_resnet_ddp", seed=5) for _ in range(2)]
    stages = [quac.fit_prior(model, photos, corruptions="contrast", **quick).stages for model in models]
    assert stages[0] == stages[1]
    assert equal(*map(put_in, models))


@pytest.mark.filterwarnings("ignore:the loss was")
def test_what_is_worse_than_the_start_is_not_kept(photos, quick, build, tmp_path):
    report = quac.fit_prior(build("test_resnet_ddp"), photos, corruptions="fog", lr=1e6, clip=1e12, **quick)
    stage = report.stages["prior"]
    assert stage["best"] <= stage["first"]
    assert "at step" in report.stopped[0]
    report.to_json(tmp_path / "report.json")
    assert report.held_out <= 1


def test_one_image(photos, quick, build):
    with pytest.warns(UserWarning, match="of one image none can be held out"):
        report = quac.fit_prior(build("test_resnet_ddp"), photos[:1], corruptions="contrast", **quick)
    assert report.images == {"all": 1, "held": 0}


def test_wrapped_models(photos, quick, build, put_in, equal):
    plain, wrapped = build("test_resnet_ddp"), nn.DataParallel(build("test_resnet_ddp"))
    for model in (plain, wrapped):
        quac.fit_prior(model, photos, corruptions="contrast", **quick)
    assert equal(put_in(plain), put_in(wrapped.module))


# Where the pictures come from


def test_folders_files_and_arrays_mean_the_same(photos, folder, quick, build):
    files = sorted(folder.glob("*.png"))
    reports = [quac.fit_prior(build("test_resnet_ddp"), s, corruptions="fog", **quick) for s in (folder, files)]
    assert reports[0].stages == reports[1].stages
    torch_images = [torch.tensor(p).permute(2, 0, 1) / 255 for p in photos]
    reports = [quac.fit_prior(build("test_resnet_ddp"), s, corruptions="fog", **quick) for s in (photos, torch_images)]
    assert reports[0].stages == reports[1].stages


def test_pairs_of_folders_and_what_is_wrong_with_them(photos, folder, quick, build, tmp_path):
    for path, pixels in zip(sorted(folder.glob("*.png")), photos, strict=True):
        Image.fromarray(corrupt(pixels, "contrast", 4)).save(tmp_path / path.name)
    report = quac.fit_prior(build("test_resnet_ddp"), pairs=(tmp_path, folder), **quick)
    assert report.kinds == ["pairs"]
    for wrong, message in (
        ({"pairs": (tmp_path, folder), "corruptions": "fog"}, "either pairs, which are degraded already"),
        ({"pairs": (tmp_path, folder), "images": photos}, "either images or pairs"),
        ({"pairs": tmp_path}, "must be a tuple"),
        ({"pairs": (photos[:2], photos)}, "matched by order"),
        ({"pairs": (tmp_path, folder), "degrade": lambda image: image}, "either pairs, which are degraded already"),
        ({}, "got neither"),
    ):
        model = build("test_resnet")
        with pytest.raises(ValueError, match=message):
            quac.fit_prior(model, **{**quick, **wrong})
        assert injection_of(model) is None


def test_degrade_of_the_users_own(photos, quick, build):
    def darker(image, rng):
        return (image * rng.uniform(0.2, 0.4)).astype(np.uint8)

    report = quac.fit_prior(build("test_resnet_ddp"), photos, degrade=darker, **quick)
    assert report.kinds == ["degrade"]
    assert report.stages["prior"]["curve"][0]["held_out"] > 0.5
    for wrong, error, message in (
        (lambda image: 1 / 0, RuntimeError, "failed on the image image 0: ZeroDivisionError"),
        (lambda image: image[:5], ValueError, "resize it back"),
        (lambda image: None, TypeError, "NoneType"),
        ("darker", ValueError, "must be a function"),
    ):
        model = build("test_resnet")
        with pytest.raises(error, match=message):
            quac.fit_prior(model, photos, degrade=wrong, **quick)
        assert injection_of(model) is None


def test_files_that_cannot_be_read(folder, photos, quick, build, tmp_path):
    (tmp_path / "ü broken.jpg").write_bytes(b"no image")
    for name in ("a", "b"):
        Image.fromarray(photos[0]).save(tmp_path / f"{name}.png")
    with pytest.warns(UserWarning, match="could not be read"):
        report = quac.fit_prior(build("test_resnet_ddp"), tmp_path, corruptions="contrast", **quick)
    assert report.unreadable == [str(tmp_path / "ü broken.jpg")]
    assert report.images["all"] == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": "/none/there"}, FileNotFoundError, "no file or folder"),
        ({"images": []}, ValueError, "no images"),
        ({"images": [np.zeros((20, 90, 3), np.uint8)]}, ValueError, "too small"),
        ({"corruptions": "fogg"}, ValueError, "Did you mean fog"),
        ({"corruptions": []}, ValueError, "no corruptions"),
        ({"severities": 6}, ValueError, "from 1 to 5"),
        ({"severities": "3"}, ValueError, "from 1 to 5"),
        ({"severities": ()}, ValueError, "no severity"),
        ({"views": 0}, ValueError, "views must be a whole number"),
        ({"draws": 1.5}, ValueError, "draws must be a whole number"),
        ({"held_out": 1.0}, ValueError, "below 1"),
        ({"clean_share": 1.0}, ValueError, "clean_share"),
        ({"limit": 0}, ValueError, "limit must be a whole number ≥ 1"),
        ({"steps": -1}, ValueError, "steps must be a whole number"),
        ({"lr": 0.0}, ValueError, "lr must be a number above 0"),
        ({"lr": float("nan")}, ValueError, "lr must be a number above 0"),
        ({"near": 2}, ValueError, "near must be from 0 to 1"),
        ({"deep_weight": -1.0}, ValueError, "deep_weight must be a number ≥ 0"),
        ({"stpes": 3}, ValueError, "unknown settings stpes; a recipe has"),
        ({"amp": "fp16"}, ValueError, "needs a GPU"),
        ({"amp": True}, ValueError, "amp must be"),
        ({"label_weight": 1.0}, ValueError, "label_weight=1.0 needs labels"),
        ({"deep": "no_such"}, ValueError, "deep='no_such' matches no module .* Usable: "),
        ({"deep": ["layer3", "conv1"], "config": quac.PriorConfig()}, ValueError, "conv1 comes before the prior"),
        ({"clip": -1.0}, ValueError, "clip must be a number above 0, got -1.0"),
        ({"clip": None}, ValueError, "clip must be a number above 0, got None"),
        ({"near_crop": 0}, ValueError, "near_crop must be a whole number"),
        ({"near_batch": 0}, ValueError, "near_batch must be a whole number"),
        ({"seed": -1}, ValueError, "seed must be a whole number ≥ 0"),
        ({"held_out": 0}, ValueError, "held_out must be above 0"),
        ({"num_workers": -1}, ValueError, "num_workers must be a whole number"),
        ({"recipe": {"steps": 3}}, TypeError, "recipe must be a Recipe, got dict"),
        ({"config": {"site": "auto"}}, TypeError, "config must be a PriorConfig, got dict"),
        ({"config": quac.QuACConfig()}, TypeError, "config must be a PriorConfig, got QuACConfig"),
        ({"mean": 0.5}, ValueError, "mean and std go together"),
        ({"mean": 0.5, "std": 0}, ValueError, "std must be above 0"),
        ({"input_size": -1}, ValueError, "input_size"),
        ({"device": "abacus"}, RuntimeError, "abacus"),
        ({"config": quac.PriorConfig(site="no_such")}, ValueError, "site='no_such'"),
        (
            {"config": quac.PriorConfig(experts=["rain"])},
            ValueError,
            "over the experts rain; it cannot be fitted on con",
        ),
    ],
)
def test_mistakes_leave_a_plain_host_plain(photos, quick, build, snapshot, options, error, message):
    model = build("test_resnet")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        quac.fit_prior(model, **{"images": photos, "corruptions": "contrast", **quick, **options})
    before.check()
    assert injection_of(model) is None
    assert model.state_dict().keys() == before.host.keys()


def test_a_name_is_no_model(photos, quick):
    with pytest.raises(TypeError, match=r"got str; timm\.create_model\(name\) makes one"):
        quac.fit_prior("resnet50", photos, corruptions="contrast", **quick)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"experts": ["contrast"]}])
def test_a_host_of_half_precision_is_fitted_in_float32_and_stays_what_it_was(photos, quick, build, dtype, options):
    model = build("test_resnet_ddp", **options).to(dtype)
    host = {n: t.clone() for n, t in model.state_dict().items() if "quac" not in n}
    report = quac.fit_prior(model, photos, corruptions="contrast", severities=5, **{**quick, "steps": 30, "lr": 1e-2})
    assert report.stopped == []
    assert report.held_out < 0.95
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in host.items())
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_places_that_few_images_cannot_teach_stay_the_identity(photos, quick, build, put_in):
    """Of three images of 64×64 a place of stride s has 3·(64/s)² positions. The first place is always fitted."""
    sites = injection_of(build("test_resnet_ddp")).prior.sites
    second, third = (3 * (64 // site.stride) ** 2 for site in sites[1:3])
    assert second > third
    for least, wanted in ((0, len(sites)), (second, 2), (second + 1, 1), (10**6, 1)):
        model = build("test_resnet_ddp")
        start = put_in(model)
        report = quac.fit_prior(model, photos, corruptions="contrast", least_positions=least, **{**quick, "lr": 1e-2})
        names = [site.name for site in injection_of(model).prior.sites]
        assert (report.sites, report.unfitted) == (names[:wanted], names[wanted:]), least
        moved = {n.partition(".quac_prior")[0] for n, t in put_in(model).items() if not torch.equal(t, start[n])}
        assert moved == set(names[:wanted])
        assert ("too few images for" in str(report)) == (wanted < len(names))
    report = quac.fit_prior(model, photos, corruptions="contrast", least_positions=0, **quick)
    assert report.unfitted == []
    report = quac.fit_prior(model, photos, corruptions="contrast", **quick)  # all are fitted already
    assert report.unfitted == []


def test_what_an_earlier_fit_left_is_measured_against_the_untouched_host(photos, quick, build):
    model = build("test_resnet_ddp")
    with torch.no_grad():
        prior_of(model)[0].body[-1].bias.fill_(3.0)  # harms, whatever the pictures are
    report = quac.fit_prior(model, photos, corruptions="contrast", **{**quick, "lr": 1e-9})
    stage = report.stages["prior"]
    assert stage["curve"][0]["held_out"] > 1.5 * stage["first"]
    assert stage["best"] == stage["first"]
    assert (stage["best_step"], report.held_out) == (0, 1.0)
    assert not any(p.any() for prior in prior_of(model) for p in prior.body[-1].parameters())  # the host alone


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_the_caller_do_not_reach_a_fit(photos, quick, build, put_in, equal, mode):
    found = []
    for context in (contextlib.nullcontext, mode):
        model = build("test_resnet")
        with context():
            quac.fit_prior(model, photos, corruptions="contrast", config=quac.PriorConfig(), **quick)
        found.append(put_in(model))
    assert equal(*found)


def test_pooled_features_are_no_logits(photos, quick, build):
    model = build("test_resnet_ddp", num_classes=0)
    report = quac.fit_prior(model, photos, corruptions="contrast", deep=None, **{**quick, "near": 1.0})
    assert report.stages["prior"]["strength"] == 1.0  # which logits would choose
    with pytest.raises(ValueError, match="returns no logits"):
        quac.fit_prior(model, photos, corruptions="contrast", deep=None, site_weight=0.0, **{**quick, "near": 0.0})


def test_photographs_that_lie_on_their_side_are_turned(photos, quick, build, tmp_path):
    """EXIF 6: a phone's upright photograph, beside the same picture upright."""
    for name in ("clean", "degraded"):
        (tmp_path / name).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, pixels in enumerate(photos):
        Image.fromarray(pixels).save(tmp_path / "clean" / f"{i}.png")
        turned = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
        turned.save(tmp_path / "degraded" / f"{i}.jpg", exif=exif, quality=95)
    few = few_images(pairs=(tmp_path / "degraded", tmp_path / "clean"))
    for one, other in zip(few.degraded, few.clean, strict=True):
        assert np.abs(one.astype(int) - other).mean() < 8
    with Image.open(tmp_path / "degraded" / "0.jpg") as image:
        assert np.array_equal(few_images([image]).clean[0], few.degraded[0])


@pytest.mark.parametrize("model", ["timm", "plain"])
def test_grey_hosts_are_refused(photos, quick, build, model):
    if model == "timm":
        host = build("test_resnet_ddp", in_chans=1)
    else:
        host = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
    with pytest.raises((ValueError, RuntimeError), match="1 channels"):
        quac.fit_prior(host, photos, corruptions="contrast", **quick)


# Normalization


def test_hosts_that_do_not_say_how_their_images_are_normalized(photos, quick, tmp_path):
    def host():
        torch.manual_seed(0)
        return torchvision.models.resnet18(num_classes=4).eval()

    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    experts = quac.PriorConfig(experts=["contrast", "gaussian_noise"], quality="brisque_tone")
    options = {**quick, "steps": 2, "mean": mean, "std": std}
    model = host()
    seen = []
    model.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    quac.fit_prior(model, photos, config=experts, **options)
    tap = next(m for m in model.modules() if isinstance(m, QualityTap))
    assert (tap.mean, tap.std) == (mean, std)
    pixels = seen[-1].permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
    assert -1e-5 <= float(pixels.min()) <= float(pixels.max()) <= 1 + 1e-5
    # the tap's normalization is saved with the adapter
    fresh = quac.load_adapter(host(), quac.save_adapter(model, tmp_path / "a"))
    assert next(m for m in fresh.modules() if isinstance(m, QualityTap)).mean == mean
    # a tap that would undo another one is an error, not a wrong q
    other = quac.inject(host(), quac.PriorConfig(experts=["contrast"], mean=(0.5,) * 3, std=(0.5,) * 3))
    with pytest.raises(ValueError, match=r"normalized with mean \(0.1, 0.2, 0.3\).*undoes mean \(0.5, 0.5, 0.5\)"):
        quac.fit_prior(other, photos, **options)


def test_bgr_hosts_get_bgr(photos, quick, build):
    rgb, bgr = build("test_resnet"), build("test_resnet")
    with torch.no_grad():
        bgr.conv1[0].weight.copy_(rgb.conv1[0].weight.flip(1))
    stages = []
    for model, order in ((rgb, "rgb"), (bgr, "bgr")):
        config = quac.PriorConfig(channel_order=order, fdm_act="qacon")
        stages.append(quac.fit_prior(model, photos, corruptions="contrast", config=config, **quick).stages["prior"])
    for one, other in zip(stages[0]["curve"], stages[1]["curve"], strict=True):
        assert one["held_out"] == pytest.approx(other["held_out"], rel=1e-3)


# Routed priors

KINDS = ["contrast", "gaussian_noise", "pixelate"]


def choices(model, images):
    """Which expert the gate sends degraded photographs to; 0 is none."""
    prior = prior_of(model)[0]
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    found = []
    prior.register_forward_hook(lambda module, args, _: found.append(module.weights(args[0]).argmax(1)))
    batch = torch.stack([(torch.from_numpy(i).permute(2, 0, 1) / 255 - mean) / std for i in images])
    with torch.no_grad():
        model.eval()(batch)
    return found[0].tolist()


def test_a_routed_prior_learns_its_experts_and_where_to_send_images(photos, quick, build, put_in, snapshot):
    model = build("test_resnet_ddp", experts=KINDS, site="stages")
    before = snapshot(model)
    report = quac.fit_prior(model, photos, severities=5, **{**quick, "views": 3})
    before.check()
    assert list(report.stages) == report.kinds == KINDS
    assert report.gate.choices == ["identity", *KINDS]
    assert all(prior.only is None for prior in prior_of(model))
    assert 0 < report.multiply_adds < 1
    squares = [np.asarray(Image.fromarray(photo).resize((64, 64))) for photo in photos[:3]]
    sent = [choices(model, [corrupt(image, kind, 5) for image in squares]) for kind in KINDS]
    right = sum(place == index + 1 for index, places in enumerate(sent) for place in places)
    assert right >= 7
    # one alone, later: the others stay, and so does the way to them
    start = put_in(model)
    again = quac.fit_prior(model, photos, corruptions="pixelate", severities=5, **{**quick, "views": 3, "lr": 1e-2})
    assert list(again.stages) == ["pixelate"]
    now = put_in(model)
    changed = {
        name.split(".experts.")[1][0] for name in now if ".experts." in name and not torch.equal(now[name], start[name])
    }
    assert changed <= {"2"}
    sent = [choices(model, [corrupt(image, kind, 5) for image in squares]) for kind in KINDS]
    assert sum(place == index + 1 for index, places in enumerate(sent) for place in places) >= 7


def test_a_routed_prior_takes_its_own_corruptions_only(photos, quick, build):
    model = build("test_resnet_ddp", experts=["contrast", "fog"])
    for options in ({"corruptions": "snow,fog"}, {"degrade": lambda image: image}, {"pairs": (photos, photos)}):
        source = {} if "pairs" in options else {"images": photos}
        with pytest.raises(ValueError, match="routed over the experts contrast, fog; it cannot be fitted on"):
            quac.fit_prior(model, **{**source, **quick, **options})


# Interruptions


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("test_resnet_ddp", MemoryError),
        ("test_resnet_qacon_ddp", KeyboardInterrupt),
        ("test_resnet", KeyboardInterrupt),
        ("test_resnet_qacon", KeyboardInterrupt),
    ],
)
def test_an_error_leaves_everything_as_it_was(photos, quick, build, snapshot, interrupt, equal, name, error):
    kwargs = {"experts": ["contrast", "pixelate"]} if "ddp" in name else {}
    model = build(name, **kwargs)
    before, start = snapshot(model), {n: t.clone() for n, t in model.state_dict().items()}
    interrupt(11 if kwargs else 4, error)  # in the second stage, where there are two
    with pytest.raises(error):
        quac.fit_prior(model, photos, corruptions="contrast,pixelate", **quick)
    before.check()
    assert equal(model.state_dict(), start)
    assert all(prior.only is None for prior in prior_of(model) if hasattr(prior, "only"))


@pytest.mark.parametrize(("experts", "at"), [([], 1), ([], 6), (["contrast", "pixelate"], 13)])
def test_interrupted_and_gone_on_with(photos, quick, build, put_in, equal, interrupt, tmp_path, experts, at):
    options = {**quick, "corruptions": "contrast,pixelate", "checkpoint": tmp_path / "states"}
    whole = build("test_resnet_ddp", experts=experts)
    expected = quac.fit_prior(whole, photos, **{**options, "checkpoint": None})
    go_on = interrupt(at)
    with pytest.raises(KeyboardInterrupt):
        quac.fit_prior(build("test_resnet_ddp", experts=experts), photos, **options)
    go_on()
    files = sorted(path.name for path in (tmp_path / "states").iterdir())
    assert files[-1] == "fit-start.pt"
    other = build("test_resnet_ddp", experts=experts)  # as in another process, whose generators are elsewhere
    prior = injection_of(other).prior.sites[0].name
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "quac_prior" in name and "body.0.weight" in name:
                parameter.mul_(-1.5)
    report = quac.fit_prior(other, photos, **options)
    assert report.stages == expected.stages
    assert report.gate == expected.gate
    assert equal(put_in(other), put_in(whole)), prior
    assert set(files) <= {path.name for path in (tmp_path / "states").iterdir()}  # until what was fitted is saved
    with pytest.raises(NotADirectoryError):
        quac.save_adapter(other, tmp_path / "states" / files[0])
    if at == 6:
        other = build("test_resnet_ddp", experts=experts)  # as in another process, after the first could not save it
        quac.fit_prior(other, photos, **options)
        assert equal(put_in(other), put_in(whole))
    quac.save_adapter(other, tmp_path / "adapter")
    assert not (tmp_path / "states").exists()


def test_a_state_that_lacks_something_is_refused(photos, quick, build, interrupt, equal, tmp_path):
    options = {**quick, "corruptions": "contrast", "checkpoint": tmp_path}
    go_on = interrupt(6)
    with pytest.raises(KeyboardInterrupt):
        quac.fit_prior(build("test_resnet_ddp"), photos, **options)
    go_on()
    kept = torch.load(tmp_path / "fit-prior.pt", weights_only=True)
    name = next(iter(kept["state"]["parameters"]))
    del kept["state"]["parameters"][name]
    torch.save(kept, tmp_path / "fit-prior.pt")
    model = build("test_resnet_ddp")
    start = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"fit-prior\.pt is no whole state of this fit: it lacks .*delete it"):
        quac.fit_prior(model, photos, **options)
    assert equal(model.state_dict(), start)


def test_states_of_other_fits_are_refused(photos, quick, build, interrupt, tmp_path):
    options = {**quick, "corruptions": "contrast", "checkpoint": tmp_path}
    go_on = interrupt(6)
    with pytest.raises(KeyboardInterrupt):
        quac.fit_prior(build("test_resnet_ddp"), photos, **options)
    go_on()
    fitted = build("test_resnet_ddp")
    with torch.no_grad():
        prior_of(fitted)[0].body[-1].bias.fill_(0.1)
    for model, others in (
        (build("test_resnet_ddp"), {"steps": 9}),
        (build("test_resnet_ddp"), {"corruptions": "fog"}),
        (build("test_resnet_ddp"), {"severities": 4}),
        (build("test_resnet_ddp"), {"images": photos[:3]}),
        (build("test_resnet_ddp"), {"corruptions": None, "degrade": lambda image: image // 2}),
        (build("test_resnet_ddp"), {"deep": None}),
        (build("test_resnet_ddp"), {"mean": 0.1, "std": 0.9}),
        (build("test_resnet_ddp", seed=1), {}),
        (build("test_resnet_ddp", fdm_act="gelu"), {}),
        (fitted, {}),
    ):
        with pytest.raises(ValueError, match="belongs to another fit"):
            quac.fit_prior(model, **{"images": photos, **options, **others})
    (tmp_path / "fit-prior.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"no state of a fit that can be read .*; delete it to start again"):
        quac.fit_prior(build("test_resnet_ddp"), photos, **options)
    (tmp_path / "fit-prior.pt").unlink()
    (tmp_path / "note.txt").write_text("mine")
    model = build("test_resnet_ddp")
    quac.fit_prior(model, photos, **options)
    quac.save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "note.txt"]


# Adapters


@pytest.mark.parametrize("experts", [[], ["contrast", "pixelate"]])
def test_an_adapter_of_what_was_fitted(photos, quick, build, tmp_path, experts):
    model = build("test_resnet_ddp", experts=experts)
    quac.fit_prior(model, photos, corruptions="contrast,pixelate", **{**quick, "lr": 1e-2, "held_out": 0.5})
    for prior in prior_of(model):  # so that something is repaired, however short the fit
        for module in prior.modules():
            if hasattr(module, "body"):
                nn.init.normal_(module.body[-1].weight, std=0.1)
    quac.save_adapter(model, tmp_path)
    images = torch.stack([torch.from_numpy(corrupt(p, "contrast", 4)).permute(2, 0, 1) / 127.5 - 1 for p in photos])
    with torch.no_grad():
        expected = model.eval()(images)
        for fresh in (build("test_resnet"), build("test_resnet_ddp")):
            assert not torch.equal(fresh.eval()(images), expected)
            assert torch.equal(quac.load_adapter(fresh, tmp_path).eval()(images), expected)
    with pytest.raises(ValueError, match="other weights"):
        quac.load_adapter(build("test_resnet", seed=1), tmp_path)


# Without the packages that only corruptions need


def test_pairs_and_own_degradations_need_no_corruptions_library(folder, tmp_path):
    (tmp_path / "run.py").write_text(
        textwrap.dedent(f"""
        import sys, warnings
        for name in ("imagecorruptions", "cv2", "matplotlib", "rich", "typer", "numba", "skimage"):
            sys.modules[name] = None
        import timm, torch, quac_plugins as quac
        torch.set_num_threads(1)
        assert not [name for name in sys.modules if name.startswith(("quac_plugins.fit", "quac_plugins.evaluate"))]
        assert {{"fit_prior", "fit_qacon", "FitReport", "Recipe"}} <= set(dir(quac)) & set(quac.__all__)
        try:
            quac.fit_things
        except AttributeError as error:
            assert "has no attribute 'fit_things'" in str(error)
        options = dict(input_size=64, views=1, draws=1, steps=2, batch_size=2)
        model = timm.create_model("test_resnet_ddp")
        print(quac.fit_prior(model, {str(folder)!r}, degrade=lambda image: image // 2, **options))
        quac.fit_prior(model, pairs=({str(folder)!r}, {str(folder)!r}), recipe=quac.Recipe(near=1.0), **options)
        try:
            quac.fit_prior(model, {str(folder)!r}, corruptions="fog", **options)
        except ImportError as error:
            print(error)
        """)
    )
    done = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "prior after act1" in done.stdout
    assert 'pip install "quac-plugins[evaluate]"' in done.stdout
