import hashlib
import json
import os
import pickle
import runpy
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data as photographs
from typer.testing import CliRunner

import quac_plugins
from quac_plugins.commands import app
from quac_plugins.degradations import CORRUPTIONS, EXTRA_CORRUPTIONS
from quac_plugins.evaluate import EvaluationReport


def quac(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, source in enumerate(["astronaut", "chelsea", "coffee", "rocket"]):
        path = folder / f"class {index}" / f"{source}.JPG"
        path.parent.mkdir()
        Image.fromarray(getattr(photographs, source)()).resize((180, 170)).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=4)
    path = tmp_path_factory.mktemp("weights") / "host.safetensors"
    save_file(
        {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}, path
    )
    return path


def test_evaluate_prints_writes_and_draws(images, weights, tmp_path):
    done = quac(
        *("evaluate", "test_resnet", "--data", images, "--base-checkpoint", weights, "--num-classes", 4),
        *("--mean", 0.5, "--std", "0.5,0.5,0.5", "--corruptions", "fog,contrast", "--severities", "1,3", "--seed", 5),
        *("--json", tmp_path / "new" / "out.json", "--plot", tmp_path / "out.png", "--batch-size", 3),
    )
    assert done.exit_code == 0, done.output
    assert "contrast" in done.stdout
    content = json.loads((tmp_path / "new" / "out.json").read_text())
    assert (content["model"], content["seed"], content["severities"]) == ("test_resnet", 5, [1, 3])
    assert content["clean"]["n"] == 4
    assert content["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_hosts_with_modules_put_in_compute_what_their_host_computes(images, weights, tmp_path):
    tail = ["--data", images, "--base-checkpoint", weights, "--num-classes", 4, "--corruptions", "fog", "--json"]
    for name in ("test_resnet", "test_resnet_qacon"):
        done = quac("evaluate", name, *tail, tmp_path / f"{name}.json")
        assert done.exit_code == 0, done.output
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("test_resnet", "test_resnet_qacon"))
    assert first["clean"] == second["clean"]
    assert first["corruptions"] == second["corruptions"]


