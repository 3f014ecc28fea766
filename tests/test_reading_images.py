"""One set of rules for pictures, whoever reads them."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import quac_plugins.evaluate.data
from quac_plugins import images
from quac_plugins.degradations import Corrupt
from quac_plugins.fit.sources import few_images

GREY = data.camera()[::8, ::8]
DEEP = GREY.astype(np.uint16) * 257


def test_sixteen_bits_are_the_same_to_every_reader(tmp_path):
    deep = Image.fromarray(DEEP)
    deep.save(tmp_path / "deep.png")
    for given in (deep, DEEP, DEEP[..., None], torch.from_numpy(DEEP), Image.fromarray(DEEP.astype(np.int32))):
        assert (images.to_uint8(given) == GREY[..., None]).all()
        assert (few_images(given).clean[0] == GREY[..., None]).all()
        assert torch.equal(images.pictures_of(given)[0].pixels[1], torch.from_numpy(DEEP.astype(np.float32) / 65535))
    for read in (images.read_image(tmp_path / "deep.png"), images.to_rgb(deep)):
        assert (np.asarray(read) == GREY[..., None]).all()
    fog = Corrupt("fog", seed=0)
    assert (np.asarray(fog(deep)) == np.asarray(fog(Image.fromarray(GREY)))).all()


def test_a_name_that_has_moved_is_found_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"evaluate\.data\.read_image is deprecated.*quac_plugins\.images"):
        assert quac_plugins.evaluate.data.read_image is images.read_image
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        quac_plugins.evaluate.data.nothing  # noqa: B018
