import random

import numpy as np
import pytest
import timm
import torch
from cheap_quality import channel_statistics
from PIL import Image
from skimage import data as photographs
from torch import nn

import quac_plugins as quac
from quac_plugins.degradations import corrupt, image_seed
from quac_plugins.evaluate import evaluate

SOURCES = ["astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "moon", "hubble_deep_field"]
TIMED = ("seconds",)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eight photographs and a broken file, in four classes."""
    folder = tmp_path_factory.mktemp("photographs")
    for index, source in enumerate(SOURCES):
        image = photograph(source, (200 + 10 * index, 190))
        path = folder / f"class {index % 4}" / f"{source}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    whole = (folder / "class 1" / "chelsea.jpg").read_bytes()
    (folder / "class 1" / "cut off.jpg").write_bytes(whole[:2000])
    return folder


def photograph(source, size):
    return Image.fromarray(getattr(photographs, source)()).convert("RGB").resize(size)


def network(seed=0, num_classes=4):
    """A network that tells the photographs apart: its logits are centred on them."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=num_classes, norm_layer="groupnorm1").eval()
    pixels = np.stack([np.asarray(photograph(source, (160, 160))) for source in SOURCES])
    with torch.no_grad():
        model.fc.bias -= model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).mean(dim=0)
    return model


def results(report):
    return {key: value for key, value in report.to_dict().items() if key not in TIMED}


def by_hand(model, root, name=None, severity=3, seed=0):
    """What the numbers should be, written as plainly as can be."""
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    resize, crop, to_tensor, normalize = transform.transforms
    right = []
    for path in sorted(root.glob("*/*.jpg")):
        if path.name == "cut off.jpg":
            continue
        image = crop(resize(Image.open(path).convert("RGB")))
        if name:
            key = path.relative_to(root).as_posix()
            image = Image.fromarray(corrupt(image, name, severity, image_seed(seed, name, severity, key)))
        with torch.no_grad():
            logits = model(normalize(to_tensor(image))[None])
        right.append(int(logits.argmax()) == int(path.parent.name[-1]))
    return 100 * sum(right) / len(right)


def test_a_host_that_takes_blue_first_gets_blue_first(root):
    reports = []
    for order in ("rgb", "bgr"):
        model = network()
        if order == "bgr":
            with torch.no_grad():
                first = model.conv1[0].weight
                first.copy_(first.flip(1))
        quac.inject(model, quac.PriorConfig(channel_order=order))
        reports.append(evaluate(model, root, corruptions="contrast"))
    assert results(reports[0])["clean"] == results(reports[1])["clean"]
    assert reports[0].corruptions == reports[1].corruptions


def test_numbers_are_those_of_a_plain_loop(root):
    found = []
    for seed in range(2):
        model = network(seed)
        report = evaluate(model, root, corruptions="contrast,gaussian_noise", severities=(1, 4), seed=seed)
        assert report.clean["top1"] == by_hand(model, root)
        for name in ("contrast", "gaussian_noise"):
            for severity in (1, 4):
                scores = report.corruptions[name][str(severity)]
                assert scores["top1"] == by_hand(model, root, name, severity, seed)
                assert scores["n"] == 8
        found.append(report.clean["top1"])
    assert len(set(found)) > 1


def test_the_report_names_unreadable_files_and_settings(root):
    report = evaluate(network(), root, corruptions="fog", seed=3, limit=100)
    assert report.unreadable == [str(root / "class 1" / "cut off.jpg")]
    assert report.clean["n"] == report.corruptions["fog"]["3"]["n"] == 8
    assert report.clean["top5"] == 100.0
    assert (report.seed, report.severities, report.limit, report.data) == (3, [3], 100, str(root))
    assert report.preprocessing["crop_pct"] == 0.95
    assert report.versions["torch"] == torch.__version__.split("+")[0] or report.versions["torch"] == torch.__version__
    assert report.mean_corruption_top1 == report.corruptions["fog"]["3"]["top1"]


def test_batch_size_workers_order_and_other_corruptions_do_not_matter(root):
    model = network()
    one = results(evaluate(model, root, corruptions="fog,impulse_noise", batch_size=1))
    assert results(evaluate(model, root, corruptions="fog,impulse_noise", batch_size=7, num_workers=2)) == one
    swapped = evaluate(model, root, corruptions="impulse_noise,snow,fog", clean=False).corruptions
    assert {name: swapped[name] for name in ("fog", "impulse_noise")} == one["corruptions"]


