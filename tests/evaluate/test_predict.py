"""What ``quac predict`` and :func:`predict` tell of a picture is what the network gives."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from typer.testing import CliRunner

import quac_plugins as quac
from quac_plugins.commands import app
from quac_plugins.core.prior.margins import Margin
from quac_plugins.evaluate.predict import predict


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


@pytest.fixture(scope="module")
def fitted(host):
    """With margins that do something, and the folder of their adapter to be."""
    import copy

    model = quac.inject(copy.deepcopy(host), quac.PriorConfig(fdm="margin", experts=["fog", "gaussian_noise"])).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Margin):
                module.table.fill_(0.2)
    return model


def test_the_classes_are_those_of_the_logits(host, fitted):
    picture = Image.fromarray(data.astronaut())
    found = predict(fitted, picture, top=3)
    config = timm.data.resolve_data_config({}, model=host)
    images = timm.data.create_transform(**config)(picture)[None]
    with torch.no_grad():
        for model, told in ((host, found.host), (fitted, found.classes)):
            expected = model(images).softmax(1)[0].topk(3)
            assert [100 * value for value in expected.values.tolist()] == pytest.approx([v for _, v in told], rel=1e-3)
    info = timm.data.ImageNetInfo()
    with torch.no_grad():
        best = int(host(images).argmax())
    assert found.host[0][0] == info.index_to_description(best)
    assert 0 <= found.quality["severity"] <= 5
    assert predict(host, picture).host is None
    assert predict(host, picture).quality == {}


def test_the_command(host, fitted, tmp_path):
    save_file(host.state_dict(), tmp_path / "host.safetensors")
    quac.save_adapter(fitted, tmp_path / "adapter")
    Image.fromarray(data.coffee()).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((90, 80), np.uint8)).save(tmp_path / "grey.png")
    given = [
        "--model",
        "test_resnet",
        "--base-checkpoint",
        tmp_path / "host.safetensors",
        "--adapter",
        tmp_path / "adapter",
    ]
    done = command(
        "predict",
        tmp_path / "a.png",
        tmp_path / "grey.png",
        *given,
        "--degrade",
        "fog:4",
        "--json",
        tmp_path / "o.json",
    )
    assert done.exit_code == 0, done.output
    assert "host alone" in done.stdout
    assert "quality: fog" in done.stdout
    told = json.loads((tmp_path / "o.json").read_text())
    assert len(told) == 2
    assert all(len(one["classes"]) == len(one["host"]) == 5 for one in told.values())
    for arguments, message in (
        ([tmp_path / "none.png", *given], "there is no picture"),
        ([tmp_path / "a.png", *given, "--degrade", "fog:9"], "severity"),
        ([tmp_path / "a.png", *given, "--degrade", "weather"], "one corruption and its severity, such as fog:3"),
    ):
        done = command("predict", *arguments)
        assert done.exit_code == 2
        assert message in done.stderr
