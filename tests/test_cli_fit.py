"""``quac fit-prior`` and ``quac fit-qacon``, and ``quac evaluate`` with what they write."""

import errno
import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as photographs
from typer.testing import CliRunner

import quac_plugins
from quac_plugins.commands import app
from quac_plugins.commands.fit_network import build_network
from quac_plugins.core.inject.surgery import injection_of
from quac_plugins.fit.training import Fit

FILES = ["adapter_config.json", "adapter_model.safetensors", "fit_report.json"]
QUICK = ["--input-size", 64, "--views", 1, "--draws", 3, "--steps", 4, "--batch-size", 4, "--device", "cpu"]


def quac(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, source in enumerate(["astronaut", "chelsea", "coffee", "rocket"]):
        path = folder / f"class {index}" / f"{source}.JPG"
        path.parent.mkdir()
        Image.fromarray(getattr(photographs, source)()).resize((90, 85)).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "host.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), path)
    return path


@pytest.fixture
def start(images, weights, tmp_path):
    """fit(command, name, …) with the photographs, the weights and a new folder for the adapter."""

    def run(command, name, *arguments, images=images, out=tmp_path / "adapter"):
        source = ["--data", images] if images is not None else []
        given = [*source, "--out", out, "--base-checkpoint", weights, "--num-classes", 4, *QUICK]
        return quac(command, name, *given, *arguments)

    return run


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet_qacon_ddp"])
def test_fit_prior_then_evaluate(start, images, weights, tmp_path, name):
    done = start(
        *("fit-prior", name, "--corruptions", "contrast", "--severities", "3,5", "--mean", 0.5, "--std", 0.25),
        *("--fdm", "light"),
        *("--json", tmp_path / "new" / "report.json", "--plot", tmp_path / "curve.png", "--seed", 2, "--lr", 0.01),
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("prior after act1")
    assert "prior: held-out loss" in done.stdout
    assert files(tmp_path / "adapter") == FILES
    report = json.loads((tmp_path / "adapter" / "fit_report.json").read_text())
    assert report == json.loads((tmp_path / "new" / "report.json").read_text())
    assert (report["kinds"], report["recipe"]["severities"], report["seed"]) == (["contrast"], [3, 5], 2)
    assert (report["recipe"]["steps"], report["recipe"]["lr"]) == (4, 0.01)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["prior"]["config"]["experts"] == []
    assert (config["config"] is not None) == ("qacon" in name)
    assert config["host"]["architecture"] == "test_resnet"
    # by any of its names
    reports = []
    for other in ("test_resnet", "test_resnet_ddp", "test_resnet_qacon_ddp"):
        done = quac(
            *("evaluate", other, "--base-checkpoint", weights, "--num-classes", 4, "--data", images, "--adapter"),
            *(tmp_path / "adapter", "--mean", 0.5, "--std", 0.25, "--corruptions", "contrast", "--device", "cpu"),
            *("--json", tmp_path / "evaluated.json", "--input-size", 64),
        )
        assert done.exit_code == 0, done.output
        reports.append(json.loads((tmp_path / "evaluated.json").read_text()))
    assert reports[0]["corruptions"] == reports[1]["corruptions"] == reports[2]["corruptions"]
    assert reports[0]["clean"]["n"] == 4


def test_several_corruptions_are_routed(start, images, weights, tmp_path):
    done = start("fit-prior", "test_resnet", "--corruptions", "contrast,pixelate", "--top-k", 2, "--site", "layer1")
    assert done.exit_code == 0, done.output
    assert "gate, on pictures held out" in done.stdout
    prior = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["prior"]["config"]
    assert (prior["experts"], prior["top_k"], prior["site"]) == (["contrast", "pixelate"], 2, "layer1")
    # one of its experts again, beginning with it; the other stays
    done = start("fit-prior", "test_resnet_ddp", "--adapter", tmp_path / "adapter", "--corruptions", "pixelate")
    assert done.exit_code == 2
    assert "holds adapter_config.json already; give another folder, or --overwrite" in done.stderr
    before = load_file(tmp_path / "adapter" / FILES[1])
    done = start(
        *("fit-prior", "test_resnet_ddp", "--adapter", tmp_path / "adapter", "--corruptions", "pixelate", "--lr", 0.1),
        *("--overwrite", "--severities", 5),
    )
    assert done.exit_code == 0, done.output
    after = load_file(tmp_path / "adapter" / FILES[1])
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items() if ".experts.0." in n)
    assert list(json.loads((tmp_path / "adapter" / FILES[2]).read_text())["stages"]) == ["pixelate"]
    for options, message in (
        (["--corruptions", "fog"], "routed over the experts contrast, pixelate; it cannot be fitted on fog"),
        (["--site", "layer2"], "says itself what is put in: leave out site"),
        (["--single"], "leave out single"),
        (["--model-kwargs", "fdm=ncrf"], "leave out fdm"),
    ):
        done = start("fit-prior", "test_resnet", "--adapter", tmp_path / "adapter", *options, out=tmp_path / "b")
        assert done.exit_code == 2
        assert message in done.stderr
    done = start("fit-prior", "test_resnet", "--corruptions", "contrast,pixelate", "--single", out=tmp_path / "c")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "c" / FILES[0]).read_text())["prior"]["config"]["experts"] == []


