"""What users give a pipeline as images, and what they must not."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from skimage import data

from quac_plugins.images import give_back, pictures_of

PHOTO = Image.fromarray(data.chelsea()).resize((30, 20))
PIXELS = np.asarray(PHOTO)
TENSOR = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)


def expected(pixels=PIXELS):
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


@pytest.mark.parametrize(
    "image",
    [PHOTO, PIXELS, PIXELS[None], PIXELS / 255.0, TENSOR, TENSOR / 255, TENSOR[None] / 255, (TENSOR / 255).double()],
    ids=["pil", "array", "batch", "floats", "tensor uint8", "tensor", "tensors", "double"],
)
def test_every_form_is_the_same_picture(image):
    for given in (image, [image], (image,)):
        (picture,) = pictures_of(given)
        torch.testing.assert_close(picture.pixels, expected(), rtol=0, atol=1e-6)
        assert picture.alpha is None


def test_half_precision_tensors():
    for dtype in (torch.float16, torch.bfloat16):
        (picture,) = pictures_of((TENSOR / 255).to(dtype))
        torch.testing.assert_close(picture.pixels, expected(), rtol=0, atol=5e-3)


def test_grey_is_repeated():
    grey = np.asarray(PHOTO.convert("L")).copy()
    for image in (PHOTO.convert("L"), grey, grey[..., None], grey[None, ..., None], torch.from_numpy(grey)[None] / 255):
        (picture,) = pictures_of(image)
        torch.testing.assert_close(picture.pixels, expected(np.stack([grey] * 3, -1)), rtol=0, atol=1e-6)


def test_sixteen_bits_keep_their_range():
    deep = np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257
    for image in (Image.fromarray(deep), deep, Image.fromarray(deep.astype(np.int32))):
        (picture,) = pictures_of(image)
        torch.testing.assert_close(picture.pixels[0], torch.from_numpy(deep.astype(np.float32) / 65535))


def test_transparency_comes_back():
    clear = PHOTO.copy()
    clear.putalpha(PHOTO.convert("L"))
    (picture,) = pictures_of(clear)
    (back,) = give_back([picture], "pil")
    assert back.mode == "RGBA"
    assert np.array_equal(np.asarray(back), np.asarray(clear))
    palette = clear.convert("P")
    assert pictures_of(palette.convert("RGBA"))[0].alpha is not None


@pytest.mark.parametrize("mode", ["La", "RGBa", "LA", "PA"])
def test_transparency_in_other_modes(mode):
    clear = PHOTO.convert("RGBA" if mode in ("RGBa", "PA") else "LA")
    clear.putalpha(PHOTO.convert("L").point(lambda value: 128 + value // 2))
    (picture,) = pictures_of(clear.convert(mode) if mode != "PA" else clear.convert("P").convert("PA"))
    assert picture.alpha is not None
    if mode != "PA":
        assert np.array_equal(np.asarray(picture.alpha), np.asarray(clear.getchannel("A")))


def test_the_value_that_is_clear_among_sixteen_bits():
    deep = np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257
    image = Image.fromarray(deep)
    image.info["transparency"] = int(deep[3, 4])
    assert np.array_equal(np.asarray(pictures_of(image)[0].alpha), np.where(deep == deep[3, 4], 0, 255))


def test_the_second_channel_of_lab_is_no_transparency():
    lab = ImageCms.profileToProfile(
        PHOTO, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    (picture,) = pictures_of(lab)
    assert picture.alpha is None
    torch.testing.assert_close(picture.pixels, expected(PIXELS), atol=0.03, rtol=0)


def test_several_sizes():
    small = PHOTO.resize((7, 9))
    pictures = pictures_of([PHOTO, small])
    assert [tuple(p.pixels.shape) for p in pictures] == [(3, 20, 30), (3, 9, 7)]
    assert [image.size for image in give_back(pictures, "pil")] == [(30, 20), (7, 9)]
    assert [array.shape for array in give_back(pictures, "np")] == [(20, 30, 3), (9, 7, 3)]
    assert [tuple(t.shape) for t in give_back(pictures, "pt")] == [(3, 20, 30), (3, 9, 7)]
    assert give_back(pictures[:1] * 2, "np").shape == (2, 20, 30, 3)
    assert give_back(pictures[:1] * 2, "pt").shape == (2, 3, 20, 30)


def with_nan():
    pixels = (PIXELS / 255.0).copy()
    pixels[3, 4] = np.nan
    return pixels


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (with_nan(), ValueError, "the image has values from nan to nan"),
        ([PHOTO, with_nan()], ValueError, "image 1 has values from nan"),
        (PIXELS * 1.0, ValueError, r"values from .*; images of floats must be in \[0, 1\].* as uint8$"),
        (TENSOR / 127.5 - 1, ValueError, r"floats must be in \[0, 1\].*; those in \[-1, 1\] become so by"),
        (PIXELS[..., :2], ValueError, r"shape \(20, 30, 2\); an array must .*\(H, W, 3\)"),
        (torch.rand(4, 8, 8), ValueError, r"shape \(4, 8, 8\); a tensor must .*\(3, H, W\)"),
        (torch.rand(1, 2, 3, 8, 8), ValueError, "; a tensor must have the shape"),
        (PIXELS.astype(np.int64), TypeError, "dtype int64; expected uint8 in 0..255, uint16"),
        (TENSOR.long(), TypeError, r"dtype torch\.int64; expected uint8 in 0..255, uint16"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"the image has the shape \(0, 4, 3\)"),
        ([], ValueError, "there is no image"),
        (np.zeros((0, 4, 4, 3)), ValueError, "there is no image"),
        ("photo.jpg", TypeError, "of type str; expected an array, a tensor or a PIL image, alone, in a list"),
        ([[PHOTO]], TypeError, "the image is of type list"),
        (None, TypeError, "of type NoneType"),
        (PHOTO.convert("F"), ValueError, "PIL mode F"),
        (
            Image.fromarray(np.full((4, 4), 2**20, np.int32)),
            ValueError,
            "integers from 1048576 to 1048576, which have no",
        ),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), ValueError, "mode I.*from -1 to -1"),
    ],
)
def test_what_is_no_image_is_named(image, error, message):
    with pytest.raises(error, match=message):
        pictures_of(image)
