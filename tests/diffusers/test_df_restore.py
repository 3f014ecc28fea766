"""``quac restore`` and its picture, on real photographs."""

import struct
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


def run(*arguments):
    return CliRunner().invoke(app, ["restore", *map(str, arguments)])


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


def test_what_a_camera_noted_stays(saved, photograph, tmp_path):
    photo = photograph()
    exif = photo.getexif()
    exif[0x010F], exif[0x0112] = "a camera", 6
    photo.save(tmp_path / "photo.jpg", exif=exif, dpi=(300, 300))
    for suffix in ("jpg", "png", "webp"):
        assert run(tmp_path / "photo.jpg", tmp_path / f"out.{suffix}", "--model", saved).exit_code == 0
        with Image.open(tmp_path / f"out.{suffix}") as out:
            assert out.getexif()[0x010F] == "a camera"
            assert 0x0112 not in out.getexif()
            assert out.size == (32, 48)
            if suffix != "webp":  # which has no place for it
                assert out.info["dpi"] == pytest.approx((300, 300), abs=0.1)


@pytest.mark.parametrize(("mode", "space"), [("CMYK", b"CMYK"), ("L", b"GRAY")])
def test_a_profile_of_other_colours_is_not_handed_on(mode, space, saved, photograph, tmp_path):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = space  # nothing can be converted by it
    photograph().convert(mode).save(tmp_path / "photo.jpg", icc_profile=bytes(profile))
    assert run(tmp_path / "photo.jpg", tmp_path / "out.png", "--model", saved).exit_code == 0
    with Image.open(tmp_path / "out.png") as out:
        assert out.mode == "RGB"
        assert "icc_profile" not in out.info


def linear_grey():
    """An ICC profile (version 2) of grey values that are proportional to the light."""
    white = struct.pack(">3i", *(round(65536 * value) for value in (0.9642, 1.0, 0.8249)))
    tags = {
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">I", 0),
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"g\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">2I", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), b"", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"", b"acsp"
    )
    header = header.ljust(68, b"\0") + white
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def srgb(light):
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


def test_a_grey_profile_is_applied(saved, photograph, pipeline, tmp_path):
    """Linear light, as a scanner's: its colours are those that the profile means."""
    grey = photograph().convert("L")
    exif = grey.getexif()
    exif[0x010F] = "a scanner"
    grey.save(tmp_path / "photo.png", icc_profile=linear_grey(), exif=exif)
    assert run(tmp_path / "photo.png", tmp_path / "out.png", "--model", saved).exit_code == 0
    meant = grey.point(lambda value: round(255 * srgb(value / 255)))
    right, wrong = (np.asarray(pipeline()(image).images[0], float) for image in (meant, grey))
    with Image.open(tmp_path / "out.png") as out:
        assert out.getexif()[0x010F] == "a scanner"
        assert np.abs(np.asarray(out, float) - right).mean() < 2  # a step of 1 in some pixels of what went in
    assert np.abs(wrong - right).mean() > 20


def test_a_grey_profile_beside_transparency(saved, photograph, tmp_path):
    grey = photograph().convert("LA")
    grey.putalpha(100)
    grey.save(tmp_path / "photo.png", icc_profile=linear_grey())
    assert run(tmp_path / "photo.png", tmp_path / "out.png", "--model", saved).exit_code == 0
    with Image.open(tmp_path / "out.png") as out:
        assert out.mode == "RGBA"
        assert set(np.asarray(out)[..., 3].flatten()) == {100}


def test_notes_that_do_not_fit_are_left_out_and_that_is_said(saved, photograph, tmp_path):
    photo = photograph()
    exif = photo.getexif()
    exif[0x010F] = "x" * 70000  # a JPEG has room for 64 KB
    photo.save(tmp_path / "photo.png", exif=exif)
    done = run(tmp_path / "photo.png", tmp_path / "out.jpg", "--model", saved)
    assert done.exit_code == 0
    assert "out.jpg: exif could not be written into it" in done.stderr
    with Image.open(tmp_path / "out.jpg") as out:
        assert out.size == photo.size


def test_clear_pixels_are_white_where_there_is_no_transparency(saved, photograph, tmp_path):
    photo = photograph()
    photo.putalpha(0)
    photo.save(tmp_path / "photo.png")
    for suffix in ("bmp", "jpg"):
        assert run(tmp_path / "photo.png", tmp_path / f"out.{suffix}", "--model", saved).exit_code == 0
        with Image.open(tmp_path / f"out.{suffix}") as out:
            assert np.asarray(out.convert("RGB")).min() == 255


def test_of_several_pictures_the_first_is_restored_and_that_is_said(saved, photograph, tmp_path):
    photograph().save(tmp_path / "two.tif", save_all=True, append_images=[photograph("coffee")])
    done = run(tmp_path / "two.tif", tmp_path / "out.png", "--model", saved)
    assert done.exit_code == 0
    assert "two.tif holds 2 pictures; the first is restored" in done.stderr


def test_what_cannot_be_done_is_said_in_a_line(saved, photograph, tmp_path):
    photograph().save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    photograph().save(tmp_path / "mine.png")
    for arguments, message in [
        (
            (tmp_path / "photo.png", tmp_path / "mine.png"),
            "mine.png is there already; give another file, or --overwrite",
        ),
        (
            (tmp_path / "photo.png", tmp_path / "out.png", "--compare", tmp_path / "mine.png"),
            "mine.png is there already, and is no figure of ours",
        ),
        ((tmp_path / "nothing.png", tmp_path / "out.png", "--model", saved), "there is no picture"),
        ((tmp_path / "broken.png", tmp_path / "out.png", "--model", saved), "cannot read"),
        ((tmp_path / "photo.png", tmp_path / "out.gif", "--model", saved), "out.gif must end in one of"),
        ((tmp_path / "photo.png", tmp_path / "out.png", "--model", tmp_path), "error: "),
        (
            (tmp_path / "photo.png", tmp_path / "out.png", "--compare", tmp_path / "photo.png"),
            "would replace ",
        ),
        ((tmp_path / "photo.png", tmp_path / "out.png", "--compare", tmp_path / "out.png"), "would replace "),
        (
            (tmp_path / "photo.png", tmp_path / "out.png", "--device", "meta"),
            "--device 'meta' cannot be used: it holds",
        ),
        ((tmp_path / "photo.png", tmp_path / "out.png", "--device", "gpu"), "--device 'gpu' cannot be used: "),
        ((tmp_path / "photo.png", tmp_path / "out.png", "--seed", 2**64), "--seed"),
        ((tmp_path / "photo.png", tmp_path / "broken.png" / "out.png"), "is no folder, nor can it be made"),
        ((tmp_path / "nothing.png", tmp_path / "new" / "out.png"), "there is no picture"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 2, done.exception
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out.png").exists()
    assert not (tmp_path / "new").exists()
    with Image.open(tmp_path / "photo.png") as photo:
        assert photo.size == photograph().size


def test_configs_of_the_registry_build(plain):
    import json

    from quac_plugins.diffusers import QuACUNet2DModel

    for name in ("restoration_small", "restoration_large"):
        path = quac_plugins.registry_file(f"diffusers/{name}.json")
        config = json.loads(open(path, encoding="utf-8").read())  # noqa: SIM115
        model = QuACUNet2DModel.from_config(config)
        assert model.config["quac"]["where"] == "all"