def test_what_became_of_each_image_is_that_of_a_plain_loop(root):
    model = network()
    report = evaluate(model, root, corruptions="contrast", severities=4, seed=1)
    kept = report.outcomes
    images = sorted(path.relative_to(root).as_posix() for path in root.glob("*/*.jpg") if path.name != "cut off.jpg")
    assert kept["images"] == images
    assert kept["targets"] == [int(image[6]) for image in images]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    pixels = torch.stack([transform(Image.open(root / image).convert("RGB")) for image in images])
    with torch.no_grad():
        logits = model(pixels)
    right = logits.gather(1, torch.tensor(kept["targets"])[:, None])
    assert kept["predicted"]["clean"] == logits.argmax(dim=1).tolist()
    assert kept["rank"]["clean"] == (1 + (logits > right).sum(dim=1)).tolist()
    for name, scores in (("clean", report.clean), ("contrast/4", report.corruptions["contrast"]["4"])):
        hits = [p == t for p, t in zip(kept["predicted"][name], kept["targets"], strict=True)]
        assert hits == [rank == 1 for rank in kept["rank"][name]]
        assert scores["top1"] == 100 * sum(hits) / len(hits)
    assert evaluate(model, root, outcomes=False).outcomes == {}


def test_networks_of_one_name_are_told_apart(root):
    model = network()
    first = evaluate(model, root, limit=2, amp=True, mean=0.5).to_dict()
    quac.inject(model, quac.QuACConfig(quality=channel_statistics, quality_channels=6, where="layer1.*"))
    second = evaluate(model, root, limit=2).to_dict()
    host, inside = (found["network"]["host"]["fingerprint"] for found in (first, second))
    assert host == inside
    assert first["network"]["weights"] != second["network"]["weights"]
    assert first["network"]["inside"] is None
    assert second["network"]["inside"]["activations"]["config"]["activation"] == "qacon"
    assert (first["device"], first["precision"]) == ("cpu", "float32, autocast bfloat16")
    assert second["precision"] == "float32"
    assert [found["preprocessing"]["from"]["mean"] for found in (first, second)] == ["given", "network"]
    with torch.no_grad():
        model.layer1[0].act1.p1 += 1
    third = evaluate(model, root, limit=2).to_dict()["network"]
    assert third["inside"]["sha256"] != second["network"]["inside"]["sha256"]


def test_everything_is_left_as_it_was(root):
    model = network().train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    evaluate(model, root, corruptions="fog", num_workers=1, limit=4)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]
    model.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, root)
    assert [module.training for module in model.modules()] == modes


class Scripted(nn.Module):
    """Logits from the mean of an image: class 1, but NaN for what is all black."""

    num_classes = 4

    def forward(self, x):
        logits = torch.zeros(len(x), 4)
        logits[:, 1] = 1
        logits[x.amax(dim=(1, 2, 3)) < -1] = float("nan")
        return logits


def test_nan_is_wrong_and_reported(tmp_path):
    for folder in "abcd":
        (tmp_path / folder).mkdir()
        Image.new("RGB", (224, 224), "white").save(tmp_path / folder / "white.png")
    Image.new("RGB", (224, 224), "black").save(tmp_path / "b" / "black.png")
    report = evaluate(Scripted(), tmp_path, corruptions="contrast")
    assert report.clean == {"top1": 20.0, "top5": 80.0, "n": 5}
    assert report.nan_outputs == {"clean": 1, "contrast/3": 1}
    black = report.outcomes["images"].index("b/black.png")
    assert report.outcomes["predicted"]["clean"][black] == report.outcomes["rank"]["contrast/3"][black] == -1
    assert report.model == "Scripted"


def test_only_unreadable_images_give_no_numbers(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"no image")
    report = evaluate(Scripted(), tmp_path, corruptions="fog", class_map={"a": 1})
    assert report.clean == {"top1": None, "top5": None, "n": 0}
    assert report.mean_corruption_top1 is None
    assert report.unreadable == [str(tmp_path / "a" / "x.jpg")]


def imagenet_c(folder, *conditions):
    for name, severity in conditions:
        for index, source in enumerate(SOURCES[:3]):
            image = np.array(photograph(source, (160, 160)))
            path = folder / name / str(severity) / f"class {index}" / f"{source}.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(corrupt(image, name, severity, 1)).save(path)
    return folder


