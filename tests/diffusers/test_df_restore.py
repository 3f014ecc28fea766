"""``quac restore`` and its picture, on real photographs."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from typer.testing import CliRunner

import quac_plugins
from quac_plugins.commands import app


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline().save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def restore(*arguments):
    command = [sys.executable, "-m", "quac_plugins.cli", "restore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_photograph_and_its_comparison(saved, photograph, pipeline, tmp_path):
    turned = photograph(size=(48, 32))
    exif = turned.getexif()
    exif[274] = 6  # turned by a quarter
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned.save(tmp_path / "photo.jpg", exif=exif, quality=95, icc_profile=profile)
    out, compare = tmp_path / "made" / "restored.png", tmp_path / "compare.png"
    done = restore(tmp_path / "photo.jpg", out, "--model", saved, "--steps", 2, "--compare", compare)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as restored, Image.open(compare) as picture:
        assert restored.size == (32, 48)
        assert restored.info["icc_profile"] == profile
        assert min(picture.size) > 400
        with Image.open(tmp_path / "photo.jpg") as photo:
            expected = pipeline()(ImageOps.exif_transpose(photo), num_inference_steps=2).images[0]
        assert np.array_equal(np.asarray(restored), np.asarray(expected))


def test_what_cannot_be_done_is_said_in_a_line(saved, photograph, tmp_path):
    photograph().save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for arguments, message in [
        ((tmp_path / "nothing.png", tmp_path / "out.png", "--model", saved), "there is no picture"),
        ((tmp_path / "broken.png", tmp_path / "out.png", "--model", saved), "cannot read"),
        ((tmp_path / "photo.png", tmp_path / "out.gif", "--model", saved), "out.gif must end in one of"),
        ((tmp_path / "photo.png", tmp_path / "out.png", "--model", tmp_path), "error: "),
    ]:
        done = CliRunner().invoke(app, ["restore", *map(str, arguments)])
        assert done.exit_code == 2, done.exception
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out.png").exists()


def test_configs_of_the_registry_build(plain):
    import json

    from quac_plugins.diffusers import QuACUNet2DModel

    for name in ("restoration_small", "restoration_large"):
        path = quac_plugins.registry_file(f"diffusers/{name}.json")
        config = json.loads(open(path, encoding="utf-8").read())  # noqa: SIM115
        model = QuACUNet2DModel.from_config(config)
        assert model.config["quac"]["where"] == "all"
