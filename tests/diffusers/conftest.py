"""Small networks of diffusers, built as its users build them, and real photographs as its pipelines take them."""

import logging

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from skimage import data

import quac_plugins as quac
from quac_plugins.diffusers import QuACRestorationPipeline, QuACUNet2DModel

SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture
def plain():
    """diffusers' own small UNet, always with the same weights."""

    def make(**changes):
        torch.manual_seed(0)
        return UNet2DModel(**{**SMALL, **changes}).eval()

    return make


@pytest.fixture
def unet():
    """The same with QuAC inside, which is not as it was created."""

    def make(quac_options=None, **changes):
        torch.manual_seed(0)
        model = QuACUNet2DModel(**{**SMALL, **changes}, quac=quac_options).eval()
        with torch.no_grad():
            for tensor in quac.adapter_state(model).values():
                tensor.add_((0.05 * torch.randn(tensor.shape)).to(tensor.dtype))
        return model

    return make


@pytest.fixture
def pipeline(unet):
    """A restoration pipeline that shows no progress."""

    def make(network=None, **options):
        pipe = QuACRestorationPipeline(network or unet(), FlowMatchEulerDiscreteScheduler(), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def photograph():
    """photograph("astronaut", (48, 32)): a PIL image of that size, width first."""

    def load(name="astronaut", size=(48, 32)):
        return Image.fromarray(np.ascontiguousarray(getattr(data, name)()[..., :3])).resize(size)

    return load