def test_evaluations_with_and_without_an_adapter_can_be_told_apart(images, weights, tmp_path):
    config = quac_plugins.QuACConfig(where="layer1.*")
    model = quac_plugins.inject(timm.create_model("test_resnet", num_classes=4), config)
    folder = quac_plugins.save_adapter(model, tmp_path / "my-adapter")
    tail = ["--data", images, "--base-checkpoint", weights, "--model-kwargs", "num_classes=4", "--limit", 2]
    found = {}
    for name, more in {"plain": ["--no-outcomes"], "adapter": ["--adapter", folder]}.items():
        done = quac("evaluate", "test_resnet", *tail, *more, "--json", tmp_path / f"{name}.json")
        assert done.exit_code == 0, done.output
        assert ("other weights" in done.stderr) == (name == "adapter")
        found[name] = EvaluationReport.from_json(tmp_path / f"{name}.json")
    of_file = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    given = found["adapter"].network["given"]
    assert found["adapter"].network["inside"]["sha256"] == of_file
    assert given["adapter"] == {"name": str(folder)}
    assert given["base_checkpoint"] == {
        "path": str(weights),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    assert given["model_kwargs"] == {"num_classes": 4}
    assert f"test_resnet + my-adapter ({of_file[:6]})" in done.stdout
    assert found["plain"].label == "test_resnet"
    assert found["plain"].outcomes == {}
    assert len(found["adapter"].outcomes["images"]) == 2


def test_mean_and_std_reach_the_modules_that_look_at_the_image(weights):
    from quac_plugins.core.quality.tap import QualityTap
    from quac_plugins.evaluate.building import build_model

    model = build_model("test_resnet_qacon", base_checkpoint=weights, num_classes=4, mean=[0.5], std=0.25)
    taps = [module for module in model.modules() if isinstance(module, QualityTap)]
    assert [(set(tap.mean), set(tap.std)) for tap in taps] == [({0.5}, {0.25})]


def test_an_adapter_and_a_whole_checkpoint(images, weights, tmp_path):
    model = timm.create_model("test_resnet_qacon", num_classes=4)
    quac_plugins.save_adapter(model, tmp_path / "adapter")
    tail = ["--data", images, "--num-classes", 4, "--limit", 2]
    done = quac("evaluate", "test_resnet", *tail, "--base-checkpoint", weights, "--adapter", tmp_path / "adapter")
    assert done.exit_code == 0, done.output
    torch.save({"state_dict": model.state_dict()}, tmp_path / "whole.pt")
    done = quac("evaluate", "test_resnet_qacon", *tail, "--checkpoint", tmp_path / "whole.pt")
    assert done.exit_code == 0, done.output
    done = quac("evaluate", "test_resnet", *tail, "--base-checkpoint", weights, "--adapter", tmp_path / "none")
    assert done.exit_code == 2
    assert "no adapter" in done.stderr


def test_model_kwargs_reach_timm(images, weights):
    head = ("evaluate", "test_resnet", "--data", images, "--no-pretrained", "--model-kwargs")
    done = quac(*head, "num_classes=4,global_pool=max", "--model-kwargs", "in_chans=1", "--num-classes", 4)
    assert done.exit_code == 2  # the photographs have three channels
    assert done.stderr.startswith("error:")
    assert quac(*head, "num_classes=4,global_pool=max").exit_code == 0
    done = quac(*head, "num_classes")
    assert (done.exit_code, done.stderr.strip()) == (2, "error: --model-kwargs: expected key=value, got 'num_classes'")


def test_networks_of_one_size_are_built_for_the_size_asked_for(images):
    done = quac(
        *("evaluate", "test_vit", "--data", images, "--no-pretrained", "--num-classes", 4, "--input-size", 96),
        *("--crop-pct", 1, "--interpolation", "bilinear"),
    )
    assert done.exit_code == 0, done.output


def test_unreadable_images_show_in_the_exit_code(images, weights, tmp_path):
    root = tmp_path / "images"
    (root / "a b").mkdir(parents=True)
    (root / "a b" / "ü.jpg").write_bytes(b"no image")
    Image.new("RGB", (50, 50)).save(root / "a b" / "x.png")
    done = quac(
        "evaluate", "test_resnet", "--data", root, "--no-pretrained", "--num-classes", 1, "--json", root / "o.json"
    )
    assert done.exit_code == 3, done.output
    assert f"unreadable: {root / 'a b' / 'ü.jpg'}" in done.stderr
    assert "clean" in done.stdout
    assert json.loads((root / "o.json").read_text())["clean"]["n"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/none/there"], "there is no directory /none/there"),
        (["--corruptions", "fogg"], "Did you mean fog"),
        (["--severities", "1,x"], "--severities: expected numbers"),
        (["--severity", "1", "--severities", "2"], "--severity is the old name of --severities"),
        (["--severities", "9", "--corruptions", "fog"], "from 1 to 5"),
        (["--num-classes", "3"], "the network has 3 classes"),
        (["--base-checkpoint", "none.pt"], "there is no checkpoint none.pt"),
        (["--checkpoint", "none.pt"], "there is no checkpoint none.pt"),
        (["--plot", "out.docx"], "must end in one of"),
        (["--device", "abacus"], "abacus"),
        (["--input-size", "1,2,3,4"], "input_size"),
    ],
)
def test_mistakes_are_told_in_one_line(images, arguments, message):
    start = ["evaluate", "test_resnet", "--data", images, "--num-classes", 4]
    if "--base-checkpoint" not in arguments and "--checkpoint" not in arguments:
        start.append("--no-pretrained")
    done = quac(*start, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.output


def test_files_that_do_not_fit_are_named(images, weights, tmp_path):
    start = ["evaluate", "test_resnet", "--data", images]
    for arguments in (["--num-classes", 5, "--base-checkpoint", weights], ["--checkpoint", weights]):
        done = quac(*start, *arguments)
        assert done.exit_code == 2
        assert f"error: the weights in {weights} do not fit test_resnet: size mismatch for fc.weight" in done.stderr
    contents = {
        "text.safetensors": b"no tensors",
        "text.pt": b"no tensors",
        "unsafe.pt": pickle.dumps(os.system, protocol=2),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        done = quac(*start, "--num-classes", 4, "--base-checkpoint", tmp_path / name)
        assert done.exit_code == 2, done.output
        assert f"{name} is no file of weights" in done.stderr
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    done = quac(*start, "--num-classes", 4, "--checkpoint", tmp_path / "epoch.pt")
    assert (done.exit_code, "'epoch' is no tensor" in done.stderr) == (2, True)


def test_unknown_models_and_missing_options(images):
    done = quac("evaluate", "resnet_fifty", "--data", images, "--no-pretrained")
    assert (done.exit_code, done.stderr.strip()) == (2, "error: Unknown model (resnet_fifty)")
    assert quac("evaluate", "test_resnet").exit_code == 2
    with pytest.raises(RuntimeError, match="Unknown model"):
        CliRunner().invoke(
            app,
            ["evaluate", "resnet_fifty", "--data", str(images), "--no-pretrained", "--debug"],
            catch_exceptions=False,
        )


def test_list():
    assert quac("list", "--what", "corruptions").stdout.split() == [*CORRUPTIONS, *EXTRA_CORRUPTIONS]
    assert quac("list", "--what", "corruptions", "*_blur").stdout.split()[-1] == "gaussian_blur"
    assert "qacon" in quac("list", "--what", "activations").stdout.split()
    assert {"light", "ncrf"} <= set(quac("list", "--what", "priors").stdout.split())
    assert "brisque" in quac("list", "--what", "quality").stdout.split()
    names = quac("list", "resnet*").stdout.splitlines()
    assert names.index("resnet18_qacon") < names.index("resnet101_qacon")
    assert {"resnet18_ddp", "resnet18_qacon_ddp"} < set(names)
    assert all(name.startswith("resnet") and name.endswith(("_qacon", "_ddp")) for name in names)
    assert "resnet18_qacon.a1_in1k" in quac("list", "resnet18_qacon", "--pretrained").stdout.splitlines()
    done = quac("list", "no_such_*")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "no models match 'no_such_*'\n")


def test_the_module_runs_and_pipes_plain_lines():
    done = subprocess.run(
        [sys.executable, "-m", "quac_plugins.cli", "list", "test_resnet*"], capture_output=True, text=True, timeout=120
    )
    names = ["test_resnet_ddp", "test_resnet_qacon", "test_resnet_qacon_ddp"]
    assert (done.returncode, done.stdout.splitlines()) == (0, names), done.stderr


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_the_command_says_how_to_install_them(package, monkeypatch):
    from quac_plugins import cli

    for name in [n for n in sys.modules if n.split(".")[0] == package or n.startswith("quac_plugins.commands")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=r'pip install "quac-plugins\[evaluate\]"'):
        cli.main()


def test_the_command_tells_its_version_and_what_it_can(monkeypatch, capsys):
    assert quac("--version").output == f"quac {quac_plugins.__version__}\n"
    monkeypatch.setattr(sys, "argv", ["quac_plugins", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("quac_plugins", run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("Usage: quac [OPTIONS] COMMAND")
    assert all(command.name in said for command in app.registered_commands)


@pytest.mark.parametrize("options", [("--mean", 0.5), ("--std", 0.5), ("--mean", "nan", "--std", 1)])
def test_half_a_normalization_is_refused(images, options):
    done = quac("evaluate", "test_resnet", "--data", images, "--no-pretrained", *options)
    assert done.exit_code == 2
    assert "--mean and --std" in done.output
