"""What is exported computes what the model computes, on photographs of any number and size, without this package."""

import subprocess
import sys
import warnings

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from skimage import data
from torch import _inductor as inductor
from torchvision.models.feature_extraction import create_feature_extractor
from typer.testing import CliRunner

import quac_plugins as quac
from quac_plugins.commands import app

KINDS = {
    "qacon": ("test_resnet_qacon", {}),
    "single": ("test_resnet_ddp", {}),
    "routed": ("test_resnet_ddp", {"experts": ["fog", "gaussian_noise"]}),
    "margins": ("test_resnet_ddp", {"fdm": "margin", "quality": "degradation", "experts": ["fog", "gaussian_noise"]}),
    "both": ("test_resnet_qacon_ddp", {"quality": "brisque_tone", "experts": ["fog", "gaussian_noise"]}),
}
SIZES = [(64, 64), (65, 97), (96, 80)]


def photographs(*size):
    pixels = [torch.from_numpy(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    resized = [F.interpolate(p.permute(2, 0, 1)[None] / 255, size, mode="bilinear", antialias=True) for p in pixels]
    means, stds = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.cat(resized).clamp(0, 1) - means) / stds


@pytest.fixture(scope="module")
def models():
    """Each kind once, moved away from its host."""
    found = {}

    def build(kind):
        if kind not in found:
            torch.manual_seed(0)
            name, options = KINDS[kind]
            found[kind] = timm.create_model(name, num_classes=10, **options).eval()
            with torch.no_grad():
                for tensor in filter(torch.is_floating_point, quac.adapter_state(found[kind]).values()):
                    tensor.add_(torch.rand_like(tensor) * 0.02)
        return found[kind]

    return build


def assert_same(model, run, sizes=SIZES):
    for size in sizes:
        for images in (photographs(*size), photographs(*size)[:1]):
            with torch.no_grad():
                expected = model(images)
            torch.testing.assert_close(run(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def session(path):
    loaded = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(loaded.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("kind", ["qacon", "single", "routed", "margins"])
def test_the_old_exporter_writes_onnx_for_every_batch_and_size(kind, models, tmp_path):
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            models(kind), (photographs(64, 96)[:2],), f"{tmp_path}/model.onnx", dynamo=False, opset_version=18,
            dynamic_axes=axes, input_names=["images"],
        )  # fmt: skip
    assert_same(models(kind), session(f"{tmp_path}/model.onnx"))


def test_the_new_exporter_writes_onnx_for_every_batch_and_size(models, tmp_path):
    path = tmp_path / "model.onnx"
    done = quac.export(models("both"), path, example=photographs(64, 96)[:2], dynamic_size=True, opset=20)
    assert done.difference < 1e-5
    assert list(tmp_path.iterdir()) == [path]
    assert_same(models("both"), session(path))


RUN = """
import sys
sys.modules["quac_plugins"] = sys.modules["timm"] = None
import torch
folder = sys.argv[1]
runs = {"qacon": torch.jit.load(f"{folder}/qacon.pt")}
runs |= {kind: torch.export.load(f"{folder}/{kind}.pt2").module() for kind in ("single", "routed")}
for kind, run in runs.items():
    for images, expected in torch.load(f"{folder}/{kind}.tensors"):
        torch.testing.assert_close(run(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
"""


def test_scripts_and_programs_run_where_this_package_is_not(models, tmp_path):
    for kind, format, suffix, sizes in (
        ("qacon", "torchscript", "pt", SIZES),
        ("single", "torch-export", "pt2", SIZES),
        ("routed", "torch-export", "pt2", [(64, 96)]),  # symbolic sizes of BRISQUE take their time: see its own tests
    ):
        model, path = models(kind), tmp_path / f"{kind}.{suffix}"
        example = photographs(64, 96)[:2]
        done = quac.export(model, path, format=format, example=example, dynamic_size=len(sizes) > 1)
        assert done.difference < 1e-5
        with torch.no_grad():
            pairs = [(photographs(*size)[:n], model(photographs(*size)[:n])) for size in sizes for n in (1, 4)]
        torch.save(pairs, f"{tmp_path}/{kind}.tensors")
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True)


def tones(images):
    return torch.cat([images.mean((2, 3)), images.square().mean((2, 3))], dim=1)


def test_aotinductor_compiles_both_kinds_for_every_batch_and_size(tmp_path):
    # a small quality function: BRISQUE takes minutes to compile
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, 2, 1)]
    model = torch.nn.Sequential(*layers).eval()
    example = torch.rand(2, 3, 32, 48)
    quality = quac.QualityFunction("tones", 6, tones, builtin=False)
    quac.inject(model, quac.QuACConfig(quality=quality, norm="layer", mean=(0.0,), std=(1.0,)), example)
    prior = quac.PriorConfig(site="1", quality=quality, experts=["fog"], fdm="light", mean=(0.0,), std=(1.0,))
    quac.inject(model, prior, example)
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, quac.adapter_state(model).values()):
            tensor.add_(torch.rand_like(tensor) * 0.2)
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (example,), dynamic_shapes=(axes,))
    path = inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/model.pt2")
    run = inductor.aoti_load_package(path)
    for shape in ((2, 32, 48), (1, 34, 50), (3, 37, 64)):
        images = torch.rand(shape[0], 3, *shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qacon", "single", "routed"])
def test_torch_fx_takes_what_is_put_in_whole(kind, models):
    model, images = models(kind), photographs(64, 64)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))
        part = create_feature_extractor(model, ["layer3"])
        assert torch.equal(part(images)["layer3"], model.forward_intermediates(images, indices=[3])[1][0])


class Random(torch.nn.Module):
    def forward(self, images):
        return images.mean((1, 2, 3)) + torch.rand(1)


class Branching(torch.nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


@pytest.mark.parametrize(
    ("model", "format", "error", "message"),
    [
        (Random(), "torchscript", ValueError, r"differ from the model's by .* was not written"),
        (Branching(), "torch-export", RuntimeError, "torch cannot write Branching as torch-export"),
        (Random(), "onxn", ValueError, "did you mean 'onnx'"),
    ],
)
def test_what_cannot_be_right_is_not_written(model, format, error, message, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"of the user")
    with pytest.raises(error, match=message):
        quac.export(model, path, format=format, example=torch.rand(2, 3, 8, 8))
    assert path.read_bytes() == b"of the user"
    assert list(tmp_path.iterdir()) == [path]


def test_onnx_says_how_to_install_what_it_needs(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'ONNX needs onnxscript: pip install "quac-plugins\[onnx\]"'):
        quac.export(models("single"), tmp_path / "model.onnx")


def test_the_command_writes_the_adapter_and_its_host(models, tmp_path):
    model = models("single")
    quac.save_adapter(model, tmp_path / "adapter")
    host = {name: value for name, value in model.state_dict().items() if "quac_" not in name}
    save_file(host, tmp_path / "host.safetensors")
    arguments = ["export", "test_resnet", "--adapter", f"{tmp_path}/adapter", "--num-classes", "10", "--input-size"]
    arguments += ["64", "--base-checkpoint", f"{tmp_path}/host.safetensors", "--format", "torchscript", "--out"]
    done = CliRunner().invoke(app, [*arguments, f"{tmp_path}/model.pt"])
    assert done.exit_code == 0, done.output
    assert "differs from the model by" in done.output
    assert_same(model, torch.jit.load(tmp_path / "model.pt"), sizes=[(64, 64)])
    refused = CliRunner().invoke(app, [*arguments, f"{tmp_path}/host.safetensors"])
    assert refused.exit_code == 2
    assert "would replace" in refused.output