def test_a_budget_pays_for_modules_beside_margins(start, tmp_path):
    done = start("fit-prior", "test_resnet_ddp", "--corruptions", "contrast", "--budget", 0.5)
    assert done.exit_code == 0, done.output
    assert "budget 0.5: margins, and light FDMs of width" in done.stdout
    prior = json.loads((tmp_path / "adapter" / FILES[0]).read_text())["prior"]["config"]
    assert (prior["fdm"], prior["site"], prior["margins"]) == ("light", "stages", True)


def test_options_reach_the_fit(start, images, weights, tmp_path):
    done = start(
        *("fit-prior", "test_resnet", "--corruptions", "contrast", "--fdm", "ncrf", "--fdm-act", "gelu", "--limit", 3),
        *("--deep", "layer2", "--deep", "layer4", "--held-out", 0.4, "--amp", "bf16", "--num-workers", 1),
        *("--model-kwargs", "fdm_width=8", "--crop-pct", 1, "--interpolation", "bilinear"),
    )
    assert done.exit_code == 0, done.output
    prior = json.loads((tmp_path / "adapter" / FILES[0]).read_text())["prior"]["config"]
    assert (prior["fdm"], prior["fdm_act"], prior["fdm_width"]) == ("ncrf", "gelu", 8)
    report = json.loads((tmp_path / "adapter" / FILES[2]).read_text())
    assert report["images"] == {"all": 3, "held": 1}
    assert report["recipe"]["amp"] == "bf16"
    done = start("fit-prior", "test_resnet", "--corruptions", "contrast", "--deep", "none", out=tmp_path / "b")
    assert done.exit_code == 0, done.output


def test_pairs(start, images, tmp_path):
    for path in images.rglob("*.JPG"):
        with Image.open(path) as image:
            image.point(lambda value: value // 2).save(tmp_path / f"{path.stem}.png")
    for path in images.rglob("*.JPG"):
        (tmp_path / "clean").mkdir(exist_ok=True)
        (tmp_path / "clean" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "dark").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "dark" / path.name)
    pairs = ["--pairs", tmp_path / "dark", tmp_path / "clean"]
    done = start("fit-prior", "test_resnet", *pairs, images=None)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "adapter" / FILES[2]).read_text())["kinds"] == ["pairs"]
    for arguments, message in (
        ([*pairs, "--corruptions", "fog"], "--pairs are degraded already"),
        ([*pairs, "--routed"], "--routed needs corruptions"),
        ([], "give either --data or --pairs, got neither"),
        ([*pairs, "--data", images], "got both"),
    ):
        done = start("fit-prior", "test_resnet", *arguments, images=None, out=tmp_path / "b")
        assert (done.exit_code, message in done.stderr) == (2, True), done.output