@pytest.mark.filterwarnings("ignore:3 folders")
def test_imagenet_c_is_read_as_it_is(tmp_path):
    root = imagenet_c(tmp_path, ("snow", 1), ("fog", 2), ("fog", 5))
    model = network()
    report = evaluate(model, root)
    assert (report.clean, report.layout, report.severities) == (None, "imagenet-c", [1, 2, 5])
    assert {name: list(levels) for name, levels in report.corruptions.items()} == {"snow": ["1"], "fog": ["2", "5"]}
    images = [f"class {index}/{source}.png" for index, source in enumerate(SOURCES[:3])]
    assert report.outcomes["images"] == images
    (root / "fog" / "2" / images[0]).write_bytes(b"no image")
    half = evaluate(model, root).outcomes  # each condition has files of its own
    assert half["images"] == images
    assert (half["rank"]["fog/2"][0], half["predicted"]["fog/2"][0]) == (None, None)
    assert half["rank"]["fog/5"] == report.outcomes["rank"]["fog/5"]
    fog = evaluate(model, root / "fog" / "5")  # the same images, as a directory of classes
    assert report.corruptions["fog"]["5"] == fog.clean
    assert list(evaluate(model, root, corruptions="fog", severities=2).corruptions["fog"]) == ["2"]
    with pytest.raises(ValueError, match="holds no frost; it holds snow/1, fog/2, fog/5"):
        evaluate(model, root, corruptions="frost")
    with pytest.raises(ValueError, match="no severity of"):
        evaluate(model, root, severities=3)


class Seen(nn.Module):
    """Keeps what it is given."""

    num_classes = 4

    def __init__(self, **config):
        super().__init__()
        self.pretrained_cfg, self.images = config, []

    def forward(self, x):
        self.images.append(x)
        return torch.zeros(len(x), 4)


@pytest.mark.filterwarnings("ignore:1 folders")
def test_preprocessing_is_the_networks_unless_given(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.array(Image.fromarray(photographs.astronaut()).resize((64, 64)))
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    model = Seen(input_size=(3, 64, 64), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0), crop_pct=0.8)
    evaluate(model, tmp_path)
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1)
    assert torch.allclose(model.images.pop()[0], expected, atol=1e-6)  # of the network's size: taken as it is
    evaluate(model, tmp_path, crop_pct=0.8)
    assert not torch.allclose(model.images.pop()[0], expected, atol=1e-1)
    evaluate(model, tmp_path, mean=0, std=1, crop_pct=1.0)
    assert torch.allclose(model.images.pop()[0] * 255, torch.from_numpy(pixels).permute(2, 0, 1).float(), atol=1e-3)
    report = evaluate(model, tmp_path, input_size=(32, 48), interpolation="bilinear")
    assert model.images.pop().shape == (1, 3, 32, 48)
    assert report.preprocessing["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean must be one number or three"),
        ({"std": 0}, "std must be above 0"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"interpolation": "best"}, "unknown interpolation"),
        ({"input_size": 0}, "input_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"corruptions": "fogg"}, "Did you mean fog"),
        ({"corruptions": "fog", "severities": (0,)}, "1 to 5"),
        ({"corruptions": "fog", "severities": ()}, "no severity"),
        ({"clean": False}, "nothing to measure"),
        ({"limit": 0}, "limit"),
    ],
)
def test_wrong_arguments(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(network(), root, **arguments)


def test_networks_that_do_not_fit(root):
    with pytest.raises(ValueError, match="the network has 3 classes"):
        evaluate(network(num_classes=3), root)
    with pytest.raises(ValueError, match="class index 3 for a model of 2 classes"):
        evaluate(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), root)
    with pytest.raises(TypeError, match="logits of shape"):
        evaluate(nn.Identity(), root)
    with pytest.raises(ValueError, match="three input channels"):
        evaluate(Seen(input_size=(1, 64, 64)), root)


def test_half_precision_and_amp(root):
    clean = evaluate(network(), root).clean
    assert evaluate(network(), root, amp=True).clean["n"] == clean["n"]
    assert evaluate(network().bfloat16(), root, device="cpu").clean["n"] == clean["n"]
    quantized = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})
    assert evaluate(quantized, root).clean["n"] == clean["n"]


def test_wrapped_networks_use_the_config_inside(root):
    model = network()
    assert evaluate(nn.DataParallel(model), root).to_dict()["clean"] == evaluate(model, root).to_dict()["clean"]