def test_fit_qacon(start, images, weights, tmp_path):
    done = start(
        "fit-qacon", "test_resnet", "--corruptions", "contrast", "--model-kwargs", "activation=qswish,norm=layer"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("qacon after ")
    config = json.loads((tmp_path / "adapter" / FILES[0]).read_text())
    assert (config["config"]["activation"], config["config"]["norm"], config.get("prior")) == ("qswish", "layer", None)
    # a prior beside it
    done = start(
        *("fit-prior", "test_resnet", "--corruptions", "contrast", "--adapter", tmp_path / "adapter"),
        out=tmp_path / "both",
    )
    assert done.exit_code == 0, done.output
    both = json.loads((tmp_path / "both" / FILES[0]).read_text())
    assert both["config"] == config["config"]
    assert both["prior"] is not None
    old, new = (load_file(tmp_path / name / FILES[1]) for name in ("adapter", "both"))
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    for name in ("test_resnet_qacon", "test_resnet_qacon_ddp"):
        done = quac(
            *("evaluate", name, "--base-checkpoint", weights, "--num-classes", 4, "--data", images, "--adapter"),
            *(tmp_path / "both", "--device", "cpu"),
        )
        assert done.exit_code == 0, done.output


def test_fit_qacon_with_labels_and_prior(start, images, tmp_path):
    plain = ["fit-qacon", "test_resnet_qacon", "--corruptions", "contrast"]
    assert start(*plain, out=tmp_path / "plain").exit_code == 0
    done = start(*plain, "--labels", "--limit", 4, "--with-prior")
    assert done.exit_code == 0, done.output
    firsts = [
        json.loads((tmp_path / name / FILES[2]).read_text())["stages"]["qacon"]["first"]
        for name in ("plain", "adapter")
    ]
    assert firsts[1] > firsts[0] + 0.5
    assert json.loads((tmp_path / "adapter" / FILES[0]).read_text())["prior"] is not None
    (tmp_path / "map.json").write_text(json.dumps({f"class {i}": 3 - i for i in range(4)}))
    done = start(*plain, "--labels", "--class-map", tmp_path / "map.json", "--label-weight", 0.1, out=tmp_path / "c")
    assert done.exit_code == 0, done.output
    done = start(*plain, "--labels", images=images / "class 1", out=tmp_path / "d")
    assert (done.exit_code, "holds no folders of classes" in done.stderr) == (2, True)


def test_a_loss_that_is_not_finite_shows_in_the_exit_code(start, tmp_path):
    done = start("fit-prior", "test_resnet_ddp", "--corruptions", "contrast", "--lr", "1e30", "--steps", 30)
    assert done.exit_code == 1, done.output
    assert "the loss was not finite: the adapter holds the best state before; try a lower --lr" in done.stderr
    assert files(tmp_path / "adapter") == FILES


def test_unreadable_images_show_in_the_exit_code(start, images, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "ü.jpg").write_bytes(b"no image")
    for index, path in enumerate(images.rglob("*.JPG")):
        (folder / f"{index}.jpg").write_bytes(path.read_bytes())
    done = start("fit-prior", "test_resnet", "--corruptions", "contrast", images=folder)
    assert done.exit_code == 3, done.output
    assert "warning: " in done.stderr
    assert f"unreadable: {folder / 'ü.jpg'}" in done.stderr
    assert files(tmp_path / "adapter") == FILES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/none/there"], "there is no file or folder /none/there"),
        (["--corruptions", "fogg"], "Did you mean fog"),
        (["--severities", "1,x"], "--severities: expected numbers"),
        (["--fdm", "ligth"], "did you mean 'light'"),
        (["--site", "layer9"], "site='layer9' matches no module"),
        (["--deep", "layer9"], "deep='layer9' matches no module"),
        (["--mean", 0.5], "--mean and --std go together"),
        (["--amp", "fp16"], "needs a GPU"),
        (["--plot", "out.docx"], "must end in one of"),
        (["--num-classes", 5], "do not fit test_resnet"),
        (["--adapter", "none/there/at-all"], "no adapter"),
        (["--held-out", 0], "held_out must be above 0"),
        (["--budget", 0.5, "--fdm", "dense"], "--budget chooses the modules"),
        (["--model-kwargs", "colour=red"], "colour"),
    ],
)
def test_mistakes_are_told_in_one_line(start, tmp_path, arguments, message):
    done = start("fit-prior", "test_resnet", "--corruptions", "contrast", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not set(FILES) & set(files(tmp_path / "adapter") if (tmp_path / "adapter").exists() else [])


def test_a_finished_fit_that_cannot_be_saved_is_kept(start, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ["fit-prior", "test_resnet", "--corruptions", "contrast"]
    with monkeypatch.context() as patch:
        patch.setattr("quac_plugins.core.inject.adapter.write_adapter", full)
        first = start(*arguments)
    assert first.exit_code == 2
    assert "No space left on device" in first.stderr
    assert "the fit is kept in" in first.stderr
    assert files(tmp_path / "adapter") == [".fit"]
    monkeypatch.setattr(Fit, "_one_step", None)  # nothing is fitted anew
    again = start(*arguments)
    assert again.exit_code == 0, again.output
    assert files(tmp_path / "adapter") == sorted(FILES)


def test_interrupted_and_gone_on_with(start, tmp_path, monkeypatch):
    arguments = ["fit-prior", "test_resnet", "--corruptions", "contrast,pixelate", "--fdm", "light"]
    whole = start(*arguments, out=tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    usual, done = Fit._one_step, [0]

    def interrupted(self):
        done[0] += 1
        if done[0] == 6:
            raise KeyboardInterrupt
        return usual(self)

    monkeypatch.setattr(Fit, "_one_step", interrupted)
    first = start(*arguments)
    assert first.exit_code == 130
    assert first.stderr == "interrupted; the same command goes on from where it was\n"
    assert files(tmp_path / "adapter") == [".fit"]
    assert "fit-contrast.pt" in files(tmp_path / "adapter" / ".fit")
    monkeypatch.setattr(Fit, "_one_step", usual)
    other = start(*arguments, "--lr", 0.1)
    assert (other.exit_code, "belongs to another fit" in other.stderr) == (2, True)
    again = start(*arguments)
    assert again.exit_code == 0, again.output
    assert files(tmp_path / "adapter") == FILES
    one, two = (load_file(tmp_path / name / FILES[1]) for name in ("whole", "adapter"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    # or from the beginning
    monkeypatch.setattr(Fit, "_one_step", interrupted)
    done[0] = 0
    assert start(*arguments, "--overwrite").exit_code == 130
    monkeypatch.setattr(Fit, "_one_step", usual)
    again = start(*arguments, "--overwrite", "--no-resume", "--lr", 0.1)
    assert again.exit_code == 0, again.output
    assert files(tmp_path / "adapter") == FILES


def test_students():
    kwargs = {"pretrained": False, "num_classes": 4}
    for name, wanted, there in (
        ("test_resnet", {"prior"}, (False, True)),
        ("test_resnet.r160_in1k", {"quac"}, (True, False)),
        ("test_resnet_ddp", {"quac"}, (True, True)),
        ("test_resnet_qacon_ddp.r160_in1k", set(), (True, True)),
    ):
        model = build_network(name, wanted, model_kwargs={"site": "layer1"} if there[1] else {}, **kwargs)
        record = injection_of(model)
        assert (record.config is not None, record.prior is not None) == there
        assert record.prior is None or [site.name for site in record.prior.sites] == ["layer1"]
    one, other = (build_network("test_resnet", {"prior"}, seed=4, **kwargs) for _ in range(2))
    states = [quac_plugins.adapter_state(model) for model in (one, other)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
